//! Stock QEMUs, over their QMP sockets: `sg evict` is their destination, and `sg gather --qmp` another's source.

mod again;
mod gather;
mod leaver;

use std::path::Path;

use anyhow::{Result, bail};
use libsg::migrate::{Event, Mode};
use qemu::Found;
use serde_json::json;

pub use self::again::{Again, evict as go_on};
pub use self::gather::gather;
pub use self::leaver::{Leaver, Looked, Through};

use super::args::EvictArgs;
use crate::cli::WrongArguments;

/// What cannot hold for the VM of a QEMU is said before anything is done.
pub fn check(args: &EvictArgs) -> Result<()> {
    let parks = args.park.is_some();
    let against = match args.mode.map(Mode::from) {
        Some(Mode::PreCopy) => "--mode pre-copy: of a QEMU's VM that QEMU does by itself (its own migrate)",
        Some(Mode::Hybrid) if parks => {
            "--mode hybrid: a QEMU's VM that is parked is sent once, paused (scatter-gather)"
        }
        Some(Mode::Hybrid | Mode::ScatterGather) if args.at.is_empty() => {
            "--mode hybrid and scatter-gather need intermediaries: --intermediary HOST:PORT or --pool"
        }
        Some(Mode::PostCopy) if parks => "--mode post-copy: a VM that is parked has no destination yet",
        _ => return Ok(()),
    };
    Err(WrongArguments(against.into()).into())
}

/// How the VM of a QEMU leaves where this is how all do, and why it is another way.
pub fn mode_of(of_all: Mode, parks: bool) -> (Mode, Option<&'static str>) {
    match of_all {
        Mode::Hybrid if parks => {
            (Mode::ScatterGather, Some("a QEMU's VM that is parked is sent once, paused"))
        }
        mode => (mode, None),
    }
}

/// Says what was found, and fails where something stands in the way.
fn clear(socket: &Path, found: &Found) -> Result<()> {
    for warning in &found.warnings {
        eprintln!("sg: {}: {warning}", socket.display());
    }
    if found.refusals.is_empty() {
        return Ok(());
    }
    bail!("{}: {}", socket.display(), found.refusals.join("\n  and "))
}

/// Events as lines of JSON on standard output, as VMMs print them; of which VM, and of which socket, where there are several.
fn tell(event: &Event, of: Option<(&str, &Path)>) {
    use std::io::Write as _;
    let line = line(event, of);
    let mut out = std::io::stdout().lock();
    // Nobody may be reading; the migration goes on.
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
}

fn line(event: &Event, of: Option<(&str, &Path)>) -> serde_json::Value {
    let mut line = json!(event);
    if let Some((vm, socket)) = of {
        (line["vm"], line["socket"]) = (json!(vm), json!(socket));
    }
    line
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn events_say_whose_they_are_where_there_are_several() {
        let event = Event::Scattered { percent: 5 };
        assert_eq!(line(&event, None).to_string(), r#"{"event":"scattered","percent":5}"#);
        let of = line(&event, Some(("web", Path::new("/run/web.qmp"))));
        assert_eq!(of, json!({"event": "scattered", "percent": 5, "vm": "web", "socket": "/run/web.qmp"}));
    }

    #[test]
    fn what_is_parked_is_sent_once() {
        assert_eq!(mode_of(Mode::Hybrid, false), (Mode::Hybrid, None));
        let (mode, why) = mode_of(Mode::Hybrid, true);
        assert!(mode == Mode::ScatterGather && why.is_some());
        assert_eq!(mode_of(Mode::PostCopy, false).0, Mode::PostCopy);
    }
}

//! Whom an operator means: asks every VMM what VM it has.

use std::path::{Path, PathBuf};

use anyhow::Result;
use vmms::{ControlSocket, Described, State, Vmm as _};

use super::args::Sockets;

/// A VM that can be evicted.
#[derive(Clone, Debug)]
pub struct Found {
    /// Its VMM.
    pub socket: PathBuf,
    /// Its name.
    pub name: String,
    /// What it has in memory.
    pub bytes: u64,
    /// It is leaving already: somebody told it, who is gone.
    pub leaves: bool,
}

/// What became of the question who is there.
#[derive(Debug, Default)]
pub struct Asked {
    /// VMs to evict.
    pub found: Vec<Found>,
    /// What there is to say of others.
    pub notes: Vec<String>,
    /// Some that were meant cannot be evicted.
    pub failed: bool,
}

/// Asks all of them at once: one that does not answer shall not hold up the others.
pub fn ask(sockets: &Sockets) -> Result<Asked> {
    let paths = sockets.find()?;
    let answers: Vec<_> = std::thread::scope(|scope| {
        let ask = |path: &Path| ControlSocket::new(path).describe();
        let asked: Vec<_> = paths.iter().map(|path| scope.spawn(move || ask(path))).collect();
        let panicked = |_| Err(anyhow::anyhow!("asking it failed"));
        asked.into_iter().map(|thread| thread.join().unwrap_or_else(panicked)).collect()
    });
    let mut all = Asked::default();
    for (path, answer) in paths.into_iter().zip(answers) {
        let named = sockets.sockets.contains(&path);
        match answer {
            Ok(described) => all.take(path, described, named),
            // The file of one that is gone.
            Err(error) if !named && is_stale(&error) => {
                all.notes.push(format!("{}: nobody listens there", path.display()));
            }
            Err(error) => {
                all.failed = true;
                all.notes.push(format!("{error:#}"));
            }
        }
    }
    Ok(all)
}

impl Asked {
    fn take(&mut self, socket: PathBuf, described: Described, named: bool) {
        let why = match (described.state, described.vm) {
            (State::Here | State::Leaving, Some(name)) => {
                let leaves = described.state == State::Leaving;
                self.found.push(Found { socket, name, bytes: described.present_bytes, leaves });
                return;
            }
            (State::Left, _) => "its VM has left already",
            (State::Arriving, _) => "its VM is not all there yet: it can leave when it is",
            (State::Empty | State::Here | State::Leaving, _) => "there is no VM",
        };
        self.failed |= named && described.state != State::Left;
        self.notes.push(format!("{}: {why}", socket.display()));
    }
}

fn is_stale(error: &anyhow::Error) -> bool {
    let cause = error.root_cause().downcast_ref::<std::io::Error>();
    cause.is_some_and(|cause| cause.kind() == std::io::ErrorKind::ConnectionRefused)
}

/// The names under which VMs are parked: their own, behind the prefix; told apart by their sockets where they are the
/// same.
pub fn parking_names(vms: &[Found], prefix: &str) -> Vec<String> {
    let name = |vm: &Found| match (prefix, vms.len()) {
        ("", _) => vm.name.clone(),
        (prefix, 1) => prefix.to_owned(),
        (prefix, _) => format!("{prefix}-{}", vm.name),
    };
    let names: Vec<String> = vms.iter().map(name).collect();
    let unique = |(vm, name): (&Found, &String)| {
        let stem = vm.socket.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
        let again = names.iter().filter(|other| *other == name).count() > 1;
        if again { format!("{name}-{stem}") } else { name.clone() }
    };
    vms.iter().zip(&names).map(unique).collect()
}

#[cfg(test)]
mod test {
    use super::*;

    fn found(name: &str, socket: &str) -> Found {
        Found { socket: socket.into(), name: name.into(), bytes: 1, leaves: false }
    }

    #[test]
    fn parked_vms_have_names_of_their_own() {
        let vms = [found("web", "/run/a.sock"), found("db", "/run/b.sock"), found("web", "/run/c.sock")];
        assert_eq!(parking_names(&vms, ""), ["web-a", "db", "web-c"]);
        assert_eq!(parking_names(&vms[..2], "rack7"), ["rack7-web", "rack7-db"]);
        assert_eq!(parking_names(&vms[..1], "rack7"), ["rack7"]);
        assert_eq!(parking_names(&vms[..1], ""), ["web"]);
    }

    #[test]
    fn whoever_was_named_and_cannot_leave_is_a_failure() {
        let mut asked = Asked::default();
        let said = |state, vm: Option<&str>| Described {
            vm: vm.map(str::to_owned),
            state,
            memory_bytes: 2,
            present_bytes: 1,
        };
        asked.take("/a".into(), said(State::Here, Some("a")), true);
        asked.take("/b".into(), said(State::Left, Some("b")), true);
        asked.take("/c".into(), said(State::Empty, None), false);
        assert_eq!((asked.found.len(), asked.notes.len(), asked.failed), (1, 2, false));
        asked.take("/d".into(), said(State::Empty, None), true);
        assert!(asked.failed);
    }
}

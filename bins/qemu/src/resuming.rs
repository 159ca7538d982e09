//! A QEMU whose feeder died: whether somebody can go on, and how.

use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use libsg::page::{PageIndex, PageRange};
use libsg::sink::{InstallOutcome, PageSink, SinkEvent};
use libsg::{Error, ErrorKind, Result};
use qemu_stream::Configuration;
use serde_json::json;

use crate::feeder::Feeder;
use crate::layout::Layout;
use crate::machine;
use crate::preflight::{Found, look_at_version};
use crate::qmp::{PAUSED, Qmp};
use crate::record::{Record, process_of};

/// A QEMU notices at once that its feeder is dead; on a busy host a little later.
const NOTICES: Duration = Duration::from_secs(3);

/// Looks at a QEMU with whose VM somebody is to go on, as was written down of it. Changes nothing.
///
/// # Errors
/// [`Qmp::execute`]'s; [`ErrorKind::Input`] when what was written down is not of a QEMU.
pub fn resumable(qmp: &mut Qmp, record: &Record) -> Result<Found> {
    let mut found = Found::default();
    look_at_version(qmp, &mut found);
    if record.qemu.is_some_and(|of| process_of(qmp).is_some_and(|process| process != of)) {
        let what = "this is not the QEMU that took the VM: another has its socket since, and nothing is to be resumed";
        found.refusals.push(what.into());
        return Ok(found);
    }
    let state = broken_state(qmp)?;
    match state.as_str() {
        PAUSED => {}
        "completed" => {
            let what = "the VM has all of its memory, and nothing is to be resumed: who fed it did not come to giving back that of \
                        the intermediaries, which is done now";
            found.warnings.push(what.into());
        }
        "none" => found.refusals.push(
            "no VM came to this QEMU yet, and so nothing is to be resumed: --listen, where sg evict --qmp sends it, or --claim, \
             of one that is parked"
                .into(),
        ),
        "postcopy-device" | "postcopy-active" | "postcopy-recover" | "postcopy-recover-setup" => found.refusals.push(format!(
            "its migration is \"{state}\" and not \"postcopy-paused\": another feeds it. End that one first; where it hangs, \
             migrate-pause over QMP has this QEMU let go of it"
        )),
        other => found.refusals.push(format!(
            "its migration is \"{other}\" and not \"postcopy-paused\": nothing can be resumed (query-migrate)"
        )),
    }
    let (layout, configuration, _) = Layout::of(&record.unfinished.manifest)?;
    let kind = machine::kind(qmp)?;
    let lacks = machine::memory(qmp, layout.blocks())?;
    if kind != configuration.machine || !lacks.is_empty() {
        found.refusals.push("it is another machine than the one that the VM was given to".into());
    }
    Ok(found)
}

/// Where its migration stands; when it has noticed that its feeder is dead, if it is.
fn broken_state(qmp: &mut Qmp) -> Result<String> {
    let deadline = Instant::now() + NOTICES;
    loop {
        let state = qmp.migration()?;
        let may_change = matches!(state.as_str(), "postcopy-device" | "postcopy-active");
        if !may_change || Instant::now() >= deadline {
            return Ok(state);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Whether it has all of its memory: who fed it did not hear so.
pub(crate) fn is_complete(qmp: &mut Qmp) -> Result<bool> {
    Ok(qmp.migration()? == "completed")
}

/// Goes on with a QEMU that lost its feeder.
pub(crate) fn recover(qmp: &mut Qmp, of: (Layout, Configuration, u32)) -> Result<Feeder> {
    let (ours, _) = qmp.connect_by("migrate-recover", json!({}))?;
    Feeder::recover(ours, of)
}

/// A QEMU that has so many pages, and takes no more.
pub(crate) struct Whole(pub(crate) u32);

impl PageSink for Whole {
    fn install(&self, first: PageIndex, _bytes: &[u8]) -> Result<InstallOutcome> {
        Err(Error::new(ErrorKind::Input, "the VM has this page").about([PageRange::new(first, 1)]))
    }

    fn install_zero(&self, range: PageRange) -> Result<InstallOutcome> {
        Err(Error::new(ErrorKind::Input, "the VM has these pages").about([range]))
    }

    fn poison(&self, _range: PageRange) -> Result<()> {
        Ok(())
    }

    fn in_place(&self, each: &mut dyn FnMut(PageRange)) {
        each(PageRange::new(PageIndex(0), self.0));
    }

    fn events(&self, _out: &mut Vec<SinkEvent>) -> Result<usize> {
        Ok(0)
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    fn finish(&self) -> Result<()> {
        Ok(())
    }
}

//! How a migration ends at its source as one that has failed, wherever it stands: the VM stays there.

use std::sync::Arc;
use std::time::{Duration, Instant};

use libsg::manifest::Manifest;
use libsg::page::{PageIndex, PageRange};
use libsg::source::{Outcome, PageSource as _, Supply};
use libsg::{ErrorKind, Result};
use parking_lot::Mutex;

use crate::qmp::{PAUSED, Qmp, STEP};
use crate::relay::{Limits, Relay};
use crate::steering::ByQmp;

/// A QEMU notices at once that its relay is dead; on a busy host a little later.
const NOTICES: Duration = Duration::from_secs(3);

pub(crate) fn is_over(status: &str) -> bool {
    matches!(status, "none" | "cancelled" | "failed" | "completed")
}

fn has_switched(status: &str) -> bool {
    status.starts_with("postcopy")
}

/// Ends a migration that is under way, if there is one; with who reads its stream, if somebody does. Nobody was told of COMMIT.
///
/// One that has switched is not cancelled: QEMU 10 refuses that, and 7.2 may take it for a broken network, or leave a thread
/// behind that waits for ever, and without which it does not end. Its stream is broken off, so that it waits to be resumed.
///
/// # Errors
/// [`Qmp::execute`]'s, or that it does not end.
pub(crate) fn call_off(qmp: &Arc<Mutex<Qmp>>, relay: Option<&Relay>, manifest: &Manifest) -> Result<()> {
    let mut status = qmp.lock().migration()?;
    if !has_switched(&status) {
        let cancelled = cancel(&mut qmp.lock());
        status = match cancelled {
            Ok(status) => status,
            // It may have switched meanwhile.
            Err(error) if error.kind == ErrorKind::Vm => {
                Some(qmp.lock().migration()?).filter(|now| has_switched(now)).ok_or(error)?
            }
            Err(error) => return Err(error),
        };
    }
    if has_switched(&status) && status != PAUSED {
        match relay {
            // One that has said everything cannot be resumed.
            Some(relay) if is_through(relay) => relay.refuse(STEP)?,
            Some(relay) => relay.hang_up(),
            None => {}
        }
        status = qmp.lock().await_migration(|status| is_over(status) || status == PAUSED)?;
    }
    if status == PAUSED { refuse(qmp, manifest) } else { Ok(()) }
}

fn is_through(relay: &Relay) -> bool {
    relay.available(&mut Vec::new()).is_ok_and(|supply| supply == Supply::Complete)
}

/// Cancels a migration, and says how it stands then: one that switched meanwhile may wait to be resumed.
///
/// # Errors
/// As [`call_off`].
pub(crate) fn cancel(qmp: &mut Qmp) -> Result<String> {
    // It is answered when its disks are at rest, where it is stopping.
    qmp.execute_slow("migrate_cancel")?;
    qmp.await_migration(|status| is_over(status) || status == PAUSED)
}

/// Where its migration stands; when it has noticed that nobody reads its stream, if that is so.
///
/// # Errors
/// [`Qmp::execute`]'s.
pub(crate) fn broken_state(qmp: &mut Qmp) -> Result<String> {
    let deadline = Instant::now() + NOTICES;
    loop {
        let state = qmp.migration()?;
        let may_change = [
            "setup",
            "active",
            "device",
            "cancelling",
            "postcopy-device",
            "postcopy-active",
            "postcopy-recover",
        ];
        if !may_change.contains(&state.as_str()) || Instant::now() >= deadline {
            return Ok(state);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Ends the migration of one that has switched as one that has failed: it hears that everything has come, so that it says its
/// end at once, and is refused. Called off it would wait to be resumed for ever.
fn refuse(qmp: &Arc<Mutex<Qmp>>, manifest: &Manifest) -> Result<()> {
    let relay = Relay::again(manifest, Limits::of_window(0), false)?;
    relay.outcome(PageRange::new(PageIndex(0), manifest.pages()), Outcome::Safe);
    relay.flow(Box::new(ByQmp::new(qmp)))?;
    let refused = relay.refuse(STEP);
    relay.hang_up();
    refused?;
    await_failed(qmp)
}

/// Waits until a migration that was refused has ended.
///
/// # Errors
/// As [`call_off`].
pub(crate) fn await_failed(qmp: &Mutex<Qmp>) -> Result<()> {
    qmp.lock().await_migration(|status| status == "failed").map(drop)
}

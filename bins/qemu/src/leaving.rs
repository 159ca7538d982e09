//! A QEMU whose VM leaves.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use libsg::dirty::DirtyLog;
use libsg::manifest::Manifest;
use libsg::migrate::OutgoingVm;
use libsg::migrate::source::Unscattered;
use libsg::page::PageRange;
use libsg::{Error, ErrorKind, Result};
use parking_lot::Mutex;
use serde_json::json;

use crate::calling_off::{await_failed, call_off, cancel};
use crate::departed::{Departed, DepartedFile, Standing};
use crate::machine::Devices;
use crate::qmp::{Qmp, STEP};
use crate::relay::{Limits, Relay};
use crate::settings::Settings;
use crate::steering::{ByQmp, connect, set_rate};

/// The rate of a stream that is to stand still, in bytes a second: so the source ends neither before post-copy, nor before it is
/// called off.
const STANDSTILL: u64 = 4096;

/// The rate of a stream that nothing but its reader holds up.
const UNLIMITED: u64 = 10_000_000_000;

/// Bytes of pages that are not safe yet, beyond which no more is read of the stream: what a link of 25 Gb/s carries while a page
/// becomes safe, in 10 ms. More is more to be lost with a relay, and more memory to be cleared while a guest waits for pages.
pub const WINDOW_BYTES: u64 = 32 << 20;

/// A QEMU that has begun to send its VM, which runs on meanwhile.
pub struct Departure {
    qmp: Arc<Mutex<Qmp>>,
    settings: Settings,
    relay: Relay,
    manifest: Manifest,
    window_bytes: u64,
    /// Where it is written down what another process would need.
    file: Option<(DepartedFile, Departed)>,
    /// QEMU has said everything, to a process before.
    is_spent: bool,
    /// QEMU was told to stop its VM, and not yet to run it again.
    is_stopped: Arc<AtomicBool>,
}

impl Departure {
    /// Has it begin. The VM has the name of QEMU's `-name`, or `name`.
    ///
    /// # Errors
    /// [`ErrorKind::Vm`] when QEMU refuses; everything is as it was.
    pub fn begin(qmp: Qmp, name: &str) -> Result<Self> {
        Self::begin_within(qmp, name, WINDOW_BYTES)
    }

    /// The same, and no more than so many bytes of pages that are not safe yet are held, but for those that the guest waits for.
    ///
    /// # Errors
    /// As [`Self::begin`].
    pub fn begin_within(mut qmp: Qmp, name: &str, window_bytes: u64) -> Result<Self> {
        let said = qmp.execute("query-name", &json!({}))?;
        let name = said["name"].as_str().unwrap_or(name).to_owned();
        let devices = Devices::of(&mut qmp)?;
        // With a downtime to aim for, a source that has little left sends that at once, and cannot be held or resumed.
        let parameters =
            [("max-bandwidth", STANDSTILL), ("max-postcopy-bandwidth", STANDSTILL), ("downtime-limit", 0)];
        let mut settings = Settings::change(&mut qmp, &[("postcopy-ram", true)], &parameters)?;
        let limits = Limits::of_window(window_bytes);
        match connect(&mut qmp, false)
            .and_then(|connection| Relay::start(connection, limits))
            .and_then(|relay| Ok((relay.manifest(&name, &devices, STEP)?, relay)))
        {
            Ok((manifest, relay)) => {
                let (qmp, file) = (Arc::new(Mutex::new(qmp)), None);
                let (is_spent, is_stopped) = (false, Arc::default());
                Ok(Self { qmp, settings, relay, manifest, window_bytes, file, is_spent, is_stopped })
            }
            Err(error) => match cancel(&mut qmp).and_then(|_| settings.restore(&mut qmp)) {
                Ok(()) => Err(error),
                Err(cause) => {
                    let message = format!(
                        "{}; and the source QEMU is not as it was, though its VM runs (query-migrate, query-migrate-parameters)",
                        error.chain()
                    );
                    Err(Error::new(ErrorKind::Vm, message).because(cause))
                }
            },
        }
    }

    /// Goes on with one whose process died behind COMMIT, as [`standing`](crate::standing) has found it.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] when nothing was written down that could be gone on with; [`ErrorKind::System`] when it cannot be
    /// written anew; nothing was changed.
    pub fn go_on(qmp: Qmp, departed: &Departed, file: DepartedFile, standing: Standing) -> Result<Self> {
        let Some(unscattered) = &departed.unscattered else {
            return Err(Error::new(
                ErrorKind::Input,
                "the VM was not given away: nothing is to be gone on with",
            ));
        };
        let is_spent = standing == Standing::Spent;
        let manifest = unscattered.manifest.clone();
        let window_bytes = departed.window_bytes;
        let relay = Relay::again(&manifest, Limits::of_window(window_bytes), is_spent)?;
        let settings = departed.settings.clone();
        // Whoever comes behind this process finds that it is at it.
        let ours = departed.clone().by_us();
        file.write(&ours)?;
        let (qmp, file) = (Arc::new(Mutex::new(qmp)), Some((file, ours)));
        // By the one before: where it is not parked after all, it runs on.
        let is_stopped = Arc::new(AtomicBool::new(!unscattered.is_committed()));
        Ok(Self { qmp, settings, relay, manifest, window_bytes, file, is_spent, is_stopped })
    }

    /// Another process finds in this file what it needs, if this one dies.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] when the file is another QEMU's, [`ErrorKind::System`] when it cannot be written.
    pub fn record(&mut self, file: DepartedFile) -> Result<()> {
        let mut begun =
            Departed::begun(&self.qmp.lock(), (&self.settings, &self.manifest), self.window_bytes);
        file.begin(&mut begun)?;
        self.file = Some((file, begun));
        Ok(())
    }

    /// What moves.
    #[must_use]
    pub const fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// How often its stream was resumed, to have pages again that were lost.
    #[must_use]
    pub fn resumed(&self) -> u32 {
        self.relay.resumed()
    }

    /// Its pages.
    #[must_use]
    pub fn pages(&self) -> Relay {
        self.relay.clone()
    }

    /// The VM, for who moves it.
    #[must_use]
    pub fn vm(&self) -> LeavingQemu {
        LeavingQemu {
            qmp: Arc::clone(&self.qmp),
            relay: self.relay.clone(),
            manifest: self.manifest.clone(),
            file: self.file.clone(),
            is_stopped: Arc::clone(&self.is_stopped),
            is_spent: self.is_spent,
            all_first: false,
            flows: false,
        }
    }

    /// The VM, for who parks it: all of its memory comes before COMMIT.
    #[must_use]
    pub fn vm_to_park(&self) -> LeavingQemu {
        LeavingQemu { all_first: true, ..self.vm() }
    }

    /// It was moved, and all of it is safe: the source QEMU completes, and ends if `quit`.
    ///
    /// # Errors
    /// When it does not; nothing is lost by that.
    pub fn complete(mut self, quit: bool) -> Result<()> {
        if self.is_spent {
            // It hears nothing any more, of a command to end least of all.
            let ended = if quit { self.qmp.lock().kill() } else { Ok(()) };
            return ended.and_then(|()| self.forget());
        }
        self.relay.release(STEP)?;
        {
            let mut qmp = self.qmp.lock();
            qmp.await_migration(|status| status == "completed")?;
            if quit { qmp.execute("quit", &json!({})).map(drop) } else { self.settings.restore(&mut qmp) }?;
        }
        self.forget()
    }

    /// It was not moved: QEMU's settings are as they were before, and its VM runs.
    ///
    /// # Errors
    /// [`Qmp::execute`]'s.
    pub fn give_up(mut self) -> Result<()> {
        if self.is_spent {
            return Err(spent());
        }
        note_that_it_stays(&mut self.file);
        call_off(&self.qmp, Some(&self.relay), &self.manifest)?;
        self.relay.hang_up();
        {
            let mut qmp = self.qmp.lock();
            run_again(&mut qmp, &self.is_stopped)?;
            self.settings.restore(&mut qmp)?;
        }
        self.forget()
    }

    /// There is nothing that another process could do.
    fn forget(&self) -> Result<()> {
        self.file.as_ref().map_or(Ok(()), |(file, _)| file.remove())
    }
}

/// Where it does not get through, another process is to find that nobody was told of COMMIT, and that the VM is here.
fn note_that_it_stays(file: &mut Option<(DepartedFile, Departed)>) {
    let Some((file, begun)) = file else { return };
    begun.unscattered = None;
    if let Err(error) = file.write(begun) {
        tracing::warn!(error = error.chain(), "it is not written down that the VM stays");
    }
}

/// Why a VM cannot be run here any more.
fn spent() -> Error {
    let message = "the source QEMU has said everything, and waits for a word that it does not hear any more (query-migrate): its VM \
                   cannot be run there, and what is at the intermediaries is kept";
    Error::new(ErrorKind::Vm, message)
}

/// Runs a VM that was stopped here.
fn run_again(qmp: &mut Qmp, is_stopped: &AtomicBool) -> Result<()> {
    if is_stopped.load(Ordering::Acquire) {
        qmp.execute_slow("cont")?;
        is_stopped.store(false, Ordering::Release);
    }
    Ok(())
}

/// Rounds of a QEMU: it logs itself what its VM writes, and sends that again.
struct Rounds {
    qmp: Arc<Mutex<Qmp>>,
    relay: Relay,
}

impl DirtyLog for Rounds {
    fn start(&mut self) -> Result<()> {
        self.relay.begin_rounds()?;
        set_rate(&mut self.qmp.lock(), "max-bandwidth", UNLIMITED)
    }

    fn collect(&mut self, out: &mut Vec<PageRange>) -> Result<()> {
        self.relay.take_written(out)
    }

    /// What it writes is logged until it has moved.
    fn stop(&mut self) -> Result<()> {
        Ok(())
    }
}

/// The VM of a source QEMU under libsg's seam.
pub struct LeavingQemu {
    qmp: Arc<Mutex<Qmp>>,
    relay: Relay,
    manifest: Manifest,
    file: Option<(DepartedFile, Departed)>,
    is_stopped: Arc<AtomicBool>,
    /// QEMU has said everything, to a process before.
    is_spent: bool,
    /// COMMIT comes when all of the memory has come.
    all_first: bool,
    /// The memory comes as fast as it can.
    flows: bool,
}

impl LeavingQemu {
    /// Lets the memory come.
    fn flow(&mut self) -> Result<()> {
        self.flows = true;
        self.relay.taken();
        self.relay.flow(Box::new(ByQmp::new(&self.qmp)))
    }

    /// Ends the migration as one that has failed, in which QEMU's VM stays its own.
    fn end(&self) -> Result<()> {
        // What comes as fast as it can may be through in the moment in which it is broken off. So it says all that it has to say,
        // and is refused.
        if self.flows {
            match self.relay.refuse(STEP) {
                Ok(()) => return await_failed(&self.qmp),
                Err(error) => {
                    tracing::warn!(error = error.chain(), "the source QEMU does not come to its end")
                }
            }
        }
        call_off(&self.qmp, Some(&self.relay), &self.manifest)
    }

    /// Stops the VM, and has QEMU say the state of its devices.
    fn stop(&mut self) -> Result<Vec<u8>> {
        {
            let mut qmp = self.qmp.lock();
            self.is_stopped.store(true, Ordering::Release);
            // It drains and flushes the disks first.
            qmp.execute_slow("stop")?;
            // It is at a standstill: what flows could be through before the switch is looked at.
            set_rate(&mut qmp, "max-bandwidth", STANDSTILL)?;
            qmp.execute("migrate-start-postcopy", &json!({}))?;
        }
        self.relay.end_rounds();
        self.relay.hurry();
        let state = self.relay.state(STEP)?;
        if self.all_first {
            self.flow()?;
        }
        Ok(state)
    }
}

impl OutgoingVm for LeavingQemu {
    /// It is stopped first: so QEMU does not run it by itself when it is called off, before its disks are its own again.
    fn pause(&mut self) -> Result<Vec<u8>> {
        self.stop().map_err(|error| match self.resume() {
            Ok(()) => error,
            Err(cause) => {
                let message = format!(
                    "{}; and the VM may be paused at the source, where it is still: query-status over QMP says so, and cont runs it",
                    error.chain()
                );
                Error::new(ErrorKind::Vm, message).because(cause)
            }
        })
    }

    fn resume(&mut self) -> Result<()> {
        if self.is_spent {
            return Err(spent());
        }
        note_that_it_stays(&mut self.file);
        self.end()?;
        run_again(&mut self.qmp.lock(), &self.is_stopped)
    }

    fn note(&mut self, unscattered: &Unscattered) -> Result<()> {
        let Some((file, begun)) = &mut self.file else { return Ok(()) };
        begun.unscattered = Some(unscattered.clone());
        file.write(begun)
    }

    /// Rounds end before all has come: QEMU's own would end in a switch of its own kind.
    fn dirty_log(&mut self) -> Result<Box<dyn DirtyLog>> {
        if self.all_first {
            return Err(Error::new(ErrorKind::Vm, "a QEMU's VM that is parked is sent once, paused"));
        }
        Ok(Box::new(Rounds { qmp: Arc::clone(&self.qmp), relay: self.relay.clone() }))
    }

    fn go_on(&mut self) -> Result<bool> {
        self.flow()?;
        Ok(!self.is_spent)
    }

    fn committed(&mut self) {
        // It is not run here by mistake.
        self.is_stopped.store(false, Ordering::Release);
        if !self.flows
            && let Err(error) = self.flow()
        {
            tracing::error!(error = error.chain(), "the source QEMU's stream stays slow");
        }
    }
}

#[cfg(test)]
pub(crate) mod test;

//! A QEMU whose VM leaves.

use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use libsg::dirty::DirtyLog;
use libsg::manifest::Manifest;
use libsg::migrate::OutgoingVm;
use libsg::migrate::source::Unscattered;
use libsg::page::PageRange;
use libsg::{Error, ErrorKind, Result};
use parking_lot::Mutex;
use serde_json::json;

use crate::departed::{Departed, DepartedFile, Standing};
use crate::machine::Devices;
use crate::qmp::Qmp;
use crate::relay::{Limits, Relay, Steering, Stream};
use crate::settings::Settings;

/// How long a QEMU may take for a step that takes it a moment, on a busy host.
pub(crate) const STEP: Duration = Duration::from_secs(30);

/// The rate of a stream that is to stand still, in bytes a second: so the source neither ends before post-copy, nor writes at the
/// moment in which it is called off. QEMU 7.2 that writes then takes the end of its connection for a broken network, and
/// waits to be resumed for ever.
const STANDSTILL: u64 = 4096;

/// The rate of a stream that nothing but its reader holds up.
const UNLIMITED: u64 = 10_000_000_000;

/// Bytes of pages that are not safe yet, beyond which no more is read of the stream.
pub const WINDOW_BYTES: u64 = 256 << 20;

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
                Ok(Self { qmp, settings, relay, manifest, window_bytes, file, is_spent: false })
            }
            Err(error) => {
                let _ = call_off(&mut qmp).and_then(|()| settings.restore(&mut qmp)).inspect_err(|error| {
                    tracing::error!(error = error.chain(), "the source QEMU could not be left as it was");
                });
                Err(error)
            }
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
        Ok(Self { qmp, settings, relay, manifest, window_bytes, file, is_spent })
    }

    /// Another process finds in this file what it needs, if this one dies. Where the VM is parked it finds that.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] when the file is another QEMU's, [`ErrorKind::System`] when it cannot be written.
    pub fn record(&mut self, file: DepartedFile, parks: bool) -> Result<()> {
        let begun = Departed::begun(&self.qmp.lock(), (&self.settings, &self.manifest), self.window_bytes);
        let mut begun = begun.parked(parks);
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
            file: self.file.clone(),
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
            await_status(&mut qmp, |status| status == "completed")?;
            if quit { qmp.execute("quit", &json!({})).map(drop) } else { self.settings.restore(&mut qmp) }?;
        }
        self.forget()
    }

    /// It was not moved: QEMU's settings are as they were before.
    ///
    /// # Errors
    /// [`Qmp::execute`]'s.
    pub fn give_up(mut self) -> Result<()> {
        {
            let mut qmp = self.qmp.lock();
            call_off(&mut qmp)?;
            self.relay.hang_up();
            self.settings.restore(&mut qmp)?;
        }
        self.forget()
    }

    /// There is nothing that another process could do.
    fn forget(&self) -> Result<()> {
        self.file.as_ref().map_or(Ok(()), |(file, _)| file.remove())
    }
}

/// Gives QEMU a connection to begin its migration over, or to go on with it.
fn connect(qmp: &mut Qmp, resume: bool) -> Result<Stream> {
    let (ours, theirs) = UnixStream::pair()?;
    let name = "sg-stream";
    qmp.give(name, theirs.as_fd())?;
    let uri = format!("fd:{name}");
    let begin = if resume { json!({ "uri": uri, "resume": true }) } else { json!({ "uri": uri }) };
    if let Err(error) = qmp.execute("migrate", &begin) {
        let _ = qmp.execute("closefd", &json!({ "fdname": name }));
        return Err(error);
    }
    Ok(Stream { ours, theirs: Some(theirs), lives: Some(qmp.lives()?) })
}

/// Ends a migration that is under way, if there is one.
fn call_off(qmp: &mut Qmp) -> Result<()> {
    qmp.execute("migrate_cancel", &json!({}))?;
    await_status(qmp, |status| matches!(status, "none" | "cancelled" | "failed" | "completed"))
}

pub(crate) fn await_status(qmp: &mut Qmp, is_wanted: impl Fn(&str) -> bool) -> Result<()> {
    let deadline = Instant::now() + STEP;
    loop {
        let status = qmp.migration()?;
        if is_wanted(&status) {
            return Ok(());
        }
        if Instant::now() > deadline {
            let message = format!("the source QEMU's migration stays \"{status}\" (query-migrate)");
            return Err(Error::new(ErrorKind::Timeout, message));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// How fast it may send before it has switched (`max-bandwidth`), or from then on (`max-postcopy-bandwidth`).
fn set_rate(qmp: &mut Qmp, which: &str, bytes_per_s: u64) -> Result<()> {
    qmp.execute("migrate-set-parameters", &json!({ which: bytes_per_s })).map(drop)
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

/// A source QEMU, driven over QMP.
pub(crate) struct ByQmp(pub Arc<Mutex<Qmp>>);

impl Steering for ByQmp {
    fn rate(&mut self, bytes_per_s: u64) -> Result<()> {
        set_rate(&mut self.0.lock(), "max-postcopy-bandwidth", bytes_per_s)
    }

    fn goes_on(&mut self) -> bool {
        let going = ["postcopy-active", "postcopy-recover", "postcopy-recover-setup"];
        self.0.lock().migration().is_ok_and(|status| going.contains(&status.as_str()))
    }

    fn resume(&mut self) -> Result<Stream> {
        let mut qmp = self.0.lock();
        // It notices that its stream broke when it writes the next time.
        await_status(&mut qmp, |status| status == "postcopy-paused")?;
        connect(&mut qmp, true)
    }
}

/// The VM of a source QEMU under libsg's seam.
pub struct LeavingQemu {
    qmp: Arc<Mutex<Qmp>>,
    relay: Relay,
    file: Option<(DepartedFile, Departed)>,
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
        self.relay.flow(Box::new(ByQmp(Arc::clone(&self.qmp))))
    }

    /// Ends the migration as one that has failed, in which QEMU's VM stays its own.
    fn end(&self) -> Result<()> {
        if !self.flows {
            return call_off(&mut self.qmp.lock());
        }
        // Called off now it may take the closed connection for a broken network. So it says all that it has to say, and is refused.
        self.relay.refuse(STEP)?;
        await_status(&mut self.qmp.lock(), |status| status == "failed")
    }
}

impl OutgoingVm for LeavingQemu {
    /// It is stopped first: so QEMU does not run it by itself when it is called off, before its disks are its own again.
    fn pause(&mut self) -> Result<Vec<u8>> {
        let mut qmp = self.qmp.lock();
        qmp.execute("stop", &json!({}))?;
        // It is at a standstill: what flows could be through before the switch is looked at.
        let switched = set_rate(&mut qmp, "max-bandwidth", STANDSTILL)
            .and_then(|()| qmp.execute("migrate-start-postcopy", &json!({})));
        drop(qmp);
        self.relay.end_rounds();
        let state = switched.and_then(|_| self.relay.state(STEP)).and_then(|state| {
            if self.all_first {
                self.flow()?;
            }
            Ok(state)
        });
        state.inspect_err(|_| {
            if let Err(error) = self.resume() {
                tracing::error!(error = error.chain(), "the VM is paused at the source");
            }
        })
    }

    fn resume(&mut self) -> Result<()> {
        self.end()?;
        self.qmp.lock().execute("cont", &json!({})).map(drop)
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

    fn committed(&mut self) {
        if !self.flows
            && let Err(error) = self.flow()
        {
            tracing::error!(error = error.chain(), "the source QEMU's stream stays slow");
        }
    }
}

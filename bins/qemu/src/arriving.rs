//! A QEMU that takes a VM.

use std::sync::Arc;

use libsg::manifest::Manifest;
use libsg::migrate::IncomingVm;
use libsg::migrate::destination::Unfinished;
use libsg::page::PageRange;
use libsg::sink::PageSink;
use libsg::{Error, ErrorKind, Result};
use parking_lot::Mutex;
use qemu_stream::Configuration;
use serde_json::json;

use crate::feeder::Feeder;
use crate::layout::{self, Layout};
use crate::machine::{self, Devices};
use crate::preflight;
use crate::qmp::Qmp;
use crate::record::StateFile;
use crate::resuming::{self, Whole};

/// What becomes of a VM of which pages are lost for good.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnLost {
    /// It stays as it is, for somebody to look at: paused, its migration without an end. Where a vCPU of its waits for such a page
    /// already, QEMU waits for that vCPU, and does not answer any more: all of it stands still, until its process is ended.
    #[default]
    Pause,
    /// Its QEMU ends.
    Kill,
}

/// A destination QEMU under libsg's seam: one that waits for a VM (`-incoming defer`), or has one that lacks pages.
pub struct ArrivingQemu {
    qmp: Mutex<Qmp>,
    on_lost: OnLost,
    feeder: Option<Arc<Feeder>>,
    state: Vec<u8>,
    /// Where it is written down what another feeder would need.
    file: Option<StateFile>,
    is_written: bool,
    /// It has the VM.
    goes_on: bool,
    /// It was told what becomes of a VM of which pages are lost.
    has_lost: bool,
}

impl ArrivingQemu {
    /// One that waits, as [`destination`](crate::destination) has found.
    #[must_use]
    pub fn new(qmp: Qmp, on_lost: OnLost) -> Self {
        let qmp = Mutex::new(qmp);
        Self {
            qmp,
            on_lost,
            feeder: None,
            state: Vec::new(),
            file: None,
            is_written: false,
            goes_on: false,
            has_lost: false,
        }
    }

    /// Another feeder finds in this file what it needs.
    #[must_use]
    pub fn recorded(self, file: StateFile) -> Self {
        Self { file: Some(file), ..self }
    }

    /// It has a VM that lacks pages, as [`resumable`](crate::resumable) has found.
    #[must_use]
    pub fn going_on(self) -> Self {
        Self { goes_on: true, ..self }
    }

    fn feeder(&self) -> Result<&Feeder> {
        self.feeder.as_deref().ok_or_else(|| Error::new(ErrorKind::Vm, "no VM has been offered"))
    }
}

impl IncomingVm for ArrivingQemu {
    fn prepare(&mut self, manifest: &Manifest) -> Result<Arc<dyn PageSink>> {
        let offered = Layout::of(manifest)?;
        let mut qmp = self.qmp.lock();
        if self.goes_on {
            if resuming::is_complete(&mut qmp)? {
                return Ok(Arc::new(Whole(offered.0.pages())));
            }
            let feeder = Arc::new(resuming::recover(&mut qmp, offered)?);
            self.feeder = Some(Arc::clone(&feeder));
            return Ok(feeder);
        }
        if let Some(file) = &self.file {
            file.check(&qmp)?;
        }
        is_the_machine(&mut qmp, &offered, &layout::devices(manifest)?)?;
        // A QEMU takes one VM in its life: there is nothing to be put back.
        preflight::switch_postcopy_on(&mut qmp)?;
        let feeder = Arc::new(Feeder::start(preflight::begin_incoming(&mut qmp)?, offered)?);
        self.feeder = Some(Arc::clone(&feeder));
        Ok(feeder)
    }

    fn load(&mut self, state: &[u8]) -> Result<()> {
        self.feeder()?.head(state)?;
        state.clone_into(&mut self.state);
        Ok(())
    }

    fn run(&mut self) -> Result<()> {
        let state = std::mem::take(&mut self.state);
        self.feeder()?.run(&state)
    }

    fn note(&mut self, unfinished: &Unfinished) -> Result<bool> {
        let Some(file) = &self.file else { return Ok(false) };
        file.write(&self.qmp.lock(), unfinished)?;
        self.is_written = true;
        Ok(true)
    }

    fn abandon(&mut self) {
        if let Some(feeder) = self.feeder.take() {
            feeder.hang_up();
        }
        // The VM is its source's, or parked: here is nothing to go on with. One that was here before is here still.
        let file = self.file.as_ref().filter(|_| self.is_written && !self.goes_on);
        if let Some(Err(error)) = file.map(StateFile::remove) {
            tracing::warn!(error = error.chain(), "a file is left behind");
        }
    }

    fn lost(&mut self, pages: &[PageRange]) {
        let ranges: Vec<String> = pages.iter().map(ToString::to_string).collect();
        tracing::error!(pages = ranges.join(","), "pages are lost for good");
        // Others may follow: it is waited for once.
        if std::mem::replace(&mut self.has_lost, true) {
            return;
        }
        let told = match self.on_lost {
            OnLost::Pause => self.qmp.lock().execute("stop", &json!({})).map(drop),
            OnLost::Kill => self.qmp.lock().kill(),
        };
        match told {
            Ok(()) => {}
            // It waits for its vCPUs to stop, none of which runs meanwhile.
            Err(error) if self.on_lost == OnLost::Pause && error.kind == ErrorKind::Timeout => {
                tracing::error!(
                    "the VM stands still, and its QEMU does not answer: a vCPU waits for a page that is lost. Its process can only \
                     be killed"
                );
            }
            Err(error) => tracing::error!(error = error.chain(), "the VM does not do what it is told"),
        }
    }
}

/// Whether this QEMU is what its command line has to make it, before it is asked to be: then it waits for another VM still.
fn is_the_machine(
    qmp: &mut Qmp,
    (layout, configuration, _): &(Layout, Configuration, u32),
    devices: &Devices,
) -> Result<()> {
    let (kind, wanted) = (machine::kind(qmp)?, &configuration.machine);
    let mut differs = Vec::new();
    if kind != *wanted {
        differs.push(format!("it is a {kind} and no {wanted} (-machine {wanted})"));
    }
    differs.extend(machine::memory(qmp, layout.blocks())?);
    // Another machine has other devices all over.
    if kind == *wanted {
        differs.extend(devices.differences(&Devices::of(qmp)?));
    }
    if differs.is_empty() {
        return Ok(());
    }
    let message = format!(
        "the destination QEMU is not the machine that the VM needs: {}. Start it with the source's options, and -incoming defer",
        differs.join("; ")
    );
    Err(Error::new(ErrorKind::Vm, message))
}

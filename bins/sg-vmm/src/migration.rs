//! This VM under libsg's seams: one that leaves ([`Leaving`]), one that arrives ([`Arriving`]).

use std::sync::Arc;

use libsg::dirty::DirtyLog;
use libsg::manifest::Manifest;
use libsg::migrate::{IncomingVm, OutgoingVm};
use libsg::page::PageRange;
use libsg::sink::PageSink;
use libsg::uffd::{InstallBy, Uffd};
use libsg::{Error, ErrorKind, Result};
use parking_lot::Mutex;

use crate::canary::{PanicAt, Panicking};
use crate::config::VmConfig;
use crate::memory::Memory;
use crate::serial::Serial;
use crate::vm::Vm;

/// The VM at the source.
pub struct Leaving(Arc<Vm>);

impl Leaving {
    /// A VM that runs here. Its rates and its longest pause are measured from now on.
    #[must_use]
    pub fn new(vm: Arc<Vm>) -> Self {
        vm.begin_window();
        Self(vm)
    }
}

impl OutgoingVm for Leaving {
    fn pause(&mut self) -> Result<Vec<u8>> {
        self.0.pause()
    }

    fn resume(&mut self) -> Result<()> {
        self.0.run()
    }

    fn committed(&mut self) {
        self.0.retire();
    }

    fn dirty_log(&mut self) -> Result<Box<dyn DirtyLog>> {
        Ok(self.0.dirty_log())
    }
}

/// Where the VM that arrives is to be found; shared with who controls it.
#[derive(Clone, Default)]
pub struct Berth(Arc<Mutex<Option<Arc<Vm>>>>);

impl Berth {
    /// The VM, once it is built and as long as it is not abandoned.
    #[must_use]
    pub fn vm(&self) -> Option<Arc<Vm>> {
        self.0.lock().clone()
    }

    /// Puts a VM there.
    pub fn place(&self, vm: Arc<Vm>) {
        *self.0.lock() = Some(vm);
    }

    fn expect(&self) -> Result<Arc<Vm>> {
        self.vm().ok_or_else(|| Error::new(ErrorKind::Vm, "no VM has been prepared"))
    }
}

/// The VM at the destination.
pub struct Arriving {
    berth: Berth,
    serial: Serial,
    canary: Option<Arc<PanicAt>>,
    install: InstallBy,
}

impl Arriving {
    /// A VM that will be built in `berth` when its manifest comes.
    #[must_use]
    pub fn new(berth: Berth, serial: Serial) -> Self {
        Self { berth, serial, canary: None, install: InstallBy::best() }
    }

    /// Its pages get into its memory in this way.
    #[must_use]
    pub fn installing_by(self, install: InstallBy) -> Self {
        Self { install, ..self }
    }

    /// A canary: whoever installs a certain page panics.
    #[must_use]
    pub fn with_canary(self, canary: Arc<PanicAt>) -> Self {
        Self { canary: Some(canary), ..self }
    }
}

impl IncomingVm for Arriving {
    fn prepare(&mut self, manifest: &Manifest) -> Result<Arc<dyn PageSink>> {
        let config = VmConfig::from_manifest(manifest)?;
        let memory = Memory::allocate(&config)?;
        let mut sink: Arc<dyn PageSink> = Arc::new(Uffd::register_by(memory.guest(), self.install)?);
        if let Some(canary) = &self.canary {
            sink = Arc::new(Panicking(sink, Arc::clone(canary)));
        }
        self.berth.place(Arc::new(Vm::new(config, Arc::new(memory), &self.serial)?));
        Ok(sink)
    }

    fn load(&mut self, state: &[u8]) -> Result<()> {
        self.berth.expect()?.load(state)
    }

    fn run(&mut self) -> Result<()> {
        self.berth.expect()?.run()
    }

    fn abandon(&mut self) {
        *self.berth.0.lock() = None;
    }

    fn lost(&mut self, pages: &[PageRange]) {
        if let Some(vm) = self.berth.vm() {
            vm.lose(pages);
        }
    }
}

#[cfg(test)]
#[path = "migration_test.rs"]
mod test;

//! A QEMU that takes a VM.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use libsg::manifest::Manifest;
use libsg::migrate::IncomingVm;
use libsg::page::PageRange;
use libsg::sink::PageSink;
use libsg::{Error, ErrorKind, Result};
use parking_lot::Mutex;
use serde_json::json;

use crate::feeder::Feeder;
use crate::layout::Layout;
use crate::qmp::Qmp;
use crate::scratch::Scratch;
use crate::settings::Settings;

/// A destination QEMU (`-incoming defer`) under libsg's seam.
pub struct ArrivingQemu {
    qmp: Mutex<Qmp>,
    feeder: Option<Arc<Feeder>>,
    state: Vec<u8>,
}

impl ArrivingQemu {
    /// One that waits, as [`destination`](crate::destination) has found.
    #[must_use]
    pub fn new(qmp: Qmp) -> Self {
        Self { qmp: Mutex::new(qmp), feeder: None, state: Vec::new() }
    }

    fn feeder(&self) -> Result<&Feeder> {
        self.feeder.as_deref().ok_or_else(|| Error::new(ErrorKind::Vm, "no VM has been offered"))
    }
}

impl IncomingVm for ArrivingQemu {
    fn prepare(&mut self, manifest: &Manifest) -> Result<Arc<dyn PageSink>> {
        let offered = Layout::of(manifest)?;
        let mut qmp = self.qmp.lock();
        // A QEMU takes one VM in its life: there is nothing to be put back.
        Settings::change(&mut qmp, &[("postcopy-ram", true)], &[]).map_err(|cause| {
            let message = "the destination QEMU cannot do post-copy: run it as root, give it CAP_SYS_PTRACE or \
                           /dev/userfaultfd (QEMU 8.0), or set the sysctl vm.unprivileged_userfaultfd to 1";
            Error::new(cause.kind, message).because(cause)
        })?;
        let directory = Scratch::new()?;
        let path = directory.file("stream");
        qmp.execute("migrate-incoming", &json!({ "uri": format!("unix:{}", path.display()) }))?;
        let feeder = Arc::new(Feeder::start(UnixStream::connect(&path)?, offered)?);
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

    fn abandon(&mut self) {
        if let Some(feeder) = self.feeder.take() {
            feeder.hang_up();
        }
    }

    fn lost(&mut self, pages: &[PageRange]) {
        let ranges: Vec<String> = pages.iter().map(ToString::to_string).collect();
        tracing::error!(pages = ranges.join(","), "pages are lost for good: the VM is paused");
        if let Err(error) = self.qmp.lock().execute("stop", &json!({})) {
            tracing::error!(error = error.chain(), "the VM could not be paused");
        }
    }
}

//! The guest's serial line: what it prints goes to a file, to the terminal, or nowhere.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use libsg::Result;
use parking_lot::Mutex;

/// Where the guest's output goes; shared by its vCPUs.
#[derive(Clone, Default)]
pub struct Serial(Option<Arc<Mutex<Box<dyn Write + Send>>>>);

impl Serial {
    /// To a file, or for `-` to standard output.
    ///
    /// # Errors
    /// [`libsg::ErrorKind::System`] when the file cannot be created.
    pub fn open(path: &Path) -> Result<Self> {
        let sink: Box<dyn Write + Send> = match path.as_os_str().as_encoded_bytes() {
            b"-" => Box::new(std::io::stdout()),
            _ => Box::new(File::create(path)?),
        };
        Ok(Self(Some(Arc::new(Mutex::new(sink)))))
    }

    /// Writes a whole line.
    pub fn line(&self, line: &str) {
        self.put(line.as_bytes());
    }

    /// Writes some bytes. A terminal that is gone does not stop the guest.
    pub fn put(&self, bytes: &[u8]) {
        if let Some(sink) = &self.0 {
            let mut sink = sink.lock();
            if let Err(error) = sink.write_all(bytes).and_then(|()| sink.flush()) {
                tracing::debug!(%error, "serial output is lost");
            }
        }
    }
}

/// Gathers one vCPU's bytes into lines, so that lines of several vCPUs do not mix.
pub struct LineBuffer {
    serial: Serial,
    line: Vec<u8>,
}

impl LineBuffer {
    /// Bytes of the longest line that is kept together.
    const BYTES_MAX: usize = 256;

    /// An empty line.
    #[must_use]
    pub fn new(serial: Serial) -> Self {
        Self { serial, line: Vec::new() }
    }

    /// Bytes that the guest wrote to its port.
    pub fn put(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.line.push(byte);
            if byte == b'\n' || self.line.len() == Self::BYTES_MAX {
                self.serial.put(&self.line);
                self.line.clear();
            }
        }
    }
}

//! Where sockets between QEMU and us are for the moment in which they are connected.

use std::path::PathBuf;

use libsg::Result;

/// A directory that only we can look into; it is gone when it is dropped.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new() -> Result<Self> {
        let name = u64::from_le_bytes(libsg::ids::random_bytes()?);
        let path = std::env::temp_dir().join(format!("sg-qemu-{name:016x}"));
        std::os::unix::fs::DirBuilderExt::mode(&mut std::fs::DirBuilder::new(), 0o700).create(&path)?;
        Ok(Self(path))
    }

    /// The path of a file in it.
    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

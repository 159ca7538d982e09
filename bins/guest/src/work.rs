//! What a guest is to do, as arguments of a QEMU.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use crate::{INIT, Initramfs};

/// What the guest's program does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Work {
    /// Memory that it fills, in MiB. The VM needs about 64 MiB more.
    pub filled_mib: u32,
    /// Pages that it writes in a second.
    pub writes_per_s: u32,
    /// Pages that it looks at in a second, beside those that it is about to write.
    pub checks_per_s: u32,
    /// Threads that do so, each in memory of its own.
    pub threads: u32,
}

impl Work {
    /// Arguments of a QEMU that runs it, with its first serial port still to be said. Source and destination of a migration get the
    /// same ones. A file of the guest's is put into `directory`.
    ///
    /// # Errors
    /// There is no kernel, or the file cannot be written.
    pub fn arguments(&self, directory: &Path) -> Result<Vec<String>> {
        let (kernel, initramfs) = (kernel()?, directory.join("initramfs"));
        std::fs::write(&initramfs, Initramfs::new(INIT).finish())
            .with_context(|| format!("cannot write {}", initramfs.display()))?;
        let Self { filled_mib, writes_per_s, checks_per_s, threads } = self;
        // An emulated timer that is late on a busy host is no broken one.
        let line = format!(
            "console=ttyS0 quiet panic=-1 no_timer_check guest_mib={filled_mib} guest_writes={writes_per_s} \
             guest_checks={checks_per_s} guest_threads={threads}"
        );
        let [kernel, initramfs] = [kernel, initramfs].map(|path| path.to_string_lossy().into_owned());
        Ok(["-kernel".into(), kernel, "-initrd".into(), initramfs, "-append".into(), line].into())
    }
}

/// Where the kernel is: what `SG_GUEST_KERNEL` says, otherwise where `ci/guest` puts it.
///
/// # Errors
/// It is not there.
pub fn kernel() -> Result<PathBuf> {
    let path = std::env::var_os("SG_GUEST_KERNEL")
        .map_or_else(|| fetched().join("linux-image-cloud-amd64/vmlinuz"), PathBuf::from);
    ensure!(path.is_file(), "there is no kernel for a guest at {}: ci/guest fetches it", path.display());
    Ok(path)
}

/// Where the files of a guest with Redis are, its first program among them: where `ci/redis` puts them.
///
/// # Errors
/// They are not there.
pub fn redis() -> Result<PathBuf> {
    let path = fetched().join("redis");
    ensure!(path.is_dir(), "there is no Redis for a guest at {}: ci/redis fetches it", path.display());
    Ok(path)
}

fn fetched() -> PathBuf {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    workspace.join(std::env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into())).join("guest")
}

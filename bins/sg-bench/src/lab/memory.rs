//! A memory limit for one process (cgroup v1 or v2) with a swap file behind it.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::names::Prefix;
use libsg::units::Size;

const V1: &str = "/sys/fs/cgroup/memory";
const V2: &str = "/sys/fs/cgroup";

/// A cgroup with a limit. Removed with its lab.
pub struct MemoryLimit {
    group: PathBuf,
    swap: PathBuf,
}

impl MemoryLimit {
    /// A cgroup limited to `limit`, and a swap file of `swap` in `directory`.
    pub fn create(prefix: &Prefix, directory: &Path, limit: Size, swap: Size) -> Result<Self> {
        let name = prefix.name("destination");
        let group = if is_v1() {
            let group = Path::new(V1).join(name);
            fs::create_dir(&group).with_context(|| format!("cannot create {}", group.display()))?;
            write(&group.join("memory.limit_in_bytes"), &limit.0.to_string())?;
            group
        } else {
            // Refused where the controller is on already, or is not there at all: then the next line says so.
            let _ = fs::write(Path::new(V2).join("cgroup.subtree_control"), "+memory");
            let group = Path::new(V2).join(name);
            fs::create_dir(&group).with_context(|| format!("cannot create {}", group.display()))?;
            write(&group.join("memory.max"), &limit.0.to_string())?;
            group
        };
        let made = Self { group, swap: directory.join("swap") };
        if let Err(error) = make_swap(&made.swap, swap) {
            made.remove();
            return Err(error);
        }
        Ok(made)
    }

    /// Puts a process under the limit. Only what it allocates from now on is counted.
    pub fn admit(&self, pid: u32) -> Result<()> {
        write(&self.group.join("cgroup.procs"), &pid.to_string())
    }

    /// Removes the cgroup and the swap file. The processes in it must be gone.
    pub fn remove(&self) {
        remove_group(&self.group);
        remove_swap(&self.swap);
    }
}

/// Every cgroup with one of our names.
pub fn ours() -> Vec<(Prefix, PathBuf)> {
    let Ok(entries) = fs::read_dir(if is_v1() { V1 } else { V2 }) else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            Some((Prefix::parse(entry.file_name().to_str()?)?, entry.path()))
        })
        .collect()
}

/// Removes a cgroup, whose processes may still be on their way out.
pub fn remove_group(group: &Path) {
    let until = Instant::now() + Duration::from_secs(5);
    while let Err(error) = fs::remove_dir(group) {
        if error.kind() == std::io::ErrorKind::NotFound {
            return;
        }
        if Instant::now() > until {
            tracing::warn!("cannot remove the cgroup {}: {error}", group.display());
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Takes a swap file out of use, if it is in use, and deletes it, if it is there.
pub fn remove_swap(file: &Path) {
    let in_use = fs::read_to_string("/proc/swaps")
        .is_ok_and(|swaps| swaps.lines().any(|line| line.split_whitespace().next() == file.to_str()));
    if in_use && let Err(error) = run("swapoff", file) {
        tracing::warn!("{error:#}");
        return;
    }
    let _ = fs::remove_file(file);
}

fn is_v1() -> bool {
    Path::new(V1).join("memory.limit_in_bytes").exists()
}

fn make_swap(path: &Path, size: Size) -> Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    // Allocated at once where the file system can, which ext4 and xfs swap to. Others must have it written out:
    // the kernel refuses a swap file with holes.
    let allocated = rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, size.0);
    if allocated.is_err() {
        write_out(&file, size)?;
    }
    run("mkswap", path)?;
    if allocated.is_ok() && run("swapon", path).is_ok() {
        return Ok(());
    }
    write_out(&file, size)?;
    run("mkswap", path)?;
    run("swapon", path).context(
        "a destination with little memory needs swap, and the kernel refused the swap file: root is needed, \
         and TMPDIR must be on a disk whose file system supports swap files (not tmpfs, overlayfs or btrfs)",
    )
}

fn write_out(mut file: &fs::File, size: Size) -> Result<()> {
    let block = vec![0; 1 << 20];
    for _ in 0..size.0.div_ceil(1 << 20) {
        file.write_all(&block).context("no room for the swap file")?;
    }
    file.sync_data().context("no room for the swap file")
}

fn run(program: &str, file: &Path) -> Result<()> {
    let output = Command::new(program)
        .arg(file)
        .output()
        .with_context(|| format!("cannot run {program} (util-linux)"))?;
    if !output.status.success() {
        bail!("{program} {}: {}", file.display(), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

fn write(file: &Path, text: &str) -> Result<()> {
    fs::write(file, text).with_context(|| format!("cannot write {text} to {}", file.display()))
}

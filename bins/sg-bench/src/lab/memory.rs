//! A memory limit for the destination and its neighbours (cgroup v1 or v2) with a swap file behind it.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::names::Prefix;
use libsg::units::Size;

/// Which cgroups the machine limits memory by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// A hierarchy for memory alone.
    V1,
    /// One for all.
    V2,
}

impl Version {
    /// The machine's. Where both are mounted the controller is in one of them: v1 has a directory of its own then.
    fn of_machine() -> Self {
        let v1 = Self::V1.root().join("memory.limit_in_bytes").exists();
        if v1 { Self::V1 } else { Self::V2 }
    }

    /// What reports call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::V1 => "v1",
            Self::V2 => "v2",
        }
    }

    fn root(self) -> &'static Path {
        Path::new(match self {
            Self::V1 => "/sys/fs/cgroup/memory",
            Self::V2 => "/sys/fs/cgroup",
        })
    }

    /// The files of a group that make the limit, with what to write. The limit is of memory alone: swap is as much
    /// as there is in either version, if nobody says else.
    fn settings(self, limit: Size) -> Vec<(&'static str, String)> {
        match self {
            // A host that never swaps is set so by its administrator, and the group would take it over.
            Self::V1 => {
                vec![("memory.limit_in_bytes", limit.0.to_string()), ("memory.swappiness", "60".into())]
            }
            Self::V2 => vec![("memory.max", limit.0.to_string())],
        }
    }

    /// Makes a limited group below `root`.
    fn create(self, root: &Path, name: &str, limit: Size) -> Result<PathBuf> {
        if self == Self::V2 {
            // Refused where the controller is on already, or is not there at all: then the next lines say so.
            let _ = fs::write(root.join("cgroup.subtree_control"), "+memory");
        }
        let group = root.join(name);
        fs::create_dir(&group).with_context(|| format!("cannot create {}", group.display()))?;
        for (file, text) in self.settings(limit) {
            if let Err(error) = write(&group.join(file), &text) {
                remove_group(&group);
                return Err(error);
            }
        }
        Ok(group)
    }
}

/// What went to and came from swap so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Swap {
    /// Pages read back.
    pub in_pages: Option<u64>,
    /// Pages written.
    pub out_pages: Option<u64>,
    /// What lies there now: of the group.
    pub held_bytes: Option<u64>,
    /// Whose pages these are: `cgroup`, or `machine` where the group does not count its own.
    pub counted: &'static str,
}

impl Swap {
    /// From the group's `memory.stat`, the machine's `/proc/vmstat`, and what v2 says lies in swap.
    fn read(version: Version, stat: &str, vmstat: &str, current: &str) -> Self {
        let of_group = (value(stat, "pswpin"), value(stat, "pswpout"));
        let counted = if of_group == (None, None) { "machine" } else { "cgroup" };
        let (in_pages, out_pages) = match of_group {
            (None, None) => (value(vmstat, "pswpin"), value(vmstat, "pswpout")),
            of_group => of_group,
        };
        let held_bytes = match version {
            Version::V1 => value(stat, "swap"),
            Version::V2 => current.trim().parse().ok(),
        };
        Self { in_pages, out_pages, held_bytes, counted }
    }
}

/// The number behind a name, a line each.
fn value(text: &str, name: &str) -> Option<u64> {
    let mut fields = text.lines().filter_map(|line| line.split_once(' '));
    fields.find(|(key, _)| *key == name)?.1.trim().parse().ok()
}

/// A cgroup with a limit. Removed with its lab.
pub struct MemoryLimit {
    version: Version,
    limit: Size,
    group: PathBuf,
    swap: PathBuf,
}

impl MemoryLimit {
    /// A cgroup limited to `limit`, and a swap file of `swap` in `directory`.
    pub fn create(prefix: &Prefix, directory: &Path, limit: Size, swap: Size) -> Result<Self> {
        let version = Version::of_machine();
        let group = version.create(version.root(), &prefix.name("destination"), limit)?;
        let made = Self { version, limit, group, swap: directory.join("swap") };
        if let Err(error) = make_swap(&made.swap, swap) {
            made.remove();
            return Err(error);
        }
        Ok(made)
    }

    /// Which cgroups it is made of.
    pub fn version(&self) -> Version {
        self.version
    }

    /// What its processes may have in memory.
    pub fn limit(&self) -> Size {
        self.limit
    }

    /// The file that a process writes its pid to, to be under the limit.
    pub fn procs(&self) -> PathBuf {
        self.group.join("cgroup.procs")
    }

    /// Puts a process under the limit. Only what it allocates from now on is counted.
    pub fn admit(&self, pid: u32) -> Result<()> {
        write(&self.procs(), &pid.to_string())
    }

    /// What went to and came from swap so far.
    pub fn swap(&self) -> Swap {
        let read = |path: &Path| fs::read_to_string(path).unwrap_or_default();
        let of_group = |file| read(&self.group.join(file));
        let vmstat = read(Path::new("/proc/vmstat"));
        Swap::read(self.version, &of_group("memory.stat"), &vmstat, &of_group("memory.swap.current"))
    }

    /// Removes the cgroup and the swap file. The processes in it must be gone.
    pub fn remove(&self) {
        remove_group(&self.group);
        remove_swap(&self.swap);
    }
}

/// Every cgroup with one of our names.
pub fn ours() -> Vec<(Prefix, PathBuf)> {
    let Ok(entries) = fs::read_dir(Version::of_machine().root()) else {
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

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_group_of_either_version_has_its_limit_and_swap() {
        let root = tempfile::tempdir().expect("creates");
        for (version, files) in [
            (Version::V1, &[("memory.limit_in_bytes", "4096"), ("memory.swappiness", "60")][..]),
            (Version::V2, &[("memory.max", "4096")]),
        ] {
            let group = version.create(root.path(), version.name(), Size(4096)).expect("creates");
            assert_eq!(group, root.path().join(version.name()));
            for (file, text) in files {
                assert_eq!(
                    fs::read_to_string(group.join(file)).expect("written"),
                    *text,
                    "{version:?} {file}"
                );
            }
            let on = fs::read_to_string(root.path().join("cgroup.subtree_control")).ok();
            assert_eq!(on.as_deref(), (version == Version::V2).then_some("+memory"));
            version.create(root.path(), version.name(), Size(1)).expect_err("there is one");
        }
        assert_eq!(Version::V1.root().join("x"), Path::new("/sys/fs/cgroup/memory/x"));
        assert_eq!(Version::V2.root().join("x"), Path::new("/sys/fs/cgroup/x"));
    }

    #[test]
    fn swapped_pages_are_the_groups_where_it_counts_them() {
        let vmstat = "nr_free_pages 7\npswpin 100\npswpout 200\n";
        let v1 = "cache 1\nswap 8192\nswapcached 1\npgpgin 5\n";
        let swap = Swap::read(Version::V1, v1, vmstat, "");
        assert_eq!((swap.in_pages, swap.out_pages), (Some(100), Some(200)));
        assert_eq!((swap.held_bytes, swap.counted), (Some(8192), "machine"));
        let swap = Swap::read(Version::V2, "anon 1\npswpin 3\npswpout 4\n", vmstat, "4096\n");
        assert_eq!((swap.in_pages, swap.out_pages), (Some(3), Some(4)));
        assert_eq!((swap.held_bytes, swap.counted), (Some(4096), "cgroup"));
        assert_eq!(Swap::read(Version::V2, "anon 1\n", vmstat, "max").counted, "machine");
        assert_eq!(Swap::read(Version::V2, "", "", "").in_pages, None);
    }
}

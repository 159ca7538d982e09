//! What outlives the process that feeds a QEMU: where the rest of its VM's memory is, in a small file.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind as IoKind, Read as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use libsg::migrate::destination::Unfinished;
use libsg::{Error, ErrorKind, Result};
use serde::{Deserialize, Serialize};

use crate::qmp::Qmp;

/// The only kind of file there is so far.
const SCHEMA: u32 = 1;

/// Bytes of the longest file: what a VM with 1,024 regions has is a tenth of that.
const FILE_BYTES_MAX: u64 = 8 << 20;

/// A process, which its number alone does not tell from a later one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Process {
    pub(crate) number: i32,
    /// Clock ticks from the host's start.
    pub(crate) started: u64,
}

impl Process {
    /// One that runs.
    pub(crate) fn of(number: i32) -> Option<Self> {
        let told = std::fs::read_to_string(format!("/proc/{number}/stat")).ok()?;
        // The name in front may have anything in it.
        let started = told.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()?;
        Some(Self { number, started })
    }

    fn is_alive(self) -> bool {
        Self::of(self.number) == Some(self)
    }
}

/// What was written down of a VM whose memory is gathered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    schema: u32,
    /// The QEMU that has the VM, where the kernel tells.
    pub(crate) qemu: Option<Process>,
    /// Where its source finds it.
    pub listen: Option<SocketAddr>,
    /// The file with the pool's secret.
    pub secret: Option<PathBuf>,
    /// Where the rest of its memory is.
    pub unfinished: Unfinished,
}

impl Record {
    /// What a file has, if there is one.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when it cannot be read, [`ErrorKind::Input`] when it is not such a file.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        let file = match File::open(path) {
            Err(error) if error.kind() == IoKind::NotFound => return Ok(None),
            opened => opened.map_err(|cause| unusable(ErrorKind::System, path).because(cause))?,
        };
        let mut text = String::new();
        let read = file.take(FILE_BYTES_MAX).read_to_string(&mut text);
        read.map_err(|cause| unusable(ErrorKind::System, path).because(cause))?;
        let record: Self =
            serde_json::from_str(&text).map_err(|cause| unusable(ErrorKind::Input, path).because(cause))?;
        if record.schema == SCHEMA { Ok(Some(record)) } else { Err(unusable(ErrorKind::Input, path)) }
    }
}

/// Where a QEMU's feeder writes down what another would need.
#[derive(Clone, Debug)]
pub struct StateFile {
    path: PathBuf,
    listen: Option<SocketAddr>,
    secret: Option<PathBuf>,
}

impl StateFile {
    /// In this file, which need not exist. With where the source finds the destination, and the file that has the pool's
    /// secret.
    #[must_use]
    pub fn new(path: &Path, listen: Option<SocketAddr>, secret: Option<&Path>) -> Self {
        let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        Self { path: absolute(path), listen, secret: secret.map(absolute) }
    }

    /// Whether the file may be written for this QEMU: it is not that of another, which has a VM that needs it.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] when it may not; [`Record::read`]'s.
    pub(crate) fn check(&self, qmp: &Qmp) -> Result<()> {
        let other = Record::read(&self.path)?.and_then(|record| record.qemu);
        match other.filter(|other| Some(*other) != process_of(qmp) && other.is_alive()) {
            None => Ok(()),
            Some(other) => {
                let message = format!(
                    "{} is of the QEMU with the process {}, whose VM has not all of its memory: name another with --state-file",
                    self.path.display(),
                    other.number
                );
                Err(Error::new(ErrorKind::Input, message))
            }
        }
    }

    /// Writes it down: it is on the disk, as a whole, when this returns.
    ///
    /// # Errors
    /// [`ErrorKind::System`] naming the file: what it was before, it is still.
    pub(crate) fn write(&self, qmp: &Qmp, unfinished: &Unfinished) -> Result<()> {
        let record = Record {
            schema: SCHEMA,
            qemu: process_of(qmp),
            listen: self.listen,
            secret: self.secret.clone(),
            unfinished: unfinished.clone(),
        };
        let text = serde_json::to_string(&record);
        let text = text.map_err(|cause| unusable(ErrorKind::System, &self.path).because(cause))?;
        self.replace(text.as_bytes()).map_err(|cause| {
            let message = format!("{} cannot be written (--state-file names another)", self.path.display());
            Error::new(ErrorKind::System, message).because(cause)
        })
    }

    fn replace(&self, bytes: &[u8]) -> std::io::Result<()> {
        let mut fresh = self.path.clone().into_os_string();
        fresh.push(".new");
        let fresh = PathBuf::from(fresh);
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&fresh, &self.path)?;
        self.sync_directory()
    }

    fn sync_directory(&self) -> std::io::Result<()> {
        File::open(self.path.parent().unwrap_or(Path::new("/")))?.sync_all()
    }

    /// Nobody needs it any more.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when it is there still.
    pub fn remove(&self) -> Result<()> {
        match std::fs::remove_file(&self.path) {
            Err(error) if error.kind() == IoKind::NotFound => Ok(()),
            removed => removed.and_then(|()| self.sync_directory()).map_err(|cause| {
                let message = format!("{} cannot be removed, and is of no use any more", self.path.display());
                Error::new(ErrorKind::System, message).because(cause)
            }),
        }
    }

    /// Whether it is there.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.path.exists()
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

pub(crate) fn process_of(qmp: &Qmp) -> Option<Process> {
    qmp.process().and_then(|process| Process::of(process.as_raw_nonzero().get()))
}

fn unusable(kind: ErrorKind, path: &Path) -> Error {
    let what = match kind {
        ErrorKind::Input => "is not what a gather writes down of a VM (of this version)",
        _ => "cannot be read",
    };
    Error::new(kind, format!("{} {what}", path.display()))
}

#[cfg(test)]
mod test {
    use libsg::ids::{Epoch, NodeId, VolumeId};
    use libsg::manifest::{Manifest, Region};
    use libsg::page::InstallUnit;
    use libsg::wire::message::Member;
    use serde_json::json;

    use super::*;
    use crate::qmp;

    pub(crate) fn unfinished() -> Unfinished {
        let region = Region {
            name: "pc.ram".into(),
            guest_address: None,
            length_bytes: 64 << 12,
            unit: InstallUnit::Page,
        };
        let node = NodeId { name: "i1".into(), incarnation: u64::MAX };
        Unfinished {
            volume: VolumeId(u128::MAX),
            epoch: Epoch(7),
            source_gone: false,
            claimant: Some(node.clone()),
            members: vec![Member { node, address: "[::1]:7701".parse().expect("an address") }],
            manifest: Manifest {
                vm: "web".into(),
                regions: vec![region],
                vm_config: vec![1, 2],
                sharing: None,
            },
        }
    }

    #[test]
    fn what_is_written_is_read_whatever_was_there_before() {
        let (directory, socket) = qmp::test::answering(|_, _| json!({}));
        let qmp = Qmp::connect(&socket).expect("greets");
        let path = directory.path().join("dst.qmp.gather.json");
        assert_eq!(Record::read(&path).expect("no file"), None);
        let listen = "10.0.0.2:7700".parse().ok();
        let file = StateFile::new(&path, listen, Some(Path::new("pool.secret")));
        file.check(&qmp).expect("there is none");
        for epoch in [Epoch(7), Epoch(8)] {
            let unfinished = Unfinished { epoch, ..unfinished() };
            file.write(&qmp, &unfinished).expect("written");
            let record = Record::read(&path).expect("read").expect("there");
            assert_eq!((record.unfinished, record.listen), (unfinished, listen));
            assert!(record.secret.is_some_and(|path| path.is_absolute() && path.ends_with("pool.secret")));
        }
        let mode = std::os::unix::fs::PermissionsExt::mode(&path.metadata().expect("a file").permissions());
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(directory.path()).expect("read").count(), 2, "the socket, and the file");
        for _ in 0..2 {
            file.remove().expect("removed");
        }
        assert!(!file.exists());
    }

    #[test]
    fn what_is_no_such_file_or_cannot_be_is_said() {
        let (directory, socket) = qmp::test::answering(|_, _| json!({}));
        let qmp = Qmp::connect(&socket).expect("greets");
        let path = directory.path().join("file");
        for wrong in ["", "{}", "{\"schema\":1}", "\u{0}"] {
            std::fs::write(&path, wrong).expect("written");
            assert_eq!(Record::read(&path).expect_err("is none").kind, ErrorKind::Input, "{wrong:?}");
        }
        std::fs::remove_file(&path).expect("removed");
        let file = StateFile::new(&path, None, None);
        file.write(&qmp, &unfinished()).expect("written");
        let later = std::fs::read_to_string(&path).expect("read").replace("\"schema\":1", "\"schema\":2");
        std::fs::write(&path, later).expect("written");
        assert_eq!(Record::read(&path).expect_err("of a later version").kind, ErrorKind::Input);
        let nowhere = StateFile::new(&directory.path().join("none/file"), None, None);
        let refused = nowhere.write(&qmp, &unfinished()).expect_err("there is no such directory");
        assert!(refused.kind == ErrorKind::System && refused.message.contains("--state-file"), "{refused}");
    }

    /// A QEMU whose VM needs the file, while another is to be written there.
    #[test]
    fn a_file_that_another_needs_is_left_alone() {
        let (directory, socket) = qmp::test::answering(|_, _| json!({}));
        let qmp = Qmp::connect(&socket).expect("greets");
        let file = StateFile::new(&directory.path().join("file"), None, None);
        file.write(&qmp, &unfinished()).expect("written");
        let ours = Process::of(std::os::unix::process::parent_id() as i32).expect("it runs");
        let dead = Process { started: ours.started.wrapping_add(1), ..ours };
        for (qemu, is_needed) in [(Some(ours), true), (Some(dead), false), (None, false)] {
            let mut record = Record::read(&file.path).expect("read").expect("there");
            record.qemu = qemu;
            std::fs::write(&file.path, serde_json::to_vec(&record).expect("JSON")).expect("written");
            assert_eq!(file.check(&qmp).is_err(), is_needed, "{qemu:?}");
        }
    }
}

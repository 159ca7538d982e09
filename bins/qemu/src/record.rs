//! What outlives the process that feeds a QEMU: where the rest of its VM's memory is, in a small file.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind as IoKind, Read as _, Write as _};
use std::net::SocketAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use libsg::migrate::destination::Unfinished;
use libsg::{Error, ErrorKind, Result};
use serde::de::DeserializeOwned;
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
        let started = behind_name(&told)?.nth(19)?.parse().ok()?;
        Some(Self { number, started })
    }

    pub(crate) fn is_alive(self) -> bool {
        Self::of(self.number) == Some(self)
    }
}

/// What proc_pid_stat(5) says behind the name, which may have anything in it: the state, and what follows.
pub(crate) fn behind_name(stat: &str) -> Option<impl Iterator<Item = &str>> {
    Some(stat.rsplit_once(')')?.1.split_whitespace())
}

/// A small file that is always there as a whole, or not at all.
#[derive(Clone, Debug)]
pub(crate) struct Note(PathBuf);

impl Note {
    pub(crate) fn new(path: &Path) -> Self {
        Self(absolute(path))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    /// What it has, if it is there.
    pub(crate) fn read<T: DeserializeOwned>(&self, what: &str) -> Result<Option<T>> {
        let file = match File::open(&self.0) {
            Err(error) if error.kind() == IoKind::NotFound => return Ok(None),
            opened => opened.map_err(|cause| self.unreadable().because(cause))?,
        };
        let mut text = String::new();
        file.take(FILE_BYTES_MAX)
            .read_to_string(&mut text)
            .map_err(|cause| self.unreadable().because(cause))?;
        serde_json::from_str(&text).map_err(|cause| self.is_other(what).because(cause))
    }

    /// Writes it: it is on the disk, as a whole, when this returns.
    pub(crate) fn write(&self, what: &impl Serialize) -> Result<()> {
        self.put(what, true)
    }

    /// The same, for who lives no longer than the host, and has no time: it waits for no disk.
    pub(crate) fn write_for_now(&self, what: &impl Serialize) -> Result<()> {
        self.put(what, false)
    }

    fn put(&self, what: &impl Serialize, flushes: bool) -> Result<()> {
        let written = serde_json::to_vec(what).map_err(std::io::Error::from);
        written.and_then(|bytes| self.replace(&bytes, flushes)).map_err(|cause| {
            let message = format!("{} cannot be written (--state-file names another)", self.0.display());
            Error::new(ErrorKind::System, message).because(cause)
        })
    }

    fn replace(&self, bytes: &[u8], flushes: bool) -> std::io::Result<()> {
        let mut fresh = self.0.clone().into_os_string();
        fresh.push(".new");
        let fresh = PathBuf::from(fresh);
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
        file.write_all(bytes)?;
        if flushes {
            file.sync_all()?;
        }
        std::fs::rename(&fresh, &self.0)?;
        if flushes { self.sync_directory() } else { Ok(()) }
    }

    fn sync_directory(&self) -> std::io::Result<()> {
        File::open(self.0.parent().unwrap_or(Path::new("/")))?.sync_all()
    }

    /// Nobody needs it any more.
    pub(crate) fn remove(&self) -> Result<()> {
        match std::fs::remove_file(&self.0) {
            Err(error) if error.kind() == IoKind::NotFound => Ok(()),
            removed => removed.and_then(|()| self.sync_directory()).map_err(|cause| {
                let message = format!("{} cannot be removed, and is of no use any more", self.0.display());
                Error::new(ErrorKind::System, message).because(cause)
            }),
        }
    }

    fn unreadable(&self) -> Error {
        Error::new(ErrorKind::System, format!("{} cannot be read", self.0.display()))
    }

    /// It is not `what` it has to be.
    pub(crate) fn is_other(&self, what: &str) -> Error {
        Error::new(ErrorKind::Input, format!("{} is not {what} (of this version)", self.0.display()))
    }
}

pub(crate) fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
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
        let note = Note::new(path);
        let Some(record) = note.read::<Self>(WHAT)? else { return Ok(None) };
        if record.schema == SCHEMA { Ok(Some(record)) } else { Err(note.is_other(WHAT)) }
    }
}

/// What such a file is.
const WHAT: &str = "what a gather writes down of a VM";

/// Where a QEMU's feeder writes down what another would need.
#[derive(Clone, Debug)]
pub struct StateFile {
    note: Note,
    listen: Option<SocketAddr>,
    secret: Option<PathBuf>,
}

impl StateFile {
    /// In this file, which need not exist. With where the source finds the destination, and the file that has the pool's
    /// secret.
    #[must_use]
    pub fn new(path: &Path, listen: Option<SocketAddr>, secret: Option<&Path>) -> Self {
        Self { note: Note::new(path), listen, secret: secret.map(absolute) }
    }

    /// Whether the file may be written for this QEMU: it is not that of another, which has a VM that needs it.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] when it may not; [`Record::read`]'s.
    pub(crate) fn check(&self, qmp: &Qmp) -> Result<()> {
        let other = Record::read(self.path())?.and_then(|record| record.qemu);
        match other.filter(|other| Some(*other) != process_of(qmp) && other.is_alive()) {
            None => Ok(()),
            Some(other) => {
                let message = format!(
                    "{} is of the QEMU with the process {}, whose VM has not all of its memory: name another with --state-file",
                    self.path().display(),
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
        self.note.write(&record)
    }

    /// Nobody needs it any more.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when it is there still.
    pub fn remove(&self) -> Result<()> {
        self.note.remove()
    }

    /// Whether it is there.
    #[must_use]
    pub fn exists(&self) -> bool {
        self.path().exists()
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.note.path()
    }
}

pub(crate) fn process_of(qmp: &Qmp) -> Option<Process> {
    qmp.process().and_then(|process| Process::of(process.as_raw_nonzero().get()))
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
            let mut record = Record::read(file.path()).expect("read").expect("there");
            record.qemu = qemu;
            std::fs::write(file.path(), serde_json::to_vec(&record).expect("JSON")).expect("written");
            assert_eq!(file.check(&qmp).is_err(), is_needed, "{qemu:?}");
        }
    }
}

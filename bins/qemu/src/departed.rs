//! What outlives the process that a source QEMU's VM leaves by, in a small file; and how another process goes on with it.
//!
//! ```text
//!   begun  -->  unscattered: right before COMMIT  -->  removed: it is evicted, or stays
//!     |               |
//!     |               +-- the process dies: QEMU is resumed, and what is not safe is scattered
//!     +-- it dies: nobody was told of COMMIT, and the VM is run here again
//! ```
//!
//! A VM that is parked is unscattered from when its state is at the intermediaries, and is so before COMMIT: until its keeper is
//! written down, too, it may run here again.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use libsg::manifest::Manifest;
use libsg::migrate::source::Unscattered;
use libsg::{Error, ErrorKind, Result};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::calling_off::{broken_state, call_off, is_over};
use crate::preflight::{Found, look_at_version};
use crate::qmp::{PAUSED, Qmp};
use crate::record::{Note, Process, absolute, process_of};
use crate::settings::Settings;

/// The only kind of file that is read: those of before knew no VM that is parked.
const SCHEMA: u32 = 2;

const WHAT: &str = "what an evict writes down of a VM";

/// What was written down of a VM that leaves.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Departed {
    schema: u32,
    /// The QEMU that has the memory, where the kernel tells.
    pub(crate) qemu: Option<Process>,
    /// By which process it leaves.
    pub(crate) by: Option<Process>,
    /// The file with the pool's secret.
    pub secret: Option<PathBuf>,
    pub(crate) window_bytes: u64,
    /// What was changed of QEMU's.
    pub(crate) settings: Settings,
    pub(crate) manifest: Manifest,
    /// From right before COMMIT on, or of one that is parked from when its state was taken: what is needed to go on.
    pub unscattered: Option<Unscattered>,
}

impl Departed {
    /// What is known when the migration has begun.
    pub(crate) fn begun(qmp: &Qmp, (settings, manifest): (&Settings, &Manifest), window_bytes: u64) -> Self {
        Self {
            schema: SCHEMA,
            qemu: process_of(qmp),
            by: None,
            secret: None,
            window_bytes,
            settings: settings.clone(),
            manifest: manifest.clone(),
            unscattered: None,
        }
        .by_us()
    }

    /// It leaves by this process.
    pub(crate) fn by_us(self) -> Self {
        Self { by: Process::of(std::process::id().cast_signed()), ..self }
    }

    /// The name of the VM.
    #[must_use]
    pub fn vm(&self) -> &str {
        &self.manifest.vm
    }
}

/// Where it is written down.
#[derive(Clone, Debug)]
pub struct DepartedFile {
    note: Note,
    secret: Option<PathBuf>,
}

impl DepartedFile {
    /// In this file, which need not exist; with the file that has the pool's secret.
    #[must_use]
    pub fn new(path: &Path, secret: Option<&Path>) -> Self {
        Self { note: Note::new(path), secret: secret.map(absolute) }
    }

    /// What it has, if it is there.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when it cannot be read, [`ErrorKind::Input`] when it is not such a file.
    pub fn read(&self) -> Result<Option<Departed>> {
        let Some(departed) = self.note.read::<Departed>(WHAT)? else { return Ok(None) };
        if departed.schema == SCHEMA { Ok(Some(departed)) } else { Err(self.note.is_other(WHAT)) }
    }

    /// Writes it down for the first time, unless the file is another QEMU's, of which it is needed.
    pub(crate) fn begin(&self, departed: &mut Departed) -> Result<()> {
        let other = self.read()?.and_then(|other| other.qemu);
        if let Some(other) = other.filter(|other| Some(*other) != departed.qemu && other.is_alive()) {
            let message = format!(
                "{} is of the QEMU with the process {}, whose VM has not left: name another with --state-file",
                self.path().display(),
                other.number
            );
            return Err(Error::new(ErrorKind::Input, message));
        }
        departed.secret.clone_from(&self.secret);
        self.note.write(departed)
    }

    /// Writes it down, with the VM paused: QEMU, of whom it is, does not outlive the host.
    pub(crate) fn write(&self, departed: &Departed) -> Result<()> {
        self.note.write_for_now(departed)
    }

    /// Nobody needs it any more.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when it is there still.
    pub fn remove(&self) -> Result<()> {
        self.note.remove()
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.note.path()
    }
}

/// How a QEMU stands by which somebody died.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Nobody was told of COMMIT, nor is anything to be gone on with: the VM is here, and nowhere else.
    Here,
    /// It waits to be resumed.
    Paused,
    /// It has said everything, and waits for a word that it does not hear any more.
    Spent,
    /// It was told that all is safe.
    Completed,
}

/// Looks at a QEMU whose VM was leaving when who led that died. Changes nothing.
///
/// # Errors
/// [`Qmp::execute`]'s.
pub fn standing(qmp: &mut Qmp, departed: &Departed) -> Result<(Found, Standing)> {
    let mut found = Found::default();
    look_at_version(qmp, &mut found);
    if departed.qemu.is_some_and(|of| process_of(qmp).is_some_and(|process| process != of)) {
        let what = "this is not the QEMU whose VM was leaving: another has its socket since, and nothing is to be resumed";
        found.refusals.push(what.into());
        return Ok((found, Standing::Here));
    }
    if let Some(by) = departed.by.filter(|by| by.is_alive()) {
        found.refusals.push(format!(
            "the process {} is at it still: wait for it, or end it first (where it is stopped, SIGKILL)",
            by.number
        ));
        return Ok((found, Standing::Here));
    }
    let state = broken_state(qmp)?;
    let is_committed = departed.unscattered.as_ref().is_some_and(Unscattered::is_committed);
    if departed.unscattered.is_none() || (!is_committed && is_over(&state)) {
        if matches!(state.as_str(), "postcopy-device" | "postcopy-active" | "completed") {
            found.refusals.push(format!(
                "its migration is \"{state}\", though its VM was not given away (query-migrate)"
            ));
        }
        return Ok((found, Standing::Here));
    }
    let standing = match state.as_str() {
        PAUSED => Standing::Paused,
        // From QEMU 10.2 on: nobody has told it yet that the state of its devices was taken.
        "postcopy-device" => {
            found.refusals.push(not_noticed(&state));
            Standing::Paused
        }
        "postcopy-active" => {
            // Taken for one that has nothing left, what it has left would be lost.
            if departed.by.is_none() || remaining_bytes(qmp)? != Some(0) {
                found.refusals.push(not_noticed(&state));
            }
            Standing::Spent
        }
        "completed" => Standing::Completed,
        other => {
            let where_it_is =
                if is_committed { "Its VM was given away: do not run it here" } else { "Its VM is here" };
            found.refusals.push(format!(
                "its migration is \"{other}\" and not \"postcopy-paused\": nothing can be resumed (query-migrate). {where_it_is}"
            ));
            Standing::Paused
        }
    };
    Ok((found, standing))
}

fn not_noticed(state: &str) -> String {
    format!(
        "its migration is \"{state}\" and not \"postcopy-paused\": another process is at it, or it has not noticed yet that \
         none is. Look again in a while (query-migrate)"
    )
}

/// What a migration has left to send of the memory, as QEMU says.
fn remaining_bytes(qmp: &mut Qmp) -> Result<Option<u64>> {
    Ok(qmp.execute("query-migrate", &json!({}))?["ram"]["remaining"].as_u64())
}

/// The VM runs on here, with its settings as they were: nobody was told of COMMIT ([`Standing::Here`]).
///
/// # Errors
/// [`Qmp::execute`]'s, or that its migration does not end.
pub fn bring_back(qmp: Qmp, departed: &Departed, file: &DepartedFile) -> Result<()> {
    let qmp = Arc::new(Mutex::new(qmp));
    // One that notices in the moment in which it is cancelled would wait for ever.
    broken_state(&mut qmp.lock())?;
    call_off(&qmp, None, &departed.manifest)?;
    let mut qmp = qmp.lock();
    let status = qmp.execute("query-status", &json!({}))?;
    if status["status"] != "running" {
        qmp.execute_slow("cont")?;
    }
    departed.settings.clone().restore(&mut qmp)?;
    file.remove()
}

/// It was told that all is safe, and nobody came to the rest ([`Standing::Completed`]).
///
/// # Errors
/// [`Qmp::execute`]'s.
pub fn finish(mut qmp: Qmp, departed: &Departed, file: &DepartedFile, quits: bool) -> Result<()> {
    if quits {
        qmp.execute("quit", &json!({}))?;
    } else {
        departed.settings.clone().restore(&mut qmp)?;
    }
    file.remove()
}

#[cfg(test)]
mod test {
    use libsg::ids::{Epoch, NodeId, Round, VolumeId};
    use libsg::manifest::Region;
    use libsg::migrate::Mode;
    use libsg::migrate::source::To;
    use libsg::page::InstallUnit;

    use super::*;
    use crate::qmp::test::answering;

    fn manifest() -> Manifest {
        let region = Region {
            name: "pc.ram".into(),
            guest_address: None,
            length_bytes: 64 << 12,
            unit: InstallUnit::Page,
        };
        Manifest { vm: "web".into(), regions: vec![region], vm_config: vec![1], sharing: None }
    }

    fn unscattered() -> Unscattered {
        Unscattered {
            volume: VolumeId(u128::MAX),
            epoch: Epoch(1),
            to: To::Destination("[::1]:7700".parse().expect("an address")),
            keeper: None,
            mode: Mode::Hybrid,
            round: Round(1),
            replicas: 2,
            members: Vec::new(),
            manifest: manifest(),
        }
    }

    /// One that is parked, and for which COMMIT is given, or not.
    fn parks(is_committed: bool) -> Unscattered {
        let keeper = is_committed.then(|| NodeId { name: "i1".into(), incarnation: u64::MAX });
        let arbiter = Some("etcd://10.0.0.1/sg".into());
        Unscattered { to: To::Parked { name: "web".into(), arbiter }, keeper, ..unscattered() }
    }

    /// Of a process that is gone.
    fn departed(qmp: &Qmp) -> Departed {
        let begun = Departed::begun(qmp, (&Settings::default(), &manifest()), 1 << 20);
        let gone = begun.by.map(|by| Process { started: by.started.wrapping_add(1), ..by });
        Departed { by: gone, unscattered: Some(unscattered()), ..begun }
    }

    #[test]
    fn what_is_written_is_read_and_another_qemus_stays() {
        let (directory, socket) = answering(|_, _| json!({}));
        let qmp = Qmp::connect(&socket).expect("greets");
        let path = directory.path().join("src.qmp.evict.json");
        let file = DepartedFile::new(&path, Some(Path::new("pool.secret")));
        assert_eq!(file.read().expect("no file"), None);
        let mut departed = departed(&qmp);
        file.begin(&mut departed).expect("written");
        assert_eq!(file.read().expect("read"), Some(departed.clone()));
        assert!(departed.secret.as_ref().is_some_and(|path| path.is_absolute()));
        let second = Departed { unscattered: None, ..departed.clone() };
        file.write(&second).expect("written");
        assert_eq!(file.read().expect("read"), Some(second));
        let ours = Process::of(std::os::unix::process::parent_id().cast_signed());
        let other = Departed { qemu: ours, ..departed.clone() };
        file.write(&other).expect("written");
        let refused = file.begin(&mut departed).expect_err("it is needed");
        assert!(refused.message.contains("--state-file"), "{refused}");
        let parked = Departed { unscattered: Some(parks(true)), ..departed.clone() };
        file.write(&parked).expect("written");
        assert_eq!(file.read().expect("read"), Some(parked));
        std::fs::write(&path, "{\"schema\":1}").expect("written");
        assert_eq!(file.read().expect_err("is none").kind, ErrorKind::Input);
        file.remove().expect("removed");
        let nowhere = DepartedFile::new(&directory.path().join("none/file"), None);
        assert_eq!(nowhere.write(&departed).expect_err("no such directory").kind, ErrorKind::System);
    }

    /// How a QEMU stands whose migration is so, with so much left.
    fn stands(status: &'static str, remaining: u64, change: impl Fn(&mut Departed)) -> (String, Standing) {
        let (_directory, socket) =
            answering(move |_, _| json!({ "status": status, "ram": { "remaining": remaining } }));
        let mut qmp = Qmp::connect(&socket).expect("greets");
        let mut departed = departed(&qmp);
        change(&mut departed);
        let (found, standing) = standing(&mut qmp, &departed).expect("answers");
        (found.refusals.join(" "), standing)
    }

    #[test]
    fn how_it_stands_is_what_qemu_says() {
        let none = String::new;
        assert_eq!(stands("postcopy-paused", 9, |_| {}), (none(), Standing::Paused));
        assert_eq!(stands("completed", 0, |_| {}), (none(), Standing::Completed));
        assert_eq!(stands("postcopy-active", 0, |_| {}), (none(), Standing::Spent));
        assert!(stands("postcopy-active", 4096, |_| {}).0.contains("not noticed"));
        assert!(stands("postcopy-active", 0, |of| of.by = None).0.contains("not noticed"));
        assert!(stands("postcopy-device", 0, |_| {}).0.contains("not noticed"));
        assert!(stands("failed", 0, |_| {}).0.contains("do not run it"));
        let here = |of: &mut Departed| of.unscattered = None;
        assert!(stands("postcopy-device", 9, here).0.contains("not given away"));
        for status in ["postcopy-paused", "failed", "none"] {
            assert_eq!(stands(status, 9, here), (none(), Standing::Here), "{status}");
        }
        for is_committed in [true, false] {
            let parks = |of: &mut Departed| of.unscattered = Some(parks(is_committed));
            assert_eq!(stands("postcopy-paused", 9, parks), (none(), Standing::Paused));
            assert_eq!(stands("postcopy-active", 0, parks), (none(), Standing::Spent));
            assert!(stands("postcopy-active", 4096, parks).0.contains("not noticed"));
            let failed = stands("failed", 0, parks);
            if is_committed {
                assert!(failed.0.contains("do not run it"), "{failed:?}");
                assert_eq!(stands("completed", 0, parks), (none(), Standing::Completed));
            } else {
                assert_eq!(failed, (none(), Standing::Here), "it was refused, and stays");
                assert!(stands("completed", 0, parks).0.contains("not given away"));
            }
        }
        let ours = Process::of(std::process::id().cast_signed());
        assert!(stands("postcopy-paused", 0, |of| of.by = ours).0.contains("at it still"));
    }
}

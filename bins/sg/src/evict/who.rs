//! Whom an operator means: asks every VMM, and every QEMU, what VM it has.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Result;
use rustix::process::Pid;
use vmms::{ControlSocket, Described, State, Vmm as _};

use super::args::EvictArgs;
use super::driven::Driven;
use super::qemu::{Leaver, Looked, Through};
use super::sockets::{Owner, Sought, owners};

/// A VM that can be evicted.
#[derive(Clone)]
pub struct Found {
    /// Its VMM.
    pub driven: Driven,
    /// Its name.
    pub name: String,
    /// What it has in memory.
    pub bytes: u64,
    /// It is leaving already: somebody told it, who is gone.
    pub leaves: bool,
}

/// Somebody who was meant, and has no VM that can be evicted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// By which socket.
    pub socket: PathBuf,
    /// Why.
    pub why: String,
}

/// What became of the question who is there.
#[derive(Default)]
pub struct Asked {
    /// VMs to evict.
    pub found: Vec<Found>,
    /// What there is to say of others.
    pub notes: Vec<Note>,
    /// What is worth knowing of those that leave.
    pub warnings: Vec<Note>,
    /// Some that were meant cannot be evicted.
    pub failed: bool,
}

/// What one says.
enum Answer {
    Vmm(Result<Described>),
    Qemu(Result<Looked>),
    Nobody,
    Other { qemu: Option<Pid>, why: String },
}

/// Asks all of them at once: one that does not answer shall not hold up the others.
pub fn ask(args: &EvictArgs, through: &Arc<Through>) -> Result<Asked> {
    let sought = args.vmms.seek(&args.qmp)?;
    let owners = owners(&sought);
    let answers: Vec<_> = std::thread::scope(|scope| {
        let asked = sought.iter().zip(owners);
        let asked: Vec<_> =
            asked.map(|(of, owner)| scope.spawn(|| answer(&of.path, owner, through))).collect();
        let panicked = |_| Answer::Other { qemu: None, why: "asking it failed".into() };
        asked.into_iter().map(|thread| thread.join().unwrap_or_else(panicked)).collect()
    });
    Ok(Asked::of(sought, answers))
}

fn answer(path: &Path, owner: Owner, through: &Arc<Through>) -> Answer {
    match owner {
        Owner::Vmm => Answer::Vmm(ControlSocket::new(path).describe()),
        Owner::Qemu(qmp) => Answer::Qemu(Leaver::look(qmp, path, through)),
        Owner::Nobody => Answer::Nobody,
        Owner::Other { qemu, why } => Answer::Other { qemu, why },
    }
}

impl Asked {
    fn of(sought: Vec<Sought>, answers: Vec<Answer>) -> Self {
        let mut all = Self::default();
        // A QEMU may have several sockets, of which others are somebody's.
        let mut qemus: Vec<(Pid, PathBuf)> = Vec::new();
        let mut others = Vec::new();
        for (of, answer) in sought.into_iter().zip(answers) {
            match answer {
                Answer::Vmm(Ok(described)) => {
                    let driven = Driven::Control(of.path);
                    all.take(driven, described, of.named);
                }
                Answer::Qemu(Ok(looked)) => match first_of(&qemus, looked.process) {
                    Some(first) => all.note(&of.path, another_socket(first)),
                    None => {
                        qemus.extend(looked.process.map(|process| (process, of.path.clone())));
                        all.take_qemu(looked, of.named);
                    }
                },
                Answer::Vmm(Err(error)) | Answer::Qemu(Err(error)) => {
                    all.fail(&of.path, format!("{error:#}"))
                }
                Answer::Nobody => {
                    all.failed |= of.named;
                    all.note(&of.path, "nobody listens there".into());
                }
                Answer::Other { qemu, why } => others.push((of.path, qemu, why)),
            }
        }
        for (path, qemu, why) in others {
            match first_of(&qemus, qemu) {
                Some(first) => all.note(&path, another_socket(first)),
                None => all.fail(&path, why),
            }
        }
        all
    }

    fn take(&mut self, driven: Driven, described: Described, named: bool) {
        let why = match (described.state, described.vm) {
            (State::Here | State::Leaving, Some(name)) => {
                let leaves = described.state == State::Leaving;
                self.found.push(Found { driven, name, bytes: described.present_bytes, leaves });
                return;
            }
            (State::Left, _) => "its VM has left already",
            (State::Arriving, _) => "its VM is not all there yet: it can leave when it is",
            (State::Empty | State::Here | State::Leaving, _) => "there is no VM",
        };
        self.failed |= named && described.state != State::Left;
        self.note(driven.socket(), why.into());
    }

    /// What stands in the way of a VM that is here is its own: the others leave.
    fn take_qemu(&mut self, looked: Looked, named: bool) {
        let Looked { leaver, described, found, .. } = looked;
        let socket = leaver.socket().to_owned();
        if described.state == State::Here {
            let warning = |why| Note { socket: socket.clone(), why };
            self.warnings.extend(found.warnings.into_iter().map(warning));
            if !found.refusals.is_empty() {
                return self.fail(&socket, found.refusals.join("\n  and "));
            }
        }
        self.take(Driven::Qemu(leaver), described, named);
    }

    fn note(&mut self, socket: &Path, why: String) {
        self.notes.push(Note { socket: socket.to_owned(), why });
    }

    fn fail(&mut self, socket: &Path, why: String) {
        self.failed = true;
        self.note(socket, why);
    }
}

/// By which socket it was found first.
fn first_of(qemus: &[(Pid, PathBuf)], process: Option<Pid>) -> Option<&Path> {
    qemus.iter().find(|(of, _)| Some(*of) == process).map(|(_, path)| path.as_path())
}

fn another_socket(first: &Path) -> String {
    format!("another socket of the QEMU at {}", first.display())
}

/// The names under which VMs are parked: their own, behind the prefix; told apart by their sockets where they are the
/// same.
pub fn parking_names(vms: &[Found], prefix: &str) -> Vec<String> {
    let name = |vm: &Found| match (prefix, vms.len()) {
        ("", _) => vm.name.clone(),
        (prefix, 1) => prefix.to_owned(),
        (prefix, _) => format!("{prefix}-{}", vm.name),
    };
    let names: Vec<String> = vms.iter().map(name).collect();
    let unique = |(vm, name): (&Found, &String)| {
        let stem = stem(vm.driven.socket());
        let again = names.iter().filter(|other| *other == name).count() > 1;
        if again { format!("{name}-{stem}") } else { name.clone() }
    };
    vms.iter().zip(&names).map(unique).collect()
}

/// The name of a socket, without its end.
pub fn stem(socket: &Path) -> String {
    socket.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default()
}

#[cfg(test)]
mod test {
    use super::*;

    fn found(name: &str, socket: &str) -> Found {
        Found { driven: Driven::Control(socket.into()), name: name.into(), bytes: 1, leaves: false }
    }

    #[test]
    fn parked_vms_have_names_of_their_own() {
        let vms = [found("web", "/run/a.sock"), found("db", "/run/b.sock"), found("web", "/run/c.sock")];
        assert_eq!(parking_names(&vms, ""), ["web-a", "db", "web-c"]);
        assert_eq!(parking_names(&vms[..2], "rack7"), ["rack7-web", "rack7-db"]);
        assert_eq!(parking_names(&vms[..1], "rack7"), ["rack7"]);
        assert_eq!(parking_names(&vms[..1], ""), ["web"]);
    }

    fn said(state: State, vm: Option<&str>) -> Described {
        Described { vm: vm.map(str::to_owned), state, memory_bytes: 2, present_bytes: 1 }
    }

    #[test]
    fn whoever_was_named_and_cannot_leave_is_a_failure() {
        let mut asked = Asked::default();
        let mut take = |socket: &str, described, named| {
            asked.take(Driven::Control(socket.into()), described, named);
            (asked.found.len(), asked.notes.len(), asked.failed)
        };
        take("/a", said(State::Here, Some("a")), true);
        take("/b", said(State::Left, Some("b")), true);
        assert_eq!(take("/c", said(State::Empty, None), false), (1, 2, false));
        assert_eq!(take("/d", said(State::Empty, None), true), (1, 3, true));
    }

    /// A directory with VMMs, QEMUs, a second socket of one of them, and what else there may be.
    #[test]
    fn a_mixture_is_told_apart_and_nobody_stops_the_others() {
        let process = |number| Pid::from_raw(number);
        let qemu = |path: &str, number, state, refusals: &[&str]| {
            let described = said(state, Some(path.trim_start_matches('/')));
            let found = qemu::Found {
                refusals: refusals.iter().map(ToString::to_string).collect(),
                warnings: vec!["its bitmaps stay".into()],
            };
            let leaver = Leaver::described(path, described.clone());
            Answer::Qemu(Ok(Looked { leaver, described, found, process: process(number) }))
        };
        let other = |number, why: &str| Answer::Other { qemu: process(number), why: why.into() };
        let answers = [
            ("/db", qemu("/db", 7, State::Here, &[])),
            ("/db-console", other(7, "does not greet")),
            ("/db-second", qemu("/db-second", 7, State::Here, &[])),
            ("/gpu", qemu("/gpu", 8, State::Here, &["a device", "a disk"])),
            ("/stale", Answer::Nobody),
            ("/taken", other(9, "does not greet")),
            ("/there", qemu("/there", 10, State::Empty, &["it does not run"])),
            ("/was", qemu("/was", 11, State::Left, &["it does not run"])),
            ("/web", Answer::Vmm(Ok(said(State::Here, Some("web"))))),
        ];
        let one =
            |(path, answer): (&str, Answer)| (Sought { path: path.into(), named: false, qmp: false }, answer);
        let (sought, answers): (Vec<_>, Vec<_>) = answers.into_iter().map(one).unzip();
        let asked = Asked::of(sought, answers);
        let names: Vec<_> = asked.found.iter().map(|vm| vm.name.as_str()).collect();
        assert_eq!(names, ["db", "web"]);
        assert!(asked.found[0].driven.qemu().is_some() && asked.found[1].driven.qemu().is_none());
        let noted: Vec<_> =
            asked.notes.iter().map(|note| format!("{}: {}", note.socket.display(), note.why)).collect();
        assert_eq!(
            noted,
            [
                "/db-second: another socket of the QEMU at /db",
                "/gpu: a device\n  and a disk",
                "/stale: nobody listens there",
                "/there: there is no VM",
                "/was: its VM has left already",
                "/db-console: another socket of the QEMU at /db",
                "/taken: does not greet",
            ]
        );
        assert!(asked.failed, "two that were meant stay");
        assert_eq!(asked.warnings.len(), 2, "of those that are here");
    }
}

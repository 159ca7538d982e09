//! Which sockets an operator means, and whose they are: a VMM's control socket, or a QEMU's QMP.
//!
//! ```text
//!   connect --> who listens?  sg-vmm ------------------------> a control socket
//!                 | another, or nobody knows
//!                 +--> {"QMP": …} comes by itself -----------> a QEMU
//!                 +--> nothing comes:  a QEMU listens -------> another client has it: it is asked nothing, for what is written
//!                        |                                     to some other socket of a QEMU's may be its guest's to read
//!                        +--> asked how it is, it answers ---> a control socket
//! ```

use std::collections::HashSet;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use libsg::ErrorKind;
use qemu::{Qmp, is_qemu, listener};
use rustix::process::Pid;
use vmms::{ControlSocket, Vmm as _};

use crate::cli::WrongArguments;

/// Where VMMs of a host have their sockets.
const RUN_DIRECTORY: &str = "/run/libsg";

/// How long a QEMU among others has to greet, which it does at once, between two turns of its guest: nobody is held up for longer.
const GREETS: Duration = Duration::from_secs(1);

/// How long one has that is alone.
const GREETS_ALONE: Duration = Duration::from_secs(10);

/// How the program of a VMM is called whose control sockets are known.
const VMM: &str = "sg-vmm";

/// Which VMMs.
#[derive(Debug, Default, Args)]
pub struct Sockets {
    /// Control sockets of VMMs (sg-vmm run --control SOCKET)
    #[arg(value_name = "CONTROL_SOCKET")]
    pub sockets: Vec<PathBuf>,
    /// Every socket in this directory [/run/libsg where none is named]: control sockets, and for `sg evict` QMP sockets, too
    #[arg(long, value_name = "DIR", num_args = 0..=1, default_missing_value = RUN_DIRECTORY)]
    pub all: Option<PathBuf>,
}

/// A socket that is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sought {
    /// Where it is.
    pub path: PathBuf,
    /// By itself, and not as one of a directory.
    pub named: bool,
    /// As a QEMU's.
    pub qmp: bool,
}

/// Whose a socket is.
pub enum Owner {
    /// A VMM's, which is driven by it.
    Vmm,
    /// A QEMU's, which has greeted.
    Qemu(Qmp),
    /// Nobody's: the file of one that is gone.
    Nobody,
    /// Of somebody by whom no VM can be driven over it.
    Other {
        /// The process, where it is a QEMU's.
        qemu: Option<Pid>,
        /// Why.
        why: String,
    },
}

impl Sockets {
    /// Control sockets, those of the directory by name. QEMUs that are there are not driven by who asks for these.
    pub fn find(&self) -> Result<Vec<PathBuf>> {
        let mut sought = self.seek(&[])?;
        let in_directory: Vec<Sought> = sought.iter().filter(|of| !of.named).cloned().collect();
        for (of, owner) in in_directory.iter().zip(owners(&in_directory)) {
            if matches!(owner, Owner::Qemu(_) | Owner::Other { qemu: Some(_), .. }) {
                eprintln!(
                    "sg: {}: a QEMU's: it is driven by the sg evict, or sg gather, that it has",
                    of.path.display()
                );
                sought.retain(|other| other != of);
            }
        }
        Ok(sought.into_iter().map(|of| of.path).collect())
    }

    /// All of them, and these of QEMUs: those that are named first. Each once, however it is written.
    pub fn seek(&self, qmp: &[PathBuf]) -> Result<Vec<Sought>> {
        let named = |qmp: bool| move |path: &PathBuf| Sought { path: path.clone(), named: true, qmp };
        let mut sought: Vec<Sought> = qmp.iter().map(named(true)).collect();
        sought.extend(self.sockets.iter().map(named(false)));
        if let Some(directory) = &self.all {
            let one = |path| Sought { path, named: false, qmp: false };
            sought.extend(sockets_in(directory)?.into_iter().map(one));
        }
        let mut seen = HashSet::new();
        sought.retain(|of| seen.insert(of.path.canonicalize().unwrap_or_else(|_| of.path.clone())));
        if sought.is_empty() {
            let what = match &self.all {
                Some(directory) => format!("there is no socket in {}", directory.display()),
                None => format!("name control sockets, or --all for those in {RUN_DIRECTORY}"),
            };
            return Err(WrongArguments(what).into());
        }
        Ok(sought)
    }
}

fn sockets_in(directory: &Path) -> Result<Vec<PathBuf>> {
    let wrong = |error| WrongArguments(format!("--all: {} cannot be read: {error}", directory.display()));
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(wrong)? {
        let entry = entry?;
        if std::os::unix::fs::FileTypeExt::is_socket(&entry.file_type()?) {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(found)
}

/// Whose they are. All are asked at once: one that says nothing shall not hold up the others.
pub fn owners(sought: &[Sought]) -> Vec<Owner> {
    let greets = if sought.len() == 1 { GREETS_ALONE } else { GREETS };
    std::thread::scope(|scope| {
        let asked: Vec<_> = sought.iter().map(|of| scope.spawn(move || owner(of, greets))).collect();
        let panicked = |_| Owner::Other { qemu: None, why: "asking it failed".into() };
        asked.into_iter().map(|thread| thread.join().unwrap_or_else(panicked)).collect()
    })
}

fn owner(sought: &Sought, greets: Duration) -> Owner {
    let path = &sought.path;
    let other = |qemu, why| Owner::Other { qemu, why };
    let connection = match UnixStream::connect(path) {
        Ok(connection) => connection,
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => return Owner::Nobody,
        Err(error) => return other(None, format!("{}: {error}", path.display())),
    };
    let (process, program) = listener(&connection).unzip();
    let is = |name: &dyn Fn(&str) -> bool| program.as_deref().is_some_and(name);
    if !sought.qmp && is(&|name| name.contains(VMM)) {
        return Owner::Vmm;
    }
    let error = match Qmp::over(connection, path, greets) {
        Ok(qmp) => return Owner::Qemu(qmp),
        Err(error) => error,
    };
    if is(&is_qemu) {
        return other(process, error.chain());
    }
    if sought.qmp || error.kind != ErrorKind::Timeout {
        return other(None, error.chain());
    }
    match ControlSocket::new(path).progress() {
        Ok(_) => Owner::Vmm,
        Err(_) => other(
            None,
            format!(
                "{}: whoever listens there says nothing: a QEMU whose QMP another client has (libvirt?), which serves one at a \
                 time and can have a second -qmp, or a VMM that is stopped",
                path.display()
            ),
        ),
    }
}

#[cfg(test)]
mod test {
    use std::io::{BufRead as _, BufReader, Write as _};
    use std::os::unix::net::UnixListener;

    use super::*;

    /// Somebody who says so at once, and so to what is asked; nothing where it is empty.
    fn listens(path: &Path, at_once: &'static str, answer: &'static str) {
        let listener = UnixListener::bind(path).expect("binds");
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = BufReader::new(stream.expect("accepts"));
                let _ = stream.get_mut().write_all(at_once.as_bytes());
                let mut line = String::new();
                while stream.read_line(&mut line).is_ok_and(|bytes| bytes > 0) {
                    let _ = stream.get_mut().write_all(answer.as_bytes());
                }
            }
        });
    }

    #[test]
    fn each_socket_is_told_by_what_it_says() {
        let directory = tempfile::tempdir().expect("creates");
        let at = |name: &str| directory.path().join(name);
        let greeting = "{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 2, \"minor\": 0, \"major\": 10}}}}\n";
        listens(&at("qemu"), greeting, "{\"return\": {}}\n");
        listens(&at("vmm"), "", "{\"ok\":true,\"sample\":{\"t_s\":0.0,\"bytes\":{}}}\n");
        listens(&at("taken"), "", "");
        listens(&at("web"), "HTTP/1.0 400 Bad\r\n", "");
        drop(UnixListener::bind(at("stale")).expect("binds"));
        std::fs::write(at("file"), "no socket").expect("written");

        let sockets = Sockets { sockets: vec![at("vmm")], all: Some(directory.path().to_owned()) };
        let sought = sockets.seek(&[directory.path().join("./qemu")]).expect("some");
        let names: Vec<_> = sought.iter().filter_map(|of| of.path.file_name()?.to_str()).collect();
        assert_eq!(names, ["qemu", "vmm", "stale", "taken", "web"], "each once, those that are named first");
        let named: Vec<_> = sought.iter().map(|of| (of.named, of.qmp)).collect();
        assert_eq!(named[..3], [(true, true), (true, false), (false, false)]);

        let owners = owners(&sought);
        assert!(matches!(&owners[0], Owner::Qemu(qmp) if qmp.version().major == 10));
        assert!(matches!(owners[1], Owner::Vmm));
        assert!(matches!(owners[2], Owner::Nobody));
        let Owner::Other { why, .. } = &owners[3] else { panic!("it says nothing") };
        assert!(why.contains("taken") && why.contains("another client"), "{why}");
        assert!(matches!(owners[4], Owner::Other { .. }));
        // Nor is one that is said to be a QEMU asked what a VMM is asked.
        let said = Sought { path: at("vmm"), named: true, qmp: true };
        assert!(
            matches!(owner(&said, Duration::from_millis(20)), Owner::Other { why, .. } if why.contains("does not greet"))
        );
    }

    #[test]
    fn some_socket_has_to_be_meant() {
        let directory = tempfile::tempdir().expect("creates");
        let all = Some(directory.path().to_owned());
        for sockets in [Sockets::default(), Sockets { all, ..Sockets::default() }] {
            assert!(sockets.seek(&[]).expect_err("none").is::<WrongArguments>());
        }
        assert_eq!(Sockets::default().seek(&["a".into()]).expect("one").len(), 1);
    }
}

//! QMP: how a QEMU is asked and told, one JSON object after the other over a socket.

use std::io::{BufRead as _, BufReader, IoSlice, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use libsg::{Error, ErrorKind, Result};
use rustix::net::sockopt::socket_peercred;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// How long a QEMU may take to answer: it looks at QMP between two turns of the guest, on a busy host.
const ANSWER: Duration = Duration::from_secs(10);

/// How long a QEMU may take for a step that takes it a moment, on a busy host; or that waits for its disks.
pub(crate) const STEP: Duration = Duration::from_secs(30);

/// What a migration stays in that waits to be resumed.
pub(crate) const PAUSED: &str = "postcopy-paused";

/// Bytes of one answer. A VM with hundreds of disks stays under a megabyte.
const ANSWER_BYTES_MAX: u64 = 16 << 20;

/// A version of QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// 7 of 7.2.22.
    pub major: u64,
    /// 2 of 7.2.22.
    pub minor: u64,
    /// 22 of 7.2.22.
    pub micro: u64,
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// A QEMU, by its QMP socket (`-qmp unix:PATH,server=on,wait=off`).
pub struct Qmp {
    path: PathBuf,
    connection: BufReader<UnixStream>,
    version: Version,
    /// What has come of a line that has no end yet: the rest may come when somebody waits again.
    begun: Vec<u8>,
    /// The number of the last command. An answer bears it, so that one that comes too late is not taken for the next.
    commands: u64,
    /// How long an answer may take, and that of a step.
    patience: (Duration, Duration),
}

impl Qmp {
    /// Connects, and gets past the greeting.
    ///
    /// # Errors
    /// [`ErrorKind::Unreachable`] where nobody listens; [`ErrorKind::Timeout`] where somebody else has the socket: QEMU
    /// serves one client at a time; [`ErrorKind::Protocol`] when it is no QMP.
    pub fn connect(path: &Path) -> Result<Self> {
        let connection = UnixStream::connect(path).map_err(|cause| {
            let message = format!("no QEMU listens at {}: -qmp unix:PATH,server=on,wait=off", path.display());
            Error::new(ErrorKind::Unreachable, message).because(cause)
        })?;
        Self::over(connection, path, ANSWER)
    }

    /// The same over a connection that was made to the socket at `path`, with so much patience for the greeting.
    ///
    /// # Errors
    /// As [`Self::connect`].
    pub fn over(connection: UnixStream, path: &Path, patience: Duration) -> Result<Self> {
        connection.set_write_timeout(Some(ANSWER))?;
        let version = Version { major: 0, minor: 0, micro: 0 };
        let mut qmp = Self {
            path: path.to_owned(),
            connection: BufReader::new(connection),
            version,
            begun: Vec::new(),
            commands: 0,
            patience: (ANSWER, STEP),
        };
        let greeting = qmp.line(Instant::now() + patience).map_err(|error| match error.kind {
            ErrorKind::Timeout => {
                let message = format!(
                    "the QEMU at {} does not greet: another client has its socket, and a QEMU serves one at a time; give \
                     it a second -qmp",
                    path.display()
                );
                Error::new(ErrorKind::Timeout, message)
            }
            _ => error,
        })?;
        let number = |part: &str| greeting["QMP"]["version"]["qemu"][part].as_u64();
        let (Some(major), Some(minor), Some(micro)) = (number("major"), number("minor"), number("micro"))
        else {
            return Err(qmp.protocol("its greeting has no version: this is no QMP socket"));
        };
        qmp.version = Version { major, minor, micro };
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// What the QEMU said that it is.
    #[must_use]
    pub const fn version(&self) -> Version {
        self.version
    }

    /// Executes a command, and gives what it returns. Events on the way are passed over.
    ///
    /// # Errors
    /// [`ErrorKind::Vm`] with QEMU's own words when it refuses. [`ErrorKind::Timeout`] when it does not answer in 10 s: it may
    /// do what it was told all the same, and the next command may be answered. [`ErrorKind::Unreachable`] when QEMU is gone.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        self.say(command, arguments, None)?;
        self.answer(command, self.patience.0)
    }

    /// The same, of a command that QEMU answers when its disks are drained or opened: it has 30 s.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub(crate) fn execute_slow(&mut self, command: &str) -> Result<Value> {
        self.say(command, &json!({}), None)?;
        self.answer(command, self.patience.1)
    }

    /// Executes a command that has QEMU use a connection (its `uri`), of which it is given an end: as whoever it runs, and
    /// whatever it sees of this host's files. Gives our end, and a duplicate of its own.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub(crate) fn connect_by(
        &mut self,
        command: &str,
        mut arguments: Value,
    ) -> Result<(UnixStream, UnixStream)> {
        let (ours, theirs) = UnixStream::pair()?;
        let name = json!({ "fdname": "sg-stream" });
        self.say("getfd", &name, Some(theirs.as_fd()))?;
        self.answer("getfd", self.patience.0)?;
        arguments["uri"] = json!("fd:sg-stream");
        if let Err(error) = self.execute(command, &arguments) {
            let _ = self.execute("closefd", &name);
            return Err(error);
        }
        Ok((ours, theirs))
    }

    /// A duplicate of the connection, of which nothing is to be read: it ends with QEMU.
    pub(crate) fn lives(&self) -> Result<UnixStream> {
        Ok(self.connection.get_ref().try_clone()?)
    }

    fn say(&mut self, command: &str, arguments: &Value, descriptor: Option<BorrowedFd<'_>>) -> Result<()> {
        self.commands += 1;
        let mut line = json!({ "execute": command, "arguments": arguments, "id": self.commands }).to_string();
        line.push('\n');
        let connection = self.connection.get_mut();
        let sent = send(connection, line.as_bytes(), descriptor)
            .and_then(|sent| connection.write_all(line.as_bytes().get(sent..).unwrap_or_default()));
        sent.map_err(|cause| self.gone().because(cause))
    }

    /// The answer to the last command. Those before it that were not waited for are passed over.
    fn answer(&mut self, command: &str, patience: Duration) -> Result<Value> {
        let deadline = Instant::now() + patience;
        loop {
            let mut answer = self.line(deadline)?;
            // What QEMU could not read bears none: that was the last, since it is told one at a time.
            if answer.get("id").is_some_and(|id| *id != self.commands) {
                continue;
            }
            if let Some(returned) = answer.get_mut("return") {
                return Ok(returned.take());
            }
            if let Some(error) = answer.get("error") {
                let words = error["desc"].as_str().unwrap_or("it does not say why");
                return Err(Error::new(ErrorKind::Vm, format!("QEMU refuses {command}: {words}")));
            }
            if answer.get("event").is_none() {
                return Err(self.protocol("neither an answer nor an event"));
            }
        }
    }

    /// How far its migration is: "none" where there was none.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub fn migration(&mut self) -> Result<String> {
        let told = self.execute("query-migrate", &json!({}))?;
        Ok(told["status"].as_str().unwrap_or("none").to_owned())
    }

    /// Waits until its migration is as wanted, and says how it is.
    ///
    /// # Errors
    /// As [`Self::execute`]; [`ErrorKind::Timeout`].
    pub(crate) fn await_migration(&mut self, is_wanted: impl Fn(&str) -> bool) -> Result<String> {
        let deadline = Instant::now() + STEP;
        loop {
            let status = self.migration()?;
            if is_wanted(&status) {
                return Ok(status);
            }
            if Instant::now() > deadline {
                let message = format!("the source QEMU's migration stays \"{status}\" (query-migrate)");
                return Err(Error::new(ErrorKind::Timeout, message));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// What the monitor for people prints to a command.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub fn monitor(&mut self, command: &str) -> Result<String> {
        let printed = self.execute("human-monitor-command", &json!({ "command-line": command }))?;
        Ok(printed.as_str().unwrap_or_default().to_owned())
    }

    /// Ends the QEMU. One with a vCPU that waits for memory for ever does not end when it is told to: its process is killed, if
    /// that is known, which it is not where somebody else made the socket for it.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub fn kill(&mut self) -> Result<()> {
        match self.process() {
            Some(process) => Ok(kill_process(process, Signal::KILL)?),
            None => self.execute("quit", &json!({})).map(drop),
        }
    }

    /// The process that listens at the socket, if it is a QEMU.
    #[must_use]
    pub fn process(&self) -> Option<Pid> {
        let (process, program) = listener(self.connection.get_ref())?;
        is_qemu(&program).then_some(process)
    }

    fn line(&mut self, deadline: Instant) -> Result<Value> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::new(ErrorKind::Timeout, self.about("does not answer")));
            }
            self.connection.get_ref().set_read_timeout(Some(left))?;
            let room = ANSWER_BYTES_MAX.saturating_sub(self.begun.len() as u64);
            match self.connection.by_ref().take(room).read_until(b'\n', &mut self.begun) {
                Ok(0) if room == 0 => return Err(self.protocol("an answer without end")),
                Ok(0) => return Err(self.gone()),
                Ok(_) if self.begun.ends_with(b"\n") => break,
                Ok(_) => {}
                Err(error)
                    if matches!(
                        error.kind(),
                        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted
                    ) => {}
                Err(error) => return Err(self.gone().because(error)),
            }
        }
        let line = std::mem::take(&mut self.begun);
        serde_json::from_slice(&line).map_err(|cause| self.protocol("what it says is no JSON").because(cause))
    }

    fn about(&self, what: &str) -> String {
        format!("the QEMU at {} {what}", self.path.display())
    }

    fn gone(&self) -> Error {
        Error::new(ErrorKind::Unreachable, self.about("hung up: it has ended, or was ended"))
    }

    fn protocol(&self, what: &str) -> Error {
        Error::new(ErrorKind::Protocol, format!("{}: {what}", self.about("does not speak QMP")))
    }
}

/// The process that listens at the other end of a connection, and the name of its program, where the kernel tells: not of another
/// user's, and of a socket that was handed on it tells who made it.
#[must_use]
pub fn listener(connection: &UnixStream) -> Option<(Pid, String)> {
    let process = socket_peercred(connection).ok()?.pid;
    let program = std::fs::read_link(format!("/proc/{}/exe", process.as_raw_nonzero())).ok()?;
    Some((process, program.file_name()?.to_string_lossy().into_owned()))
}

/// Whether a program of this name is a QEMU.
#[must_use]
pub fn is_qemu(program: &str) -> bool {
    program.contains("qemu")
}

/// Sends the beginning of a line, and a descriptor with it.
fn send(connection: &UnixStream, line: &[u8], descriptor: Option<BorrowedFd<'_>>) -> std::io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let given = descriptor.as_slice();
    if !given.is_empty() && !control.push(SendAncillaryMessage::ScmRights(given)) {
        return Err(std::io::ErrorKind::InvalidInput.into());
    }
    Ok(sendmsg(connection, &[IoSlice::new(line)], &mut control, SendFlags::NOSIGNAL)?)
}

#[cfg(test)]
pub(crate) mod test;

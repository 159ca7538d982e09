//! QMP: how a QEMU is asked and told, one JSON object after the other over a socket.

use std::io::{BufRead as _, BufReader, IoSlice, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
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
        connection.set_write_timeout(Some(ANSWER))?;
        let version = Version { major: 0, minor: 0, micro: 0 };
        let mut qmp = Self { path: path.to_owned(), connection: BufReader::new(connection), version };
        let greeting = qmp.line(Instant::now() + ANSWER).map_err(|error| match error.kind {
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
    /// [`ErrorKind::Vm`] with QEMU's own words when it refuses; otherwise nothing more can be said over this connection:
    /// [`ErrorKind::Unreachable`] when QEMU is gone, [`ErrorKind::Timeout`] when it does not answer in 10 s.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        self.say(command, arguments, None)?;
        self.answer(command)
    }

    /// Gives it a duplicate of a descriptor of ours, by this name.
    ///
    /// # Errors
    /// As [`Self::execute`].
    pub(crate) fn give(&mut self, name: &str, descriptor: BorrowedFd<'_>) -> Result<()> {
        self.say("getfd", &json!({ "fdname": name }), Some(descriptor))?;
        self.answer("getfd").map(drop)
    }

    /// A duplicate of the connection, of which nothing is to be read: it ends with QEMU.
    pub(crate) fn lives(&self) -> Result<UnixStream> {
        Ok(self.connection.get_ref().try_clone()?)
    }

    fn say(&mut self, command: &str, arguments: &Value, descriptor: Option<BorrowedFd<'_>>) -> Result<()> {
        let mut line = json!({ "execute": command, "arguments": arguments }).to_string();
        line.push('\n');
        let connection = self.connection.get_mut();
        let sent = send(connection, line.as_bytes(), descriptor)
            .and_then(|sent| connection.write_all(line.as_bytes().get(sent..).unwrap_or_default()));
        sent.map_err(|cause| self.gone().because(cause))
    }

    fn answer(&mut self, command: &str) -> Result<Value> {
        let deadline = Instant::now() + ANSWER;
        loop {
            let mut answer = self.line(deadline)?;
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
    pub(crate) fn process(&self) -> Option<Pid> {
        let process = socket_peercred(self.connection.get_ref()).ok()?.pid;
        let program = std::fs::read_link(format!("/proc/{}/exe", process.as_raw_nonzero())).ok()?;
        program.file_name()?.to_string_lossy().contains("qemu").then_some(process)
    }

    fn line(&mut self, deadline: Instant) -> Result<Value> {
        let mut line = String::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Error::new(ErrorKind::Timeout, self.about("does not answer")));
            }
            self.connection.get_ref().set_read_timeout(Some(left))?;
            let room = ANSWER_BYTES_MAX.saturating_sub(line.len() as u64);
            match self.connection.by_ref().take(room).read_line(&mut line) {
                Ok(0) if room == 0 => return Err(self.protocol("an answer without end")),
                Ok(0) => return Err(self.gone()),
                Ok(_) if line.ends_with('\n') => break,
                Ok(_) => {}
                Err(error)
                    if matches!(
                        error.kind(),
                        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted
                    ) => {}
                Err(error) => return Err(self.gone().because(error)),
            }
        }
        serde_json::from_str(&line).map_err(|cause| self.protocol("what it says is no JSON").because(cause))
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
pub(crate) mod test {
    use super::*;
    use std::os::unix::net::UnixListener;

    const GREETING: &str =
        r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}, "capabilities": []}}"#;

    /// Somebody at a socket who says these lines, one for each that comes; the first at once.
    fn somebody(lines: &'static [&'static str]) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().expect("creates");
        let path = directory.path().join("qmp");
        let listener = UnixListener::bind(&path).expect("binds");
        std::thread::spawn(move || {
            let (stream, _) = listener.accept().expect("accepts");
            let mut stream = BufReader::new(stream);
            for line in lines {
                let _ = stream.get_mut().write_all(line.as_bytes());
                let _ = stream.get_mut().write_all(b"\n");
                let _ = stream.read_line(&mut String::new());
            }
        });
        (directory, path)
    }

    /// A QEMU 7.2 at a socket that returns what is said to each command and its arguments.
    pub(crate) fn answering(
        answer: impl Fn(&str, &Value) -> Value + Send + 'static,
    ) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().expect("creates");
        let path = directory.path().join("qmp");
        let listener = UnixListener::bind(&path).expect("binds");
        std::thread::spawn(move || {
            let (stream, _) = listener.accept().expect("accepts");
            let mut stream = BufReader::new(stream);
            let mut line = GREETING.to_owned();
            loop {
                let _ = writeln!(stream.get_mut(), "{line}");
                line.clear();
                if !stream.read_line(&mut line).is_ok_and(|bytes| bytes > 0) {
                    return;
                }
                let asked: Value = serde_json::from_str(&line).expect("JSON");
                let command = asked["execute"].as_str().expect("a command");
                line = json!({ "return": answer(command, &asked["arguments"]) }).to_string();
            }
        });
        (directory, path)
    }

    #[test]
    fn answers_refusals_and_events() {
        let lines = &[
            GREETING,
            r#"{"return": {}}"#,
            "{\"event\": \"STOP\"}\n{\"return\": {\"running\": true}}",
            r#"{"error": {"class": "GenericError", "desc": "not now"}}"#,
        ];
        let (_directory, path) = somebody(lines);
        let mut qmp = Qmp::connect(&path).expect("greets");
        assert_eq!(qmp.version().to_string(), "7.2.22");
        assert_eq!(qmp.execute("query-status", &json!({})).expect("answers")["running"], true);
        let refused = qmp.execute("stop", &json!({})).expect_err("refuses");
        assert_eq!((refused.kind, refused.message.as_str()), (ErrorKind::Vm, "QEMU refuses stop: not now"));
        assert_eq!(qmp.execute("stop", &json!({})).expect_err("is gone").kind, ErrorKind::Unreachable);
    }

    #[test]
    fn what_is_no_qemu_is_told_apart() {
        for (lines, kind) in [
            (&["hello"][..], ErrorKind::Protocol),
            (&[r#"{"QMP": {}}"#][..], ErrorKind::Protocol),
            (&[][..], ErrorKind::Unreachable),
            (&[GREETING, r#"{"neither": 1}"#][..], ErrorKind::Protocol),
        ] {
            let (_directory, path) = somebody(lines);
            assert_eq!(Qmp::connect(&path).err().expect("is none").kind, kind, "{lines:?}");
        }
        let nobody = Qmp::connect(Path::new("/nonexistent")).err().expect("nobody listens");
        assert_eq!(nobody.kind, ErrorKind::Unreachable);
        assert!(nobody.message.contains("-qmp unix:"), "{nobody}");
    }
}

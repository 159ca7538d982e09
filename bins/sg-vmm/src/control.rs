//! The control socket: unix stream, one JSON object a line in, one JSON object a line out.
//!
//! Every answer has `ok` (true, or false with `error` = kind and message). Several clients may talk
//! at once; each of them gets its answers in order.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use libsg::report::Status;
use libsg::{Error, ErrorKind, Result};
use serde_json::{Map, Value, json};

/// Bytes of a line; a longer one ends the connection.
const LINE_BYTES_MAX: usize = 64 << 10;
/// Clients at once; one more is refused.
const CLIENTS_MAX: usize = 32;
/// How soon a quiet connection notices that the VMM ends.
const TICK: Duration = Duration::from_millis(100);

/// What the socket is for.
pub trait Controlled: Send + Sync + 'static {
    /// Does one command; the fields of the answer, beside `ok`.
    ///
    /// # Errors
    /// What the client is told.
    fn command(&self, name: &str, arguments: &Map<String, Value>) -> Result<Map<String, Value>>;

    /// Whether everything is to end.
    fn ending(&self) -> bool;
}

/// The socket; removed when dropped.
pub struct Server {
    path: PathBuf,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Server {
    /// Listens on `path`, replacing a socket that nobody listens on.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] when somebody listens there, [`ErrorKind::System`] when it cannot be bound.
    pub fn start(path: &Path, vmm: Arc<dyn Controlled>) -> Result<Self> {
        if UnixStream::connect(path).is_ok() {
            let why = format!("somebody listens on {} already", path.display());
            return Err(Error::new(ErrorKind::Input, why));
        }
        if std::fs::symlink_metadata(path)
            .is_ok_and(|m| std::os::unix::fs::FileTypeExt::is_socket(&m.file_type()))
        {
            std::fs::remove_file(path)?;
        }
        let listener = UnixListener::bind(path).map_err(|e| {
            Error::new(ErrorKind::System, format!("cannot listen on {}", path.display())).because(e)
        })?;
        listener.set_nonblocking(true)?;
        let body = move || accept(&listener, &vmm);
        let thread = std::thread::Builder::new().name("sg-control".into()).spawn(body)?;
        Ok(Self { path: path.to_owned(), thread: Some(thread) })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the control thread panicked");
        }
    }
}

fn accept(listener: &UnixListener, vmm: &Arc<dyn Controlled>) {
    let clients = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        while !vmm.ending() {
            let Ok((mut stream, _)) = listener.accept() else {
                wait_readable(listener);
                continue;
            };
            if clients.load(Ordering::Relaxed) >= CLIENTS_MAX {
                let _ = stream.write_all(&line(&refusal(&Error::new(ErrorKind::Full, "too many clients"))));
                continue;
            }
            clients.fetch_add(1, Ordering::Relaxed);
            let clients = &clients;
            let body = move || {
                if let Err(error) = converse(stream, &**vmm) {
                    tracing::debug!(%error, "a control connection ended");
                }
                clients.fetch_sub(1, Ordering::Relaxed);
            };
            if let Err(error) =
                std::thread::Builder::new().name("sg-control-client".into()).spawn_scoped(scope, body)
            {
                tracing::warn!(%error, "no thread for a control connection");
                clients.fetch_sub(1, Ordering::Relaxed);
            }
        }
    });
}

fn wait_readable(listener: &UnixListener) {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let tick = Timespec { tv_sec: 0, tv_nsec: TICK.subsec_nanos().into() };
    let _ = poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&tick));
}

/// Answers one client until it goes, or everything ends.
fn converse(mut stream: UnixStream, vmm: &dyn Controlled) -> std::io::Result<()> {
    stream.set_read_timeout(Some(TICK))?;
    // A client that does not read its answers is let go.
    stream.set_write_timeout(Some(Duration::from_secs(10)))?;
    let mut pending = Vec::new();
    let mut chunk = [0; 4096];
    while !vmm.ending() {
        match stream.read(&mut chunk) {
            Ok(0) => return Ok(()),
            Ok(bytes) => pending.extend_from_slice(&chunk[..bytes]),
            Err(error)
                if [std::io::ErrorKind::WouldBlock, std::io::ErrorKind::Interrupted]
                    .contains(&error.kind()) =>
            {
                continue;
            }
            Err(error) => return Err(error),
        }
        while let Some(end) = pending.iter().position(|byte| *byte == b'\n') {
            let request: Vec<_> = pending.drain(..=end).collect();
            if request.trim_ascii().is_empty() {
                continue;
            }
            stream.write_all(&line(&answer(&request, vmm)))?;
        }
        if pending.len() > LINE_BYTES_MAX {
            return stream.write_all(&line(&refusal(&Error::new(ErrorKind::Input, "the line is too long"))));
        }
    }
    Ok(())
}

fn answer(request: &[u8], vmm: &dyn Controlled) -> Map<String, Value> {
    let malformed = |why: &str| refusal(&Error::new(ErrorKind::Input, why));
    let Ok(Value::Object(request)) = serde_json::from_slice(request) else {
        return malformed("not a JSON object");
    };
    let Some(Value::String(name)) = request.get("do") else {
        return malformed("no \"do\" that names a command");
    };
    match vmm.command(name, &request) {
        Ok(mut fields) => {
            fields.insert("ok".into(), true.into());
            fields
        }
        Err(error) => refusal(&error),
    }
}

fn refusal(error: &Error) -> Map<String, Value> {
    let mut fields = Map::new();
    fields.insert("ok".into(), false.into());
    fields.insert("error".into(), json!(Status::from(error)));
    fields
}

fn line(fields: &Map<String, Value>) -> Vec<u8> {
    let mut bytes = serde_json::to_vec(fields).unwrap_or_else(|_| b"{\"ok\":false}".to_vec());
    bytes.push(b'\n');
    bytes
}

#[cfg(test)]
mod test {
    use std::io::{BufRead, BufReader};
    use std::sync::atomic::AtomicBool;

    use super::*;

    #[derive(Default)]
    struct Echo(AtomicBool);

    impl Controlled for Echo {
        fn command(&self, name: &str, arguments: &Map<String, Value>) -> Result<Map<String, Value>> {
            match name {
                "echo" => Ok(arguments.clone()),
                _ => Err(Error::new(ErrorKind::Input, "unknown")),
            }
        }

        fn ending(&self) -> bool {
            self.0.load(Ordering::Relaxed)
        }
    }

    fn ask(stream: &mut UnixStream, request: &str) -> Value {
        writeln!(stream, "{request}").expect("sent");
        let mut text = String::new();
        BufReader::new(stream).read_line(&mut text).expect("answered");
        serde_json::from_str(&text).expect("JSON")
    }

    #[test]
    fn clients_are_answered_line_by_line() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("socket");
        let echo = Arc::new(Echo::default());
        let server = Server::start(&path, Arc::clone(&echo) as Arc<dyn Controlled>).expect("listens");
        assert!(Server::start(&path, Arc::clone(&echo) as Arc<dyn Controlled>).is_err(), "in use");
        let mut one = UnixStream::connect(&path).expect("connects");
        let mut two = UnixStream::connect(&path).expect("connects");
        assert_eq!(ask(&mut one, r#"{"do":"echo","a":5}"#), json!({"do": "echo", "a": 5, "ok": true}));
        assert_eq!(ask(&mut two, r#"{"do":"other"}"#)["error"]["kind"], "input");
        for bad in ["nonsense", "[]", "{}", r#"{"do":7}"#] {
            assert_eq!(ask(&mut two, bad)["ok"], false);
        }
        let long = "x".repeat(LINE_BYTES_MAX + 1);
        two.write_all(long.as_bytes()).expect("sent");
        let mut text = String::new();
        BufReader::new(&two).read_line(&mut text).expect("answered");
        assert!(text.contains("too long"), "{text}");
        echo.0.store(true, Ordering::Relaxed);
        drop(server);
        assert!(!path.exists());
    }
}

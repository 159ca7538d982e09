//! Talks to an `sg-vmm` over its control socket: one JSON object a line each way.
//!
//! What is used of it:
//!
//! | request | answer |
//! | --- | --- |
//! | `{"do":"start","mode":"scatter-gather","to":"ADDR:PORT","intermediaries":["ADDR:PORT"]}` | accepted, or why not |
//! | `{"do":"describe"}` | `"vm"`: its name, `"state"`: `empty here leaving left arriving`, `"memory_bytes"`, `"present_bytes"` |
//! | `{"do":"share","bytes_per_s":N,"for_ms":N}` (source) | `"leaving"`: how far it is, null where it does not leave |
//! | `{"do":"claim","claim":NAME,"intermediaries":["ADDR:PORT"]}` (destination) | accepted |
//! | `{"do":"limit","gather":"256mbit"}` (destination), `"scatter"` (source) | accepted |
//! | `{"do":"cancel"}` | accepted, or why not |
//! | `{"do":"progress"}` | `"sample"`: a [`libsg::report::Sample`], null what this end does not know |
//! | `{"do":"report"}` | `"source"`: [`libsg::report::SourceReport`] or null, `"destination"`: [`libsg::report::DestinationReport`] or null, `"guest"`: [`libsg::report::Guest`] |
//! | `{"do":"verify"}` | when the guest has verified every page: `"guest"` |
//! | `{"do":"quit"}` | accepted |
//!
//! The socket is there when the VM is filled and runs, or waits for one (`--incoming`). Events
//! ([`libsg::migrate::Event`]) are lines of JSON on standard output, each flushed when it happens; the source's
//! `evicted` and `failed` carry `"report"`: a `SourceReport`, for the source may be gone a moment later.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

/// One VMM's control socket. Connects when needed, so that a VMM that was stopped, or is gone, costs one timeout.
pub struct Control {
    path: PathBuf,
    connection: Option<BufReader<UnixStream>>,
    /// After a timeout the VMM is left alone for a while.
    quiet_until: Option<Instant>,
}

/// How long a VMM may take to answer what it knows.
const ANSWER: Duration = Duration::from_millis(500);
/// How long one that did not is left alone.
const QUIET: Duration = Duration::from_secs(2);

impl Control {
    /// For the socket at `path`.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), connection: None, quiet_until: None }
    }

    /// The answer to `{"do": what}`, which the VMM has at hand.
    ///
    /// # Errors
    /// As [`Self::request`]; for a while after that, at once.
    pub fn ask(&mut self, what: &str) -> Result<Value> {
        if self.quiet_until.is_some_and(|until| Instant::now() < until) {
            bail!("the VMM at {} did not answer", self.path.display());
        }
        let answer = self.request(&json!({ "do": what }), ANSWER);
        self.quiet_until = answer.is_err().then(|| Instant::now() + QUIET);
        answer
    }

    /// The answer to a request, which may take up to `limit`.
    ///
    /// # Errors
    /// No connection, no answer in time, or the VMM refused: its own words.
    pub fn request(&mut self, request: &Value, limit: Duration) -> Result<Value> {
        match self.exchange(request, limit) {
            Ok(answer) => match &answer["error"] {
                Value::Null => Ok(answer),
                error => {
                    let what = error["message"].as_str().map_or_else(|| error.to_string(), str::to_owned);
                    bail!("{}: {what}", request["do"].as_str().unwrap_or("request"))
                }
            },
            Err(error) => {
                // A late answer would be taken for the next one's.
                self.connection = None;
                Err(error).with_context(|| format!("the VMM at {} does not answer", self.path.display()))
            }
        }
    }

    fn exchange(&mut self, request: &Value, limit: Duration) -> Result<Value> {
        let connection = match &mut self.connection {
            Some(connection) => connection,
            none => none.insert(BufReader::new(UnixStream::connect(&self.path)?)),
        };
        connection.get_ref().set_read_timeout(Some(limit))?;
        connection.get_ref().set_write_timeout(Some(limit))?;
        let mut line = request.to_string();
        line.push('\n');
        connection.get_mut().write_all(line.as_bytes())?;
        line.clear();
        if connection.read_line(&mut line)? == 0 {
            return Err(std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "it hung up").into());
        }
        let answer: Value = serde_json::from_str(&line)?;
        // It would be taken for an answer to whatever is asked.
        ensure!(answer.get("QMP").is_none(), "this is the QMP of a QEMU, and no control socket");
        Ok(answer)
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use std::os::unix::net::UnixListener;

    #[test]
    fn answers_refusals_and_silence() {
        let directory = tempfile::tempdir().expect("creates");
        let path = directory.path().join("control");
        let listener = UnixListener::bind(&path).expect("binds");
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = BufReader::new(stream.expect("accepts"));
                let mut line = String::new();
                while stream.read_line(&mut line).expect("reads") > 0 {
                    let request: Value = serde_json::from_str(&line).expect("json");
                    match request["do"].as_str() {
                        Some("progress") => stream.get_mut().write_all(b"{\"percent\":5}\n").expect("writes"),
                        Some("cancel") => stream
                            .get_mut()
                            .write_all(b"{\"error\":{\"message\":\"too late\"}}\n")
                            .expect("writes"),
                        _ => {}
                    }
                    line.clear();
                }
            }
        });
        let mut control = Control::new(&path);
        assert_eq!(control.ask("progress").expect("answers")["percent"], 5);
        let refused = control.request(&json!({"do": "cancel"}), ANSWER).expect_err("refuses");
        assert_eq!(refused.to_string(), "cancel: too late");
        control.request(&json!({"do": "quit"}), Duration::from_millis(20)).expect_err("is silent");
        assert_eq!(control.ask("progress").expect("answers")["percent"], 5);
        assert!(Control::new(Path::new("/nonexistent")).ask("progress").is_err());

        let path = directory.path().join("qmp");
        let qemu = UnixListener::bind(&path).expect("binds");
        std::thread::spawn(move || {
            let (mut stream, _) = qemu.accept().expect("accepts");
            stream.write_all(b"{\"QMP\": {}}\n").expect("writes");
            let _ = BufReader::new(stream).read_line(&mut String::new());
        });
        let said = Control::new(&path).request(&json!({"do": "cancel"}), ANSWER).expect_err("is no answer");
        assert!(format!("{said:#}").contains("QMP of a QEMU"), "{said:#}");
    }
}

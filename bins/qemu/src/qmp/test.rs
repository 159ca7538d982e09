//! QMP beside somebody who plays a QEMU.

use super::*;
use std::os::unix::net::UnixListener;

const GREETING: &str =
    r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}, "capabilities": []}}"#;

/// Somebody at a socket who speaks so.
fn speaking(speak: impl FnOnce(BufReader<UnixStream>) + Send + 'static) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().expect("creates");
    let path = directory.path().join("qmp");
    let listener = UnixListener::bind(&path).expect("binds");
    std::thread::spawn(move || speak(BufReader::new(listener.accept().expect("accepts").0)));
    (directory, path)
}

/// Somebody at a socket who says these lines, one for each that comes; the first at once.
fn somebody(lines: &'static [&'static str]) -> (tempfile::TempDir, PathBuf) {
    speaking(move |mut stream| {
        for line in lines {
            let _ = stream.get_mut().write_all(line.as_bytes());
            let _ = stream.get_mut().write_all(b"\n");
            let _ = stream.read_line(&mut String::new());
        }
    })
}

/// A QEMU 7.2 at a socket that returns what is said to each command and its arguments.
pub(crate) fn answering(
    answer: impl Fn(&str, &Value) -> Value + Send + 'static,
) -> (tempfile::TempDir, PathBuf) {
    playing(move |command, asked, _| json!({ "return": answer(command, &asked["arguments"]) }))
}

/// One that says this to each command and all of what was asked, `null` nothing at all. It hears of the connection, on which the next
/// command may wait.
pub(crate) fn playing(
    mut answer: impl FnMut(&str, &Value, &UnixStream) -> Value + Send + 'static,
) -> (tempfile::TempDir, PathBuf) {
    speaking(move |mut stream| {
        let _ = writeln!(stream.get_mut(), "{GREETING}");
        let mut line = String::new();
        while stream.read_line(&mut line).is_ok_and(|bytes| bytes > 0) {
            let asked: Value = serde_json::from_str(&line).expect("JSON");
            line.clear();
            let command = asked["execute"].as_str().expect("a command");
            let mut said = answer(command, &asked, stream.get_ref());
            if !said.is_null() {
                said["id"] = asked["id"].clone();
                let _ = writeln!(stream.get_mut(), "{said}");
            }
        }
    })
}

/// Waits until somebody has said more than was read: who waits for an answer does not any more.
pub(crate) fn await_next(stream: &UnixStream) {
    let mut looked = [rustix::event::PollFd::new(stream, rustix::event::PollFlags::IN)];
    rustix::event::poll(&mut looked, None).expect("looked");
}

impl Qmp {
    /// Answers, and those of steps, are waited for no longer than this.
    pub(crate) const fn hurry(&mut self, answer: Duration, step: Duration) {
        self.patience = (answer, step);
    }
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

/// What comes when nobody waits for it any more is not the answer to what was asked since, be it a refusal, and be it that half
/// of it came in time.
#[test]
fn an_answer_that_comes_too_late_is_nobodys() {
    let (_directory, path) = playing(|command, asked, mut stream| {
        let said = match command {
            "stop" => json!({ "error": { "desc": "too late" }, "id": asked["id"] }),
            "query-status" => json!({ "return": { "status": "zu sp\u{e4}t" }, "id": asked["id"] }),
            _ => return json!({ "return": command }),
        };
        let line = format!("{said}\n");
        // In the middle of a letter.
        let half = line.find('\u{e4}').map_or(line.len() / 2, |at| at + 1);
        let _ = stream.write_all(&line.as_bytes()[..half]);
        await_next(stream);
        let _ = stream.write_all(&line.as_bytes()[half..]);
        Value::Null
    });
    let mut qmp = Qmp::connect(&path).expect("greets");
    for (slow, next) in [("stop", "query-name"), ("query-status", "query-block")] {
        qmp.hurry(Duration::from_millis(50), STEP);
        assert_eq!(qmp.execute(slow, &json!({})).expect_err("it is late").kind, ErrorKind::Timeout);
        qmp.hurry(STEP, STEP);
        assert_eq!(qmp.execute(next, &json!({})).expect("answers"), next);
    }
}

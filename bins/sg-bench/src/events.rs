//! What happens in a run: told by the processes, written down, then acted on, in this order.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::str::FromStr;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use crossbeam::channel::{Receiver, Sender, unbounded};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::{Value, json};

use crate::lab::{Node, net};

/// What `--kill`, `--stop`, `--continue`, `--cut` and `--mend` do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Harm {
    /// SIGKILL to the node's processes.
    Kill,
    /// SIGSTOP to the node's processes.
    Stop,
    /// SIGCONT to the node's processes.
    Continue,
    /// The node's link goes down.
    Cut,
    /// The node's link comes up again.
    Mend,
}

/// `NODE@EVENT[+MS]`: whom, at which event, how long after.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct When {
    /// Whom.
    pub node: Node,
    /// `started`, `scattered=25%`, `evicted`, …
    pub event: String,
    /// How long after it.
    pub after: Duration,
}

impl FromStr for When {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (node, event) =
            text.split_once('@').ok_or_else(|| anyhow!("{text:?}: write NODE@EVENT, or NODE@EVENT+MS"))?;
        let (event, after) = match event.split_once('+') {
            Some((event, ms)) => {
                let ms = ms.parse().map_err(|_| anyhow!("{ms:?} is not a number of milliseconds"))?;
                (event, Duration::from_millis(ms))
            }
            None => (event, Duration::ZERO),
        };
        check_event(event)?;
        Ok(Self { node: node.parse()?, event: event.to_owned(), after })
    }
}

fn check_event(event: &str) -> Result<()> {
    const PLAIN: [&str; 9] =
        ["started", "ready", "commit", "resumed", "evicted", "gathered", "dissolved", "parked", "claimed"];
    let percent =
        |prefix: &str| -> Option<u8> { event.strip_prefix(prefix)?.strip_suffix('%')?.parse().ok() };
    if event.strip_prefix("round=").is_some_and(|round| round.parse::<u16>().is_ok()) {
        return Ok(());
    }
    let stepped = percent("scattered=").or_else(|| percent("gathering="));
    match stepped {
        Some(percent) if percent <= 100 && percent % 5 == 0 => Ok(()),
        _ if PLAIN.contains(&event) => Ok(()),
        _ => bail!(
            "{event:?} is not an event: {}, round=N from 0 on, scattered=5% to 100%, gathering=5% to 100% in steps of 5",
            PLAIN.join(", ")
        ),
    }
}

/// What to do to whom when.
#[derive(Clone, Debug)]
pub struct Injection {
    /// What.
    pub harm: Harm,
    /// Whom and when.
    pub when: When,
}

/// Something that happened to one VM.
#[derive(Clone, Debug)]
pub struct Occurred {
    /// Which VM, from 0 on.
    pub vm: usize,
    /// Which end told.
    pub node: Node,
    /// `evicted`, `scattered=25%`, …
    pub event: String,
    /// By this process's clock.
    pub at: Instant,
    /// The whole line of the process that told it.
    pub line: Value,
}

#[derive(Clone)]
enum Target {
    /// By pidfd: a delayed signal must not hit who got the pid after it.
    Process(Arc<OwnedFd>),
    Namespace(String),
}

/// Takes events from all processes of a run.
pub struct Events {
    file: Option<Mutex<File>>,
    injections: Vec<Injection>,
    targets: Mutex<Vec<(Node, Target)>>,
    started: OnceLock<Instant>,
    sender: Sender<Occurred>,
}

impl Events {
    /// Writes to `path`, if any; the receiver gets each event after it was written and acted on.
    pub fn new(path: Option<&Path>, injections: Vec<Injection>) -> Result<(Arc<Self>, Receiver<Occurred>)> {
        let open = |path: &Path| {
            File::options()
                .create(true)
                .append(true)
                .open(path)
                .with_context(|| format!("cannot write {}", path.display()))
        };
        let file = path.map(open).transpose()?.map(Mutex::new);
        let (sender, receiver) = unbounded();
        let events = Self { file, injections, targets: Mutex::default(), started: OnceLock::new(), sender };
        Ok((Arc::new(events), receiver))
    }

    /// A process that `--kill` and `--stop` may be meant for.
    pub fn add_process(&self, node: Node, pid: Pid) -> Result<()> {
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).context("pidfd_open (Linux 5.3)")?;
        self.add(node, Target::Process(Arc::new(pidfd)));
        Ok(())
    }

    /// A link that `--cut` and `--mend` may be meant for.
    pub fn add_link(&self, node: Node, namespace: String) {
        self.add(node, Target::Namespace(namespace));
    }

    fn add(&self, node: Node, target: Target) {
        if let Ok(mut targets) = self.targets.lock() {
            targets.push((node, target));
        }
    }

    /// A line from a VMM. Lines that are no event are ignored.
    pub fn line(&self, vm: usize, node: Node, text: &str) {
        let at = Instant::now();
        let Ok(line) = serde_json::from_str::<Value>(text) else { return };
        let Some(name) = line["event"].as_str() else { return };
        let event = match (line["percent"].as_u64(), line["round"].as_u64()) {
            (Some(percent), _) => format!("{name}={percent}%"),
            (None, Some(round)) => format!("{name}={round}"),
            (None, None) => name.to_owned(),
        };
        let since = at.saturating_duration_since(*self.started.get_or_init(|| at));
        self.write(&json!({
            "t_s": since.as_secs_f64(), "event": event, "node": node.to_string(), "vm": vm,
            "message": line["message"],
        }));
        for injection in self.injections.iter().filter(|injection| injection.when.event == event) {
            self.act_after(injection.clone());
        }
        // The run may be over and nobody listening.
        let _ = self.sender.send(Occurred { vm, node, event, at, line });
    }

    fn write(&self, line: &Value) {
        if let Some(file) = &self.file
            && let Ok(mut file) = file.lock()
            && let Err(error) = writeln!(file, "{line}").and_then(|()| file.flush())
        {
            tracing::warn!("cannot write the event: {error}");
        }
    }

    fn act_after(&self, injection: Injection) {
        let Ok(targets) = self.targets.lock() else { return };
        let hit: Vec<Target> =
            targets.iter().filter(|(node, _)| *node == injection.when.node).map(|(_, t)| t.clone()).collect();
        drop(targets);
        let act = move || {
            for error in hit.iter().filter_map(|target| harm(injection.harm, target).err()) {
                tracing::warn!("{error:#}");
            }
        };
        if injection.when.after.is_zero() {
            act();
        } else {
            // Not joined: it ends by itself, and a run that is over earlier has nobody left to harm.
            let after = injection.when.after;
            std::thread::spawn(move || {
                std::thread::sleep(after);
                act();
            });
        }
    }
}

fn harm(harm: Harm, target: &Target) -> Result<()> {
    let signal = |process: &OwnedFd, signal| match pidfd_send_signal(process, signal) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(errno) => Err(anyhow::Error::from(errno)),
    };
    match (harm, target) {
        (Harm::Kill, Target::Process(process)) => signal(process, Signal::KILL),
        (Harm::Stop, Target::Process(process)) => signal(process, Signal::STOP),
        (Harm::Continue, Target::Process(process)) => signal(process, Signal::CONT),
        (Harm::Cut, Target::Namespace(namespace)) => net::cut(namespace),
        (Harm::Mend, Target::Namespace(namespace)) => net::mend(namespace),
        (Harm::Kill | Harm::Stop | Harm::Continue, Target::Namespace(_))
        | (Harm::Cut | Harm::Mend, Target::Process(_)) => Ok(()),
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn when_is_node_event_and_delay() {
        let when: When = "i2@scattered=25%+100".parse().expect("parses");
        assert_eq!(
            when,
            When {
                node: Node::Intermediary(2),
                event: "scattered=25%".into(),
                after: Duration::from_millis(100)
            }
        );
        assert_eq!("i1@round=0+5".parse::<When>().expect("parses").event, "round=0");
        assert_eq!("source@evicted".parse::<When>().expect("parses").after, Duration::ZERO);
        for wrong in [
            "",
            "source",
            "source@",
            "source@now",
            "x@evicted",
            "source@evicted+x",
            "source@scattered=7%",
            "i1@round=x",
        ] {
            assert!(wrong.parse::<When>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_event_is_written_then_acted_on_then_told() {
        let directory = tempfile::tempdir().expect("creates");
        let path = directory.path().join("events");
        let mut victim = std::process::Command::new("sleep").arg("1000").spawn().expect("spawns");
        let injection = Injection { harm: Harm::Kill, when: "source@evicted".parse().expect("parses") };
        let (events, receiver) = Events::new(Some(&path), vec![injection]).expect("opens");
        events.add_process(Node::Source, Pid::from_child(&victim)).expect("alive");
        events.line(0, Node::Source, "not json");
        events.line(0, Node::Source, r#"{"event":"scattered","percent":25}"#);
        assert!(victim.try_wait().expect("waits").is_none());
        events.line(0, Node::Source, r#"{"event":"evicted"}"#);
        assert!(!victim.wait().expect("waits").success());
        let told: Vec<String> = receiver.try_iter().map(|occurred| occurred.event).collect();
        assert_eq!(told, ["scattered=25%", "evicted"]);
        let written = std::fs::read_to_string(&path).expect("reads");
        let events: Vec<Value> =
            written.lines().map(|line| serde_json::from_str(line).expect("json")).collect();
        assert_eq!(events[1]["event"], "evicted");
        assert_eq!(events[1]["node"], "source");
    }
}

//! `sg-vmm`, by its control socket.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use libsg::pace::{LinkReading, Told};
use libsg::report::{DestinationReport, Sample, SourceReport};
use libsg::units::Rate;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::control::Control;
use crate::vmm::{Backlog, Described, Leaving, Start, Vmm, Wanted};

/// How long it may take to answer what it has at hand.
const ANSWER: Duration = Duration::from_millis(500);

/// How long it may take to begin something, or to look through its memory, on a busy host.
const ACTION: Duration = Duration::from_secs(20);

/// One `sg-vmm`.
pub struct ControlSocket(Control);

impl ControlSocket {
    /// By its socket; connected when it is needed.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self(Control::new(path))
    }

    fn action(&mut self, name: &str, arguments: &impl serde::Serialize) -> Result<Value> {
        let mut request = serde_json::to_value(arguments)?;
        request["do"] = name.into();
        self.0.request(&request, ACTION)
    }
}

/// How it says how far a VM is that leaves.
#[derive(Deserialize)]
struct Answer {
    paced_bytes: u64,
    urgent_bytes: u64,
    queue_delay_us: Option<u64>,
    base_rtt_us: u64,
    backlogged: bool,
    left_bytes: u64,
    sent_bytes: u64,
    safe_pages: u64,
    total_pages: u64,
    committed: bool,
    evicted: bool,
    over: bool,
}

impl From<Answer> for Leaving {
    fn from(said: Answer) -> Self {
        let paced = LinkReading {
            delivered: said.paced_bytes,
            queue_delay: said.queue_delay_us.map(Duration::from_micros),
            base_rtt: Duration::from_micros(said.base_rtt_us),
            backlogged: said.backlogged,
        };
        Self {
            backlog: Backlog {
                told: Told { paced, urgent_bytes: said.urgent_bytes },
                left_bytes: said.left_bytes,
            },
            sent_bytes: said.sent_bytes,
            safe_pages: said.safe_pages,
            total_pages: said.total_pages,
            committed: said.committed,
            evicted: said.evicted,
            over: said.over,
        }
    }
}

impl Vmm for ControlSocket {
    fn describe(&mut self) -> Result<Described> {
        part(self.action("describe", &json!({}))?)
    }

    fn start(&mut self, how: &Start) -> Result<()> {
        self.action("start", how).map(drop)
    }

    fn share(&mut self, bytes_per_s: Option<u64>, valid: Duration) -> Result<Option<Leaving>> {
        let request = json!({"do": "share", "bytes_per_s": bytes_per_s, "for_ms": valid.as_millis() as u64});
        let mut answer = self.0.request(&request, ANSWER)?;
        let said: Option<Answer> = part(answer["leaving"].take())?;
        Ok(said.map(Leaving::from))
    }

    fn claim(&mut self, wanted: &Wanted) -> Result<()> {
        self.action("claim", wanted).map(drop)
    }

    fn progress(&mut self) -> Result<Sample> {
        let mut answer = self.0.request(&json!({"do": "progress"}), ANSWER)?;
        part(answer["sample"].take())
    }

    fn report(&mut self) -> Result<(Option<SourceReport>, Option<DestinationReport>)> {
        let mut answer = self.action("report", &json!({}))?;
        Ok((part(answer["source"].take())?, part(answer["destination"].take())?))
    }

    fn limit(&mut self, scatter: Option<Rate>, gather: Option<Rate>) -> Result<()> {
        let mut request = json!({});
        for (name, rate) in [("scatter", scatter), ("gather", gather)] {
            if let Some(rate) = rate {
                request[name] = rate.to_string().into();
            }
        }
        self.action("limit", &request).map(drop)
    }

    fn cancel(&mut self) -> Result<()> {
        self.action("cancel", &json!({})).map(drop)
    }
}

fn part<T: DeserializeOwned>(value: Value) -> Result<T> {
    serde_json::from_value(value)
        .context("the VMM does not say what it is to say: is it of the same version?")
}

//! What a destination says while the source's sinks run, before COMMIT, and how its connections end.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::error::{Error, Result};
use crate::host;
use crate::migrate::handover::{Lead, refused};
use crate::scatter::session::Listener;
use crate::wire::message::Talk;

/// A destination whose other connections end has so long to say why.
const LAST_WORD: Duration = Duration::from_millis(200);

/// Hears the destination before COMMIT.
pub struct Ears<'a> {
    lead: &'a Lead<'a>,
    expects_ready: bool,
    said: Mutex<Option<Error>>,
    /// When one of its other connections ended, and how.
    broke: Mutex<Option<(Instant, Error)>>,
    ready: AtomicBool,
}

impl<'a> Ears<'a> {
    /// Of a destination that has said nothing yet.
    pub fn new(lead: &'a Lead<'a>, expects_ready: bool) -> Self {
        let (said, broke) = (Mutex::new(None), Mutex::new(None));
        Self { lead, expects_ready, said, broke, ready: AtomicBool::new(false) }
    }

    /// Whether it is ready.
    pub fn check(&self) -> Result<bool> {
        if let Some(error) = self.said.lock().take() {
            return Err(error);
        }
        match self.broke.lock().take_if(|(at, _)| host::elapsed(*at) >= LAST_WORD) {
            Some((_, error)) => Err(error),
            None => Ok(self.ready.load(Ordering::Acquire)),
        }
    }

    /// How the conversation ended, all things heard: what the destination said says more than how its connections
    /// ended, which it closes right behind that.
    pub fn why(&self, ended: Result<()>) -> Result<()> {
        match (ended, self.said.lock().take()) {
            (Err(_), Some(said)) => Err(said),
            (Err(error), None) => Err(error),
            (Ok(()), _) => self.broke.lock().take().map_or(Ok(()), |(_, error)| Err(error)),
        }
    }

    /// How one of its connections ended.
    pub fn note(&self, ended: Result<()>) {
        if let Err(error) = ended {
            self.broke.lock().get_or_insert((host::now(), error));
            self.lead.scatter.control_waker().wake();
        }
    }
}

impl Listener for Ears<'_> {
    fn heard(&self, talk: Talk) {
        match talk {
            Talk::Progress { .. } => self.lead.control.heard(talk),
            Talk::Ready if self.expects_ready => self.ready.store(true, Ordering::Release),
            talk => {
                self.said.lock().get_or_insert(refused(talk, "while the VM is sent in rounds"));
            }
        }
    }

    fn has_gathered(&self) -> bool {
        false
    }
}

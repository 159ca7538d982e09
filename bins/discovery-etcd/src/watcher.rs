//! Hears who is there all the time: lists once, then watches from there on, and lists again where etcd has forgotten
//! what happened in between.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use libsg::host::wall_ms;
use libsg::ids::random_bytes;
use libsg::transport::PoolSecret;
use libsg::wire::announcement::Announcement;
use libsg::{Error, ErrorKind, Result};
use parking_lot::Mutex;

use crate::backoff::Backoff;
use crate::client::{ANSWER, Client, Trouble};
use crate::message::{self, Listed, Watched};
use crate::place::Place;
use crate::transport::Cut;
use crate::view::{Next, View};
use crate::{LEASE, PERIOD, key};

/// The shortest time between two watches, whatever ended the first.
const PAUSE: Duration = Duration::from_millis(100);

/// Watches a pool until it is dropped. While etcd cannot be reached, who was heard stays for its period.
#[derive(Debug)]
pub struct Watcher {
    view: Arc<Mutex<View>>,
    cut: Cut,
    thread: Option<JoinHandle<()>>,
}

impl Watcher {
    /// Watches, from now on, in a thread of its own (`sg-watch`).
    ///
    /// # Errors
    /// [`ErrorKind::System`] when the host has no room for a thread.
    pub fn start(place: &Place, secret: &PoolSecret) -> Result<Self> {
        let view = View::new(place.prefix(), secret.announcement_key());
        let (view, cut) = (Arc::new(Mutex::new(view)), Cut::new()?);
        let ear = Ear {
            asks: Client::new(place, ANSWER, cut.clone()),
            // Somebody is heard each period; an etcd that says nothing for so long is not there.
            watches: Client::new(place, LEASE, cut.clone()),
            range: key::range(place.prefix()),
            view: Arc::clone(&view),
            cut: cut.clone(),
        };
        let thread = std::thread::Builder::new().name("sg-watch".into()).spawn(move || ear.run())?;
        Ok(Self { view, cut, thread: Some(thread) })
    }

    /// Who is there, as far as was heard.
    #[must_use]
    pub fn hosts(&self) -> Vec<Announcement> {
        self.view.lock().hosts(Instant::now())
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.cut.cut();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the watching thread panicked");
        }
    }
}

/// Reads a whole listing into a view.
///
/// # Errors
/// Nobody answers, or time is up.
pub fn list(
    client: &mut Client,
    (begin, end): &(String, String),
    view: &Mutex<View>,
    deadline: Instant,
) -> Result<(), Trouble> {
    view.lock().begin_listing();
    let mut from = (0, begin.clone());
    loop {
        let piece: Listed = client.ask("kv/range", &message::list(&from.1, end, from.0))?;
        match view.lock().listed(&piece, Instant::now(), wall_ms()) {
            Some(next) => from = next,
            None => return Ok(()),
        }
        if Instant::now() >= deadline {
            let what = "etcd's listing of the pool takes too long";
            return Err(Trouble::Lost(Error::new(ErrorKind::Timeout, what)));
        }
    }
}

struct Ear {
    asks: Client,
    watches: Client,
    range: (String, String),
    view: Arc<Mutex<View>>,
    cut: Cut,
}

impl Ear {
    fn run(mut self) {
        let mut backoff = Backoff::default();
        loop {
            let pause = match self.hear(&mut backoff) {
                Ok(()) => PAUSE,
                Err(trouble) => {
                    let random = random_bytes().map_or(0, u64::from_le_bytes);
                    let (pause, is_news) = backoff.failed(random);
                    if is_news && self.cut.wait(Duration::ZERO) {
                        let error = Error::from(trouble).chain();
                        tracing::warn!(error, "the pool is not heard; who is known stays for its period");
                    }
                    pause
                }
            };
            if !self.cut.wait(pause) {
                return;
            }
        }
    }

    /// Lists where that is needed, and watches until something ends it.
    fn hear(&mut self, backoff: &mut Backoff) -> Result<(), Trouble> {
        let next = self.view.lock().next();
        let Some(next) = next else {
            list(&mut self.asks, &self.range, &self.view, Instant::now() + LEASE)?;
            return Ok(());
        };
        let (begin, end) = &self.range;
        let mut lines = self.watches.stream("watch", &message::watch(begin, end, next))?;
        let mut forgotten = Instant::now();
        while let Some(message) = lines.next::<Watched>()? {
            if backoff.worked() {
                tracing::info!("the pool is heard again");
            }
            let (now, wall) = (Instant::now(), wall_ms());
            let mut view = self.view.lock();
            if view.watched(&message, now, wall) == Next::List {
                break;
            }
            if now.saturating_duration_since(forgotten) >= PERIOD {
                view.forget(now, wall);
                forgotten = now;
            }
        }
        Ok(())
    }
}

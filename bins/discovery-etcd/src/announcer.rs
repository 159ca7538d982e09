//! Announces a host: its word under its own key, on a lease that ends with it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use libsg::discovery::book::jittered;
use libsg::discovery::{Announces, Describe};
use libsg::host::wall_ms;
use libsg::ids::random_bytes;
use libsg::transport::{PoolSecret, Waker, wait};
use libsg::wire::announcement::Announcement;
use libsg::wire::datagram::{AnnouncementKey, Datagram, Said};
use libsg::{Error, ErrorKind, Result};
use std::os::fd::AsFd as _;

use crate::backoff::Backoff;
use crate::client::{ANSWER, Client, Trouble};
use crate::message::{self, Done, Leased, NOT_FOUND};
use crate::place::Place;
use crate::transport::Cut;
use crate::{LEASE, PERIOD, key};

/// How often it is looked whether what a host has free has changed by much.
const LOOK: Duration = Duration::from_secs(1);

/// What of a host's memory or link is much: an eighth.
const MUCH: u64 = 8;

/// Announces a host until it is dropped; then its key is deleted at once.
///
/// Where etcd cannot be reached, that is logged once, and tried on. When the process dies, the lease runs out.
#[derive(Debug)]
pub struct Announcer {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    over: AtomicBool,
    /// Something has changed that shall not wait.
    now: AtomicBool,
    waker: Waker,
}

impl Announcer {
    /// Announces what `describe` says, from now on, in a thread of its own (`sg-announce`).
    ///
    /// # Errors
    /// [`ErrorKind::Input`] for a host that cannot be announced (a zone or name that is too long); [`ErrorKind::System`]
    /// when the host has no room for a thread.
    pub fn start(place: &Place, secret: &PoolSecret, mut describe: Describe) -> Result<Self> {
        let host = describe();
        let mut teller = Teller {
            client: Client::new(place, ANSWER, Cut::new()?),
            name: key::of(place.prefix(), &host.node),
            key: secret.announcement_key(),
            counter: 0,
            lease: None,
        };
        // What is wrong with it is an error of the one who starts it.
        teller
            .seal(&host)
            .map_err(|cause| Error::new(ErrorKind::Input, "the host cannot be announced").because(cause))?;
        let (over, now) = (AtomicBool::new(false), AtomicBool::new(false));
        let shared = Arc::new(Shared { over, now, waker: Waker::new()? });
        let ours = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("sg-announce".into());
        let thread = thread.spawn(move || run(&ours, &mut teller, &mut describe))?;
        Ok(Self { shared, thread: Some(thread) })
    }
}

impl Announces for Announcer {
    fn announce(&self) {
        self.shared.now.store(true, Ordering::Release);
        self.shared.waker.wake();
    }
}

impl Drop for Announcer {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::Release);
        self.shared.waker.wake();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the announcing thread panicked");
        }
    }
}

fn run(shared: &Shared, teller: &mut Teller, describe: &mut Describe) {
    let mut backoff = Backoff::default();
    // What was said last, and when it has to be said again.
    let mut said: Option<Announcement> = None;
    let mut due = Instant::now();
    while !shared.over.load(Ordering::Acquire) {
        let asked = shared.now.swap(false, Ordering::AcqRel);
        let (now, host) = (Instant::now(), describe());
        let is_news = said.as_ref().is_some_and(|said| is_news(said, &host));
        if asked || is_news || now >= due {
            match teller.tell(&host) {
                Ok(()) => {
                    if backoff.worked() {
                        tracing::info!("etcd keeps this host's announcements again");
                    }
                    due = now + jittered(PERIOD, random());
                    said = Some(host);
                }
                Err(trouble) => {
                    let (pause, is_news) = backoff.failed(random());
                    if is_news {
                        let error = Error::from(trouble).chain();
                        tracing::warn!(error, "this host is not announced; it is tried on");
                    }
                    // What was said is old news by then.
                    (due, said) = (Instant::now() + pause, None);
                }
            }
        }
        let left = due.saturating_duration_since(Instant::now()).min(LOOK);
        if let Err(error) = wait(&[(Some(shared.waker.as_fd()), false)], left) {
            tracing::error!(error = error.chain(), "announcements end");
            break;
        }
        shared.waker.drain();
    }
    teller.leave();
}

fn random() -> u64 {
    // Without random bytes hosts keep step, which costs bursts, not correctness.
    random_bytes().map_or(0, u64::from_le_bytes)
}

/// Whether a host is so different that others should know before its period is over.
fn is_news(said: &Announcement, now: &Announcement) -> bool {
    let much = |was: u64, is: u64, whole: u64| was.abs_diff(is) > whole / MUCH;
    let (memory, link) = (&now.memory, &now.link);
    said.duty != now.duty
        || much(said.memory.used_bytes, memory.used_bytes, memory.limit_bytes)
        || much(said.memory.available_bytes, memory.available_bytes, memory.host_bytes)
        || much(said.link.free_in_bytes_per_s, link.free_in_bytes_per_s, link.bytes_per_s)
        || much(said.link.free_out_bytes_per_s, link.free_out_bytes_per_s, link.bytes_per_s)
}

/// Tells etcd.
struct Teller {
    client: Client,
    /// The host's own key in etcd.
    name: String,
    key: AnnouncementKey,
    counter: u64,
    lease: Option<i64>,
}

impl Teller {
    fn seal(&mut self, host: &Announcement) -> Result<Vec<u8>> {
        self.counter += 1;
        let said = Said::Here { period_ms: PERIOD.as_millis() as u32, host: host.clone() };
        Ok(Datagram { counter: self.counter, sent_ms: wall_ms(), said }.encode(&self.key)?)
    }

    /// Keeps the lease, and puts what the host is.
    fn tell(&mut self, host: &Announcement) -> Result<(), Trouble> {
        let kept = match self.lease {
            Some(lease) => self.keep(lease)?.then_some(lease),
            None => None,
        };
        let lease = match kept {
            Some(lease) => lease,
            None => self.grant()?,
        };
        match self.put(host, lease) {
            // It ran out between the two.
            Err(Trouble::No(NOT_FOUND, _)) => {
                let lease = self.grant()?;
                self.put(host, lease)
            }
            done => done,
        }
    }

    fn grant(&mut self) -> Result<i64, Trouble> {
        let leased: Leased = self.client.ask("lease/grant", &message::grant(LEASE.as_secs()))?;
        self.lease = Some(leased.id);
        Ok(leased.id)
    }

    /// Whether the lease is still there.
    fn keep(&mut self, lease: i64) -> Result<bool, Trouble> {
        let kept: Leased = self.client.ask_stream("lease/keepalive", &message::lease(lease))?;
        Ok(kept.ttl > 0)
    }

    fn put(&mut self, host: &Announcement, lease: i64) -> Result<(), Trouble> {
        let value = self.seal(host).map_err(Trouble::Lost)?;
        let _: Done = self.client.ask("kv/put", &message::put(&self.name, &value, lease))?;
        Ok(())
    }

    /// With the lease goes the key.
    fn leave(&mut self) {
        let Some(lease) = self.lease.take() else { return };
        let asked: Result<Done, Trouble> = self.client.ask("lease/revoke", &message::lease(lease));
        if let Err(trouble) = asked {
            let error = Error::from(trouble).chain();
            let seconds = LEASE.as_secs();
            tracing::warn!(
                error,
                "etcd was not told that this host leaves: it seems there for {seconds} s more"
            );
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::view::test::host;

    #[test]
    fn what_changed_by_much_is_news() {
        let said = host(1);
        assert!(!is_news(&said, &said));
        let changed = |change: fn(&mut Announcement)| {
            let mut now = host(1);
            change(&mut now);
            is_news(&said, &now)
        };
        assert!(changed(|now| now.duty = libsg::wire::announcement::Duty::Leaves));
        assert!(!changed(|now| now.memory.used_bytes += now.memory.limit_bytes / 8));
        assert!(changed(|now| now.memory.used_bytes += now.memory.limit_bytes / 8 + 1));
        assert!(changed(|now| now.memory.available_bytes = 0));
        assert!(changed(|now| now.link.free_in_bytes_per_s = 0));
        assert!(changed(|now| now.link.free_out_bytes_per_s = 0));
        assert!(!changed(|now| now.connections_free = 0));
    }
}

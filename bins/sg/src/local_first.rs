//! `sg serve --local-first`: the host's own traffic goes before pages of other hosts' VMs.

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use libsg::discovery::meter::Interface;
use libsg::pace::{LocalFirst, Passed};
use libsg::server::{Config, ServerHandle};
use libsg::wire::link_use::{LinkUse, LocalTraffic};

use crate::cli::{ServeArgs, WrongArguments};

/// Time between two looks. In less, what a kernel counts in bursts looks like traffic that comes and goes.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// The interface that is looked at, and what it carries.
pub struct Setup {
    interface: Interface,
    link_bytes_per_s: u64,
    limits_bytes_per_s: (u64, u64),
}

impl Setup {
    /// Nothing where nothing is to be looked at.
    pub fn of(args: &ServeArgs, config: &Config) -> Result<Option<Self>> {
        let Some(name) = &args.local_first else { return Ok(None) };
        let wrong = |what: String| WrongArguments(format!("--local-first: {what}"));
        let interface =
            Interface::named(name).ok_or_else(|| wrong(format!("there is no interface {name}")))?;
        let said = args.link_bytes_per_s();
        let link_bytes_per_s = said.or_else(|| interface.bytes_per_s()).ok_or_else(|| {
            wrong(format!(
                "{name} does not say what it carries: say it, --link 10gbit, or what its switch allows"
            ))
        })?;
        let limits_bytes_per_s = (config.limit_in_bytes_per_s, config.limit_out_bytes_per_s);
        Ok(Some(Self { interface, link_bytes_per_s, limits_bytes_per_s }))
    }

    /// Looks from now on, until the watch is dropped.
    pub fn start(self, server: &Arc<ServerHandle>) -> Result<Watch> {
        let (stop, stopped) = mpsc::channel();
        let mut look = Look::new(self, Arc::clone(server));
        let body = move || {
            while stopped.recv_timeout(LOOK_EVERY) == Err(RecvTimeoutError::Timeout) {
                look.look();
            }
        };
        let thread = std::thread::Builder::new().name("sg-local-first".into()).spawn(body);
        Ok(Watch { stop: Some(stop), thread: Some(thread.context("no thread to look at the link with")?) })
    }
}

/// Dropped, nobody looks any more.
pub struct Watch {
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop = None;
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that looks at the link panicked");
        }
    }
}

/// What counters said: the interface's, and the server's own.
#[derive(Clone, Copy, Default)]
struct Counted {
    all: (u64, u64),
    own: (u64, u64),
}

struct Look {
    interface: Interface,
    server: Arc<ServerHandle>,
    incoming: LocalFirst,
    outgoing: LocalFirst,
    last: Option<(Instant, Counted)>,
    /// It was said that there is nothing to be seen.
    blind: bool,
}

impl Look {
    fn new(setup: Setup, server: Arc<ServerHandle>) -> Self {
        let (limit_in, limit_out) = setup.limits_bytes_per_s;
        Self {
            interface: setup.interface,
            server,
            incoming: LocalFirst::new(setup.link_bytes_per_s, limit_in),
            outgoing: LocalFirst::new(setup.link_bytes_per_s, limit_out),
            last: None,
            blind: false,
        }
    }

    fn look(&mut self) {
        let Some(all) = self.interface.traffic() else {
            // Limits stay as they are.
            if !std::mem::replace(&mut self.blind, true) {
                tracing::warn!("the interface is gone: what the host itself sends and receives is not seen");
            }
            self.last = None;
            return;
        };
        self.blind = false;
        let counted = Counted { all, own: self.server.moved_bytes() };
        let now = Instant::now();
        if let Some((then, before)) = self.last {
            let time = now.saturating_duration_since(then);
            let (incoming, outgoing) = passed(before, counted);
            self.incoming.passed(time, incoming);
            self.outgoing.passed(time, outgoing);
            self.server.set_link_use(LinkUse {
                limit_in_bytes_per_s: self.incoming.limit_bytes_per_s(),
                limit_out_bytes_per_s: self.outgoing.limit_bytes_per_s(),
                local: Some(LocalTraffic {
                    in_bytes_per_s: self.incoming.local_bytes_per_s(),
                    out_bytes_per_s: self.outgoing.local_bytes_per_s(),
                }),
            });
        }
        self.last = Some((now, counted));
    }
}

/// What passed in between, in either direction.
fn passed(before: Counted, after: Counted) -> (Passed, Passed) {
    let between = |(after_in, after_out): (u64, u64), (before_in, before_out): (u64, u64)| {
        (after_in.saturating_sub(before_in), after_out.saturating_sub(before_out))
    };
    let (all, own) = (between(after.all, before.all), between(after.own, before.own));
    (
        Passed { all_bytes: all.0, transit_bytes: own.0, back_bytes: own.1 },
        Passed { all_bytes: all.1, transit_bytes: own.1, back_bytes: own.0 },
    )
}

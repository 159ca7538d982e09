//! A parked volume that somebody wants: finds it, asks for it, and knows what may be done with it.
//!
//! Everything here waits for intermediaries, each for a bounded time, and happens on the conductor's thread before
//! there is a VM that could need it; [`Claimant::run`] and [`Claimant::renew`] are asked for in between.

mod find;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use self::find::{describe, describe_all, newest, search};
use crate::error::{Error, ErrorKind, Result};
use crate::host;
use crate::ids::{Epoch, NodeId, VolumeId, random_bytes};
use crate::limits::CLAIM_LEASE;
use crate::page::PageRange;
use crate::vmd::link::ask;
use crate::vmd::{
    Arbiter, Class, Connector, Engines, KeeperArbiter, Reply, Request, Role, VmdClient, is_away, verdict,
    visit_all,
};
use crate::wire::IndexEntry;
use crate::wire::final_set::{self, Blobs};
use crate::wire::message::{Member, VmdRequest, VolumeInfo, VolumeState};
use crate::wire::parking::{Claim, Verdict};

/// How long each intermediary has for an answer.
const ANSWER_MAX: Duration = Duration::from_secs(2);

/// How long it has to give the VM's state, which may be 64 MiB.
const STATE_MAX: Duration = Duration::from_secs(60);

/// A claim that is at work is renewed this often.
const RENEW_EVERY: Duration = Duration::from_secs(3);

/// A keeper that cannot be told that the VM runs is told again after so long.
const RUN_AGAIN: Duration = Duration::from_millis(500);

/// Claims that were over before this one came, and that nobody but the arbiter was told of.
const EPOCHS_MAX: usize = 4;

/// Lists of members that are followed, where each names more than the one before.
const LISTS_MAX: usize = 4;

const _: () = assert!(RENEW_EVERY.as_millis() * 2 < CLAIM_LEASE.as_millis());

/// Which parked volume is wanted, and how.
#[derive(Clone)]
pub struct ClaimOptions {
    /// The name under which it was parked, or its id as `sg ls` shows it.
    pub name: String,
    /// Intermediaries to ask for it; any one that knows it is enough.
    pub intermediaries: Vec<SocketAddr>,
    /// Take it from a host that has claimed it and does not run it yet; without the keeper, when that cannot be reached;
    /// and with pages missing. By an operator who knows that the VM runs nowhere.
    pub force: bool,
    /// Finds the engine that grants claims, where the volume names one; else its keeper does.
    pub engines: Option<Engines>,
}

/// Who claims a volume.
pub(super) struct Claimant {
    pub claim: Claim,
    pub parked: VolumeInfo,
    arbiter: Arc<dyn Arbiter>,
    connector: Arc<dyn Connector>,
    /// When the claim was last granted.
    renewed_at: Instant,
    /// When the arbiter was last asked to write down that the VM runs. From the first time on it may have done so.
    pub asked_to_run: Option<Instant>,
    /// The operator was told that it does not answer.
    told: bool,
}

impl Claimant {
    /// Finds the volume, which may be claimed as far as is known.
    ///
    /// # Errors
    /// [`ErrorKind::Volume`] when there is none of the name, more than one, or it runs already;
    /// [`ErrorKind::Unreachable`] when none of those who answer knows it and some did not.
    pub fn find(connector: Arc<dyn Connector>, called: &str, options: &ClaimOptions) -> Result<Self> {
        let vmd = VmdClient::new(Arc::clone(&connector), ANSWER_MAX);
        let volume = search(&vmd, options)?;
        let mut all = describe(&connector, volume, &options.intermediaries);
        let mut parked = newest(&all).ok_or_else(|| none(&options.name))?;
        // Those who were not named may know more: of others as well, which came where one left.
        for _ in 0..LISTS_MAX {
            all.extend(describe_all(&connector, &parked));
            let known = parked.members.len();
            parked = newest(&all).unwrap_or(parked);
            if parked.members.len() == known {
                break;
            }
        }
        if let Some(info) = all.iter().find(|info| info.state == VolumeState::Running) {
            let by = info.owner.as_ref().map(ToString::to_string).unwrap_or_default();
            return Err(runs(&options.name, &by));
        }
        let epoch = all.iter().map(|info| info.epoch).max().unwrap_or(Epoch(0)).max(parked.epoch);
        let node = NodeId { name: called.into(), incarnation: u64::from_le_bytes(random_bytes()?) };
        let claim = Claim { epoch: Epoch(epoch.0.saturating_add(1)), by: node, force: options.force };
        let arbiter = arbiter(&connector, &parked, options)?;
        let renewed_at = host::now();
        Ok(Self { claim, parked, arbiter, connector, renewed_at, asked_to_run: None, told: false })
    }

    /// What the volume is called.
    pub fn name(&self) -> &str {
        self.parked.parking.as_ref().map_or("", |parking| &parking.name)
    }

    fn of(&self) -> (VolumeId, Epoch) {
        (self.parked.volume, self.claim.epoch)
    }

    /// Asks the arbiter for the first time.
    ///
    /// # Errors
    /// As [`Self::ask`].
    pub fn begin(&mut self) -> Result<()> {
        for _ in 0..EPOCHS_MAX {
            let verdict = match self.arbiter.claim(&self.parked, &self.claim) {
                Err(error) if self.claim.force && is_away(&error) && self.is_by_engine() => {
                    tracing::warn!(error = error.chain(), "the arbiter cannot be asked: taken by force");
                    self.arbiter = by_keeper(&self.connector);
                    continue;
                }
                asked => asked?,
            };
            self.renewed_at = host::now();
            match verdict {
                // Its time is over, and it told nobody but the arbiter.
                Verdict::Newer(epoch) => self.claim.epoch = Epoch(epoch.0.saturating_add(1)),
                verdict => return self.granted(verdict),
            }
        }
        self.ask()
    }

    fn is_by_engine(&self) -> bool {
        self.parked.parking.as_ref().is_some_and(|parking| parking.arbiter.is_some())
    }

    /// Asks the arbiter.
    ///
    /// # Errors
    /// [`ErrorKind::Volume`] or [`ErrorKind::Fenced`] when it is somebody else's, the arbiter's own.
    fn ask(&mut self) -> Result<()> {
        let verdict = self.arbiter.claim(&self.parked, &self.claim)?;
        self.renewed_at = host::now();
        self.granted(verdict)
    }

    fn granted(&self, verdict: Verdict) -> Result<()> {
        let name = self.name();
        match verdict {
            Verdict::Granted => Ok(()),
            Verdict::Claimed { by, for_ms } => {
                let message = format!(
                    "the parked VM {name:?} was claimed by {by}, which has {} s left to run it: claim it again then, or \
                     with --force if you know that it does not",
                    for_ms.div_ceil(1000)
                );
                Err(Error::new(ErrorKind::Volume, message))
            }
            Verdict::Runs { by } => Err(runs(name, &by.to_string())),
            Verdict::Newer(epoch) => {
                let message = format!(
                    "another host has just claimed the parked VM {name:?} (epoch {}): `sg ls` shows which",
                    epoch.0
                );
                Err(Error::new(ErrorKind::Fenced, message))
            }
            Verdict::Elsewhere => {
                let message = format!("who may have the parked VM {name:?} is not decided there");
                Err(Error::new(ErrorKind::Volume, message))
            }
            Verdict::NotParked => {
                let message = format!("the VM {name:?} is not parked: its source has not evicted it");
                Err(Error::new(ErrorKind::Volume, message))
            }
        }
    }

    /// Tells every intermediary who owns the volume now, so that whoever was replaced is refused there. Returns those
    /// that could be told.
    ///
    /// # Errors
    /// One of them knows better; [`ErrorKind::Lost`] when some cannot be told whose pages nobody else has.
    pub fn fence(&mut self) -> Result<Vec<Member>> {
        let mut lists = 0;
        loop {
            let reached = self.tell_owner()?;
            let is_forced = self.claim.force && !reached.is_empty();
            if reached.len() == self.parked.members.len() || is_forced {
                return Ok(reached);
            }
            lists += 1;
            match self.check_whole(&reached) {
                // Who is away may have left, for others that came since.
                Err(error) if lists == LISTS_MAX || !self.find_members() => return Err(error),
                Err(_) => {}
                Ok(()) => return Ok(reached),
            }
        }
    }

    /// Whether there are more members than were known.
    fn find_members(&mut self) -> bool {
        let newest = newest(&describe_all(&self.connector, &self.parked));
        let longer = newest.filter(|newest| newest.members.len() > self.parked.members.len());
        let Some(longer) = longer else { return false };
        self.parked.members = longer.members;
        true
    }

    /// Tells each member; those that could be told.
    fn tell_owner(&self) -> Result<Vec<Member>> {
        let members = &self.parked.members;
        let request = VmdRequest::ClaimParked(Claim { force: true, ..self.claim.clone() });
        let told = visit_all(&*self.connector, members, self.of(), &request, ANSWER_MAX, verdict);
        let mut reached = Vec::new();
        for (member, answer) in members.iter().zip(told) {
            match answer {
                Ok(Verdict::NotParked) => reached.push(member.clone()),
                Ok(verdict) => {
                    self.granted(verdict)?;
                    reached.push(member.clone());
                }
                Err(error) => {
                    tracing::warn!(member = %member.node, error = error.chain(), "cannot be told of the claim");
                }
            }
        }
        Ok(reached)
    }

    /// Whether those who can be reached have everything, be it as copies.
    fn check_whole(&self, reached: &[Member]) -> Result<()> {
        let vmd = VmdClient::new(Arc::clone(&self.connector), ANSWER_MAX);
        let volume = vmd.open_among(self.parked.volume, Role::Writer(self.claim.epoch), reached)?;
        let is_there = |entry: &IndexEntry| {
            let member = entry.placement.map(|place| self.parked.members.get(place.member.as_usize()));
            member.is_none_or(|member| member.is_some_and(|member| reached.contains(member)))
        };
        let (mut next, mut missing) = (0, Vec::new());
        volume.scan(&mut |entry| {
            let range = entry.range();
            if range.first.0 > next {
                missing.push(range_of(next, range.first.0));
            }
            next = next.max(range.first.0 + range.pages);
            if !is_there(entry) {
                missing.push(range);
            }
            Ok(())
        })?;
        let pages = self.parked.manifest.pages();
        if next < pages {
            missing.push(range_of(next, pages));
        }
        if missing.is_empty() {
            return Ok(());
        }
        let away: Vec<String> = self
            .parked
            .members
            .iter()
            .filter(|member| !reached.contains(member))
            .map(|member| format!("{} at {}", member.node, member.address))
            .collect();
        let count: u64 = missing.iter().map(|range| u64::from(range.pages)).sum();
        let message = format!(
            "{count} pages of the parked VM {:?} cannot be had: {} cannot be reached. Bring them back and claim it again; with \
             --force it runs without those pages",
            self.name(),
            away.join(", ")
        );
        Err(Error::new(ErrorKind::Lost, message).about(missing))
    }

    /// The VM's state.
    ///
    /// # Errors
    /// That of the last intermediary, when none gives it.
    pub fn state(&self, reached: &[Member]) -> Result<Blobs> {
        let mut failed = Error::new(ErrorKind::Unreachable, "no intermediary gives the VM's state");
        for member in reached {
            let (volume, epoch) = self.of();
            let link = self.connector.connect(member.address, volume, epoch, Class::Bulk, ANSWER_MAX);
            let blobs = link.and_then(|mut link| {
                let mut blob = |request: Request<'_>| {
                    ask(&mut *link, request, STATE_MAX, |reply| match reply {
                        Reply::State(blob) => Ok(blob),
                        _ => Err(Error::new(ErrorKind::Protocol, "an answer to another question")),
                    })
                };
                let state = blob(Request::GetState)?;
                let pieces = 0..final_set::pieces_of(&state)?;
                let pieces = pieces.map(|number| blob(Request::GetPiece(number))).collect::<Result<_>>()?;
                Ok(Blobs { pieces, state })
            });
            match blobs {
                Ok(blobs) => return Ok(blobs),
                Err(error) => failed = error.at(&member.node),
            }
        }
        Err(failed)
    }

    /// Says that it is still at it, where that is due.
    ///
    /// # Errors
    /// It was replaced. An arbiter that cannot be asked is none: whoever is asked before the VM runs decides.
    pub fn renew(&mut self) -> Result<()> {
        if host::elapsed(self.renewed_at) < RENEW_EVERY {
            return Ok(());
        }
        match self.ask() {
            Err(error) if is_away(&error) => {
                self.renewed_at = host::now();
                tracing::warn!(error = error.chain(), "the claim could not be renewed");
                Ok(())
            }
            renewed => renewed,
        }
    }

    /// Has it written down that the VM runs here. Whether it is; where that is not known, `warn` is told once why.
    ///
    /// # Errors
    /// The volume is somebody else's.
    pub fn run(&mut self, warn: impl Fn(String)) -> Result<bool> {
        #[cfg(feature = "simulation")]
        if host::has_bug(host::Bug::RunsUnasked) {
            return Ok(true);
        }
        if self.asked_to_run.is_some_and(|at| host::elapsed(at) < RUN_AGAIN) {
            return Ok(false);
        }
        let ran = self.arbiter.run(&self.parked, &self.claim);
        self.asked_to_run = Some(host::now());
        match ran {
            Ok(()) => Ok(true),
            Err(error) if matches!(error.kind, ErrorKind::Fenced | ErrorKind::Volume) => {
                let message = format!(
                    "the parked VM {:?} is not this host's any more: another claimed it, as this one took too long",
                    self.name()
                );
                Err(Error::new(error.kind, message).because(error))
            }
            Err(error) => {
                if !std::mem::replace(&mut self.told, true) {
                    warn(format!(
                        "the VM is ready, and does not run before that is written down; asked again: {}",
                        error.chain()
                    ));
                }
                Ok(false)
            }
        }
    }

    /// Tells the other intermediaries that the VM runs, for those who look there. Nothing rests on it.
    pub fn spread(&self) {
        let told = visit_all(
            &*self.connector,
            &self.parked.members,
            self.of(),
            &VmdRequest::Run,
            ANSWER_MAX,
            |_| Some(()),
        );
        for error in told.into_iter().filter_map(Result::err) {
            tracing::info!(error = error.chain(), "an intermediary does not know that the VM runs");
        }
    }
}

/// Who says whose the volume is.
fn arbiter(
    connector: &Arc<dyn Connector>,
    parked: &VolumeInfo,
    options: &ClaimOptions,
) -> Result<Arc<dyn Arbiter>> {
    let named = parked.parking.as_ref().and_then(|parking| parking.arbiter.as_deref());
    let Some(named) = named else { return Ok(by_keeper(connector)) };
    let unknown = || Error::new(ErrorKind::Input, "no engine is known here");
    let found = options.engines.as_ref().ok_or_else(unknown).and_then(|engines| engines(named));
    match found {
        Ok(arbiter) => Ok(arbiter),
        Err(error) if options.force => {
            tracing::warn!(
                arbiter = named,
                error = error.chain(),
                "the arbiter is not asked: taken by force"
            );
            Ok(by_keeper(connector))
        }
        Err(cause) => {
            let message = format!(
                "{named} says who may have the parked VM {:?}, and cannot be asked from here; if you know that the VM runs \
                 nowhere, claim it with --force",
                options.name
            );
            Err(Error::new(cause.kind, message).because(cause))
        }
    }
}

fn by_keeper(connector: &Arc<dyn Connector>) -> Arc<dyn Arbiter> {
    Arc::new(KeeperArbiter::new(Arc::clone(connector), ANSWER_MAX))
}

fn range_of(first: u32, end: u32) -> PageRange {
    PageRange::new(crate::page::PageIndex(first), end - first)
}

fn none(name: &str) -> Error {
    let message =
        format!("no VM is parked as {name:?} at the intermediaries asked: `sg ls` shows those that are");
    Error::new(ErrorKind::Volume, message)
}

fn runs(name: &str, by: &str) -> Error {
    let message = format!(
        "the VM {name:?} runs at {by}, or did: a VM that was run is never run a second time. `sg dissolve` gives its \
         memory back"
    );
    Error::new(ErrorKind::Volume, message)
}

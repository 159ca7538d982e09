//! Evict now, place later: a VM that leaves for no destination. It is paused (after rounds, in hybrid), all of it goes to
//! the intermediaries, and only when all of it is safe there COMMIT is given: until then whatever fails, and be it that
//! there is no room, leaves it running here. Nobody runs it meanwhile in any case.
//!
//! `Park` is COMMIT, written to the keeper last: from its answer on the volume can be claimed, and the source is needed by
//! nobody. What is lost with an intermediary before that is sent to the others again.

use std::time::{Duration, Instant};

use super::handover::Lead;
use super::live::{Rounds, With, with_sinks};
use super::members::{self, MEMBER_TIME, Members, Patience, ask_some};
use super::source::{To, Unscattered};
use super::{Event, OutgoingVm};
use crate::error::{Error, ErrorKind, Result};
use crate::host;
use crate::ids::{MemberIndex, NodeId};
use crate::manifest::Manifest;
use crate::page::PAGE_BYTES_U64;
use crate::report::Ended;
use crate::scatter::Scatter;
use crate::scatter::offers::OfferDesk;
use crate::scatter::telling::Feed;
use crate::transport::wait;
use crate::vmd::{Request, visit};
use crate::wire::message::{Member, VmdRequest};
use crate::wire::parking;

/// Nobody has taken a page for so long, ten tries of an intermediary without room: there is none.
const STALL: Duration = Duration::from_secs(5);

/// What is safe may be told to others, who have the same pages, for so long before the sinks end.
const LAST_HINTS: Duration = Duration::from_millis(20);

/// How often, and how far apart, a keeper whose connection broke is told anew.
const KEEPER_TRIES: u32 = 3;
const KEEPER_PAUSE: Duration = Duration::from_millis(250);

/// The source's half of parking.
pub(super) struct Parking<'a> {
    pub lead: Lead<'a>,
    manifest: &'a Manifest,
}

/// How far the scatter is, and when it last got on.
struct Watch {
    safe: u32,
    since: Instant,
    is_told: bool,
    feed: Feed,
}

impl<'a> Parking<'a> {
    pub const fn new(lead: Lead<'a>, manifest: &'a Manifest) -> Self {
        Self { lead, manifest }
    }

    /// Everything up to COMMIT: state and pages are at the intermediaries.
    ///
    /// # Errors
    /// The VM's, the source's of pages, a cancel; [`ErrorKind::Unreachable`] when no intermediary is left,
    /// [`ErrorKind::Full`] when none takes pages any more. The VM is to run on here.
    pub fn until_safe(
        &self,
        vm: &mut dyn OutgoingVm,
        members: &mut Members,
        rounds: &mut Option<Rounds>,
    ) -> Result<()> {
        let Lead { scatter, control, .. } = self.lead;
        if members.iter().flatten().next().is_none() {
            return Err(self.nobody());
        }
        *rounds = Rounds::prepare(&self.lead, vm, members)?;
        if let Some(rounds) = rounds {
            rounds.run(&self.lead, None, members)?;
            if rounds.ended == Some(Ended::NoRoom) {
                return Err(self.no_room());
            }
        }
        self.lead.look()?;
        let state = vm.pause()?;
        control.mark_paused();
        if let Some(rounds) = rounds {
            rounds.paused(&self.lead)?;
        } else {
            scatter.take_stock()?;
        }
        let blobs = self.lead.with_final_set(&state)?;
        for request in members::put_state(&blobs) {
            self.ask(members, |_| true, || request);
        }
        self.lead.recruiter.lock().keep_state(blobs);
        // Without the state nobody could go on: until here it runs here again, whoever dies.
        vm.note(&self.unscattered())?;
        members::seat_all(scatter, members);
        #[cfg(feature = "simulation")]
        if host::has_bug(host::Bug::ParkedUnsafe) {
            return Ok(());
        }
        self.scatter(members, true)
    }

    /// The same, of one whose state is there, which another process began to park.
    ///
    /// # Errors
    /// As [`Self::until_safe`]'s.
    pub fn until_all_is_safe(&self, members: &mut Members) -> Result<()> {
        members::seat_all(self.lead.scatter, members);
        self.scatter(members, !self.lead.control.is_committed())
    }

    /// The member that is to grant claims: the first that is there.
    ///
    /// # Errors
    /// [`ErrorKind::Unreachable`] when none is left.
    pub fn keeper(&self, members: &Members) -> Result<usize> {
        members.iter().position(Option::is_some).ok_or_else(|| self.nobody())
    }

    /// Says to whoever may go on that COMMIT is given, before anybody else is told.
    ///
    /// # Errors
    /// The VM's, which then runs on here.
    pub fn note_commit(&self, vm: &mut dyn OutgoingVm, keeper_at: usize) -> Result<()> {
        let keeper = Some(self.member(keeper_at).node.clone());
        vm.note(&Unscattered { keeper, ..self.unscattered() })
    }

    fn unscattered(&self) -> Unscattered {
        Unscattered::of(self.lead.scatter, (self.lead.options, self.manifest))
    }

    /// Runs the sinks until every page is safe. Before COMMIT that may fail; after it, it goes on as long as an
    /// intermediary is left.
    fn scatter(&self, members: &mut Members, may_fail: bool) -> Result<()> {
        let scatter = self.lead.scatter;
        let mut watch = Watch { safe: 0, since: host::now(), is_told: false, feed: Feed::default() };
        let what = With { members: true, ready: false, offers: may_fail };
        with_sinks(&self.lead, None, members, what, &mut || {
            if may_fail {
                self.lead.look()?;
            } else if scatter.is_poisoned() {
                return Err(scatter.failure());
            }
            watch.feed.turn(scatter)?;
            let (safe, total) = scatter.planner.lock().progress();
            let now = host::now();
            if safe != watch.safe {
                (watch.safe, watch.since) = (safe, now);
            }
            let idle = now.saturating_duration_since(watch.since);
            if safe == total && scatter.are_known() {
                let hints = scatter.offers.get().is_some_and(OfferDesk::has_hints);
                return Ok(!hints || idle >= LAST_HINTS);
            }
            if scatter.index.alive() == 0 && !self.lead.recruiter.lock().is_searching() {
                return Err(self.nobody());
            }
            let stalled = idle >= STALL;
            if stalled && may_fail {
                return Err(self.no_room());
            }
            if stalled && !watch.is_told {
                watch.is_told = true;
                let message = format!("{}: they stay here until there is room", self.left());
                (self.lead.options.observer)(&Event::Warning { message });
            }
            Ok(false)
        })
    }

    /// Behind COMMIT: the others first, the keeper last. From its answer on the volume can be claimed.
    ///
    /// # Errors
    /// [`ErrorKind::Unreachable`] when no intermediary is left: the pages are here, and COMMIT was given.
    pub fn park(&self, members: &mut Members, keeper_at: usize) -> Result<()> {
        let keeper = self.member(keeper_at).node.clone();
        let To::Parked { name, arbiter } = &self.lead.options.to else { return Ok(()) };
        let request = VmdRequest::Park(parking::Parking {
            name: name.clone(),
            keeper: keeper.clone(),
            term: 0,
            arbiter: arbiter.clone(),
        });
        loop {
            let claimed = self.ask(members, |at| at != keeper_at, || Request::Control(&request));
            #[cfg(feature = "simulation")]
            let claimed = claimed || host::has_bug(host::Bug::ParkedUnsafe);
            if members.iter().all(Option::is_none) && !claimed {
                return Err(self.nobody());
            }
            if !claimed && !self.is_safe() {
                self.scatter(members, false)?;
                continue;
            }
            if !claimed && members[keeper_at].is_some() {
                self.ask(members, |at| at == keeper_at, || Request::Control(&request));
                if members[keeper_at].is_none() {
                    // It may be parked there, or not: what lay there is sent to the others.
                    continue;
                }
            }
            // Only what is parked is claimed: where somebody has, the keeper's answer was lost.
            let is_parked = claimed || members[keeper_at].is_some() || self.park_anew(keeper_at, &request)?;
            self.tell((name, arbiter.as_deref()), &keeper, is_parked);
            return Ok(());
        }
    }

    fn member(&self, at: usize) -> &'a Member {
        let scatter: &'a Scatter = self.lead.scatter;
        &scatter.members.books()[MemberIndex(at as u16)].member
    }

    /// A keeper whose connection broke may be there all the same. Whether it has parked the volume.
    fn park_anew(&self, keeper_at: usize, request: &VmdRequest) -> Result<bool> {
        let Lead { scatter, options, .. } = self.lead;
        let (keeper, of) = (self.member(keeper_at), (scatter.volume, scatter.epoch));
        for _ in 0..KEEPER_TRIES {
            match visit(&*options.connector, keeper, of, request, MEMBER_TIME, |_| Some(())) {
                Ok(()) => return Ok(true),
                Err(error) if error.kind == ErrorKind::Fenced => return Ok(true),
                Err(error) => tracing::warn!(error = error.chain(), "the keeper cannot be told"),
            }
            wait(&[], KEEPER_PAUSE)?;
        }
        Ok(false)
    }

    fn tell(&self, (name, arbiter): (&str, Option<&str>), keeper: &NodeId, is_parked: bool) {
        // Where an engine decides, the keeper is only an intermediary like the others.
        if !is_parked && arbiter.is_none() {
            let message = format!(
                "the keeper {keeper} of {name:?} was lost while the VM was parked: it is whole at the others, but \
                 whoever claims it has to say --force"
            );
            (self.lead.options.observer)(&Event::Warning { message });
        }
        let volume = self.lead.scatter.volume.to_string();
        let (name, keeper) = (name.to_owned(), keeper.to_string());
        (self.lead.options.observer)(&Event::Parked { volume, name, keeper });
    }

    /// Asks those members all at once. Who does not do it is lost, and what lay there is to be sent again. Whether one of
    /// them says that somebody owns the volume by now.
    fn ask<'r>(
        &self,
        members: &mut Members,
        which: impl Fn(usize) -> bool,
        request: impl Fn() -> Request<'r>,
    ) -> bool {
        let mut is_claimed = false;
        ask_some(members, which, request, Patience::Even, |member, error| {
            is_claimed |= error.kind == ErrorKind::Fenced;
            self.lead.scatter.member_lost(member, &error);
        });
        is_claimed
    }

    fn is_safe(&self) -> bool {
        self.lead.scatter.planner.lock().is_done()
    }

    fn left(&self) -> String {
        let (safe, total) = self.lead.scatter.planner.lock().progress();
        let left = u64::from(total - safe);
        format!(
            "the intermediaries take no pages any more: {left} of {total} pages ({} MiB) have no place",
            (left * PAGE_BYTES_U64).div_ceil(1 << 20)
        )
    }

    fn no_room(&self) -> Error {
        let message = format!(
            "{}. The VM runs on here: `sg status` shows how full they are; add memory (`sg serve`), name more of them, then \
             park it again",
            self.left()
        );
        Error::new(ErrorKind::Full, message)
    }

    fn nobody(&self) -> Error {
        let message = if self.lead.control.is_committed() {
            "no intermediary is left that could hold the VM, and COMMIT was given: it is paused here for good, with all of \
             its pages"
        } else {
            "no intermediary is left that could hold the VM, which runs on here: `sg status` shows who answers; name \
             others, then park it again"
        };
        Error::new(ErrorKind::Unreachable, message)
    }
}

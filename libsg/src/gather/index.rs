//! Asking the index for what nobody announced, and saying what is lost. One thread, `sg-gather-index`,
//! that sleeps until the source has evicted or is away, or the final set of pre-copy is there: before that,
//! everything is announced.
//!
//! Index servers are asked one range at a time: an answer tells where 4 MiB of pages are, so this is
//! far from any data path.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::prepage::is_of_link;
use super::shared::Shared;
use super::tracker::Word;
use crate::error::{Error, ErrorKind, Result};
use crate::host;
use crate::ids::MemberIndex;
use crate::limits::INDEX_RANGE_PAGES;
use crate::page::{PageIndex, PageRange};
use crate::transport::wait;
use crate::vmd::link::ask;
use crate::vmd::{Class, Link, Reply, Request};
use crate::wire::IndexEntry;
use crate::wire::message::{VmdReply, VmdRequest};
use crate::wire::placement::index_turn;

/// How long an index server may take to answer.
const ANSWER_MAX: Duration = Duration::from_secs(1);

/// After one that did not answer, it is left alone for so long.
const LEAVE_ALONE: Duration = Duration::from_secs(1);

/// How long the thread sleeps while there is something to look for, and while there is not.
const PAUSE: Duration = Duration::from_millis(50);
const NAP: Duration = Duration::from_millis(500);

/// Pre-copy: the source sends what is left on its own; what has not come so long after the final set was announced
/// to nobody.
const UNTOLD: Duration = Duration::from_secs(1);

/// What no index knew is asked for again after so long.
const ASK_ANEW: Duration = Duration::from_secs(1);

/// A source that has evicted is waited for no longer than this: it dials again at once, and nobody comes in its place.
const EVICTED_GRACE: Duration = Duration::from_secs(10);

/// Pages of which only the source may have a copy, asked of it at once.
const WISHES_AT_ONCE: usize = 32;

#[derive(Default)]
struct Seat {
    link: Option<Box<dyn Link>>,
    not_before: Option<Instant>,
    /// Since when it was asked in vain: one that is stopped keeps its connections.
    silent_since: Option<Instant>,
}

/// How the search goes.
struct Search {
    /// Pages that were unknown after the last one.
    unknown: u64,
    /// When there were last fewer than before: a source that cannot be reached from here may still be
    /// scattering.
    fewer_at: Instant,
    /// When everything was last asked for anew.
    anew_at: Instant,
    /// Each search begins at another member: an index may name copies that are gone, and whoever has one names his own.
    turn: usize,
    /// Who there was to be asked when everything was last asked for anew: whoever came or went since may have given, or
    /// have been given, what another was asked for before.
    roll: Roll,
}

/// How many members are known, and how many of them will not come back: neither is ever fewer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Roll {
    known: usize,
    gone: usize,
}

impl Roll {
    fn now(shared: &Shared) -> Self {
        let members = shared.members();
        Self { known: members.len(), gone: members.iter().filter(|desk| desk.state.lock().gone).count() }
    }
}

/// The thread `sg-gather-index`.
pub(crate) fn run(shared: &Shared) -> Result<()> {
    let mut seats: Vec<Seat> = Vec::new();
    let mut state: Option<Search> = None;
    let mut asked_at = host::now();
    while !shared.is_stopping() && !shared.is_dissolving() {
        shared.wake_index.drain();
        let source = shared.source();
        let silent = source.evicted || source.away_since.is_some();
        let waits = shared.waits_since().is_some_and(|since| host::elapsed(since) >= UNTOLD);
        let searches = (waits || shared.is_running() && silent) && shared.counts().unknown > 0;
        if searches {
            let now = host::now();
            let first = state.is_none();
            let state = state.get_or_insert(Search {
                unknown: u64::MAX,
                fewer_at: now,
                anew_at: now,
                turn: 0,
                roll: Roll::default(),
            });
            let roll = Roll::now(shared);
            seats.resize_with(roll.known, Seat::default);
            if first || roll != state.roll || host::elapsed(state.anew_at) >= ASK_ANEW {
                (state.anew_at, state.roll) = (now, roll);
                shared.tracker.lock().ask_again(false);
                ask_for_members(shared, &mut seats)?;
            }
            // The conductor may add those that were found at any time: looked for in this order, they are seen.
            let complete = search(shared, &mut seats, state.turn)?
                && !shared.has_found_members()
                && Roll::now(shared) == roll;
            state.turn += 1;
            let unknown = shared.counts().unknown;
            if unknown < state.unknown {
                state.fewer_at = host::now();
            }
            state.unknown = unknown;
            after_search(shared, complete, state.fewer_at)?;
        } else {
            state = None;
            seats.iter_mut().for_each(|seat| seat.silent_since = None);
            // Who leaves may have named others, of whom nobody else might tell.
            if shared.is_running() && silent && host::elapsed(asked_at) >= ASK_ANEW {
                asked_at = host::now();
                seats.resize_with(shared.members().len(), Seat::default);
                ask_for_members(shared, &mut seats)?;
            }
        }
        wait(&[(Some(shared.wake_index.as_fd()), false)], if searches { PAUSE } else { NAP })?;
    }
    Ok(())
}

/// Asks for every page that is not known. `false` when some index server could not be asked that may
/// still answer.
fn search(shared: &Shared, seats: &mut [Seat], turn: usize) -> Result<bool> {
    let mut complete = true;
    let mut from = PageIndex(0);
    loop {
        if shared.is_stopping() || shared.is_dissolving() {
            return Ok(false);
        }
        let to_border = INDEX_RANGE_PAGES - from.0 % INDEX_RANGE_PAGES;
        let (found, total) = {
            let tracker = shared.tracker.lock();
            (tracker.next_unknown(from, to_border), tracker.counts().total)
        };
        let range = match found {
            Ok(range) => within_border(range),
            Err(next) if u64::from(next.0) >= total => return Ok(complete),
            Err(next) => {
                from = next;
                continue;
            }
        };
        if ask_around(shared, seats, range, turn)? {
            not_indexed(shared, range);
        } else {
            complete = false;
        }
        from = PageIndex(range.first.0 + range.pages);
        if u64::from(from.0) >= total {
            return Ok(complete);
        }
    }
}

/// A run that was found further on than it was looked for may reach over a border.
fn within_border(range: PageRange) -> PageRange {
    let to_border = INDEX_RANGE_PAGES - range.first.0 % INDEX_RANGE_PAGES;
    PageRange::new(range.first, range.pages.min(to_border))
}

/// Asks the owner of a range, or who comes so many turns behind it, and as long as pages of it are unknown the others in
/// turn. Whether everyone was asked who may still answer.
fn ask_around(shared: &Shared, seats: &mut [Seat], range: PageRange, turn: usize) -> Result<bool> {
    let mut everyone = true;
    let members = seats.len();
    for step in 0..members {
        let Some(member) = index_turn(range.first, step + turn % members, members) else { break };
        match locate(shared, &mut seats[member.as_usize()], member, range) {
            Ok(entries) => {
                seats[member.as_usize()].silent_since = None;
                if let Err(error) = shared.announce(&entries, Word::Index) {
                    tracing::warn!(error = error.chain(), "an index answered nonsense");
                }
                let tracker = shared.tracker.lock();
                let left = tracker.next_unknown(range.first, range.pages).ok();
                if left.is_none_or(|left| !overlaps(left, range)) {
                    return Ok(true);
                }
            }
            Err(error) if is_of_link(&error) => {
                let silent_since = *seats[member.as_usize()].silent_since.get_or_insert_with(host::now);
                everyone &= !may_answer(shared, member, silent_since);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(everyone)
}

fn overlaps(a: PageRange, b: PageRange) -> bool {
    a.positions().start < b.positions().end && b.positions().start < a.positions().end
}

/// Asks all who answer who the members are: a source that is no more, or an intermediary that left, may have added some and
/// not told us. At the place of a member that is gone whoever is there now is asked: it
/// may have taken over what is here. What it says begins with what we know, or is not heard.
fn ask_for_members(shared: &Shared, seats: &mut [Seat]) -> Result<()> {
    for (at, seat) in seats.iter_mut().enumerate() {
        match ask_for_list(shared, seat, MemberIndex(at as u16)) {
            Err(error) if !is_of_link(&error) => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

fn ask_for_list(shared: &Shared, seat: &mut Seat, member: MemberIndex) -> Result<()> {
    let describe = Request::Control(&VmdRequest::Describe);
    let members = asked_there(shared, seat, (member, true), describe, |reply| match reply {
        Reply::Control(VmdReply::Volume(info)) => Ok(info.members),
        _ => Err(another()),
    });
    shared.found_members(members?);
    Ok(())
}

/// Whether a member that has not answered since then may do so yet.
fn may_answer(shared: &Shared, member: MemberIndex, silent_since: Instant) -> bool {
    let Some(desk) = shared.member(member) else { return false };
    let state = *desk.state.lock();
    let since = state.lost_since.map_or(silent_since, |lost| lost.min(silent_since));
    !state.gone && host::elapsed(since) < shared.member_grace
}

fn locate(
    shared: &Shared,
    seat: &mut Seat,
    member: MemberIndex,
    range: PageRange,
) -> Result<Vec<IndexEntry>> {
    let located = asked(shared, seat, member, Request::Locate(range), |reply| match reply {
        Reply::Located(entries) => Ok(entries.to_vec()),
        _ => Err(another()),
    });
    match located {
        // It does not know the volume: then it knows none of its pages.
        Err(error) if error.kind == ErrorKind::Volume => Ok(Vec::new()),
        // It has heard of members that we have not: it is asked who they are, and for those pages again when they are known.
        Ok(mut entries) if !entries.iter().all(|entry| is_at(entry, shared.members().len())) => {
            ask_for_list(shared, seat, member)?;
            entries.retain(|entry| is_at(entry, shared.members().len()));
            Ok(entries)
        }
        located => located,
    }
}

/// Whether a page lies at one of so many members, as far as it lies anywhere.
fn is_at(entry: &IndexEntry, members: usize) -> bool {
    entry.placement.is_none_or(|placement| placement.member.as_usize() < members)
}

fn another() -> Error {
    Error::new(ErrorKind::Protocol, "an answer to another question")
}

/// Asks a member, unless it was not there just now.
fn asked<T>(
    shared: &Shared,
    seat: &mut Seat,
    member: MemberIndex,
    request: Request<'_>,
    take: impl FnOnce(Reply<'_>) -> Result<T>,
) -> Result<T> {
    asked_there(shared, seat, (member, false), request, take)
}

/// The same, or `anybody` who is in its place.
fn asked_there<T>(
    shared: &Shared,
    seat: &mut Seat,
    (member, anybody): (MemberIndex, bool),
    request: Request<'_>,
    take: impl FnOnce(Reply<'_>) -> Result<T>,
) -> Result<T> {
    let unreachable = || Error::new(ErrorKind::Unreachable, "it was not there just now");
    let desk = shared.member(member).ok_or_else(unreachable)?;
    let known_lost = desk.state.lock().lost_since.is_some();
    if (known_lost && !anybody) || seat.not_before.is_some_and(|at| host::now() < at) {
        return Err(unreachable());
    }
    let mut link = match seat.link.take() {
        Some(link) if !known_lost => link,
        _ => {
            let address = desk.member.address;
            match shared.connector.connect(address, shared.volume, shared.epoch, Class::Bulk, ANSWER_MAX) {
                Ok(link) if anybody || link.member().node == desk.member.node => link,
                Ok(_) => return Err(unreachable()),
                Err(error) => {
                    seat.not_before = Some(host::now() + leave_alone(shared));
                    return Err(error);
                }
            }
        }
    };
    let answered = ask(&mut *link, request, ANSWER_MAX, take);
    match &answered {
        Ok(_) if link.member().node == desk.member.node && !known_lost => seat.link = Some(link),
        Ok(_) => {}
        Err(error) if error.kind == ErrorKind::Volume => {}
        Err(_) => seat.not_before = Some(host::now() + leave_alone(shared)),
    }
    answered
}

/// Within its grace it is asked some times.
fn leave_alone(shared: &Shared) -> Duration {
    LEAVE_ALONE.min(shared.member_grace / 4)
}

/// What of a range is unknown still is in no index.
fn not_indexed(shared: &Shared, range: PageRange) {
    let end = range.first.0 + range.pages;
    let mut from = range.first;
    let mut tracker = shared.tracker.lock();
    while from.0 < end {
        match tracker.next_unknown(from, end - from.0) {
            Ok(found) if found.first.0 < end => {
                let pages = found.pages.min(end - found.first.0);
                tracker.not_indexed(PageRange::new(found.first, pages));
                from = PageIndex(found.first.0 + pages);
            }
            _ => return,
        }
    }
}

/// Asks the source for what only it can have; what nobody can have is lost.
fn after_search(shared: &Shared, complete: bool, fewer_at: Instant) -> Result<()> {
    let source = shared.source();
    let away_for = source.away_since.map(host::elapsed);
    let total = shared.counts().total;
    if away_for.is_none() {
        let mut wishes = Vec::new();
        let mut from = PageIndex(0);
        while u64::from(from.0) < total && wishes.len() < WISHES_AT_ONCE {
            from = shared.tracker.lock().only_source(from, WISHES_AT_ONCE, &mut wishes);
        }
        wishes.into_iter().for_each(|page| shared.wish(page));
    }
    let members = shared.members();
    let settled = members.iter().all(|desk| {
        let state = *desk.state.lock();
        state.gone || state.lost_since.is_none_or(|since| host::elapsed(since) >= shared.member_grace)
    });
    // Before COMMIT nothing is lost: the VM is the source's.
    if !complete || !settled || !shared.is_running() {
        return Ok(());
    }
    let grace = if source.evicted { shared.source_grace.min(EVICTED_GRACE) } else { shared.source_grace };
    let source_away = away_for.is_some_and(|away| away.min(host::elapsed(fewer_at)) >= grace);
    let mut lost = Vec::new();
    let mut from = PageIndex(0);
    while u64::from(from.0) < total {
        from = shared.tracker.lock().lose(from, source_away, &mut lost);
    }
    #[cfg(feature = "simulation")]
    if host::has_bug(host::Bug::LossNotTold) {
        return Ok(());
    }
    if lost.is_empty() { Ok(()) } else { shared.lose(lost) }
}

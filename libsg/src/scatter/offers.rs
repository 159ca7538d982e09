//! Offering pages by their hashes: the thread `sg-scatter-offers` reads and hashes them ahead of the sinks, whose
//! links carry the offers, many to a frame, between the pages; so no page waits for a round trip of its own.
//!
//! Of each hash one member is the owner, by a rule on which all sources agree. It is asked first: it has the bytes, or
//! knows of whom to ask, or says who is to send them. Where they go after that is told to it, as a hint. References are
//! taken at the one who has the bytes, who may refuse; then the page is sent.
//!
//! Where pages are to lie at several members, the one who has the bytes is then asked to see to that, by its sink, which
//! counts a batch of such pages as it counts one that it sent: when the others hold them, they are stored.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::load::Loaded;
use super::shared::{PoisonsOnPanic, Scatter};
use super::spans::zero_entries;
use super::table::{Loser, Place};
use crate::content::{ContentHash, ContentHasher};
use crate::error::Result;
use crate::host;
use crate::ids::{Checksum, MemberIndex, MemberSet, Placement};
use crate::page::{PAGE_BYTES, PageIndex};
use crate::transport::{Waker, wait};
use crate::wire::message::Member;
use crate::wire::{HintEntry, IndexEntry, ReferEntry, Referral};

/// Offers that were sent and not answered, at most: the pages of a few milliseconds at 10 Gb/s.
const OUT_MAX: usize = 1024;

/// Pages that others are about to send, at most: 1 MB of books. Beyond that they are sent twice.
const PENDING_MAX: usize = 16 << 10;

/// Hashes that are remembered until their pages are stored and hints go out: 3 MB.
const GRANTED_MAX: usize = 64 << 10;

/// Hints that may wait for one member; what does not fit is dropped.
const HINTS_MAX: usize = 64 << 10;

/// An offer that is not answered within this is not waited for.
const LATE: Duration = Duration::from_millis(200);

/// How often it is asked for a page that another is sending, and how long in all.
const AGAIN: Duration = Duration::from_millis(20);
const PENDING: Duration = Duration::from_millis(500);

/// The longest sleep of the thread.
const NAP: Duration = Duration::from_millis(10);

/// What is offered, and what came of it.
#[derive(Debug)]
pub struct OfferDesk {
    hasher: ContentHasher,
    seats: Vec<Seat>,
    books: Mutex<Books>,
    waker: Waker,
}

#[derive(Debug)]
struct Seat {
    /// Of who it is: makes a hash prefer one member or the other.
    salt: u64,
    offers: Mutex<Vec<ReferEntry>>,
    hints: Mutex<Vec<HintEntry>>,
    /// Pages that lie there, and are to lie at others, too; since when.
    had: Mutex<Vec<(IndexEntry, Instant)>>,
    /// It left an offer unanswered, or is lost: it is asked nothing more until it answers.
    silent: AtomicBool,
}

#[derive(Debug, Default)]
struct Books {
    out: BTreeMap<PageIndex, Offer>,
    pending: usize,
    granted: BTreeMap<PageIndex, ContentHash>,
}

#[derive(Clone, Copy, Debug)]
struct Offer {
    entry: ReferEntry,
    checksum: Checksum,
    member: MemberIndex,
    first: Instant,
    stage: Stage,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// The owner was asked, then.
    Owner(Instant),
    /// The one of whom the owner spoke was asked.
    Holder(Instant),
    /// Another is sending it: the owner is asked again at that time.
    Pending(Instant),
}

impl OfferDesk {
    /// A desk for these members. Who is added later is offered nothing: all who know these agree on owners.
    ///
    /// # Errors
    /// [`crate::ErrorKind::System`] when the kernel gives no event descriptor.
    pub fn new(hasher: ContentHasher, members: &[Member]) -> Result<Self> {
        let seat = |member: &Member| Seat {
            salt: salt(member),
            offers: Mutex::default(),
            hints: Mutex::default(),
            had: Mutex::default(),
            silent: AtomicBool::new(false),
        };
        let seats = members.iter().map(seat).collect();
        Ok(Self { hasher, seats, books: Mutex::default(), waker: Waker::new()? })
    }

    /// The member that is asked about a hash first: each member's turn comes alike, and all who know the same members
    /// agree, in whatever order they have them.
    fn owner(&self, hash: &ContentHash) -> Option<MemberIndex> {
        let rank = |seat: &Seat| mix(seat.salt ^ hash.word());
        let best = (0..self.seats.len()).max_by_key(|at| rank(&self.seats[*at]))?;
        Some(MemberIndex(best as u16))
    }

    fn is_silent(&self, member: MemberIndex) -> bool {
        self.seats.get(member.as_usize()).is_none_or(|seat| seat.silent.load(Ordering::Relaxed))
    }

    fn set_silent(&self, member: MemberIndex, silent: bool) {
        if let Some(seat) = self.seats.get(member.as_usize()) {
            seat.silent.store(silent, Ordering::Relaxed);
        }
    }

    /// Takes up to `max` offers that wait for a member's link.
    pub fn take(&self, member: MemberIndex, max: usize, out: &mut Vec<ReferEntry>) {
        let Some(seat) = self.seats.get(member.as_usize()) else { return };
        let mut offers = seat.offers.lock();
        let n = offers.len().min(max);
        out.extend(offers.drain(..n));
    }

    /// Whether hints wait for any member's link.
    #[must_use]
    pub fn has_hints(&self) -> bool {
        self.seats.iter().any(|seat| !seat.hints.lock().is_empty())
    }

    /// Takes up to `max` hints that wait for a member's link.
    pub fn take_hints(&self, member: MemberIndex, max: usize, out: &mut Vec<HintEntry>) {
        let Some(seat) = self.seats.get(member.as_usize()) else { return };
        let mut hints = seat.hints.lock();
        let n = hints.len().min(max);
        out.extend(hints.drain(..n));
    }

    /// Takes up to `max` pages that lie at a member, and are to lie at others, too.
    pub fn take_had(&self, member: MemberIndex, max: usize, out: &mut Vec<IndexEntry>) {
        let Some(seat) = self.seats.get(member.as_usize()) else { return };
        let mut had = seat.had.lock();
        let n = had.len().min(max);
        out.extend(had.drain(..n).map(|(entry, _)| entry));
    }

    fn had(&self) -> usize {
        self.seats.iter().map(|seat| seat.had.lock().len()).sum()
    }

    /// A page was stored at a member: the owner of its hash is to know.
    fn stored(&self, books: &mut Books, page: PageIndex, member: MemberIndex) {
        let Some(hash) = books.granted.remove(&page) else { return };
        let Some(owner) = self.owner(&hash).filter(|owner| *owner != member) else { return };
        let mut hints = self.seats[owner.as_usize()].hints.lock();
        if hints.len() < HINTS_MAX {
            hints.push(HintEntry { hash, member });
        }
    }
}

fn mix(word: u64) -> u64 {
    let word = (word ^ word >> 33).wrapping_mul(0xff51_afd7_ed55_8ccd);
    let word = (word ^ word >> 33).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    word ^ word >> 33
}

fn salt(member: &Member) -> u64 {
    member.node.name.bytes().fold(mix(member.node.incarnation), |salt, byte| mix(salt ^ u64::from(byte)))
}

impl Scatter {
    /// Members that store pages, and where: the owners of their hashes are told.
    pub fn note_stored(&self, pages: impl Iterator<Item = PageIndex>, member: MemberIndex) {
        let Some(desk) = self.offers.get() else { return };
        let mut books = desk.books.lock();
        pages.for_each(|page| desk.stored(&mut books, page, member));
    }

    /// Whether pages that lie at a member by reference are to lie at others, too.
    fn copies_references(&self) -> bool {
        #[cfg(feature = "simulation")]
        if host::has_bug(host::Bug::ReferenceAlone) {
            return false;
        }
        self.copies.holders() > 1
    }

    /// A member is lost: it is asked nothing more.
    pub(super) fn offers_lost(&self, member: MemberIndex) {
        if let Some(desk) = self.offers.get() {
            desk.set_silent(member, true);
            desk.waker.wake();
        }
    }

    /// A member answered offers; `None` where it refused them all.
    pub fn referred(&self, member: MemberIndex, offers: &[ReferEntry], answers: Option<&[Referral]>) {
        let Some(desk) = self.offers.get() else { return };
        let now = host::now();
        let (mut entries, mut losers) = (Vec::new(), Vec::new());
        desk.set_silent(member, false);
        {
            let mut books = desk.books.lock();
            let mut planner = self.planner.lock();
            planner.offers_heard(now);
            for (at, entry) in offers.iter().enumerate() {
                let answer = answers.and_then(|answers| answers.get(at)).copied().unwrap_or(Referral::Send);
                // An offer that was given up, or made again elsewhere, is nobody's any more.
                let known = books.out.get(&entry.page).filter(|o| o.entry == *entry && o.member == member);
                let known = known.copied();
                match (answer, known) {
                    (Referral::Have(placement), known) => {
                        let placement = Placement { member, ..placement };
                        match known {
                            Some(offer) => {
                                let seal = entry.hash.seal(offer.checksum);
                                books.forget(entry.page);
                                if self.copies_references() {
                                    let had = IndexEntry::at(entry.page, entry.round, placement, seal);
                                    desk.seats[member.as_usize()].had.lock().push((had, now));
                                } else {
                                    let page = (entry.page, entry.round, seal);
                                    planner.have(page, placement, &mut entries, &mut losers);
                                }
                            }
                            None => {
                                let place = Place { first: placement, copies: MemberSet::NONE };
                                losers.push(Loser { page: entry.page, place });
                            }
                        }
                    }
                    (Referral::At(holder), Some(offer))
                        if matches!(offer.stage, Stage::Owner(_)) && !desk.is_silent(holder) =>
                    {
                        books.ask(desk, Offer { member: holder, stage: Stage::Holder(now), ..offer });
                        self.member_waker(holder).wake();
                    }
                    (Referral::Pending, Some(offer))
                        if books.pending < PENDING_MAX
                            && now.saturating_duration_since(offer.first) < PENDING =>
                    {
                        books.set(Offer { stage: Stage::Pending(now + AGAIN), ..offer });
                    }
                    (_, Some(offer)) => {
                        books.forget(entry.page);
                        if books.granted.len() >= GRANTED_MAX {
                            // Those that went to the destination meanwhile; of the others the hints are missing.
                            books.granted.clear();
                        }
                        books.granted.insert(entry.page, offer.entry.hash);
                        planner.not_there(entry.page);
                    }
                    (_, None) => {}
                }
            }
        }
        for loser in losers {
            self.give_up(loser);
        }
        self.route(&entries);
        self.announce(&entries);
        self.wake_members();
        desk.waker.wake();
    }
}

impl Books {
    fn set(&mut self, offer: Offer) {
        self.forget(offer.entry.page);
        self.pending += usize::from(matches!(offer.stage, Stage::Pending(_)));
        self.out.insert(offer.entry.page, offer);
    }

    fn forget(&mut self, page: PageIndex) {
        if let Some(offer) = self.out.remove(&page) {
            self.pending -= usize::from(matches!(offer.stage, Stage::Pending(_)));
        }
    }

    /// Notes an offer and queues it for its member.
    fn ask(&mut self, desk: &OfferDesk, offer: Offer) {
        self.set(offer);
        desk.seats[offer.member.as_usize()].offers.lock().push(offer.entry);
    }

    fn asked(&self) -> usize {
        self.out.len() - self.pending
    }
}

/// Ends the offers, however the thread does.
struct Ends<'a>(&'a Scatter);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.planner.lock().end_offers();
        self.0.wake_all();
    }
}

/// The body of the thread `sg-scatter-offers`. When the source of pages fails, that is noted there.
pub fn keep(scatter: &Arc<Scatter>, ended: impl Fn() -> bool) {
    let _poisons = PoisonsOnPanic(scatter.clone());
    if let Err(error) = run(scatter, ended) {
        tracing::warn!(error = error.chain(), "pages are offered no more");
    }
}

/// Offers pages: until `ended` says so, or all pages were offered and answered for.
///
/// # Errors
/// The source's of pages.
pub fn run(scatter: &Arc<Scatter>, ended: impl Fn() -> bool) -> Result<()> {
    let Some(desk) = scatter.offers.get() else { return Ok(()) };
    let seed = (scatter.volume.0 ^ scatter.volume.0 >> 64) as u64;
    scatter.planner.lock().begin_offers(mix(seed), host::now());
    let _ends = Ends(scatter);
    let mut loaded = Loaded::default();
    while !ended() {
        let now = host::now();
        look_back(scatter, desk, now);
        let mut offered = false;
        while desk.books.lock().asked().max(desk.had()) < OUT_MAX && offer(scatter, desk, &mut loaded, now)? {
            offered = true;
        }
        if offered {
            scatter.wake_members();
        } else if desk.books.lock().out.is_empty() && desk.had() == 0 && scatter.planner.lock().offers_over()
        {
            break;
        }
        wait(&[(Some(desk.waker.as_fd()), false)], NAP)?;
        desk.waker.drain();
    }
    Ok(())
}

/// Offers that wait for an answer for too long are given up, and pages that wait for copies; those that another was
/// sending are offered again.
fn look_back(scatter: &Scatter, desk: &OfferDesk, now: Instant) {
    for seat in &desk.seats {
        let is_late = |(_, since): &mut (IndexEntry, Instant)| now.saturating_duration_since(*since) >= LATE;
        let late: Vec<_> = seat.had.lock().extract_if(.., is_late).collect();
        for (IndexEntry { page, placement, .. }, _) in late {
            scatter.planner.lock().not_there(page);
            let lost = placement.map(|first| Loser { page, place: Place { first, copies: MemberSet::NONE } });
            lost.map(|loser| scatter.give_up(loser));
        }
    }
    let mut books = desk.books.lock();
    let all: Vec<Offer> = books.out.values().copied().collect();
    for offer in all {
        match offer.stage {
            Stage::Owner(at) | Stage::Holder(at) if now.saturating_duration_since(at) >= LATE => {
                desk.set_silent(offer.member, true);
                books.forget(offer.entry.page);
                scatter.planner.lock().not_there(offer.entry.page);
            }
            Stage::Pending(at) if at <= now => match desk.owner(&offer.entry.hash) {
                Some(owner) if !desk.is_silent(owner) => {
                    books.ask(desk, Offer { member: owner, stage: Stage::Owner(now), ..offer });
                    scatter.member_waker(owner).wake();
                }
                _ => {
                    books.forget(offer.entry.page);
                    scatter.planner.lock().not_there(offer.entry.page);
                }
            },
            _ => {}
        }
    }
}

/// Reads, hashes and queues the next pages; `false` when there are none.
fn offer(scatter: &Scatter, desk: &OfferDesk, loaded: &mut Loaded, now: Instant) -> Result<bool> {
    let (batch, round) = {
        let mut planner = scatter.planner.lock();
        let Some(batch) = planner.next_offer() else { return Ok(false) };
        (batch, planner.round())
    };
    scatter.given(loaded.load(&*scatter.source, &batch, round))?;
    let mut zeros = Vec::new();
    {
        let mut planner = scatter.planner.lock();
        planner.offers_loaded();
        for zero in loaded.zero_entries(round) {
            for page in zero.range().iter().filter(|page| planner.offered_zero(*page)) {
                zeros.extend(zero_entries(crate::page::PageRange::new(page, 1), round));
            }
        }
    }
    scatter.announce(&zeros);
    scatter.route(&zeros);
    let mut page_bytes = [0; PAGE_BYTES];
    let mut hashes = Vec::with_capacity(loaded.entries.len());
    for slice in &loaded.slices {
        for at in 0..slice.len() / PAGE_BYTES {
            slice.part(at * PAGE_BYTES, PAGE_BYTES)?.copy_to(&mut page_bytes);
            hashes.push(desk.hasher.hash(&page_bytes));
        }
    }
    let mut books = desk.books.lock();
    for (page, hash) in loaded.entries.iter().zip(hashes) {
        match desk.owner(&hash).filter(|owner| !desk.is_silent(*owner)) {
            Some(member) => {
                let entry = ReferEntry { page: page.page, round, hash };
                let stage = Stage::Owner(now);
                books.ask(desk, Offer { entry, checksum: page.checksum, member, first: now, stage });
            }
            None => scatter.planner.lock().not_there(page.page),
        }
    }
    Ok(true)
}

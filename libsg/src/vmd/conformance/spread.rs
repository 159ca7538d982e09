//! Rules of pages that were stored by reference and lie at several intermediaries.

use super::sharing::{tenant, used_pages, volume};
use super::{Bench, FixtureNode, asked, batch, content, refused};
use crate::error::ErrorKind;
use crate::ids::{Checksum, Generation, MemberIndex, MemberSet, Placement, Round};
use crate::limits;
use crate::memory::PageSlice;
use crate::page::{PAGE_BYTES_U64, PageIndex, PageRange};
use crate::vmd::Class;
use crate::vmd::device::{Fetched, Volume};
use crate::vmd::link::{Link, Reply, Request};
use crate::wire::message::{VmdReply, VmdRequest};
use crate::wire::{GetEntry, IndexEntry, Missing, PageEntry, ReferEntry, Referral};

const A: MemberIndex = MemberIndex(0);
const B: MemberIndex = MemberIndex(1);
const PAGES: u32 = 100;

/// Three intermediaries, of which the first holds pages of another volume.
struct World {
    nodes: [Box<dyn FixtureNode>; 3],
    other: Box<dyn Volume>,
}

impl World {
    fn new(bench: &Bench<'_>, nodes: [Box<dyn FixtureNode>; 3]) -> Self {
        let other = volume(bench, &nodes.each_ref().map(|node| &**node), &tenant());
        let (entries, slices) = batch(0..PAGES, 0);
        let mut link = other.link(A, Class::Bulk).expect("a link");
        put(&mut *link, &entries, &slices);
        Self { nodes, other }
    }

    fn volume(&self, bench: &Bench<'_>) -> (Box<dyn Volume>, [Box<dyn Link>; 3]) {
        let volume = volume(bench, &self.nodes.each_ref().map(|node| &**node), &tenant());
        let links = [0, 1, 2].map(|at| volume.link(MemberIndex(at), Class::Bulk).expect("a link"));
        (volume, links)
    }
}

/// Offers the other's pages as the page so many behind: where they lie, under their seals.
fn refer(bench: &Bench<'_>, link: &mut dyn Link, behind: u32) -> Vec<IndexEntry> {
    let hasher = bench.fixture.connector().hasher(&tenant());
    let hash = |page: u32| hasher.hash(&content(page, 0));
    let offer = |page| ReferEntry { page: PageIndex(page + behind), round: Round(0), hash: hash(page) };
    let offers: Vec<ReferEntry> = (0..PAGES).map(offer).collect();
    let answers = asked(link, Request::Refer(&offers), |reply| match reply {
        Reply::Referred(referrals) => Some(referrals.to_vec()),
        _ => None,
    });
    let entry = |(page, referral): (u32, Referral)| {
        let Referral::Have(at) = referral else { panic!("{referral:?} of a page that is there") };
        let seal = hash(page).seal(Checksum::of(&content(page, 0)));
        IndexEntry::at(PageIndex(page + behind), Round(0), at, seal)
    };
    (0..).zip(answers.expect("an answer")).map(entry).collect()
}

fn spread(
    link: &mut dyn Link,
    entries: &[IndexEntry],
    copies: u64,
) -> crate::Result<(Vec<Option<Placement>>, Missing)> {
    let request = Request::Spread { entries, copies: MemberSet(copies) };
    asked(link, request, |reply| match reply {
        Reply::Stored { placements, missing } => Some((placements.to_vec(), missing)),
        _ => None,
    })
}

fn put(link: &mut dyn Link, entries: &[PageEntry], slices: &[PageSlice]) {
    let request = Request::Put { entries, slices, copies: MemberSet::NONE };
    asked(link, request, |reply| matches!(reply, Reply::Stored { .. }).then_some(())).expect("stored");
}

fn stored(link: &mut dyn Link) -> (u64, u64) {
    asked(link, Request::Control(&VmdRequest::Describe), |reply| match reply {
        Reply::Control(VmdReply::Volume(info)) => Some((info.stored_pages, info.copied_pages)),
        _ => None,
    })
    .expect("known")
}

fn drop_all(link: &mut dyn Link, entries: &[IndexEntry]) {
    let at = |e: &IndexEntry| GetEntry { page: e.page, placement: e.placement.expect("placed") };
    let gone: Vec<GetEntry> = entries.iter().map(at).collect();
    asked(link, Request::Drop(&gone), |reply| matches!(reply, Reply::Done).then_some(())).expect("dropped");
}

pub(super) fn references_have_copies(bench: &Bench<'_>) {
    let mut world = World::new(bench, [bench.node(), bench.node(), bench.node()]);
    let (volume, [mut a, mut b, _c]) = world.volume(bench);
    let entries = refer(bench, &mut *a, 1000);
    let (placements, missing) = spread(&mut *a, &entries, 0b011).expect("an answer");
    assert!(missing.is_none());
    assert_eq!(placements, entries.iter().map(|entry| entry.placement).collect::<Vec<_>>());
    assert_eq!((stored(&mut *a), stored(&mut *b)), ((PAGES.into(), 0), (PAGES.into(), PAGES.into())));
    assert_eq!(used_pages(bench, &*world.nodes[0]), u64::from(PAGES), "stored once there");
    // Of another volume too: there are no bytes more at the second holder.
    let (_, [mut other_a, mut other_b, _]) = world.volume(bench);
    let others = refer(bench, &mut *other_a, 5000);
    assert!(spread(&mut *other_a, &others, 0b011).expect("an answer").1.is_none());
    assert_eq!(stored(&mut *other_b), (PAGES.into(), PAGES.into()));
    assert_eq!(used_pages(bench, &*world.nodes[1]), u64::from(PAGES), "stored once there, too");
    // Each holder names its own, under the seals; whatever becomes of who sent the bytes, or of the first holder.
    volume.index(&entries).expect("indexed");
    world.other.dissolve().expect("dissolved");
    world.nodes[0].kill();
    let found = volume.locate(PageRange::new(PageIndex(0), 2000)).expect("an answer");
    let seals = |entries: &[IndexEntry]| entries.iter().map(|e| (e.page, e.checksum)).collect::<Vec<_>>();
    assert_eq!(seals(&found), seals(&entries));
    assert!(found.iter().all(|entry| entry.placement.is_some_and(|at| at.member == B)));
    for (page, got) in (0..PAGES).zip(volume.get(&entries).expect("an answer")) {
        assert_eq!(got, Fetched::Bytes(content(page, 0).into()), "page {page}");
    }
}

pub(super) fn copies_of_references_are_given_back(bench: &Bench<'_>) {
    let world = World::new(bench, [bench.node(), bench.node(), bench.node()]);
    let (volume, [mut a, mut b, _c]) = world.volume(bench);
    let entries = refer(bench, &mut *a, 1000);
    assert!(spread(&mut *a, &entries, 0b011).expect("an answer").1.is_none());
    // The same page once more: what is named by the same placement has its copies already.
    let again = refer(bench, &mut *a, 1000);
    assert_eq!(again, entries);
    assert_eq!(stored(&mut *a).0, 2 * u64::from(PAGES));
    let (placements, missing) = spread(&mut *a, &again, 0b011).expect("an answer");
    assert!(placements.iter().all(Option::is_none) && missing.is_none());
    assert_eq!((stored(&mut *a).0, stored(&mut *b).0), (PAGES.into(), PAGES.into()), "held once");
    drop_all(&mut *a, &entries[..40]);
    drop_all(&mut *b, &entries[..40]);
    drop_all(&mut *b, &entries[..40]);
    assert_eq!((stored(&mut *a).0, stored(&mut *b)), (60, (60, 60)));
    volume.discard(PageRange::new(PageIndex(1000), 70), Round(1)).expect("discarded");
    assert_eq!((stored(&mut *a).0, stored(&mut *b)), (30, (30, 30)));
    // What was given back may come anew.
    let anew = refer(bench, &mut *a, 1000);
    let (placements, missing) = spread(&mut *a, &anew[..70], 0b011).expect("an answer");
    assert!(missing.is_none() && placements.iter().all(Option::is_some));
    volume.dissolve().expect("dissolved");
    assert_eq!(used_pages(bench, &*world.nodes[0]), u64::from(PAGES), "the other's pages");
    assert_eq!(used_pages(bench, &*world.nodes[1]), 0);
}

pub(super) fn missing_copies_of_references_are_named(bench: &Bench<'_>) {
    let small = bench.fixture.start(limits::BATCH_PAGES_MAX as u64 * PAGE_BYTES_U64);
    let mut world = World::new(bench, [bench.node(), small, bench.node()]);
    let (_volume, [mut a, mut b, _c]) = world.volume(bench);
    let (filling, slices) = batch(9000..9000 + limits::BATCH_PAGES_MAX as u32 - 50, 0);
    put(&mut *b, &filling, &slices);
    let entries = refer(bench, &mut *a, 1000);
    let (placements, missing) = spread(&mut *a, &entries, 0b011).expect("an answer");
    assert!(placements.iter().all(Option::is_some), "they are held here");
    assert_eq!(missing, Missing { full: MemberSet::of(B), lost: MemberSet::NONE }, "all, or none");
    drop_all(&mut *a, &entries);
    world.nodes[2].kill();
    let entries = refer(bench, &mut *a, 1000);
    let (_, missing) = spread(&mut *a, &entries, 0b101).expect("an answer");
    assert_eq!(missing, Missing { full: MemberSet::NONE, lost: MemberSet(0b100) });
    drop_all(&mut *a, &entries);
    // What is not here has no placement: another's page, another generation, another member.
    let mut wrong = refer(bench, &mut *a, 1000);
    let first = wrong[0].placement.expect("placed");
    wrong[0].page = PageIndex(999);
    wrong[1].placement = Some(Placement { generation: Generation(first.generation.0 + 1), ..first });
    wrong[2].placement = Some(Placement { member: B, ..first });
    let (placements, missing) = spread(&mut *a, &wrong[..4], 0b001).expect("an answer");
    assert_eq!((placements, missing), (vec![None, None, None, wrong[3].placement], Missing::NONE));
    // Who is named must be a member, and the one who is asked among them.
    for copies in [0b1001, 0b010] {
        refused(spread(&mut *a, &wrong[4..], copies), ErrorKind::Protocol);
    }
    let submit = |link: &mut dyn Link, entries: &[IndexEntry], copies| {
        link.submit(Request::Spread { entries, copies }).map(|_| ())
    };
    refused(submit(&mut *a, &wrong, MemberSet::ALL), ErrorKind::Input);
    refused(submit(&mut *a, &[], MemberSet::of(A)), ErrorKind::Input);
    refused(
        submit(&mut *a, &[IndexEntry::zero(PageIndex(1), 1, Round(0))], MemberSet::of(A)),
        ErrorKind::Input,
    );
}

//! Rules of pages that lie at several intermediaries.

use super::{Bench, FixtureNode, VOLUME_PAGES, asked, batch, content, put_of, refused};
use crate::error::ErrorKind;
use crate::ids::{Checksum, MemberIndex, MemberSet, Placement, Round};
use crate::limits;
use crate::page::{PAGE_BYTES_U64, PageIndex, PageRange};
use crate::vmd::Class;
use crate::vmd::device::{Fetched, PagePut, Vmd, Volume};
use crate::vmd::link::{Link, Reply, Request};
use crate::wire::message::{VmdReply, VmdRequest, VolumeInfo};
use crate::wire::{Encoding, GetEntry, IndexEntry, Missing};

const A: MemberIndex = MemberIndex(0);
const B: MemberIndex = MemberIndex(1);

type Nodes = [Box<dyn FixtureNode>; 3];
type Links = [Box<dyn Link>; 3];

/// Three intermediaries, a volume on them, and a link to each.
fn three(bench: &Bench<'_>) -> (Nodes, Box<dyn Volume>, Links) {
    let nodes = [bench.node(), bench.node(), bench.node()];
    let volume = bench.volume(&nodes.each_ref().map(|node| &**node));
    let links = [0, 1, 2].map(|at| volume.link(MemberIndex(at), Class::Bulk).expect("a link"));
    (nodes, volume, links)
}

/// Puts pages at a member, and copies of them at others. Where they lie there, and who has none.
fn put(
    link: &mut dyn Link,
    pages: impl IntoIterator<Item = u32>,
    round: u16,
    copies: u64,
) -> (Vec<Option<Placement>>, Missing) {
    let (entries, slices) = batch(pages, round);
    let request = Request::Put { entries: &entries, slices: &slices, copies: MemberSet(copies) };
    asked(link, request, |reply| match reply {
        Reply::Stored { placements, missing } => Some((placements.to_vec(), missing)),
        _ => None,
    })
    .expect("an answer")
}

fn locate(link: &mut dyn Link, first: u32, pages: u32) -> Vec<IndexEntry> {
    asked(link, Request::Locate(PageRange::new(PageIndex(first), pages)), |reply| match reply {
        Reply::Located(entries) => Some(entries.to_vec()),
        _ => None,
    })
    .expect("an answer")
}

fn index(link: &mut dyn Link, entries: &[IndexEntry]) {
    asked(link, Request::PutIndex(entries), |reply| matches!(reply, Reply::Indexed).then_some(()))
        .expect("indexed");
}

fn drop_slots(link: &mut dyn Link, page: u32, placement: Placement) {
    let entry = [GetEntry { page: PageIndex(page), placement }];
    asked(link, Request::Drop(&entry), |reply| matches!(reply, Reply::Done).then_some(())).expect("dropped");
}

fn info(link: &mut dyn Link) -> VolumeInfo {
    asked(link, Request::Control(&VmdRequest::Describe), |reply| match reply {
        Reply::Control(VmdReply::Volume(info)) => Some(*info),
        _ => None,
    })
    .expect("known")
}

/// Pages of that round lie at this member, which says so and gives them.
#[track_caller]
fn check_at(link: &mut dyn Link, member: MemberIndex, pages: &[u32], round: u16) {
    let mut wanted = Vec::new();
    for page in pages {
        let found = locate(link, *page, 1);
        let [entry] = found[..] else { panic!("page {page} at {member}: {found:?}") };
        let place = entry.placement.expect("it is not zero");
        assert_eq!((place.member, entry.round), (member, Round(round)), "page {page}");
        assert_eq!(entry.checksum, Checksum::of(&content(*page, round)));
        wanted.push(GetEntry { page: entry.page, placement: place });
    }
    let bytes = asked(link, Request::Get(&wanted), |reply| match reply {
        Reply::Pages { entries, bytes } => {
            assert!(entries.iter().all(|entry| entry.encoding == Encoding::Raw));
            Some(bytes.to_vec())
        }
        _ => None,
    });
    let expected: Vec<u8> = pages.iter().flat_map(|page| content(*page, round)).collect();
    assert!(bytes.expect("there") == expected);
}

pub(super) fn copies_are_there(bench: &Bench<'_>) {
    let (_nodes, _volume, [mut a, mut b, mut c]) = three(bench);
    // Of several batches at once, with gaps, and a whole unit.
    let pages: Vec<u32> = (0..40).map(|n| n * 3).collect();
    let (placements, missing) = put(&mut *a, pages.iter().copied(), 0, 0b011);
    assert_eq!((placements.iter().flatten().count(), missing), (pages.len(), Missing::NONE));
    let unit: Vec<u32> = (1000..1000 + limits::BATCH_PAGES_MAX as u32).collect();
    let (placements, missing) = put(&mut *b, unit.iter().copied(), 0, 0b111);
    assert_eq!((placements.iter().flatten().count(), missing), (unit.len(), Missing::NONE));
    check_at(&mut *a, A, &pages, 0);
    check_at(&mut *b, B, &pages, 0);
    assert_eq!(locate(&mut *c, 0, 200), [], "it was to hold none");
    for (link, member) in [(&mut a, 0), (&mut b, 1), (&mut c, 2)] {
        check_at(&mut **link, MemberIndex(member), &unit, 0);
    }
    let held =
        [&mut a, &mut b, &mut c].map(|link| info(&mut **link)).map(|i| (i.stored_pages, i.copied_pages));
    let (some, all) = (pages.len() as u64, unit.len() as u64);
    assert_eq!(held, [(some + all, all), (some + all, some), (all, all)]);
}

pub(super) fn many_copies_outstanding(bench: &Bench<'_>) {
    let (_nodes, _volume, [mut a, mut b, _c]) = three(bench);
    let batches: Vec<Vec<u32>> = (0..50_u32).map(|n| (n * 100..n * 100 + 64).collect()).collect();
    let mut open = Vec::new();
    for pages in &batches {
        let (entries, slices) = batch(pages.iter().copied(), 0);
        let copies = MemberSet(0b011);
        open.push(a.submit(Request::Put { entries: &entries, slices: &slices, copies }).expect("queued"));
        // Something else in between is not held up for ever.
        open.push(
            a.submit(Request::PutIndex(&[IndexEntry::zero(PageIndex(90_000), 1, Round(0))])).expect("queued"),
        );
    }
    let deadline = std::time::Instant::now() + super::PATIENCE;
    while !open.is_empty() {
        a.progress(usize::MAX).expect("open");
        while let Some(completion) = a.completion() {
            if let Reply::Stored { missing, .. } = completion.result.expect("done") {
                assert!(missing.is_none());
            }
            open.retain(|ticket| *ticket != completion.ticket);
        }
        assert!(std::time::Instant::now() < deadline, "{} are left", open.len());
        crate::transport::wait(&[(a.poll_fd(), a.queued_bytes() > 0)], super::PATIENCE / 100).expect("waits");
    }
    batches.iter().for_each(|pages| check_at(&mut *b, B, pages, 0));
}

pub(super) fn missing_copies_are_named(bench: &Bench<'_>) {
    let small = bench.fixture.start(limits::BATCH_PAGES_MAX as u64 * PAGE_BYTES_U64);
    let mut nodes = [bench.node(), small, bench.node()];
    let volume = bench.volume(&nodes.each_ref().map(|node| &**node));
    let mut a = volume.link(A, Class::Bulk).expect("a link");
    let mut b = volume.link(B, Class::Bulk).expect("a link");
    // All of a batch, or none of it.
    put(&mut *b, 0..500, 0, 0);
    let (placements, missing) = put(&mut *a, 1000..1020, 0, 0b011);
    assert_eq!(placements.iter().flatten().count(), 20);
    assert_eq!(missing, Missing { full: MemberSet::of(B), lost: MemberSet::NONE });
    assert_eq!(locate(&mut *b, 1000, 20), []);
    assert_eq!(info(&mut *b).stored_pages, 500);
    let (_, missing) = put(&mut *a, 1000..1012, 0, 0b011);
    assert!(missing.is_none(), "so many do fit");
    nodes[2].kill();
    let (placements, missing) = put(&mut *a, 2000..2020, 0, 0b101);
    assert_eq!(placements.iter().flatten().count(), 20);
    assert_eq!(missing, Missing { full: MemberSet::NONE, lost: MemberSet(0b100) });
    // One that is somebody else now gets none, either.
    nodes[2].restart();
    let (_, missing) = put(&mut *a, 2000..2020, 0, 0b101);
    assert_eq!(missing.lost, MemberSet(0b100));
    // Whoever is named must be a member, and the one who is asked among them.
    let (entries, slices) = batch(0..1, 0);
    for copies in [0b1001, 0b010] {
        let copies = MemberSet(copies);
        let put = Request::Put { entries: &entries, slices: &slices, copies };
        refused(asked(&mut *a, put, |_| Some(())), ErrorKind::Protocol);
    }
    refused(
        a.submit(Request::Put { entries: &entries, slices: &slices, copies: MemberSet::ALL }).map(|_| ()),
        ErrorKind::Input,
    );
}

pub(super) fn copies_are_given_back(bench: &Bench<'_>) {
    let (_nodes, volume, [mut a, mut b, mut c]) = three(bench);
    let place = |put: (Vec<Option<Placement>>, Missing)| put.0[0].expect("there is room");
    let first = place(put(&mut *a, [7], 0, 0b011));
    let second = place(put(&mut *c, [7], 0, 0b110));
    assert_eq!(info(&mut *b).stored_pages, 2, "sent two ways");
    // Just the copy of what lay there, whatever else there is of the page.
    for link in [&mut a, &mut b] {
        drop_slots(&mut **link, 7, first);
        drop_slots(&mut **link, 7, first);
    }
    assert_eq!([&mut a, &mut b].map(|link| info(&mut **link).stored_pages), [0, 1]);
    assert_eq!(locate(&mut *a, 7, 1), []);
    check_at(&mut *b, B, &[7], 0);
    check_at(&mut *c, MemberIndex(2), &[7], 0);
    drop_slots(&mut *b, 7, second);
    assert_eq!((info(&mut *b).stored_pages, info(&mut *b).copied_pages), (0, 0));
    // By round.
    put(&mut *a, 0..10, 0, 0b011);
    put(&mut *a, 5..10, 1, 0b011);
    volume.discard(PageRange::new(PageIndex(0), VOLUME_PAGES), Round(1)).expect("discarded");
    assert_eq!(locate(&mut *b, 0, 5), []);
    check_at(&mut *b, B, &[5, 6, 7, 8, 9], 1);
    assert_eq!([&mut a, &mut b].map(|link| info(&mut **link).stored_pages), [5, 5]);
    volume.dissolve().expect("dissolved");
    for member in volume.members() {
        assert_eq!(bench.client().statistics(member.address).expect("statistics").used_bytes, 0);
    }
}

pub(super) fn newest_copy_is_named(bench: &Bench<'_>) {
    let (_nodes, _volume, [mut a, mut b, _c]) = three(bench);
    let place = put(&mut *a, [1, 2, 3, 4], 1, 0b011).0[0].expect("there is room");
    let other = Placement { member: MemberIndex(2), ..place };
    let entry = |page, round| IndexEntry::at(PageIndex(page), Round(round), other, Checksum(page));
    // Of an older round or the same, what lies here is named; of a newer one what the index says.
    index(&mut *b, &[entry(1, 0), entry(2, 1), entry(3, 2), IndexEntry::zero(PageIndex(4), 10, Round(1))]);
    check_at(&mut *b, B, &[1, 2], 1);
    let found = locate(&mut *b, 3, 11);
    assert_eq!(found, [entry(3, 2), IndexEntry::zero(PageIndex(4), 10, Round(1))]);
    put(&mut *a, [6], 2, 0b011);
    let found = locate(&mut *b, 4, 10);
    let rounds: Vec<_> = found.iter().map(|e| (e.page.0, e.run_pages, e.round.0)).collect();
    assert_eq!(rounds, [(4, 2, 1), (6, 1, 2), (7, 7, 1)]);
    check_at(&mut *b, B, &[6], 2);
}

pub(super) fn any_but_one_may_die(bench: &Bench<'_>) {
    for dead in [[0, 1], [1, 2], [0, 2]] {
        let mut nodes = [bench.node(), bench.node(), bench.node()];
        let volume = bench.volume(&nodes.each_ref().map(|node| &**node));
        let pages = (0..200).map(|n| n * (limits::INDEX_RANGE_PAGES / 2 + 1));
        let puts: Vec<PagePut> = pages.map(|page| put_of(page, 0)).collect();
        let stored = volume.put(&puts, 3).expect("stored");
        volume.put_state(b"the vcpus").expect("stored");
        dead.iter().for_each(|at: &usize| nodes[*at].kill());
        for (entry, got) in stored.iter().zip(volume.get(&stored).expect("an answer")) {
            assert_eq!(got, Fetched::Bytes(content(entry.page.0, 0).into()), "{}", entry.page);
        }
        let found = volume.locate(PageRange::new(PageIndex(0), VOLUME_PAGES)).expect("an answer");
        assert_eq!(found.len(), stored.len());
        assert!(volume.get(&found).expect("an answer").iter().all(|got| *got != Fetched::Lost));
        assert_eq!(volume.get_state().expect("there"), b"the vcpus");
        // With fewer alive than copies are wanted, as many as there are.
        let more = volume.put(&[put_of(9, 1)], 3).expect("stored");
        assert_eq!(volume.get(&more).expect("an answer"), [Fetched::Bytes(content(9, 1).into())]);
    }
}

pub(super) fn copies_are_named_that_live(bench: &Bench<'_>) {
    let (mut nodes, volume, [mut a, _b, mut c]) = three(bench);
    let (placed, missing) = put(&mut *c, [5], 0, 0b110);
    assert!(missing.is_none());
    let at_c = placed[0].expect("stored");
    index(&mut *a, &[IndexEntry::at(PageIndex(5), Round(0), at_c, Checksum::of(&content(5, 0)))]);
    nodes[2].kill();
    // Whoever is asked first still names the first holder.
    let found = volume.locate(PageRange::new(PageIndex(5), 1)).expect("an answer");
    assert_eq!(found.iter().map(|e| e.placement.map(|at| at.member)).collect::<Vec<_>>(), [Some(B)]);
    assert_eq!(volume.get(&found).expect("an answer"), [Fetched::Bytes(content(5, 0).into())]);
}

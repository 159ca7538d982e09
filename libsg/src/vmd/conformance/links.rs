//! Rules of one link to one intermediary.

use std::collections::HashMap;
use std::time::Instant;

use super::{Bench, PATIENCE, VOLUME_PAGES, asked, batch, content, refused};
use crate::error::{ErrorKind, Result};
use crate::ids::{Checksum, Epoch, Generation, MemberSet, Placement, Round, VolumeId};
use crate::limits;
use crate::page::{PAGE_BYTES, PAGE_BYTES_U64, PageIndex, PageRange};
use crate::transport;
use crate::vmd::link::{Link, Reply, Request};
use crate::wire::message::{NodeStatistics, VmdReply, VmdRequest, VolumeInfo, VolumeState};
use crate::wire::{Encoding, GetEntry, IndexEntry, PageEntry};

/// Puts pages; `None` for those that were not stored.
fn put_some(
    link: &mut dyn Link,
    pages: impl IntoIterator<Item = u32>,
    round: u16,
) -> Result<Vec<Option<Placement>>> {
    let (entries, slices) = batch(pages, round);
    asked(link, Request::Put { entries: &entries, slices: &slices, copies: MemberSet::NONE }, |reply| {
        match reply {
            Reply::Stored { placements, .. } => Some(placements.to_vec()),
            _ => None,
        }
    })
}

/// Puts pages where there is room for them.
pub(super) fn put(
    link: &mut dyn Link,
    pages: impl IntoIterator<Item = u32>,
    round: u16,
) -> Result<Vec<Placement>> {
    Ok(put_some(link, pages, round)?.into_iter().map(|place| place.expect("there is room")).collect())
}

pub(super) fn get(link: &mut dyn Link, wanted: &[(u32, Placement)]) -> Result<Vec<Option<Vec<u8>>>> {
    let entries: Vec<GetEntry> = wanted
        .iter()
        .map(|(page, placement)| GetEntry { page: PageIndex(*page), placement: *placement })
        .collect();
    asked(link, Request::Get(&entries), |reply| match reply {
        Reply::Pages { entries, bytes } => Some(taken(entries, bytes)),
        _ => None,
    })
}

pub(super) fn taken(entries: &[PageEntry], mut bytes: &[u8]) -> Vec<Option<Vec<u8>>> {
    let mut out = Vec::new();
    for entry in entries {
        let (page, rest) = bytes.split_at(entry.encoded_bytes.into());
        bytes = rest;
        match entry.encoding {
            Encoding::Raw => {
                assert_eq!(entry.checksum, Checksum::of(page), "the checksum of {} is another", entry.page);
                out.push(Some(page.to_vec()));
            }
            Encoding::Gone => out.push(None),
            other => panic!("{other:?} in an answer"),
        }
    }
    assert!(bytes.is_empty(), "bytes are left over");
    out
}

pub(super) fn index(link: &mut dyn Link, entries: &[IndexEntry]) -> Result<()> {
    asked(link, Request::PutIndex(entries), |reply| matches!(reply, Reply::Indexed).then_some(()))
}

pub(super) fn locate(link: &mut dyn Link, first: u32, pages: u32) -> Result<Vec<IndexEntry>> {
    asked(link, Request::Locate(PageRange::new(PageIndex(first), pages)), |reply| match reply {
        Reply::Located(entries) => Some(entries.to_vec()),
        _ => None,
    })
}

pub(super) fn control(link: &mut dyn Link, request: &VmdRequest) -> Result<()> {
    asked(link, Request::Control(request), |reply| {
        matches!(reply, Reply::Control(VmdReply::Done)).then_some(())
    })
}

pub(super) fn describe(link: &mut dyn Link) -> Result<VolumeInfo> {
    asked(link, Request::Control(&VmdRequest::Describe), |reply| match reply {
        Reply::Control(VmdReply::Volume(info)) => Some(*info),
        _ => None,
    })
}

fn statistics(link: &mut dyn Link) -> NodeStatistics {
    asked(link, Request::Control(&VmdRequest::Statistics), |reply| match reply {
        Reply::Control(VmdReply::Statistics(statistics)) => Some(statistics),
        _ => None,
    })
    .expect("statistics")
}

pub(super) fn at(page: u32, round: u16, placement: Placement) -> IndexEntry {
    IndexEntry::at(PageIndex(page), Round(round), placement, Checksum::of(&content(page, round)))
}

pub(super) fn put_then_get(bench: &Bench<'_>) {
    let (node, volume, mut writer) = bench.one();
    let pages: Vec<u32> = (100..100 + limits::BATCH_PAGES as u32).rev().collect();
    let placements = put(&mut *writer, pages.iter().copied(), 0).expect("stored");
    let mut reader = bench.link(&*node, volume, 1);
    let wanted: Vec<_> = pages.iter().copied().zip(placements).collect();
    let got = get(&mut *reader, &wanted).expect("there");
    for (page, bytes) in pages.iter().zip(got) {
        assert!(bytes.as_deref() == Some(&content(*page, 0)[..]), "page {page}");
    }
    let largest: Vec<u32> = (1000..1000 + limits::BATCH_PAGES_MAX as u32).collect();
    let placements = put(&mut *writer, largest.iter().copied(), 0).expect("a whole 2 MiB unit");
    let wanted: Vec<_> = largest.iter().copied().zip(placements).collect();
    assert!(get(&mut *reader, &wanted).expect("there").iter().all(Option::is_some));
    let info = describe(&mut *reader).expect("known");
    assert_eq!(info.stored_pages, (limits::BATCH_PAGES + limits::BATCH_PAGES_MAX) as u64);
}

pub(super) fn placements_are_exact(bench: &Bench<'_>) {
    let (node, _, mut writer) = bench.one();
    let place = put(&mut *writer, [7], 0).expect("stored")[0];
    assert_ne!(place.generation, Generation(0));
    let other = bench.volume(&[&*node]).id();
    let mut stranger = bench.link(&*node, other, 1);
    assert_eq!(get(&mut *stranger, &[(7, place)]).expect("an answer"), [None], "another volume's page");
    let next = Generation(place.generation.0.wrapping_add(1).max(1));
    for (page, place) in [(8, place), (7, Placement { generation: next, ..place })] {
        assert_eq!(get(&mut *writer, &[(page, place)]).expect("an answer"), [None]);
    }
    // A slot that is used again has another generation: the old placement finds nothing.
    let entry = GetEntry { page: PageIndex(7), placement: place };
    asked(&mut *writer, Request::Drop(&[entry]), |reply| matches!(reply, Reply::Done).then_some(()))
        .expect("dropped");
    let again = put(&mut *writer, 0..limits::BATCH_PAGES as u32, 0).expect("stored");
    assert!(!again.contains(&place), "a generation came twice");
    assert_eq!(get(&mut *writer, &[(7, place)]).expect("an answer"), [None]);
}

pub(super) fn many_outstanding(bench: &Bench<'_>) {
    let (_node, _, mut link) = bench.one();
    let (batches, width) = (64_u32, 16_u32);
    let mut open = HashMap::new();
    for n in 0..batches {
        let (entries, slices) = batch(n * width..(n + 1) * width, 0);
        let ticket = link
            .submit(Request::Put { entries: &entries, slices: &slices, copies: MemberSet::NONE })
            .expect("queued");
        open.insert(ticket, n);
        let zeros = [IndexEntry::zero(PageIndex(n * 10), 10, Round(0))];
        let ticket = link.submit(Request::PutIndex(&zeros)).expect("queued");
        open.insert(ticket, batches + n);
    }
    assert!(link.outstanding_bytes() >= (batches * width) as usize * PAGE_BYTES);
    let (mut stored, deadline) = (Vec::new(), Instant::now() + PATIENCE);
    while !open.is_empty() {
        assert!(Instant::now() < deadline, "{} requests without an answer", open.len());
        link.progress(100_000).expect("open");
        while let Some(completion) = link.completion() {
            let n = open.remove(&completion.ticket).expect("a ticket that is open");
            match completion.result.expect("done") {
                Reply::Stored { placements, .. } => {
                    let pages = n * width..(n + 1) * width;
                    stored.extend(pages.zip(placements.iter().map(|place| place.expect("stored"))));
                }
                Reply::Indexed => assert!(n >= batches),
                other => panic!("{other:?}"),
            }
        }
        if !open.is_empty() {
            transport::wait(&[(link.poll_fd(), link.queued_bytes() > 0)], PATIENCE).expect("waited");
        }
    }
    assert_eq!((link.outstanding_bytes(), link.queued_bytes()), (0, 0));
    assert_eq!(stored.len() as u32, batches * width);
    let mut tickets = HashMap::new();
    for wanted in stored.chunks(width as usize) {
        let entries: Vec<GetEntry> = wanted
            .iter()
            .map(|(page, place)| GetEntry { page: PageIndex(*page), placement: *place })
            .collect();
        tickets.insert(link.submit(Request::Get(&entries)).expect("queued"), wanted.to_vec());
    }
    while !tickets.is_empty() {
        assert!(Instant::now() < deadline, "{} reads without an answer", tickets.len());
        link.progress(usize::MAX).expect("open");
        while let Some(completion) = link.completion() {
            let wanted = tickets.remove(&completion.ticket).expect("a ticket that is open");
            let Reply::Pages { entries, bytes } = completion.result.expect("done") else {
                panic!("no pages")
            };
            for ((page, _), got) in wanted.iter().zip(taken(entries, bytes)) {
                assert!(got.as_deref() == Some(&content(*page, 0)[..]), "page {page}");
            }
        }
        if !tickets.is_empty() {
            transport::wait(&[(link.poll_fd(), link.queued_bytes() > 0)], PATIENCE).expect("waited");
        }
    }
    assert!(link.path().received_bytes >= u64::from(batches * width) * PAGE_BYTES_U64);
}

pub(super) fn writes_are_metered(bench: &Bench<'_>) {
    let (_node, _, mut link) = bench.one();
    let (entries, slices) = batch(0..4, 0);
    link.submit(Request::Put { entries: &entries, slices: &slices, copies: MemberSet::NONE })
        .expect("queued");
    let queued = link.queued_bytes();
    assert!(queued >= 4 * PAGE_BYTES);
    assert_eq!(link.progress(0).expect("open"), 0);
    assert_eq!(link.progress(1000).expect("open"), 1000);
    assert_eq!(link.queued_bytes(), queued - 1000);
    assert!(link.completion().is_none());
    assert_eq!(link.progress(usize::MAX).expect("open"), queued - 1000);
}

pub(super) fn requests_are_bounded(bench: &Bench<'_>) {
    let (_node, _, mut link) = bench.one();
    let (entries, slices) = batch(0..2, 0);
    let put = |entries, slices, copies| Request::Put { entries, slices, copies };
    let one = MemberSet::NONE;
    refused(link.submit(put(&[], &[], one)), ErrorKind::Input);
    refused(link.submit(put(&entries, &slices[..1], one)), ErrorKind::Input);
    refused(link.submit(put(&entries, &slices, MemberSet::ALL)), ErrorKind::Input);
    refused(link.submit(put(&[PageEntry::zero(PageIndex(0), 1, Round(0))], &[], one)), ErrorKind::Input);
    refused(link.submit(Request::Get(&[])), ErrorKind::Input);
    let zeros = vec![IndexEntry::zero(PageIndex(0), 1, Round(0)); limits::INDEX_ENTRIES_MAX + 1];
    refused(link.submit(Request::PutIndex(&zeros)), ErrorKind::Input);
    refused(link.submit(Request::PutState(&vec![0; limits::STATE_BYTES_MAX + 1])), ErrorKind::Input);
    refused(link.submit(Request::PutPiece(0, &vec![0; limits::STATE_BYTES_MAX + 1])), ErrorKind::Input);
    assert_eq!(link.queued_bytes(), 0);
    // And an entry behind the volume's end is refused by the other side, which goes on.
    let behind = [IndexEntry::zero(PageIndex(VOLUME_PAGES - 1), 2, Round(0))];
    refused(index(&mut *link, &behind), ErrorKind::Protocol);
    index(&mut *link, &zeros[1..]).expect("as many as there may be");
}

pub(super) fn full_node(bench: &Bench<'_>) {
    let limit_pages = limits::BATCH_PAGES_MAX as u64;
    let node = bench.fixture.start(limit_pages * PAGE_BYTES_U64);
    let volume = bench.volume(&[&*node]).id();
    let mut link = bench.link(&*node, volume, 1);
    let (mut stored, mut first) = (Vec::new(), 0);
    let width = limits::BATCH_PAGES as u32 - 1;
    while u64::from(first) < limit_pages + 2 * u64::from(width) {
        let placements = put_some(&mut *link, first..first + width, 0).expect("an answer");
        stored.extend((first..).zip(placements).filter_map(|(page, place)| Some((page, place?))));
        first += width;
    }
    assert_eq!(stored.len() as u64, limit_pages);
    assert!(stored.iter().map(|(page, _)| *page).eq(0..limit_pages as u32), "first come, first served");
    assert_eq!(describe(&mut *link).expect("known").stored_pages, limit_pages);
    assert!(get(&mut *link, &stored[stored.len() - 64..]).expect("there").iter().all(Option::is_some));
    let gone: Vec<GetEntry> = stored[..width as usize]
        .iter()
        .map(|(page, place)| GetEntry { page: PageIndex(*page), placement: *place })
        .collect();
    asked(&mut *link, Request::Drop(&gone), |reply| matches!(reply, Reply::Done).then_some(()))
        .expect("dropped");
    put(&mut *link, first..first + width, 0).expect("room again");
}

pub(super) fn dropped_slots(bench: &Bench<'_>) {
    let (_node, _, mut link) = bench.one();
    let placements = put(&mut *link, 0..4, 0).expect("stored");
    let entries: Vec<IndexEntry> = (0..4).zip(&placements).map(|(page, place)| at(page, 0, *place)).collect();
    index(&mut *link, &entries).expect("indexed");
    let drop = [
        GetEntry { page: PageIndex(1), placement: placements[1] },
        // Not what lies there: left alone.
        GetEntry { page: PageIndex(9), placement: placements[2] },
    ];
    for _ in 0..2 {
        asked(&mut *link, Request::Drop(&drop), |reply| matches!(reply, Reply::Done).then_some(()))
            .expect("dropped");
    }
    let wanted: Vec<_> = (0..4).zip(placements).collect();
    let there: Vec<bool> = get(&mut *link, &wanted).expect("an answer").iter().map(Option::is_some).collect();
    assert_eq!(there, [true, false, true, true]);
    assert_eq!(locate(&mut *link, 0, 4).expect("an answer"), entries, "the index is left alone");
    assert_eq!(describe(&mut *link).expect("known").stored_pages, 3);
}

pub(super) fn rounds(bench: &Bench<'_>) {
    let (_node, _, mut link) = bench.one();
    let old = put(&mut *link, [5], 1).expect("stored")[0];
    let new = put(&mut *link, [5], 2).expect("stored")[0];
    let other = put(&mut *link, [5], 2).expect("stored")[0];
    index(&mut *link, &[at(5, 2, new)]).expect("indexed");
    index(&mut *link, &[at(5, 1, old)]).expect("taken, and ignored");
    assert_eq!(locate(&mut *link, 0, 10).expect("an answer"), [at(5, 2, new)]);
    index(&mut *link, &[at(5, 2, other)]).expect("indexed");
    assert_eq!(locate(&mut *link, 0, 10).expect("an answer"), [at(5, 2, other)], "the later of a round");
    let zero = IndexEntry::zero(PageIndex(4), 3, Round(3));
    index(&mut *link, &[zero]).expect("indexed");
    assert_eq!(locate(&mut *link, 0, 10).expect("an answer"), [zero]);
    index(&mut *link, &[at(5, 2, other)]).expect("taken, and ignored");
    assert_eq!(locate(&mut *link, 0, 10).expect("an answer"), [zero]);
}

pub(super) fn zero_runs(bench: &Bench<'_>) {
    let (_node, _, mut link) = bench.one();
    let run = |first, pages| IndexEntry::zero(PageIndex(first), pages, Round(0));
    index(&mut *link, &[run(0, VOLUME_PAGES)]).expect("indexed");
    assert_eq!(describe(&mut *link).expect("known").indexed_pages, u64::from(VOLUME_PAGES));
    assert_eq!(locate(&mut *link, 1000, 70_000).expect("an answer"), [run(1000, 70_000)]);
    let place = put(&mut *link, [5000], 0).expect("stored")[0];
    index(&mut *link, &[at(5000, 0, place)]).expect("indexed");
    assert_eq!(
        locate(&mut *link, 4990, 20).expect("an answer"),
        [run(4990, 10), at(5000, 0, place), run(5001, 9)]
    );
}

pub(super) fn locate_pages(bench: &Bench<'_>) {
    let (_node, _, mut link) = bench.one();
    let place = put(&mut *link, [0], 0).expect("stored")[0];
    let known: Vec<IndexEntry> =
        (0..limits::INDEX_ENTRIES_MAX as u32 + 100).map(|n| at_any(n * 2, place)).collect();
    for entries in known.chunks(1000) {
        index(&mut *link, entries).expect("indexed");
    }
    let all = known.len() as u32 * 2;
    let first = locate(&mut *link, 0, all).expect("an answer");
    assert_eq!(first.len(), limits::INDEX_ENTRIES_MAX);
    let next = first[first.len() - 1].page.0 + 1;
    let rest = locate(&mut *link, next, all - next).expect("an answer");
    assert!(first.iter().chain(&rest).eq(&known));
    assert_eq!(locate(&mut *link, all, 100).expect("an answer"), []);
}

/// An entry that says of any page that it is at `place`: an index believes its writer.
fn at_any(page: u32, place: Placement) -> IndexEntry {
    IndexEntry::at(PageIndex(page), Round(0), place, Checksum(page))
}

pub(super) fn discard(bench: &Bench<'_>) {
    let (_node, _, mut link) = bench.one();
    let old = put(&mut *link, 0..4, 1).expect("stored");
    let new = put(&mut *link, [1], 2).expect("stored")[0];
    let mut entries: Vec<IndexEntry> = (0..4).zip(&old).map(|(page, place)| at(page, 1, *place)).collect();
    entries[1] = at(1, 2, new);
    index(&mut *link, &entries).expect("indexed");
    let request = Request::Discard { range: PageRange::new(PageIndex(0), 3), below: Round(2) };
    asked(&mut *link, request, |reply| matches!(reply, Reply::Done).then_some(())).expect("discarded");
    assert_eq!(locate(&mut *link, 0, 4).expect("an answer"), [entries[1], entries[3]]);
    let wanted = [(0, old[0]), (1, old[1]), (1, new), (3, old[3])];
    let there: Vec<bool> = get(&mut *link, &wanted).expect("an answer").iter().map(Option::is_some).collect();
    assert_eq!(there, [false, false, true, true]);
}

pub(super) fn sealed(bench: &Bench<'_>) {
    let (_node, _, mut link) = bench.one();
    let place = put(&mut *link, [1], 0).expect("stored")[0];
    control(&mut *link, &VmdRequest::Commit).expect("committed");
    for _ in 0..2 {
        control(&mut *link, &VmdRequest::Seal).expect("sealed");
    }
    refused(put(&mut *link, [2], 0), ErrorKind::Volume);
    refused(index(&mut *link, &[at(1, 0, place)]), ErrorKind::Volume);
    refused(asked(&mut *link, Request::PutState(&[1]), |_| Some(())), ErrorKind::Volume);
    assert!(get(&mut *link, &[(1, place)]).expect("an answer")[0].is_some());
    let info = describe(&mut *link).expect("known");
    assert_eq!((info.state, info.committed), (VolumeState::Sealed, true));
}

pub(super) fn state_blob(bench: &Bench<'_>) {
    let (node, volume, mut link) = bench.one();
    let state = |link: &mut dyn Link| {
        asked(link, Request::GetState, |reply| match reply {
            Reply::State(state) => Some(state),
            _ => None,
        })
    };
    refused(state(&mut *link), ErrorKind::Volume);
    for length in [3_000_000_usize, 0, 5] {
        let blob: Vec<u8> = (0..length).map(|at| (at * 7 % 251) as u8).collect();
        asked(&mut *link, Request::PutState(&blob), |reply| matches!(reply, Reply::Done).then_some(()))
            .expect("stored");
        let mut reader = bench.link(&*node, volume, 1);
        assert!(state(&mut *reader).expect("there") == blob, "{length} bytes");
        assert!(describe(&mut *reader).expect("known").has_state);
    }
}

pub(super) fn pieces(bench: &Bench<'_>) {
    let (node, volume, mut link) = bench.one();
    let put = |link: &mut dyn Link, number, piece: &[u8]| {
        asked(link, Request::PutPiece(number, piece), |reply| matches!(reply, Reply::Done).then_some(()))
    };
    let piece = |link: &mut dyn Link, number| {
        asked(link, Request::GetPiece(number), |reply| match reply {
            Reply::State(piece) => Some(piece),
            _ => None,
        })
    };
    refused(piece(&mut *link, 0), ErrorKind::Volume);
    refused(put(&mut *link, 1, b"out of turn"), ErrorKind::Volume);
    let long: Vec<u8> = (0..3_000_000).map(|at| (at * 7 % 251) as u8).collect();
    for (number, bytes) in [(0, &long[..]), (1, b"one"), (2, b"two")] {
        put(&mut *link, number, bytes).expect("stored");
    }
    asked(&mut *link, Request::PutState(b"the vcpus"), |_| Some(())).expect("stored");
    let mut reader = bench.link(&*node, volume, 1);
    for (number, bytes) in [(2, &b"two"[..]), (0, &long), (1, b"one")] {
        assert!(piece(&mut *reader, number).expect("there") == bytes, "piece {number}");
    }
    // Said once more, it begins anew there.
    put(&mut *link, 1, b"another").expect("stored");
    assert_eq!(piece(&mut *reader, 1).expect("there"), b"another");
    refused(piece(&mut *reader, 2), ErrorKind::Volume);
    for number in [limits::FINAL_PIECES_MAX, u32::MAX] {
        refused(put(&mut *link, number, b""), ErrorKind::Volume);
        refused(piece(&mut *reader, number), ErrorKind::Volume);
    }
    control(&mut *link, &VmdRequest::Dissolve).expect("dissolved");
    refused(piece(&mut *reader, 0), ErrorKind::Volume);
}

pub(super) fn unknown_volume(bench: &Bench<'_>) {
    let node = bench.node();
    let mut link = bench.link(&*node, VolumeId(0xdead), 1);
    let place = Placement::from_bits(1 << 32).expect("a placement");
    refused(put(&mut *link, [1], 0), ErrorKind::Volume);
    refused(get(&mut *link, &[(1, place)]), ErrorKind::Volume);
    refused(locate(&mut *link, 0, 1), ErrorKind::Volume);
    refused(describe(&mut *link), ErrorKind::Volume);
    refused(control(&mut *link, &VmdRequest::Dissolve), ErrorKind::Volume);
    assert_eq!(statistics(&mut *link).volumes, []);
}

pub(super) fn dissolved(bench: &Bench<'_>) {
    let (node, volume, mut link) = bench.one();
    let place = put(&mut *link, [1], 0).expect("stored")[0];
    index(&mut *link, &[at(1, 0, place)]).expect("indexed");
    let before = statistics(&mut *link);
    assert_eq!(before.used_bytes, PAGE_BYTES_U64);
    assert_eq!(before.volumes.iter().map(|summary| summary.volume).collect::<Vec<_>>(), [volume]);
    for _ in 0..2 {
        control(&mut *link, &VmdRequest::Dissolve).expect("dissolved");
    }
    let after = statistics(&mut *link);
    assert_eq!((after.used_bytes, after.volumes.len()), (0, 0));
    refused(put(&mut *link, [1], 0), ErrorKind::Volume);
    refused(get(&mut *link, &[(1, place)]), ErrorKind::Volume);
    assert_eq!(describe(&mut *link).expect("remembered").state, VolumeState::Dissolved);
    let create = VmdRequest::Create { manifest: super::manifest(), members: vec![link.member().clone()] };
    refused(control(&mut *link, &create), ErrorKind::Volume);
    // Its slots serve another volume, which sees nothing of it.
    let other = bench.volume(&[&*node]).id();
    let mut stranger = bench.link(&*node, other, 1);
    put(&mut *stranger, [1], 0).expect("stored");
}

pub(super) fn killed_node(bench: &Bench<'_>) {
    let (mut node, _, mut link) = bench.one();
    put(&mut *link, [1], 0).expect("stored");
    node.kill();
    refused(put(&mut *link, [2], 0), ErrorKind::Unreachable);
    refused(link.progress(usize::MAX), ErrorKind::Unreachable);
    assert!(link.completion().is_none());
    let connector = bench.fixture.connector();
    let again = connector.connect(node.address(), VolumeId(1), Epoch(1), crate::vmd::Class::Bulk, PATIENCE);
    refused(again.map(|_| ()), ErrorKind::Unreachable);
}

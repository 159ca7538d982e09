//! Rules of a volume over several intermediaries: what the client above the links makes of them.

use std::net::SocketAddr;

use super::{Bench, VOLUME_PAGES, content, put_of, refused};
use crate::error::ErrorKind;
use crate::ids::{Epoch, MemberIndex, Round, VolumeId};
use crate::limits;
use crate::page::{PageIndex, PageRange};
use crate::vmd::Class;
use crate::vmd::device::{Fetched, PagePut, Role, Vmd, Volume};
use crate::wire::IndexEntry;
use crate::wire::message::VolumeState;

/// Pages that belong to different index owners.
fn spread(pages: u32) -> impl Iterator<Item = u32> {
    (0..pages).map(|n| n * (limits::INDEX_RANGE_PAGES / 2 + 1))
}

fn puts(pages: impl Iterator<Item = u32>, round: u16) -> Vec<PagePut> {
    pages.map(|page| put_of(page, round)).collect()
}

fn everything() -> PageRange {
    PageRange::new(PageIndex(0), VOLUME_PAGES)
}

#[track_caller]
fn check(volume: &dyn Volume, entries: &[IndexEntry], round: u16) {
    for (entry, got) in entries.iter().zip(volume.get(entries).expect("an answer")) {
        assert_eq!(got, Fetched::Bytes(content(entry.page.0, round).into()), "{}", entry.page);
    }
}

pub(super) fn found_through_any_member(bench: &Bench<'_>) {
    let nodes = [bench.node(), bench.node(), bench.node()];
    let writer = bench.volume(&nodes.each_ref().map(|node| &**node));
    let stored = writer.put(&puts(spread(100), 0), 1).expect("stored");
    let zeros = IndexEntry::zero(PageIndex(500_000), 5000, Round(0));
    writer.index(&[zeros]).expect("indexed");
    writer.put_state(b"the vcpus").expect("stored");
    let mut used: Vec<_> = stored.iter().filter_map(|entry| Some(entry.placement?.member)).collect();
    used.sort_unstable();
    used.dedup();
    assert!(used.len() > 1, "all pages went to one member");
    for node in &nodes {
        let reader = bench.client().open(writer.id(), Role::Reader, &[node.address()]).expect("found");
        assert_eq!(reader.members(), writer.members());
        let mut expected = stored.clone();
        expected.push(zeros);
        assert_eq!(reader.locate(everything()).expect("an answer"), expected);
        check(&*reader, &stored, 0);
        assert_eq!(reader.get(&[zeros]).expect("an answer"), [Fetched::Zero]);
        assert_eq!(reader.get_state().expect("there"), b"the vcpus");
        refused(reader.put(&puts(0..1, 0), 1), ErrorKind::Input);
    }
    refused(
        bench.client().open(VolumeId(1), Role::Reader, &[nodes[0].address()]).map(|_| ()),
        ErrorKind::Volume,
    );
}

pub(super) fn member_dies(bench: &Bench<'_>) {
    let mut nodes = [bench.node(), bench.node(), bench.node()];
    let volume = bench.volume(&nodes.each_ref().map(|node| &**node));
    let before = volume.put(&puts(spread(64 * 6), 0), 1).expect("stored");
    nodes[1].kill();
    let after = volume.put(&puts(spread(64 * 6), 1), 1).expect("stored elsewhere");
    assert!(after.iter().all(|entry| entry.placement.is_some_and(|place| place.member != MemberIndex(1))));
    check(&*volume, &after, 1);
    assert_eq!(volume.locate(everything()).expect("an answer"), after);
    assert_eq!(volume.alive(), [true, false, true]);
    for (entry, got) in before.iter().zip(volume.get(&before).expect("an answer")) {
        let lost = entry.placement.is_some_and(|place| place.member == MemberIndex(1));
        assert_eq!(got == Fetched::Lost, lost, "{}", entry.page);
    }
    assert_eq!(volume.commit().expect("two are left"), 2);
    nodes[0].kill();
    nodes[2].kill();
    refused(volume.put(&puts(0..1, 0), 1), ErrorKind::Unreachable);
    refused(volume.commit(), ErrorKind::Unreachable);
    refused(volume.locate(everything()), ErrorKind::Unreachable);
}

pub(super) fn member_restarts(bench: &Bench<'_>) {
    let mut nodes = [bench.node(), bench.node()];
    let volume = bench.volume(&nodes.each_ref().map(|node| &**node));
    volume.put(&puts(spread(128), 0), 1).expect("stored");
    nodes[0].kill();
    nodes[0].restart();
    let stored = volume.put(&puts(spread(128), 1), 1).expect("stored");
    assert!(stored.iter().all(|entry| entry.placement.is_some_and(|place| place.member == MemberIndex(1))));
    assert_eq!(volume.alive(), [false, true]);
    refused(volume.link(MemberIndex(0), Class::Urgent).map(|_| ()), ErrorKind::Unreachable);
    volume.link(MemberIndex(1), Class::Urgent).expect("a link");
    // It may come back as a new member.
    volume.grow(&[nodes[0].address()]).expect("added");
    assert_eq!(volume.alive(), [false, true, true]);
    assert_eq!(volume.members()[0].node.name, volume.members()[2].node.name);
}

pub(super) fn scan(bench: &Bench<'_>) {
    let nodes = [bench.node(), bench.node()];
    let volume = bench.volume(&nodes.each_ref().map(|node| &**node));
    let stored = volume.put(&puts(spread(300), 0), 1).expect("stored");
    let mut seen = Vec::new();
    let mut visit = |entry: &IndexEntry| {
        seen.push(*entry);
        Ok(())
    };
    volume.scan(&mut visit).expect("scanned");
    assert_eq!(seen, stored);
}

pub(super) fn grows(bench: &Bench<'_>) {
    let nodes = [bench.node(), bench.node(), bench.node()];
    let volume = bench.volume(&[&*nodes[0]]);
    let early = volume.put(&puts(spread(64), 0), 1).expect("stored");
    let all: Vec<SocketAddr> = nodes.iter().map(|node| node.address()).collect();
    volume.grow(&all).expect("added");
    assert_eq!(volume.members().len(), 3);
    let late = volume.put(&puts(spread(256), 1), 1).expect("stored");
    assert!(late.iter().any(|entry| entry.placement.is_some_and(|place| place.member == MemberIndex(2))));
    for node in &nodes {
        let reader = bench.client().open(volume.id(), Role::Reader, &[node.address()]).expect("found");
        assert_eq!(reader.members(), volume.members());
        assert_eq!(
            reader.locate(everything()).expect("an answer"),
            late,
            "the newer round, wherever it lies"
        );
        check(&*reader, &early, 0);
    }
    volume.discard(everything(), Round(1)).expect("discarded");
    assert!(volume.get(&early).expect("an answer").iter().all(|got| *got == Fetched::Lost));
}

pub(super) fn states_everywhere(bench: &Bench<'_>) {
    let nodes = [bench.node(), bench.node()];
    let addresses = nodes.each_ref().map(|node| node.address());
    let writer = bench.volume(&nodes.each_ref().map(|node| &**node));
    let (id, stored) = (writer.id(), writer.put(&puts(spread(10), 0), 1).expect("stored"));
    bench
        .client()
        .create(id, Epoch::FIRST, &super::manifest(), &addresses)
        .expect("made again, it is the same");
    assert_eq!(writer.commit().expect("committed"), 2);
    assert_eq!(writer.seal().expect("sealed"), 2);
    let stands = |volume: &dyn Volume| -> Vec<(VolumeState, bool, Epoch)> {
        let info = volume.describe().into_iter().map(|info| info.expect("known"));
        info.map(|info| (info.state, info.committed, info.epoch)).collect()
    };
    assert_eq!(stands(&*writer), [(VolumeState::Sealed, true, Epoch(1)); 2]);
    let owner = bench.client().open(id, Role::Reader, &addresses).expect("found");
    assert_eq!(owner.claim(Epoch(2)).expect("claimed"), 2);
    assert_eq!(stands(&*owner), [(VolumeState::Claimed, true, Epoch(2)); 2]);
    check(&*owner, &stored, 0);
    refused(writer.claim(Epoch(2)), ErrorKind::Fenced);
    refused(writer.get(&stored), ErrorKind::Fenced);
    refused(writer.locate(everything()), ErrorKind::Fenced);
    refused(bench.client().open(id, Role::Writer(Epoch(1)), &addresses).map(|_| ()), ErrorKind::Fenced);
    assert_eq!(owner.dissolve().expect("dissolved"), 2);
    for address in addresses {
        let statistics = bench.client().statistics(address).expect("statistics");
        assert_eq!((statistics.used_bytes, statistics.volumes.len()), (0, 0));
    }
}

pub(super) fn writers_succeed(bench: &Bench<'_>) {
    let nodes = [bench.node(), bench.node()];
    let addresses = nodes.each_ref().map(|node| node.address());
    let old = bench.volume(&nodes.each_ref().map(|node| &**node));
    let stored = old.put(&puts(spread(10), 0), 1).expect("stored");
    refused(
        bench.client().open(old.id(), Role::Reader, &addresses).and_then(|r| r.succeed(Epoch(2))),
        ErrorKind::Input,
    );
    let new = bench.client().open(old.id(), Role::Writer(Epoch(2)), &addresses).expect("found");
    refused(new.put(&puts(spread(10), 1), 1), ErrorKind::Volume);
    assert_eq!(new.succeed(Epoch(2)).expect("succeeded"), 2);
    refused(new.succeed(Epoch(2)), ErrorKind::Fenced);
    check(&*new, &stored, 0);
    let again = new.put(&puts(spread(10), 1), 1).expect("it writes");
    refused(old.put(&puts(spread(10), 2), 1), ErrorKind::Fenced);
    refused(old.index(&stored), ErrorKind::Fenced);
    refused(old.get(&stored), ErrorKind::Fenced);
    assert_eq!(new.locate(everything()).expect("an answer"), again);
    assert_eq!(new.seal().expect("sealed"), 2);
    let late = bench.client().open(old.id(), Role::Writer(Epoch(3)), &addresses).expect("found");
    refused(late.succeed(Epoch(3)), ErrorKind::Volume);
}

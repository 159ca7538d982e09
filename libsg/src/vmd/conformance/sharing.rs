//! Rules of volumes that share pages: stored once, and each one's own.

use super::{Bench, FixtureNode, PATIENCE, PLENTY_BYTES, asked, content, manifest, put_of};
use crate::content::{ContentHasher, HashKind, Sharing, colliding_pages};
use crate::ids::{Checksum, Epoch, MemberIndex, Round, VolumeId};
use crate::memory::PageSlice;
use crate::page::{PAGE_BYTES_U64, PageIndex, PageRange};
use crate::vmd::device::{Fetched, PagePut, PageReference, Shared, Vmd, Volume};
use crate::vmd::link::{Class, Reply, Request};
use crate::wire::message::VmdRequest;
use crate::wire::{HintEntry, ReferEntry, Referral};

fn sharing(hash: HashKind, domain: &str) -> Sharing {
    Sharing { hash, domain: domain.into() }
}

pub(super) fn tenant() -> Sharing {
    sharing(HashKind::Blake3, "tenant")
}

pub(super) fn volume(bench: &Bench<'_>, nodes: &[&dyn FixtureNode], sharing: &Sharing) -> Box<dyn Volume> {
    let addresses: Vec<_> = nodes.iter().map(|node| node.address()).collect();
    let id = VolumeId::random().expect("random bytes");
    let manifest = crate::manifest::Manifest { sharing: Some(sharing.clone()), ..manifest() };
    bench.client().create(id, Epoch::FIRST, &manifest, &addresses).expect("a volume")
}

fn reference(hasher: &ContentHasher, page: u32, bytes: &[u8]) -> PageReference {
    let (checksum, hash) = (Checksum::of(bytes), hasher.hash(bytes));
    PageReference { page: PageIndex(page), round: Round(0), checksum, hash }
}

fn offer(volume: &dyn Volume, hasher: &ContentHasher, page: u32, bytes: &[u8]) -> Shared {
    volume.put_by_reference(&[reference(hasher, page, bytes)]).expect("an answer")[0]
}

pub(super) fn used_pages(bench: &Bench<'_>, node: &dyn FixtureNode) -> u64 {
    bench.client().statistics(node.address()).expect("statistics").used_bytes / PAGE_BYTES_U64
}

pub(super) fn stored_once(bench: &Bench<'_>) {
    let nodes = [bench.node(), bench.node()];
    let nodes = nodes.each_ref().map(|node| &**node);
    let hasher = bench.fixture.connector().hasher(&tenant());
    let (a, b) = (volume(bench, &nodes, &tenant()), volume(bench, &nodes, &tenant()));
    let (pages, others) = (0..100_u32, 1000..1100_u32);
    let puts: Vec<PagePut> = pages.clone().map(|page| put_of(page, 0)).collect();
    let at_a = a.put(&puts[..50], 1).expect("stored");
    let at_a: Vec<_> = at_a.into_iter().chain(a.put(&puts[50..], 1).expect("stored")).collect();
    // The same bytes as other pages.
    let offers: Vec<PageReference> =
        pages.clone().zip(others).map(|(page, other)| reference(&hasher, other, &content(page, 0))).collect();
    let answers = b.put_by_reference(&offers).expect("an answer");
    let at_b: Vec<_> = answers
        .iter()
        .map(|answer| match answer {
            Shared::Have(entry) => *entry,
            other => panic!("{other:?} of a page that is there"),
        })
        .collect();
    assert_eq!(used_pages(bench, nodes[0]) + used_pages(bench, nodes[1]), 100, "stored once");
    assert_eq!(b.locate(PageRange::new(PageIndex(0), super::VOLUME_PAGES)).expect("an answer"), at_b);
    let check = |volume: &dyn Volume, entries: &[_]| {
        for (page, got) in pages.clone().zip(volume.get(entries).expect("an answer")) {
            assert_eq!(got, Fetched::Bytes(content(page, 0).into()), "page {page}");
        }
    };
    check(&*a, &at_a);
    check(&*b, &at_b);
    assert!(b.get(&at_a).expect("an answer").iter().all(|got| *got == Fetched::Lost), "not its pages");
    a.dissolve().expect("dissolved");
    check(&*b, &at_b);
    assert_eq!(used_pages(bench, nodes[0]) + used_pages(bench, nodes[1]), 100);
    b.dissolve().expect("dissolved");
    assert_eq!(used_pages(bench, nodes[0]) + used_pages(bench, nodes[1]), 0);
}

pub(super) fn domains_are_apart(bench: &Bench<'_>) {
    let node = bench.node();
    let connector = bench.fixture.connector();
    let a = volume(bench, &[&*node], &tenant());
    a.put(&[put_of(1, 0)], 1).expect("stored");
    let others = [sharing(HashKind::Blake3, "other"), sharing(HashKind::Sha1, "tenant")];
    for other in &others {
        let stranger = volume(bench, &[&*node], other);
        let hashers = [connector.hasher(&tenant()), connector.hasher(other)];
        for hasher in &hashers {
            assert_eq!(offer(&*stranger, hasher, 1, &content(1, 0)), Shared::Send, "{other:?}");
        }
    }
    let alone = bench.volume(&[&*node]);
    assert_eq!(
        offer(&*alone, &connector.hasher(&tenant()), 1, &content(1, 0)),
        Shared::Send,
        "it does not share"
    );
}

pub(super) fn one_sends(bench: &Bench<'_>) {
    let node = bench.node();
    let hasher = bench.fixture.connector().hasher(&tenant());
    let (a, b) = (volume(bench, &[&*node], &tenant()), volume(bench, &[&*node], &tenant()));
    assert_eq!(offer(&*a, &hasher, 1, &content(1, 0)), Shared::Send);
    assert_eq!(offer(&*b, &hasher, 2, &content(1, 0)), Shared::Pending);
    let entry = a.put(&[put_of(1, 0)], 1).expect("stored")[0];
    let Shared::Have(other) = offer(&*b, &hasher, 2, &content(1, 0)) else { panic!("it is there") };
    assert_eq!(other.placement, entry.placement);
}

pub(super) fn hints(bench: &Bench<'_>) {
    let nodes = [bench.node(), bench.node()];
    let (a, b) = (
        volume(bench, &[&*nodes[0], &*nodes[1]], &tenant()),
        // Another order of the same.
        volume(bench, &[&*nodes[1], &*nodes[0]], &tenant()),
    );
    let alone = volume(bench, &[&*nodes[0]], &tenant());
    let hash = bench.fixture.connector().hasher(&tenant()).hash(&content(1, 0));
    let refer = |volume: &dyn Volume| {
        let mut link = bench.link(&*nodes[0], volume.id(), 1);
        let offers = [ReferEntry { page: PageIndex(1), round: Round(0), hash }];
        let answers = asked(&mut *link, Request::Refer(&offers), |reply| match reply {
            Reply::Referred(referrals) => Some(referrals[0]),
            _ => None,
        });
        answers.expect("an answer")
    };
    let mut link = bench.link(&*nodes[0], a.id(), 1);
    let hint = |member| HintEntry { hash, member: MemberIndex(member) };
    let done = |reply: Reply<'_>| matches!(reply, Reply::Done).then_some(());
    asked(&mut *link, Request::Hint(&[hint(0)]), done).expect("noted");
    assert_eq!(refer(&*a), Referral::Send, "of oneself one needs no hint");
    asked(&mut *link, Request::Hint(&[hint(1)]), done).expect("noted");
    assert_eq!(refer(&*a), Referral::At(MemberIndex(1)));
    assert_eq!(refer(&*b), Referral::At(MemberIndex(0)), "each in his own numbers");
    assert_eq!(refer(&*alone), Referral::Send, "it is none of his members");
    super::refused(asked(&mut *link, Request::Hint(&[hint(2)]), done), crate::error::ErrorKind::Protocol);
}

pub(super) fn collisions(bench: &Bench<'_>) {
    let node = bench.node();
    for hash in [HashKind::Blake3, HashKind::Sha1] {
        let sharing = sharing(hash, "tenant");
        let hasher = bench.fixture.connector().hasher(&sharing);
        let (a, b) = (volume(bench, &[&*node], &sharing), volume(bench, &[&*node], &sharing));
        let [mine, theirs] = colliding_pages();
        let (checksum, bytes) = (Checksum::of(&theirs), PageSlice::owned(theirs.clone().into()));
        a.put(&[PagePut { page: PageIndex(1), round: Round(0), checksum, bytes }], 1).expect("stored");
        let Shared::Have(same) = offer(&*b, &hasher, 2, &theirs) else { panic!("it is there") };
        assert_eq!(b.get(&[same]).expect("an answer"), [Fetched::Bytes(theirs.into())]);
        match (hash, offer(&*b, &hasher, 1, &mine)) {
            (HashKind::Blake3, Shared::Send) => {}
            // SHA-1 cannot tell them apart; whoever reads can.
            (HashKind::Sha1, Shared::Have(entry)) => {
                assert_eq!(b.get(&[entry]).expect("an answer"), [Fetched::Lost]);
            }
            (_, other) => panic!("{other:?} under {hash:?}"),
        }
    }
}

pub(super) fn own_until_given_back(bench: &Bench<'_>) {
    let node = bench.fixture.start(PLENTY_BYTES);
    let hasher = bench.fixture.connector().hasher(&tenant());
    let (a, b, c) = (
        volume(bench, &[&*node], &tenant()),
        volume(bench, &[&*node], &tenant()),
        volume(bench, &[&*node], &tenant()),
    );
    let entry = a.put(&[put_of(1, 0)], 1).expect("stored")[0];
    // A session that breaks in the middle takes nothing from anybody, and what it took stays its volume's.
    let mut link = bench.link(&*node, b.id(), 1);
    let offers = [ReferEntry { page: PageIndex(5), round: Round(0), hash: hasher.hash(&content(1, 0)) }];
    let answer = asked(&mut *link, Request::Refer(&offers), |reply| match reply {
        Reply::Referred(referrals) => Some(referrals.to_vec()),
        _ => None,
    });
    let Referral::Have(placement) = answer.expect("an answer")[0] else { panic!("it is there") };
    let half = vec![offers[0]; 64];
    link.submit(Request::Refer(&half)).expect("queued");
    link.progress(40).expect("a part of a frame");
    drop(link);
    let Shared::Have(mine) = offer(&*c, &hasher, 9, &content(1, 0)) else { panic!("it is there") };
    a.drop_slots(&[crate::wire::GetEntry { page: entry.page, placement }]).expect("dropped");
    assert_eq!(a.get(&[entry]).expect("an answer"), [Fetched::Lost]);
    a.dissolve().expect("dissolved");
    b.discard(PageRange::new(PageIndex(0), 3), Round(9)).expect("discarded");
    let at_b = crate::wire::IndexEntry { page: PageIndex(5), ..mine };
    for (volume, entry) in [(&b, at_b), (&c, mine)] {
        assert_eq!(volume.get(&[entry]).expect("an answer"), [Fetched::Bytes(content(1, 0).into())]);
    }
    b.discard(PageRange::new(PageIndex(5), 1), Round(9)).expect("discarded");
    assert_eq!(b.get(&[at_b]).expect("an answer"), [Fetched::Lost]);
    assert_eq!(c.get(&[mine]).expect("an answer"), [Fetched::Bytes(content(1, 0).into())]);
    let mut link = bench
        .fixture
        .connector()
        .connect(node.address(), c.id(), Epoch(1), Class::Bulk, PATIENCE)
        .expect("a link");
    asked(&mut *link, Request::Control(&VmdRequest::Dissolve), |_| Some(())).expect("dissolved");
    assert_eq!(used_pages(bench, &*node), 0);
}

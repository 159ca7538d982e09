//! The fuzz targets of `libsg/fuzz` on the stable toolchain: valid bytes, mutated by seed.
//!
//! `SG_FUZZ_SECONDS` says for how long (half a second a target without it), `SG_FUZZ_SEED` with which seed.

#[path = "../fuzz/src/targets.rs"]
mod targets;

use std::net::SocketAddr;
use std::path::Path;

use libsg::ErrorKind;
use libsg::content::ContentHash;
use libsg::ids::{
    Checksum, Epoch, Generation, MemberIndex, MemberSet, NodeId, Placement, Round, Sequence, SlotIndex,
    VolumeId,
};
use libsg::manifest::{Manifest, Region};
use libsg::page::{InstallUnit, PAGE_BYTES, PageIndex, PageRange};
use libsg::wire::access::{AccessKey, KeyEntry, Settled};
use libsg::wire::announcement::{Announcement, Duty, LinkRoom, MemoryRoom, Transports};
use libsg::wire::datagram::{Datagram, Said};
use libsg::wire::entry::{Entry, encode_table};
use libsg::wire::final_set::{self, Blobs};
use libsg::wire::handover::Leaving;
use libsg::wire::handshake::{Challenge, Hello, PoolKey, Purpose};
use libsg::wire::link_use::{LinkUse, LocalTraffic};
use libsg::wire::mending::Mending;
use libsg::wire::message::{
    self, Member, NodeStatistics, Rounds, Talk, VmdReply, VmdRequest, VolumeInfo, VolumeState, VolumeSummary,
};
use libsg::wire::parking::{Claim, Parking, Verdict};
use libsg::wire::run::{RunEntry, encode_runs};
use libsg::wire::{
    Credit, DiscardEntry, GetEntry, Header, HintEntry, IndexEntry, Kind, Missing, MovedEntry, PageEntry,
    ReferEntry, Referral,
};
use test_support::fuzz;

const TARGETS: [fuzz::Target; 10] = [
    ("header", targets::header, headers),
    ("tables", targets::tables, tables),
    ("pages", targets::pages, pages),
    ("messages", targets::messages, messages),
    ("handshake", targets::handshake, handshakes),
    ("stream", targets::stream, streams),
    ("final_set", targets::final_set, final_sets),
    ("datagram", targets::datagram, datagrams),
    ("credit", targets::credit, credits),
    ("access", targets::access, accesses),
];

#[test]
fn no_bytes_break_a_decoder() {
    fuzz::no_bytes_break(&TARGETS);
}

/// `cargo fuzz` runs what is a binary of the fuzz crate, which is built nowhere else.
#[test]
fn every_target_is_a_binary_of_the_fuzz_crate() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    fuzz::are_binaries(&TARGETS, &directory, "libsg_fuzz");
}

fn placement() -> Placement {
    Placement { member: MemberIndex(1), slot: SlotIndex(77), generation: Generation(3) }
}

fn headers() -> Vec<Vec<u8>> {
    [Kind::Hello, Kind::Put, Kind::GetReply, Kind::Talk, Kind::State, Kind::Ping, Kind::Drop, Kind::Copy]
        .map(|kind| {
            let header = Header {
                volume: VolumeId(7),
                epoch: Epoch(1),
                sequence: Sequence(9),
                count: 1,
                delay_us: Some(100),
                ..Header::new(kind)
            };
            header.encode().to_vec()
        })
        .to_vec()
}

fn counted<E: Entry>(entries: &[E]) -> Vec<u8> {
    let mut bytes = (entries.len() as u16).to_le_bytes().to_vec();
    encode_table(entries.iter().copied(), &mut bytes);
    bytes
}

fn runs<E: RunEntry>(entries: &[E]) -> Vec<u8> {
    let mut table = Vec::new();
    let count = encode_runs(entries.iter().copied(), &mut table) as u16;
    [&count.to_le_bytes()[..], &table].concat()
}

fn page_entries() -> [PageEntry; 3] {
    [
        PageEntry::raw(PageIndex(5), Round(1), Checksum(9)),
        PageEntry::zero(PageIndex(6), 20, Round(0)),
        PageEntry::gone(PageIndex(8)),
    ]
}

fn tables() -> Vec<Vec<u8>> {
    let range = PageRange::new(PageIndex(3), 4);
    let next = Placement { slot: SlotIndex(placement().slot.0 + 1), ..placement() };
    vec![
        runs(&page_entries()),
        runs(&[
            IndexEntry::at(PageIndex(5), Round(1), placement(), Checksum(9)),
            IndexEntry::at(PageIndex(6), Round(1), next, Checksum(8)),
            IndexEntry::zero(PageIndex(7), 70_000, Round(0)),
        ]),
        runs(&[GetEntry { page: PageIndex(5), placement: placement() }; 2]),
        runs(&[(5, placement()), (6, next)].map(|(n, placement)| GetEntry { page: PageIndex(n), placement })),
        counted(&[DiscardEntry { range, below: Round(2) }]),
        counted(&[range; 3]),
        counted(&[PageIndex(1), PageIndex(2)]),
        counted(&[MemberSet(5), MemberSet::ALL]),
        counted(&[ReferEntry { page: PageIndex(5), round: Round(1), hash: ContentHash([7; 20]) }; 2]),
        counted(&[MovedEntry { page: PageIndex(5), from: placement(), to: placement() }; 2]),
        counted(&[HintEntry { hash: ContentHash([7; 20]), member: MemberIndex(63) }; 2]),
        counted(&[
            Referral::Have(placement()),
            Referral::Send,
            Referral::Pending,
            Referral::At(MemberIndex(3)),
        ]),
        counted(&[Missing { full: MemberSet(1), lost: MemberSet(6) }]),
        counted(&[key_entry(); 2]),
        counted(&[Settled { lease: 9, copies: MemberSet(3) }]),
        runs(&[Some(placement()), Some(next), None]),
        runs(&[(5, placement()), (9, next)].map(|(n, placement)| GetEntry { page: PageIndex(n), placement })),
        runs(&[
            IndexEntry::at(PageIndex(5), Round(1), placement(), Checksum(9)),
            IndexEntry::at(PageIndex(9), Round(1), next, Checksum(8)),
        ]),
        runs(&[3, 9, 60].map(|page| IndexEntry::zero(PageIndex(page), 2, Round(0)))),
    ]
}

fn key_entry() -> KeyEntry {
    let key = AccessKey::decode(&[7; 16]).expect("fits");
    KeyEntry { first: SlotIndex(512), slots: 512, key }
}

fn accesses() -> Vec<Vec<u8>> {
    let raw = |page| PageEntry::raw(PageIndex(page), Round(0), Checksum(1));
    let mut leased = runs(&[Some(placement()), None]);
    let mut reached = runs(&[raw(0), PageEntry::gone(PageIndex(1))]);
    for granted in [&mut leased, &mut reached] {
        encode_table([key_entry(); 2], granted);
    }
    let mut settled = runs(&[raw(0), raw(1), raw(9)]);
    let table = settled.split_off(2);
    encode_table([Settled { lease: 9, copies: MemberSet(3) }], &mut settled);
    settled.extend(table);
    vec![leased, reached, settled, vec![1; 40]]
}

fn pages() -> Vec<Vec<u8>> {
    let raw = |page| PageEntry::raw(PageIndex(page), Round(0), Checksum(1));
    let mut one = runs(&page_entries());
    one.extend([7; PAGE_BYTES]);
    let mut two = runs(&[raw(0), raw(5)]);
    two.extend([7; 2 * PAGE_BYTES]);
    vec![one, two, runs(&[PageEntry::zero(PageIndex(0), 1, Round(0)); 5])]
}

fn manifest() -> Manifest {
    let region = Region {
        name: "ram".into(),
        guest_address: Some(1 << 32),
        length_bytes: 4 << 20,
        unit: InstallUnit::Huge2M,
    };
    Manifest { vm: "web-7".into(), regions: vec![region; 2], vm_config: vec![1; 20], sharing: None }
}

fn members() -> Vec<Member> {
    let member = |at: u8| Member {
        node: NodeId { name: format!("rack{at}"), incarnation: u64::MAX - u64::from(at) },
        address: SocketAddr::from(([10, 0, 0, at], 7701)),
    };
    (0..3).map(member).collect()
}

fn messages() -> Vec<Vec<u8>> {
    let talks = [
        Talk::Offer { manifest: manifest(), members: members(), elapsed_us: 5, rounds: Rounds::Installed },
        Talk::StateEnd { bytes: 1 << 20, checksum: 7 },
        Talk::Progress { held_pages: 1, faults: 2, direct_bytes: 3, gathered_bytes: 4 },
        Talk::Abort { kind: ErrorKind::Full, reason: "no room".into() },
        Talk::Lost(vec![PageRange::new(PageIndex(1), 2)]),
        Talk::Members(members()),
        Talk::Written { round: Round(3), runs: vec![PageRange::new(PageIndex(1), 2)], last: true },
    ];
    let node = || members()[0].node.clone();
    let arbiter = Some("etcd://10.0.0.1/sg".into());
    let parking = Parking { name: "web".into(), keeper: node(), term: 2, arbiter };
    let requests = [
        VmdRequest::Create { manifest: manifest(), members: members() },
        VmdRequest::PutState { bytes: 5, checksum: 6 },
        VmdRequest::PutPiece { number: 1, bytes: 5, checksum: 6 },
        VmdRequest::Claim { epoch: Epoch(9) },
        VmdRequest::Park(parking.clone()),
        VmdRequest::ClaimParked(Claim { epoch: Epoch(9), by: node(), force: true }),
        VmdRequest::Succeed { epoch: Epoch(9) },
        VmdRequest::Copies(3),
        VmdRequest::Fence,
    ];
    let (volume, state) = (VolumeId(u128::MAX), VolumeState::Sealed);
    let info = VolumeInfo {
        volume,
        manifest: manifest(),
        members: members(),
        epoch: Epoch(3),
        state,
        committed: true,
        has_state: false,
        stored_pages: 9,
        copied_pages: 4,
        indexed_pages: 10,
        age_s: 11,
        parking: Some(parking),
        owner: Some(node()),
        mending: Mending { copies: 2, away_members: 1, missing_copies: None },
    };
    let summary = VolumeSummary {
        volume,
        vm: "web-7".into(),
        state,
        committed: false,
        stored_pages: 1,
        copied_pages: 1,
        age_s: 2,
        parked_as: Some("web".into()),
        owner: Some(node()),
        mending: Mending { copies: 2, away_members: 1, missing_copies: None },
    };
    let statistics = NodeStatistics {
        node: members()[0].node.clone(),
        zone: Some("z".into()),
        limit_bytes: 1,
        used_bytes: 2,
        arena_bytes: 3,
        bytes_in: 4,
        bytes_out: 5,
        touched_bytes: 9,
        leased_slots: 10,
        link: LinkUse {
            limit_in_bytes_per_s: 7,
            limit_out_bytes_per_s: 0,
            local: Some(LocalTraffic { in_bytes_per_s: 8, out_bytes_per_s: 9 }),
        },
        connections: 6,
        volumes: vec![summary; 2],
        leaving: Some(Leaving { handed_pages: 7, left_pages: 8 }),
    };
    let replies = [
        VmdReply::Volume(Box::new(info)),
        VmdReply::Statistics(statistics),
        VmdReply::State { bytes: 1, checksum: 2 },
        VmdReply::Verdict(Verdict::Claimed { by: node(), for_ms: 5 }),
    ];
    let talks = talks.iter().map(message::encode);
    let requests = requests.iter().map(message::encode);
    let replies = replies.iter().map(message::encode);
    talks.chain(requests).chain(replies).map(|bytes| bytes.expect("fits")).collect()
}

fn handshakes() -> Vec<Vec<u8>> {
    let hello = Hello { version_min: 1, version_max: 2, purpose: Purpose::VmdBulk, nonce: [5; 32] };
    let challenge = Challenge { version: 1, nonce: [6; 32], node: members()[0].node.clone() };
    vec![hello.encode().to_vec(), challenge.encode().expect("fits"), vec![9; 32]]
}

fn credits() -> Vec<Vec<u8>> {
    [None, Some(125_000_000)].map(|pace| Credit { limit: 1 << 40, pace }.encode().to_vec()).to_vec()
}

/// Without their seals: the target puts them on again.
fn datagrams() -> Vec<Vec<u8>> {
    let key = PoolKey::derive(b"of the fuzzed pool").announcement_key();
    let here = |zone: Option<&str>, duty| Said::Here {
        period_ms: 1000,
        host: Announcement {
            node: members()[0].node.clone(),
            address: members()[0].address,
            zone: zone.map(str::to_owned),
            duty,
            transports: Transports::TCP,
            memory: MemoryRoom { host_bytes: 4, available_bytes: 3, limit_bytes: 2, used_bytes: 1 },
            link: LinkRoom { bytes_per_s: 1 << 40, free_in_bytes_per_s: 1 << 20, ..LinkRoom::default() },
            cpu_idle_permille: 1000,
            connections_free: 1024,
            volumes_free: 4096,
        },
    };
    [here(Some("rack7"), Duty::Lends), here(None, Duty::Leaves), Said::WhoIsThere]
        .map(|said| {
            let mut bytes = Datagram { counter: 7, sent_ms: 1 << 40, said }.encode(&key).expect("in bounds");
            bytes.truncate(bytes.len() - 32);
            bytes
        })
        .to_vec()
}

fn final_sets() -> Vec<Vec<u8>> {
    let runs = [(0, 1, 1), (1, 2, 1), (100, 512, 3), (9000, 1, 7)];
    let runs = runs.map(|(first, pages, round)| (PageRange::new(PageIndex(first), pages), Round(round)));
    let blob = |blob: Vec<u8>| [&(blob.len() as u16).to_le_bytes()[..], &blob].concat();
    let behind = |pages: u32, blobs: Vec<u8>| [&pages.to_le_bytes()[..], &blobs].concat();
    let limits = final_set::Limits { runs_bytes: 4, ..final_set::Limits::default() };
    let Blobs { pieces, state } =
        final_set::encode_within(limits, runs.into_iter(), b"vcpu").expect("it fits");
    vec![
        behind(9001, blob(final_set::encode(runs.into_iter(), b"vcpu"))),
        behind(5, blob(final_set::encode(std::iter::empty(), &[]))),
        behind(9001, pieces.into_iter().chain([state]).flat_map(blob).collect()),
    ]
}

fn streams() -> Vec<Vec<u8>> {
    let frame = |kind, count, body: &[u8]| {
        let header = Header { count, body_bytes: body.len() as u32, ..Header::new(kind) };
        [&header.encode()[..], body].concat()
    };
    let talk = message::encode(&Talk::Ready).expect("fits");
    let state = [frame(Kind::State, 0, &[1; 500]), frame(Kind::State, 1, &[2; 30])].concat();
    let mixed =
        [frame(Kind::Ping, 0, &[]), frame(Kind::Talk, 0, &talk), frame(Kind::Pages, 1, &pages()[0][2..])]
            .concat();
    vec![[&[1][..], &state].concat(), [&[200][..], &mixed].concat(), [&[0][..], &state, &mixed].concat()]
}

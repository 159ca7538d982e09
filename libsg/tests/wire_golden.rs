//! The bytes of the wire, pinned.
//!
//! THE BYTES IN THIS FILE MAY NEVER CHANGE. Peers of other versions are out there: whatever changes here
//! breaks them without a word. The handshake and the header are for ever; what follows
//! them may change under a new version number, whose bytes are then added beside these.

use std::num::NonZeroU32;

use libsg::ErrorKind;
use libsg::ids::{
    Checksum, Epoch, Generation, MemberIndex, MemberSet, NodeId, Placement, Round, Sequence, SlotIndex,
    VolumeId,
};
use libsg::page::{PageIndex, PageRange};
use libsg::wire::access::{AccessKey, KeyEntry, Settled};
use libsg::wire::announcement::{Announcement, Duty, LinkRoom, MemoryRoom, Transports};
use libsg::wire::datagram::{Datagram, Said};
use libsg::wire::entry::Entry;
use libsg::wire::handshake::{Challenge, Hello, PoolKey, Purpose, Role};
use libsg::wire::message::{self, Talk, VmdReply, VmdRequest};
use libsg::wire::parking::{Claim, Parking, Verdict};
use libsg::wire::run::{RunEntry, encode_runs};
use libsg::wire::{DiscardEntry, GetEntry, Header, IndexEntry, Kind, Missing, PageEntry, Status};

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn nonce(first: u8) -> [u8; 32] {
    std::array::from_fn(|at| first + at as u8)
}

fn hello() -> Hello {
    Hello { version_min: 1, version_max: 2, purpose: Purpose::MigrationUrgent, nonce: nonce(0x10) }
}

fn challenge() -> Challenge {
    let node = NodeId { name: "rack2".into(), incarnation: 0x1122_3344_5566_7788 };
    Challenge { version: 1, nonce: nonce(0x40), node }
}

const VOLUME: VolumeId = VolumeId(0x0123_4567_89ab_cdef_0011_2233_4455_6677);

#[test]
fn header() {
    let header = Header {
        version: 1,
        kind: Kind::Put,
        body_bytes: 0x0004_0400,
        said: Checksum(0x0b0a_0908),
        volume: VOLUME,
        epoch: Epoch(9),
        sequence: Sequence(0x0102_0304_0506_0708),
        status: Status::Ok,
        count: 64,
        delay_us: Some(150),
        answer_kib_s: None,
    };
    assert_eq!(
        hex(&header.encode()),
        "f55347310100100008090a0b000404007766554433221100efcdab89674523010900000000000000080706050403020101004000960000000000000093961961"
    );
    let paced = Header { answer_kib_s: NonZeroU32::new(0x0001_e848), kind: Kind::Get, ..header };
    assert_eq!(
        hex(&paced.encode()),
        "f55347310100140008090a0b000404007766554433221100efcdab896745230109000000000000000807060504030201010040009600000048e801000adab891"
    );
    let unknown = Header { version: 1, ..Header::new(Kind::Pong) };
    assert_eq!(
        hex(&unknown.encode()),
        "f5534731010028000000000000000000000000000000000000000000000000000000000000000000000000000000000001000000ffffffff00000000c255e3fd"
    );
}

#[test]
fn handshake() {
    assert_eq!(
        hex(&hello().encode()),
        "0100020005000000101112131415161718191a1b1c1d1e1f202122232425262728292a2b2c2d2e2f"
    );
    assert_eq!(
        hex(&challenge().encode().expect("fits")),
        "01000500000000008877665544332211404142434445464748494a4b4c4d4e4f505152535455565758595a5b5c5d5e5f7261636b32"
    );
    let key = PoolKey::derive(b"a pool's secret");
    let mac = |role| {
        let challenge = challenge().encode().expect("fits");
        key.mac(role, VOLUME, Epoch(9), &hello().encode(), &challenge)
    };
    assert_eq!(
        hex(mac(Role::Client).as_bytes()),
        "22e7568dc56bd3209ecbb8e47d63d1aa0aa11c78ffb1738ddf5d5d92137c8e10"
    );
    assert_eq!(
        hex(mac(Role::Server).as_bytes()),
        "6e019df086464bc3b56c7370a8f86fb0ab61721fe5fb93b1e9a6bc516bec8c2c"
    );
    let purposes = [
        Purpose::VmdBulk,
        Purpose::VmdUrgent,
        Purpose::MigrationControl,
        Purpose::MigrationDirect,
        Purpose::MigrationUrgent,
        Purpose::Operator,
    ];
    assert_eq!(purposes.map(|purpose| purpose as u16), [1, 2, 3, 4, 5, 6]);
}

fn entry(entry: impl Entry) -> String {
    let mut bytes = vec![0xee; 96];
    entry.encode(&mut bytes);
    let written = bytes.iter().rposition(|byte| *byte != 0xee).map_or(0, |last| last + 1);
    hex(&bytes[..written])
}

#[test]
fn entries() {
    let (page, round) = (PageIndex(0x0a0b_0c0d), Round(0x0102));
    let range = PageRange::new(page, 0x0203);
    assert_eq!(entry(DiscardEntry { range, below: round }), "0d0c0b0a030200000201000000000000");
    assert_eq!(entry(range), "0d0c0b0a03020000");
    assert_eq!(entry(page), "0d0c0b0a");
    let members = |bits| MemberSet(bits);
    assert_eq!(entry(members(0x8000_0000_0000_0005)), "0500000000000080");
    let missing = Missing { full: members(2), lost: members(5) };
    assert_eq!(entry(missing), "02000000000000000500000000000000");
    let key = AccessKey::decode(&[0xaa, 0xbb, 0xcc]).expect("fits");
    let key = KeyEntry { first: SlotIndex(0x0001_0200), slots: 512, key };
    assert_eq!(entry(key), format!("0002010000020300aabbcc{}", "00".repeat(61)));
    let settled = Settled { lease: 0x0102_0304_0506_0708, copies: members(5) };
    assert_eq!(entry(settled), "08070605040302010500000000000000");
}

fn table<E: RunEntry>(entries: &[E], runs: usize) -> String {
    let mut bytes = Vec::new();
    assert_eq!(encode_runs(entries.iter().copied(), &mut bytes), runs);
    hex(&bytes)
}

/// Heads of runs first, then the checksums of all pages that have bytes.
#[test]
fn runs() {
    let place = |slot| Placement { member: MemberIndex(3), slot: SlotIndex(slot), generation: Generation(7) };
    let (page, round) = (PageIndex(0x0a0b_0c0d), Round(0x0102));
    let (next, far) = (PageIndex(page.0 + 1), PageIndex(page.0 + 9));
    let (sum, other) = (Checksum(0x8a91_36aa), Checksum(0x0102_0304));
    let raw = |page, sum| PageEntry::raw(page, round, sum);
    let pages = [raw(page, sum), raw(next, other), PageEntry::zero(page, 512, round), raw(far, sum)];
    assert_eq!(
        table(&pages, 3),
        concat!(
            "0d0c0b0a0200020101000010",
            "0d0c0b0a0002020102000000",
            "160c0b0a0100020101000010",
            "aa36918a04030201aa36918a"
        )
    );
    assert_eq!(table(&[PageEntry::gone(page), PageEntry::gone(next)], 1), "0d0c0b0a0200000004000000");
    let at = |page, slot, sum| IndexEntry::at(page, round, place(slot), sum);
    let index = [
        at(page, 0xdead_beef, sum),
        at(next, 0xdead_bef0, other),
        IndexEntry::zero(page, 0x0010_0000, round),
        at(far, 0xdead_bef1, sum),
    ];
    assert_eq!(
        table(&index, 3),
        concat!(
            "0d0c0b0a02000000efbeadde0700030002010100",
            "0d0c0b0a00001000000000000000000002010200",
            "160c0b0a01000000f1beadde0700030002010100",
            "aa36918a04030201aa36918a"
        )
    );
    let get = |page, slot| GetEntry { page, placement: place(slot) };
    assert_eq!(
        table(&[get(page, 5), get(next, 6), get(far, 8)], 2),
        concat!("0d0c0b0a020000000500000007000300", "160c0b0a010000000800000007000300")
    );
    // With gaps between the pages: a mask behind the heads.
    assert_eq!(
        table(&[get(page, 5), get(next, 6), get(far, 7)], 1),
        concat!("0d0c0b0a0a0001000500000007000300", "0302000000000000")
    );
    assert_eq!(
        table(&[raw(page, sum), raw(far, other)], 1),
        concat!("0d0c0b0a0a00020101010010", "0102000000000000", "aa36918a04030201")
    );
    assert_eq!(
        table(&[at(page, 5, sum), at(far, 6, other)], 1),
        concat!("0d0c0b0a0a000000050000000700030002010101", "0102000000000000", "aa36918a04030201")
    );
    let zeros = [IndexEntry::zero(page, 3, round), IndexEntry::zero(far, 1, round)];
    assert_eq!(table(&zeros, 1), concat!("0d0c0b0a0a000000000000000000000002010201", "0702000000000000"));
    assert_eq!(
        table(&[Some(place(5)), Some(place(6)), None, None, None], 2),
        concat!("050000000700030002000000", "000000000000000003000000")
    );
}

#[test]
fn numbers() {
    let kinds = [
        (Kind::Hello, 1),
        (Kind::Challenge, 2),
        (Kind::Auth, 3),
        (Kind::Welcome, 4),
        (Kind::Refused, 5),
        (Kind::Put, 16),
        (Kind::PutReply, 17),
        (Kind::PutIndex, 18),
        (Kind::PutIndexReply, 19),
        (Kind::Get, 20),
        (Kind::GetReply, 21),
        (Kind::Locate, 22),
        (Kind::LocateReply, 23),
        (Kind::Discard, 24),
        (Kind::DiscardReply, 25),
        (Kind::Vmd, 26),
        (Kind::VmdReply, 27),
        (Kind::State, 28),
        (Kind::Pages, 32),
        (Kind::PagesAck, 33),
        (Kind::Credit, 34),
        (Kind::Fault, 35),
        (Kind::Announce, 36),
        (Kind::Talk, 37),
        (Kind::Holdings, 38),
        (Kind::Ping, 39),
        (Kind::Pong, 40),
        (Kind::Drop, 41),
        (Kind::DropReply, 42),
        (Kind::PutCopies, 47),
        (Kind::PutCopiesReply, 48),
        (Kind::Copy, 49),
        (Kind::CopyReply, 50),
        (Kind::Spread, 51),
        (Kind::SpreadReply, 52),
        (Kind::HandPages, 53),
        (Kind::HandCopies, 54),
        (Kind::HandReply, 55),
        (Kind::HandIndex, 56),
        (Kind::HandIndexReply, 57),
        (Kind::Moved, 58),
        (Kind::MovedReply, 59),
        (Kind::Attach, 60),
        (Kind::AttachReply, 61),
        (Kind::Lease, 62),
        (Kind::LeaseReply, 63),
        (Kind::Settle, 64),
        (Kind::SettleReply, 65),
        (Kind::Reach, 66),
        (Kind::ReachReply, 67),
        (Kind::Release, 68),
        (Kind::Draw, 69),
        (Kind::DrawReply, 70),
        (Kind::DrawFrom, 71),
        (Kind::DrawFromReply, 72),
        (Kind::CopyAt, 73),
    ];
    for (kind, number) in kinds {
        assert_eq!(kind as u16, number, "{kind:?}");
    }
    let statuses = [
        Status::Ok,
        Status::Malformed,
        Status::Version,
        Status::Secret,
        Status::NoVolume,
        Status::Fenced,
        Status::State,
        Status::Full,
        Status::Busy,
        Status::Copies,
        Status::Going,
        Status::Internal,
        Status::NotReached,
    ];
    assert!(statuses.map(|status| status as u16).into_iter().eq(1..=13));
}

/// Control messages are numbered by their place in their enum: a new one goes to the end.
#[test]
fn messages() {
    let bytes = |message: Result<Vec<u8>, _>| hex(&message.expect("fits"));
    let talks = [
        (Talk::Accepted, "01"),
        (Talk::StateEnd { bytes: 300, checksum: 7 }, "02ac0207"),
        (Talk::Ready, "03"),
        (Talk::Run, "04"),
        (Talk::Running, "05"),
        (Talk::Members(vec![]), "0600"),
        (Talk::Evicted, "07"),
        (Talk::Gathered, "08"),
        (Talk::Rejoin, "09"),
        (Talk::Rejoined { running: true }, "0a01"),
        (Talk::Progress { held_pages: 1, faults: 2, direct_bytes: 3, gathered_bytes: 4 }, "0b01020304"),
        (Talk::Abort { kind: ErrorKind::Cancelled, reason: "no".into() }, "0c0b026e6f"),
        (Talk::Lost(vec![PageRange::new(PageIndex(1), 2)]), "0d010102"),
        (Talk::Failed { reason: "no".into() }, "0e026e6f"),
        (
            Talk::Written { round: Round(3), runs: vec![PageRange::new(PageIndex(1), 2)], last: true },
            "0f0301010201",
        ),
        (Talk::Cleared, "10"),
    ];
    for (talk, expected) in talks {
        assert_eq!(bytes(message::encode(&talk)), expected, "{talk:?}");
    }
    // So are the kinds of error that one end tells the other.
    use ErrorKind as K;
    #[rustfmt::skip]
    let kinds = [
        K::Input, K::System, K::Unreachable, K::Timeout, K::Protocol, K::Version, K::Refused, K::Fenced, K::Volume, K::Full,
        K::Lost, K::Cancelled, K::Poisoned, K::Vm,
    ];
    for (number, kind) in kinds.into_iter().enumerate() {
        let expected = format!("0c{number:02x}00");
        assert_eq!(bytes(message::encode(&Talk::Abort { kind, reason: String::new() })), expected);
    }
    let node = || NodeId { name: "i1".into(), incarnation: 300 };
    let requests = [
        (VmdRequest::Members(vec![]), "0100"),
        (VmdRequest::Describe, "02"),
        (VmdRequest::PutState { bytes: 5, checksum: 6 }, "030506"),
        (VmdRequest::GetState, "04"),
        (VmdRequest::Commit, "05"),
        (VmdRequest::Seal, "06"),
        (VmdRequest::Claim { epoch: Epoch(9) }, "0709"),
        (VmdRequest::Dissolve, "08"),
        (VmdRequest::Statistics, "09"),
        (
            VmdRequest::Park(Parking {
                name: "web".into(),
                keeper: node(),
                term: 3,
                arbiter: Some("e".into()),
            }),
            "0a03776562026931ac0203010165",
        ),
        (VmdRequest::ClaimParked(Claim { epoch: Epoch(9), by: node(), force: true }), "0b09026931ac0201"),
        (VmdRequest::Run, "0c"),
        (VmdRequest::Succeed { epoch: Epoch(9) }, "0d09"),
        (VmdRequest::PutPiece { number: 1, bytes: 5, checksum: 6 }, "0e010506"),
        (VmdRequest::GetPiece { number: 300 }, "0fac02"),
        (VmdRequest::Copies(2), "1202"),
        (VmdRequest::Fence, "13"),
    ];
    for (request, expected) in requests {
        assert_eq!(bytes(message::encode(&request)), expected, "{request:?}");
    }
    assert_eq!(bytes(message::encode(&VmdReply::Done)), "00");
    assert_eq!(bytes(message::encode(&VmdReply::State { bytes: 1, checksum: 2 })), "020102");
    let verdicts = [
        (Verdict::Granted, "0400"),
        (Verdict::Claimed { by: node(), for_ms: 5 }, "0401026931ac0205"),
        (Verdict::Runs { by: node() }, "0402026931ac02"),
        (Verdict::Newer(Epoch(9)), "040309"),
        (Verdict::NotParked, "0404"),
        (Verdict::Elsewhere, "0405"),
    ];
    for (verdict, expected) in verdicts {
        assert_eq!(bytes(message::encode(&VmdReply::Verdict(verdict.clone()))), expected, "{verdict:?}");
    }
}

/// What hosts say of themselves. Those of a pool need not be of one version.
#[test]
fn datagrams() {
    let host = Announcement {
        node: NodeId { name: "rack2".into(), incarnation: 300 },
        address: ([10, 0, 0, 3], 7701).into(),
        zone: Some("east".into()),
        duty: Duty::Pressed,
        transports: Transports::TCP,
        memory: MemoryRoom { host_bytes: 4, available_bytes: 3, limit_bytes: 2, used_bytes: 1 },
        link: LinkRoom {
            bytes_per_s: 1000,
            free_in_bytes_per_s: 9,
            free_out_bytes_per_s: 8,
            limit_in_bytes_per_s: 7,
            limit_out_bytes_per_s: 6,
        },
        cpu_idle_permille: 500,
        connections_free: 11,
        volumes_free: 12,
    };
    let key = PoolKey::derive(b"a pool's secret").announcement_key();
    let bytes = |said| {
        let datagram = Datagram { counter: 5, sent_ms: 0x0102_0304_0506, said };
        hex(&datagram.encode(&key).expect("in bounds"))
    };
    let duties = [Duty::Lends, Duty::Source, Duty::Pressed, Duty::Leaves];
    for (number, duty) in duties.into_iter().enumerate() {
        assert_eq!(hex(&message::encode(&duty).expect("fits")), format!("{number:02x}"));
    }
    assert_eq!(
        bytes(Said::Here { period_ms: 1000, host }),
        "f55347410100010005000000000000000605040302010000e803000000000000057261636b32ac02000a000003953c010465617374020104030201e807090807\
         06f4030b0cb5237b482967fa8f0244279ee26eaca3b6b7bc9dbef0b18c327ac4eaf78aa332"
    );
    assert_eq!(
        bytes(Said::WhoIsThere),
        "f55347410100020005000000000000000605040302010000000000000000000018ae8afa494d9e518e2295ba8e89ef7ff8aa01748f33ae2bb7869e9198f69f13"
    );
}

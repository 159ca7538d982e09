//! The 64-byte header in front of every frame.

use std::mem::{offset_of, size_of};
use std::num::NonZeroU32;
use std::time::Duration;

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::access::{KeyEntry, Settled};
use super::entry::{Entry, HintEntry, PageEntry, ReferEntry, Referral};
use super::{Malformed, Missing, MovedEntry, Status, VERSION_NEWEST, VERSION_OLDEST};
use crate::ids::{Checksum, Epoch, MemberSet, Sequence, VolumeId};
use crate::limits;

/// Bytes of a header.
pub const HEADER_BYTES: usize = 64;

/// The first four bytes of every frame.
pub const MAGIC: [u8; 4] = *b"\xf5SG1";

/// What a frame is. Zero is invalid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Kind {
    /// Client's opening: versions, purpose, nonce.
    Hello = 1,
    /// Server's answer: its nonce and identity.
    Challenge = 2,
    /// Client's proof that it knows the pool secret.
    Auth = 3,
    /// Server's proof; the connection is open.
    Welcome = 4,
    /// The server will not go on; the status says why.
    Refused = 5,

    /// Client to intermediary: runs of [`super::PageEntry`], then the pages' bytes.
    Put = 16,
    /// Answer: runs of placements, one for each entry, zero where the page was not stored.
    PutReply = 17,
    /// Client to index server: runs of [`super::IndexEntry`].
    PutIndex = 18,
    /// Answer: all entries are in the index.
    PutIndexReply = 19,
    /// Client to intermediary: runs of [`super::GetEntry`].
    Get = 20,
    /// Answer: runs of [`super::PageEntry`], then the bytes; `Gone` where there are none.
    GetReply = 21,
    /// Client to index server: which pages it asks for, as page ranges (8 bytes each).
    Locate = 22,
    /// Answer: runs of [`super::IndexEntry`], of those of the asked pages that are known here.
    LocateReply = 23,
    /// Client to intermediary: drop pages of a range that are below a round.
    Discard = 24,
    /// Answer: dropped.
    DiscardReply = 25,
    /// Client to intermediary: a [`super::message::VmdRequest`].
    Vmd = 26,
    /// Answer: a [`super::message::VmdReply`].
    VmdReply = 27,
    /// Either way: a piece of the VM's opaque state; the header's count is 1 on the last piece.
    State = 28,

    /// Source to destination: runs of [`super::PageEntry`], then the bytes.
    Pages = 32,
    /// Destination to source: the batch with this sequence is installed; the body lists pages that
    /// were not (4 bytes each), as their checksum did not match.
    PagesAck = 33,
    /// Destination to source: how many bytes in all may be sent on the direct connection (8 bytes).
    Credit = 34,
    /// Destination to source: pages the guest waits for (4 bytes each).
    Fault = 35,
    /// Source to destination: where pages lie, runs of [`super::IndexEntry`].
    Announce = 36,
    /// Either way between source and destination: a [`super::message::Talk`].
    Talk = 37,
    /// Destination to source after a reconnect: page ranges that it holds (8 bytes each); the
    /// header's count is zero on the last frame.
    Holdings = 38,
    /// Either way: are you there? Answered by `Pong` with the same sequence.
    Ping = 39,
    /// The answer to `Ping`.
    Pong = 40,
    /// Client to intermediary: nobody needs what lies at these placements: runs of
    /// [`super::GetEntry`]. The index is left alone.
    Drop = 41,
    /// Answer: their slots are free, those that were there.
    DropReply = 42,
    /// Client to intermediary: pages by the hashes of their bytes, each a [`super::ReferEntry`].
    Refer = 43,
    /// Answer: what became of each, a [`super::Referral`].
    ReferReply = 44,
    /// Client to intermediary: who has bytes that this one is asked about, each a [`super::HintEntry`].
    Hint = 45,
    /// Answer: noted.
    HintReply = 46,
    /// Client to intermediary: store pages, here and at other members: a [`MemberSet`], then as
    /// `Put`.
    PutCopies = 47,
    /// Answer: who has none of it ([`super::Missing`]), then placements of those that were stored here, runs.
    PutCopiesReply = 48,
    /// Intermediary to intermediary: store copies: runs of [`super::IndexEntry`], which say where the pages lie at the
    /// sender, then the pages. Never sent on.
    Copy = 49,
    /// Answer: all of them are stored, or none.
    CopyReply = 50,
    /// Client to intermediary: pages that were stored here by reference are to lie at other members, too: a
    /// [`MemberSet`], then runs of [`super::IndexEntry`], which say where they lie here.
    Spread = 51,
    /// Answer: who has none of it ([`super::Missing`]), then placements of those that are here, runs.
    SpreadReply = 52,
    /// Intermediary that leaves, to another: store these pages in its place: as `Copy`.
    HandPages = 53,
    /// The same, where each holder notes what it has: what each was made for instead of where it lies.
    HandCopies = 54,
    /// Answer to both: where they lie, runs of placements, all of them or none.
    HandReply = 55,
    /// Intermediary that leaves, to another: what it knows of the index, as `PutIndex`. Kept where nothing as new is known.
    HandIndex = 56,
    /// Answer: kept.
    HandIndexReply = 57,
    /// Intermediary that leaves, to an index server: pages lie elsewhere now, each a [`MovedEntry`].
    Moved = 58,
    /// Answer: of which pages the index did not say that they lay there (4 bytes each). Where it is told so later, it
    /// will say where they are now.
    MovedReply = 59,
    /// Client to intermediary: lets a backend's other end in, which the body is ([`super::access`]).
    Attach = 60,
    /// Answer: the end here.
    AttachReply = 61,
    /// Client to intermediary: slots for as many pages as the header counts; no body.
    Lease = 62,
    /// Answer: runs of placements, zero where there is no room, then a [`KeyEntry`] for each piece of memory they are in.
    LeaseReply = 63,
    /// Client to intermediary: the slots of a lease hold these pages: [`super::access::Settled`], then runs of
    /// [`super::PageEntry`].
    Settle = 64,
    /// Answer: as to `PutCopies`.
    SettleReply = 65,
    /// Client to intermediary: as `Get`, of pages that it reads itself.
    Reach = 66,
    /// Answer: as to `Get`, but for the bytes: a [`KeyEntry`] for each piece of memory that the pages are in, and they
    /// stay there until they are released.
    ReachReply = 67,
    /// Client to intermediary: leases and pages that it is done with, by the numbers of their requests (8 bytes each). No
    /// answer.
    Release = 68,
    /// Intermediary to intermediary, before copies: will you read them yourself, over your backend? No body.
    Draw = 69,
    /// Answer: the end that will read them ([`super::access`]).
    DrawReply = 70,
    /// The end that it reads from.
    DrawFrom = 71,
    /// Answer, once that end was heard: copies can be read from it.
    DrawFromReply = 72,
    /// As `Copy`, of pages that the other reads itself: a [`KeyEntry`] for each piece of memory that they are in, where
    /// they stay until this is answered by `CopyReply`.
    CopyAt = 73,
}

impl Kind {
    const ALL: [Self; 60] = [
        Self::Hello,
        Self::Challenge,
        Self::Auth,
        Self::Welcome,
        Self::Refused,
        Self::Put,
        Self::PutReply,
        Self::PutIndex,
        Self::PutIndexReply,
        Self::Get,
        Self::GetReply,
        Self::Locate,
        Self::LocateReply,
        Self::Discard,
        Self::DiscardReply,
        Self::Vmd,
        Self::VmdReply,
        Self::State,
        Self::Pages,
        Self::PagesAck,
        Self::Credit,
        Self::Fault,
        Self::Announce,
        Self::Talk,
        Self::Holdings,
        Self::Ping,
        Self::Pong,
        Self::Drop,
        Self::DropReply,
        Self::Refer,
        Self::ReferReply,
        Self::Hint,
        Self::HintReply,
        Self::PutCopies,
        Self::PutCopiesReply,
        Self::Copy,
        Self::CopyReply,
        Self::Spread,
        Self::SpreadReply,
        Self::HandPages,
        Self::HandCopies,
        Self::HandReply,
        Self::HandIndex,
        Self::HandIndexReply,
        Self::Moved,
        Self::MovedReply,
        Self::Attach,
        Self::AttachReply,
        Self::Lease,
        Self::LeaseReply,
        Self::Settle,
        Self::SettleReply,
        Self::Reach,
        Self::ReachReply,
        Self::Release,
        Self::Draw,
        Self::DrawReply,
        Self::DrawFrom,
        Self::DrawFromReply,
        Self::CopyAt,
    ];

    fn decode(value: u16) -> Result<Self, Malformed> {
        Self::ALL
            .into_iter()
            .find(|kind| *kind as u16 == value)
            .ok_or(Malformed::Unknown("frame kind", u32::from(value)))
    }

    /// Whether the body of such a frame ends in bytes that have a checksum elsewhere: those of pages, each beside its number
    /// in the table; of the VM's state, in what follows its last piece.
    #[must_use]
    pub const fn has_bytes(self) -> bool {
        matches!(
            self,
            Self::Put
                | Self::PutCopies
                | Self::GetReply
                | Self::Pages
                | Self::Copy
                | Self::HandPages
                | Self::HandCopies
                | Self::State
        )
    }

    /// The longest body that a frame of this kind may have, in bytes.
    #[must_use]
    pub const fn body_bytes_max(self) -> usize {
        match self {
            Self::Hello | Self::Challenge | Self::Auth | Self::Welcome | Self::Refused => 256,
            Self::Put | Self::GetReply | Self::Pages | Self::Copy | Self::HandPages | Self::HandCopies => {
                limits::BODY_BYTES_MAX
            }
            Self::PutCopies => MemberSet::BYTES + limits::BODY_BYTES_MAX,
            Self::PutReply | Self::HandReply => limits::BATCH_PAGES_MAX * 12,
            Self::PutCopiesReply | Self::SpreadReply | Self::SettleReply => {
                Missing::BYTES + limits::BATCH_PAGES_MAX * 12
            }
            Self::Spread => MemberSet::BYTES + limits::BATCH_PAGES_MAX * 24,
            Self::PagesAck | Self::Fault => limits::BATCH_PAGES_MAX * 4,
            Self::Get | Self::Drop | Self::Reach => limits::BATCH_PAGES_MAX * 16,
            Self::PutIndex | Self::HandIndex | Self::LocateReply | Self::Announce => {
                limits::INDEX_ENTRIES_MAX * 24
            }
            Self::Moved => limits::INDEX_ENTRIES_MAX * MovedEntry::BYTES,
            Self::MovedReply => limits::INDEX_ENTRIES_MAX * 4,
            Self::Locate | Self::Holdings => limits::INDEX_ENTRIES_MAX * 8,
            Self::Refer => limits::BATCH_PAGES_MAX * ReferEntry::BYTES,
            Self::ReferReply => limits::BATCH_PAGES_MAX * Referral::BYTES,
            Self::Hint => limits::BATCH_PAGES_MAX * HintEntry::BYTES,
            Self::Discard => 16,
            Self::Vmd | Self::VmdReply | Self::Talk | Self::State => limits::CONTROL_BYTES_MAX,
            Self::Credit => super::Credit::BYTES,
            Self::Attach | Self::AttachReply | Self::DrawReply | Self::DrawFrom => limits::ENDPOINT_BYTES_MAX,
            Self::LeaseReply => limits::BATCH_PAGES_MAX * (12 + KeyEntry::BYTES),
            Self::Settle => Settled::BYTES + limits::BATCH_PAGES_MAX * PageEntry::BYTES_MAX,
            Self::ReachReply => limits::BATCH_PAGES_MAX * (PageEntry::BYTES_MAX + KeyEntry::BYTES),
            Self::Release => limits::GRANTS_MAX * size_of::<u64>(),
            Self::CopyAt => limits::BATCH_PAGES_MAX * (24 + KeyEntry::BYTES),
            Self::PutIndexReply
            | Self::DiscardReply
            | Self::DropReply
            | Self::HintReply
            | Self::CopyReply
            | Self::HandIndexReply
            | Self::Lease
            | Self::Draw
            | Self::DrawFromReply
            | Self::Ping
            | Self::Pong => 0,
        }
    }
}

/// A decoded header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Version of the protocol that the sender speaks on this connection.
    pub version: u16,
    /// What the frame is.
    pub kind: Kind,
    /// Bytes of the body.
    pub body_bytes: u32,
    /// Checksum of what is said in the body: not of the bytes at its end ([`Kind::has_bytes`]).
    pub said: Checksum,
    /// Which volume; zero where none is meant.
    pub volume: VolumeId,
    /// The sender's epoch of the volume; zero where none is meant.
    pub epoch: Epoch,
    /// Numbers requests; an answer carries its request's.
    pub sequence: Sequence,
    /// How the request went; `Ok` in requests.
    pub status: Status,
    /// Entries of the table in the body, or runs of entries where it is one of runs.
    pub count: u16,
    /// Queueing delay of this connection as the sender's kernel measures it (smoothed round trip
    /// minus its minimum), in microseconds. Whoever paces what it receives learns the state of
    /// the path by it.
    pub delay_us: Option<u32>,
    /// In a request: how fast its answer may leave, in KiB/s. Whoever paces what it receives asks for long answers
    /// by it, which would otherwise come in bursts. `None` is as fast as it can. In the answer to `Reach`: what the
    /// intermediary gives out at most, so that what is read there is asked for first.
    pub answer_kib_s: Option<NonZeroU32>,
}

/// The header as it lies in memory. `delay_us` is all ones where it is not known.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    magic: [u8; 4],
    version: U16,
    kind: U16,
    said: U32,
    body_bytes: U32,
    volume: [u8; 16],
    epoch: U64,
    sequence: U64,
    status: U16,
    count: U16,
    delay_us: U32,
    answer_kib_s: U32,
    checksum: U32,
}

const _: () = assert!(size_of::<Raw>() == HEADER_BYTES);
const _: () = assert!(offset_of!(Raw, kind) == 6);
const _: () = assert!(offset_of!(Raw, body_bytes) == 12);
const _: () = assert!(offset_of!(Raw, volume) == 16);
const _: () = assert!(offset_of!(Raw, epoch) == 32);
const _: () = assert!(offset_of!(Raw, sequence) == 40);
const _: () = assert!(offset_of!(Raw, status) == 48);
const _: () = assert!(offset_of!(Raw, checksum) == 60);

const CHECKSUM_AT: usize = offset_of!(Raw, checksum);
const DELAY_UNKNOWN: u32 = u32::MAX;

impl Header {
    /// A header of this kind with nothing else set: version newest, status `Ok`.
    #[must_use]
    pub const fn new(kind: Kind) -> Self {
        Self {
            version: VERSION_NEWEST,
            kind,
            body_bytes: 0,
            said: Checksum::OF_NOTHING,
            volume: VolumeId(0),
            epoch: Epoch(0),
            sequence: Sequence(0),
            status: Status::Ok,
            count: 0,
            delay_us: None,
            answer_kib_s: None,
        }
    }

    /// The header of the answer to this one: same volume, epoch and sequence.
    #[must_use]
    pub const fn answer(&self, kind: Kind) -> Self {
        Self {
            kind,
            body_bytes: 0,
            said: Checksum::OF_NOTHING,
            status: Status::Ok,
            count: 0,
            delay_us: None,
            answer_kib_s: None,
            ..*self
        }
    }

    /// The header of a frame with this body: what is said in it, and then so many bytes ([`Kind::has_bytes`]).
    #[must_use]
    pub fn with_body(self, said: &[u8], bytes: usize) -> Self {
        let body_bytes = (said.len() + bytes) as u32;
        Self { body_bytes, said: Checksum::of(said), ..self }
    }

    /// Compares a whole body with its checksum, where nothing but what is said is in it.
    ///
    /// # Errors
    /// As [`Self::check_said`].
    pub fn check_body(&self, body: &[u8]) -> Result<(), Malformed> {
        if self.kind.has_bytes() { Ok(()) } else { self.check_said(body) }
    }

    /// Compares what is said in a body with its checksum.
    ///
    /// # Errors
    /// It was damaged on its way.
    pub fn check_said(&self, said: &[u8]) -> Result<(), Malformed> {
        if Checksum::of(said) == self.said { Ok(()) } else { Err(Malformed::BodyChecksum) }
    }

    /// A delay as [`Self::delay_us`] tells it. All ones are "not known"; a delay of more than an hour is none of ours.
    #[must_use]
    pub fn delay_us_of(delay: Duration) -> u32 {
        delay.as_micros().min(u128::from(DELAY_UNKNOWN - 1)) as u32
    }

    /// A rate in bytes/s as [`Self::answer_kib_s`] tells it: at least one, and at most 4 TiB/s.
    #[must_use]
    pub fn kib_s_of(bytes_per_s: u64) -> NonZeroU32 {
        let kib_s = u32::try_from(bytes_per_s >> 10).unwrap_or(u32::MAX);
        NonZeroU32::new(kib_s).unwrap_or(NonZeroU32::MIN)
    }

    /// How fast the answer to this may leave, in bytes/s.
    #[must_use]
    pub fn answer_bytes_per_s(&self) -> Option<u64> {
        self.answer_kib_s.map(|kib_s| u64::from(kib_s.get()) << 10)
    }

    /// The 64 bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut raw = Raw {
            magic: MAGIC,
            version: self.version.into(),
            kind: (self.kind as u16).into(),
            said: self.said.0.into(),
            body_bytes: self.body_bytes.into(),
            volume: self.volume.0.to_le_bytes(),
            epoch: self.epoch.0.into(),
            sequence: self.sequence.0.into(),
            status: (self.status as u16).into(),
            count: self.count.into(),
            delay_us: self.delay_us.unwrap_or(DELAY_UNKNOWN).into(),
            answer_kib_s: self.answer_kib_s.map_or(0, NonZeroU32::get).into(),
            checksum: 0.into(),
        };
        raw.checksum = Checksum::of(&raw.as_bytes()[..CHECKSUM_AT]).0.into();
        let mut bytes = [0; HEADER_BYTES];
        bytes.copy_from_slice(raw.as_bytes());
        bytes
    }

    /// Reads a header and checks everything that can be checked without knowing the conversation:
    /// magic, own checksum, version, enums, and that the body is not longer than
    /// its kind allows.
    ///
    /// # Errors
    /// What is wrong with the bytes.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, Malformed> {
        let raw = Raw::ref_from_bytes(bytes).map_err(|_| Malformed::Truncated)?;
        if raw.magic != MAGIC {
            return Err(Malformed::Magic);
        }
        if Checksum::of(&bytes[..CHECKSUM_AT]).0 != raw.checksum.get() {
            return Err(Malformed::HeaderChecksum);
        }
        let version = raw.version.get();
        let kind = Kind::decode(raw.kind.get())?;
        // Any version may say hello: the range inside is what is compared, and answered by a typed refusal.
        if kind != Kind::Hello && !(VERSION_OLDEST..=VERSION_NEWEST).contains(&version) {
            return Err(Malformed::Version(version));
        }
        let body_bytes = raw.body_bytes.get();
        if body_bytes as usize > kind.body_bytes_max() {
            return Err(Malformed::Bounds("body length"));
        }
        let delay_us = raw.delay_us.get();
        Ok(Self {
            version,
            kind,
            body_bytes,
            said: Checksum(raw.said.get()),
            volume: VolumeId(u128::from_le_bytes(raw.volume)),
            epoch: Epoch(raw.epoch.get()),
            sequence: Sequence(raw.sequence.get()),
            status: Status::decode(raw.status.get())?,
            count: raw.count.get(),
            delay_us: (delay_us != DELAY_UNKNOWN).then_some(delay_us),
            answer_kib_s: NonZeroU32::new(raw.answer_kib_s.get()),
        })
    }
}

#[cfg(test)]
mod test {
    use super::*;

    fn header() -> Header {
        Header {
            body_bytes: 4096 + 16,
            volume: VolumeId(0x0123_4567_89ab_cdef_0011_2233_4455_6677),
            epoch: Epoch(9),
            sequence: Sequence(77),
            count: 1,
            delay_us: Some(150),
            ..Header::new(Kind::Put)
        }
    }

    /// Puts the right checksum on edited bytes.
    fn seal(mut bytes: [u8; HEADER_BYTES]) -> [u8; HEADER_BYTES] {
        let sum = Checksum::of(&bytes[..CHECKSUM_AT]).0.to_le_bytes();
        bytes[CHECKSUM_AT..].copy_from_slice(&sum);
        bytes
    }

    #[test]
    fn round_trips() {
        for kind in Kind::ALL {
            let header = Header { kind, body_bytes: kind.body_bytes_max().min(7) as u32, ..header() };
            assert_eq!(Header::decode(&header.encode()), Ok(header));
        }
        for status in Status::ALL {
            let header = Header { status, delay_us: None, ..header() };
            assert_eq!(Header::decode(&header.encode()), Ok(header));
        }
    }

    #[test]
    fn a_delay_is_never_told_as_unknown() {
        assert_eq!(Header::delay_us_of(Duration::from_millis(2)), 2000);
        let header = Header { delay_us: Some(Header::delay_us_of(Duration::MAX)), ..header() };
        assert_eq!(Header::decode(&header.encode()), Ok(header));
    }

    #[test]
    fn an_answers_pace_is_told_in_kib() {
        let told = |rate| Header { answer_kib_s: Some(Header::kib_s_of(rate)), ..header() };
        for (rate, back) in
            [(0, 1024), (1025, 1024), (125_000_000, 124_999_680), (u64::MAX, (u32::MAX as u64) << 10)]
        {
            let decoded = Header::decode(&told(rate).encode()).expect("good");
            assert_eq!(decoded.answer_bytes_per_s(), Some(back));
        }
        assert_eq!(told(1).answer(Kind::GetReply).answer_kib_s, None);
        assert_eq!(header().answer_bytes_per_s(), None);
    }

    #[test]
    fn what_is_said_is_compared() {
        let header = header().with_body(b"a table", 4096);
        assert_eq!(header.body_bytes, 7 + 4096);
        assert_eq!(Header::decode(&header.encode()).and_then(|header| header.check_said(b"a table")), Ok(()));
        assert_eq!(header.check_said(b"a tablf"), Err(Malformed::BodyChecksum));
        assert_eq!(header.check_said(b"a tabl"), Err(Malformed::BodyChecksum));
        assert_eq!(header.answer(Kind::PutReply).check_said(&[]), Ok(()));
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let good = header().encode();
        for bit in 0..HEADER_BYTES * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Header::decode(&bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn unknown_values_are_refused_behind_a_good_checksum() {
        let edit = |at: usize, value: u8| {
            let mut bytes = header().encode();
            bytes[at] = value;
            Header::decode(&seal(bytes)).expect_err("refused")
        };
        assert_eq!(edit(6, 0), Malformed::Unknown("frame kind", 0));
        assert_eq!(edit(48, 0), Malformed::Unknown("status", 0));
        assert_eq!(edit(4, 0xee), Malformed::Version(0xee));
        assert_eq!(edit(15, 0xff), Malformed::Bounds("body length"));
    }
}

//! What was asked on a connection, and whether an answer is one to it. An intermediary that lies
//! about its answer is a protocol error, never a panic.

use std::collections::VecDeque;

use crate::error::{Error, ErrorKind, Result};
use crate::ids::{Checksum, MemberSet, Placement};
use crate::page::{PageIndex, PageRange};
use crate::transport::{Frame, StateAssembler};
use crate::wire::access::{Endpoint, KeyEntry, decode_granted};
use crate::wire::entry::{Entry, decode_table};
use crate::wire::message::{VmdReply, VmdRequest};
use crate::wire::run::{decode_pages, decode_runs};
use crate::wire::{Encoding, IndexEntry, Kind, Malformed, Missing, PageEntry, Referral};

/// A request whose answer has not come.
#[derive(Debug)]
pub(super) struct Asked {
    pub expected: Expected,
    /// Page and table bytes that it moves, there and back.
    pub bytes: usize,
}

/// What the answer must be.
#[derive(Debug)]
pub(super) enum Expected {
    /// So many placements.
    Stored(usize),
    /// So many placements, and who of these has no copies.
    Copied(usize, MemberSet),
    /// The same, of pages that were there.
    Spread(usize, MemberSet),
    /// The same, of pages that were written already.
    Settled(usize, MemberSet),
    /// The other end of a backend.
    Attached,
    /// So many places, and keys.
    Leased(usize),
    /// These pages, in this order, without their bytes, and keys.
    Reached(Vec<PageIndex>),
    /// So many answers to offered pages.
    Referred(usize),
    Hinted,
    Indexed,
    /// These pages, in this order.
    Pages(Vec<PageIndex>),
    /// Entries inside of this range.
    Located(PageRange),
    Discarded,
    Dropped,
    /// The state was stored.
    StateStored,
    /// A control message without content.
    Done,
    Volume,
    Statistics,
    Verdict,
    State(StateAssembler),
}

/// A checked answer. Its tables are where [`Expected::check`] was told to put them.
#[derive(Debug)]
pub(super) enum Answer {
    Stored(Missing),
    Referred,
    Indexed,
    Pages {
        /// Where in the frame's body the page bytes begin.
        bytes_at: usize,
    },
    Located,
    Done,
    Control(VmdReply),
    State(Vec<u8>),
    Attached(Box<Endpoint>),
    Leased,
    Reached {
        limited: bool,
    },
}

/// Where answers' tables are decoded to.
pub(super) struct Tables<'t> {
    pub entries: &'t mut Vec<PageEntry>,
    pub located: &'t mut Vec<IndexEntry>,
    pub stored: &'t mut Vec<Option<Placement>>,
    pub referred: &'t mut Vec<Referral>,
    pub keys: &'t mut Vec<KeyEntry>,
}

impl Expected {
    /// What answers a control request; `None` for those that are no plain control requests.
    pub fn control(request: &VmdRequest) -> Option<Self> {
        match request {
            VmdRequest::Create { .. }
            | VmdRequest::Members(_)
            | VmdRequest::Commit
            | VmdRequest::Seal
            | VmdRequest::Claim { .. }
            | VmdRequest::Park(_)
            | VmdRequest::Run
            | VmdRequest::Succeed { .. }
            | VmdRequest::Inherit(_)
            | VmdRequest::Copies(_)
            | VmdRequest::Fence
            | VmdRequest::Dissolve => Some(Self::Done),
            VmdRequest::ClaimParked(_) => Some(Self::Verdict),
            VmdRequest::Describe => Some(Self::Volume),
            VmdRequest::Statistics => Some(Self::Statistics),
            VmdRequest::PutState { .. }
            | VmdRequest::GetState
            | VmdRequest::PutPiece { .. }
            | VmdRequest::InheritPiece { .. }
            | VmdRequest::GetPiece { .. } => None,
        }
    }

    pub fn check_kind(&self, kind: Kind) -> Result<()> {
        let wanted = match self {
            Self::Stored(_) => Kind::PutReply,
            Self::Copied(..) => Kind::PutCopiesReply,
            Self::Spread(..) => Kind::SpreadReply,
            Self::Settled(..) => Kind::SettleReply,
            Self::Attached => Kind::AttachReply,
            Self::Leased(_) => Kind::LeaseReply,
            Self::Reached(_) => Kind::ReachReply,
            Self::Referred(_) => Kind::ReferReply,
            Self::Hinted => Kind::HintReply,
            Self::Indexed => Kind::PutIndexReply,
            Self::Pages(_) => Kind::GetReply,
            Self::Located(_) => Kind::LocateReply,
            Self::Discarded => Kind::DiscardReply,
            Self::Dropped => Kind::DropReply,
            Self::StateStored
            | Self::Done
            | Self::Volume
            | Self::Statistics
            | Self::Verdict
            | Self::State(_) => Kind::VmdReply,
        };
        if kind != wanted {
            return Err(Error::new(ErrorKind::Protocol, format!("a {kind:?} where a {wanted:?} belongs")));
        }
        Ok(())
    }

    /// Takes a piece of state.
    pub fn take_piece(&mut self, frame: Frame<'_>) -> Result<()> {
        match self {
            Self::State(assembler) => assembler.push(frame),
            _ => Err(Error::new(ErrorKind::Protocol, "a piece of state that nobody asked for")),
        }
    }

    /// Checks the answer of a request that went well.
    pub fn check(&mut self, frame: Frame<'_>, tables: Tables<'_>) -> Result<Answer> {
        let Tables { entries, located, stored, referred, keys } = tables;
        let count = usize::from(frame.header.count);
        match self {
            Self::Stored(asked) => {
                decode_runs(frame.body, count, stored)?;
                same(stored.len() == *asked, "another number of placements than of pages")?;
                Ok(Answer::Stored(Missing::NONE))
            }
            Self::Attached => Ok(Answer::Attached(Box::new(Endpoint::decode(frame.body)?))),
            Self::Leased(asked) => {
                decode_granted(frame.body, count, stored, keys)?;
                same(stored.len() == *asked, "another number of places than of pages")?;
                Ok(Answer::Leased)
            }
            Self::Reached(pages) => {
                decode_granted(frame.body, count, entries, keys)?;
                check_pages(entries, pages)?;
                Ok(Answer::Reached { limited: frame.header.answer_kib_s.is_some() })
            }
            Self::Copied(asked, members) | Self::Spread(asked, members) | Self::Settled(asked, members) => {
                let parts = frame.body.split_at_checked(Missing::BYTES).ok_or(Malformed::Truncated)?;
                let missing = Missing::decode(parts.0)?;
                decode_runs(parts.1, count, stored)?;
                same(stored.len() == *asked, "another number of placements than of pages")?;
                let named = missing.all();
                same(named.and(*members) == named, "a copy is missing that was to be nowhere")?;
                Ok(Answer::Stored(missing))
            }
            Self::Referred(asked) => {
                decode_table(frame.body, count, referred)?;
                same(referred.len() == *asked, "another number of answers than of pages")?;
                Ok(Answer::Referred)
            }
            Self::Indexed => Ok(Answer::Indexed),
            Self::Pages(pages) => {
                let bytes = decode_pages((&frame.header, frame.body), entries)?;
                check_pages(entries, pages)?;
                Ok(Answer::Pages { bytes_at: frame.body.len() - bytes.len() })
            }
            Self::Located(range) => {
                decode_runs(frame.body, count, located)?;
                check_located(located, *range)?;
                Ok(Answer::Located)
            }
            Self::Discarded | Self::Dropped | Self::Hinted => Ok(Answer::Done),
            Self::StateStored
            | Self::Done
            | Self::Volume
            | Self::Statistics
            | Self::Verdict
            | Self::State(_) => self.check_control(VmdReply::decode(frame.body)?),
        }
    }

    fn check_control(&mut self, reply: VmdReply) -> Result<Answer> {
        match (self, reply) {
            (Self::StateStored, VmdReply::Done) => Ok(Answer::Done),
            (Self::Done, VmdReply::Done) => Ok(Answer::Control(VmdReply::Done)),
            (Self::Volume, reply @ VmdReply::Volume(_))
            | (Self::Statistics, reply @ VmdReply::Statistics(_))
            | (Self::Verdict, reply @ VmdReply::Verdict(_)) => Ok(Answer::Control(reply)),
            (Self::State(assembler), VmdReply::State { bytes, checksum }) => {
                Ok(Answer::State(assembler.finish(bytes, Checksum(checksum))?))
            }
            _ => Err(Error::new(ErrorKind::Protocol, "a message that does not answer what was asked")),
        }
    }
}

/// The pages that were asked for, in their order, each with its bytes or gone.
fn check_pages(entries: &[PageEntry], asked: &[PageIndex]) -> Result<()> {
    same(entries.len() == asked.len(), "another number of pages than was asked for")?;
    let right = |entry: &PageEntry| matches!(entry.encoding, Encoding::Raw | Encoding::Gone);
    let all = asked.iter().zip(entries).all(|(page, entry)| *page == entry.page && right(entry));
    same(all, "other pages than were asked for")
}

/// Entries are ascending, do not overlap, and lie in the range that was asked for.
fn check_located(entries: &[IndexEntry], range: PageRange) -> Result<()> {
    let end_of = |range: PageRange| u64::from(range.first.0) + u64::from(range.pages);
    let mut from = u64::from(range.first.0);
    for entry in entries {
        same(u64::from(entry.page.0) >= from, "index entries that are not ascending in the range")?;
        from = end_of(entry.range());
    }
    same(from <= end_of(range), "index entries outside of the range")
}

fn same(holds: bool, otherwise: &str) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::new(ErrorKind::Protocol, otherwise)) }
}

/// Requests by sequence number, from 1 on. Answers may come in any order.
#[derive(Debug)]
pub(super) struct Outstanding {
    /// Sequence number of the first in `asked`.
    first: u64,
    asked: VecDeque<Option<Asked>>,
    bytes: usize,
    /// Page lists of requests that ended, to be used again.
    spare: Vec<Vec<PageIndex>>,
}

/// Page lists that are kept for later.
const SPARE_MAX: usize = 64;

impl Default for Outstanding {
    fn default() -> Self {
        Self { first: 1, asked: VecDeque::new(), bytes: 0, spare: Vec::new() }
    }
}

impl Outstanding {
    /// The number of the next request.
    pub fn next(&self) -> u64 {
        self.first + self.asked.len() as u64
    }

    /// Notes a request under [`Self::next`].
    pub fn add(&mut self, asked: Asked) -> u64 {
        let sequence = self.next();
        self.bytes += asked.bytes;
        self.asked.push_back(Some(asked));
        sequence
    }

    /// The request of this number; `None` unless it is outstanding.
    pub fn get(&mut self, sequence: u64) -> Option<&mut Asked> {
        let at = usize::try_from(sequence.checked_sub(self.first)?).ok()?;
        self.asked.get_mut(at)?.as_mut()
    }

    /// Forgets a request that ended.
    pub fn finish(&mut self, sequence: u64) {
        let at = sequence.checked_sub(self.first).and_then(|at| usize::try_from(at).ok());
        let Some(asked) = at.and_then(|at| self.asked.get_mut(at)).and_then(Option::take) else { return };
        self.bytes -= asked.bytes;
        if let Expected::Pages(mut pages) | Expected::Reached(mut pages) = asked.expected
            && self.spare.len() < SPARE_MAX
        {
            pages.clear();
            self.spare.push(pages);
        }
        while let Some(None) = self.asked.front() {
            self.asked.pop_front();
            self.first += 1;
        }
    }

    /// Bytes of all that are outstanding.
    pub const fn bytes(&self) -> usize {
        self.bytes
    }

    /// An empty list of pages.
    pub fn page_list(&mut self) -> Vec<PageIndex> {
        self.spare.pop().unwrap_or_default()
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::ids::{Generation, MemberIndex, Round, SlotIndex};
    use crate::wire::Header;
    use crate::wire::run::encode_runs;

    fn asked(expected: Expected) -> Asked {
        Asked { expected, bytes: 10 }
    }

    #[test]
    fn requests_end_in_any_order_and_once() {
        let mut outstanding = Outstanding::default();
        for n in 1..=4 {
            assert_eq!(outstanding.add(asked(Expected::Indexed)), n);
        }
        assert_eq!(outstanding.bytes(), 40);
        for n in [3, 1, 4] {
            assert!(outstanding.get(n).is_some());
            outstanding.finish(n);
            assert!(outstanding.get(n).is_none());
            outstanding.finish(n);
        }
        assert_eq!((outstanding.bytes(), outstanding.next()), (10, 5));
        assert!(
            outstanding.get(0).is_none()
                && outstanding.get(5).is_none()
                && outstanding.get(u64::MAX).is_none()
        );
        outstanding.finish(2);
        assert_eq!((outstanding.bytes(), outstanding.asked.len()), (0, 0));
        assert_eq!(outstanding.add(asked(Expected::Indexed)), 5);
    }

    fn checked(mut expected: Expected, kind: Kind, count: u16, body: &[u8]) -> Result<Answer> {
        let header = Header { count, ..Header::new(kind) }.with_body(body, 0);
        expected.check_kind(kind)?;
        let (entries, located) = (&mut Vec::new(), &mut Vec::new());
        let (stored, referred) = (&mut Vec::new(), &mut Vec::new());
        let tables = Tables { entries, located, stored, referred, keys: &mut Vec::new() };
        expected.check(Frame { header, body }, tables)
    }

    #[test]
    fn lies_are_protocol_errors() {
        let place = Placement { member: MemberIndex(0), slot: SlotIndex(1), generation: Generation(1) };
        let mut placements = Vec::new();
        encode_runs([Some(place), None], &mut placements);
        assert!(checked(Expected::Stored(2), Kind::PutReply, 2, &placements).is_ok());
        let refused = |answer: Result<Answer>| {
            assert_eq!(answer.expect_err("a lie").kind, ErrorKind::Protocol);
        };
        refused(checked(Expected::Stored(3), Kind::PutReply, 2, &placements));
        refused(checked(Expected::Stored(2), Kind::PutReply, 2, &placements[1..]));
        refused(checked(Expected::Stored(2), Kind::GetReply, 2, &placements));
        let copied = |full: u64, lost: u64, asked| {
            let mut body = vec![0; Missing::BYTES];
            Missing { full: MemberSet(full), lost: MemberSet(lost) }.encode(&mut body);
            body.extend_from_slice(&placements);
            checked(Expected::Copied(asked, MemberSet(7)), Kind::PutCopiesReply, 2, &body)
        };
        assert!(copied(2, 4, 2).is_ok());
        refused(copied(2, 2, 2));
        refused(copied(8, 0, 2));
        refused(copied(0, 0, 3));
        refused(checked(Expected::Copied(2, MemberSet(7)), Kind::PutCopiesReply, 2, &placements[..9]));
        let spread = [&[0; Missing::BYTES], &placements[..]].concat();
        assert!(checked(Expected::Spread(2, MemberSet(7)), Kind::SpreadReply, 2, &spread).is_ok());
        refused(checked(Expected::Spread(3, MemberSet(7)), Kind::SpreadReply, 2, &spread));
        refused(checked(Expected::Spread(2, MemberSet(7)), Kind::PutCopiesReply, 2, &spread));
        refused(checked(Expected::Referred(1), Kind::ReferReply, 1, &[4, 0, 0, 0, 0, 0, 0, 0]));
        refused(checked(Expected::Referred(2), Kind::ReferReply, 1, &[1, 0, 0, 0, 0, 0, 0, 0]));

        assert!(checked(Expected::Settled(2, MemberSet(7)), Kind::SettleReply, 2, &spread).is_ok());
        refused(checked(Expected::Settled(3, MemberSet(7)), Kind::SettleReply, 2, &spread));
        assert!(checked(Expected::Leased(2), Kind::LeaseReply, 2, &placements).is_ok());
        refused(checked(Expected::Leased(3), Kind::LeaseReply, 2, &placements));
        refused(checked(Expected::Leased(2), Kind::LeaseReply, 2, &spread));
        refused(checked(Expected::Attached, Kind::AttachReply, 0, &[]));

        let pages = || Expected::Pages(vec![PageIndex(5), PageIndex(6)]);
        let reply = |entries: &[PageEntry]| {
            let mut body = Vec::new();
            let runs = encode_runs(entries.iter().copied(), &mut body);
            checked(pages(), Kind::GetReply, runs as u16, &body)
        };
        let gone = |page| PageEntry::gone(PageIndex(page));
        assert!(reply(&[gone(5), gone(6)]).is_ok());
        refused(reply(&[gone(6), gone(5)]));
        refused(reply(&[gone(5)]));
        refused(reply(&[gone(5), gone(6), gone(7)]));
        refused(reply(&[gone(5), PageEntry::zero(PageIndex(6), 1, Round(0))]));
        refused(reply(&[gone(5), PageEntry::raw(PageIndex(6), Round(0), Checksum(0))]));
        let reached = |entries: &[PageEntry]| {
            let mut body = Vec::new();
            let runs = encode_runs(entries.iter().copied(), &mut body);
            let pages = Expected::Reached(vec![PageIndex(5), PageIndex(6)]);
            checked(pages, Kind::ReachReply, runs as u16, &body)
        };
        assert!(reached(&[PageEntry::raw(PageIndex(5), Round(0), Checksum(0)), gone(6)]).is_ok());
        refused(reached(&[gone(5)]));
        refused(reached(&[gone(6), gone(5)]));
        refused(checked(Expected::Volume, Kind::VmdReply, 0, &[0]));
        refused(checked(Expected::State(StateAssembler::new()), Kind::VmdReply, 0, &[0]));
    }

    #[test]
    fn index_entries_stay_in_what_was_asked_for() {
        let range = PageRange::new(PageIndex(10), 10);
        let run = |first, pages| IndexEntry::zero(PageIndex(first), pages, Round(0));
        check_located(&[run(10, 2), run(15, 5)], range).expect("good");
        check_located(&[], range).expect("good");
        for bad in [
            [run(9, 1), run(12, 1)],
            [run(10, 3), run(12, 1)],
            [run(12, 1), run(11, 1)],
            [run(10, 1), run(19, 2)],
        ] {
            assert!(check_located(&bad, range).is_err(), "{bad:?}");
        }
    }
}

//! What is said where pages do not travel on the connection: a backend's client moves them itself, from and to memory
//! that the intermediary lets it reach.
//!
//! ```text
//!   client                                   intermediary
//!     Attach ------------------------------->  lets the client's end of the backend in
//!     <-------------------------- AttachReply  its own end
//!     Lease -------------------------------->  takes slots for pages that there are
//!     <--------------------------- LeaseReply  where each goes, and how to reach that
//!     (writes the pages)
//!     Settle ------------------------------->  they are stored: as if they had been put
//!     <-------------------------- SettleReply  as to a Put with copies
//!     Reach -------------------------------->  keeps pages where they are
//!     <--------------------------- ReachReply  which are there, and how to reach them
//!     (reads the pages)
//!     Release ------------------------------>  lets go of leases and of what is kept
//! ```
//!
//! What the two ends of a backend say to each other is bounded here, and means nothing to anybody else.

use super::Malformed;
use super::entry::{Encoding, Entry, PageEntry};
use super::run::{RunEntry, runs_then};
use crate::ids::{MemberSet, SlotIndex};
use crate::limits;

/// Bytes that mean something to a backend only: at least one, at most `MAX`.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Opaque<const MAX: usize> {
    bytes: [u8; MAX],
    length: u16,
}

/// One end of a backend, as the other needs to know it.
pub type Endpoint = Opaque<{ limits::ENDPOINT_BYTES_MAX }>;

/// How to reach memory.
pub type AccessKey = Opaque<{ limits::ACCESS_KEY_BYTES_MAX }>;

impl<const MAX: usize> Opaque<MAX> {
    /// These bytes.
    ///
    /// # Errors
    /// There are none, or too many.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        if bytes.is_empty() || bytes.len() > MAX {
            return Err(Malformed::Bounds("bytes of a backend"));
        }
        let mut all = [0; MAX];
        all[..bytes.len()].copy_from_slice(bytes);
        Ok(Self { bytes: all, length: bytes.len() as u16 })
    }

    /// The bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }
}

impl<const MAX: usize> std::fmt::Debug for Opaque<MAX> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} bytes of a backend", self.length)
    }
}

/// How to reach consecutive slots: the key is that of the first one's first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyEntry {
    /// The first slot.
    pub first: SlotIndex,
    /// How many.
    pub slots: u16,
    /// What reaches them.
    pub key: AccessKey,
}

impl KeyEntry {
    /// The slot's place among those that the key reaches; `None` for one that it does not.
    #[must_use]
    pub fn place_of(&self, slot: SlotIndex) -> Option<u16> {
        let at = u16::try_from(slot.0.checked_sub(self.first.0)?).ok()?;
        (at < self.slots).then_some(at)
    }
}

impl Entry for KeyEntry {
    const BYTES: usize = 8 + limits::ACCESS_KEY_BYTES_MAX;

    fn encode(&self, out: &mut [u8]) {
        out[..4].copy_from_slice(&self.first.0.to_le_bytes());
        out[4..6].copy_from_slice(&self.slots.to_le_bytes());
        out[6..8].copy_from_slice(&self.key.length.to_le_bytes());
        out[8..Self::BYTES].copy_from_slice(&self.key.bytes);
    }

    fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let (first, rest) = bytes.split_first_chunk().ok_or(Malformed::Truncated)?;
        let (slots, rest) = rest.split_first_chunk().ok_or(Malformed::Truncated)?;
        let (length, rest) = rest.split_first_chunk().ok_or(Malformed::Truncated)?;
        let (first, slots) = (SlotIndex(u32::from_le_bytes(*first)), u16::from_le_bytes(*slots));
        if slots == 0 || first.0.checked_add(slots.into()).is_none() {
            return Err(Malformed::Bounds("slots of a key"));
        }
        let length = usize::from(u16::from_le_bytes(*length));
        let (key, padding) = rest.split_at_checked(length).ok_or(Malformed::Bounds("bytes of a backend"))?;
        if padding.iter().any(|byte| *byte != 0) {
            return Err(Malformed::Reserved);
        }
        Ok(Self { first, slots, key: AccessKey::decode(key)? })
    }
}

/// The number of a request: what `Release` consists of.
impl Entry for u64 {
    const BYTES: usize = size_of::<Self>();

    fn encode(&self, out: &mut [u8]) {
        out[..Self::BYTES].copy_from_slice(&self.to_le_bytes());
    }

    fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        Ok(Self::from_le_bytes(bytes.try_into().map_err(|_| Malformed::Truncated)?))
    }
}

/// Decodes the answer to `Lease` or `Reach`: `count` runs into `out`, and the keys behind them.
///
/// # Errors
/// What is wrong with the bytes; what the buffers then hold means nothing.
pub fn decode_granted<E: RunEntry>(
    body: &[u8],
    count: usize,
    out: &mut Vec<E>,
    keys: &mut Vec<KeyEntry>,
) -> Result<(), Malformed> {
    keys.clear();
    let rest = runs_then(body, count, out)?;
    let entries = rest.chunks_exact(KeyEntry::BYTES);
    if !entries.remainder().is_empty() {
        return Err(Malformed::Trailing);
    }
    if entries.len() > limits::BATCH_PAGES_MAX {
        return Err(Malformed::Bounds("keys"));
    }
    for entry in entries {
        keys.push(KeyEntry::decode(entry)?);
    }
    Ok(())
}

/// What `Settle` says in front of its table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settled {
    /// The number of the `Lease` whose slots hold the pages, in their order.
    pub lease: u64,
    /// The members that shall hold copies; none where there are to be none.
    pub copies: MemberSet,
}

impl Entry for Settled {
    const BYTES: usize = 8 + MemberSet::BYTES;

    fn encode(&self, out: &mut [u8]) {
        out[..8].copy_from_slice(&self.lease.to_le_bytes());
        self.copies.encode(&mut out[8..Self::BYTES]);
    }

    fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let (lease, copies) = bytes.split_first_chunk().ok_or(Malformed::Truncated)?;
        Ok(Self { lease: u64::from_le_bytes(*lease), copies: MemberSet::decode(copies)? })
    }
}

/// Decodes the body of `Settle`: `count` runs into `out`, of pages that have bytes, one at least.
///
/// # Errors
/// What is wrong with the bytes.
pub fn decode_settle(body: &[u8], count: usize, out: &mut Vec<PageEntry>) -> Result<Settled, Malformed> {
    let (settled, table) = body.split_at_checked(Settled::BYTES).ok_or(Malformed::Truncated)?;
    if !runs_then(table, count, out)?.is_empty() {
        return Err(Malformed::Trailing);
    }
    if out.is_empty() || out.iter().any(|entry| entry.encoding != Encoding::Raw) {
        return Err(Malformed::Bounds("pages that were written"));
    }
    Settled::decode(settled)
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::ids::{Checksum, Generation, MemberIndex, Placement, Round};
    use crate::page::PageIndex;
    use crate::wire::entry::encode_table;
    use crate::wire::run::encode_runs;

    fn key(byte: u8) -> KeyEntry {
        let key = AccessKey::decode(&[byte; 16]).expect("fits");
        KeyEntry { first: SlotIndex(512), slots: 512, key }
    }

    #[test]
    fn what_a_backend_says_is_bounded() {
        assert!(Endpoint::decode(&[]).is_err());
        assert!(Endpoint::decode(&[1; limits::ENDPOINT_BYTES_MAX + 1]).is_err());
        let most = [1; limits::ENDPOINT_BYTES_MAX];
        assert_eq!(Endpoint::decode(&most).expect("fits").as_bytes(), most);
    }

    #[test]
    fn a_key_says_which_slots_it_reaches() {
        assert_eq!(key(1).place_of(SlotIndex(512)), Some(0));
        assert_eq!(key(1).place_of(SlotIndex(1023)), Some(511));
        assert_eq!(key(1).place_of(SlotIndex(1024)).or(key(1).place_of(SlotIndex(511))), None);
        let mut bytes = [0; KeyEntry::BYTES];
        key(1).encode(&mut bytes);
        assert_eq!(KeyEntry::decode(&bytes), Ok(key(1)));
        bytes[6] = 15;
        assert_eq!(KeyEntry::decode(&bytes), Err(Malformed::Reserved));
        bytes[6] = 65;
        assert_eq!(KeyEntry::decode(&bytes), Err(Malformed::Bounds("bytes of a backend")));
        KeyEntry { slots: 0, ..key(1) }.encode(&mut bytes);
        assert_eq!(KeyEntry::decode(&bytes), Err(Malformed::Bounds("slots of a key")));
    }

    #[test]
    fn grants_are_runs_and_keys() {
        let place = Placement { member: MemberIndex(0), slot: SlotIndex(600), generation: Generation(1) };
        let mut body = Vec::new();
        let runs = encode_runs([Some(place), None], &mut body);
        encode_table([key(1), key(2)], &mut body);
        let (mut places, mut keys) = (Vec::<Option<Placement>>::new(), Vec::new());
        decode_granted(&body, runs, &mut places, &mut keys).expect("own bytes decode");
        assert_eq!((places.len(), keys.as_slice()), (2, &[key(1), key(2)][..]));
        let short = &body[..body.len() - 1];
        assert_eq!(decode_granted(short, runs, &mut places, &mut keys), Err(Malformed::Trailing));
        body.extend(vec![0; limits::BATCH_PAGES_MAX * KeyEntry::BYTES]);
        let many = decode_granted(&body, runs, &mut places, &mut keys);
        assert_eq!(many, Err(Malformed::Bounds("keys")));
    }

    #[test]
    fn only_pages_with_bytes_are_settled() {
        let settled = Settled { lease: 7, copies: MemberSet(3) };
        let body = |entries: &[PageEntry]| {
            let mut body = Vec::new();
            encode_table([settled], &mut body);
            let runs = encode_runs(entries.iter().copied(), &mut body);
            (body, runs)
        };
        let page = PageEntry::raw(PageIndex(1), Round(0), Checksum(5));
        let (bytes, runs) = body(&[page]);
        let mut out = Vec::new();
        assert_eq!(decode_settle(&bytes, runs, &mut out), Ok(settled));
        assert_eq!(out, [page]);
        let bad = Err(Malformed::Bounds("pages that were written"));
        for entries in [&[][..], &[PageEntry::zero(PageIndex(1), 1, Round(0))]] {
            let (bytes, runs) = body(entries);
            assert_eq!(decode_settle(&bytes, runs, &mut out), bad);
        }
        assert_eq!(decode_settle(&[&bytes[..], &[0]].concat(), runs, &mut out), Err(Malformed::Trailing));
    }
}

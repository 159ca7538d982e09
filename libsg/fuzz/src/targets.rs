//! One function for each decoder of a peer's bytes. None may panic, whatever the bytes are; what
//! decodes must say the same when it is encoded again.

use std::fmt::Debug;
use std::io::Write;
use std::os::unix::net::UnixStream;

use libsg::ids::{Checksum, MemberSet, Placement};
use libsg::limits;
use libsg::page::{PAGE_BYTES, PageIndex, PageRange};
use libsg::transport::{Inbox, StateAssembler};
use libsg::wire::access::{AccessKey, Endpoint, KeyEntry, Opaque, Settled, decode_granted, decode_settle};
use libsg::wire::copies::copied_bytes;
use libsg::wire::datagram::Datagram;
use libsg::wire::entry::{Entry, decode_table, encode_table, page_bytes};
use libsg::wire::final_set::{self, Blob, FinalSet};
use libsg::wire::handshake::{Challenge, Hello, PoolKey, decode_mac};
use libsg::wire::message::{self, Talk, VmdReply, VmdRequest};
use libsg::wire::run::{RunEntry, decode_pages, decode_runs, encode_runs, table_bytes};
use libsg::wire::{
    Credit, DiscardEntry, GetEntry, HEADER_BYTES, Header, HintEntry, IndexEntry, Kind, Missing, MovedEntry,
    PageEntry, ReferEntry, Referral,
};

/// A header, as it is and under a checksum that is right.
pub fn header(data: &[u8]) {
    let Some(bytes) = data.first_chunk::<HEADER_BYTES>() else { return };
    for bytes in [*bytes, sealed(*bytes)] {
        if let Ok(header) = Header::decode(&bytes) {
            assert!(header.body_bytes as usize <= header.kind.body_bytes_max());
            assert_eq!(header.encode(), bytes);
        }
    }
}

/// The bytes under the checksum that belongs to them.
pub fn sealed(mut bytes: [u8; HEADER_BYTES]) -> [u8; HEADER_BYTES] {
    let sum = Checksum::of(&bytes[..HEADER_BYTES - 4]);
    bytes[HEADER_BYTES - 4..].copy_from_slice(&sum.0.to_le_bytes());
    bytes
}

/// The first two bytes are a number of entries or runs, the rest is a table, of each kind in turn.
pub fn tables(data: &[u8]) {
    let Some((count, body)) = counted(data) else { return };
    runs::<PageEntry>(body, count);
    runs::<IndexEntry>(body, count);
    runs::<GetEntry>(body, count);
    runs::<Option<Placement>>(body, count);
    table::<DiscardEntry>(body, count);
    table::<PageRange>(body, count);
    table::<PageIndex>(body, count);
    table::<MemberSet>(body, count);
    table::<Missing>(body, count);
    table::<ReferEntry>(body, count);
    table::<HintEntry>(body, count);
    table::<Referral>(body, count);
    table::<MovedEntry>(body, count);
    table::<KeyEntry>(body, count);
    table::<Settled>(body, count);
    table::<u64>(body, count);
    let mut entries = Vec::new();
    if decode_runs(body, count, &mut entries).is_ok()
        && let Ok(bytes) = copied_bytes(&entries)
    {
        assert_eq!(bytes, entries.len() * PAGE_BYTES);
        assert!(entries.iter().all(|entry: &IndexEntry| entry.placement.is_some()));
    }
}

fn counted(data: &[u8]) -> Option<(usize, &[u8])> {
    let (count, body) = data.split_first_chunk::<2>()?;
    Some((u16::from_le_bytes(*count).into(), body))
}

fn table<E: Entry + Debug>(body: &[u8], count: usize) {
    let mut entries = Vec::<E>::new();
    if decode_table(body, count, &mut entries).is_ok() {
        assert_eq!(entries.len(), count);
        let mut again = Vec::new();
        encode_table(entries, &mut again);
        assert_eq!(again, body);
    }
}

fn runs<E: RunEntry + Debug>(body: &[u8], count: usize) {
    let mut entries = Vec::<E>::new();
    if decode_runs(body, count, &mut entries).is_ok() {
        assert!(entries.len() <= E::ENTRIES_MAX);
        // Runs that could have been one become one: the entries are the same.
        let (mut table, mut again) = (Vec::new(), Vec::<E>::new());
        let runs = encode_runs(entries.iter().copied(), &mut table);
        assert!(runs <= count && table.len() <= body.len());
        assert_eq!(decode_runs(&table, runs, &mut again), Ok(()));
        assert_eq!(again, entries);
    } else {
        assert!(entries.len() <= E::ENTRIES_MAX);
    }
}

/// The first two bytes are a number of runs, the rest is the body of a frame of pages.
pub fn pages(data: &[u8]) {
    let Some((count, body)) = counted(data) else { return };
    let mut entries = Vec::new();
    let header = Header { count: count as u16, ..Header::new(Kind::Pages) };
    // Wherever the pages begin, the checksum in front of them is right once.
    for pages in 0..=body.len() / PAGE_BYTES {
        let header = header.with_body(&body[..body.len() - pages * PAGE_BYTES], pages * PAGE_BYTES);
        if let Ok(bytes) = decode_pages((&header, body), &mut entries) {
            assert_eq!(bytes.len(), page_bytes(&entries));
            assert_eq!(bytes.len(), pages * PAGE_BYTES);
            assert!(bytes.len() + table_bytes(&entries) <= body.len());
            assert!(body.ends_with(bytes));
            assert!(entries.iter().all(|entry| entry.page.checked_add(entry.run_pages.into()).is_some()));
        }
    }
}

/// What is said where a backend moves pages. The first two bytes are a number of runs, the rest is a body, of each kind
/// in turn.
pub fn access(data: &[u8]) {
    if let Ok(endpoint) = Endpoint::decode(data) {
        assert_eq!(endpoint.as_bytes(), data);
    }
    assert_eq!(Opaque::<8>::decode(data).is_ok(), (1..=8).contains(&data.len()));
    let Some((count, body)) = counted(data) else { return };
    granted::<Option<Placement>>(body, count);
    granted::<PageEntry>(body, count);
    granted::<IndexEntry>(body, count);
    let mut pages = Vec::new();
    if let Ok(settled) = decode_settle(body, count, &mut pages) {
        assert!(!pages.is_empty() && page_bytes(&pages) == pages.len() * PAGE_BYTES);
        let mut again = Vec::new();
        encode_table([settled], &mut again);
        let (runs, mut back) = (encode_runs(pages.iter().copied(), &mut again), Vec::new());
        assert_eq!(decode_settle(&again, runs, &mut back), Ok(settled));
        assert_eq!(back, pages);
    }
}

fn granted<E: RunEntry + Debug>(body: &[u8], count: usize) {
    let (mut entries, mut keys) = (Vec::<E>::new(), Vec::new());
    if decode_granted(body, count, &mut entries, &mut keys).is_ok() {
        assert!(entries.len() <= E::ENTRIES_MAX && keys.len() <= limits::BATCH_PAGES_MAX);
        assert!(keys.iter().all(|key: &KeyEntry| AccessKey::decode(key.key.as_bytes()) == Ok(key.key)));
        let (mut again, mut back, mut same) = (Vec::new(), Vec::<E>::new(), Vec::new());
        let runs = encode_runs(entries.iter().copied(), &mut again);
        encode_table(keys.iter().copied(), &mut again);
        assert_eq!(decode_granted(&again, runs, &mut back, &mut same), Ok(()));
        assert_eq!((back, same), (entries, keys));
    }
}

/// A control message, of each kind in turn.
pub fn messages(data: &[u8]) {
    if let Ok(talk) = Talk::decode(data) {
        let again = message::encode(&talk).expect("what was decoded can be encoded");
        assert_eq!(Talk::decode(&again), Ok(talk));
    }
    if let Ok(request) = VmdRequest::decode(data) {
        let again = message::encode(&request).expect("what was decoded can be encoded");
        assert_eq!(VmdRequest::decode(&again), Ok(request));
    }
    if let Ok(reply) = VmdReply::decode(data) {
        let again = message::encode(&reply).expect("what was decoded can be encoded");
        assert_eq!(VmdReply::decode(&again), Ok(reply));
    }
}

/// How far, and how fast, the direct path may be written.
pub fn credit(data: &[u8]) {
    if let Ok(credit) = Credit::decode(data) {
        assert_eq!(credit.encode(), data);
    }
}

/// The first four bytes are the pages of the volume, the rest is a state blob behind pieces of a final set, each with its
/// length in front of it, in two bytes.
pub fn final_set(data: &[u8]) {
    let Some((pages, blobs)) = data.split_first_chunk::<4>() else { return };
    let decode = |mut rest: &[u8]| {
        let (mut set, mut runs, mut end) = (FinalSet::default(), Vec::new(), 0);
        let mut pieces = 0;
        loop {
            let length = rest.split_first_chunk().map(|(length, rest)| (u16::from_le_bytes(*length), rest));
            let (length, behind) = length?;
            let (blob, behind) = behind.split_at(usize::from(length).min(behind.len()));
            rest = behind;
            let taken = set.take(blob, u32::from_le_bytes(*pages), &mut |run, round| {
                assert!(run.first.0 >= end && run.pages > 0 && round.0 > 0);
                end = run.first.0 + run.pages;
                runs.push((run, round));
            });
            match taken.ok()? {
                Blob::Piece => pieces += 1,
                Blob::State(at) => {
                    assert_eq!(final_set::pieces_of(blob), Ok(pieces));
                    return Some((runs, blob[at..].to_vec()));
                }
            }
        }
    };
    if let Some((runs, state)) = decode(blobs)
        && let Some(encoded) = final_set::encode_within(SMALL, runs.iter().copied(), &state)
    {
        let all = encoded.pieces.iter().chain([&encoded.state]);
        let again: Vec<u8> =
            all.flat_map(|blob| [&(blob.len() as u16).to_le_bytes()[..], blob].concat()).collect();
        assert_eq!(decode(&again), Some((runs, state)));
    }
}

/// Blobs whose length fits two bytes.
const SMALL: final_set::Limits = final_set::Limits { blob_bytes: u16::MAX as usize, runs_bytes: 16 };

/// The body of a handshake frame, of each kind in turn.
pub fn handshake(data: &[u8]) {
    if let Ok(hello) = Hello::decode(data) {
        assert_eq!(hello.encode(), data);
        let _ = hello.common_version();
    }
    if let Ok(challenge) = Challenge::decode(data) {
        assert_eq!(challenge.encode().expect("what was decoded can be encoded"), data);
    }
    if let Ok(mac) = decode_mac(data) {
        assert_eq!(mac, data);
    }
}

/// A datagram, as it is and as one of the pool would have sealed it.
pub fn datagram(data: &[u8]) {
    let key = PoolKey::derive(b"of the fuzzed pool").announcement_key();
    for bytes in [data.to_vec(), key.seal(data.to_vec())] {
        if let Ok(datagram) = Datagram::decode(&bytes, &key) {
            let again = datagram.encode(&key).expect("what was decoded can be encoded");
            assert_eq!(Datagram::decode(&again, &key), Ok(datagram));
        }
    }
}

/// What an inbox is fed with: the first byte says in what pieces, the rest is frames, whose checksums are
/// made right where there is a whole header, and the body's with it.
pub fn stream(data: &[u8]) {
    let Some((cut, frames)) = data.split_first() else { return };
    let mut bytes = frames[..frames.len().min(32 << 10)].to_vec();
    seal_all(&mut bytes);
    let Ok((near, mut far)) = UnixStream::pair() else { return };
    if near.set_nonblocking(true).is_err() {
        return;
    }
    let (mut inbox, mut state, mut taken) = (Inbox::new(), StateAssembler::new(), 0);
    for piece in bytes.chunks(usize::from(*cut) * 64 + 16) {
        far.write_all(piece).expect("there is room");
        loop {
            match inbox.poll(&near) {
                Ok(Some(frame)) => {
                    assert_eq!(frame.body.len(), frame.header.body_bytes as usize);
                    taken += HEADER_BYTES + frame.body.len();
                    if frame.header.kind == Kind::State && state.push(frame).is_err() {
                        return;
                    }
                }
                Ok(None) => break,
                Err(_) => return,
            }
        }
    }
    assert!(taken <= bytes.len());
    assert!(inbox.received_bytes() as usize <= bytes.len());
    assert!(state.finish(limits::STATE_BYTES_MAX as u64 + 1, Checksum(0)).is_err());
}

fn seal_all(bytes: &mut [u8]) {
    let mut at = 0;
    while let Some(header) = bytes[at..].first_chunk::<HEADER_BYTES>() {
        let (header, body) = (sealed(*header), at + HEADER_BYTES);
        bytes[at..body].copy_from_slice(&header);
        let Ok(header) = Header::decode(&header) else { return };
        let end = body.saturating_add(header.body_bytes as usize).min(bytes.len());
        let said = if header.kind.has_bytes() { header.said } else { Checksum::of(&bytes[body..end]) };
        bytes[at..body].copy_from_slice(&Header { said, ..header }.encode());
        at = end;
    }
}

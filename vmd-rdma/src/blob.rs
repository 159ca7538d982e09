//! What the two ends of the backend say to each other through libsg, which looks at none of it.

use std::net::Ipv6Addr;

use libsg::ids::SlotIndex;
use libsg::page::PAGE_BYTES;
use libsg::wire::access::{AccessKey, Endpoint as Blob, KeyEntry};
use libsg::{Error, ErrorKind, Result};

use crate::verbs::{Endpoint, Remote};

/// How what follows is laid out, the first byte of an end. There is one way.
const LAYOUT: u8 = 1;

/// Bytes of a queue pair's description.
const END_BYTES: usize = 31;

/// Bytes of a key: where the memory begins, and what it was registered under.
const KEY_BYTES: usize = 12;

/// The largest packets that ports may have.
const MTUS_BYTES: [u32; 5] = [256, 512, 1024, 2048, 4096];

/// A queue pair, for the other end.
pub(crate) fn of_endpoint(end: &Endpoint) -> Result<Blob> {
    let mut bytes = [0; END_BYTES];
    bytes[0] = LAYOUT;
    bytes[1..5].copy_from_slice(&end.number.to_le_bytes());
    bytes[5..9].copy_from_slice(&end.packet_sequence.to_le_bytes());
    bytes[9..25].copy_from_slice(&end.gid.octets());
    bytes[25..27].copy_from_slice(&end.lid.to_le_bytes());
    bytes[27..31].copy_from_slice(&end.mtu_bytes.to_le_bytes());
    Ok(Blob::decode(&bytes)?)
}

/// The other end's queue pair.
///
/// # Errors
/// [`ErrorKind::Protocol`] for bytes that describe none.
pub(crate) fn endpoint(blob: &Blob) -> Result<Endpoint> {
    let no = || Error::new(ErrorKind::Protocol, "the peer's end is no queue pair that this version knows");
    let bytes: &[u8; END_BYTES] = blob.as_bytes().try_into().map_err(|_| no())?;
    let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let mut gid = [0; 16];
    gid.copy_from_slice(&bytes[9..25]);
    let end = Endpoint {
        number: word(1),
        packet_sequence: word(5),
        gid: Ipv6Addr::from(gid),
        lid: u16::from_le_bytes([bytes[25], bytes[26]]),
        mtu_bytes: word(27),
    };
    let fine = bytes[0] == LAYOUT
        && end.number < 1 << 24
        && end.packet_sequence < 1 << 24
        && MTUS_BYTES.contains(&end.mtu_bytes);
    if fine { Ok(end) } else { Err(no()) }
}

/// Memory that begins there.
pub(crate) fn of_remote(remote: Remote) -> Result<AccessKey> {
    let mut bytes = [0; KEY_BYTES];
    bytes[..8].copy_from_slice(&remote.address.to_le_bytes());
    bytes[8..].copy_from_slice(&remote.key.to_le_bytes());
    Ok(AccessKey::decode(&bytes)?)
}

/// Where the peer's memory is, `offset` bytes behind where its key begins.
///
/// # Errors
/// [`ErrorKind::Protocol`] for bytes that are no key.
fn remote(key: &AccessKey, offset: u64) -> Result<Remote> {
    let no = || Error::new(ErrorKind::Protocol, "the peer's key reaches no memory");
    let bytes: &[u8; KEY_BYTES] = key.as_bytes().try_into().map_err(|_| no())?;
    let (address, key) = bytes.split_first_chunk::<8>().ok_or_else(no)?;
    let key = key.try_into().map_err(|_| no())?;
    let address = u64::from_le_bytes(*address).checked_add(offset).ok_or_else(no)?;
    Ok(Remote { address, key: u32::from_le_bytes(key) })
}

/// Where a slot is that one of these keys reaches.
///
/// # Errors
/// [`ErrorKind::Protocol`] where none does.
pub(crate) fn slot(keys: &[KeyEntry], slot: SlotIndex) -> Result<Remote> {
    let found = keys.iter().find_map(|key| Some((key, key.place_of(slot)?)));
    let (key, place) =
        found.ok_or_else(|| Error::new(ErrorKind::Protocol, "a slot that no key of the peer's reaches"))?;
    remote(&key.key, u64::from(place) * PAGE_BYTES as u64)
}

#[cfg(test)]
mod test {
    use super::*;

    const END: Endpoint = Endpoint {
        number: 0x12_3456,
        packet_sequence: 0xff_ffff,
        gid: Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0x0a00, 1),
        lid: 7,
        mtu_bytes: 1024,
    };

    #[test]
    fn ends_and_keys_come_back_as_they_were() {
        assert_eq!(endpoint(&of_endpoint(&END).expect("fits")).expect("known"), END);
        let key = of_remote(Remote { address: 1 << 40, key: 9 }).expect("fits");
        assert_eq!(remote(&key, 4096).expect("a key"), Remote { address: (1 << 40) + 4096, key: 9 });
    }

    #[test]
    fn what_is_no_end_is_refused() {
        let bytes = of_endpoint(&END).expect("fits").as_bytes().to_vec();
        let changed = |at: usize, to: u8| {
            let mut bytes = bytes.clone();
            bytes[at] = to;
            bytes
        };
        let bad = [changed(0, 2), changed(4, 1), changed(8, 1), changed(28, 5), bytes[1..].to_vec(), vec![1]];
        for bytes in bad {
            let refused = endpoint(&Blob::decode(&bytes).expect("fits")).expect_err("no end");
            assert_eq!(refused.kind, ErrorKind::Protocol);
        }
        let last = of_remote(Remote { address: u64::MAX, key: 9 }).expect("fits");
        assert!(remote(&last, 1).is_err());
        assert!(remote(&AccessKey::decode(&[1; 13]).expect("fits"), 0).is_err());
    }
}

//! What a page is known by where pages of many VMs are stored once: a hash of its bytes, of the kind that the
//! pool has. Pure.
//!
//! The default is keyed: a guest that could compute the hash of a page could craft two pages of one hash against
//! its neighbours (SHA-1 collisions are published), and have the wrong one read. The key is derived from the pool
//! secret for each domain, so that what is the same in two domains looks different there. It does not
//! keep a guest from learning, by how fast it leaves, whether others of its domain hold a page: that is what
//! domains are for.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha1::{Digest, Sha1};

use crate::error::{Error, ErrorKind};
use crate::ids::Checksum;

/// Bytes of a content hash: all of a SHA-1, and as much of a BLAKE3, of which nobody finds two alike in so many.
pub const CONTENT_HASH_BYTES: usize = 20;

/// How the pages of a pool are hashed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HashKind {
    /// BLAKE3 under a key that guests do not know.
    #[default]
    Blake3,
    /// SHA-1, as published: for pools of guests that trust each other.
    Sha1,
}

impl FromStr for HashKind {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "blake3" => Ok(Self::Blake3),
            "sha1" => Ok(Self::Sha1),
            _ => Err(Error::new(ErrorKind::Input, format!("{text:?} is no content hash: blake3 or sha1"))),
        }
    }
}

/// With whom a volume shares pages: all volumes of the same value.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(default)]
pub struct Sharing {
    /// How their pages are hashed.
    pub hash: HashKind,
    /// Their domain (a tenant, say), at most [`crate::limits::NAME_BYTES_MAX`] bytes: nothing is shared with another.
    pub domain: String,
}

/// The hash of a page's bytes, in one domain.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ContentHash(pub [u8; CONTENT_HASH_BYTES]);

impl ContentHash {
    /// 64 bits of it, for tables and for choosing by it.
    #[must_use]
    pub fn word(&self) -> u64 {
        let [a, b, c, d, e, f, g, h, ..] = self.0;
        u64::from_le_bytes([a, b, c, d, e, f, g, h])
    }

    /// The checksum that stands in the index for a page that was stored by reference: a CRC can be forged, and
    /// whoever refers to bytes that he has not sent needs more. See [`ContentHasher::matches`].
    #[must_use]
    pub fn seal(&self, checksum: Checksum) -> Checksum {
        let [.., a, b, c, d] = self.0;
        Checksum(checksum.0 ^ u32::from_le_bytes([a, b, c, d]))
    }
}

impl fmt::Debug for ContentHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "content {:016x}", self.word())
    }
}

/// Hashes the pages of one domain.
#[derive(Clone)]
pub struct ContentHasher(Kind);

#[derive(Clone)]
enum Kind {
    Blake3([u8; 32]),
    Sha1,
}

impl ContentHasher {
    /// A hasher of this kind; `key` is the domain's, of which SHA-1 has no use.
    #[must_use]
    pub const fn new(kind: HashKind, key: [u8; 32]) -> Self {
        Self(match kind {
            HashKind::Blake3 => Kind::Blake3(key),
            HashKind::Sha1 => Kind::Sha1,
        })
    }

    /// The hash of these bytes.
    #[must_use]
    pub fn hash(&self, bytes: &[u8]) -> ContentHash {
        let mut hash = [0; CONTENT_HASH_BYTES];
        match &self.0 {
            Kind::Blake3(key) => {
                hash.copy_from_slice(&blake3::keyed_hash(key, bytes).as_bytes()[..CONTENT_HASH_BYTES]);
            }
            Kind::Sha1 => hash.copy_from_slice(&Sha1::digest(bytes)),
        }
        ContentHash(hash)
    }

    /// Whether bytes that were read are the page of this checksum: its CRC32C, or the seal of a page that was stored
    /// by reference.
    ///
    /// Under the keyed hash nobody without the key makes other bytes that match a seal, whatever their CRC; under
    /// SHA-1, bytes of the same hash are still found out by their CRC, as long as that was not forged too.
    #[must_use]
    pub fn matches(&self, bytes: &[u8], checksum: Checksum) -> bool {
        let crc = Checksum::of(bytes);
        crc == checksum || self.hash(bytes).seal(crc) == checksum
    }
}

impl fmt::Debug for ContentHasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Kind::Blake3(_) => "BLAKE3, key not shown",
            Kind::Sha1 => "SHA-1",
        })
    }
}

/// Two pages of one SHA-1: the published blocks ("The first collision for full SHA-1", 2017), and equal bytes behind
/// them. For tests.
#[cfg(any(test, feature = "test-util"))]
#[must_use]
pub fn colliding_pages() -> [Vec<u8>; 2] {
    let prefixes = [include_bytes!("content/shattered-1"), include_bytes!("content/shattered-2")];
    prefixes.map(|prefix| {
        let mut page = prefix.to_vec();
        page.resize(crate::page::PAGE_BYTES, 0x5a);
        page
    })
}

#[cfg(test)]
mod test {
    use super::*;

    fn hasher(kind: HashKind, key: u8) -> ContentHasher {
        ContentHasher::new(kind, [key; 32])
    }

    #[test]
    fn sha1_is_as_published() {
        // FIPS 180-2, appendix A.1.
        let hash = hasher(HashKind::Sha1, 1).hash(b"abc");
        assert_eq!(hash.0[..8], [0xa9, 0x99, 0x3e, 0x36, 0x47, 0x06, 0x81, 0x6a]);
        assert_eq!(hash, hasher(HashKind::Sha1, 2).hash(b"abc"));
        assert_ne!(hasher(HashKind::Blake3, 1).hash(b"abc"), hasher(HashKind::Blake3, 2).hash(b"abc"));
    }

    #[test]
    fn published_collisions_are_one_under_sha1_and_two_under_the_default() {
        let [a, b] = colliding_pages();
        assert_ne!(a, b);
        let sha1 = hasher(HashKind::Sha1, 1);
        assert_eq!(sha1.hash(&a), sha1.hash(&b));
        let default = hasher(HashKind::default(), 1);
        assert_ne!(default.hash(&a), default.hash(&b));
        for hasher in [sha1, default] {
            let seal = hasher.hash(&a).seal(Checksum::of(&a));
            assert!(hasher.matches(&a, seal) && hasher.matches(&a, Checksum::of(&a)));
            assert!(!hasher.matches(&b, seal), "the wrong one is found out where it is read");
        }
    }

    #[test]
    fn a_forged_crc_does_not_match_a_seal() {
        let (page, hasher) = (vec![1; 4096], hasher(HashKind::Blake3, 3));
        // Any four bytes of a page can be chosen so that its CRC is any value: here both are of one.
        let mut forged = page.clone();
        forged[100] ^= 1;
        let crc = |bytes: &[u8]| Checksum::of(bytes).0;
        let wanted = crc(&page);
        let zero = crc(&{
            let mut zero = forged.clone();
            zero[4092..].fill(0);
            zero
        });
        // CRC is linear: the effect of each of the last 32 bits is found by setting it alone.
        let effect = |bit: usize| {
            let mut one = forged.clone();
            one[4092..].fill(0);
            one[4092 + bit / 8] |= 1 << (bit % 8);
            crc(&one) ^ zero
        };
        let mut rows: Vec<(u32, u32)> = (0..32).map(|bit| (effect(bit), 1 << bit)).collect();
        let (mut need, mut bits) = (wanted ^ zero, 0_u32);
        for column in (0..32).rev() {
            let Some(at) = rows.iter().position(|(row, _)| row >> column & 1 == 1) else { continue };
            let (pivot, mask) = rows.swap_remove(at);
            for (row, of) in rows.iter_mut().filter(|(row, _)| row >> column & 1 == 1) {
                (*row, *of) = (*row ^ pivot, *of ^ mask);
            }
            if need >> column & 1 == 1 {
                (need, bits) = (need ^ pivot, bits ^ mask);
            }
        }
        forged[4092..].copy_from_slice(&bits.to_le_bytes());
        assert_eq!(Checksum::of(&forged), Checksum::of(&page), "the CRC is forged");
        let seal = hasher.hash(&page).seal(Checksum::of(&page));
        assert!(hasher.matches(&page, seal) && !hasher.matches(&forged, seal));
    }
}

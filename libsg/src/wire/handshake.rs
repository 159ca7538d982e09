//! The handshake: what both sides say before anything else, in fixed bytes.
//!
//! ```text
//! client                                   server
//!   Hello: versions, purpose, nonce ------->
//!   <------- Challenge: version, nonce, node      (or Refused)
//!   Auth: MAC ------------------------------>
//!   <--------------------------- Welcome: MAC      (or Refused)
//! ```
//!
//! Each MAC is a keyed BLAKE3 over who speaks, the volume and epoch of the Hello's header, and the
//! bytes of Hello and Challenge, so that nothing of what was agreed can be changed on the way, and
//! neither answer can be replayed or reflected. The key is derived from the pool secret.
//!
//! The layout of these frames may never change: it is what lets old and new versions refuse each
//! other in words that both understand. `tests/wire_golden.rs` pins it.

use super::datagram::AnnouncementKey;
use super::{Malformed, VERSION_NEWEST, VERSION_OLDEST};
use crate::content::{ContentHasher, Sharing};
use crate::ids::{Epoch, NodeId, VolumeId};
use crate::limits;

/// Bytes of a nonce.
pub const NONCE_BYTES: usize = 32;

/// Bytes of a MAC, the whole body of `Auth` and `Welcome`.
pub const MAC_BYTES: usize = 32;

/// What a connection is for. Zero is invalid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Purpose {
    /// Client to intermediary: pages that nobody waits for, and rare requests.
    VmdBulk = 1,
    /// Client to intermediary: pages that the guest waits for.
    VmdUrgent = 2,
    /// Source to destination: the conversation about the migration.
    MigrationControl = 3,
    /// Source to destination: pages that nobody waits for.
    MigrationDirect = 4,
    /// Source to destination: pages that the guest waits for.
    MigrationUrgent = 5,
    /// Operator to intermediary: rare requests about any volume.
    Operator = 6,
}

impl Purpose {
    const ALL: [Self; 6] = [
        Self::VmdBulk,
        Self::VmdUrgent,
        Self::MigrationControl,
        Self::MigrationDirect,
        Self::MigrationUrgent,
        Self::Operator,
    ];

    fn decode(value: u16) -> Result<Self, Malformed> {
        Self::ALL
            .into_iter()
            .find(|purpose| *purpose as u16 == value)
            .ok_or(Malformed::Unknown("purpose", u32::from(value)))
    }

    /// Whether the guest waits for what travels on it.
    #[must_use]
    pub const fn is_urgent(self) -> bool {
        matches!(self, Self::VmdUrgent | Self::MigrationUrgent)
    }
}

/// The client's opening.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The oldest version that the client speaks.
    pub version_min: u16,
    /// The newest.
    pub version_max: u16,
    /// What the connection is for.
    pub purpose: Purpose,
    /// Random, never used twice.
    pub nonce: [u8; NONCE_BYTES],
}

/// Bytes of a Hello's body.
pub const HELLO_BYTES: usize = 8 + NONCE_BYTES;

impl Hello {
    /// The body of the frame.
    #[must_use]
    pub fn encode(&self) -> [u8; HELLO_BYTES] {
        let mut bytes = [0; HELLO_BYTES];
        bytes[0..2].copy_from_slice(&self.version_min.to_le_bytes());
        bytes[2..4].copy_from_slice(&self.version_max.to_le_bytes());
        bytes[4..6].copy_from_slice(&(self.purpose as u16).to_le_bytes());
        bytes[8..].copy_from_slice(&self.nonce);
        bytes
    }

    /// Reads the body of the frame.
    ///
    /// # Errors
    /// What is wrong with the bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let bytes: &[u8; HELLO_BYTES] = exactly(bytes)?;
        let version_min = u16::from_le_bytes([bytes[0], bytes[1]]);
        let version_max = u16::from_le_bytes([bytes[2], bytes[3]]);
        if bytes[6..8] != [0; 2] {
            return Err(Malformed::Reserved);
        }
        if version_min > version_max {
            return Err(Malformed::Bounds("version range"));
        }
        let purpose = Purpose::decode(u16::from_le_bytes([bytes[4], bytes[5]]))?;
        let mut nonce = [0; NONCE_BYTES];
        nonce.copy_from_slice(&bytes[8..]);
        Ok(Self { version_min, version_max, purpose, nonce })
    }

    /// The newest version that both sides speak. `None` where there is none.
    #[must_use]
    pub fn common_version(&self) -> Option<u16> {
        let newest = self.version_max.min(VERSION_NEWEST);
        (newest >= self.version_min.max(VERSION_OLDEST)).then_some(newest)
    }
}

/// The server's answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Challenge {
    /// The version that is spoken from here on.
    pub version: u16,
    /// Random, never used twice.
    pub nonce: [u8; NONCE_BYTES],
    /// Who the server is.
    pub node: NodeId,
}

const CHALLENGE_FIXED_BYTES: usize = 16 + NONCE_BYTES;

/// Bytes of the longest Challenge's body.
pub const CHALLENGE_BYTES_MAX: usize = CHALLENGE_FIXED_BYTES + limits::NODE_NAME_BYTES_MAX;

impl Challenge {
    /// The body of the frame.
    ///
    /// # Errors
    /// [`Malformed::Bounds`] for a name of more than [`limits::NODE_NAME_BYTES_MAX`] bytes.
    pub fn encode(&self) -> Result<Vec<u8>, Malformed> {
        let name = self.node.name.as_bytes();
        if name.len() > limits::NODE_NAME_BYTES_MAX {
            return Err(Malformed::Bounds("node name"));
        }
        let mut bytes = Vec::with_capacity(CHALLENGE_FIXED_BYTES + name.len());
        bytes.extend(self.version.to_le_bytes());
        bytes.extend([name.len() as u8, 0, 0, 0, 0, 0]);
        bytes.extend(self.node.incarnation.to_le_bytes());
        bytes.extend(self.nonce);
        bytes.extend(name);
        Ok(bytes)
    }

    /// Reads the body of the frame.
    ///
    /// # Errors
    /// What is wrong with the bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let (fixed, name) = bytes.split_first_chunk::<CHALLENGE_FIXED_BYTES>().ok_or(Malformed::Truncated)?;
        let name_bytes = usize::from(fixed[2]);
        if fixed[3..8] != [0; 5] {
            return Err(Malformed::Reserved);
        }
        if name_bytes > limits::NODE_NAME_BYTES_MAX {
            return Err(Malformed::Bounds("node name"));
        }
        match name.len().cmp(&name_bytes) {
            std::cmp::Ordering::Less => return Err(Malformed::Truncated),
            std::cmp::Ordering::Greater => return Err(Malformed::Trailing),
            std::cmp::Ordering::Equal => {}
        }
        let name = std::str::from_utf8(name).map_err(|_| Malformed::Bounds("node name"))?;
        let mut incarnation = [0; 8];
        incarnation.copy_from_slice(&fixed[8..16]);
        let mut nonce = [0; NONCE_BYTES];
        nonce.copy_from_slice(&fixed[16..]);
        Ok(Self {
            version: u16::from_le_bytes([fixed[0], fixed[1]]),
            nonce,
            node: NodeId { name: name.to_owned(), incarnation: u64::from_le_bytes(incarnation) },
        })
    }
}

/// The body of `Auth` and `Welcome`.
///
/// # Errors
/// What is wrong with the bytes.
pub fn decode_mac(bytes: &[u8]) -> Result<[u8; MAC_BYTES], Malformed> {
    exactly(bytes).copied()
}

fn exactly<const N: usize>(bytes: &[u8]) -> Result<&[u8; N], Malformed> {
    match bytes.len().cmp(&N) {
        std::cmp::Ordering::Less => Err(Malformed::Truncated),
        std::cmp::Ordering::Greater => Err(Malformed::Trailing),
        std::cmp::Ordering::Equal => bytes.try_into().map_err(|_| Malformed::Truncated),
    }
}

/// Who proves to know the secret. Two labels, so that a MAC cannot be sent back to its maker.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Whoever opened the connection.
    Client,
    /// Whoever accepted it.
    Server,
}

impl Role {
    const fn label(self) -> &'static [u8; 16] {
        match self {
            Self::Client => b"libsg client v1\0",
            Self::Server => b"libsg server v1\0",
        }
    }
}

/// What both sides prove knowledge of: derived from the pool secret, never sent.
#[derive(Clone, PartialEq, Eq)]
pub struct PoolKey([u8; 32]);

impl PoolKey {
    /// The key of a pool secret.
    #[must_use]
    pub fn derive(secret: &[u8]) -> Self {
        Self(blake3::derive_key("libsg pool secret v1", secret))
    }

    /// The hasher of pages for those who share theirs so: keyed for their domain alone.
    #[must_use]
    pub fn hasher(&self, sharing: &Sharing) -> ContentHasher {
        let mut material = self.0.to_vec();
        material.extend_from_slice(sharing.domain.as_bytes());
        ContentHasher::new(sharing.hash, blake3::derive_key("libsg content hash v1", &material))
    }

    /// The key of datagrams: none of what it seals says anything about this one.
    #[must_use]
    pub fn announcement_key(&self) -> AnnouncementKey {
        AnnouncementKey(blake3::derive_key("libsg announcement v1", &self.0))
    }

    /// The proof of `role` over everything that was said before: volume and epoch of the Hello's
    /// header, the body of Hello, the body of Challenge.
    ///
    /// The result is compared in constant time by [`blake3::Hash`]'s equality.
    #[must_use]
    pub fn mac(
        &self,
        role: Role,
        volume: VolumeId,
        epoch: Epoch,
        hello: &[u8],
        challenge: &[u8],
    ) -> blake3::Hash {
        // Every part but the last has a fixed length: no two conversations give the same bytes.
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(role.label());
        hasher.update(&volume.0.to_le_bytes());
        hasher.update(&epoch.0.to_le_bytes());
        hasher.update(hello);
        hasher.update(challenge);
        hasher.finalize()
    }
}

impl std::fmt::Debug for PoolKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PoolKey(not shown)")
    }
}

#[cfg(test)]
mod test {
    use proptest::prelude::*;

    use super::*;

    fn hello() -> Hello {
        Hello { version_min: 1, version_max: 3, purpose: Purpose::VmdUrgent, nonce: [7; NONCE_BYTES] }
    }

    fn challenge(name: &str) -> Challenge {
        Challenge {
            version: 1,
            nonce: [9; NONCE_BYTES],
            node: NodeId { name: name.into(), incarnation: 0x1122_3344_5566_7788 },
        }
    }

    #[test]
    fn round_trips_and_bounds() {
        for purpose in Purpose::ALL {
            let hello = Hello { purpose, ..hello() };
            assert_eq!(Hello::decode(&hello.encode()), Ok(hello));
        }
        for name in ["", "rack2", &"x".repeat(limits::NODE_NAME_BYTES_MAX)] {
            let bytes = challenge(name).encode().expect("encodes");
            assert_eq!(Challenge::decode(&bytes), Ok(challenge(name)));
            assert!(Challenge::decode(&bytes[..bytes.len() - 1]).is_err());
        }
        assert!(challenge(&"x".repeat(limits::NODE_NAME_BYTES_MAX + 1)).encode().is_err());
        let mut bytes = hello().encode();
        bytes[4] = 0;
        assert_eq!(Hello::decode(&bytes), Err(Malformed::Unknown("purpose", 0)));
        bytes = hello().encode();
        bytes[7] = 1;
        assert_eq!(Hello::decode(&bytes), Err(Malformed::Reserved));
        bytes = hello().encode();
        bytes[1] = 1;
        assert_eq!(Hello::decode(&bytes), Err(Malformed::Bounds("version range")));
        assert!(CHALLENGE_BYTES_MAX <= super::super::Kind::Challenge.body_bytes_max());
    }

    #[test]
    fn versions_meet_or_do_not() {
        let with = |version_min, version_max| Hello { version_min, version_max, ..hello() }.common_version();
        assert_eq!(with(1, 9), Some(VERSION_NEWEST));
        assert_eq!(with(VERSION_NEWEST + 1, 9), None);
        assert_eq!(with(0, 0), None);
    }

    #[test]
    fn everything_that_was_said_is_in_the_mac() {
        let key = PoolKey::derive(b"secret");
        let mac = |key: &PoolKey, role, volume, epoch, hello: &Hello, challenge: &Challenge| {
            let challenge = challenge.encode().expect("encodes");
            key.mac(role, VolumeId(volume), Epoch(epoch), &hello.encode(), &challenge)
        };
        let one = mac(&key, Role::Client, 1, 1, &hello(), &challenge("a"));
        assert_eq!(one, mac(&key, Role::Client, 1, 1, &hello(), &challenge("a")));
        let other_key = PoolKey::derive(b"secreu");
        let narrow = Hello { version_max: 2, ..hello() };
        let bulk = Hello { purpose: Purpose::VmdBulk, ..hello() };
        let fresh = Challenge { nonce: [1; NONCE_BYTES], ..challenge("a") };
        for other in [
            mac(&other_key, Role::Client, 1, 1, &hello(), &challenge("a")),
            mac(&key, Role::Server, 1, 1, &hello(), &challenge("a")),
            mac(&key, Role::Client, 2, 1, &hello(), &challenge("a")),
            mac(&key, Role::Client, 1, 2, &hello(), &challenge("a")),
            mac(&key, Role::Client, 1, 1, &narrow, &challenge("a")),
            mac(&key, Role::Client, 1, 1, &bulk, &challenge("a")),
            mac(&key, Role::Client, 1, 1, &hello(), &challenge("b")),
            mac(&key, Role::Client, 1, 1, &hello(), &fresh),
        ] {
            assert_ne!(one, other);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..130)) {
            let _ = Hello::decode(&bytes);
            let _ = Challenge::decode(&bytes);
            let _ = decode_mac(&bytes);
        }
    }
}

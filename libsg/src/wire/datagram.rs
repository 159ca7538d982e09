//! Datagrams by which the hosts of a pool find each other: one a packet, authenticated as a whole, dated, bounded.
//!
//! | bytes | what |
//! | --- | --- |
//! | 0..4 | magic |
//! | 4..6 | version, 1 |
//! | 6..8 | kind: 1 an announcement, 2 a question |
//! | 8..16 | counter: grows with every datagram of one sender |
//! | 16..24 | when it was sent: milliseconds since 1970 by the sender's clock |
//! | 24..28 | the announcer's period in milliseconds; zero in a question |
//! | 28..32 | reserved, zero |
//! | 32.. | the announcement (postcard); nothing in a question |
//! | the last 32 | keyed BLAKE3 over everything before, under a key derived from the pool's |
//!
//! Nothing but the lengths is looked at before the last 32 bytes are found to be right.

use super::announcement::Announcement;
use super::handshake::MAC_BYTES;
use super::{Malformed, message};
use crate::limits;

const MAGIC: [u8; 4] = [0xf5, b'S', b'G', b'A'];
const VERSION: u16 = 1;
const FIXED_BYTES: usize = 32;

/// Bytes of the longest datagram: far less than what a network carries in one packet.
pub const DATAGRAM_BYTES_MAX: usize = FIXED_BYTES + limits::ANNOUNCEMENT_BYTES_MAX + MAC_BYTES;

const _: () = assert!(DATAGRAM_BYTES_MAX <= 1200);

/// The shortest and the longest time between two announcements of one host, in milliseconds.
const PERIOD_MS: std::ops::RangeInclusive<u32> = 100..=600_000;

/// What seals datagrams: derived from the pool's key, so that neither is worth anything as the other.
#[derive(Clone, PartialEq, Eq)]
pub struct AnnouncementKey(pub(super) [u8; 32]);

impl AnnouncementKey {
    /// The bytes, and behind them the proof that somebody of the pool has said them.
    #[must_use]
    pub fn seal(&self, mut bytes: Vec<u8>) -> Vec<u8> {
        let mac = blake3::keyed_hash(&self.0, &bytes);
        bytes.extend(mac.as_bytes());
        bytes
    }
}

impl std::fmt::Debug for AnnouncementKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AnnouncementKey(not shown)")
    }
}

/// One datagram.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Datagram {
    /// Grows with every datagram of one sender.
    pub counter: u64,
    /// Milliseconds since 1970, by the sender's clock.
    pub sent_ms: u64,
    /// What it says.
    pub said: Said,
}

/// What a datagram says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Said {
    /// Here is a host.
    Here {
        /// Milliseconds until it says so again, at the latest.
        period_ms: u32,
        /// What it says of itself.
        host: Announcement,
    },
    /// Who is there? Whoever hears it announces itself soon.
    WhoIsThere,
}

impl Datagram {
    /// The packet.
    ///
    /// # Errors
    /// [`Malformed::Bounds`] for an announcement out of its bounds.
    pub fn encode(&self, key: &AnnouncementKey) -> Result<Vec<u8>, Malformed> {
        let (kind, period_ms, body) = match &self.said {
            Said::Here { period_ms, host } => {
                check_period(*period_ms)?;
                host.check()?;
                (1_u16, *period_ms, message::encode(host).map_err(|_| Malformed::Message)?)
            }
            Said::WhoIsThere => (2, 0, Vec::new()),
        };
        if body.len() > limits::ANNOUNCEMENT_BYTES_MAX {
            return Err(Malformed::Bounds("announcement"));
        }
        let mut bytes = Vec::with_capacity(FIXED_BYTES + body.len() + MAC_BYTES);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(kind.to_le_bytes());
        bytes.extend(self.counter.to_le_bytes());
        bytes.extend(self.sent_ms.to_le_bytes());
        bytes.extend(period_ms.to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(body);
        Ok(key.seal(bytes))
    }

    /// Reads a packet.
    ///
    /// # Errors
    /// [`Malformed::Sealed`] for one that nobody of this pool has made; what is wrong with the others.
    pub fn decode(bytes: &[u8], key: &AnnouncementKey) -> Result<Self, Malformed> {
        if bytes.len() > DATAGRAM_BYTES_MAX {
            return Err(Malformed::Trailing);
        }
        let (sealed, mac) = bytes.split_last_chunk::<MAC_BYTES>().ok_or(Malformed::Truncated)?;
        let (fixed, body) = sealed.split_first_chunk::<FIXED_BYTES>().ok_or(Malformed::Truncated)?;
        if blake3::keyed_hash(&key.0, sealed) != *mac {
            return Err(Malformed::Sealed);
        }
        if fixed[..4] != MAGIC {
            return Err(Malformed::Magic);
        }
        let version = u16::from_le_bytes([fixed[4], fixed[5]]);
        if version != VERSION {
            return Err(Malformed::Version(version));
        }
        if fixed[28..] != [0; 4] {
            return Err(Malformed::Reserved);
        }
        let period_ms = u32::from_le_bytes([fixed[24], fixed[25], fixed[26], fixed[27]]);
        let said = match u16::from_le_bytes([fixed[6], fixed[7]]) {
            1 => {
                check_period(period_ms)?;
                Said::Here { period_ms, host: Announcement::decode(body)? }
            }
            2 if period_ms != 0 => return Err(Malformed::Bounds("period")),
            2 if !body.is_empty() => return Err(Malformed::Trailing),
            2 => Said::WhoIsThere,
            other => return Err(Malformed::Unknown("kind of datagram", other.into())),
        };
        let number = |at: usize| {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&fixed[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        Ok(Self { counter: number(8), sent_ms: number(16), said })
    }
}

fn check_period(period_ms: u32) -> Result<(), Malformed> {
    if PERIOD_MS.contains(&period_ms) { Ok(()) } else { Err(Malformed::Bounds("period")) }
}

#[cfg(test)]
mod test {
    use proptest::prelude::*;

    use super::*;
    use crate::wire::announcement::test::announcement;
    use crate::wire::handshake::PoolKey;

    fn key(secret: &[u8]) -> AnnouncementKey {
        PoolKey::derive(secret).announcement_key()
    }

    fn here() -> Datagram {
        let said = Said::Here { period_ms: 1000, host: announcement() };
        Datagram { counter: 7, sent_ms: 1_800_000_000_000, said }
    }

    #[test]
    fn what_was_sealed_opens_and_nothing_else_does() {
        let question = Datagram { said: Said::WhoIsThere, ..here() };
        for datagram in [here(), question] {
            let bytes = datagram.encode(&key(b"secret")).expect("in bounds");
            assert_eq!(Datagram::decode(&bytes, &key(b"secret")), Ok(datagram));
            assert_eq!(Datagram::decode(&bytes, &key(b"another")), Err(Malformed::Sealed));
            for at in 0..bytes.len() {
                let mut forged = bytes.clone();
                forged[at] ^= 1;
                assert_eq!(Datagram::decode(&forged, &key(b"secret")), Err(Malformed::Sealed), "byte {at}");
                assert!(Datagram::decode(&bytes[..at], &key(b"secret")).is_err());
            }
        }
    }

    #[test]
    fn bounds_hold_for_members_of_the_pool_too() {
        let seal = |bytes: &[u8]| key(b"secret").seal(bytes.to_vec());
        let whole = here().encode(&key(b"secret")).expect("in bounds");
        let plain = &whole[..whole.len() - MAC_BYTES];
        let changed = |at: usize, to: u8| {
            let mut bytes = plain.to_vec();
            bytes[at] = to;
            Datagram::decode(&seal(&bytes), &key(b"secret")).expect_err("changed")
        };
        assert_eq!(changed(0, 0), Malformed::Magic);
        assert_eq!(changed(4, 2), Malformed::Version(2));
        assert_eq!(changed(6, 3), Malformed::Unknown("kind of datagram", 3));
        assert_eq!(changed(6, 2), Malformed::Bounds("period"));
        assert_eq!(changed(27, 0xff), Malformed::Bounds("period"));
        assert_eq!(changed(31, 1), Malformed::Reserved);
        let long = [plain, &[0][..]].concat();
        assert_eq!(Datagram::decode(&seal(&long), &key(b"secret")), Err(Malformed::Trailing));
        let mut too_long = announcement();
        too_long.zone = Some("z".repeat(limits::ZONE_BYTES_MAX + 1));
        let said = Said::Here { period_ms: 1000, host: too_long };
        assert!(Datagram { said, ..here() }.encode(&key(b"secret")).is_err());
        let mut longest = announcement();
        longest.node.name = "n".repeat(limits::NODE_NAME_BYTES_MAX);
        longest.zone = Some("z".repeat(limits::ZONE_BYTES_MAX));
        let said = Said::Here { period_ms: 1000, host: longest };
        assert!(
            Datagram { said, ..here() }.encode(&key(b"secret")).expect("fits").len() <= DATAGRAM_BYTES_MAX
        );
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Datagram::decode(&bytes, &key(b"secret"));
            let _ = Datagram::decode(&key(b"secret").seal(bytes), &key(b"secret"));
        }
    }
}

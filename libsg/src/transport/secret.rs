//! The pool secret: what tells a pool's members from strangers.

use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::content::{ContentHasher, Sharing};
use crate::error::{Error, ErrorKind, Result};
use crate::wire::datagram::AnnouncementKey;
use crate::wire::handshake::PoolKey;

/// Bytes of the longest secret that is read from a file; a longer file is refused.
const SECRET_BYTES_MAX: u64 = 64 << 10;

/// What both ends of a connection prove to know. The secret itself is forgotten once its key is
/// derived; the key is never shown or sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolSecret {
    key: PoolKey,
    open: bool,
}

impl PoolSecret {
    /// The secret in a file: all of its bytes but a newline at the end. Logs a warning when others
    /// than its owner's group may read the file.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] for a file that is empty, too long or cannot be read.
    pub fn from_file(path: &Path) -> Result<Self> {
        let refuse =
            |what: &str| Error::new(ErrorKind::Input, format!("pool secret {}: {what}", path.display()));
        let mut file = std::fs::File::open(path).map_err(|e| refuse("cannot be opened").because(e))?;
        let metadata = file.metadata().map_err(|e| refuse("cannot be read").because(e))?;
        if metadata.permissions().mode() & 0o004 != 0 {
            tracing::warn!(path = %path.display(), "every user may read the pool secret: chmod o-r");
        }
        let mut bytes = Vec::new();
        let read = (&mut file).take(SECRET_BYTES_MAX + 1).read_to_end(&mut bytes);
        let length = read.map_err(|e| refuse("cannot be read").because(e))?;
        if length as u64 > SECRET_BYTES_MAX {
            return Err(refuse("more than 64 KiB"));
        }
        let secret = bytes.strip_suffix(b"\n").unwrap_or(&bytes);
        let secret = secret.strip_suffix(b"\r").unwrap_or(secret);
        Self::from_bytes(secret).map_err(|_| refuse("is empty"))
    }

    /// The secret itself.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] for an empty one.
    pub fn from_bytes(secret: &[u8]) -> Result<Self> {
        if secret.is_empty() {
            return Err(Error::new(ErrorKind::Input, "the pool secret is empty"));
        }
        Ok(Self { key: PoolKey::derive(secret), open: false })
    }

    /// No secret: whoever can reach the port may connect, read every page and dissolve volumes. For
    /// loopback and closed test networks only; a pool with a secret and one without refuse each other.
    #[must_use]
    pub fn open() -> Self {
        Self { key: PoolKey::derive(b""), open: true }
    }

    /// Whether this is [`Self::open`].
    #[must_use]
    pub const fn is_open(&self) -> bool {
        self.open
    }

    /// The hasher of pages for those of the pool who share theirs so.
    #[must_use]
    pub fn hasher(&self, sharing: &Sharing) -> ContentHasher {
        self.key.hasher(sharing)
    }

    /// What this pool's announcements are sealed with.
    #[must_use]
    pub fn announcement_key(&self) -> AnnouncementKey {
        self.key.announcement_key()
    }

    pub(super) const fn key(&self) -> &PoolKey {
        &self.key
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn files_are_read_without_their_newline() {
        let directory = tempfile::tempdir().expect("directory");
        let path = directory.path().join("secret");
        for (content, same) in [("abc", true), ("abc\n", true), ("abc\r\n", true), ("abc\n\n", false)] {
            std::fs::write(&path, content).expect("written");
            let read = PoolSecret::from_file(&path).expect("read");
            assert_eq!(read == PoolSecret::from_bytes(b"abc").expect("not empty"), same, "{content:?}");
        }
        for content in ["", "\n"] {
            std::fs::write(&path, content).expect("written");
            let error = PoolSecret::from_file(&path).expect_err("empty");
            assert!(error.message.contains("is empty"), "{error}");
        }
        std::fs::write(&path, vec![b'x'; SECRET_BYTES_MAX as usize + 1]).expect("written");
        assert!(PoolSecret::from_file(&path).is_err());
        assert!(PoolSecret::from_file(Path::new("/nonexistent")).is_err());
        assert!(!format!("{:?}", PoolSecret::from_bytes(b"abc")).contains("97"));
    }
}

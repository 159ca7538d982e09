//! Why a stream is refused.

use std::fmt;

/// Where in a stream, and what is wrong there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("byte {at_bytes} of the migration stream: {kind}")]
pub struct StreamError {
    /// Bytes from its first one; from where a decoder began, that is.
    pub at_bytes: u64,
    /// What is wrong.
    #[source]
    pub kind: StreamErrorKind,
}

/// What is wrong with a stream.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StreamErrorKind {
    /// The first bytes.
    #[error("it begins with {0:#010x}, which is no QEMU's")]
    Magic(u32),
    /// A version of the whole stream, or of the memory's section, that no QEMU since 7.2 writes.
    #[error("{0} has version {1}, which is not known")]
    Version(&'static str, u32),
    /// Something that QEMU has, and that cannot be carried.
    #[error("{0}")]
    Unsupported(Unsupported),
    /// A number that names nothing that is known.
    #[error("there is no {0} {1:#x}")]
    Unknown(&'static str, u64),
    /// A length or a number outside its bounds.
    #[error("{what} is {value:#x}: {bounds}")]
    Bounds {
        /// Of what.
        what: &'static str,
        /// What it is.
        value: u64,
        /// What it may be.
        bounds: &'static str,
    },
    /// Something that is known, where it cannot come.
    #[error("{0} does not belong here")]
    Order(&'static str),
    /// A name of no block.
    #[error("there is no block of memory called {0:?}")]
    Block(String),
    /// A name that is not text, which would be shown.
    #[error("{0} is not text")]
    Text(&'static str),
}

/// What QEMU can do to a stream that is not supported, by the name that its operator knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unsupported {
    /// A capability of the migration.
    Capability(&'static str),
    /// A capability that the stream itself names.
    Named(String),
    /// A device, or something else with a section of its own.
    Section(String),
    /// The source had no pages left to send before it was told to switch.
    FinishedInPreCopy,
    /// A machine type whose streams have no configuration.
    OldMachine,
}

impl fmt::Display for Unsupported {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Capability(name) => {
                write!(f, "the capability {name} is on: switch it off (migrate-set-capabilities)")
            }
            Self::Named(name) => {
                write!(f, "the capability {name} is on: switch it off (migrate-set-capabilities)")
            }
            Self::Section(name) => {
                write!(f, "{name} sends a section of its own while the VM runs, which cannot be carried")
            }
            Self::FinishedInPreCopy => f.write_str(
                "the source went to its end without post-copy: migrate-start-postcopy is to follow migrate at once",
            ),
            Self::OldMachine => {
                f.write_str("machine types before 2.4 send no configuration: use a newer machine type")
            }
        }
    }
}

impl From<Unsupported> for StreamErrorKind {
    fn from(what: Unsupported) -> Self {
        Self::Unsupported(what)
    }
}

//! The one error type: a kind to match on, what it was about, and its cause.

use std::fmt;

use crate::ids::NodeId;
use crate::page::PageRange;

/// What went wrong, to match on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ErrorKind {
    /// What the caller passed cannot be used.
    Input,
    /// The operating system refused something; the cause says what.
    System,
    /// A peer cannot be reached, or was lost. Trying again, or elsewhere, may help.
    Unreachable,
    /// A peer did not answer within the time it has.
    Timeout,
    /// A peer sent what no honest peer of a known version sends.
    Protocol,
    /// No common version of the wire protocol.
    Version,
    /// The pool secret differs.
    Refused,
    /// The epoch was replaced by a newer claim.
    Fenced,
    /// The volume is not known, or its state does not allow this.
    Volume,
    /// No room: memory limit, connections, volumes.
    Full,
    /// A page's bytes are lost: no copy is left, or what came does not match its checksum.
    Lost,
    /// The caller cancelled.
    Cancelled,
    /// A worker thread panicked; its manager is of no further use.
    Poisoned,
    /// The VM could not be paused, saved or loaded, or cannot log what it writes.
    Vm,
}

/// What an operation failed with.
#[derive(Debug)]
pub struct Error {
    /// What went wrong, to match on.
    pub kind: ErrorKind,
    /// What was being done, and what the operator can do about it.
    pub message: String,
    /// The node it happened with, if one.
    pub node: Option<NodeId>,
    /// The pages it was about, if any.
    pub pages: Vec<PageRange>,
    cause: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error without cause or context.
    #[must_use]
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), node: None, pages: Vec::new(), cause: None }
    }

    /// With what caused it.
    #[must_use]
    pub fn because(mut self, cause: impl std::error::Error + Send + Sync + 'static) -> Self {
        self.cause = Some(Box::new(cause));
        self
    }

    /// With the node it happened with.
    #[must_use]
    pub fn at(mut self, node: &NodeId) -> Self {
        self.node = Some(node.clone());
        self
    }

    /// With the pages it was about.
    #[must_use]
    pub fn about(mut self, pages: impl IntoIterator<Item = PageRange>) -> Self {
        self.pages.extend(pages);
        self
    }

    /// The message with every cause behind it, for logs and terminals.
    #[must_use]
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(error) = cause {
            text.push_str(": ");
            text.push_str(&error.to_string());
            cause = error.source();
        }
        text
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if let Some(node) = &self.node {
            write!(f, " (intermediary {node})")?;
        }
        if let Some(first) = self.pages.first() {
            write!(f, " (pages {first}")?;
            if self.pages.len() > 1 {
                write!(f, " and {} more ranges", self.pages.len() - 1)?;
            }
            f.write_str(")")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.cause.as_ref().map(|cause| &**cause as &(dyn std::error::Error + 'static))
    }
}

impl From<std::io::Error> for Error {
    fn from(cause: std::io::Error) -> Self {
        use std::io::ErrorKind as Io;
        let kind = match cause.kind() {
            Io::TimedOut | Io::WouldBlock => ErrorKind::Timeout,
            Io::ConnectionRefused
            | Io::ConnectionReset
            | Io::ConnectionAborted
            | Io::BrokenPipe
            | Io::NotConnected
            | Io::UnexpectedEof
            | Io::HostUnreachable
            | Io::NetworkUnreachable => ErrorKind::Unreachable,
            _ => ErrorKind::System,
        };
        Self::new(kind, "input or output failed").because(cause)
    }
}

impl From<rustix::io::Errno> for Error {
    fn from(errno: rustix::io::Errno) -> Self {
        Self::from(std::io::Error::from(errno))
    }
}

/// [`std::result::Result`] with [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

#[cfg(test)]
mod test {
    use super::*;
    use crate::page::{PageIndex, PageRange};

    #[test]
    fn chain_names_context_and_causes() {
        let error = Error::from(std::io::Error::from(std::io::ErrorKind::ConnectionReset))
            .at(&NodeId { name: "rack2".into(), incarnation: 0xabcd_0000_0000_0000 })
            .about([PageRange::new(PageIndex(7), 2)]);
        assert_eq!(error.kind, ErrorKind::Unreachable);
        assert_eq!(
            error.chain(),
            "input or output failed (intermediary rack2#abcd0000) (pages 7-8): connection reset"
        );
    }
}

//! Connections: authenticated byte streams that carry frames. What both ends of every conversation
//! have in common; nothing here knows what the frames are about.
//!
//! [`dial`] and [`accept`] open a [`Channel`]. Behind the handshake an [`Inbox`] reads frames from it
//! and an [`Outbox`] writes them, neither ever waiting; [`wait`] waits for several of them at once.
//! A [`Conversation`] does all of it with a deadline, for control connections.

mod awaited;
mod channel;
mod conversation;
mod inbox;
mod outbox;
mod path;
mod ready;
mod secret;
mod state;

pub(crate) use awaited::Awaited;
pub use channel::{Channel, Greeting, accept, dial, refusal, refuse};
pub use conversation::Conversation;
pub use inbox::{Frame, Inbox};
pub use outbox::Outbox;
pub use path::TcpPath;
pub use ready::{WAIT_MAX, Waker, wait, wait_writable};
pub use secret::PoolSecret;
pub use state::{StateAssembler, push_state};

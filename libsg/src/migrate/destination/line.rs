//! The control connection to the source, and what is queued on it.

use std::time::Instant;

use crate::error::{Error, Result};
use crate::host;
use crate::transport::{Channel, Inbox, Outbox};
use crate::wire::Kind;
use crate::wire::message::{self, Talk};

/// The control connection.
pub(super) struct Line {
    pub channel: Channel,
    pub inbox: Inbox,
    pub outbox: Outbox,
    pub since: Instant,
    pub heard_at: Instant,
    pub pinged_at: Instant,
}

impl Line {
    pub fn new(channel: Channel) -> Self {
        let now = host::now();
        let (inbox, outbox) = (Inbox::new(), Outbox::new());
        Self { channel, inbox, outbox, since: now, heard_at: now, pinged_at: now }
    }

    /// Reads on without looking, and writes on.
    pub fn discard(&mut self) -> Result<()> {
        self.outbox.flush(&self.channel, usize::MAX)?;
        while self.inbox.poll(&self.channel)?.is_some() {}
        Ok(())
    }

    pub fn say(&mut self, talk: &Talk) {
        let header = self.channel.header(Kind::Talk);
        let said = message::encode(talk).map_err(Error::from).and_then(|body| {
            self.outbox.push_frame(header, &body, [])?;
            self.outbox.flush(&self.channel, usize::MAX)
        });
        if let Err(error) = said {
            // A connection that broke is noticed by reading it.
            tracing::info!(error = error.chain(), "the source could not be told");
        }
    }
}

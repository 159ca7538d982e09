//! The final set: which copies of pages count that were sent more than once.

use super::Tracker;
use crate::error::{Error, ErrorKind, Result};
use crate::gather::books::Kind;
use crate::ids::Round;
use crate::page::PageRange;

impl Tracker {
    /// Whether a newer round replaces what is installed: as long as the VM is sent in rounds and does not run here.
    pub fn set_replaces(&mut self, replaces: bool) {
        self.replaces = replaces;
    }

    /// Of these pages, only copies of `round` or of a later one count, whoever has them: what is known of older ones
    /// is forgotten, and what is said of them later is not listened to. Whole units are required.
    ///
    /// # Errors
    /// [`ErrorKind::Protocol`] for pages that there are not.
    pub fn require(&mut self, range: PageRange, round: Round) -> Result<()> {
        if range.positions().end > self.states.len() {
            let message = format!("pages {range} of the final set are outside of the volume");
            return Err(Error::new(ErrorKind::Protocol, message));
        }
        for page in range.iter() {
            let Some(unit) = self.unit(page) else { continue };
            for page in unit.positions() {
                if self.rounds[page] < round.0 {
                    self.tally(page, false);
                    // Whoever installs an older one just now finds it suspect when he is through.
                    let to = if self.states[page].is_installing() { Kind::Suspect } else { Kind::Missing };
                    self.states[page].forget(to);
                    self.rounds[page] = round.0;
                    self.tally(page, true);
                }
            }
        }
        Ok(())
    }
}

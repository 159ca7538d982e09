//! A source of pages that forgets what is safe hears what became of them.

use super::shared::Scatter;
use crate::error::{Error, ErrorKind, Result};
use crate::page::PageRange;
use crate::source::{Outcome, Repeat};

/// Room for what is told at once, which is used again.
#[derive(Debug, Default)]
pub struct News {
    safe: Vec<PageRange>,
    lost: Vec<PageRange>,
}

impl Scatter {
    /// Tells the source what became of pages since. Whether some are lost: they will be available again.
    ///
    /// # Errors
    /// [`ErrorKind::Poisoned`] where pages are lost that it can never give again.
    pub fn tell_outcomes(&self, news: &mut News) -> Result<bool> {
        if !self.forgets {
            return Ok(false);
        }
        self.planner.lock().take_outcomes(&mut news.safe, &mut news.lost);
        news.lost.iter().for_each(|run| self.source.outcome(*run, Outcome::Lost));
        news.safe.iter().for_each(|run| self.source.outcome(*run, Outcome::Safe));
        if news.lost.is_empty() || self.source.repeat() == Repeat::ByRecovery {
            return Ok(!news.lost.is_empty());
        }
        let message = "whoever had them died, and the source cannot give them again";
        self.given(Err(Error::new(ErrorKind::Lost, message).about(news.lost.iter().copied())))
    }
}

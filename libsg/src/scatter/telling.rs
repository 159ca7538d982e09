//! What a source of pages and its scatter say to each other: what has become available, and what became of pages that the
//! source forgets when they are safe.

use super::shared::Scatter;
use crate::error::{Error, ErrorKind, Result};
use crate::page::PageRange;
use crate::source::{Outcome, Repeat, Supply};

/// Whoever leads a migration takes the source's pages by it. Has room for what is said at once, which is used again.
#[derive(Debug)]
pub struct Feed {
    supply: Supply,
    named: Vec<PageRange>,
    news: News,
}

#[derive(Debug, Default)]
struct News {
    safe: Vec<PageRange>,
    lost: Vec<PageRange>,
}

impl Default for Feed {
    fn default() -> Self {
        Self { supply: Supply::More, named: Vec::new(), news: News::default() }
    }
}

impl Feed {
    /// Tells the source what became of pages since, and takes those that have become available. Whether there will be more.
    ///
    /// # Errors
    /// The source's; [`ErrorKind::Poisoned`] where pages are lost that it can never give again.
    pub fn turn(&mut self, scatter: &Scatter) -> Result<Supply> {
        if scatter.tell_outcomes(&mut self.news)? || self.supply != Supply::Complete {
            self.supply = scatter.take_supply(&mut self.named)?;
        }
        Ok(self.supply)
    }
}

impl Scatter {
    /// Tells the source what became of pages since. Whether some are lost: they will be available again.
    fn tell_outcomes(&self, news: &mut News) -> Result<bool> {
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

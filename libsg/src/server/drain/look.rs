//! What is looked at before pages are given away: who has them anyway.

use super::heirs::{Heir, Heirs};
use crate::error::{Error, Result};
use crate::ids::{MemberIndex, MemberSet};
use crate::limits::INDEX_ENTRIES_MAX;
use crate::page::{PageIndex, PageRange};
use crate::server::slots::Held;
use crate::wire::entry::encode_table;
use crate::wire::run::decode_runs;
use crate::wire::{IndexEntry, Kind};

/// What members have themselves, and know of zero pages, of a range: for each, by page, the round and one, or nothing.
pub(in crate::server) struct Holdings {
    range: PageRange,
    by_member: Vec<(MemberIndex, Vec<u32>)>,
}

/// Beside a round: the member knows that the page is zero.
const ZERO: u32 = 1 << 31;

impl Holdings {
    /// Asks those who take over, or on, what they have.
    ///
    /// # Errors
    /// Who could not be asked, and why.
    pub(in crate::server) fn ask(
        heirs: &mut Heirs<'_>,
        range: PageRange,
    ) -> Result<Self, (MemberIndex, Error)> {
        let of = |heir: &mut Heir<'_>| {
            let index = heir.index;
            Self::ask_one(heir, range).map(|rounds| (index, rounds)).map_err(|error| (index, error))
        };
        let by_member = heirs.iter_mut().map(of).collect::<Result<_, _>>()?;
        Ok(Self { range, by_member })
    }

    fn ask_one(heir: &mut Heir<'_>, range: PageRange) -> Result<Vec<u32>> {
        let end = range.first.0 + range.pages;
        let mut rounds = vec![0; range.pages as usize];
        let mut from = range.first.0;
        while from < end {
            let mut table = Vec::new();
            encode_table([PageRange::new(PageIndex(from), end - from)], &mut table);
            let (header, body) = heir.line.tell(Kind::Locate, (1, &table))?;
            let mut entries: Vec<IndexEntry> = Vec::new();
            decode_runs(&body, header.count.into(), &mut entries)?;
            let last = entries.last().filter(|_| entries.len() >= INDEX_ENTRIES_MAX);
            // What lies before, of whoever says so, is no answer.
            let behind = |last: &IndexEntry| last.page.0.saturating_add(last.run_pages).max(from + 1);
            from = last.map_or(end, behind);
            for entry in &entries {
                let is = match entry.placement {
                    Some(at) if at.member == heir.index => 0,
                    Some(_) => continue,
                    None => ZERO,
                };
                let first = u64::from(entry.page.0).max(range.first.0.into());
                let behind = (u64::from(entry.page.0) + u64::from(entry.run_pages)).min(end.into());
                let positions = first.min(behind)..behind;
                let at = |page: u64| (page - u64::from(range.first.0)) as usize;
                for page in positions {
                    rounds[at(page)] = is | (u32::from(entry.round.0) + 1);
                }
            }
        }
        Ok(rounds)
    }

    fn said<'a>(&self, rounds: &'a [u32], page: PageIndex) -> Option<&'a u32> {
        rounds.get(page.0.checked_sub(self.range.first.0)? as usize)
    }

    /// Who has a page of this round, or a newer one.
    pub(in crate::server) fn of(&self, held: &Held) -> MemberSet {
        let has = |rounds: &[u32]| {
            let said = self.said(rounds, held.page);
            said.is_some_and(|said| said & ZERO == 0 && *said > u32::from(held.round.0))
        };
        self.by_member.iter().filter(|(_, rounds)| has(rounds)).map(|(member, _)| *member).collect()
    }

    /// Whether a member knows of all pages of an entry that they are zero, or knows something newer.
    pub(in crate::server) fn knows_zero(&self, member: MemberIndex, entry: &IndexEntry) -> bool {
        let Some((_, rounds)) = self.by_member.iter().find(|(other, _)| *other == member) else {
            return false;
        };
        let round = u32::from(entry.round.0) + 1;
        entry.range().iter().all(|page| {
            self.said(rounds, page).is_some_and(|said| {
                let known = said & !ZERO;
                known > round || (said & ZERO != 0 && known == round)
            })
        })
    }
}

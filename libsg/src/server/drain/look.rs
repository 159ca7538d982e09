//! What is looked at before pages are given away: who has them anyway.

use super::heirs::Heirs;
use crate::error::Result;
use crate::ids::{MemberIndex, MemberSet};
use crate::limits::INDEX_ENTRIES_MAX;
use crate::page::{PageIndex, PageRange};
use crate::server::slots::Held;
use crate::server::store::Portrait;
use crate::wire::entry::encode_table;
use crate::wire::run::decode_runs;
use crate::wire::{IndexEntry, Kind};

/// What members have themselves: for each, by page, the round and one, or nothing.
pub(super) struct Holdings(Vec<(MemberIndex, Vec<u32>)>);

impl Holdings {
    /// Asks those who take over what they have.
    pub(super) fn ask(portrait: &Portrait, heirs: &mut Heirs<'_>) -> Result<Self> {
        let pages = portrait.said.manifest.pages();
        let mut all = Vec::new();
        for heir in heirs.iter_mut() {
            let mut rounds = vec![0; pages as usize];
            let mut from = 0;
            while from < pages {
                let range = PageRange::new(PageIndex(from), pages - from);
                let mut table = Vec::new();
                encode_table([range], &mut table);
                let (header, body) = heir.line.tell(Kind::Locate, (1, &table))?;
                let mut entries: Vec<IndexEntry> = Vec::new();
                decode_runs(&body, header.count.into(), &mut entries)?;
                let last = entries.last().filter(|_| entries.len() >= INDEX_ENTRIES_MAX);
                from = last.map_or(pages, |last| last.page.0.saturating_add(last.run_pages));
                let own = |entry: &&IndexEntry| entry.placement.is_some_and(|at| at.member == heir.index);
                for entry in entries.iter().filter(own) {
                    if let Some(round) = rounds.get_mut(entry.page.as_usize()) {
                        *round = u32::from(entry.round.0) + 1;
                    }
                }
            }
            all.push((heir.index, rounds));
        }
        Ok(Self(all))
    }

    /// Who has a page of this round, or a newer one.
    pub(super) fn of(&self, held: &Held) -> MemberSet {
        let has = |rounds: &[u32]| {
            rounds.get(held.page.as_usize()).is_some_and(|round| *round > u32::from(held.round.0))
        };
        self.0.iter().filter(|(_, rounds)| has(rounds)).map(|(member, _)| *member).collect()
    }
}

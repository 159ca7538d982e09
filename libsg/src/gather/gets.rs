//! Pages that are read where they lie, as links are asked for them.

use super::tracker::Read;
use crate::vmd::link::Request;
use crate::wire::{GetEntry, PageEntry};

/// A request for such pages. Its lists are used again and again.
#[derive(Debug, Default)]
pub struct Gets {
    wanted: Vec<GetEntry>,
    known: Vec<PageEntry>,
}

impl Gets {
    /// The request for these.
    pub fn known(&mut self, reads: &[Read]) -> Request<'_> {
        self.wanted.clear();
        self.wanted.extend(reads.iter().map(|read| GetEntry { page: read.page, placement: read.placement }));
        self.known.clear();
        self.known.extend(reads.iter().map(|read| PageEntry::raw(read.page, read.round, read.checksum)));
        Request::GetKnown { wanted: &self.wanted, known: &self.known }
    }
}

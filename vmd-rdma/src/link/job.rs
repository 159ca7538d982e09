//! Puts and gets that go over the device, from when they are asked for to when they have ended.

use libsg::Error;
use libsg::ids::{MemberSet, Placement};
use libsg::memory::PageSlice;
use libsg::page::PAGE_BYTES;
use libsg::vmd::{Request, Ticket};
use libsg::wire::access::KeyEntry;
use libsg::wire::{GetEntry, PageEntry};

/// One of them. Its lists are used again and again.
#[derive(Debug)]
pub(super) enum Job {
    Put(Put),
    Get(Get),
}

/// Pages to be written.
#[derive(Debug, Default)]
pub(super) struct Put {
    pub entries: Vec<PageEntry>,
    pub slices: Vec<PageSlice>,
    pub copies: MemberSet,
    pub lease: Ticket,
    /// Where each page goes.
    pub placements: Vec<Option<Placement>>,
    /// Those that go somewhere.
    pub granted: Vec<PageEntry>,
    /// Windows that it is written from.
    pub windows: Vec<u64>,
}

/// Pages to be read.
#[derive(Debug, Default)]
pub(super) struct Get {
    pub wanted: Vec<GetEntry>,
    /// What they are, where that is known and the bytes are to be held against it.
    pub known: Vec<PageEntry>,
    pub reach: Ticket,
    /// Where they land.
    pub area: usize,
    /// Those that are there, once that was said, and their bytes.
    pub entries: Vec<PageEntry>,
    pub bytes: usize,
    /// It is read without asking, in what these requests keep.
    pub kept_by: Vec<u64>,
    /// The device reads.
    pub reading: bool,
    /// The intermediary has answered.
    pub answered: bool,
    /// With this.
    pub refused: Option<Error>,
    /// What may go on to be reached.
    pub keys: Vec<KeyEntry>,
}

impl Put {
    pub(super) fn pages_bytes(&self) -> usize {
        self.slices.iter().map(PageSlice::len).sum()
    }

    fn clear(&mut self) {
        self.entries.clear();
        self.slices.clear();
        self.placements.clear();
        self.granted.clear();
        self.windows.clear();
    }
}

impl Get {
    fn clear(&mut self) {
        self.wanted.clear();
        self.known.clear();
        self.entries.clear();
        self.keys.clear();
        self.kept_by.clear();
        self.bytes = 0;
        (self.reading, self.answered, self.refused) = (false, false, None);
    }

    /// Whether nothing is to come any more.
    pub(super) fn has_ended(&self) -> bool {
        self.answered && !self.reading
    }
}

impl Job {
    /// Page bytes that it moves.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Put(put) => put.entries.len() * PAGE_BYTES,
            Self::Get(get) => get.wanted.len() * PAGE_BYTES,
        }
    }

    /// What was asked for.
    pub(super) fn request(&self) -> Request<'_> {
        match self {
            Self::Put(put) => Request::Put { entries: &put.entries, slices: &put.slices, copies: put.copies },
            Self::Get(get) => Request::Get(&get.wanted),
        }
    }
}

/// Jobs that have ended, to be used again.
#[derive(Debug, Default)]
pub(super) struct Spare {
    puts: Vec<Put>,
    gets: Vec<Get>,
}

impl Spare {
    pub(super) fn put(&mut self, entries: &[PageEntry], slices: &[PageSlice], copies: MemberSet) -> Job {
        let mut put = self.puts.pop().unwrap_or_default();
        put.entries.extend_from_slice(entries);
        put.slices.extend_from_slice(slices);
        put.copies = copies;
        Job::Put(put)
    }

    pub(super) fn get(&mut self, wanted: &[GetEntry], known: &[PageEntry]) -> Job {
        let mut get = self.gets.pop().unwrap_or_default();
        get.wanted.extend_from_slice(wanted);
        get.known.extend_from_slice(known);
        Job::Get(get)
    }

    pub(super) fn keep(&mut self, job: Job) {
        match job {
            Job::Put(mut put) => {
                put.clear();
                self.puts.push(put);
            }
            Job::Get(mut get) => {
                get.clear();
                self.gets.push(get);
            }
        }
    }
}

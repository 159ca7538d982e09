//! Taking pages out again that are in place: whoever touches one of them then waits for it.
//!
//! Pages of a file are given up by way of the file, of which no event tells. Giving up private memory waits for
//! somebody to read an event, for each run anew, and for nobody where the memory is not registered: it is not for that
//! long. Nobody may touch it meanwhile. Nor may the kernel fill the gaps, which it does where it makes a huge page of
//! pages that are in place: what is not registered never has room for one, or is all given up.

use super::{Uffd, Window, failed, raw};
use crate::error::Result;
use crate::memory::GuestMemory;
use crate::page::{InstallUnit, PAGE_BYTES_U64, PageIndex, PageRange};

/// Of a transparent huge page.
const HUGE_BYTES: u64 = InstallUnit::Huge2M.bytes() as u64;

impl Uffd {
    /// Takes ascending runs out of memory of this process.
    pub(super) fn take_out(&self, memory: &GuestMemory, runs: &[PageRange]) -> Result<()> {
        let mut rest = runs;
        while let Some(first) = rest.first() {
            let (window, start) = self.locate(*first)?;
            if is_of_file(memory, first.first) {
                memory.release(*first)?;
                rest = &rest[1..];
                continue;
            }
            let (group, behind) = rest.split_at(taken_together(window, rest));
            rest = behind;
            let end = group.last().map_or(start, |run| end_address(window, *run));
            let gap = (end - start) as usize;
            raw::unregister(&self.descriptor, start, gap).map_err(|cause| failed(*first, cause))?;
            let released = group.iter().try_for_each(|run| memory.release(*run));
            raw::register(&self.descriptor, start, gap).map_err(|cause| failed(*first, cause))?;
            released?;
        }
        Ok(())
    }
}

/// How many runs are taken out at once: as many as lie in the window and leave no room for a huge page, or one.
fn taken_together(window: &Window, runs: &[PageRange]) -> usize {
    let Some(first) = runs.first() else { return 0 };
    let start = window.address + u64::from(first.first.0 - window.first.0) * PAGE_BYTES_U64;
    let room_at = start.next_multiple_of(HUGE_BYTES) + HUGE_BYTES;
    let fits = |run: &&PageRange| {
        run.first.0 < window.first.0 + window.pages && end_address(window, **run) < room_at
    };
    1 + runs[1..].iter().take_while(fits).count()
}

fn end_address(window: &Window, run: PageRange) -> u64 {
    window.address + u64::from(run.first.0 + run.pages - window.first.0) * PAGE_BYTES_U64
}

fn is_of_file(memory: &GuestMemory, page: PageIndex) -> bool {
    let behind = memory.regions().partition_point(|region| region.pages().first <= page);
    let region = behind.checked_sub(1).and_then(|at| memory.regions().get(at));
    region.is_some_and(|region| region.mapping().file().is_some())
}

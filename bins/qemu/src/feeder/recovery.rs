//! A destination QEMU that lost its source, and goes on with another: it says which pages it has, and asks again for those that
//! it waits for.
//!
//! ```text
//! feeder --- RECV_BITMAP block, for each --->  destination QEMU (postcopy-recover)
//!        <-- a bit for each of its pages -----
//!        --- RESUME ------------------------>
//!        <-- RESUME_ACK, REQ_PAGES .. -------  (postcopy-active)
//! ```

use libsg::page::{PAGE_BYTES_U64, PageIndex, PageRange};

use super::{Answer, Command, Configuration, Error, ErrorKind, Feeder, HEAD, Layout, Result, UnixStream};
use super::{BlockIndex, hung_up};

/// What QEMU says of the pages that it has.
#[derive(Default)]
pub(super) struct Received {
    /// So many blocks were asked for, and so many have been told of.
    asked: usize,
    told: usize,
    /// A bit for each page, of each block in their order.
    bitmaps: Vec<Vec<u8>>,
    /// It goes on.
    resumed: bool,
}

impl Received {
    /// The bitmap of a block begins: the next one that was asked for.
    pub(super) fn begin(&mut self, layout: &Layout, of: BlockIndex) -> Result<()> {
        let at = self.bitmaps.len();
        let block = layout.blocks().get(of).filter(|_| usize::from(of.0) == at && at < self.asked);
        let block =
            block.ok_or_else(|| Error::new(ErrorKind::Protocol, "a bitmap that was not asked for"))?;
        self.bitmaps.push(Vec::with_capacity(Answer::bitmap_bytes(block) as usize));
        Ok(())
    }

    pub(super) fn take(&mut self, bytes: &[u8]) {
        if let Some(bitmap) = self.bitmaps.last_mut() {
            bitmap.extend_from_slice(bytes);
        }
    }

    pub(super) fn end(&mut self) {
        self.told += 1;
    }

    pub(super) fn resume(&mut self) {
        self.resumed = true;
    }

    /// Runs of pages that have come. Of a block of huge pages a huge page is there as a whole, or is not.
    pub(super) fn runs(&self, layout: &Layout, each: &mut dyn FnMut(PageRange)) {
        for (bitmap, (index, block)) in self.bitmaps.iter().zip(layout.blocks().iter()) {
            let first = layout.page(index, 0).0;
            let pages = (block.length_bytes / PAGE_BYTES_U64) as u32;
            let has =
                |page: u32| bitmap.get(page as usize / 8).is_some_and(|byte| byte >> (page % 8) & 1 != 0);
            let mut at = 0;
            while let Some(start) = (at..pages).find(|page| has(*page)) {
                at = (start..pages).find(|page| !has(*page)).unwrap_or(pages);
                each(PageRange::new(PageIndex(first + start), at - start));
            }
        }
    }
}

impl Feeder {
    /// For a connection over which a destination QEMU goes on that had lost its source (`migrate-recover`). It has said which
    /// pages it has, and pages may follow.
    ///
    /// # Errors
    /// [`ErrorKind::Vm`] when QEMU does not go on.
    pub fn recover(connection: UnixStream, of: (Layout, Configuration, u32)) -> Result<Self> {
        let feeder = Self::start(connection, of)?;
        feeder.go_on().map_err(|cause| {
            let message =
                "the destination QEMU does not go on with its migration: its standard error says why";
            Error::new(ErrorKind::Vm, message).because(cause)
        })?;
        Ok(feeder)
    }

    fn go_on(&self) -> Result<()> {
        let blocks = self.layout.blocks();
        let count = blocks.iter().count();
        self.books.lock().received.asked = count;
        self.say(|out| blocks.iter().for_each(|(of, _)| Command::ReceivedBitmap(of).encode(blocks, out)))?;
        self.wait(HEAD, |books| (books.received.told == count).then_some(()))?;
        self.say(|out| Command::PostcopyResume.encode(blocks, out))?;
        self.wait(HEAD, |books| books.received.resumed.then_some(()))?;
        self.books.lock().running = true;
        self.hearing.has_changed();
        Ok(())
    }

    fn say(&self, what: impl FnOnce(&mut Vec<u8>)) -> Result<()> {
        let mut line = self.line.lock();
        line.bytes.clear();
        what(&mut line.bytes);
        line.write().map_err(|cause| hung_up().because(cause))
    }
}

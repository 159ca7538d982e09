//! A relay in the place of one that died, behind the switch of its source.
//!
//! It begins with nothing but what is safe elsewhere, of which it is told before the memory flows. Then it has the source resume its
//! stream, which asks what has come, and hears of that, and of nothing else.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use libsg::manifest::Manifest;
use libsg::{Error, ErrorKind, Result};

use super::pages::{Limits, Pages};
use super::store::Writer;
use super::{Begun, Books, Line, Relay, Shared, reader};
use crate::layout::Layout;

/// What reads when it flows.
pub(super) struct Again {
    begun: Begun,
    writer: Writer,
    limits: Limits,
    /// The source has said everything, and cannot be resumed.
    is_spent: bool,
}

impl Relay {
    /// For a source of this VM that has switched, and lost who read its stream; or that `is_spent`: it has said everything, and
    /// waits for a word that it does not hear.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] for a VM of no QEMU; the kernel's, which gives no memory or sockets.
    pub(crate) fn again(manifest: &Manifest, limits: Limits, is_spent: bool) -> Result<Self> {
        let (layout, configuration, section) = Layout::of(manifest)?;
        let layout = Arc::new(layout);
        let pages = Pages::left(Arc::clone(&layout), limits)?;
        let writer = pages.writer();
        let begun = Begun { layout, configuration, section };
        // Nobody hears what is said before it is resumed.
        let (answers, _) = UnixStream::pair()?;
        let books = Books {
            begun: Some(begun.clone()),
            package: Some(Arc::default()),
            pages: Some(pages),
            line: Line::Broken,
            ..Books::default()
        };
        let again = Again { begun, writer, limits, is_spent };
        Ok(Self(Arc::new(Shared::new(answers, books, Some(again)))))
    }

    pub(super) fn go_on(&self, again: Again) -> Result<()> {
        let Again { begun, writer, limits, is_spent } = again;
        let left = self.0.books.lock().pages.as_ref().map(Pages::runs_to_come).unwrap_or_default();
        if !is_spent {
            let reads = Arc::clone(&self.0);
            std::thread::Builder::new()
                .name("sg-qemu-reader".into())
                .spawn(move || reader::run_on(&reads, (begun, writer), limits))?;
            return Ok(());
        }
        if left.is_empty() {
            self.0.books.lock().over = true;
            return Ok(());
        }
        let message = "the source QEMU has said everything, and cannot send again what went with the process that read it";
        let lost = Error::new(ErrorKind::Lost, message).about(left);
        self.0.fail(&lost);
        Err(lost)
    }
}

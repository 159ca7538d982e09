//! Where in a stream of bytes damage may be done: anywhere. Told apart are headers, what is said behind them, and the bytes
//! of pages, so that what is short is damaged as often as what is long.

use std::ops::Range;

use libsg::page::PAGE_BYTES;
use libsg::wire::{HEADER_BYTES, Header};

/// One direction of a connection, frame by frame.
#[derive(Default)]
pub struct Frames {
    /// What has come of the next header.
    header: Vec<u8>,
    /// Bytes of a body that are still to come, of how many, and where the bytes of pages begin in it.
    body: Option<(usize, usize, usize)>,
    /// It is no stream of frames.
    unknown: bool,
}

impl Frames {
    /// Follows the stream; of what parts these bytes are.
    pub fn follow(&mut self, bytes: &[u8]) -> Vec<Range<usize>> {
        let (mut found, mut at) = (Vec::new(), 0);
        while at < bytes.len() && !self.unknown {
            let rest = bytes.len() - at;
            if let Some((left, all, pages_at)) = self.body {
                let step = left.min(rest);
                let begin = all - left;
                let pages = at + pages_at.saturating_sub(begin).min(step);
                found.extend([at..pages, pages..at + step].into_iter().filter(|part| !part.is_empty()));
                self.body = (left > step).then_some((left - step, all, pages_at));
                at += step;
            } else {
                let step = (HEADER_BYTES - self.header.len()).min(rest);
                self.header.extend_from_slice(&bytes[at..at + step]);
                found.push(at..at + step);
                at += step;
                self.open_body();
            }
        }
        found
    }

    fn open_body(&mut self) {
        let Some(bytes) = self.header.first_chunk::<HEADER_BYTES>() else { return };
        match Header::decode(bytes) {
            Ok(header) => {
                let all = header.body_bytes as usize;
                // No table is as long as a page here.
                let pages_at = if header.kind.has_bytes() { all % PAGE_BYTES } else { all };
                self.body = (all > 0).then_some((all, all, pages_at));
            }
            Err(_) => self.unknown = true,
        }
        self.header.clear();
    }
}

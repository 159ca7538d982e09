//! Where in a stream of bytes damage may be done: in what a checksum of ours covers.
//!
//! That is each header, all of the handshake, the VM's state, and the bytes of pages. Tables in front of pages and
//! control messages have the transport's checksum only (DESIGN.md, *Simulation*).

use std::ops::Range;

use libsg::page::PAGE_BYTES;
use libsg::wire::{HEADER_BYTES, Header, Kind};

/// One direction of a connection, frame by frame.
#[derive(Default)]
pub struct Frames {
    /// What has come of the next header.
    header: Vec<u8>,
    /// Bytes of a body that are still to come, of how many, and from where on damage may be done in it.
    body: Option<(usize, usize, usize)>,
    /// It is no stream of frames.
    unknown: bool,
}

impl Frames {
    /// Follows the stream; where in these bytes damage may be done.
    pub fn follow(&mut self, bytes: &[u8]) -> Vec<Range<usize>> {
        let (mut found, mut at) = (Vec::new(), 0);
        while at < bytes.len() && !self.unknown {
            let rest = bytes.len() - at;
            if let Some((left, all, covered)) = self.body {
                let step = left.min(rest);
                let begin = all - left;
                let from = at + covered.saturating_sub(begin).min(step);
                found.extend((from < at + step).then_some(from..at + step));
                self.body = (left > step).then_some((left - step, all, covered));
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
                self.body = (all > 0).then_some((all, all, covered_from(&header)));
            }
            Err(_) => self.unknown = true,
        }
        self.header.clear();
    }
}

/// From where on the body is covered by a checksum, or by what it proves.
fn covered_from(header: &Header) -> usize {
    let all = header.body_bytes as usize;
    match header.kind {
        Kind::Hello | Kind::Challenge | Kind::Auth | Kind::Welcome | Kind::Refused | Kind::State => 0,
        // No table is as long as a page.
        Kind::Put
        | Kind::GetReply
        | Kind::Pages
        | Kind::PutCopies
        | Kind::Copy
        | Kind::HandPages
        | Kind::HandCopies => all % PAGE_BYTES,
        _ => all,
    }
}

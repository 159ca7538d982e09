//! What the page path is measured against: pages by `writev` over a plain TCP connection, received into one warm
//! buffer and forgotten.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::thread::JoinHandle;

use libsg::Result;
use libsg::memory::GuestMemory;
use libsg::memory::vectored::{self, IoPart};
use libsg::page::{PAGE_BYTES, PageIndex, PageRange};

/// A connection over loopback with somebody who reads it.
pub struct Plain {
    sender: Option<TcpStream>,
    receiving: Option<JoinHandle<()>>,
}

impl Plain {
    /// For memory of so many pages, sent as often as is liked.
    ///
    /// # Errors
    /// Loopback cannot be used.
    pub fn start(pages: u32) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let sender = TcpStream::connect(listener.local_addr()?)?;
        let (receiver, _) = listener.accept()?;
        let receiving = std::thread::Builder::new()
            .name("bench-plain".into())
            .spawn(move || receive(receiver, pages as usize * PAGE_BYTES))?;
        Ok(Self { sender: Some(sender), receiving: Some(receiving) })
    }

    /// Sends all of `memory`, so many pages a `writev`; back when all of it came.
    ///
    /// # Errors
    /// The connection broke.
    pub fn send(&mut self, memory: &GuestMemory, batch_pages: u32) -> Result<()> {
        let Some(sender) = &mut self.sender else { return Ok(()) };
        for first in (0..memory.pages()).step_by(batch_pages as usize) {
            let run = memory.slice(PageRange::new(PageIndex(first), batch_pages))?;
            let mut parts: Vec<IoPart<'_>> = run.pages().map(IoPart::Guest).collect();
            let mut left = &mut parts[..];
            while !left.is_empty() {
                let bytes = vectored::send(&*sender, left)?;
                left = IoPart::advance(left, bytes);
            }
        }
        sender.read_exact(&mut [0])?;
        Ok(())
    }
}

/// Answers with one byte each time that so many came. Ends when the sender hangs up.
fn receive(mut stream: TcpStream, bytes: usize) {
    let mut buffer = vec![0; 1 << 20];
    let mut left = bytes;
    while let Ok(came @ 1..) = stream.read(&mut buffer) {
        left = left.saturating_sub(came);
        if left == 0 {
            left = bytes;
            if stream.write_all(&[1]).is_err() {
                return;
            }
        }
    }
}

impl Drop for Plain {
    fn drop(&mut self) {
        self.sender = None;
        if let Some(receiving) = self.receiving.take() {
            let _ = receiving.join();
        }
    }
}

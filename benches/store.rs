//! An intermediary in this process, over TCP or beside a simulated device: pages are put there and got back, in batches,
//! with up to 1 MiB under way.

use std::collections::VecDeque;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use libsg::ids::{Epoch, MemberSet, Placement, Round, VolumeId};
use libsg::memory::{GuestMemory, PageSlice};
use libsg::page::{PAGE_BYTES, PageIndex, PageRange};
use libsg::server::backend::Backend;
use libsg::server::{Config, Server, ServerHandle};
use libsg::transport::{PoolSecret, wait};
use libsg::vmd::link::ask;
use libsg::vmd::{Class, Connector, Link, Reply, Request, TcpConnector};
use libsg::wire::message::VmdRequest;
use libsg::wire::{GetEntry, PageEntry};
use libsg::{Error, ErrorKind, Result};
use vmd_rdma::verbs::simulated::Network;
use vmd_rdma::{RdmaBackend, RdmaConnector};

const UNDER_WAY_PAGES: u32 = 256;
const PATIENCE: Duration = Duration::from_secs(10);
/// Slots given up in one request.
const DROP_AT_ONCE: usize = 512;

/// A server, a volume on it, and a link to that.
pub struct Store {
    link: Box<dyn Link>,
    pages: u32,
    _server: ServerHandle,
}

impl Store {
    /// With room for memory of so many pages, put twice.
    ///
    /// # Errors
    /// Loopback cannot be used, or there is no memory.
    pub fn start(pages: u32) -> Result<Self> {
        Self::start_over(pages, &TcpConnector::new(secret()?), None)
    }

    /// The same, with pages that the client writes and reads by itself.
    ///
    /// # Errors
    /// As [`Self::start`].
    pub fn start_simulated(pages: u32) -> Result<Self> {
        let network = Network::new(1);
        let connector = RdmaConnector::new(secret()?, network.device(1)).strict();
        Self::start_over(pages, &connector, Some(Arc::new(RdmaBackend::new(network.device(2)))))
    }

    fn start_over(pages: u32, connector: &dyn Connector, backend: Option<Arc<dyn Backend>>) -> Result<Self> {
        let anywhere = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let config = Config { backend, ..Config::new(anywhere, "bench", 1 << 30, secret()?) };
        let server = Server::bind(config)?.spawn()?;
        let volume = VolumeId::random()?;
        let mut link = connector.connect(server.address(), volume, Epoch::FIRST, Class::Bulk, PATIENCE)?;
        let members = vec![link.member().clone()];
        let create = VmdRequest::Create { manifest: crate::manifest(pages), members };
        ask(&mut *link, Request::Control(&create), PATIENCE, |_| Ok(()))?;
        Ok(Self { link, pages, _server: server })
    }

    /// Submits a batch for each piece of the memory and sees to all answers.
    fn pipeline(
        &mut self,
        batch_pages: u32,
        submit: &mut dyn FnMut(&mut dyn Link, PageRange) -> Result<()>,
        take: &mut dyn FnMut(Reply<'_>) -> Result<()>,
    ) -> Result<()> {
        let mut left: VecDeque<PageRange> = (0..self.pages)
            .step_by(batch_pages as usize)
            .map(|first| PageRange::new(PageIndex(first), batch_pages))
            .collect();
        let mut under_way = 0;
        while under_way > 0 || !left.is_empty() {
            while under_way + batch_pages <= UNDER_WAY_PAGES
                && let Some(range) = left.pop_front()
            {
                submit(&mut *self.link, range)?;
                under_way += batch_pages;
            }
            self.link.progress(usize::MAX)?;
            let before = under_way;
            while let Some(done) = self.link.completion() {
                take(done.result?)?;
                under_way -= batch_pages;
            }
            if under_way == before {
                wait(&[(self.link.poll_fd(), self.link.queued_bytes() > 0)], PATIENCE)?;
            }
        }
        Ok(())
    }

    /// Puts all of `memory`; says where.
    ///
    /// # Errors
    /// The link broke, or there was no room.
    pub fn put(&mut self, memory: &GuestMemory, batch_pages: u32, placed: &mut Vec<Placement>) -> Result<()> {
        placed.clear();
        let entry = |page| Ok(PageEntry::raw(page, Round(0), memory.checksum(page)?));
        self.pipeline(
            batch_pages,
            &mut |link, range| {
                let entries: Vec<PageEntry> = range.iter().map(entry).collect::<Result<_>>()?;
                let slices = [PageSlice::guest(memory, range)?];
                link.submit(Request::Put { entries: &entries, slices: &slices, copies: MemberSet::NONE })?;
                Ok(())
            },
            &mut |reply| match reply {
                Reply::Stored { placements: at, .. } => {
                    for at in at {
                        placed.push(at.ok_or_else(|| Error::new(ErrorKind::Full, "a page found no room"))?);
                    }
                    Ok(())
                }
                _ => Err(another_question()),
            },
        )
    }

    /// Gets everything that lies there.
    ///
    /// # Errors
    /// The link broke, or something did not come.
    pub fn get(&mut self, batch_pages: u32, placed: &[Placement]) -> Result<()> {
        let mut came = 0;
        self.pipeline(
            batch_pages,
            &mut |link, range| {
                let entry = |page: PageIndex| GetEntry { page, placement: placed[page.as_usize()] };
                let wanted: Vec<GetEntry> = range.iter().map(entry).collect();
                link.submit(Request::Get(&wanted))?;
                Ok(())
            },
            &mut |reply| match reply {
                Reply::Pages { bytes, .. } => {
                    came += bytes.len();
                    Ok(())
                }
                _ => Err(another_question()),
            },
        )?;
        if came == placed.len() * PAGE_BYTES { Ok(()) } else { Err(another_question()) }
    }

    /// Gives the slots back.
    ///
    /// # Errors
    /// The link broke.
    pub fn drop_all(&mut self, placed: &[Placement]) -> Result<()> {
        let entry = |(page, at): (u32, &Placement)| GetEntry { page: PageIndex(page), placement: *at };
        let all: Vec<GetEntry> = (0..).zip(placed).map(entry).collect();
        all.chunks(DROP_AT_ONCE)
            .try_for_each(|some| ask(&mut *self.link, Request::Drop(some), PATIENCE, |_| Ok(())))
    }
}

fn secret() -> Result<PoolSecret> {
    PoolSecret::from_bytes(b"bench")
}

fn another_question() -> Error {
    Error::new(ErrorKind::Protocol, "an answer to another question")
}

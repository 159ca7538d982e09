//! What moves through a link over a device: a volume of its own at an intermediary, which goes again.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use libsg::ids::{Checksum, Epoch, MemberSet, Placement, Round, VolumeId};
use libsg::manifest::{Manifest, Region};
use libsg::memory::{Mapping, PageSlice};
use libsg::page::{InstallUnit, PAGE_BYTES, PageIndex};
use libsg::transport;
use libsg::vmd::link::ask;
use libsg::vmd::{Class, Link as _, Reply, Request, Ticket};
use libsg::wire::message::{Member, VmdReply, VmdRequest};
use libsg::wire::{GetEntry, PageEntry};
use vmd_rdma::{RdmaConnector, RdmaLink};

use super::Wait;
use crate::error::chained;
use crate::interrupt;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// Pages that are dropped with one request.
const DROPPED: usize = 512;

/// What messages consist of, and how many of them.
#[derive(Clone, Copy, Debug)]
pub struct Messages {
    /// Whole pages.
    pub bytes: usize,
    /// Under way at once.
    pub depth: usize,
    /// In all.
    pub count: usize,
}

impl Messages {
    const fn pages(&self) -> usize {
        self.bytes / PAGE_BYTES
    }
}

/// How long each took, and all of them.
pub struct Took {
    /// From the first that was asked for to the end of the last.
    pub all: Duration,
    /// Each by itself.
    pub each: Vec<Duration>,
}

/// A volume to be written and read.
pub struct Trial {
    connector: RdmaConnector,
    address: SocketAddr,
    of: (VolumeId, Epoch),
    bulk: RdmaLink,
    urgent: RdmaLink,
    wait: Wait,
    memory: Arc<Mapping>,
    sums: Vec<Checksum>,
    /// What is there to be read, and what it is.
    stored: Vec<GetEntry>,
    known: Vec<PageEntry>,
}

impl Trial {
    /// A volume at the intermediary with `bytes` bytes, through which messages of up to so many go.
    pub fn begin(connector: RdmaConnector, address: SocketAddr, bytes: usize, wait: Wait) -> Result<Self> {
        let of = (VolumeId::random()?, Epoch(1));
        let link = |class| connector.link(address, of, class, PATIENCE).map_err(chained);
        let (bulk, urgent) = (link(Class::Bulk)?, link(Class::Urgent)?);
        let memory = Arc::new(Mapping::anonymous(bytes)?);
        let mut sums = Vec::new();
        for (number, offset) in (0..bytes).step_by(PAGE_BYTES).enumerate() {
            let page = content(number);
            memory.slot(offset, PAGE_BYTES).context("memory that was just made")?.copy_from(&page);
            sums.push(Checksum::of(&page));
        }
        let (stored, known) = (Vec::new(), Vec::new());
        let mut trial = Self { connector, address, of, bulk, urgent, wait, memory, sums, stored, known };
        trial.create(bytes)?;
        let whole = Messages { bytes: 1 << 20, depth: 4, count: bytes >> 20 };
        trial.stored = trial.write(whole)?.1;
        let known = |get: &GetEntry| PageEntry::raw(get.page, Round(0), trial.sums[get.page.0 as usize]);
        trial.known = trial.stored.iter().map(known).collect();
        Ok(trial)
    }

    fn create(&mut self, bytes: usize) -> Result<()> {
        let length_bytes = bytes as u64;
        let ram = Region { name: "trial".into(), guest_address: None, length_bytes, unit: InstallUnit::Page };
        let manifest =
            Manifest { vm: "sg-bench".into(), regions: vec![ram], vm_config: Vec::new(), sharing: None };
        let members = vec![Member { node: self.bulk.member().node.clone(), address: self.address }];
        control(&mut self.bulk, &VmdRequest::Create { manifest, members }).map(drop)
    }

    /// Gives the volume back.
    pub fn end(self) -> Result<()> {
        let Self { connector, address, of, bulk, urgent, .. } = self;
        // A link may be what failed.
        drop((bulk, urgent));
        let mut link = connector.link(address, of, Class::Bulk, PATIENCE).map_err(chained)?;
        control(&mut link, &VmdRequest::Dissolve).map(drop)
    }

    /// Writes messages, and has the intermediary drop them again.
    pub fn written(&mut self, messages: Messages) -> Result<Took> {
        let warm = self.write(Messages { count: messages.depth, ..messages })?.1;
        self.give_back(&warm)?;
        let (took, written) = self.write(messages)?;
        self.give_back(&written)?;
        Ok(took)
    }

    /// Where page `number` of all that are written is, of a volume and of memory that are gone through again and again.
    fn page(&self, number: usize) -> usize {
        number % self.sums.len()
    }

    fn write(&mut self, messages: Messages) -> Result<(Took, Vec<GetEntry>)> {
        let pages = messages.pages();
        let entry = |number| {
            let page = self.page(number);
            PageEntry::raw(PageIndex(page as u32), Round(0), self.sums[page])
        };
        let entries: Vec<PageEntry> = (0..messages.count * pages).map(entry).collect();
        let slice = |first| {
            let from = self.page(first) * PAGE_BYTES;
            PageSlice::mapping(Arc::clone(&self.memory), from, messages.bytes, None).map_err(chained)
        };
        let slices: Vec<PageSlice> =
            (0..entries.len()).step_by(pages).map(slice).collect::<Result<Vec<_>>>()?;
        let mut written: Vec<Option<Placement>> = vec![None; entries.len()];
        let submit = |link: &mut RdmaLink, message: usize| {
            let entries = &entries[message * pages..][..pages];
            let slices = &slices[message..=message];
            link.submit(Request::Put { entries, slices, copies: MemberSet::NONE })
        };
        let took = flow(&mut self.bulk, self.wait, messages, submit, |message, reply| match reply {
            Reply::Stored { placements, .. } => {
                ensure!(placements.len() == pages, "not as many pages stored as were put");
                written[message * pages..][..pages].copy_from_slice(placements);
                Ok(())
            }
            _ => bail!("an answer to something else"),
        })?;
        let stored = entries.iter().zip(&written).map(|(entry, place)| {
            let placement = place.context("the intermediary has no room for what is to be measured")?;
            Ok(GetEntry { page: entry.page, placement })
        });
        Ok((took, stored.collect::<Result<Vec<_>>>()?))
    }

    fn give_back(&mut self, written: &[GetEntry]) -> Result<()> {
        for some in written.chunks(DROPPED) {
            ask(&mut self.bulk, Request::Drop(some), PATIENCE, |_| Ok(())).map_err(chained)?;
        }
        Ok(())
    }

    /// Reads messages, behind some that are compared with what was written.
    pub fn read(&mut self, messages: Messages, class: Class) -> Result<Took> {
        let pages = messages.pages();
        let Self { bulk, urgent, wait, stored, known, .. } = self;
        let link = if class == Class::Urgent { urgent } else { bulk };
        let there = stored.len() / pages;
        // Single pages in no order, as a guest touches them.
        let first = |message: usize| if pages == 1 { message * 7919 % there } else { message % there };
        // As a destination does, which has what pages are from an index.
        let submit = |link: &mut RdmaLink, message: usize| {
            let from = first(message) * pages;
            let (wanted, known) = (&stored[from..][..pages], &known[from..][..pages]);
            link.submit(Request::GetKnown { wanted, known })
        };
        let warm = Messages { count: messages.depth.max(16), ..messages };
        flow(link, *wait, warm, submit, |message, reply| {
            let Reply::Pages { bytes, .. } = reply else { bail!("an answer to something else") };
            let wanted = &stored[first(message) * pages..][..pages];
            let right = wanted.iter().flat_map(|get| content(get.page.0 as usize)).eq(bytes.iter().copied());
            ensure!(right, "what was read is not what was written: the network or a device changes bytes");
            Ok(())
        })?;
        flow(link, *wait, messages, submit, |_, reply| {
            let whole = matches!(reply, Reply::Pages { bytes, .. } if bytes.len() == messages.bytes);
            ensure!(whole, "pages that were stored are not there");
            Ok(())
        })
    }
}

/// Keeps so many messages under way until all have come to their end.
fn flow(
    link: &mut RdmaLink,
    wait: Wait,
    messages: Messages,
    submit: impl Fn(&mut RdmaLink, usize) -> libsg::Result<Ticket>,
    mut take: impl FnMut(usize, Reply<'_>) -> Result<()>,
) -> Result<Took> {
    let Messages { depth, count, .. } = messages;
    let (mut open, mut each) = (HashMap::with_capacity(depth), Vec::with_capacity(count));
    let (mut asked, began) = (0, Instant::now());
    let mut heard = began;
    while each.len() < count {
        while asked < count && open.len() < depth {
            let ticket = submit(link, asked).map_err(chained)?;
            open.insert(ticket, (asked, Instant::now()));
            asked += 1;
        }
        link.progress(usize::MAX).map_err(chained)?;
        let before = each.len();
        while let Some(completion) = link.completion() {
            let (message, since) = open.remove(&completion.ticket).context("an answer to nothing")?;
            take(message, completion.result.map_err(chained)?)?;
            each.push(since.elapsed());
        }
        if each.len() > before {
            heard = Instant::now();
        } else if heard.elapsed() > PATIENCE {
            bail!("{} messages are under way, and nothing comes", open.len());
        } else if wait == Wait::Events {
            transport::wait(&[(link.poll_fd(), link.queued_bytes() > 0)], PATIENCE).map_err(chained)?;
        }
        interrupt::check()?;
    }
    Ok(Took { all: began.elapsed(), each })
}

fn control(link: &mut RdmaLink, request: &VmdRequest) -> Result<VmdReply> {
    ask(link, Request::Control(request), PATIENCE, |reply| match reply {
        Reply::Control(reply) => Ok(reply),
        _ => Err(libsg::Error::new(libsg::ErrorKind::Protocol, "an answer to something else")),
    })
    .map_err(chained)
}

/// What page `number` is filled with.
fn content(number: usize) -> Vec<u8> {
    let seed = (number as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (1..=PAGE_BYTES as u64 / 8).flat_map(|word| seed.wrapping_mul(word).to_le_bytes()).collect()
}

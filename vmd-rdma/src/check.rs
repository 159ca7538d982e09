//! Tries a pair of hosts: pages are written to an intermediary and read back by its device and ours, every byte compared.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use libsg::ids::{Checksum, Epoch, MemberSet, NodeId, Placement, Round, VolumeId};
use libsg::manifest::{Manifest, Region};
use libsg::memory::PageSlice;
use libsg::page::{InstallUnit, PAGE_BYTES, PageIndex};
use libsg::vmd::link::ask;
use libsg::vmd::{Class, Link as _, Reply, Request};
use libsg::wire::message::{Member, VmdReply, VmdRequest};
use libsg::wire::{GetEntry, PageEntry};
use libsg::{Error, ErrorKind, Result};

use crate::{RdmaConnector, RdmaLink};

/// Pages that are moved one by one, for what that takes.
const SINGLE: u32 = 100;

/// Pages that are moved together, and how often, for how many go at once.
const TOGETHER: u32 = 256;
const TIMES: u32 = 8;

/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// How long it may take until the device is let in: longer than packets are sent again.
const OPENING: Duration = Duration::from_secs(8);

/// What was found.
#[derive(Clone, Debug, PartialEq)]
pub struct Found {
    /// The intermediary.
    pub node: NodeId,
    /// What one page takes, there and acknowledged with its entry in the index, or asked for and here: the median.
    pub write: Duration,
    /// And to be read.
    pub read: Duration,
    /// What a second moves, a megabyte at a time.
    pub write_bytes_per_s: f64,
    /// And the other way.
    pub read_bytes_per_s: f64,
    /// Pages that were written, read and compared.
    pub pages: u32,
}

/// A volume of its own at the intermediary, which goes again.
struct Trial {
    link: RdmaLink,
    next: u32,
}

/// Tries the device of the connector with the intermediary at `address`.
///
/// # Errors
/// Why pages cannot go over the devices, and what to do about it; [`ErrorKind::Lost`] where what was read is not what was
/// written.
pub fn check(connector: &RdmaConnector, address: SocketAddr) -> Result<Found> {
    let (volume, epoch) = (VolumeId::random()?, Epoch(1));
    let connector = connector.clone().strict();
    let mut link = connector.link(address, (volume, epoch), Class::Bulk, PATIENCE)?;
    create(&mut link, address)?;
    let mut trial = Trial { link, next: 0 };
    let found = trial.run();
    // The link may be what failed.
    let gone = match &found {
        Ok(_) => control(&mut trial.link, &VmdRequest::Dissolve),
        Err(_) => connector
            .link(address, (volume, epoch), Class::Bulk, PATIENCE)
            .and_then(|mut link| control(&mut link, &VmdRequest::Dissolve)),
    };
    if let Err(error) = gone {
        tracing::warn!(%volume, error = error.chain(), "what was written to try it is still there");
    }
    found
}

fn create(link: &mut RdmaLink, address: SocketAddr) -> Result<()> {
    let length_bytes = u64::from(SINGLE + TOGETHER * TIMES + 1) * PAGE_BYTES as u64;
    let ram = Region { name: "trial".into(), guest_address: None, length_bytes, unit: InstallUnit::Page };
    let manifest =
        Manifest { vm: "rdma-check".into(), regions: vec![ram], vm_config: Vec::new(), sharing: None };
    let members = vec![Member { node: link.member().node.clone(), address }];
    control(link, &VmdRequest::Create { manifest, members }).map(|_| ())
}

fn control(link: &mut RdmaLink, request: &VmdRequest) -> Result<VmdReply> {
    ask(link, Request::Control(request), PATIENCE, |reply| match reply {
        Reply::Control(reply) => Ok(reply),
        _ => Err(Error::new(ErrorKind::Protocol, "an answer to something else")),
    })
}

/// What page `number` is filled with.
fn content(number: u32) -> Vec<u8> {
    let seed = (u64::from(number) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (1..=PAGE_BYTES as u64 / 8).flat_map(|word| seed.wrapping_mul(word).to_le_bytes()).collect()
}

impl Trial {
    fn run(&mut self) -> Result<Found> {
        self.open()?;
        let (mut writes, mut reads) = (Vec::new(), Vec::new());
        for _ in 0..SINGLE {
            let (write, read) = self.there_and_back(1)?;
            writes.push(write);
            reads.push(read);
        }
        let (mut writing, mut reading) = (Duration::ZERO, Duration::ZERO);
        for _ in 0..TIMES {
            let (write, read) = self.there_and_back(TOGETHER)?;
            (writing, reading) = (writing + write, reading + read);
        }
        writes.sort_unstable();
        reads.sort_unstable();
        let bytes = f64::from(TOGETHER * TIMES) * PAGE_BYTES as f64;
        Ok(Found {
            node: self.link.member().node.clone(),
            write: writes[writes.len() / 2],
            read: reads[reads.len() / 2],
            write_bytes_per_s: bytes / writing.as_secs_f64().max(1e-9),
            read_bytes_per_s: bytes / reading.as_secs_f64().max(1e-9),
            pages: self.next,
        })
    }

    /// Until the intermediary has let the device in, and packets have passed. The first page asks for it.
    fn open(&mut self) -> Result<()> {
        let deadline = Instant::now() + OPENING;
        self.there_and_back(1)?;
        while !self.link.is_open() {
            if Instant::now() > deadline {
                let what = format!("the devices did not find to each other within {} s", OPENING.as_secs());
                return Err(Error::new(ErrorKind::Timeout, what).at(&self.link.member().node));
            }
            control(&mut self.link, &VmdRequest::Describe)?;
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Writes so many pages and reads them: what either took.
    fn there_and_back(&mut self, count: u32) -> Result<(Duration, Duration)> {
        let pages: Vec<u32> = (self.next..self.next + count).collect();
        self.next += count;
        let (entries, slices): (Vec<_>, Vec<_>) = pages
            .iter()
            .map(|page| {
                let bytes = content(*page);
                let entry = PageEntry::raw(PageIndex(*page), Round(0), Checksum::of(&bytes));
                (entry, PageSlice::owned(bytes.into()))
            })
            .unzip();
        let put = Request::Put { entries: &entries, slices: &slices, copies: MemberSet::NONE };
        let began = Instant::now();
        let placements: Option<Vec<Placement>> = ask(&mut self.link, put, PATIENCE, |reply| match reply {
            Reply::Stored { placements, .. } => Ok(placements.iter().copied().collect()),
            _ => Err(Error::new(ErrorKind::Protocol, "an answer to something else")),
        })?;
        let written = began.elapsed();
        let full = || Error::new(ErrorKind::Full, "the intermediary has no room for the pages of the trial");
        let placements = placements.ok_or_else(full)?;
        let entry = |(page, placement): (&u32, &Placement)| GetEntry {
            page: PageIndex(*page),
            placement: *placement,
        };
        let wanted: Vec<GetEntry> = pages.iter().zip(&placements).map(entry).collect();
        let began = Instant::now();
        let node = self.link.member().node.clone();
        let is_right = ask(&mut self.link, Request::Get(&wanted), PATIENCE, |reply| match reply {
            Reply::Pages { bytes, .. } => {
                Ok(pages.iter().flat_map(|page| content(*page)).eq(bytes.iter().copied()))
            }
            _ => Err(Error::new(ErrorKind::Protocol, "an answer to something else")),
        })?;
        if !is_right {
            let what = "what was read is not what was written: the network or a device changes bytes";
            return Err(Error::new(ErrorKind::Lost, what).at(&node));
        }
        Ok((written, began.elapsed()))
    }
}

//! A writer whose epoch ends while it writes: what it sends from then on lies in nobody's slots, least of all in those of
//! whoever replaced it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use libsg::host::thread::sleep;
use libsg::ids::{Checksum, Epoch, MemberIndex, MemberSet, Round, VolumeId};
use libsg::memory::PageSlice;
use libsg::page::{InstallUnit, PAGE_BYTES, PageIndex};
use libsg::transport::wait;
use libsg::vmd::link::ask;
use libsg::vmd::{Class, Connector, Link, PagePut, Reply, Request, Role, Vmd, VmdClient, Volume};
use libsg::wire::{GetEntry, PageEntry};

use crate::clock::Node;
use crate::guest::{Vm, manifest};
use crate::scenario::{Scenario, address};

/// What they write.
pub const VOLUME: VolumeId = VolumeId(8 << 64);
const OLDER: Epoch = Epoch(1);
const NEWER: Epoch = Epoch(2);

/// How long they have patience.
const PATIENCE: Duration = Duration::from_secs(1);

const PAGES: u32 = 64;

/// So much of them is written when the other one comes.
const BEGUN_BYTES: usize = 8 * PAGE_BYTES;

/// What the writers' pages consist of.
const OLD: [u8; PAGE_BYTES] = [1; PAGE_BYTES];
const NEW: [u8; PAGE_BYTES] = [2; PAGE_BYTES];

/// Starts them, at the first intermediary; what is wrong is said of `vm`.
pub fn start(node: &Arc<Node>, vm: &Arc<Vm>, scenario: &Scenario) {
    let Some(at) = scenario.members().next().map(address) else { return };
    let (connector, vm) = (node.connector(), Arc::clone(vm));
    node.spawn("late", move || {
        let vmd = VmdClient::new(Arc::clone(&connector), PATIENCE);
        let manifest = manifest("late".into(), &[(PAGES.into(), InstallUnit::Page)]);
        if vmd.create(VOLUME, OLDER, &manifest, &[at]).is_err() {
            return;
        }
        // Whoever is not there any more, or full, proves nothing.
        if let Ok(true) = is_overwritten(&vmd, &*connector, at) {
            vm.breach("epochs: a writer who was replaced wrote where another's pages are".into());
        }
        let _ = vmd.open(VOLUME, Role::Writer(NEWER), &[at]).and_then(|volume| volume.dissolve());
    });
}

fn put(link: &mut dyn Link, pages: u32) -> libsg::Result<()> {
    let (entries, slices) = batch(pages);
    let put = Request::Put { entries: &entries, slices: &slices, copies: MemberSet::NONE };
    ask(link, put, PATIENCE, |_| Ok(()))
}

fn batch(pages: u32) -> (Vec<PageEntry>, Vec<PageSlice>) {
    let page = |page| {
        let entry = PageEntry::raw(PageIndex(page), Round(0), Checksum::of(&OLD));
        (entry, PageSlice::owned(Arc::new(OLD)))
    };
    (0..pages).map(page).unzip()
}

/// Whether the newer one finds pages of the older one in its place.
fn is_overwritten(vmd: &VmdClient, connector: &dyn Connector, at: SocketAddr) -> libsg::Result<bool> {
    let mut older = connector.connect(at, VOLUME, OLDER, Class::Bulk, PATIENCE)?;
    for _ in 0..3 {
        // The first ones have the link tried in whatever ways it has.
        put(&mut *older, 1)?;
        sleep(Duration::from_millis(5));
    }
    let (entries, slices) = batch(PAGES);
    older.submit(Request::Put { entries: &entries, slices: &slices, copies: MemberSet::NONE })?;
    let mut written = 0;
    while written < BEGUN_BYTES {
        written += older.progress(BEGUN_BYTES)?;
        if older.completion().is_some() || wait(&[(older.poll_fd(), true)], PATIENCE)? == 0 {
            return Ok(false);
        }
    }
    let newer = vmd.open(VOLUME, Role::Writer(OLDER), &[at])?;
    newer.succeed(NEWER)?;
    let pages: Vec<PagePut> = (0..PAGES).map(newer_page).collect();
    let stored = newer.put(&pages, 1)?;
    // It does not know yet, or does and would not stop.
    while older.progress(usize::MAX).is_ok() {
        if older.completion().is_some() || wait(&[(older.poll_fd(), true)], Duration::from_millis(20))? == 0 {
            break;
        }
    }
    sleep(Duration::from_millis(10));
    let wanted: Vec<GetEntry> = stored
        .iter()
        .filter_map(|entry| Some(GetEntry { page: entry.page, placement: entry.placement? }))
        .collect();
    holds_old(&*newer, &wanted)
}

fn newer_page(page: u32) -> PagePut {
    let (checksum, bytes) = (Checksum::of(&NEW), PageSlice::owned(Arc::new(NEW)));
    PagePut { page: PageIndex(page), round: Round(1), checksum, bytes }
}

/// Whether a page of the older writer is there.
fn holds_old(newer: &dyn Volume, wanted: &[GetEntry]) -> libsg::Result<bool> {
    if wanted.is_empty() {
        return Ok(false);
    }
    let mut link = newer.link(MemberIndex(0), Class::Bulk)?;
    ask(&mut *link, Request::Get(wanted), PATIENCE, |reply| match reply {
        Reply::Pages { bytes, .. } => Ok(bytes.chunks(PAGE_BYTES).any(|page| page == OLD)),
        _ => Ok(false),
    })
}

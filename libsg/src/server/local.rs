//! What an intermediary does with pages, without its connections: in the caller's thread, to be measured beside
//! something else.

use super::Config;
use super::slots::SlotRun;
use super::store::{Noted, Store};
use super::volumes::Access;
use crate::content::{ContentHash, Sharing};
use crate::error::{Error, ErrorKind, Result};
use crate::ids::{Epoch, NodeId, Placement, VolumeId};
use crate::manifest::Manifest;
use crate::page::PAGE_BYTES;
use crate::transport::refusal;
use crate::wire::message::Member;
use crate::wire::{GetEntry, PageEntry};

const VOLUME: VolumeId = VolumeId(1);
const EPOCH: Epoch = Epoch::FIRST;

/// An intermediary's store with one volume on it, and the buffers of one session. Nobody gives memory back that holds
/// nothing any more: of each chunk something is to be kept.
#[derive(Debug)]
pub struct LocalStore {
    store: Store,
    runs: Vec<SlotRun>,
    hashes: Vec<ContentHash>,
    pages: Vec<PageEntry>,
}

impl LocalStore {
    /// As `config` says, as far as it is not about connections. Memory is touched when it is first written.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when the kernel gives no addresses.
    pub fn new(config: &Config, manifest: Manifest) -> Result<Self> {
        let node = NodeId { name: config.name.clone(), incarnation: 1 };
        let store = Store::new(node.clone(), config)?;
        let member = Member { node, address: config.listen };
        store.create(VOLUME, EPOCH, manifest, vec![member]).map_err(refusal)?;
        Ok(Self { store, runs: Vec::new(), hashes: Vec::new(), pages: Vec::new() })
    }

    /// The hash by which pages are known here, of such a volume.
    #[must_use]
    pub fn hasher(&self, sharing: &Sharing) -> crate::content::ContentHasher {
        self.store.secret().hasher(sharing)
    }

    /// Stores a batch, as `Put` does once its bytes are there: `bytes` are copied as from a socket.
    ///
    /// # Errors
    /// [`ErrorKind::Full`] where not all of it finds room; [`ErrorKind::Input`] for bytes that are not the entries'.
    pub fn put(
        &mut self,
        entries: &[PageEntry],
        bytes: &[u8],
        placements: &mut Vec<Option<Placement>>,
    ) -> Result<()> {
        let runs = std::mem::take(&mut self.runs);
        let filling = self.store.fill(VOLUME, (EPOCH, Access::Write), entries, runs).map_err(refusal)?;
        if filling.slots() != entries.len() {
            return Err(Error::new(ErrorKind::Full, "a page found no room"));
        }
        let mut rest = bytes;
        for run in filling.runs() {
            let (now, after) = rest.split_at_checked(run.slots as usize * PAGE_BYTES).ok_or_else(short)?;
            self.store.arena().slots(*run)?.copy_from(now);
            rest = after;
        }
        let finished = filling.finish(EPOCH, (entries, Noted::No), &mut self.hashes, placements);
        self.runs = finished.map_err(refusal)?.0;
        Ok(())
    }

    /// Reads pages, as `Get` does: their bytes are copied to `bytes` as to a socket.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] where something is not there, or `bytes` are not as long as the pages.
    pub fn get(&mut self, wanted: &[GetEntry], bytes: &mut [u8]) -> Result<()> {
        let Self { store, runs, pages, .. } = self;
        let _pinned = store.pin((VOLUME, EPOCH), wanted, pages, runs).map_err(refusal)?;
        let mut rest = bytes;
        for run in runs.iter() {
            let (now, after) =
                rest.split_at_mut_checked(run.slots as usize * PAGE_BYTES).ok_or_else(short)?;
            store.arena().slots(*run)?.readable().copy_to(now);
            rest = after;
        }
        if rest.is_empty() { Ok(()) } else { Err(short()) }
    }

    /// Gives slots back, as `Drop` does.
    ///
    /// # Errors
    /// None that is known.
    pub fn give_back(&mut self, entries: &[GetEntry]) -> Result<()> {
        self.store.drop_slots(VOLUME, EPOCH, entries).map_err(refusal)
    }
}

fn short() -> Error {
    Error::new(ErrorKind::Input, "bytes that are not those of the pages")
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::ids::{Checksum, Round};
    use crate::manifest::Region;
    use crate::page::{InstallUnit, PageIndex};
    use crate::transport::PoolSecret;

    #[test]
    fn what_was_put_is_got_until_it_is_given_back() {
        let region = Region {
            name: "ram".into(),
            guest_address: None,
            length_bytes: 1 << 20,
            unit: InstallUnit::Page,
        };
        let sharing = Some(Sharing::default());
        let manifest = Manifest { vm: "vm".into(), regions: vec![region], vm_config: Vec::new(), sharing };
        let config = Config::new(([127, 0, 0, 1], 0).into(), "i1", 2 << 20, PoolSecret::open());
        let mut local = LocalStore::new(&config, manifest).expect("a store");
        let bytes: Vec<u8> = (0..64_u8).flat_map(|page| [page; PAGE_BYTES]).collect();
        let entry = |page: u32| PageEntry::raw(PageIndex(page), Round(0), Checksum(page));
        let entries: Vec<PageEntry> = (0..64).map(entry).collect();
        let mut placed = Vec::new();
        local.put(&[entry(100)], &[7; PAGE_BYTES], &mut placed).expect("room");
        // More often than there is room: slots are used again.
        for _ in 0..20 {
            local.put(&entries, &bytes, &mut placed).expect("room");
            let place = |(page, at): (&PageEntry, &Option<Placement>)| GetEntry {
                page: page.page,
                placement: at.expect("stored"),
            };
            let wanted: Vec<GetEntry> = entries.iter().zip(&placed).map(place).collect();
            let mut got = vec![0; bytes.len()];
            local.get(&wanted, &mut got).expect("there");
            assert!(got == bytes);
            local.give_back(&wanted).expect("given back");
            assert_eq!(local.get(&wanted, &mut got).expect_err("gone").kind, ErrorKind::Input);
        }
        assert!(local.put(&entries, &bytes[1..], &mut placed).is_err());
    }
}

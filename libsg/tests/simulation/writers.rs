//! Two who write one volume, the second of whom takes it over from the first: whoever was replaced is refused, rounds
//! do not go back, and no slot is given out twice under one generation.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use libsg::ids::{Checksum, Epoch, Round, VolumeId};
use libsg::memory::PageSlice;
use libsg::page::{InstallUnit, PAGE_BYTES, PageIndex, PageRange};
use libsg::vmd::{PagePut, Role, Vmd, VmdClient, Volume};

use crate::clock::Node;
use crate::guest::{Vm, manifest};
use crate::scenario::{Scenario, address};

/// What they write.
pub const VOLUME: VolumeId = VolumeId(7 << 64);
const OLDER: Epoch = Epoch(1);
const NEWER: Epoch = Epoch(2);

/// How long they have patience.
const PATIENCE: Duration = Duration::from_secs(1);

/// How often the page is written: slots are used again meanwhile.
const ROUNDS: u16 = 8;

/// Starts them, at the first intermediary; what is wrong is said of `vm`.
pub fn start(node: &Arc<Node>, vm: &Arc<Vm>, scenario: &Scenario) {
    let Some(at) = scenario.members().next().map(address) else { return };
    let (connector, vm) = (node.connector(), Arc::clone(vm));
    node.spawn("writers", move || {
        let vmd = VmdClient::new(connector, PATIENCE);
        let manifest = manifest("writers".into(), &[(1, InstallUnit::Page)]);
        let Ok(older) = vmd.create(VOLUME, OLDER, &manifest, &[at]) else { return };
        // Whoever is not there any more, or full, proves nothing.
        if let Ok(Some(breach)) = write(&vmd, &*older, at) {
            vm.breach(breach);
        }
        let _ = vmd.open(VOLUME, Role::Writer(NEWER), &[at]).and_then(|volume| volume.dissolve());
    });
}

fn page(round: u16) -> PagePut {
    let bytes = [round as u8 + 1; PAGE_BYTES];
    PagePut {
        page: PageIndex(0),
        round: Round(round),
        checksum: Checksum::of(&bytes),
        bytes: PageSlice::owned(Arc::new(bytes)),
    }
}

/// What contract was broken, if any.
fn write(vmd: &VmdClient, older: &dyn Volume, at: SocketAddr) -> libsg::Result<Option<String>> {
    let first = older.put(&[page(0)], 1)?;
    let newer = vmd.open(VOLUME, Role::Writer(OLDER), &[at])?;
    newer.succeed(NEWER)?;
    let all = PageRange::new(PageIndex(0), 1);
    let mut places: BTreeSet<u64> =
        first.iter().filter_map(|entry| Some(entry.placement?.to_bits())).collect();
    for round in 1..=ROUNDS {
        let stored = newer.put(&[page(round)], 1)?;
        newer.discard(all, Round(round))?;
        if stored.iter().any(|entry| entry.placement.is_some_and(|place| !places.insert(place.to_bits()))) {
            return Ok(Some("generations: a slot was given out again under the same one".into()));
        }
    }
    newer.index(&first)?;
    if newer.locate(all)?.iter().any(|entry| entry.round < Round(ROUNDS)) {
        return Ok(Some("rounds: an older one replaced a newer one in the index".into()));
    }
    let is_let_in = older.put(&[page(ROUNDS + 1)], 1).is_ok();
    Ok(is_let_in.then(|| "epochs: a writer who was replaced was let in".into()))
}

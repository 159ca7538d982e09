//! Somebody who does not belong to the pool, and tries everybody's door; and somebody who does, with a VM of his
//! own, for which he takes an intermediary's memory.

use std::sync::Arc;
use std::time::Duration;

use libsg::ids::{Checksum, Epoch, Round, VolumeId};
use libsg::memory::PageSlice;
use libsg::page::{InstallUnit, PAGE_BYTES, PAGE_BYTES_U64, PageIndex};
use libsg::transport::{PoolSecret, dial};
use libsg::vmd::{PagePut, Vmd, VmdClient};
use libsg::wire::handshake::Purpose;

use crate::clock::Node;
use crate::guest::{Vm, manifest};
use crate::scenario::{DESTINATION, Role, Scenario, address};

/// One seed in so many has a stranger.
pub const ONE_IN: u64 = 8;

/// How long the stranger has patience.
const PATIENCE: Duration = Duration::from_secs(1);

/// Tries every host.
pub fn start(node: &Arc<Node>, vm: &Arc<Vm>, scenario: &Scenario) {
    let (vm, members) = (Arc::clone(vm), scenario.members().collect::<Vec<_>>());
    node.spawn("stranger", move || {
        let secret = PoolSecret::from_bytes(b"a secret of somebody else").expect("long enough");
        let knock = |role: Role, purpose| {
            let came_in = dial(address(role), purpose, VolumeId(1), Epoch::FIRST, &secret, PATIENCE).is_ok();
            if came_in {
                vm.breach(format!("strangers stay out: {role:?} let one in"));
            }
        };
        members.iter().for_each(|role| knock(*role, Purpose::VmdBulk));
        knock(DESTINATION, Purpose::MigrationControl);
    });
}

/// Another VM's volume takes the memory of an intermediary that is left.
pub fn fill(node: &Arc<Node>, role: Role, memory_bytes: u64) {
    let connector = node.connector();
    node.spawn("neighbour", move || {
        let pages = memory_bytes / PAGE_BYTES_U64;
        let neighbour = manifest("neighbour".into(), &[(pages, InstallUnit::Page)]);
        let vmd = VmdClient::new(connector, PATIENCE);
        let volume = VolumeId(1 + u128::from(pages));
        // Whoever is not there, or full, cannot be filled.
        let Ok(volume) = vmd.create(volume, Epoch::FIRST, &neighbour, &[address(role)]) else { return };
        let bytes = PageSlice::owned(vec![9; PAGE_BYTES].into());
        let checksum = Checksum::of(&[9; PAGE_BYTES]);
        let put = |page| PagePut { page: PageIndex(page), round: Round(0), checksum, bytes: bytes.clone() };
        let batches = (0..pages as u32).step_by(64);
        for first in batches {
            let batch: Vec<_> = (first..first + 64).map(put).collect();
            if volume.put(&batch, 1).is_err() {
                return;
            }
        }
    });
}

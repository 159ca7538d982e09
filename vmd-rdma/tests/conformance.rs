//! libsg's conformance suite over simulated devices.

mod common;

use std::sync::atomic::{AtomicU16, Ordering};

use libsg::vmd::conformance::run_all;
use vmd_rdma::verbs::simulated::Network;

#[test]
fn over_simulated_devices() {
    for seed in 1..=3 {
        let (network, hosts) = (Network::new(seed), AtomicU16::new(common::CLIENTS + 1));
        let next = || network.device(hosts.fetch_add(1, Ordering::Relaxed));
        run_all(&common::Devices { clients: network.device(common::CLIENTS), next });
        let counts = network.counts();
        eprintln!("seed {seed}: {counts:?}");
        assert_eq!(counts.refused, 0, "no key was used that was not ours to use");
        assert!(counts.written_bytes > 4 * common::MIB && counts.read_bytes > 4 * common::MIB, "{counts:?}");
    }
}

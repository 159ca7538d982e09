//! A device of the kernel keeps the rules of [`vmd_rdma::verbs`], and libsg's conformance suite holds over it. In guests that
//! have one: `ci/rxe` runs it there.
#![allow(clippy::unwrap_used, unsafe_code, reason = "a test that fails shall say where; it registers memory")]

mod common;

use std::net::IpAddr;
use std::os::fd::AsFd as _;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use common::PATIENCE;
use libsg::ErrorKind;
use libsg::memory::Mapping;
use libsg::transport::wait;
use libsg::vmd::conformance::run_all;
use vmd_rdma::verbs::kernel::{self, Choice, Port};
use vmd_rdma::verbs::{
    Access, Device, Domain, Done, Endpoint, Fault, Operation, Patience, Piece, QueuePair, Region, Remote,
    Work,
};
use vmd_rdma::{Devices as _, Several};

const BYTES: usize = 1 << 20;

/// Short, for peers that are gone.
const SHORT: Patience = Patience { acknowledged_within: Duration::from_millis(16), retries: 2 };

fn device() -> Arc<dyn Device> {
    kernel::open(&Choice::default()).unwrap_or_else(|error| panic!("no device: {}", error.chain()))
}

/// Memory that is registered, and filled.
struct Memory {
    region: Box<dyn Region>,
    mapping: Arc<Mapping>,
}

impl Memory {
    fn new(domain: &Arc<dyn Domain>, access: Access, fill: u8) -> Self {
        let mapping = Arc::new(Mapping::anonymous(BYTES).unwrap());
        mapping.slot(0, BYTES).unwrap().copy_from(&vec![fill; BYTES]);
        let start = NonNull::new(mapping.slice(0, BYTES).unwrap().as_ptr().cast_mut()).unwrap();
        // SAFETY: it stays mapped until the region is gone, which is dropped first.
        let region = unsafe { domain.clone().register(start, BYTES, access) }.unwrap();
        Self { region, mapping }
    }

    fn start(&self) -> u64 {
        self.mapping.slice(0, BYTES).unwrap().as_ptr() as u64
    }

    fn piece(&self, offset: usize, bytes: usize) -> Piece {
        let address = self.start() + offset as u64;
        Piece { address, bytes: bytes as u32, key: self.region.local_key() }
    }

    fn remote(&self, offset: usize) -> Remote {
        Remote { address: self.start() + offset as u64, key: self.region.remote_key() }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; BYTES];
        self.mapping.slice(0, BYTES).unwrap().copy_to(&mut bytes);
        bytes
    }
}

const LOCAL: Access = Access { local_write: true, remote_read: false, remote_write: false };
const WRITABLE: Access = Access { local_write: true, remote_read: false, remote_write: true };
const READABLE: Access = Access { local_write: false, remote_read: true, remote_write: false };

/// Two queue pairs of one device that are connected, each in a domain of its own.
struct Two {
    domains: [Arc<dyn Domain>; 2],
    near: Box<dyn QueuePair>,
    far: Option<Box<dyn QueuePair>>,
}

impl Two {
    fn new(device: &dyn Device, works: usize, patience: Patience) -> Self {
        let domains = [device.domain().unwrap(), device.domain().unwrap()];
        let mut near = domains[0].clone().queue_pair(works).unwrap();
        let mut far = domains[1].clone().queue_pair(1).unwrap();
        far.connect(&near.endpoint(), patience).unwrap();
        near.connect(&far.endpoint(), patience).unwrap();
        Self { domains, near, far: Some(far) }
    }

    fn post(&mut self, operation: Operation, pieces: &[Piece], remote: Remote) {
        let work = Work { id: 7, operation, pieces, remote, signalled: true };
        assert_eq!(self.near.post(&[work]).unwrap(), 1);
    }

    /// What so many completions say, waiting for them without looking meanwhile.
    fn reap(&mut self, count: usize) -> Vec<Done> {
        let mut done = Vec::new();
        loop {
            self.near.reap(count - done.len(), &mut done).unwrap();
            if done.len() == count {
                return done;
            }
            self.near.arm().unwrap();
            self.near.reap(count - done.len(), &mut done).unwrap();
            if done.len() == count {
                return done;
            }
            assert_ne!(wait(&[(Some(self.near.poll_fd().as_fd()), false)], PATIENCE).unwrap(), 0, "no news");
        }
    }

    fn result(&mut self) -> Result<(), Fault> {
        self.reap(1)[0].result
    }
}

#[test]
#[ignore = "needs an RDMA device: ci/rxe"]
fn scattered_pieces_are_written_and_read() {
    let device = device();
    let mut two = Two::new(&*device, 64, Patience::default());
    let source = Memory::new(&two.domains[0], LOCAL, 7);
    let there = Memory::new(&two.domains[1], WRITABLE, 1);
    let pieces: Vec<Piece> =
        (0..device.limits().pieces_max).map(|at| source.piece(at * 3 * 4096, 4096)).collect();
    two.post(Operation::Write, &pieces, there.remote(100));
    assert_eq!(two.result(), Ok(()));
    let (written, bytes) = (pieces.len() * 4096, there.bytes());
    assert!(bytes[100..100 + written].iter().all(|byte| *byte == 7));
    assert!(bytes[..100].iter().chain(&bytes[100 + written..]).all(|byte| *byte == 1));
    let shown = Memory::new(&two.domains[1], READABLE, 9);
    two.post(Operation::Read, &[source.piece(0, 4096), source.piece(8192, 4096)], shown.remote(4096));
    assert_eq!(two.result(), Ok(()));
    let bytes = source.bytes();
    assert!(bytes[..4096].iter().chain(&bytes[8192..12288]).all(|byte| *byte == 9));
    assert!(bytes[4096..8192].iter().all(|byte| *byte == 7));
    // Of nothing, without a key.
    two.post(Operation::Write, &[], Remote { address: 0, key: 0 });
    assert_eq!(two.result(), Ok(()));
    if device.limits().inline_bytes_max >= 8 {
        let word = 0x0303_0303_0303_0303_u64;
        let piece = Piece { address: (&raw const word) as u64, bytes: 8, key: 0 };
        two.post(Operation::WriteInline, &[piece], there.remote(0));
        assert_eq!(two.result(), Ok(()));
        assert_eq!(there.bytes()[..9], [3, 3, 3, 3, 3, 3, 3, 3, 1]);
    }
}

#[test]
#[ignore = "needs an RDMA device: ci/rxe"]
fn completions_come_in_order_and_unsignalled_ones_not_at_all() {
    let device = device();
    let works_max = 16;
    let mut two = Two::new(&*device, works_max, Patience::default());
    let source = Memory::new(&two.domains[0], LOCAL, 7);
    let there = Memory::new(&two.domains[1], WRITABLE, 1);
    let pieces = [source.piece(0, 4096)];
    let work = |id: u64| Work {
        id,
        operation: Operation::Write,
        pieces: &pieces,
        remote: there.remote(id as usize * 4096),
        signalled: id % 5 == 4,
    };
    let works: Vec<Work<'_>> = (0..40).map(work).collect();
    let (mut posted, mut ended) = (two.near.post(&works).unwrap(), Vec::new());
    assert_eq!(posted, works_max, "as many as there is room for");
    while ended.len() < 8 {
        ended.extend(two.reap(1).iter().map(|done| (done.id, done.result)));
        posted += two.near.post(&works[posted..]).unwrap();
    }
    let expected: Vec<_> = (0..8).map(|n| (n * 5 + 4, Ok(()))).collect();
    assert_eq!((posted, ended), (40, expected));
    let too_many = vec![source.piece(0, 16); device.limits().pieces_max + 1];
    let beyond = Work {
        id: 1,
        operation: Operation::Write,
        pieces: &too_many,
        remote: there.remote(0),
        signalled: true,
    };
    assert_eq!(two.near.post(&[work(4), beyond]).unwrap_err().kind, ErrorKind::Input);
    assert_eq!(two.reap(1)[0].id, 4, "those before it are posted");
}

#[test]
#[ignore = "needs an RDMA device: ci/rxe"]
fn a_key_reaches_what_it_was_given_for_and_nothing_else() {
    let device = device();
    let attempt = |operation, reach: &dyn Fn(&Two) -> (Remote, Option<Memory>)| {
        let mut two = Two::new(&*device, 16, Patience::default());
        let source = Memory::new(&two.domains[0], LOCAL, 7);
        let (remote, kept) = reach(&two);
        let (before, pieces) = (kept.as_ref().map(Memory::bytes), [source.piece(0, 4096)]);
        two.post(operation, &pieces, remote);
        // What is behind it is flushed.
        two.post(operation, &pieces, remote);
        let faults: Vec<_> = two.reap(2).iter().map(|done| done.result).collect();
        assert_eq!(faults, [Err(Fault::RemoteAccess), Err(Fault::Flushed)]);
        assert_eq!(kept.as_ref().map(Memory::bytes), before, "nothing was written");
        assert!(source.bytes().iter().all(|byte| *byte == 7), "nothing was read");
    };
    let at = |two: &Two, domain: usize, access: Access, offset: usize| {
        let memory = Memory::new(&two.domains[domain], access, 1);
        (memory.remote(offset), Some(memory))
    };
    attempt(Operation::Write, &|two| at(two, 1, READABLE, 0));
    attempt(Operation::Read, &|two| at(two, 1, WRITABLE, 0));
    attempt(Operation::Write, &|two| at(two, 1, WRITABLE, BYTES - 4095));
    attempt(Operation::Write, &|two| at(two, 0, WRITABLE, 0)); // of another domain
    attempt(Operation::Write, &|two| {
        let memory = Memory::new(&two.domains[1], WRITABLE, 1);
        let Memory { region, mapping } = memory;
        let address = mapping.slice(0, BYTES).unwrap().as_ptr() as u64;
        let remote = Remote { address, key: region.remote_key() };
        drop(region); // withdrawn; the memory is there
        (remote, None)
    });
}

#[test]
#[ignore = "needs an RDMA device: ci/rxe"]
fn a_peer_that_is_gone_is_noticed_and_what_is_outstanding_ends() {
    let device = device();
    let mut two = Two::new(&*device, 16, SHORT);
    let source = Memory::new(&two.domains[0], LOCAL, 7);
    let there = Memory::new(&two.domains[1], WRITABLE, 1);
    two.far = None;
    two.post(Operation::Write, &[source.piece(0, 4096)], there.remote(0));
    let fault = two.result().unwrap_err();
    assert_eq!(fault, Fault::RetriesExceeded);
    // Dropped with works outstanding, whatever state they are in.
    for _ in 0..20 {
        let mut two = Two::new(&*device, 16, Patience::default());
        let source = Memory::new(&two.domains[0], LOCAL, 7);
        let there = Memory::new(&two.domains[1], WRITABLE, 1);
        for at in 0..8 {
            two.post(Operation::Write, &[source.piece(0, 65536)], there.remote(at * 65536));
        }
        drop(two);
        drop(there);
    }
}

#[test]
#[ignore = "needs an RDMA device: ci/rxe"]
fn what_cannot_be_reached_or_had_is_said() {
    let device = device();
    let domain = device.domain().unwrap();
    let mut pair = domain.clone().queue_pair(1).unwrap();
    let other = Endpoint { gid: "2001:db8::1".parse().unwrap(), ..pair.endpoint() };
    let refused = pair.connect(&other, SHORT).unwrap_err();
    assert!(refused.message.contains("2001:db8::1"), "{}", refused.chain());
    assert_eq!(domain.queue_pair(device.limits().works_max + 1).unwrap_err().kind, ErrorKind::Input);
    for choice in [
        Choice { device: Some("none".into()), ..Choice::default() },
        Choice { gid_index: Some(200), ..Choice::default() },
        Choice { mtu_bytes: Some(8192), ..Choice::default() },
    ] {
        assert_eq!(kernel::open(&choice).unwrap_err().kind, ErrorKind::Input, "{choice:?}");
    }
}

#[test]
#[ignore = "needs an RDMA device: ci/rxe"]
fn the_device_that_has_an_address_is_used_for_links_by_it() {
    let first = device();
    let v4 = |port: &Port| port.gids.iter().find_map(|gid| gid.address.to_ipv4_mapped());
    let own = kernel::ports().unwrap().iter().find_map(v4).expect("an IPv4 address");
    let at = |address| kernel::open_at(&Choice::default(), address).unwrap().map(|d| d.name().to_owned());
    assert_eq!(at(own.into()).as_deref(), Some(first.name()));
    let elsewhere = IpAddr::from([192, 0, 2, 9]);
    assert_eq!(at(elsewhere), None);
    let several = Several::open(&Choice::default()).unwrap();
    for address in [None, Some(own.into()), Some(elsewhere)] {
        assert_eq!(several.near(address).name(), first.name(), "{address:?}");
    }
}

#[test]
#[ignore = "needs an RDMA device: ci/rxe"]
fn the_conformance_suite_holds() {
    let device = device();
    run_all(&common::Devices { clients: device.clone(), next: || device.clone() });
}

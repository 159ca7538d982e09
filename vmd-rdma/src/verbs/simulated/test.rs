//! A simulated device checks what a device checks.

use super::*;
use crate::verbs::{Fault, Operation, Piece, Remote};

const PAGE: usize = 4096;

/// Memory that regions are made of: it must not be a Rust reference while it is registered.
struct Block(NonNull<u8>, usize);

impl Block {
    fn filled(bytes: usize, value: u8) -> Self {
        let memory = Box::leak(vec![value; bytes].into_boxed_slice());
        Self(NonNull::from(memory).cast(), bytes)
    }

    fn byte(&self, at: usize) -> u8 {
        // SAFETY: within the block, which is leaked, and reached by pointers only.
        unsafe { self.0.add(at).read_volatile() }
    }

    fn address(&self, at: usize) -> u64 {
        self.0.as_ptr() as u64 + at as u64
    }
}

const BOTH: Access = Access { local_write: true, remote_read: true, remote_write: true };

/// Two hosts with a region each and connected queue pairs.
struct Bench {
    network: Network,
    domains: [Arc<dyn Domain>; 2],
    blocks: [Block; 2],
    regions: [Option<Box<dyn Region>>; 2],
    pairs: [Box<dyn QueuePair>; 2],
}

fn domain(network: &Network, host: u16) -> Arc<dyn Domain> {
    network.device(host).domain().expect("a domain")
}

fn register(domain: &Arc<dyn Domain>, block: &Block, access: Access) -> Box<dyn Region> {
    // SAFETY: the block is leaked.
    unsafe { Arc::clone(domain).register(block.0, block.1, access) }.expect("registered")
}

fn connected(one: &Arc<dyn Domain>, other: &Arc<dyn Domain>) -> [Box<dyn QueuePair>; 2] {
    let mut pairs = [one, other].map(|domain| Arc::clone(domain).queue_pair(16).expect("a queue pair"));
    let ends = [pairs[0].endpoint(), pairs[1].endpoint()];
    pairs[0].connect(&ends[1], Patience::default()).expect("connected");
    pairs[1].connect(&ends[0], Patience::default()).expect("connected");
    pairs
}

fn bench(seed: u64, access: Access) -> Bench {
    let network = Network::new(seed);
    let domains = [domain(&network, 1), domain(&network, 2)];
    let blocks = [Block::filled(16 * PAGE, 1), Block::filled(16 * PAGE, 2)];
    let regions =
        [Some(register(&domains[0], &blocks[0], BOTH)), Some(register(&domains[1], &blocks[1], access))];
    let pairs = connected(&domains[0], &domains[1]);
    Bench { network, domains, blocks, regions, pairs }
}

impl Bench {
    fn piece(&self, at: usize, bytes: usize) -> Piece {
        let key = self.regions[0].as_ref().map_or(0, |region| region.local_key());
        Piece { address: self.blocks[0].address(at), bytes: bytes as u32, key }
    }

    fn remote(&self, at: usize) -> Remote {
        let key = self.regions[1].as_ref().map_or(0, |region| region.remote_key());
        Remote { address: self.blocks[1].address(at), key }
    }

    fn post(&mut self, id: u64, operation: Operation, pieces: &[Piece], remote: Remote) {
        let work = Work { id, operation, pieces, remote, signalled: true };
        assert_eq!(self.pairs[0].post(&[work]).expect("posted"), 1);
    }

    /// Reaps until so many have come.
    fn reap(&mut self, many: usize) -> Vec<Done> {
        let mut done = Vec::new();
        for _ in 0..10_000 {
            self.pairs[0].reap(many - done.len(), &mut done).expect("reaped");
            if done.len() == many {
                return done;
            }
        }
        panic!("{} of {many} came", done.len());
    }

    fn outcome(&mut self, operation: Operation, pieces: &[Piece], remote: Remote) -> Result<(), Fault> {
        self.post(7, operation, pieces, remote);
        let done = self.reap(1);
        assert_eq!(done[0].id, 7);
        done[0].result
    }
}

#[test]
fn scattered_pieces_are_written_and_read() {
    for seed in 0..20 {
        let mut bench = bench(seed, BOTH);
        let pieces = [bench.piece(0, PAGE), bench.piece(8 * PAGE, PAGE)];
        assert_eq!(bench.outcome(Operation::Write, &pieces, bench.remote(PAGE)), Ok(()));
        let read = |at: usize| bench.blocks[1].byte(at);
        assert_eq!([PAGE - 1, PAGE, 3 * PAGE - 1, 3 * PAGE].map(read), [2, 1, 1, 2]);
        let into = [bench.piece(4 * PAGE, PAGE)];
        assert_eq!(bench.outcome(Operation::Read, &into, bench.remote(5 * PAGE)), Ok(()));
        assert_eq!([4 * PAGE - 1, 4 * PAGE, 5 * PAGE].map(|at| bench.blocks[0].byte(at)), [1, 2, 1]);
        let counts = bench.network.counts();
        assert_eq!((counts.written_bytes, counts.read_bytes), (2 * PAGE as u64, PAGE as u64));
    }
}

#[test]
fn an_inline_write_takes_its_bytes_at_once() {
    let mut bench = bench(3, BOTH);
    let word = Block::filled(8, 9);
    let piece = Piece { address: word.address(0), bytes: 8, key: 0 };
    bench.post(1, Operation::WriteInline, &[piece], bench.remote(0));
    // SAFETY: within the block, which nobody else reaches.
    unsafe { word.0.write_bytes(0, 8) };
    assert_eq!(bench.reap(1)[0].result, Ok(()));
    assert_eq!([bench.blocks[1].byte(0), bench.blocks[1].byte(7), bench.blocks[1].byte(8)], [9, 9, 2]);
}

#[test]
fn completions_come_in_order_and_unsignalled_ones_not_at_all() {
    let mut bench = bench(5, BOTH);
    let piece = [bench.piece(0, 64)];
    let remote = bench.remote(0);
    let works: Vec<Work<'_>> = (0..20)
        .map(|id| Work { id, operation: Operation::Write, pieces: &piece, remote, signalled: id % 4 == 3 })
        .collect();
    // There is room for 16.
    assert_eq!(bench.pairs[0].post(&works).expect("posted"), 16);
    assert_eq!(bench.pairs[0].post(&works[16..]).expect("posted"), 0);
    let done: Vec<u64> = bench.reap(4).iter().map(|done| done.id).collect();
    assert_eq!(done, [3, 7, 11, 15]);
    assert_eq!(bench.pairs[0].post(&works[16..]).expect("posted"), 4);
}

#[test]
fn a_key_reaches_what_it_was_given_for_and_nothing_else() {
    let read_only = Access { remote_read: true, ..Access::default() };
    let write_only = Access { local_write: true, remote_write: true, ..Access::default() };
    let refused = Err(Fault::RemoteAccess);
    for (access, operation) in [(read_only, Operation::Write), (write_only, Operation::Read)] {
        let mut bench = bench(1, access);
        assert_eq!(bench.outcome(operation, &[bench.piece(0, PAGE)], bench.remote(0)), refused);
    }
    // Beyond its end, before its start, and around the end of all addresses.
    for address in [13 * PAGE as u64 + 1, u64::MAX, u64::MAX / 2] {
        let mut bench = bench(2, BOTH);
        let Remote { address: start, key } = bench.remote(0);
        let remote = Remote { address: start.wrapping_add(address), key };
        assert_eq!(bench.outcome(Operation::Write, &[bench.piece(0, 3 * PAGE)], remote), refused);
        assert_eq!(bench.network.counts().written_bytes, 0);
    }
    // Another domain of the same host.
    let mut bench = bench(3, BOTH);
    let elsewhere = domain(&bench.network, 2);
    bench.pairs = connected(&bench.domains[0], &elsewhere);
    assert_eq!(bench.outcome(Operation::Write, &[bench.piece(0, PAGE)], bench.remote(0)), refused);
    assert_eq!(bench.network.counts().refused, 1);
}

#[test]
fn what_was_withdrawn_is_reached_by_nobody() {
    let mut bench = bench(4, BOTH);
    let remote = bench.remote(0);
    bench.regions[1] = None;
    let again = register(&bench.domains[1], &bench.blocks[1], BOTH);
    assert_ne!(again.remote_key(), remote.key);
    assert_eq!(bench.outcome(Operation::Write, &[bench.piece(0, PAGE)], remote), Err(Fault::RemoteAccess));
    assert_eq!(bench.blocks[1].byte(0), 2);
}

#[test]
fn our_own_memory_is_checked_as_well() {
    let mut bench = bench(6, BOTH);
    let beyond = Piece { bytes: 2 * PAGE as u32, ..bench.piece(15 * PAGE, PAGE) };
    assert_eq!(bench.outcome(Operation::Write, &[beyond], bench.remote(0)), Err(Fault::LocalProtection));
    let network = bench.network.clone();
    let frozen = Block::filled(PAGE, 3);
    let mut other = self::bench(7, BOTH);
    let region = register(&other.domains[0], &frozen, Access::default());
    let piece = Piece { address: frozen.address(0), bytes: 64, key: region.local_key() };
    assert_eq!(other.outcome(Operation::Read, &[piece], other.remote(0)), Err(Fault::LocalProtection));
    assert_eq!(frozen.byte(0), 3);
    assert_eq!(network.counts().refused, 1);
}

#[test]
fn a_failure_flushes_what_is_behind_it_and_ends_the_pair_at_both_ends() {
    let mut bench = bench(8, BOTH);
    let piece = [bench.piece(0, 64)];
    let (good, bad) = (bench.remote(0), Remote { key: 0xdead, ..bench.remote(0) });
    bench.post(1, Operation::Write, &piece, good);
    bench.post(2, Operation::Write, &piece, bad);
    bench.post(3, Operation::Write, &piece, good);
    let results: Vec<_> = bench.reap(3).iter().map(|done| done.result).collect();
    assert_eq!(results, [Ok(()), Err(Fault::RemoteAccess), Err(Fault::Flushed)]);
    // The peer's end is in the error state, too.
    bench.pairs.swap(0, 1);
    bench.post(4, Operation::Write, &piece, good);
    bench.pairs[0].fail();
    assert_eq!(bench.reap(1)[0].result, Err(Fault::Flushed));
}

#[test]
fn a_peer_that_is_gone_is_noticed() {
    let mut bench = bench(9, BOTH);
    let piece = [bench.piece(0, 64)];
    bench.network.cut_off(2);
    assert_eq!(bench.outcome(Operation::Write, &piece, bench.remote(0)), Err(Fault::RetriesExceeded));
    bench.network.restore(2);
    bench.post(1, Operation::Write, &piece, bench.remote(0));
    bench.pairs[0].fail();
    assert_eq!(bench.reap(1)[0].result, Err(Fault::Flushed));
}

#[test]
fn after_failing_every_work_has_come_to_its_end() {
    for seed in 0..50 {
        let mut bench = bench(seed, BOTH);
        let piece = [bench.piece(0, 64)];
        for id in 0..10 {
            bench.post(id, Operation::Write, &piece, bench.remote(id as usize * 64));
        }
        bench.pairs[0].fail();
        let done = bench.reap(10);
        assert!(done.iter().map(|done| done.id).eq(0..10));
        // Those that say so were done, those behind them were not.
        let good = done.iter().take_while(|done| done.result.is_ok()).count();
        assert!(done[good..].iter().all(|done| done.result == Err(Fault::Flushed)));
        assert_eq!(bench.network.counts().written_bytes, good as u64 * 64);
        assert_eq!(bench.blocks[1].byte(good * 64), 2);
    }
}

#[test]
fn a_request_beyond_the_limits_is_refused_before_it_is_posted() {
    let mut bench = bench(10, BOTH);
    let remote = bench.remote(0);
    let many = [bench.piece(0, 64); LIMITS.pieces_max + 1];
    let long = [bench.piece(0, LIMITS.inline_bytes_max + 1)];
    for (operation, pieces) in [(Operation::Write, &many[..]), (Operation::WriteInline, &long[..])] {
        let work = Work { id: 1, operation, pieces, remote, signalled: true };
        assert_eq!(bench.pairs[0].post(&[work]).expect_err("refused").kind, ErrorKind::Input);
    }
    let domain = Arc::clone(&bench.domains[0]);
    assert!(domain.queue_pair(LIMITS.works_max + 1).is_err());
}

#[test]
fn whoever_waits_is_woken() {
    let mut bench = bench(11, BOTH);
    let piece = [bench.piece(0, 64)];
    let readable = |pair: &dyn QueuePair| {
        let fd = pair.poll_fd();
        let mut on = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
        rustix::event::poll(&mut on, Some(&rustix::time::Timespec::default())).expect("polled") == 1
    };
    bench.pairs[0].arm().expect("armed");
    assert!(!readable(&*bench.pairs[0]));
    bench.post(1, Operation::Write, &piece, bench.remote(0));
    bench.pairs[0].arm().expect("armed");
    assert!(readable(&*bench.pairs[0]));
    bench.reap(1);
    bench.pairs[0].arm().expect("armed");
    assert!(!readable(&*bench.pairs[0]));
}

const PACE: Pace = Pace { delay: MS, jitter: Duration::ZERO, bytes_per_s: 0 };
const MS: Duration = Duration::from_millis(1);

impl Bench {
    /// Two hosts on a clock.
    fn on_a_clock() -> Self {
        let mut bench = bench(1, BOTH);
        bench.network = Network::on_a_clock(1, PACE);
        bench.domains = [domain(&bench.network, 1), domain(&bench.network, 2)];
        let register = |host: usize| Some(register(&bench.domains[host], &bench.blocks[host], BOTH));
        bench.regions = [register(0), register(1)];
        bench.pairs = connected(&bench.domains[0], &bench.domains[1]);
        bench
    }

    /// So many milliseconds since the beginning; the hosts that are woken.
    fn at(&self, ms: u32) -> Vec<u16> {
        let mut woken = Vec::new();
        self.network.advance(MS * ms, &mut woken);
        woken
    }

    fn ended(&mut self) -> Vec<Done> {
        let mut done = Vec::new();
        self.pairs[0].reap(100, &mut done).expect("reaped");
        done
    }

    fn write(&mut self, id: u64) {
        let piece = [self.piece(0, 64)];
        self.post(id, Operation::Write, &piece, self.remote(id as usize * 64));
    }

    fn has_landed(&self, id: u64) -> bool {
        self.blocks[1].byte(id as usize * 64) == 1
    }
}

#[test]
fn on_a_clock_a_write_lands_first_and_is_acknowledged_later() {
    let mut bench = Bench::on_a_clock();
    assert_eq!(bench.network.next(), None);
    bench.pairs[0].arm().expect("armed");
    bench.write(0);
    bench.write(1);
    assert_eq!((bench.at(0), bench.network.next()), (vec![], Some(MS)));
    assert!(bench.ended().is_empty() && !bench.has_landed(0));
    assert_eq!(bench.at(1), [0; 0]);
    assert!(bench.ended().is_empty() && bench.has_landed(1));
    bench.pairs[0].arm().expect("armed");
    assert_eq!(bench.at(2), [1], "once for both");
    assert_eq!(
        bench.ended().iter().map(|done| (done.id, done.result)).collect::<Vec<_>>(),
        [(0, Ok(())), (1, Ok(()))]
    );
    assert_eq!(bench.network.next(), None);
}

#[test]
fn what_was_sent_lands_behind_the_end_of_who_sent_it() {
    for killed in [false, true] {
        let mut bench = Bench::on_a_clock();
        bench.write(0);
        bench.at(0);
        bench.write(1);
        if killed {
            bench.network.remove(1);
        } else {
            bench.pairs[0].fail();
            assert!(bench.ended().iter().all(|done| done.result == Err(Fault::Flushed)));
        }
        bench.at(5);
        assert_eq!([0, 1].map(|id| bench.has_landed(id)), [true, false], "the second was never sent");
        assert!(bench.ended().is_empty());
    }
    // But not behind the end of who was to take it.
    let mut bench = Bench::on_a_clock();
    bench.write(0);
    bench.at(0);
    bench.pairs[1].fail();
    bench.at(5);
    assert!(!bench.has_landed(0));
}

#[test]
fn on_a_clock_a_silent_peer_is_given_up_in_time() {
    let patience = Patience::default();
    let long = patience.acknowledged_within * (u32::from(patience.retries) + 1) + MS * 10;
    for gone in [false, true] {
        let mut bench = Bench::on_a_clock();
        bench.write(0);
        if gone {
            bench.network.remove(2);
        } else {
            bench.network.cut(1, 2, true);
        }
        bench.write(1);
        bench.at(1000);
        assert!(bench.ended().is_empty());
        bench.network.advance(long, &mut Vec::new());
        let results: Vec<_> = bench.ended().iter().map(|done| done.result).collect();
        assert_eq!(results, [Err(Fault::RetriesExceeded), Err(Fault::Flushed)]);
    }
    // One that answers again before that is not.
    let mut bench = Bench::on_a_clock();
    bench.network.cut(1, 2, true);
    bench.write(0);
    bench.at(1000);
    bench.network.cut(1, 2, false);
    bench.network.advance(long, &mut Vec::new());
    assert!(bench.has_landed(0) && bench.ended()[0].result.is_ok());
}

#[test]
fn a_device_registers_so_much_and_no_more() {
    let bench = bench(12, BOTH);
    bench.network.limit_regions(2, 1);
    // SAFETY: the block is leaked.
    let more = || unsafe { Arc::clone(&bench.domains[1]).register(bench.blocks[1].0, PAGE, BOTH) };
    assert_eq!(more().expect_err("refused").kind, ErrorKind::Full);
    bench.network.limit_regions(2, 2);
    assert!(more().is_ok());
}

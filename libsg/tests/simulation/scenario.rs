//! What a seed stands for: a VM, hosts, a network, and what happens to them.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use libsg::content::Sharing;
use libsg::migrate::{Mode, RoundOptions, Via};
use libsg::page::{InstallUnit, PAGE_BYTES_U64};
use libsg::transport::PoolSecret;

use crate::content::{COMMON, Content};
use crate::net::Weather;
use crate::random::Random;

/// A host, whatever node is there at the time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    Source,
    Destination,
    /// From 0 on.
    Intermediary(usize),
}

pub const SOURCE: Role = Role::Source;
pub const DESTINATION: Role = Role::Destination;

/// Where a host is.
pub fn address(role: Role) -> SocketAddr {
    let last = match role {
        Role::Source => 1,
        Role::Destination => 2,
        Role::Intermediary(nth) => 10 + nth as u8,
    };
    SocketAddr::from(([10, 0, 0, last], 7700))
}

/// Where the destination waits for a VM.
pub fn door(nth: usize) -> SocketAddr {
    let mut address = address(DESTINATION);
    address.set_port(address.port() + nth as u16);
    address
}

/// What all hosts have in common.
pub fn secret() -> PoolSecret {
    PoolSecret::from_bytes(b"a secret of the simulation").expect("long enough")
}

/// From when on an event is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum After {
    Start,
    /// The destination is ready; the source does not know yet.
    Ready,
    Commit,
    Running,
    Evicted,
}

/// What happens to a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Its processes are killed; after that long, if at all, new ones are started, which know nothing.
    Kill(Role, Option<Duration>),
    /// The source's process is killed, and the VM's memory outlives it: after that long another process goes on with it.
    Succeed(Duration),
    /// Its processes stop for so long.
    Freeze(Role, Duration),
    /// All connections between two hosts break.
    Break(Role, Role),
    /// Nothing is carried between two hosts for so long.
    Cut(Role, Role, Duration),
    /// A page that is stored at an intermediary is damaged.
    Damage(Role),
    /// The network flips a bit of what the first host sends to the second one next.
    Flip(Role, Role),
    /// Somebody else's volume takes all memory of an intermediary that is free.
    Fill(Role),
    /// The operator sets another limit at the destination.
    Limit(u64),
    /// An intermediary is told to go: it hands over what it has, and ends. A new one starts there after that long, if at all.
    Leave(Role, Option<Duration>),
}

impl What {
    /// The hosts that it happens to.
    pub fn hosts(self) -> Vec<Role> {
        match self {
            Self::Kill(role, _)
            | Self::Freeze(role, _)
            | Self::Damage(role)
            | Self::Fill(role)
            | Self::Leave(role, _) => vec![role],
            Self::Break(one, other) | Self::Cut(one, other, _) | Self::Flip(one, other) => vec![one, other],
            Self::Succeed(_) => vec![SOURCE],
            Self::Limit(_) => vec![DESTINATION],
        }
    }
}

/// Something that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    pub after: After,
    pub delay: Duration,
    pub what: What,
}

impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} + {:?}: {:?}", self.after, self.delay, self.what)
    }
}

/// A VM, and how it moves.
#[derive(Clone, Debug)]
pub struct Plan {
    pub memory: Vec<Content>,
    /// What the memory consists of: pages, and what of them is installed at once.
    pub regions: Vec<(u64, InstallUnit)>,
    /// Its log of writes names whole units.
    pub logs_units: bool,
    pub mode: Mode,
    pub rounds: RoundOptions,
    /// By hybrid it arrives in memory that takes each page once.
    pub takes_once: bool,
}

/// Everything about a run.
#[derive(Clone, Debug)]
pub struct Scenario {
    pub seed: u64,
    /// Those that move at once, from one host to one host.
    pub vms: Vec<Plan>,
    /// Memory of each intermediary.
    pub intermediaries: Vec<u64>,
    /// So many of them, the last ones, are there for who dies; the migration begins without them.
    pub spares: usize,
    pub weather: Weather,
    pub gather_limit: u64,
    pub scatter_limit: u64,
    pub grace: Duration,
    pub think: Duration,
    pub events: Vec<Event>,
    /// Whether VMs share pages at the intermediaries, and have some in common.
    pub sharing: bool,
    /// How many intermediaries hold each page.
    pub replicas: u8,
    /// Others write two volumes, two each, one after the other.
    pub writers: bool,
}

/// Longer than anybody waits for a host.
const LONG: Duration = Duration::from_secs(60);

/// One seed in so many has several VMs.
const SEVERAL_IN: u64 = 8;

/// In one seed in so many VMs share pages.
const SHARING_IN: u64 = 3;

/// In one seed in so many intermediaries leave.
const LEAVES_IN: u64 = 4;

/// In one seed in so many others stand by for intermediaries that die.
const SPARES_IN: u64 = 3;

/// Pages of a VM, and of those beside it.
const SIZES: [u64; 6] = [64, 64, 128, 200, 300, 1024];
const SIZES_BESIDE: [u64; 4] = [32, 64, 64, 128];

/// In one seed in so many a bit is flipped on the way.
const FLIPS_IN: u64 = 5;

/// One seed in so many has two who write one volume.
const WRITERS_IN: u64 = 8;

/// In one seed in so many VMs have memory that is forgotten when it is safe; those that go in rounds, in one of more: what is
/// wrong with a copy of half a unit is found where they keep it.
const FORGETS_IN: u64 = 3;
const FORGETS_IN_ROUNDS_IN: u64 = 9;

/// One VM in so many has memory of 2 MiB units.
const HUGE_IN: u64 = 8;

/// One VM in so many arrives by hybrid in memory that takes each page once.
const TAKEN_ONCE_IN: u64 = 4;

/// Pages of what an intermediary gives to a volume at once.
const CHUNK_PAGES: u64 = 512;

/// Pages of an index owner's range: VMs of more than that have several owners.
const FAR: u64 = 1024;

impl Scenario {
    /// The one of a seed.
    pub fn of(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let intermediaries = random.pick(&[0, 1, 1, 2, 2, 2, 3, 3]);
        let memory = memory(&mut random, &SIZES);
        let mut scenario = Self {
            seed,
            vms: Vec::new(),
            spares: 0,
            intermediaries: (0..intermediaries).map(|_| random.pick(&[2, 2, 4, 8]) << 20).collect(),
            weather: Weather {
                delay: Duration::from_micros(random.pick(&[20, 50, 100, 500, 2000])),
                jitter: Duration::from_micros(random.pick(&[0, 10, 100, 3000])),
                port_rate: random.pick(&[0, 0, 125_000_000, 12_500_000]),
            },
            gather_limit: random.pick(&[0, 0, 1_000_000, 4_000_000, 32_000_000]),
            scatter_limit: random.pick(&[0, 0, 20_000_000, 4_000_000]),
            grace: Duration::from_millis(random.pick(&[500, 1000, 2000])),
            think: Duration::from_micros(random.pick(&[100, 1000, 5000])),
            events: Vec::new(),
            sharing: false,
            replicas: 1,
            writers: seed % WRITERS_IN == 1,
        };
        let count = random.pick(&[0, 1, 1, 1, 2, 2, 3, 4, 6]);
        scenario.events = (0..count).map(|_| scenario.event(&mut random)).collect();
        scenario.vms.push(Plan::of(memory, &mut random));
        // Drawn last: seeds with one VM of pages are what they were before there were others.
        if random.one_in(SEVERAL_IN) {
            for _ in 0..random.pick(&[1, 1, 2]) {
                let memory = self::memory(&mut random, &SIZES_BESIDE);
                scenario.vms.push(Plan::of(memory, &mut random));
            }
        }
        for nth in 0..scenario.vms.len() {
            if random.one_in(HUGE_IN) {
                scenario.vms[nth].make_huge(&mut random);
                let what = What::Damage(Role::Intermediary(random.below(3) as usize));
                let event = Event { what, ..scenario.event(&mut random) };
                scenario.events.extend(random.one_in(2).then_some(event));
            }
        }
        scenario.sharing = random.one_in(SHARING_IN);
        if scenario.sharing {
            for content in scenario.vms.iter_mut().flat_map(|vm| &mut vm.memory) {
                if *content == Content::Version(1) && random.one_in(2) {
                    *content = Content::Version(COMMON + random.below(40) as u32);
                }
            }
        }
        scenario.replicas = random.pick(&[1, 1, 1, 2, 2, 3]);
        if intermediaries > 0 && random.one_in(SPARES_IN) {
            scenario.spares = random.pick(&[1, 1, 2]);
            scenario.intermediaries.extend((0..scenario.spares).map(|_| random.pick(&[2, 4, 8]) << 20));
            // Somebody dies in whose place another comes, and perhaps that one as well, or something befalls it.
            let (one, spare) = (random.below(intermediaries), intermediaries);
            let dies = What::Kill(Role::Intermediary(one as usize), None);
            let other = Role::Intermediary((one as usize + 1) % intermediaries as usize);
            let more = random.pick(&[
                dies,
                What::Kill(other, None),
                What::Kill(Role::Intermediary(spare as usize), None),
                What::Freeze(Role::Intermediary(spare as usize), Duration::from_millis(600)),
                What::Cut(SOURCE, Role::Intermediary(spare as usize), Duration::from_millis(600)),
                What::Kill(SOURCE, None),
            ]);
            for what in [dies, more] {
                let event = Event { what, ..scenario.event(&mut random) };
                scenario.events.push(event);
            }
            if scenario.replicas > 1 {
                scenario.die_one_after_the_other(&mut random);
            }
        }
        let mut pieces = Random::new(seed).fork(60);
        scenario.vms.iter_mut().for_each(|vm| vm.rounds.final_piece_bytes = pieces.pick(&PIECES));
        let mut once = Random::new(seed).fork(61);
        scenario.vms.iter_mut().for_each(|vm| vm.takes_once = once.one_in(TAKEN_ONCE_IN));
        if intermediaries > 1 && random.one_in(LEAVES_IN) {
            for _ in 0..random.pick(&[1, 1, 1, 2]) {
                let member = Role::Intermediary(random.below(intermediaries) as usize);
                let restart = random.one_in(2).then(|| Duration::from_millis(random.pick(&[1, 600])));
                let event = Event { what: What::Leave(member, restart), ..scenario.event(&mut random) };
                scenario.events.push(event);
            }
            // Often nothing else happens: then nothing is lost.
            if random.one_in(2) {
                scenario.events.retain(|event| matches!(event.what, What::Leave(..)));
            }
        }
        scenario.add_flips(Random::new(seed).fork(62));
        scenario.restart_ends(Random::new(seed).fork(63));
        scenario
    }

    /// Often nothing else happens where pages have copies: one dies while it goes on, and as many as copies may once it has
    /// evicted.
    fn die_one_after_the_other(&mut self, random: &mut Random) {
        if random.one_in(3) {
            return;
        }
        let mut order: Vec<_> = self.lenders().collect();
        for at in (1..order.len()).rev() {
            order.swap(at, random.below(at as u64 + 1) as usize);
        }
        let first = order.iter().position(|role| self.members().any(|member| member == *role));
        let first = order.remove(first.unwrap_or(0));
        let before = Event {
            after: random.pick(&[After::Start, After::Commit, After::Commit]),
            delay: Duration::from_micros(random.within(0, 60_000)),
            what: What::Kill(first, None),
        };
        // Slowly, so that another comes in time.
        (self.gather_limit, self.scatter_limit) = (1_000_000, 4_000_000);
        let evicted = order.into_iter().take(usize::from(self.replicas) - 1).map(|role| Event {
            after: After::Evicted,
            delay: Duration::from_micros(random.pick(&[0, 0, 500, 20_000])),
            what: What::Kill(role, None),
        });
        self.events = std::iter::once(before).chain(evicted).collect();
        if random.one_in(2) {
            let what = What::Kill(SOURCE, None);
            self.events.push(Event { after: After::Evicted, delay: Duration::ZERO, what });
        }
    }

    /// Bits that are flipped on the way.
    fn add_flips(&mut self, mut random: Random) {
        if !random.one_in(FLIPS_IN) {
            return;
        }
        for _ in 0..random.pick(&[1, 1, 2]) {
            let roles = self.roles();
            let one = random.below(roles.len() as u64) as usize;
            let other = (one + random.within(1, roles.len() as u64 - 1) as usize) % roles.len();
            let event = Event { what: What::Flip(roles[one], roles[other]), ..self.event(&mut random) };
            self.events.push(event);
        }
    }

    /// New processes at the ends that are killed.
    fn restart_ends(&mut self, mut random: Random) {
        for event in &mut self.events {
            if let What::Kill(SOURCE | DESTINATION, restart) = &mut event.what {
                *restart = random.one_in(2).then(|| Duration::from_millis(random.pick(&[1, 20, 150, 600])));
            }
        }
    }

    /// Whether pages lie at several intermediaries, and how many of these may die.
    pub fn spare(&self) -> Option<usize> {
        let holders = usize::from(self.replicas).min(self.intermediaries.len() - self.spares);
        holders.checked_sub(1).filter(|spare| *spare > 0)
    }

    /// Whether some intermediary may be short of memory: where pages lie at several, they then lie nowhere.
    pub fn is_short(&self) -> bool {
        let fills = |event: &Event| matches!(event.what, What::Fill(_));
        self.spare().is_some()
            && (self.events.iter().any(fills)
                || self.intermediaries.iter().any(|memory| *memory < self.room_for_all()))
    }

    /// A VM of so many pages that scatters, such intermediaries, and a fast network on which nothing happens but these
    /// events.
    pub fn plain(pages: usize, intermediaries: Vec<u64>, events: Vec<Event>) -> Self {
        Self {
            seed: 0,
            vms: vec![Plan {
                memory: vec![Content::Version(1); pages],
                regions: vec![(pages as u64, InstallUnit::Page)],
                logs_units: false,
                mode: Mode::ScatterGather,
                rounds: RoundOptions::default(),
                takes_once: false,
            }],
            intermediaries,
            spares: 0,
            weather: Weather { delay: Duration::from_micros(50), jitter: Duration::ZERO, port_rate: 0 },
            gather_limit: 1_000_000,
            scatter_limit: 4_000_000,
            grace: Duration::from_secs(1),
            think: Duration::from_millis(1),
            events,
            sharing: false,
            replicas: 1,
            writers: false,
        }
    }

    /// Whether a VM's memory is forgotten when it is safe.
    pub fn forgets(&self, plan: &Plan) -> bool {
        let one_in = if plan.rounds.most(plan.mode) > 0 { FORGETS_IN_ROUNDS_IN } else { FORGETS_IN };
        self.seed.is_multiple_of(one_in) && plan.mode != Mode::PreCopy
    }

    /// With whom VMs share pages.
    pub fn shares(&self) -> Option<Sharing> {
        self.sharing.then(Sharing::default)
    }

    /// Those that a migration begins with.
    pub fn members(&self) -> impl Iterator<Item = Role> + use<> {
        (0..self.intermediaries.len() - self.spares).map(Role::Intermediary)
    }

    /// All intermediaries.
    pub fn lenders(&self) -> impl Iterator<Item = Role> + use<> {
        (0..self.intermediaries.len()).map(Role::Intermediary)
    }

    /// Others than its own, that may become members of a volume.
    pub fn strangers(&self) -> Vec<SocketAddr> {
        (self.intermediaries.len() - self.spares..self.intermediaries.len())
            .map(|nth| address(Role::Intermediary(nth)))
            .collect()
    }

    pub fn roles(&self) -> Vec<Role> {
        [SOURCE, DESTINATION].into_iter().chain(self.lenders()).collect()
    }

    /// The memory that an intermediary may use.
    pub fn memory_of(&self, role: Role) -> u64 {
        match role {
            Role::Intermediary(nth) => self.intermediaries[nth],
            Role::Source | Role::Destination => 0,
        }
    }

    /// Whether a host is stopped for a while.
    pub fn stops(&self, role: Role) -> bool {
        self.events.iter().any(|event| matches!(event.what, What::Freeze(other, _) if other == role))
    }

    /// Memory in which an intermediary has room for all pages of all VMs, and for copies that are late.
    pub fn room_for_all(&self) -> u64 {
        let chunks: u64 = self.vms.iter().map(|vm| vm.memory.len() as u64 / CHUNK_PAGES + 2).sum();
        ((chunks + 2 * u64::from(self.writers)) * CHUNK_PAGES * PAGE_BYTES_U64).max(8 << 20)
    }

    /// How long eviction may take, from COMMIT on, where one way out is not disturbed.
    pub fn eviction_max(&self) -> Duration {
        // At the least rate that this scenario has, three times over; what may be waited for in vain comes on top.
        let rates = [self.gather_limit, self.scatter_limit, self.weather.port_rate];
        let least = rates.into_iter().filter(|rate| *rate > 0).min().unwrap_or(1 << 30);
        let bytes = self.vms.iter().map(|vm| vm.memory.len() as u64).sum::<u64>() * PAGE_BYTES_U64;
        Duration::from_secs(8) + Duration::from_millis(3 * bytes * 1000 / least)
    }

    /// A stream of random numbers for one purpose.
    pub fn random(&self, purpose: u64) -> Random {
        Random::new(self.seed).fork(purpose)
    }

    fn event(&self, random: &mut Random) -> Event {
        let after = random.pick(&[
            After::Start,
            After::Ready,
            After::Commit,
            After::Commit,
            After::Running,
            After::Running,
            After::Running,
            After::Evicted,
            After::Evicted,
        ]);
        let most = random.pick(&[0, 1000, 20_000, 20_000, 200_000, 1_000_000]);
        let delay = Duration::from_micros(random.within(0, most));
        Event { after, delay, what: self.what(random) }
    }

    fn what(&self, random: &mut Random) -> What {
        let roles = self.roles();
        let member = |random: &mut Random| {
            let members: Vec<_> = self.members().collect();
            if members.is_empty() { DESTINATION } else { random.pick(&members) }
        };
        let time = |random: &mut Random| Duration::from_millis(random.pick(&[1, 20, 150, 600, 3000]));
        let two = |random: &mut Random| {
            let one = random.below(roles.len() as u64) as usize;
            let other = (one + random.within(1, roles.len() as u64 - 1) as usize) % roles.len();
            (roles[one], roles[other])
        };
        match random.below(16) {
            0 => What::Kill(SOURCE, None),
            1 => What::Kill(DESTINATION, None),
            2..=4 => What::Kill(member(random), random.one_in(2).then(|| time(random))),
            5 => What::Freeze(random.pick(&roles), time(random)),
            // For longer than anybody waits.
            6 => What::Freeze(random.pick(&roles[1..]), LONG),
            7..=9 => {
                let (one, other) = two(random);
                What::Break(one, other)
            }
            10..=12 => {
                let (one, other) = two(random);
                What::Cut(one, other, time(random))
            }
            13 => What::Damage(member(random)),
            14 => What::Fill(member(random)),
            _ => What::Limit(random.pick(&[0, 500_000, 8_000_000])),
        }
    }
}

/// Bytes of a piece of the final set: a few pages, some, more than there are.
pub const PIECES: [usize; 3] = [20, 100, 1 << 20];

impl Plan {
    fn of(memory: Vec<Content>, random: &mut Random) -> Self {
        let (mode, via) = random.pick(&[
            (Mode::ScatterGather, Via::Direct),
            (Mode::ScatterGather, Via::Direct),
            (Mode::ScatterGather, Via::Direct),
            (Mode::Hybrid, Via::Direct),
            (Mode::PreCopy, Via::Direct),
            (Mode::PreCopy, Via::Vmd),
        ]);
        let rounds_max = Some(random.pick(&[1, 2, 4]));
        let downtime_limit = Duration::from_millis(random.pick(&[0, 1, 20]));
        let regions = vec![(memory.len() as u64, InstallUnit::Page)];
        let rounds = RoundOptions { rounds_max, downtime_limit, via, ..RoundOptions::USUAL };
        Self { memory, regions, logs_units: false, mode, rounds, takes_once: false }
    }

    /// Memory of 2 MiB units, mostly with some of 4 KiB before or behind it, which shifts them against everything
    /// else that comes in powers of two.
    fn make_huge(&mut self, random: &mut Random) {
        let huge = InstallUnit::Huge2M;
        let units = random.pick(&[1, 1, 2]);
        self.regions = vec![(units * u64::from(huge.pages()), huge)];
        if !random.one_in(3) {
            self.regions.insert(random.below(2) as usize, (random.pick(&[8, 64]), InstallUnit::Page));
        }
        self.memory.clear();
        for (pages, unit) in &self.regions {
            let of_unit = unit.pages() as usize;
            for _ in 0..pages / of_unit as u64 {
                let end = self.memory.len() + of_unit;
                match random.below(8) {
                    0 => self.memory.resize(end, Content::Absent),
                    1 => self.memory.resize(end, Content::Zero),
                    // One page of it is not zero, and may become so.
                    2..=3 => {
                        self.memory.resize(end, Content::Zero);
                        self.memory[end - 1 - random.below(of_unit as u64) as usize] = Content::Version(1);
                    }
                    _ => self.memory.resize(end, Content::Version(1)),
                }
            }
        }
        self.logs_units = random.one_in(2);
    }
}

/// Mostly data, some of it zero or absent; sometimes with much that is absent, over several index ranges.
fn memory(random: &mut Random, sizes: &[u64]) -> Vec<Content> {
    let pages = random.pick(sizes);
    let (zero, absent) = (random.pick(&[0, 5, 30]), random.pick(&[0, 5, 50]));
    let mut draw = |_| match random.below(100) {
        part if part < zero => Content::Zero,
        part if part < zero + absent => Content::Absent,
        _ => Content::Version(1),
    };
    let mut memory: Vec<_> = (0..pages).map(&mut draw).collect();
    if random.one_in(4) {
        memory.resize(FAR as usize + 10, Content::Absent);
        memory.extend((0..40).map(|_| Content::Version(1)));
        memory.resize(2 * FAR as usize + 20, Content::Absent);
    }
    memory
}

//! Evict now, place later, by seed: a VM is parked, and hosts claim it, one after the other or at once, while
//! intermediaries, the source and claimants die and the network fails.

mod continued;
mod mended;
mod run;

use std::fmt::Write as _;
use std::time::Duration;

use libsg::host::simulation::Bug;
use libsg::migrate::{Mode, RoundOptions};
use libsg::page::InstallUnit;

use crate::content::Content;
use crate::net::Weather;
use crate::random::Random;
use crate::run::Outcome;
use crate::scenario::{PIECES, Plan, Scenario};
use crate::seeds::run_each;
use crate::seeds_asked;
use crate::shrink::{again, asked, without_one};

/// Who something happens to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    Source,
    Intermediary(usize),
    /// The host that makes that claim.
    Claimant(usize),
}

/// From when on something is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum After {
    Start,
    Commit,
    Evicted,
    /// That claim was granted.
    Claimed(usize),
    /// The VM runs at that claimant.
    Running(usize),
}

/// What happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    /// Its process is killed; of an intermediary a new one is started after that long, if at all.
    Kill(Who, Option<Duration>),
    /// The source's process is killed, and the VM's memory outlives it: after that long another process goes on with it.
    Succeed(Duration),
    Freeze(Who, Duration),
    /// An intermediary is told to go: it hands over what it has, and ends; a new one starts there after that long.
    Leave(usize, Option<Duration>),
    Break(Who, Who),
    Cut(Who, Who, Duration),
    /// Its operator gives a claim up.
    GiveUp(usize),
}

/// Something that happens, or a claim that is made.
#[derive(Clone, Copy, Debug)]
pub struct At<T> {
    pub after: After,
    pub delay: Duration,
    pub what: T,
}

/// Everything about a run.
#[derive(Clone, Debug)]
pub struct Parking {
    /// The VM, the intermediaries and the network.
    pub base: Scenario,
    /// When each claim is made. The last one comes when everything else is over.
    pub claims: Vec<At<()>>,
    pub events: Vec<At<What>>,
}

impl Parking {
    /// The one of a seed.
    pub fn of(seed: u64) -> Self {
        let mut random = Random::new(seed).fork(40);
        let intermediaries = random.pick(&[1, 2, 2, 3]);
        let pages = random.pick(&[64, 64, 130, 300]);
        let zero = random.pick(&[0, 10, 40]);
        let mut draw = |_| match random.below(100) {
            part if part < zero => Content::Zero,
            part if part < zero + 5 => Content::Absent,
            _ => Content::Version(1),
        };
        let mut memory: Vec<_> = (0..pages).map(&mut draw).collect();
        if random.one_in(4) {
            // Several index servers know of it.
            memory.resize(1500, Content::Absent);
            memory.extend((0..30).map(|_| Content::Version(1)));
        }
        let mode = random.pick(&[Mode::ScatterGather, Mode::ScatterGather, Mode::Hybrid]);
        let rounds = RoundOptions {
            rounds_max: Some(random.pick(&[1, 2])),
            downtime_limit: Duration::from_millis(1),
            final_piece_bytes: Random::new(seed).fork(60).pick(&PIECES),
            ..RoundOptions::USUAL
        };
        let regions = vec![(memory.len() as u64, InstallUnit::Page)];
        let base = Scenario {
            seed,
            vms: vec![Plan { memory, regions, logs_units: false, mode, rounds, takes_once: false }],
            intermediaries: (0..intermediaries).map(|_| random.pick(&[2, 4, 4, 8]) << 20).collect(),
            spares: 0,
            weather: Weather {
                delay: Duration::from_micros(random.pick(&[20, 100, 1000])),
                jitter: Duration::from_micros(random.pick(&[0, 100, 3000])),
                port_rate: random.pick(&[0, 0, 12_500_000]),
            },
            gather_limit: random.pick(&[0, 1_000_000, 8_000_000]),
            scatter_limit: random.pick(&[0, 0, 4_000_000]),
            grace: Duration::from_millis(random.pick(&[500, 2000])),
            think: Duration::from_micros(random.pick(&[100, 2000])),
            events: Vec::new(),
            sharing: random.one_in(3),
            replicas: 1,
            writers: false,
        };
        let mut parking = Self { base, claims: Vec::new(), events: Vec::new() };
        for nth in 0..random.pick(&[1, 2, 2, 3]) {
            let after = match nth {
                0 => random.pick(&[After::Evicted, After::Evicted, After::Commit, After::Start]),
                nth => random.pick(&[After::Evicted, After::Claimed(nth - 1), After::Running(nth - 1)]),
            };
            let delay = Duration::from_micros(random.pick(&[0, 0, 500, 50_000, 12_000_000]));
            parking.claims.push(At { after, delay, what: () });
        }
        for _ in 0..random.pick(&[0, 1, 1, 2, 2, 3, 4]) {
            let event = parking.event(&mut random);
            parking.events.push(event);
        }
        if random.one_in(3) {
            for _ in 0..random.pick(&[1, 2, 3]) {
                let nth = random.below(intermediaries) as usize;
                let restart = random.one_in(2).then(|| Duration::from_millis(random.pick(&[1, 600])));
                let event = At { what: What::Leave(nth, restart), ..parking.event(&mut random) };
                parking.events.push(event);
            }
            if random.one_in(2) {
                parking.events.retain(|event| matches!(event.what, What::Leave(..)));
            }
        }
        parking
    }

    fn event(&self, random: &mut Random) -> At<What> {
        let claim = random.below(self.claims.len() as u64) as usize;
        let after = random.pick(&[
            After::Start,
            After::Commit,
            After::Commit,
            After::Evicted,
            After::Claimed(claim),
            After::Claimed(claim),
            After::Claimed(claim),
            After::Running(claim),
        ]);
        let most = random.pick(&[0, 200, 5000, 100_000, 1_000_000]);
        let delay = Duration::from_micros(random.within(0, most));
        let member = |random: &mut Random| {
            Who::Intermediary(random.below(self.base.intermediaries.len() as u64) as usize)
        };
        // Of all intermediaries the first is mostly the keeper.
        let keeper =
            |random: &mut Random| if random.one_in(2) { Who::Intermediary(0) } else { member(random) };
        let other = |random: &mut Random| match random.below(3) {
            0 => Who::Source,
            _ => Who::Claimant(claim),
        };
        let time = |random: &mut Random| Duration::from_millis(random.pick(&[1, 20, 600, 3000, 11_000]));
        let what = match random.below(12) {
            0 => What::Kill(Who::Source, None),
            1 | 2 => What::Kill(Who::Claimant(claim), None),
            3 => What::Kill(keeper(random), None),
            4 => What::Kill(keeper(random), Some(time(random))),
            5 => What::Freeze(keeper(random), time(random)),
            6 => What::Freeze(Who::Claimant(claim), time(random)),
            7 | 8 => What::Break(other(random), keeper(random)),
            9 | 10 => What::Cut(other(random), keeper(random), time(random)),
            _ => What::GiveUp(claim),
        };
        At { after, delay, what }
    }

    /// Whether no intermediary is ever killed.
    pub fn keeps_intermediaries(&self) -> bool {
        !self.events.iter().any(|event| matches!(event.what, What::Kill(Who::Intermediary(_), _)))
    }
}

/// Runs by seed of one kind.
struct Kind {
    /// The module of its tests.
    name: &'static str,
    of: fn(u64) -> Parking,
    run: fn(&Parking, Option<Bug>) -> Outcome,
}

const PARKED: Kind =
    Kind { name: "parked", of: Parking::of, run: |parking, bug| run::Run::new(parking, bug).run() };

impl Kind {
    fn run(&self, seed: u64, bug: Option<Bug>) -> Outcome {
        (self.run)(&(self.of)(seed), bug)
    }

    /// The run of a seed with some of its events only.
    fn run_with(&self, seed: u64, events: &[usize], bug: Option<Bug>) -> (Parking, Outcome) {
        let mut parking = (self.of)(seed);
        parking.events = events.iter().filter_map(|nth| parking.events.get(*nth).copied()).collect();
        let outcome = (self.run)(&parking, bug);
        (parking, outcome)
    }

    /// What is printed about a seed that fails, with the fewest events that make it fail.
    fn report(&self, seed: u64, bug: Option<Bug>) -> Option<String> {
        let all: Vec<_> = (0..(self.of)(seed).events.len()).collect();
        let fails = |events: &[usize]| {
            let (parking, outcome) = self.run_with(seed, events, bug);
            outcome.breach.is_some().then(|| (events.to_vec(), parking, outcome))
        };
        let mut least = fails(&all)?;
        while let Some(less) = without_one(&least.0, fails) {
            least = less;
        }
        let (events, parking, outcome) = least;
        let mut text = format!("seed {seed}: {:?}\n", outcome.breach);
        let _ =
            writeln!(text, "claims {:?}\nevents {:?}\n{:?}", parking.claims, parking.events, parking.base);
        outcome.lines.iter().for_each(|line| {
            let _ = writeln!(text, "{line}");
        });
        let test = format!("{}::one_seed", self.name);
        let _ = write!(text, "Again by\n{}", again(&test, seed, &events, bug));
        Some(text)
    }

    /// As the test of that name in `main`.
    fn one_seed(&self) {
        let (seed, events, bug) = asked(|seed| (self.of)(seed).events.len());
        log_if_asked();
        let (_, outcome) = self.run_with(seed, &events, bug);
        for line in &outcome.lines {
            println!("{line}");
        }
        assert_eq!(outcome.breach, None);
    }

    fn whatever_happens(&self) {
        log_if_asked();
        let sum = run_each(seeds_asked(), true, 5, |seed| self.run(seed, None));
        println!("{sum}");
        let broken = sum.broken.first().and_then(|(seed, _)| self.report(*seed, None)).unwrap_or_default();
        assert!(sum.broken.is_empty(), "{sum}\n{:?}\n{broken}", sum.broken);
    }

    /// Bugs put in on purpose are found within a thousand seeds.
    fn finds(&self, bug: Bug, says: &[&str]) {
        let sum = run_each(0..1000, false, 1, |seed| self.run(seed, Some(bug)));
        let (seed, breach) = sum.broken.first().unwrap_or_else(|| panic!("{bug:?} was not found: {sum}"));
        println!("{bug:?}: seed {seed}: {breach}");
        let says_it = says.iter().any(|words| breach.contains(words));
        assert!(says_it, "{bug:?} was found as something else: {breach}");
    }
}

fn log_if_asked() {
    if let Ok(filter) = std::env::var("SG_SIM_LOG") {
        tracing_subscriber::fmt().with_env_filter(filter).init();
    }
}

#[test]
fn one_seed() {
    PARKED.one_seed();
}

#[test]
fn a_failure_is_made_small_and_says_how_it_is_seen_again() {
    let bug = Some(Bug::ClaimedTwice);
    let sum = run_each(0..1000, false, 1, |seed| match Parking::of(seed).events.len() {
        0..2 => Outcome::default(),
        _ => PARKED.run(seed, bug),
    });
    let (seed, _) = sum.broken.first().unwrap_or_else(|| panic!("{bug:?} was not found: {sum}"));
    let report = PARKED.report(*seed, bug).expect("it fails");
    let (_, command) = report.split_once("SG_SIM_EVENTS=").expect("the command");
    let (events, behind) = command.split_once(' ').expect("more");
    assert!(behind.starts_with("SG_SIM_BUG=ClaimedTwice cargo test"), "{command}");
    let events: Vec<usize> = events.split(',').filter_map(|nth| nth.parse().ok()).collect();
    let all = Parking::of(*seed).events.len();
    assert!(events.len() < all, "{events:?} of {all}: {report}");
    assert!(PARKED.run_with(*seed, &events, bug).1.breach.is_some());
}

#[test]
fn whatever_happens_the_contracts_hold() {
    PARKED.whatever_happens();
}

#[test]
fn a_seed_is_the_same_run_each_time() {
    for seed in 0..10 {
        assert_eq!(PARKED.run(seed, None).trace, PARKED.run(seed, None).trace, "seed {seed}");
    }
}

/// A small VM at intermediaries of 4 MiB, claimed when it has evicted, on a fast network on which nothing happens but this.
fn claimed(intermediaries: usize, events: Vec<At<What>>) -> Outcome {
    let mut parking = Parking::of(0);
    let plan = Plan {
        memory: vec![Content::Version(1); 200],
        regions: vec![(200, InstallUnit::Page)],
        logs_units: false,
        mode: Mode::ScatterGather,
        rounds: RoundOptions::default(),
        takes_once: false,
    };
    parking.base = Scenario {
        vms: vec![plan],
        intermediaries: vec![4 << 20; intermediaries],
        weather: Weather { delay: Duration::from_micros(50), jitter: Duration::ZERO, port_rate: 0 },
        gather_limit: 1_000_000,
        scatter_limit: 4_000_000,
        grace: Duration::from_millis(500),
        sharing: false,
        ..parking.base
    };
    parking.claims = vec![At { after: After::Evicted, delay: Duration::ZERO, what: () }];
    parking.events = events;
    let outcome = run::Run::new(&parking, None).run();
    assert_eq!(outcome.breach, None, "{:#?}", outcome.lines);
    outcome
}

/// The same, by the first that claims it.
fn holds(intermediaries: usize, events: Vec<At<What>>) {
    let outcome = claimed(intermediaries, events);
    let runs = outcome.lines.iter().any(|line| line.contains("claimant 0: Resumed"));
    assert!(runs, "it was not claimed at once: {:#?}", outcome.lines);
}

/// It was there and had not been told: whoever claimed, by force or not, heard that the VM was not parked.
#[test]
fn a_keeper_whose_connection_breaks_behind_commit_is_told_anew() {
    for delay in (0..600).step_by(20) {
        let what = What::Break(Who::Source, Who::Intermediary(0));
        holds(2, vec![At { after: After::Commit, delay: Duration::from_micros(delay), what }]);
    }
}

/// It was left alone for longer than its grace, and what it knew was lost.
#[test]
fn an_index_server_is_asked_again_within_its_grace() {
    for delay in (0..1000).step_by(40) {
        let what = What::Break(Who::Claimant(0), Who::Intermediary(0));
        holds(1, vec![At { after: After::Running(0), delay: Duration::from_micros(delay), what }]);
    }
}

/// The only one that is left cannot leave: it refuses what it is given, and takes it when it stays. The pages of a batch that was
/// refused were taken for pages of the next one, and so for being where others were.
#[test]
fn one_that_refused_pages_and_takes_them_again_has_them() {
    let at = |what| At { after: After::Commit, delay: Duration::ZERO, what };
    let outcome = claimed(2, vec![at(What::Leave(0, None)), at(What::Kill(Who::Intermediary(1), None))]);
    let gathered = outcome.lines.iter().any(|line| line.contains("claimant 0: Gathered"));
    assert!(gathered, "{:#?}", outcome.lines);
}

/// Both leave, and new ones start at their places. Who had come was not asked where it became known between the question who
/// the members are and the one where pages are; and an index that had been handed over named places from which others had
/// taken them since.
#[test]
fn whoever_takes_over_is_asked_before_anything_is_lost() {
    let leave = |nth, after, us| {
        let what = What::Leave(nth, Some(Duration::from_millis(1)));
        At { after, delay: Duration::from_micros(us), what }
    };
    let evicted = After::Evicted;
    for (first, us, after, then_us) in [
        (0, 0, evicted, 1000),
        (0, 1000, evicted, 2000),
        (0, 8000, evicted, 2000),
        (0, 20_000, evicted, 2000),
        (0, 8000, After::Claimed(0), 0),
        (0, 20_000, After::Claimed(0), 0),
        (1, 1000, evicted, 0),
        (1, 0, After::Claimed(0), 500),
    ] {
        claimed(2, vec![leave(first, evicted, us), leave(1 - first, after, then_us)]);
    }
}

#[test]
fn nothing_is_parked_before_all_is_safe() {
    PARKED.finds(Bug::ParkedUnsafe, &["evicted means evicted", "a death is an event", "each page is right"]);
}

#[test]
fn no_claim_is_granted_twice() {
    PARKED.finds(Bug::ClaimedTwice, &["one owner"]);
}

#[test]
fn nobody_leaves_early() {
    PARKED.finds(Bug::LeavesEarly, &["a death is an event"]);
}

#[test]
fn nothing_runs_that_is_not_written_down() {
    PARKED.finds(Bug::RunsUnasked, &["one owner"]);
}

//! One experiment of the paper as it is run here: the words of `sg-bench migrate`, so that whoever reads a figure
//! can repeat a point of it by hand, and so that an experiment of what a build does not have is simply not there.

use clap::error::{ContextKind, ErrorKind};
use libsg::units::{Rate, Size};
use serde::{Deserialize, Serialize};

use crate::cli::{MigrateArgs, Mode};

/// GB of a VM of the paper; taken as GiB, which is what its times say.
pub const VM_GB: f64 = 5.0;

/// What nothing is smaller than: a destination that has less does not come up.
const LEAST_MEMORY: u64 = 8 << 20;

/// Everything that all experiments have in common.
#[derive(Clone, Debug)]
pub struct Scale {
    /// Memory of a VM.
    pub vm: Size,
    /// What the user has every run do besides.
    pub besides: Vec<String>,
}

impl Scale {
    /// Memory that has so many GB in the paper, in whole MiB.
    pub fn memory(&self, gb: f64) -> Size {
        let bytes = (self.vm.0 as f64 * gb / VM_GB) as u64;
        Size((bytes >> 20 << 20).max(LEAST_MEMORY))
    }

    /// What a time here is multiplied by to be one of the paper's VMs.
    pub fn times(&self) -> f64 {
        VM_GB * f64::from(1 << 30) / self.vm.0 as f64
    }

    /// An experiment, from its own words; with one intermediary unless they say otherwise.
    pub fn experiment(&self, words: &str) -> Experiment {
        let one = if words.contains("--intermediaries") { "" } else { "--intermediaries 1" };
        let own = format!("--memory {} {one} {words}", self.vm);
        let all = own.split_whitespace().chain(self.besides.iter().map(String::as_str));
        Experiment(all.collect::<Vec<_>>().join(" "))
    }
}

/// The words of one experiment. Two with the same words are one, whatever figures they are for.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Experiment(pub String);

/// What an experiment needs and this build does not have: `--mode hybrid`, `--dedup`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotInThisBuild(pub String);

impl Experiment {
    /// What is run.
    ///
    /// # Errors
    /// It is about something that this build does not have.
    pub fn args(&self) -> Result<MigrateArgs, NotInThisBuild> {
        MigrateArgs::from_words(self.0.split_whitespace()).map_err(|error| {
            let said = |kind| error.get(kind).map(ToString::to_string).unwrap_or_default();
            NotInThisBuild(match error.kind() {
                ErrorKind::UnknownArgument => said(ContextKind::InvalidArg),
                ErrorKind::InvalidValue => {
                    let argument = said(ContextKind::InvalidArg);
                    let argument = argument.split(' ').next().unwrap_or_default();
                    format!("{argument} {}", said(ContextKind::InvalidValue))
                }
                _ => error.to_string(),
            })
        })
    }
}

/// What the destination's other VMs touch.
fn neighbours(args: &MigrateArgs) -> u64 {
    args.neighbour_memory.0 / 5 * 4 * u64::from(args.neighbours)
}

/// Bytes of memory that a run takes on this machine, where all of its hosts are. Neither the page cache nor the swap
/// file are counted.
pub fn memory_needed(args: &MigrateArgs) -> u64 {
    let all = args.vm.memory.0 * u64::from(args.vms);
    let straight = matches!(args.mode, Mode::PostCopy | Mode::PreCopy);
    let staged = if straight { 0 } else { all };
    let wanted = all + neighbours(args);
    let there = args.destination_memory.map_or(wanted, |limit| limit.0.min(wanted));
    // Processes, sockets, and what the kernel wants to keep free.
    all + staged + there + (512 << 20)
}

/// Seconds that a run will take, before one has been measured: with building the hosts, measuring the links, filling
/// the memory and verifying it.
pub fn seconds_expected(args: &MigrateArgs) -> f64 {
    let bytes = (args.vm.memory.0 * u64::from(args.vms)) as f64;
    let limits =
        [args.lab.link_rate, args.lab.destination_rate.unwrap_or(Rate::UNLIMITED), args.gather_limit];
    let slowest = limits.iter().filter(|rate| !rate.is_unlimited()).min();
    let bits_per_s = slowest.map_or(2e9, |rate| rate.0 as f64);
    let wanted = bytes + neighbours(args) as f64;
    let over = args.destination_memory.map_or(0.0, |limit| (wanted - limit.0 as f64).max(0.0));
    const BEFORE_AND_AFTER_S: f64 = 8.0;
    const FILLED_AND_VERIFIED: f64 = 150e6;
    const SWAPPED: f64 = 25e6;
    BEFORE_AND_AFTER_S + bytes / FILLED_AND_VERIFIED + bytes * 8.0 / bits_per_s + over / SWAPPED
}

#[cfg(test)]
pub(super) mod test {
    use super::*;

    pub(crate) fn scale() -> Scale {
        Scale { vm: Size(1 << 30), besides: Vec::new() }
    }

    #[test]
    fn memory_shrinks_with_the_vm() {
        assert_eq!(scale().memory(5.0), Size(1 << 30));
        assert_eq!(scale().memory(2.0), Size(409 << 20));
        let small = Scale { vm: Size(16 << 20), ..scale() };
        assert_eq!(small.memory(2.0), Size(LEAST_MEMORY));
        assert!((scale().times() - 5.0).abs() < 1e-9);
    }

    #[test]
    fn what_is_besides_comes_last_and_counts() {
        let scale = Scale { besides: vec!["--cc".into(), "bbr".into()], ..scale() };
        let experiment = scale.experiment("--mode post-copy --cc cubic");
        assert_eq!(experiment.0, "--memory 1G --intermediaries 1 --mode post-copy --cc cubic --cc bbr");
        let args = experiment.args().expect("in this build");
        assert_eq!((args.mode, args.lab.cc), (Mode::PostCopy, crate::lab::CongestionControl::Bbr));
    }

    #[test]
    fn what_a_build_does_not_have_is_named() {
        let missing = |words| scale().experiment(words).args().expect_err("not there").0;
        assert_eq!(missing("--mode by-pigeon"), "--mode by-pigeon");
        assert_eq!(missing("--pigeons 7"), "--pigeons");
    }

    #[test]
    fn several_vms_need_and_take_more() {
        let args = |words| scale().experiment(words).args().expect("in this build");
        let (one, five) = (args(""), args("--vms 5"));
        assert_eq!(memory_needed(&one), (3 << 30) + (512 << 20));
        assert!(memory_needed(&args("--mode post-copy")) < memory_needed(&one));
        assert!(seconds_expected(&five) > 3.0 * seconds_expected(&one));
        let limited = args("--gather-limit 256mbit");
        assert!(seconds_expected(&limited) > seconds_expected(&one) + 20.0);
        assert!(seconds_expected(&args("--destination-memory 512M")) > seconds_expected(&one) + 15.0);
    }
}

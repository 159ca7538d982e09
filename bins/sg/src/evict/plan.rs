//! Which VMs leave when, and how: pure. By a deadline, if there is one.

use std::time::Duration;

use libsg::migrate::Mode;

/// Connecting, handing over, and finding what the link carries.
const START: Duration = Duration::from_secs(1);

/// The part of a link's rate that is page bytes: headers of the network, margin of the rate finder.
const USED: f64 = 0.92;

/// How often a page leaves at most, in a mode that sends them while the VM writes.
const ROUNDS: u64 = 2;

/// A VM that is to leave.
#[derive(Clone, Debug, PartialEq)]
pub struct Leaver {
    /// What it has in memory, at most.
    pub bytes: u64,
    /// How much it matters beside the others.
    pub weight: f64,
}

/// What is known and wanted.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// What takes the pages in, or what the link carries, if less, in bytes a second.
    pub bytes_per_s: u64,
    /// When the host is gone.
    pub deadline: Option<Duration>,
    /// How the memory leaves, where that is said.
    pub mode: Option<Mode>,
    /// There are intermediaries.
    pub staged: bool,
}

/// Who leaves when.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// How.
    pub mode: Mode,
    /// Why so.
    pub why: &'static str,
    /// Those of a wave leave together; the next one begins when they are out.
    pub waves: Vec<Vec<usize>>,
    /// Those that will not be out in time.
    pub late: Vec<usize>,
    /// How long all take.
    pub takes: Duration,
}

/// Plans it. Where all are out in time they leave together. Where they are not, those that are saved by leaving first do
/// so, the smallest (for its weight) first of all, and the others follow one by one: one VM that is out counts more than
/// two that are half out.
pub fn plan(leavers: &[Leaver], terms: &Terms) -> Plan {
    let (mode, why) = mode(leavers, terms);
    let takes = |bytes| time(bytes, mode, terms);
    let all: u64 = leavers.iter().map(|leaver| leaver.bytes).sum();
    let mut order: Vec<usize> = (0..leavers.len()).collect();
    let cost = |at: &usize| leavers[*at].bytes as f64 / leavers[*at].weight.max(f64::MIN_POSITIVE);
    order.sort_by(|a, b| cost(a).total_cmp(&cost(b)));
    let (mut saved, mut late, mut bytes) = (Vec::new(), Vec::new(), 0);
    for at in order {
        let with = bytes + leavers[at].bytes;
        if terms.deadline.is_none_or(|deadline| takes(with) <= deadline) {
            bytes = with;
            saved.push(at);
        } else {
            late.push(at);
        }
    }
    let mut waves = vec![saved];
    waves.extend(late.iter().map(|at| vec![*at]));
    waves.retain(|wave| !wave.is_empty());
    Plan { mode, why, waves, late, takes: takes(all) }
}

fn time(bytes: u64, mode: Mode, terms: &Terms) -> Duration {
    let again = if matches!(mode, Mode::Hybrid | Mode::PreCopy) { ROUNDS } else { 1 };
    let seconds = (bytes * again) as f64 / (terms.bytes_per_s.max(1) as f64 * USED);
    START + Duration::from_secs_f64(seconds.min(1e9))
}

fn mode(leavers: &[Leaver], terms: &Terms) -> (Mode, &'static str) {
    let all: u64 = leavers.iter().map(|leaver| leaver.bytes).sum();
    match (terms.mode, terms.deadline) {
        (Some(mode), _) => (mode, "as it was said"),
        (None, _) if !terms.staged => (Mode::PostCopy, "no intermediaries are named"),
        (None, Some(deadline)) if time(all, Mode::Hybrid, terms) <= deadline => (
            Mode::Hybrid,
            "there is time to send all of it while the VMs run, and what they write meanwhile once more",
        ),
        (None, Some(_)) => (Mode::ScatterGather, "there is no time to send any of it twice"),
        (None, None) => (Mode::ScatterGather, "the host is free soonest"),
    }
}

#[cfg(test)]
mod test {
    use proptest::prelude::*;

    use super::*;

    const GIB: u64 = 1 << 30;

    fn terms(deadline_s: Option<u64>) -> Terms {
        let deadline = deadline_s.map(Duration::from_secs);
        Terms { bytes_per_s: 125_000_000, deadline, mode: None, staged: true }
    }

    fn of(sizes: &[u64]) -> Vec<Leaver> {
        sizes.iter().map(|bytes| Leaver { bytes: *bytes, weight: 1.0 }).collect()
    }

    #[test]
    fn the_mode_goes_by_the_time_there_is() {
        let vms = of(&[GIB, 2 * GIB]);
        let by = |deadline| plan(&vms, &terms(deadline));
        assert_eq!(by(None).mode, Mode::ScatterGather);
        assert_eq!((by(Some(40)).mode, by(Some(40)).late.len()), (Mode::ScatterGather, 0));
        assert_eq!((by(Some(120)).mode, by(Some(120)).late.len()), (Mode::Hybrid, 0));
        let alone = plan(&vms, &Terms { staged: false, ..terms(Some(120)) });
        assert_eq!(alone.mode, Mode::PostCopy);
        let said = plan(&vms, &Terms { mode: Some(Mode::PreCopy), ..terms(Some(5)) });
        assert_eq!(said.mode, Mode::PreCopy);
    }

    #[test]
    fn what_does_not_fit_saves_the_most_it_can() {
        let vms = of(&[4 * GIB, GIB, 2 * GIB]);
        let planned = plan(&vms, &terms(Some(32)));
        assert_eq!((planned.waves, planned.late), (vec![vec![1, 2], vec![0]], vec![0]));
        // What matters more may be larger.
        let mut weighed = vms;
        weighed[0].weight = 9.0;
        let planned = plan(&weighed, &terms(Some(45)));
        assert_eq!((planned.waves, planned.late), (vec![vec![0], vec![1], vec![2]], vec![1, 2]));
        let none = plan(&weighed, &terms(Some(2)));
        assert_eq!((none.waves.len(), none.late.len()), (3, 3));
        assert_eq!(plan(&[], &terms(Some(2))).waves, Vec::<Vec<usize>>::new());
    }

    proptest! {
        /// Everybody leaves, once; and those that are said to be out in time are, one by one as well as together.
        #[test]
        fn everybody_leaves_once(sizes in proptest::collection::vec(1u64..64 * GIB, 0..12), deadline in 1u64..600) {
            let vms = of(&sizes);
            let terms = terms(Some(deadline));
            let planned = plan(&vms, &terms);
            let mut leave: Vec<usize> = planned.waves.iter().flatten().copied().collect();
            let first: u64 = planned.waves.first().map_or(0, |wave| wave.iter().map(|at| sizes[*at]).sum());
            if planned.late.len() < sizes.len() {
                prop_assert!(time(first, planned.mode, &terms) <= Duration::from_secs(deadline));
            }
            // No other choice of as many and one more would fit.
            let mut sorted = sizes.clone();
            sorted.sort_unstable();
            let more: u64 = sorted.iter().take(sizes.len() - planned.late.len() + 1).sum();
            prop_assert!(planned.late.is_empty() || time(more, planned.mode, &terms) > Duration::from_secs(deadline));
            leave.sort_unstable();
            prop_assert_eq!(leave, (0..sizes.len()).collect::<Vec<_>>());
        }
    }
}

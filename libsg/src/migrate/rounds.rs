//! When to stop sending a VM that runs: the rule of rounds. Pure; time comes in.

use std::time::Duration;

use crate::report::Ended;

/// A round of less says nothing of the rate.
const MEASURED_BYTES: u64 = 1 << 20;

/// Rounds that leave no less than the best before them, until more are in vain.
const IN_VAIN: u8 = 2;

/// A round has to leave less than so many 16ths of what the best round before it left.
const SHRINKS_TO: u64 = 15;

/// How long rounds may go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Most rounds, the first one included, while the VM runs.
    pub rounds_max: u16,
    /// The VM is paused once what is left takes no longer than this.
    pub downtime: Duration,
}

/// The rounds so far.
#[derive(Debug)]
pub struct Convergence {
    rule: Rule,
    rounds: u16,
    bytes_per_s: Option<f64>,
    least: Option<u64>,
    in_vain: u8,
}

impl Convergence {
    /// Before the first round.
    #[must_use]
    pub const fn new(rule: Rule) -> Self {
        Self { rule, rounds: 0, bytes_per_s: None, least: None, in_vain: 0 }
    }

    /// A round of `sent` bytes took so long, and leaves `left` bytes that were written meanwhile. Says whether to pause
    /// the VM now; else there is another round.
    pub fn round_over(&mut self, sent: u64, took: Duration, left: u64) -> Option<Ended> {
        self.rounds = self.rounds.saturating_add(1);
        if (sent >= MEASURED_BYTES || self.bytes_per_s.is_none()) && !took.is_zero() {
            self.bytes_per_s = Some(sent as f64 / took.as_secs_f64());
        }
        if left == 0 || self.downtime(left).is_some_and(|time| time <= self.rule.downtime) {
            return Some(Ended::Converged);
        }
        if self.rounds >= self.rule.rounds_max {
            return Some(Ended::Cap);
        }
        let shrinks = self.least.is_none_or(|least| left < least / 16 * SHRINKS_TO);
        self.least = Some(self.least.map_or(left, |least| least.min(left)));
        self.in_vain = if shrinks { 0 } else { self.in_vain + 1 };
        (self.in_vain >= IN_VAIN).then_some(Ended::NotShrinking)
    }

    /// How long it takes to send so many bytes, at the rate of the last round that was long enough.
    fn downtime(&self, bytes: u64) -> Option<Duration> {
        let rate = self.bytes_per_s.filter(|rate| *rate > 0.0)?;
        Duration::try_from_secs_f64(bytes as f64 / rate).ok()
    }
}

#[cfg(test)]
mod test {
    use proptest::prelude::*;

    use super::*;

    const RULE: Rule = Rule { rounds_max: 30, downtime: Duration::from_millis(300) };
    const MIB: u64 = 1 << 20;

    #[test]
    fn rounds_go_on_until_what_is_left_fits_the_pause() {
        let mut rounds = Convergence::new(RULE);
        // 100 MiB/s: 30 MiB are 300 ms.
        assert_eq!(rounds.round_over(1000 * MIB, Duration::from_secs(10), 100 * MIB), None);
        assert_eq!(rounds.round_over(100 * MIB, Duration::from_secs(1), 31 * MIB), None);
        assert_eq!(rounds.round_over(31 * MIB, Duration::from_millis(310), 30 * MIB), Some(Ended::Converged));
    }

    #[test]
    fn a_short_round_is_no_measure_of_the_rate() {
        let mut rounds = Convergence::new(RULE);
        assert_eq!(rounds.round_over(1000 * MIB, Duration::from_secs(10), 100 * MIB), None);
        assert_eq!(rounds.round_over(MIB / 2, Duration::from_micros(10), 31 * MIB), None);
        assert_eq!(rounds.round_over(0, Duration::from_micros(10), 0), Some(Ended::Converged));
    }

    #[test]
    fn a_vm_that_writes_as_fast_as_it_is_sent_is_paused_all_the_same() {
        let mut rounds = Convergence::new(RULE);
        let mut round = |left| rounds.round_over(100 * MIB, Duration::from_secs(1), left * MIB);
        assert_eq!([round(100), round(101), round(60), round(59)], [None; 4]);
        assert_eq!(round(58), Some(Ended::NotShrinking));
        let mut rounds = Convergence::new(Rule { rounds_max: 1, ..RULE });
        assert_eq!(rounds.round_over(100 * MIB, Duration::from_secs(1), 50 * MIB), Some(Ended::Cap));
    }

    proptest! {
        #[test]
        fn they_end(seq in proptest::collection::vec((0_u64..1 << 40, 0_u64..100_000, 0_u64..1 << 40), 40), cap in 1_u16..40) {
            let mut rounds = Convergence::new(Rule { rounds_max: cap, ..RULE });
            let over = seq.iter().position(|(sent, ms, left)| {
                let over = rounds.round_over(*sent, Duration::from_millis(*ms), *left);
                assert!(*left > 0 || over == Some(Ended::Converged));
                over.is_some()
            });
            prop_assert!(over.is_some_and(|at| at < usize::from(cap)));
        }
    }
}

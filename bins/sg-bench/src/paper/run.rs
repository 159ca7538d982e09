//! Carries experiments out, round by round, and says how long it will still take. What is finished is in the store, and
//! is not run again.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::Result;

use super::experiment::{Experiment, seconds_expected};
use super::store::{Run, Store};
use crate::accept::runs::first_line;
use crate::cli::MigrateArgs;
use crate::ui::Ui;
use crate::{interrupt, valid};

/// An experiment that can be run.
pub struct Planned {
    /// Its words.
    pub experiment: Experiment,
    /// The same, understood.
    pub args: MigrateArgs,
}

/// What became of the experiments of one command.
#[derive(Default)]
pub struct Outcome {
    /// Experiments that have failed, and why.
    pub failed: BTreeMap<Experiment, String>,
    /// Pages were wrong or lost in some run, whether it was repeated or not.
    pub wrong: bool,
}

/// A measured run.
pub struct Measured {
    /// Why it was repeated.
    pub repeated: Vec<String>,
    /// Its report.
    pub report: serde_json::Value,
}

/// Runs what is missing: each experiment once, then each a second time, so that what drifts on the machine meets all
/// alike. `done` is called after each round, and `measure` does one.
///
/// # Errors
/// Interrupted; the disk does not take what was measured.
pub fn all(
    plan: &[Planned],
    (repeat, programs): (usize, &str),
    store: &mut Store,
    ui: &mut Ui,
    mut measure: impl FnMut(&Planned, &mut Outcome, &mut Ui) -> Result<Measured>,
    mut done: impl FnMut(&Store, &Outcome) -> Result<()>,
) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    let mut number = 0;
    let planned: usize = plan.iter().map(|one| repeat.saturating_sub(store.count(&one.experiment))).sum();
    for round in 1..=repeat {
        let mut ran = false;
        for one in plan {
            if store.count(&one.experiment) >= round || outcome.failed.contains_key(&one.experiment) {
                continue;
            }
            number += 1;
            let left = left_s(plan, repeat, store, &outcome);
            ui.begin(&format!("[{number} of {planned}, {} left] {}", span(left), one.experiment.0));
            let start = Instant::now();
            match measure(one, &mut outcome, ui) {
                Ok(Measured { repeated, report }) => {
                    let (experiment, programs) = (one.experiment.clone(), programs.to_owned());
                    let took_s = start.elapsed().as_secs_f64();
                    store.add(Run { experiment, programs, took_s, repeated, report })?;
                    ran = true;
                }
                Err(error) if error.is::<interrupt::Interrupted>() => {
                    done(store, &outcome)?;
                    return Err(error);
                }
                Err(error) => {
                    let why = first_line(&format!("{error:#}"));
                    ui.say(&format!("  FAILED, left out: {why}"));
                    outcome.failed.insert(one.experiment.clone(), why);
                }
            }
        }
        if ran {
            done(store, &outcome)?;
        }
    }
    Ok(outcome)
}

/// One run that counts: repeated while it does not.
///
/// # Errors
/// It could not be carried out, none counted, or it was interrupted.
pub fn measure(one: &Planned, outcome: &mut Outcome, ui: &mut Ui) -> Result<Measured> {
    let mut repeated = Vec::new();
    let report = valid::run(&one.args, ui, |invalid| {
        outcome.wrong |= invalid.wrong;
        repeated.push(invalid.why);
    })?;
    Ok(Measured { repeated, report: serde_json::to_value(report)? })
}

/// Seconds until everything has been run: by what the same experiments took, else by what is expected, put right
/// by how far the expectations were off.
pub fn left_s(plan: &[Planned], repeat: usize, store: &Store, outcome: &Outcome) -> f64 {
    let took = |one: &Planned| {
        let seconds: Vec<f64> = store.of(&one.experiment).map(|run| run.took_s).collect();
        (!seconds.is_empty()).then(|| seconds.iter().sum::<f64>() / seconds.len() as f64)
    };
    let known = plan.iter().filter_map(|one| Some((took(one)?, seconds_expected(&one.args))));
    let (took_s, expected_s) = known.fold((0.0, 0.0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
    let off = if expected_s > 0.0 { took_s / expected_s } else { 1.0 };
    let each = plan.iter().filter(|one| !outcome.failed.contains_key(&one.experiment)).map(|one| {
        let missing = repeat.saturating_sub(store.count(&one.experiment));
        missing as f64 * took(one).unwrap_or(seconds_expected(&one.args) * off)
    });
    each.sum()
}

/// `3 h 5 min`, `12 min`, `40 s`.
pub fn span(seconds: f64) -> String {
    let minutes = (seconds / 60.0).round() as u64;
    match minutes {
        0 | 1 => format!("{seconds:.0} s"),
        2..=119 => format!("{minutes} min"),
        _ => format!("{} h {} min", minutes / 60, minutes % 60),
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::paper::experiment::test::scale;
    use serde_json::json;

    fn plan() -> Vec<Planned> {
        let planned = |words: &str| {
            let experiment = scale().experiment(words);
            Planned { args: experiment.args().expect("in this build"), experiment }
        };
        ["--mode post-copy", "--vms 2", "--vms 3"].map(planned).into()
    }

    fn run_all(
        directory: &std::path::Path,
        repeat: usize,
        mut measure: impl FnMut(&Planned) -> Result<Measured>,
    ) -> Result<(Vec<usize>, Outcome)> {
        let mut store = Store::open(directory, "a")?;
        let plan = plan();
        let outcome =
            all(&plan, (repeat, "a"), &mut store, &mut Ui::new(), |one, _, _| measure(one), |_, _| Ok(()))?;
        Ok((plan.iter().map(|one| store.count(&one.experiment)).collect(), outcome))
    }

    fn good() -> Result<Measured> {
        Ok(Measured { repeated: Vec::new(), report: json!({"eviction_s": 1.0}) })
    }

    #[test]
    fn an_interrupted_command_goes_on_where_it_was() {
        let directory = tempfile::tempdir().expect("made");
        let mut order = Vec::new();
        let interrupted = run_all(directory.path(), 2, |one| {
            order.push(one.args.vms);
            if order.len() == 4 { Err(interrupt::Interrupted.into()) } else { good() }
        });
        assert!(interrupted.err().expect("interrupted").is::<interrupt::Interrupted>());
        let (counts, _) = run_all(directory.path(), 2, |one| {
            order.push(one.args.vms);
            good()
        })
        .expect("the rest");
        assert_eq!(order, [1, 2, 3, 1, 1, 2, 3], "round by round, and only the fourth twice");
        assert_eq!(counts, [2, 2, 2]);
        let (counts, _) = run_all(directory.path(), 2, |_| panic!("nothing is missing")).expect("nothing");
        assert_eq!(counts, [2, 2, 2]);
    }

    #[test]
    fn what_fails_is_left_out_until_the_next_time() {
        let directory = tempfile::tempdir().expect("made");
        let fails = |one: &Planned| if one.args.vms == 2 { Err(anyhow::anyhow!("no\nroom")) } else { good() };
        let (counts, outcome) = run_all(directory.path(), 2, fails).expect("the others");
        assert_eq!(counts, [2, 0, 2]);
        assert_eq!(outcome.failed.values().collect::<Vec<_>>(), ["no"]);
        assert_eq!(run_all(directory.path(), 2, |_| good()).expect("all").0, [2, 2, 2]);
    }

    #[test]
    fn time_left_learns_from_what_was_run() {
        let directory = tempfile::tempdir().expect("made");
        let mut store = Store::open(directory.path(), "a").expect("opens");
        let (plan, outcome) = (plan(), Outcome::default());
        let expected: Vec<f64> = plan.iter().map(|one| seconds_expected(&one.args)).collect();
        let before = left_s(&plan, 2, &store, &outcome);
        assert!((before - 2.0 * expected.iter().sum::<f64>()).abs() < 1e-6);
        let mut slow = crate::paper::store::test::run(&plan[0].experiment.0, "a", &Default::default());
        slow.took_s = expected[0] * 3.0;
        store.add(slow).expect("written");
        let left = left_s(&plan, 2, &store, &outcome);
        assert!((left - (3.0 * expected[0] + 6.0 * expected[1] + 6.0 * expected[2])).abs() < 1e-6);
        assert_eq!([span(40.4), span(600.0), span(11_100.0)], ["40 s", "10 min", "3 h 5 min"]);
    }
}

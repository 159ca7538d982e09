//! The runs behind the rows: each experiment several times, in turn with others; what is not valid is told and repeated.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Result, bail};
use libsg::report::{Report, Sample, Status};
use serde::Serialize;

use super::experiments::{Baseline, Experiment};
use crate::cli::MigrateArgs;
use crate::experiment::{self, check_valid, link_is_fit};
use crate::ui::Ui;
use crate::{interrupt, stream};

/// How often one run is repeated that was not valid.
pub const REPEATS_MAX: u32 = 3;

/// One run: its report, and its baseline's megabits a second.
#[derive(Serialize)]
pub struct Run {
    /// The migration.
    pub report: Report,
    /// The baseline, if it has one.
    pub baseline_mbps: Option<f64>,
    /// Page bytes that the destination had got from intermediaries when the source had evicted.
    pub gathered_at_evicted_bytes: Option<u64>,
}

impl Run {
    /// A run that counts. Its samples have done their work.
    fn new(mut report: Report, baseline_mbps: Option<f64>) -> Self {
        let samples = std::mem::take(&mut report.samples);
        let scattering = |sample: &&Sample| report.eviction_s.is_some_and(|end| sample.t_s <= end);
        let last = samples.iter().take_while(scattering).last();
        let gathered_at_evicted_bytes = last.and_then(|sample| sample.bytes.gathered);
        Self { report, baseline_mbps, gathered_at_evicted_bytes }
    }
}

/// A run that does not count.
#[derive(Serialize)]
pub struct Invalid {
    /// The experiment.
    pub experiment: &'static str,
    /// Why it does not count.
    pub why: String,
    /// Pages were wrong or lost: whatever the repeated run says, this was seen.
    pub wrong: bool,
}

/// The runs of each experiment.
#[derive(Default)]
pub struct Results {
    runs: BTreeMap<&'static str, std::result::Result<Vec<Run>, String>>,
    /// The runs that do not count.
    pub invalid: Vec<Invalid>,
}

impl Results {
    /// A figure of every run of an experiment.
    ///
    /// # Errors
    /// The experiment could not be run, or a run did not tell.
    pub fn each(&self, experiment: &str, of: impl Fn(&Run) -> Option<f64>) -> Result<Vec<f64>> {
        match self.runs.get(experiment) {
            Some(Ok(runs)) => match runs.iter().map(of).collect() {
                Some(values) => Ok(values),
                None => bail!("{experiment}: a run did not tell"),
            },
            Some(Err(why)) => bail!("{experiment}: {why}"),
            None => bail!("{experiment} was not run"),
        }
    }

    /// Whether the experiment was run, well or not.
    pub fn has(&self, experiment: &str) -> bool {
        self.runs.contains_key(experiment)
    }

    /// Every run that counts, without its samples: by experiment.
    pub fn all(&self) -> BTreeMap<&'static str, Vec<&Run>> {
        let good = |runs: &'_ std::result::Result<Vec<Run>, String>| runs.is_ok();
        let all = self.runs.iter().filter(|(_, runs)| good(runs));
        all.map(|(name, runs)| (*name, runs.iter().flatten().collect())).collect()
    }

    /// A B A B A B: what drifts on the machine meets all alike.
    ///
    /// # Errors
    /// Interrupted. What else goes wrong becomes part of the results.
    pub fn run(
        &mut self,
        experiments: &[Experiment],
        runs: u32,
        ui: &mut Ui,
        mut say_which: impl FnMut(&str) -> String,
    ) -> Result<()> {
        for round in 1..=runs {
            for experiment in experiments {
                // One that could not be run will not be the next time.
                if matches!(self.runs.get(experiment.name), Some(Err(_))) {
                    continue;
                }
                ui.begin(&say_which(&format!("{}, run {round} of {runs}", experiment.name)));
                let start = Instant::now();
                let done = self.run_valid(experiment, ui);
                ui.say(&format!("  took {:.0} s", start.elapsed().as_secs_f64()));
                match (done, self.runs.entry(experiment.name).or_insert_with(|| Ok(Vec::new()))) {
                    (Ok(run), Ok(runs)) => runs.push(run),
                    (Ok(_), Err(_)) => {}
                    (Err(error), _) if error.is::<interrupt::Interrupted>() => return Err(error),
                    (Err(error), entry) => *entry = Err(first_line(&format!("{error:#}"))),
                }
            }
        }
        Ok(())
    }

    /// Runs until a run is valid.
    fn run_valid(&mut self, experiment: &Experiment, ui: &mut Ui) -> Result<Run> {
        for _ in 0..=REPEATS_MAX {
            let baseline_mbps = match experiment.baseline {
                Baseline::Nothing => None,
                Baseline::FreshStream => {
                    Some(stream::into_fresh_memory_mbps(usize::try_from(experiment.args.vm.memory.0)?)?)
                }
            };
            let report = match experiment::run(&experiment.args, ui) {
                Ok(report) => report,
                Err(error) => {
                    ui.say(&format!("{}: {error:#}", experiment.name));
                    return Err(error);
                }
            };
            let Some(invalid) = invalid(experiment, &report) else {
                return Ok(Run::new(report, baseline_mbps));
            };
            ui.say(&format!("  INVALID, repeated: {}: {}", experiment.name, invalid.why));
            self.invalid.push(invalid);
        }
        bail!("no valid run out of {}", REPEATS_MAX + 1)
    }
}

/// Why a run does not count, if it does not.
fn invalid(experiment: &Experiment, report: &Report) -> Option<Invalid> {
    let (why, wrong) = doubt(&experiment.args, report)?;
    Some(Invalid { experiment: experiment.name, why, wrong })
}

/// Why a run does not count, if it does not; and whether pages were wrong or lost.
pub fn doubt(args: &MigrateArgs, report: &Report) -> Option<(String, bool)> {
    if let Err(error) = check_valid(report, args.until) {
        let lost = matches!(&report.status, Status::Failed(failure) if !failure.lost.is_empty());
        return Some((format!("{error:#}"), lost || report.guest.mismatches.is_some_and(|pages| pages > 0)));
    }
    if !link_is_fit(args, report) {
        let measured = report.link_mbps.unwrap_or(0.0);
        let (least, most) = (stream::BAND.start(), stream::BAND.end());
        let why = format!(
            "a link is outside {least} to {most} of what it is set to: {measured:.0} Mb/s, sinks {:.0?}",
            report.sinks_mbps
        );
        return Some((why, false));
    }
    None
}

/// What a chain of errors begins with.
pub fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::accept::experiments::{Family, of};
    use libsg::report::{Bytes, Guest};

    #[test]
    fn what_does_not_count_says_why() {
        let experiment = of(Family::Limited).remove(0);
        let guest =
            Guest { mismatches: Some(0), verified_pages: Some(9), fill_pages: Some(9), ..Guest::default() };
        let mut report = Report { guest, link_mbps: Some(950.0), ..Report::default() };
        assert!(invalid(&experiment, &report).is_none());
        report.link_mbps = Some(800.0);
        let link = invalid(&experiment, &report).expect("too slow");
        assert!(!link.wrong && link.why.contains("800 Mb/s"), "{}", link.why);
        report.guest.mismatches = Some(1);
        assert!(invalid(&experiment, &report).expect("a wrong page").wrong);
        report.guest = Guest { verified_pages: Some(8), ..guest };
        assert!(!invalid(&experiment, &report).expect("a page was not looked at").wrong);
    }

    #[test]
    fn what_was_gathered_while_the_source_scattered() {
        let at = |t_s, gathered| Sample {
            t_s,
            bytes: Bytes { gathered: Some(gathered), ..Bytes::default() },
            ..Sample::default()
        };
        let samples = vec![at(0.5, 1), at(1.9, 7), at(2.1, 9)];
        let run = Run::new(Report { eviction_s: Some(2.0), samples, ..Report::default() }, None);
        assert_eq!(run.gathered_at_evicted_bytes, Some(7));
        assert!(run.report.samples.is_empty());
    }

    #[test]
    fn figures_are_of_every_run_or_of_none() {
        let run = |s| Run::new(Report { eviction_s: s, ..Report::default() }, None);
        let mut results = Results::default();
        results.runs.insert("a", Ok(vec![run(Some(1.0)), run(Some(2.0))]));
        results.runs.insert("b", Ok(vec![run(Some(1.0)), run(None)]));
        results.runs.insert("c", Err("no room".into()));
        let eviction = |run: &Run| run.report.eviction_s;
        assert_eq!(results.each("a", eviction).expect("told"), [1.0, 2.0]);
        for (name, why) in [("b", "did not tell"), ("c", "no room"), ("d", "not run")] {
            assert!(results.each(name, eviction).expect_err("nothing").to_string().contains(why));
        }
        assert_eq!(results.all().len(), 2);
    }
}

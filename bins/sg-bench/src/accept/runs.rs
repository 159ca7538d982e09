//! The runs behind the rows: each experiment several times, in turn with others; what is not valid is told and repeated.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use libsg::report::{Report, Sample, Status};
use serde::Serialize;

use super::experiments::{Baseline, Experiment};
use crate::cli::MigrateArgs;
use crate::experiment::{self, Unfit, check_valid, link_is_fit};
use crate::lab::{Lab, Node};
use crate::stream::Cost;
use crate::ui::Ui;
use crate::{interrupt, stream};

/// How often one run is repeated that was not valid.
pub const REPEATS_MAX: u32 = 3;
/// How often links are built and measured again that were not what they were set to. It takes seconds.
const LINKS_MAX: u32 = 8;

/// One run: its report, and what a plain stream did.
#[derive(Serialize)]
pub struct Run {
    /// The migration.
    pub report: Report,
    /// The baseline, if it has one.
    pub baseline: Option<Cost>,
    /// Page bytes that the destination had got from intermediaries when the source had evicted.
    pub gathered_at_evicted_bytes: Option<u64>,
}

impl Run {
    /// A run that counts. Its samples have done their work.
    pub fn new(mut report: Report, baseline: Option<Cost>) -> Self {
        let samples = std::mem::take(&mut report.samples);
        let scattering = |sample: &&Sample| report.eviction_s.is_some_and(|end| sample.t_s <= end);
        let last = samples.iter().take_while(scattering).last();
        let gathered_at_evicted_bytes = last.and_then(|sample| sample.bytes.gathered);
        Self { report, baseline, gathered_at_evicted_bytes }
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

/// The runs of one experiment, by round: those of one round were neighbours in time.
type Rounds = Vec<std::result::Result<Run, String>>;

/// The runs of each experiment.
#[derive(Default)]
pub struct Results {
    rounds: BTreeMap<&'static str, Rounds>,
    /// The runs that do not count.
    pub invalid: Vec<Invalid>,
}

/// No run of a round was valid. The next round's may be.
#[derive(Debug)]
struct NoneValid(String);

impl std::fmt::Display for NoneValid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "no valid run: {}", self.0)
    }
}

impl std::error::Error for NoneValid {}

impl Results {
    /// A figure by round; nothing of rounds without a run that counts.
    ///
    /// # Errors
    /// The experiment was not run, no run counts, or one that does did not tell.
    pub fn each(&self, experiment: &str, of: impl Fn(&Run) -> Option<f64>) -> Result<Vec<Option<f64>>> {
        let Some(rounds) = self.rounds.get(experiment) else { bail!("{experiment} was not run") };
        let mut why = None;
        let mut values = Vec::new();
        for round in rounds {
            values.push(match round {
                Ok(run) => Some(of(run).with_context(|| format!("{experiment}: a run did not tell"))?),
                Err(error) => {
                    why = Some(error);
                    None
                }
            });
        }
        match why {
            Some(why) if values.iter().all(Option::is_none) => bail!("{experiment}: {why}"),
            _ => Ok(values),
        }
    }

    /// How many rounds some of these experiments were not run in, and why not in the last of them.
    pub fn gaps(&self, experiments: &[&'static str]) -> Option<String> {
        let all = || experiments.iter().filter_map(|name| self.rounds.get(name)).flatten();
        let why = all().filter_map(|round| round.as_ref().err()).next_back()?;
        let count = all().filter(|round| round.is_err()).count();
        Some(format!("{count} of {} runs do not count: {why}", all().count()))
    }

    /// Whether the experiment was run, well or not.
    pub fn has(&self, experiment: &str) -> bool {
        self.rounds.contains_key(experiment)
    }

    /// Every run that counts, without its samples: by experiment.
    pub fn all(&self) -> BTreeMap<&'static str, Vec<&Run>> {
        self.rounds.iter().map(|(name, rounds)| (*name, rounds.iter().flatten().collect())).collect()
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
        let mut impossible = Vec::new();
        for round in 1..=runs {
            for experiment in experiments {
                // One that could not be run will not be the next time.
                if impossible.contains(&experiment.name) {
                    continue;
                }
                ui.begin(&say_which(&format!("{}, run {round} of {runs}", experiment.name)));
                let start = Instant::now();
                let done = self.run_valid(experiment, ui);
                ui.say(&format!("  took {:.0} s", start.elapsed().as_secs_f64()));
                let done = match done {
                    Ok(run) => Ok(run),
                    Err(error) if error.is::<interrupt::Interrupted>() => return Err(error),
                    Err(error) => {
                        if !error.is::<NoneValid>() {
                            impossible.push(experiment.name);
                        }
                        Err(first_line(&format!("{error:#}")))
                    }
                };
                self.rounds.entry(experiment.name).or_default().push(done);
            }
        }
        Ok(())
    }

    /// Runs until a run is valid.
    fn run_valid(&mut self, experiment: &Experiment, ui: &mut Ui) -> Result<Run> {
        let (mut invalid_runs, mut unfit_links) = (0, 0);
        loop {
            let baseline = baseline(experiment)?;
            let invalid = match experiment::run_on_fit_links(&experiment.args, ui) {
                Ok(report) => {
                    let Some(invalid) = invalid(experiment, &report) else {
                        return Ok(Run::new(report, baseline));
                    };
                    invalid_runs += 1;
                    invalid
                }
                Err(error) if error.is::<Unfit>() => {
                    unfit_links += 1;
                    Invalid { experiment: experiment.name, why: error.to_string(), wrong: false }
                }
                Err(error) => {
                    ui.say(&format!("{}: {error:#}", experiment.name));
                    return Err(error);
                }
            };
            ui.say(&format!("  INVALID, repeated: {}: {}", experiment.name, invalid.why));
            let why = invalid.why.clone();
            self.invalid.push(invalid);
            if invalid_runs > REPEATS_MAX || unfit_links > LINKS_MAX {
                bail!(NoneValid(why));
            }
        }
    }
}

/// A plain stream as long as the VM's memory.
fn baseline(experiment: &Experiment) -> Result<Option<Cost>> {
    let args = &experiment.args;
    let bytes = usize::try_from(args.vm.memory.0)?;
    Ok(match experiment.baseline {
        Baseline::Nothing => None,
        Baseline::FreshStream => Some(stream::into_fresh_memory(bytes)?),
        Baseline::ShapedStream => {
            let lab = Lab::create(&args.lab_spec())?;
            Some(stream::into_fresh_memory_of(&lab, Node::Source, Node::Intermediary(1), bytes)?)
        }
    })
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
    fn figures_are_of_every_round_that_counts() {
        let run = |s| Ok(Run::new(Report { eviction_s: s, ..Report::default() }, None));
        let mut results = Results::default();
        results.rounds.insert("a", vec![run(Some(1.0)), run(Some(2.0))]);
        results.rounds.insert("b", vec![run(Some(1.0)), run(None)]);
        results.rounds.insert("c", vec![Err("no room".into())]);
        results.rounds.insert("e", vec![run(Some(1.0)), Err("link".into()), run(Some(3.0))]);
        let eviction = |run: &Run| run.report.eviction_s;
        assert_eq!(results.each("a", eviction).expect("told"), [Some(1.0), Some(2.0)]);
        assert_eq!(results.each("e", eviction).expect("told"), [Some(1.0), None, Some(3.0)]);
        for (name, why) in [("b", "did not tell"), ("c", "no room"), ("d", "not run")] {
            assert!(results.each(name, eviction).expect_err("nothing").to_string().contains(why));
        }
        assert_eq!(results.gaps(&["a"]), None);
        assert_eq!(results.gaps(&["a", "e"]).as_deref(), Some("1 of 5 runs do not count: link"));
        assert_eq!(results.all().values().map(Vec::len).sum::<usize>(), 6);
    }
}

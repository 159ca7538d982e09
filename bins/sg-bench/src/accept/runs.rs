//! The runs behind the rows: each experiment several times, in turn with others; what is not valid is told and repeated.

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use libsg::report::{Report, Sample};
use serde::Serialize;

use super::experiments::Experiment;
use crate::ui::Ui;
use crate::valid::{Invalid, NoneValid};
use crate::{interrupt, stream, valid};

/// One run: its report, and what a plain stream did.
#[derive(Serialize)]
pub struct Run {
    /// The migration.
    pub report: Report,
    /// A plain stream's throughput, if the experiment has one beside it.
    pub fresh_stream_mbps: Option<f64>,
    /// Page bytes that the destination had got from intermediaries when the source had evicted.
    pub gathered_at_evicted_bytes: Option<u64>,
}

impl Run {
    /// A run that counts. Its samples have done their work.
    pub fn new(mut report: Report, fresh_stream_mbps: Option<f64>) -> Self {
        let samples = std::mem::take(&mut report.samples);
        let scattering = |sample: &&Sample| report.eviction_s.is_some_and(|end| sample.t_s <= end);
        let last = samples.iter().take_while(scattering).last();
        let gathered_at_evicted_bytes = last.and_then(|sample| sample.bytes.gathered);
        Self { report, fresh_stream_mbps, gathered_at_evicted_bytes }
    }
}

/// A run that does not count.
#[derive(Serialize)]
pub struct Repeated {
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
    pub invalid: Vec<Repeated>,
}

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
        let fresh_stream_mbps = fresh_stream_mbps(experiment)?;
        let repeated = |Invalid { why, wrong }| {
            self.invalid.push(Repeated { experiment: experiment.name, why, wrong });
        };
        let report = valid::run(&experiment.args, ui, repeated)
            .inspect_err(|error| ui.say(&format!("{}: {error:#}", experiment.name)))?;
        Ok(Run::new(report, fresh_stream_mbps))
    }
}

/// A plain stream as long as the VM's memory.
fn fresh_stream_mbps(experiment: &Experiment) -> Result<Option<f64>> {
    let bytes = usize::try_from(experiment.args.vm.memory.0)?;
    experiment.fresh_stream.then(|| Ok(stream::into_fresh_memory(bytes)?.mbps)).transpose()
}

/// What a chain of errors begins with.
pub fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod test {
    use super::*;
    use libsg::report::Bytes;

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

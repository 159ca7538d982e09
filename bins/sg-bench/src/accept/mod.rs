//! `sg-bench accept`: the rows of the acceptance table. Ratios within one run, medians of interleaved runs.

mod rows;

use std::collections::BTreeMap;
use std::time::Instant;

use anyhow::{Result, bail};
use libsg::report::Report;

use crate::cli::{AcceptArgs, MigrateArgs};
use crate::experiment::{self, check_valid, link_is_fit};
use crate::ui::Ui;
use crate::{interrupt, stats, stream};

use rows::{Part, Row};

/// Runs of each experiment.
const RUNS: usize = 3;
/// How often a run is repeated whose link did not measure what it was set to.
const REPEATS_MAX: usize = 3;

/// One experiment, run several times in turn with others.
pub struct Variant {
    /// What it is called in messages and in [`Results`].
    pub name: &'static str,
    /// How it is run.
    pub args: MigrateArgs,
    /// What else is measured in each of its runs.
    pub baseline: Baseline,
}

/// A measurement without a VM, made next to each run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Baseline {
    /// None.
    Nothing,
    /// One plain TCP stream over loopback, as long as the VM's memory, into fresh memory.
    FreshStream,
}

/// One run: its report, and its baseline's megabits a second.
pub struct Run {
    /// The migration.
    pub report: Report,
    /// The baseline, if it has one.
    pub baseline_mbps: Option<f64>,
}

/// The runs of each variant.
#[derive(Default)]
pub struct Results(BTreeMap<&'static str, std::result::Result<Vec<Run>, String>>);

impl Results {
    /// A figure of every run of a variant.
    ///
    /// # Errors
    /// The variant could not be run, or a run did not tell.
    pub fn each(&self, variant: &str, of: impl Fn(&Run) -> Option<f64>) -> Result<Vec<f64>> {
        match self.0.get(variant) {
            Some(Ok(runs)) => match runs.iter().map(of).collect() {
                Some(values) => Ok(values),
                None => bail!("{variant}: a run did not tell"),
            },
            Some(Err(why)) => bail!("{variant}: {why}"),
            None => bail!("{variant} was not run"),
        }
    }
}

/// Runs the rows asked for, prints each as soon as it is known; 0 when all pass.
pub fn run(args: &AcceptArgs) -> Result<u8> {
    let rows: Vec<Row> = rows::all()
        .into_iter()
        .filter(|row| args.row.is_empty() || args.row.iter().any(|name| name == row.name))
        .collect();
    if args.list {
        for row in &rows {
            println!("{:20} {}", row.name, row.what);
        }
        return Ok(0);
    }
    for name in &args.row {
        if !rows.iter().any(|row| row.name == name) {
            bail!("there is no row {name:?}: see --list");
        }
    }
    let (mut results, mut ui, mut failed) = (Results::default(), Ui::new(), false);
    println!("{:34} {:>16} {:>10}  {:17} ", "row", "want", "got", "spread");
    for row in &rows {
        for family in row.families {
            // Everything that any row wants of a family is run in turn with the rest of it.
            let mut missing = rows::variants(*family);
            missing.retain(|variant| !results.0.contains_key(variant.name) && wanted(&rows, variant.name));
            run_interleaved(&missing, args.runs.unwrap_or(RUNS), &mut results, &mut ui)?;
        }
        for part in &row.parts {
            failed |= !print(row, part, &results);
        }
    }
    Ok(u8::from(failed))
}

/// Whether any of the rows asked for needs the variant.
fn wanted(rows: &[Row], variant: &str) -> bool {
    rows.iter().any(|row| row.uses(variant))
}

/// A B A B A B: what drifts on the machine meets all alike.
fn run_interleaved(variants: &[Variant], runs: usize, results: &mut Results, ui: &mut Ui) -> Result<()> {
    for round in 1..=runs {
        for variant in variants {
            let begun = results.0.entry(variant.name).or_insert_with(|| Ok(Vec::new()));
            // A variant that failed once has failed.
            let Ok(done) = begun else { continue };
            ui.begin(&format!("{}, run {round} of {runs}", variant.name));
            let start = Instant::now();
            match run_fit(variant, ui) {
                Ok(run) => done.push(run),
                Err(error) if error.is::<interrupt::Interrupted>() => return Err(error),
                Err(error) => {
                    ui.say(&format!("{}: {error:#}", variant.name));
                    *begun = Err(first_line(&format!("{error:#}")));
                }
            }
            tracing::info!("{} took {:.1} s", variant.name, start.elapsed().as_secs_f64());
        }
    }
    Ok(())
}

/// Runs until the link measures what it was set to.
fn run_fit(variant: &Variant, ui: &mut Ui) -> Result<Run> {
    for _ in 0..=REPEATS_MAX {
        let baseline_mbps = match variant.baseline {
            Baseline::Nothing => None,
            Baseline::FreshStream => {
                Some(stream::into_fresh_memory_mbps(usize::try_from(variant.args.vm.memory.0)?)?)
            }
        };
        let report = experiment::run(&variant.args, ui)?;
        check_valid(&report, variant.args.until)?;
        if link_is_fit(&variant.args, &report) {
            return Ok(Run { report, baseline_mbps });
        }
        ui.say(&format!(
            "  repeated: the link measured {:.0} Mb/s, outside 0.93 to 0.97 of what it is set to",
            report.link_mbps.unwrap_or(0.0)
        ));
    }
    bail!("the link did not measure 0.93 to 0.97 of what it is set to in {} runs", REPEATS_MAX + 1)
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

/// Prints one line, tells whether it passes.
fn print(row: &Row, part: &Part, results: &Results) -> bool {
    let name = if part.name.is_empty() { row.name.to_owned() } else { format!("{} {}", row.name, part.name) };
    match (part.values)(results) {
        Ok(values) => {
            let got = stats::median(&values).unwrap_or(f64::NAN);
            let (least, most) = stats::spread(&values).unwrap_or((f64::NAN, f64::NAN));
            let passes = part.want.holds(got);
            let spread = format!("{least:.3} to {most:.3}");
            let verdict = if passes { "pass" } else { "FAIL" };
            println!("{name:34} {:>16} {got:>10.3}  {spread:17} {verdict}", part.want.to_string());
            passes
        }
        Err(error) => {
            println!("{name:34} {:>16} {:>10}  {:17} FAIL ({error:#})", part.want.to_string(), "-", "");
            false
        }
    }
}

//! `sg-bench accept`: the rows of the acceptance table. Ratios within one run, medians of interleaved runs.

mod experiments;
mod figures;
mod rows;
mod rounds;
pub mod runs;
mod stock;

use std::time::Instant;

use anyhow::{Result, bail};
use serde::Serialize;
use serde_json::json;

use crate::cli::AcceptArgs;
use crate::stats;
use crate::ui::{Table, Ui};

use experiments::Experiment;
pub use rows::Want;
use rows::{Part, Row};
use runs::Results;

/// Whose rows need a stock QEMU of a certain version: they are made only when they are named.
const STOCK: u8 = 6;

/// Exit codes: a row failed; a page was wrong or lost in some run.
const FAILED: u8 = 1;
const WRONG: u8 = 3;

/// Runs the rows asked for, prints each as soon as it is known; 0 when all pass.
pub fn run(args: &AcceptArgs) -> Result<u8> {
    let rows = chosen(args)?;
    if args.list {
        list(&rows, args.runs);
        return Ok(0);
    }
    let (begun, mut results, mut ui) = (Instant::now(), Results::default(), Ui::new());
    let table = Table::beside(args.json.as_deref());
    let mut told = Vec::new();
    let planned = planned(&rows) * args.runs;
    let mut number = 0;
    table.say(&Line::head());
    for row in &rows {
        let start = Instant::now();
        for missing in missing(&rows, row, &results) {
            results.run(&missing, args.runs, &mut ui, |what| {
                number += 1;
                format!("[{number} of {planned}, {:.0} s] {what}", begun.elapsed().as_secs_f64())
            })?;
        }
        // Some rows run what they need when they are asked for their values.
        let lines: Vec<Line> = row.parts.iter().map(|part| Line::of(row, part, &results)).collect();
        let took_s = start.elapsed().as_secs_f64();
        for (at, line) in lines.iter().enumerate() {
            table.say(&line.text((at == 0).then_some(took_s)));
        }
        told.push(Told { row: row.name, what: row.what, took_s, lines });
    }
    let took_s = begun.elapsed().as_secs_f64();
    conclude(args, &table, &told, &results, took_s)
}

/// Which rows there are, and what each takes; what rows share is run once for all of them.
fn list(rows: &[Row], runs: u32) {
    let minutes = |rows: &[&Row]| {
        let all = rows.iter().flat_map(|row| row.families.iter().map(move |family| (row, family)));
        let mut once: Vec<Experiment> = Vec::new();
        for (row, family) in all {
            let experiments = experiments::of(*family).into_iter();
            let wanted = experiments.filter(|experiment| row.uses(experiment.name));
            for experiment in wanted {
                if !once.iter().any(|other| other.name == experiment.name) {
                    once.push(experiment);
                }
            }
        }
        f64::from(once.iter().map(Experiment::about_s).sum::<u32>() * runs) / 60.0
    };
    for row in rows {
        println!("issue {}  {:18} {:5.1} min  {}", row.issue, row.name, minutes(&[row]), row.what);
    }
    let all: Vec<&Row> = rows.iter().collect();
    println!("about {:.0} minutes in all, for {runs} runs of each experiment", minutes(&all));
}

/// The rows asked for, in the order of the table.
fn chosen(args: &AcceptArgs) -> Result<Vec<Row>> {
    let mut rows = rows::all();
    if let Some(name) = args.row.iter().find(|name| !rows.iter().any(|row| row.name == **name)) {
        bail!("there is no row {name:?}: see --list");
    }
    rows.retain(|row| args.row.is_empty() || args.row.iter().any(|name| name == row.name));
    rows.retain(|row| match args.issue {
        Some(issue) => issue == row.issue,
        None => !args.row.is_empty() || row.issue != STOCK,
    });
    Ok(rows)
}

/// What a row still needs, family by family: of each everything that any row wants, to be run in turn.
fn missing(rows: &[Row], row: &Row, results: &Results) -> Vec<Vec<Experiment>> {
    let wanted = |experiment: &Experiment| rows.iter().any(|row| row.uses(experiment.name));
    let of = |family| {
        let mut missing = experiments::of(family);
        missing.retain(|experiment| !results.has(experiment.name) && wanted(experiment));
        missing
    };
    row.families.iter().map(|family| of(*family)).filter(|family| !family.is_empty()).collect()
}

/// How many experiments the rows need.
fn planned(rows: &[Row]) -> u32 {
    let mut names: Vec<_> =
        rows.iter().flat_map(|row| &row.parts).flat_map(|part| &part.experiments).collect();
    names.sort_unstable();
    names.dedup();
    names.len() as u32
}

/// A row with its figures.
#[derive(Serialize)]
struct Told {
    row: &'static str,
    what: &'static str,
    took_s: f64,
    lines: Vec<Line>,
}

/// One figure against what is wanted.
#[derive(Serialize)]
pub struct Line {
    name: String,
    want: String,
    got: Option<f64>,
    values: Vec<f64>,
    passes: bool,
    why: Option<String>,
}

impl Line {
    fn of(row: &Row, part: &Part, results: &Results) -> Self {
        let name = format!("{} {}", row.name, part.name).trim_end().to_owned();
        Self::new(name, part.want, ((part.values)(results), results.gaps(&part.experiments)), stats::median)
    }

    /// Of values, or why there are none, and what is missing among them; `by` makes one of them.
    pub fn new(
        name: String,
        want: Want,
        (values, gaps): (Result<Vec<f64>>, Option<String>),
        by: impl Fn(&[f64]) -> Option<f64>,
    ) -> Self {
        let (values, why) = match values {
            Ok(values) => (values, gaps),
            Err(error) => (Vec::new(), Some(format!("{error:#}"))),
        };
        let got = by(&values);
        let passes = got.is_some_and(|got| want.holds(got));
        Self { name, want: want.to_string(), got, values, passes, why }
    }

    /// Whether it is what is wanted.
    pub const fn passes(&self) -> bool {
        self.passes
    }

    /// What stands above lines.
    pub fn head() -> String {
        format!("{:32} {:>12} {:>9}  {:18} {:>7}  verdict", "row", "want", "got", "spread", "took")
    }

    /// For people.
    pub fn text(&self, took_s: Option<f64>) -> String {
        let got = self.got.map_or("-".to_owned(), |got| format!("{got:.3}"));
        let spread = stats::spread(&self.values)
            .map_or(String::new(), |(least, most)| format!("{least:.3} to {most:.3}"));
        let took = took_s.map_or(String::new(), |s| format!("{s:.0} s"));
        let verdict = if self.passes { "pass" } else { "FAIL" };
        let why = self.why.as_ref().map_or(String::new(), |why| format!(" ({why})"));
        format!("{:32} {:>12} {got:>9}  {spread:18} {took:>7}  {verdict}{why}", self.name, self.want)
    }
}

/// What was repeated, how long it took, the JSON, and the exit code.
fn conclude(
    args: &AcceptArgs,
    table: &Table<'_>,
    told: &[Told],
    results: &Results,
    took_s: f64,
) -> Result<u8> {
    for invalid in &results.invalid {
        let wrong = if invalid.wrong { "WRONG PAGES" } else { "repeated" };
        table.say(&format!("{wrong}: a run of {}: {}", invalid.experiment, invalid.why));
    }
    let failed = told.iter().flat_map(|row| &row.lines).filter(|line| !line.passes).count();
    let wrong = results.invalid.iter().any(|invalid| invalid.wrong);
    table.say(&format!("{failed} figures FAIL; {:.1} minutes", took_s / 60.0));
    if args.json.is_some() {
        let all = json!({
            "rows": told, "invalid": results.invalid, "runs": results.all(), "took_s": took_s,
            "passes": failed == 0 && !wrong,
        });
        table.write(&all)?;
    }
    Ok(match (wrong, failed) {
        (true, _) => WRONG,
        (false, 0) => 0,
        (false, _) => FAILED,
    })
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn each_experiment_is_run_once_for_all_rows() {
        let rows = rows::all();
        let results = Results::default();
        let missing: Vec<_> = rows.iter().flat_map(|row| missing(&rows, row, &results)).flatten().collect();
        let mut names: Vec<_> = missing.iter().map(|experiment| experiment.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len() as u32, planned(&rows));
        let pause: Vec<Row> = rows::all().into_iter().filter(|row| row.name == "pause").collect();
        let alone = super::missing(&pause, &pause[0], &results);
        let names: Vec<_> = alone.iter().flatten().map(|experiment| experiment.name).collect();
        assert_eq!(names, ["fast", "slow"], "post-copy is not needed");
    }

    #[test]
    fn a_line_says_what_was_wanted_and_what_was_got() {
        let rows = rows::all();
        let line = Line::of(&rows[0], &rows[0].parts[0], &Results::default());
        assert!(
            !line.passes && line.text(None).ends_with("FAIL (limited was not run)"),
            "{}",
            line.text(None)
        );
        let line = Line { got: Some(1.01), values: vec![1.0, 1.01, 1.02], passes: true, why: None, ..line };
        let text = line.text(Some(61.0));
        assert!(text.starts_with("eviction-limited ") && text.ends_with("61 s  pass"), "{text}");
        assert!(text.contains("<= 1.05") && text.contains("1.000 to 1.020"), "{text}");
    }
}

//! The rows of RDMA, from what guests have measured: `ci/rxe accept`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::{Value, json};

use crate::accept::{Line, Want};
use crate::stats;
use crate::ui::Table;

/// Of a chunk: what may be leased and unused on each link. A hundredth of what these migrations stage is less.
const CHUNK_SLOTS: f64 = 512.0;

/// Processor time is counted in so many ticks a second.
const TICKS_PER_S: f64 = 100.0;

/// The rows, of a directory that `ci/rxe accept` has left.
#[derive(Args, Clone, Debug)]
pub struct RowsArgs {
    /// Where the guests left what they measured
    pub directory: PathBuf,
    /// Where the rows go, - for standard output (the table then goes to standard error)
    #[arg(long, value_name = "PATH")]
    pub json: Option<PathBuf>,
}

/// Prints them; 0 when all pass.
pub fn run(args: &RowsArgs) -> Result<u8> {
    let table = Table::beside(args.json.as_deref());
    let lines = lines(&args.directory)?;
    table.say(&Line::head());
    lines.iter().for_each(|line| table.say(&line.text(None)));
    let failed = lines.iter().filter(|line| !line.passes()).count();
    table.say(&format!("{failed} figures FAIL"));
    table.write(&json!({ "schema": 1, "rows": lines, "passes": failed == 0 }))?;
    Ok(u8::from(failed > 0))
}

fn lines(directory: &Path) -> Result<Vec<Line>> {
    let bench = read(&directory.join("perftest.json"))?;
    let beside = |what: &str, figure: &str, bytes: u64| over_perftest(&bench, (what, figure, bytes));
    let tcp = migrations(directory, "tcp")?;
    let rdma = migrations(directory, "rdma")?;
    // The first is the one that fills the arena.
    let cpu =
        rdma.iter().zip(&tcp).skip(1).map(|(rdma, tcp)| rdma.cpu_s_per_gib / tcp.cpu_s_per_gib).collect();
    let each = |of: fn(&Migration) -> f64| Ok(rdma.iter().map(of).collect::<Vec<f64>>());
    let worst = |values: &[f64]| values.iter().copied().reduce(f64::max);
    let line = |name: &str, want, values| Line::new(name.to_owned(), want, (values, None), stats::median);
    let line_of_worst = |name: &str, want, values| Line::new(name.to_owned(), want, (values, None), worst);
    Ok(vec![
        line("rdma-write", Want::AtLeast(0.85), beside("write", "bandwidth", 64 << 10)),
        line("rdma-read", Want::AtLeast(0.85), beside("read", "bandwidth", 64 << 10)),
        line("rdma-fault", Want::AtMost(1.5), beside("read", "latency", 4 << 10)),
        line("rdma-cpu", Want::AtMost(0.05), Ok(cpu)),
        line_of_worst("rdma-touched", Want::AtMost(0.0), each(|migration| migration.touched_bytes)),
        line_of_worst("rdma-leases", Want::AtMost(CHUNK_SLOTS), each(|migration| migration.leased_slots)),
    ])
}

/// A line of `sg-bench rdma`: the ratio in each round.
fn over_perftest(bench: &Value, (what, figure, bytes): (&str, &str, u64)) -> Result<Vec<f64>> {
    let lines = bench["lines"].as_array().context("no lines")?;
    let line =
        lines.iter().find(|line| line["what"] == what && line["figure"] == figure && line["bytes"] == bytes);
    let line = line.with_context(|| format!("the {figure} of a {what} of {bytes} bytes was not measured"))?;
    let values = |key: &str| {
        let values = line[key].as_array().context("no values")?;
        values.iter().map(|value| value.as_f64().context("no number")).collect::<Result<Vec<f64>>>()
    };
    let (ours, theirs) = (values("values")?, values("perftest")?);
    let ran = ours.len() == theirs.len() && theirs.iter().all(|value| *value > 0.0 && value.is_finite());
    ensure!(ran, "perftest did not run beside it");
    Ok(ours.iter().zip(&theirs).map(|(ours, theirs)| ours / theirs).collect())
}

/// What one migration took of the intermediaries.
#[derive(Debug, PartialEq)]
struct Migration {
    cpu_s_per_gib: f64,
    touched_bytes: f64,
    leased_slots: f64,
}

fn migrations(directory: &Path, transport: &str) -> Result<Vec<Migration>> {
    let names = (0..).map(|number| format!("{transport}-{number}"));
    let there = names.take_while(|name| directory.join(format!("{name}.after.ticks")).exists());
    let found = there.map(|name| migration(directory, &name)).collect::<Result<Vec<_>>>()?;
    ensure!(found.len() > 1, "there were no two migrations by {transport}");
    Ok(found)
}

fn migration(directory: &Path, name: &str) -> Result<Migration> {
    let sum = |moment: &str, key: &str| -> Result<f64> {
        let status = read(&directory.join(format!("{name}.{moment}.status.json")))?;
        let nodes = status["nodes"].as_array().context("no nodes")?;
        let values = nodes.iter().map(|node| node[key].as_f64().with_context(|| format!("{name}: no {key}")));
        values.sum()
    };
    let ticks = |moment: &str| -> Result<f64> {
        let path = directory.join(format!("{name}.{moment}.ticks"));
        let text = std::fs::read_to_string(&path).with_context(|| format!("no {}", path.display()))?;
        text.split_whitespace().map(|ticks| Ok(ticks.parse::<f64>()?)).sum()
    };
    let during = |key: &str| Ok::<f64, anyhow::Error>(sum("after", key)? - sum("before", key)?);
    let staged_bytes = during("bytes_in")?;
    ensure!(staged_bytes > 0.0, "{name}: nothing went to intermediaries");
    let gib = staged_bytes / f64::from(1 << 30);
    Ok(Migration {
        cpu_s_per_gib: (ticks("after")? - ticks("before")?) / TICKS_PER_S / gib,
        touched_bytes: during("touched_bytes")?,
        leased_slots: sum("evicted", "leased_slots")?,
    })
}

fn read(path: &Path) -> Result<Value> {
    let text = std::fs::read_to_string(path).with_context(|| format!("no {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is no JSON", path.display()))
}

#[cfg(test)]
mod test {
    use super::*;

    fn left_by_guests(touched_bytes: u64) -> tempfile::TempDir {
        let directory = tempfile::tempdir().expect("a directory");
        let write =
            |name: &str, text: String| std::fs::write(directory.path().join(name), text).expect("written");
        let line = |what: &str, figure: &str, bytes: u64, values: [f64; 3]| json!({ "what": what, "figure": figure, "bytes": bytes, "values": values, "perftest": [10.0, 10.0, 10.0] });
        let lines = [
            line("write", "bandwidth", 65536, [9.0, 8.0, 9.5]),
            line("read", "bandwidth", 65536, [8.0, 8.0, 9.0]),
            line("read", "latency", 4096, [12.0, 13.0, 14.0]),
        ];
        write("perftest.json", json!({ "lines": lines }).to_string());
        for (number, transport, ticks) in [(0, "tcp", 900), (0, "rdma", 90), (1, "tcp", 200), (1, "rdma", 8)]
        {
            let status = |bytes_in: u64, touched: u64| {
                let node = json!({ "bytes_in": bytes_in, "touched_bytes": touched, "leased_slots": 1 });
                json!({ "nodes": [node, node] }).to_string()
            };
            let name = format!("{transport}-{number}");
            write(&format!("{name}.before.status.json"), status(100, 50));
            write(&format!("{name}.evicted.status.json"), status(200, 50));
            write(&format!("{name}.after.status.json"), status(100 + (1 << 29), 50 + touched_bytes));
            write(&format!("{name}.before.ticks"), "10 20\n".to_owned());
            write(&format!("{name}.after.ticks"), format!("{} 20\n", 10 + ticks));
        }
        directory
    }

    #[test]
    fn rows_are_computed_round_by_round() {
        let directory = left_by_guests(0);
        let lines = lines(directory.path()).expect("rows");
        let passes: Vec<bool> = lines.iter().map(Line::passes).collect();
        assert_eq!(passes, [true, false, true, true, true, true]);
        let texts: Vec<String> = lines.iter().map(|line| line.text(None)).collect();
        assert!(texts[0].starts_with("rdma-write ") && texts[0].contains(" 0.900 "), "{}", texts[0]);
        assert!(texts[3].contains(" 0.040 "), "the second migration's: {}", texts[3]);
        assert!(texts[5].contains(" 2.000 "), "{}", texts[5]);
        let touched = left_by_guests(4096);
        assert!(!super::lines(touched.path()).expect("rows")[4].passes());
    }

    #[test]
    fn what_is_missing_is_said() {
        let directory = left_by_guests(0);
        std::fs::remove_file(directory.path().join("rdma-1.evicted.status.json")).expect("was there");
        let error = lines(directory.path()).err().expect("nothing to compute");
        assert!(format!("{error:#}").contains("rdma-1.evicted"), "{error:#}");
    }
}

//! How many instructions the pure cores take for all pages of a VM of 256 MiB, counted by valgrind: on a busy machine
//! as on a quiet one. What is expected is in `instructions.txt` beside this file; who is above it fails.
//!
//! ```text
//! ci/instructions                 # compare; or: cargo bench -p sg-benches --bench instructions [-- --update]
//! ci/instructions --update        # write what is counted now, for a change that costs what it is worth
//! ```
//!
//! A count depends on the compiler, and a little on what processor valgrind finds (the checksum picks its way by
//! it). With another compiler than the one that counted, it is told and nothing fails.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::hint::black_box;
use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail, ensure};
use libsg::ids::{Checksum, Generation, MemberIndex, Placement, Round, SlotIndex, VolumeId};
use libsg::latency::LatencyHistogram;
use libsg::limits::BATCH_PAGES;
use libsg::pace::RateFinder;
use libsg::page::{PAGE_BYTES_U64, PageIndex};
use libsg::server::index::Index;
use libsg::server::slots::Slots;
use libsg::wire::run::{RunEntry, decode_runs, encode_runs};
use libsg::wire::{IndexEntry, PageEntry};
use sg_benches::pure;

/// What is expected.
const EXPECTED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/instructions.txt");

/// How far a count may be off. Hash tables are seeded at random, and where memory lies is too.
const TOLERANCE: f64 = 0.02;

/// The argument under which this program does the work, to be counted.
const WORK: &str = "--work";

/// Pages whose bytes are looked at: all would take valgrind too long.
const LOOKED_AT: u32 = 1024;

/// What is inside is counted, call by call: valgrind knows this function by its name.
#[inline(never)]
fn measured(work: &mut dyn FnMut()) {
    work();
}

/// Does the work, and prints what it is, in the order of the counts.
fn work() -> Result<()> {
    let one = |name: &str, work: &mut dyn FnMut()| {
        println!("{name}");
        measured(work);
    };
    let mut planner = pure::planner();
    one("planner: next, stored, indexed", &mut || pure::plan(black_box(&mut planner)));

    let (mut tracker, entries) = (pure::tracker(), pure::entries());
    one("tracker: announce, claim, installed", &mut || pure::track(black_box(&mut tracker), &entries));

    let (mut index, mut found) = (Index::default(), Vec::new());
    one("index: put", &mut || pure::fill(black_box(&mut index), &entries));
    one("index: locate", &mut || pure::locate(black_box(&index), &mut found));

    let (mut slots, volume) = (Slots::new(u64::from(pure::PAGES) * PAGE_BYTES_U64), VolumeId(1));
    slots.open(volume);
    one("slots: allocate, store, free", &mut || pure::take_and_free(black_box(&mut slots), volume));

    tables("page", |page| PageEntry::raw(PageIndex(page), Round(0), Checksum(page)))?;
    // Every seventh is missing: runs with gaps.
    tables("index", |at| {
        let page = at + at / 6;
        let placement =
            Placement { member: MemberIndex(1), slot: SlotIndex(page), generation: Generation(1) };
        IndexEntry::at(PageIndex(page), Round(0), placement, Checksum(page))
    })?;

    let memory = sg_benches::filled(LOOKED_AT)?;
    let each = |look: &dyn Fn(PageIndex)| (0..LOOKED_AT).for_each(|page| look(PageIndex(page)));
    one("page: zero check", &mut || each(&|page| drop(black_box(memory.is_zero(page)))));
    one("page: checksum", &mut || each(&|page| drop(black_box(memory.checksum(page)))));

    let mut finder = RateFinder::new();
    one("rate finder: 1000 readings", &mut || pure::find_rate(black_box(&mut finder)));
    let mut histogram = LatencyHistogram::new();
    one("histogram: record, percentiles", &mut || pure::record(black_box(&mut histogram)));
    Ok(())
}

/// Tables of all pages, a batch at a time.
fn tables<E: RunEntry>(name: &str, entry: impl Fn(u32) -> E) -> Result<()> {
    let entries: Vec<E> = (0..pure::PAGES).map(entry).collect();
    let mut encoded = vec![(0, Vec::new()); entries.len() / BATCH_PAGES];
    println!("{name} table: encode");
    measured(&mut || {
        for (batch, (runs, table)) in entries.chunks(BATCH_PAGES).zip(&mut encoded) {
            *runs = encode_runs(black_box(batch).iter().copied(), table);
        }
    });
    let (mut decoded, mut good) = (Vec::new(), true);
    println!("{name} table: decode");
    measured(&mut || {
        good = encoded.iter().all(|(runs, table)| decode_runs::<E>(table, *runs, &mut decoded).is_ok());
    });
    ensure!(good, "a table that was encoded does not decode");
    Ok(())
}

/// Instructions of each piece of work, in order.
fn count() -> Result<Vec<(String, u64)>> {
    let directory = tempfile::tempdir()?;
    let out = directory.path().join("counts");
    let this = std::env::current_exe()?;
    let told = Command::new("valgrind")
        .args(["--tool=callgrind", "--toggle-collect=*measured*", "--dump-after=*measured*"])
        .arg(format!("--callgrind-out-file={}", out.display()))
        .arg(&this)
        .arg(WORK)
        .output()
        .context("valgrind cannot be run (ci/setup installs it)")?;
    ensure!(told.status.success(), "valgrind: {}", String::from_utf8_lossy(&told.stderr));
    let names = String::from_utf8(told.stdout)?;
    let counted = |(number, name): (usize, &str)| {
        let text = fs::read_to_string(format!("{}.{}", out.display(), number + 1))?;
        let totals = text.lines().find_map(|line| line.strip_prefix("totals: "));
        let instructions = totals.context("a dump without a total")?.trim().parse()?;
        Ok((name.to_owned(), instructions))
    };
    names.lines().enumerate().map(counted).collect()
}

/// `rustc --version` of whoever built this.
fn compiler() -> Result<String> {
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let told = Command::new(rustc).arg("--version").output().context("rustc cannot be run")?;
    Ok(String::from_utf8(told.stdout)?.trim().to_owned())
}

/// What is expected: the compiler, then a count and a name on each line.
fn expected() -> Result<(String, BTreeMap<String, u64>)> {
    let text = fs::read_to_string(EXPECTED).with_context(|| format!("{EXPECTED} (--update writes it)"))?;
    let mut lines = text.lines();
    let compiler = lines.next().context("no compiler is named")?.to_owned();
    let line = |line: &str| {
        let (count, name) = line.trim().split_once(' ').context("a line is a count and a name")?;
        Ok((name.trim().to_owned(), count.parse()?))
    };
    Ok((compiler, lines.map(line).collect::<Result<_>>()?))
}

fn write(compiler: &str, counts: &[(String, u64)]) -> Result<()> {
    let mut text = format!("{compiler}\n");
    for (name, count) in counts {
        writeln!(text, "{count:>12} {name}")?;
    }
    Ok(fs::write(EXPECTED, text)?)
}

/// Prints each beside what is expected; the names of those that got worse.
fn compare(counts: &[(String, u64)], expected: &BTreeMap<String, u64>) -> Vec<String> {
    let mut worse = Vec::new();
    for (name, count) in counts {
        let change = expected.get(name).map(|before| *count as f64 / *before as f64 - 1.0);
        let verdict = match change {
            None => "not expected: --update".to_owned(),
            Some(change) if change > TOLERANCE => format!("{:+.1} % WORSE", change * 100.0),
            Some(change) if change < -TOLERANCE => format!("{:+.1} % better: --update", change * 100.0),
            Some(change) => format!("{:+.1} %", change * 100.0),
        };
        println!("{count:>12} {name:38} {verdict}");
        if change.is_none_or(|change| change > TOLERANCE) {
            worse.push(name.clone());
        }
    }
    worse
}

fn run() -> Result<()> {
    if std::env::args().any(|argument| argument == WORK) {
        return work();
    }
    let compiler = compiler()?;
    let counts = count()?;
    if std::env::args().any(|argument| argument == "--update") {
        write(&compiler, &counts)?;
        println!("{} written", Path::new(EXPECTED).display());
        return Ok(());
    }
    let (counted_by, expected) = expected()?;
    let worse = compare(&counts, &expected);
    if counted_by != compiler {
        println!("not compared: expected counts are of {counted_by}, here is {compiler} (--update)");
    } else if !worse.is_empty() {
        bail!("more instructions than expected: {}", worse.join("; "));
    }
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("instructions: {error:#}");
            ExitCode::FAILURE
        }
    }
}

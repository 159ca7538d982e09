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
use std::process::{Child, Command, ExitCode, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use libsg::ids::{Checksum, Generation, MemberIndex, Placement, Round, SlotIndex, VolumeId};
use libsg::latency::LatencyHistogram;
use libsg::limits::BATCH_PAGES;
use libsg::memory::GuestMemory;
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

/// The argument under which this program does a piece of work, to be counted.
const WORK: &str = "--work";

/// Pages whose bytes are looked at: all would take valgrind too long.
const LOOKED_AT: u32 = 1024;

type Piece = fn() -> Result<()>;

/// Every piece of work: what it is called, and what sets it up and does it.
const PIECES: [(&str, Piece); 13] = [
    ("planner: next, stored, indexed", planner),
    ("tracker: announce, claim, installed", tracker),
    ("index: put", || index(true)),
    ("index: locate", || index(false)),
    ("slots: allocate, store, free", slots),
    ("page table: encode", || tables(pages, true)),
    ("page table: decode", || tables(pages, false)),
    ("index table: encode", || tables(places, true)),
    ("index table: decode", || tables(places, false)),
    ("page: zero check", || each_page(|memory, page| memory.is_zero(page).is_ok())),
    ("page: checksum", || each_page(|memory, page| memory.checksum(page).is_ok())),
    ("rate finder: 1000 readings", rate_finder),
    ("histogram: record, percentiles", histogram),
];

/// What is inside is counted: valgrind knows this function by its name.
#[inline(never)]
fn measured(work: &mut dyn FnMut()) {
    work();
}

fn planner() -> Result<()> {
    let mut planner = pure::planner();
    measured(&mut || pure::plan(black_box(&mut planner)));
    Ok(())
}

fn tracker() -> Result<()> {
    let (mut tracker, entries) = (pure::tracker(), pure::entries());
    measured(&mut || pure::track(black_box(&mut tracker), &entries));
    Ok(())
}

fn index(put: bool) -> Result<()> {
    let (mut index, entries, mut found) = (Index::default(), pure::entries(), Vec::new());
    let mut fill = || pure::fill(black_box(&mut index), &entries);
    if put {
        measured(&mut fill);
    } else {
        fill();
        measured(&mut || pure::locate(black_box(&index), &mut found));
    }
    Ok(())
}

fn slots() -> Result<()> {
    let (mut slots, volume) = (Slots::new(u64::from(pure::PAGES) * PAGE_BYTES_U64), VolumeId(1));
    slots.open(volume, None);
    measured(&mut || pure::take_and_free(black_box(&mut slots), volume));
    Ok(())
}

fn pages(number: u32) -> PageEntry {
    PageEntry::raw(PageIndex(number), Round(0), Checksum(number))
}

/// Every seventh page is missing: runs with gaps.
fn places(number: u32) -> IndexEntry {
    let page = number + number / 6;
    let placement = Placement { member: MemberIndex(1), slot: SlotIndex(page), generation: Generation(1) };
    IndexEntry::at(PageIndex(page), Round(0), placement, Checksum(page))
}

/// Tables of all pages, a batch at a time.
fn tables<E: RunEntry>(entry: fn(u32) -> E, encode: bool) -> Result<()> {
    let entries: Vec<E> = (0..pure::PAGES).map(entry).collect();
    let mut tables = vec![(0, Vec::new()); entries.len() / BATCH_PAGES];
    let mut fill = || {
        for (batch, (runs, table)) in entries.chunks(BATCH_PAGES).zip(&mut tables) {
            *runs = encode_runs(black_box(batch).iter().copied(), table);
        }
    };
    if encode {
        measured(&mut fill);
        return Ok(());
    }
    fill();
    let (mut decoded, mut good) = (Vec::new(), true);
    measured(&mut || {
        good = tables.iter().all(|(runs, table)| decode_runs::<E>(table, *runs, &mut decoded).is_ok());
    });
    ensure!(good, "a table that was encoded does not decode");
    Ok(())
}

fn each_page(look: fn(&GuestMemory, PageIndex) -> bool) -> Result<()> {
    let memory = sg_benches::filled(LOOKED_AT)?;
    let mut good = true;
    measured(&mut || good = (0..LOOKED_AT).all(|page| look(black_box(&memory), PageIndex(page))));
    ensure!(good, "a page inside the memory is not found");
    Ok(())
}

fn rate_finder() -> Result<()> {
    let mut finder = RateFinder::new();
    measured(&mut || pure::find_rate(black_box(&mut finder)));
    Ok(())
}

fn histogram() -> Result<()> {
    let mut histogram = LatencyHistogram::new();
    measured(&mut || pure::record(black_box(&mut histogram)));
    Ok(())
}

/// Has a piece of work counted.
fn start(name: &str) -> Result<Child> {
    Command::new("valgrind")
        .args(["--tool=callgrind", "--toggle-collect=*measured*", "--callgrind-out-file=/dev/null"])
        .arg(std::env::current_exe()?)
        .args([WORK, name])
        .stderr(Stdio::piped())
        .spawn()
        .context("valgrind cannot be run (ci/setup installs it)")
}

/// The count that valgrind told last of all.
fn finish(counted: Child) -> Result<u64> {
    let told = counted.wait_with_output()?;
    let text = String::from_utf8_lossy(&told.stderr);
    let count = text.lines().find_map(|line| line.split_once("Collected : ")?.1.trim().parse().ok());
    count.filter(|_| told.status.success()).with_context(|| format!("valgrind does not count: {text}"))
}

/// Instructions of each piece of work. Two at once: counts do not mind.
fn count() -> Result<Vec<(String, u64)>> {
    let mut counts = Vec::new();
    for pair in PIECES.chunks(2) {
        let started = pair.iter().map(|(name, _)| start(name)).collect::<Result<Vec<_>>>()?;
        for ((name, _), counted) in pair.iter().zip(started) {
            counts.push(((*name).to_owned(), finish(counted).with_context(|| (*name).to_owned())?));
        }
    }
    Ok(counts)
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
    if let Some(name) = std::env::args().skip_while(|argument| argument != WORK).nth(1) {
        let piece = PIECES.iter().find(|(known, _)| *known == name);
        return piece.context("no such piece of work")?.1();
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

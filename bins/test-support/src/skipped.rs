//! Parts of tests that this machine cannot do.

use std::fmt::Display;
use std::fs::File;
use std::io::Write as _;

/// Says that a part of this test is left out, and why: on standard error, which `cargo test` shows for a test that
/// fails only, and as a line of the file that `SG_SKIPPED` names, which `ci/check` prints at its end.
///
/// # Panics
/// That file cannot be written: what is left out would go unsaid.
#[allow(clippy::print_stderr)]
pub fn skipped(part: &str, why: impl Display) {
    let thread = std::thread::current();
    let line = format!("{}, {part}: {why}\n", thread.name().unwrap_or("a test"));
    eprint!("SKIPPED {line}");
    if let Some(path) = std::env::var_os("SG_SKIPPED") {
        // One write, at the end of the file: tests run beside each other.
        let told = File::options().append(true).create(true).open(&path);
        let told = told.and_then(|mut file| file.write_all(line.as_bytes()));
        told.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}

/// Huge pages of 2 MiB that nobody has or has a claim to.
#[must_use]
pub fn free_huge_pages() -> u64 {
    let read = |file: &str| {
        let text = std::fs::read_to_string(format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{file}"));
        text.ok().and_then(|text| text.trim().parse::<u64>().ok()).unwrap_or(0)
    };
    read("free_hugepages").saturating_sub(read("resv_hugepages"))
}

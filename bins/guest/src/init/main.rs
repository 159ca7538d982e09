//! The only program of a guest: fills memory, changes it, checks what is in it, and beats on the console.
//!
//! ```text
//! beat 17 writes=5120 passes=2 wrong=0       every 50 ms; passes: how often every page was looked at
//! wrong page=812 word=0 words=512            a page is not what was written there last
//! ```
//!
//! The kernel's command line says how much it does: `guest_mib`, `guest_writes` (pages a second), `guest_checks` (likewise),
//! `guest_threads`.

mod pages;

use std::io::Write as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use pages::{Pages, next};

const BEAT: Duration = Duration::from_millis(50);

/// Between two turns of a thread.
const TURN: Duration = Duration::from_millis(10);

/// What all threads have done, and found.
#[derive(Default)]
struct Counts {
    writes: AtomicU64,
    wrong: AtomicU64,
}

fn main() {
    let number = |name: &str, otherwise: u64| {
        std::env::var(name).ok().and_then(|value| value.parse().ok()).unwrap_or(otherwise)
    };
    let threads = number("guest_threads", 1).max(1);
    let pages = number("guest_mib", 64) * 256 / threads;
    let a_turn = |a_second: u64| a_second * TURN.as_millis() as u64 / 1000 / threads;
    let each = (a_turn(number("guest_writes", 3000)), a_turn(number("guest_checks", 20_000)));
    let counts = Arc::<Counts>::default();
    let begin = |thread: u64| {
        let (counts, passes) = (Arc::clone(&counts), Arc::<AtomicU64>::default());
        let tells = Arc::clone(&passes);
        let first = (thread * pages) as u32;
        std::thread::spawn(move || work(Pages::new(first, pages as usize), each, &counts, &tells));
        passes
    };
    let passes: Vec<_> = (0..threads).map(begin).collect();
    for beat in 0_u64.. {
        let (writes, wrong) = (counts.writes.load(Relaxed), counts.wrong.load(Relaxed));
        let passes = passes.iter().map(|passes| passes.load(Relaxed)).min().unwrap_or(0);
        say(format_args!("beat {beat} writes={writes} passes={passes} wrong={wrong}"));
        std::thread::sleep(BEAT);
    }
}

/// Writes pages at random, and looks at them in order.
fn work(mut pages: Pages, (writes, checks): (u64, u64), counts: &Counts, passes: &AtomicU64) {
    let look = |pages: &Pages, page: usize| {
        if let Some((word, words)) = pages.wrong(page) {
            counts.wrong.fetch_add(1, Relaxed);
            say(format_args!("wrong page={} word={word} words={words}", pages.number(page)));
        }
    };
    let (mut state, mut at) = (u64::from(pages.number(0)), 0);
    loop {
        for _ in 0..writes {
            let page = (next(&mut state) % pages.len() as u64) as usize;
            look(&pages, page);
            pages.write(page);
            counts.writes.fetch_add(1, Relaxed);
        }
        for _ in 0..checks {
            look(&pages, at);
            at = (at + 1) % pages.len();
            if at == 0 {
                passes.fetch_add(1, Relaxed);
            }
        }
        std::thread::sleep(TURN);
    }
}

/// One line on the console, at once.
fn say(line: std::fmt::Arguments) {
    let line = format!("{line}\n");
    // There is nobody to be told that nobody can be told.
    let _ = std::io::stdout().lock().write_all(line.as_bytes());
}

//! Fuzz targets on the stable toolchain: valid bytes, mutated by seed.
//!
//! `SG_FUZZ_SECONDS` says for how long (half a second a target without it), `SG_FUZZ_SEED` with which seed.

use std::collections::BTreeSet;
use std::fs;
use std::hash::{BuildHasher as _, RandomState};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// A target: its name, what it does with bytes, and valid ones to begin with.
pub type Target = (&'static str, fn(&[u8]), fn() -> Vec<Vec<u8>>);

/// Runs each of them for its time.
///
/// # Panics
/// When one does, with what repeats it.
pub fn no_bytes_break(targets: &[Target]) {
    let number = |name: &str| std::env::var(name).ok().and_then(|value| value.parse::<u64>().ok());
    let each = number("SG_FUZZ_SECONDS")
        .map_or(Duration::from_millis(500), |seconds| Duration::from_secs(seconds) / targets.len() as u32);
    let seed = number("SG_FUZZ_SEED").unwrap_or_else(|| RandomState::new().hash_one(0));
    for (name, target, corpus) in targets {
        let corpus = corpus();
        corpus.iter().for_each(|bytes| target(bytes));
        let (mut mutator, start, mut runs) = (Mutator(seed), Instant::now(), 0_u64);
        while start.elapsed() < each {
            for _ in 0..64 {
                let bytes = mutator.mutated(&corpus);
                if catch_unwind(AssertUnwindSafe(|| target(&bytes))).is_err() {
                    panic!("target {name}, SG_FUZZ_SEED={seed}, run {runs}: {bytes:02x?}");
                }
                runs += 1;
            }
        }
        eprintln!("{name}: {runs} runs, seed {seed}");
        assert!(runs > 0);
    }
}

/// Holds the targets against the fuzz crate in `directory`, whose library is called `library`: its functions, its
/// binaries, and what those call.
///
/// # Panics
/// When one of them is missing in another.
pub fn are_binaries(targets: &[Target], directory: &Path, library: &str) {
    let read =
        |path: PathBuf| fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let manifest = read(directory.join("Cargo.toml"));
    let bins: Vec<&str> = manifest
        .split("[[bin]]\n")
        .skip(1)
        .filter_map(|bin| bin.strip_prefix("name = \"")?.split_once('"').map(|(name, _)| name))
        .collect();
    let functions = read(directory.join("src/targets.rs"));
    let functions =
        functions.lines().filter_map(|line| line.strip_prefix("pub fn ")?.split_once("(data: &[u8])"));
    let functions: BTreeSet<&str> = functions.map(|(name, _)| name).collect();
    let targets: BTreeSet<&str> = targets.iter().map(|(name, ..)| *name).collect();
    assert_eq!(targets, functions);
    assert_eq!(targets, bins.iter().copied().collect());
    for name in bins {
        assert!(manifest.contains(&format!("path = \"fuzz_targets/{name}.rs\"")), "{name}");
        let call = format!("{library}::targets::{name}(data)");
        assert!(read(directory.join(format!("fuzz_targets/{name}.rs"))).contains(&call), "{call}");
    }
}

/// Numbers that sit at the edges of what decoders check.
const EDGES: [u8; 8] = [0, 1, 2, 0x10, 0x7f, 0x80, 0xfe, 0xff];

/// Mutates by a seed (splitmix64).
struct Mutator(u64);

impl Mutator {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut word = self.0;
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        word ^ (word >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    fn mutated(&mut self, corpus: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = corpus[self.below(corpus.len())].clone();
        for _ in 0..=self.below(4) {
            let at = self.below(bytes.len());
            match self.below(7) {
                0 if !bytes.is_empty() => bytes[at] ^= 1 << self.below(8),
                1 if !bytes.is_empty() => bytes[at] = EDGES[self.below(EDGES.len())],
                2 => bytes.truncate(at),
                3 => bytes.insert(at, self.next() as u8),
                4 if !bytes.is_empty() => drop(bytes.remove(at)),
                5 => {
                    let other = &corpus[self.below(corpus.len())];
                    let from = self.below(other.len());
                    bytes.truncate(at);
                    bytes.extend_from_slice(&other[from..]);
                }
                _ => {
                    let edge = EDGES[self.below(EDGES.len())];
                    bytes.iter_mut().skip(at).take(4).for_each(|byte| *byte = edge);
                }
            }
        }
        bytes
    }
}

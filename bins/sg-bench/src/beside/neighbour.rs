//! A memory-hungry neighbour: ranks who influences whom in a synthetic graph, as TunkRank does, again and again. A
//! pass touches four fifths of its memory; the rest is what was loaded once, as such programs have it.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use libsg::units::Size;

use super::told::{Pass, now_ns, tell};

/// Whom each vertex follows.
const FOLLOWS: usize = 16;
/// A vertex's edges, its rank, and its next one.
const VERTEX_BYTES: u64 = (FOLLOWS * 4 + 8) as u64;
/// How likely an influenced one passes it on.
const PASSED_ON: f32 = 0.2;
/// A pass begins that much after the last one began, or as soon as it is done. Without end they would take the
/// processors, which the hosts of an experiment share, and not only the memory, which is what is meant.
const PERIOD: Duration = Duration::from_secs(1);

/// Ranks until it is killed, or nobody listens to what it prints.
pub fn run(memory: Size, seed: u64, procs: Option<&Path>) -> Result<()> {
    if let Some(procs) = procs {
        std::fs::write(procs, std::process::id().to_string())
            .with_context(|| format!("cannot enter {}", procs.display()))?;
    }
    // The processors are everybody's, and in a real pool they are not its neighbours'.
    rustix::process::nice(19)?;
    let mut graph = Graph::random(memory, seed);
    let loaded = vec![1_u8; (memory.0 / 5) as usize];
    loop {
        let start_ns = now_ns();
        graph.rank();
        let end_ns = now_ns();
        if tell(&Pass { end_ns, took_ns: end_ns - start_ns }).is_err() {
            // Until here it was there.
            drop(std::hint::black_box(loaded));
            return Ok(());
        }
        std::thread::sleep(PERIOD.saturating_sub(Duration::from_nanos(end_ns - start_ns)));
    }
}

/// A graph and the ranks of its vertices.
struct Graph {
    follows: Vec<[u32; FOLLOWS]>,
    influence: Vec<f32>,
    next: Vec<f32>,
}

impl Graph {
    /// Some are followed by many, most by few.
    fn random(memory: Size, seed: u64) -> Self {
        let vertices = memory.0 / 5 * 4 / VERTEX_BYTES;
        let mut state = seed.wrapping_mul(2).wrapping_add(1);
        let mut whom = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let share = (state >> 40) as f64 / (1_u64 << 24) as f64;
            (share * share * vertices as f64) as u32
        };
        let follows: Vec<_> = (0..vertices).map(|_| std::array::from_fn(|_| whom())).collect();
        let zero = vec![0.0; follows.len()];
        Self { follows, influence: zero.clone(), next: zero }
    }

    /// One pass: each gives those it follows their share of its attention, and of its own influence.
    fn rank(&mut self) {
        self.next.fill(0.0);
        for (follows, influence) in self.follows.iter().zip(&self.influence) {
            let share = (1.0 + PASSED_ON * influence) / FOLLOWS as f32;
            for whom in follows {
                if let Some(next) = self.next.get_mut(*whom as usize) {
                    *next += share;
                }
            }
        }
        std::mem::swap(&mut self.influence, &mut self.next);
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn influence_converges_and_four_fifths_of_the_memory_are_gone_over() {
        let memory = Size(1 << 20);
        let mut graph = Graph::random(memory, 7);
        let touched = graph.follows.len() as u64 * VERTEX_BYTES;
        assert!((touched as f64 / memory.0 as f64 - 0.8).abs() < 0.001);
        let total = |graph: &Graph| graph.influence.iter().map(|rank| f64::from(*rank)).sum::<f64>();
        for _ in 0..20 {
            graph.rank();
        }
        // What n give, and hand on: n / (1 - p).
        let want = graph.follows.len() as f64 / (1.0 - f64::from(PASSED_ON));
        assert!((total(&graph) / want - 1.0).abs() < 0.01, "{} {want}", total(&graph));
        assert!(graph.influence[0] > graph.influence[graph.influence.len() / 2]);
    }
}

//! The rows about stock QEMUs: all of the same runs, which are made when the first figure is asked for.

use libsg::report::Report;

use super::rounds::Rounds;
use super::rows::{Row, Want};
use crate::stock::{self, Round};
use Want::{AtLeast, AtMost};

/// Rounds: each figure is of neighbours in time.
const ROUNDS: u32 = 3;

/// The rows of issue 6.
pub fn rows() -> Vec<Row> {
    let rounds = Rounds::of(|| stock::compare(ROUNDS));
    let row = |name, what, parts| Row { issue: 6, name, what, families: Vec::new(), parts };
    let part = |name: &str, want, of: fn(&Round) -> Option<f64>| rounds.part(name, want, of);
    vec![
        row(
            "qemu-eviction",
            "total of QEMU's own post-copy, and pre-copy, / our eviction; 1 GiB, 3,000 writes a second, destination at 256 Mb/s",
            vec![
                part("post-copy", AtLeast(3.5), |r| Some(total(&r.slow_post_copy)? / r.slow.eviction_s?)),
                part("pre-copy", AtLeast(5.0), |r| Some(total(&r.slow_pre_copy)? / r.slow.eviction_s?)),
            ],
        ),
        row(
            "qemu-bound",
            "the same runs: eviction / bytes at the link's rate",
            vec![part("", AtMost(1.10), |r| Some(r.slow.eviction_s? / r.slow.line_rate_bound_s?))],
        ),
        row(
            "qemu-total",
            "the same runs: until the destination has everything / QEMU's own post-copy",
            vec![part("", AtMost(1.05), |r| Some(total(&r.slow)? / total(&r.slow_post_copy)?))],
        ),
        row(
            "qemu-gap",
            "longest gap between the guest's heartbeats / with QEMU's own post-copy, all links at 1 Gb/s",
            vec![part("", AtMost(0.5), |r| Some(gap(&r.fast)? / gap(&r.fast_post_copy)?))],
        ),
        row(
            "qemu-cpu",
            "processor time a GiB of sg evict, and of sg gather, / of a socat that QEMU's own post-copy goes through",
            vec![
                part("relay", AtMost(1.5), |r| {
                    Some(r.fast.cpu_s_per_gib.source? / r.socat.cpu_s_per_gib.source?)
                }),
                part("feeder", AtMost(1.5), |r| {
                    Some(r.fast.cpu_s_per_gib.destination? / r.socat.cpu_s_per_gib.source?)
                }),
            ],
        ),
    ]
}

fn total(report: &Report) -> Option<f64> {
    report.total_migration_s
}

fn gap(report: &Report) -> Option<f64> {
    report.guest.longest_pause_ms
}

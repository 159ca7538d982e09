//! The paper's figures 1, 2 and 9 to 15, and its table 1.
//!
//! "Scatter-Gather Live Migration of Virtual Machines", Umesh Deshpande, Danny Chan, Steven Chan, Kartik Gopalan,
//! Nilton Bila, IEEE Transactions on Cloud Computing 6(1), 2018. Table 1 and the eviction times of figure 12
//! are the paper's own numbers; of the other figures the text has single ones (49 s in figure 9, 52 and 328 s in
//! figure 1), the rest is read off the drawn curves, to a second.
//!
//! What is alike everywhere: the links' 1 Gb/s, one intermediary where the paper has one, memory full of pages
//! that are not zero, six runs and their mean. What differs everywhere:
//! - VMs are smaller ([`Scale`]), and so is every host's memory; times shrink with them, rates do not.
//! - All hosts are network namespaces of one machine, which do not share a link but do share its processors.
//! - A busy VM writes random pages, 10,000 a second; in the paper it runs TunkRank, or Redis under YCSB.
//! - The two 5 GB VMs at the destination (TunkRank, some 4 GB of pressure each) are two neighbours that rank a
//!   graph in as much memory, four fifths of it touched each second, at the lowest priority for processors.
//! - The destination's memory is a limit on the VM and its neighbours together, with a swap file behind it; in the
//!   paper it is the host's, less what its system and its hypervisors take.
//! - Pre-copy and post-copy are those of this library, over the same code as scatter-gather; QEMU 1.6's and
//!   Yabusame's in the paper.

use super::experiment::{Experiment, Scale, VM_GB};
use super::figure::{
    EVICTION, Figure, IDLE_MEDIAN_LATENCY, IDLE_P95_LATENCY, Kind, Look, MEDIAN_LATENCY, MODES, Measure,
    P95_LATENCY, Point, SENT, Series, TOTAL,
};

/// The destinations of figures 1, 9 and 10.
const HOSTS_GB: [f64; 5] = [12.0, 13.0, 14.0, 15.0, 16.0];
/// The destination of figures 2, 11, 13 and 14.
const BIG_HOST_GB: f64 = 26.0;
const VMS: [f64; 5] = [1.0, 2.0, 3.0, 4.0, 5.0];
/// VMs whose memory nobody writes.
const IDLE: &str = "--workload idle";
/// VMs that write all of their memory.
const BUSY: &str = "--workload random --write-rate 10000";
/// Gather limit, and rate limit, of table 1.
const LIMIT: &str = "--gather-limit 256mbit";

const HOST_MEMORY: &str = "destination host's memory in the paper, GB";
const NUMBER: &str = "number of VMs";

/// All of them, in the paper's order.
pub fn all(scale: &Scale) -> Vec<Figure> {
    vec![
        figure_1(scale),
        figure_2(scale),
        figure_9(scale),
        figure_10(scale),
        figure_11(scale),
        figure_12(scale),
        table_1(scale),
        figure_13(scale),
        figure_14(scale),
        figure_15(scale),
    ]
}

fn figure_1(scale: &Scale) -> Figure {
    let mut series = Vec::new();
    let paper: [[f64; 5]; 4] = [
        [44.0, 44.0, 44.0, 44.0, 44.0],
        [45.0, 45.0, 45.0, 45.0, 45.0],
        [328.0, 173.0, 124.0, 105.0, 52.0],
        [309.0, 200.0, 146.0, 110.0, 50.0],
    ];
    for (busy, paper) in [(false, &paper[..2]), (true, &paper[2..])] {
        for ((mode, name, look), paper) in MODES.into_iter().zip(paper) {
            let look = if busy { look } else { look.dashed() };
            let name = format!("{name}, destination {}", if busy { "busy" } else { "idle" });
            series.push(of(&name, look, EVICTION, &HOSTS_GB, Some(paper), |gb| {
                let host = if busy { busy_host(scale, gb) } else { host(scale, gb) };
                scale.experiment(&format!("--mode {mode} {IDLE} {host}"))
            }));
        }
    }
    Figure {
        name: "fig1",
        title: "Figure 1: eviction of an idle VM by pre-copy and post-copy",
        shows: "The problem: with two busy VMs at the destination the eviction time of an idle VM grows sixfold as \
                the host's memory shrinks from 16 to 12 GB; an idle host's memory does not matter.",
        differs: "Two neighbours rank a graph at a busy destination, as TunkRank does.",
        x: HOST_MEMORY,
        kind: Kind::Curves,
        series,
    }
}

fn figure_2(scale: &Scale) -> Figure {
    let figure = figure_11(scale);
    let of_the_two =
        |series: &Series| !series.name.starts_with("Scatter") && !series.name.starts_with("Hybrid");
    Figure {
        name: "fig2",
        title: "Figure 2: eviction of several VMs at once by pre-copy and post-copy",
        shows: "The problem with several VMs: from the fourth on they do not fit beside the destination's own two, \
                and busy ones are sent more than once by pre-copy.",
        series: figure.series.into_iter().filter(of_the_two).collect(),
        ..figure
    }
}

/// Figures 9 and 10: by the destination's memory.
fn by_host_memory(scale: &Scale, workload: &str, paper: [[f64; 5]; 4]) -> Vec<Series> {
    let [pre, post, scatter_total, scatter] = paper;
    let mut series = Vec::new();
    for (mode, name, look) in MODES {
        // In the paper one line is both for whom the two times are the same.
        let (eviction, total) = match mode {
            "pre-copy" => (Some(pre), Some(pre)),
            "post-copy" => (Some(post), Some(post)),
            "scatter-gather" => (Some(scatter), Some(scatter_total)),
            _ => (None, None),
        };
        for (measure, short, look, paper) in
            [(EVICTION, "ET", look, eviction), (TOTAL, "TMT", look.dashed(), total)]
        {
            let words = |gb| format!("--mode {mode} {workload} {}", busy_host(scale, gb));
            let name = format!("{name} ({short})");
            let paper = paper.as_ref().map(|paper| &paper[..]);
            let line = of(&name, look, measure, &HOSTS_GB, paper, |gb| scale.experiment(&words(gb)));
            // Of pre-copy and post-copy the two lines would lie on each other.
            let drawn = short == "ET" || !matches!(mode, "pre-copy" | "post-copy");
            series.push(Series { drawn, ..line });
        }
    }
    series
}

fn figure_9(scale: &Scale) -> Figure {
    let paper = [
        [328.0, 173.0, 124.0, 105.0, 52.0],
        [309.0, 200.0, 146.0, 110.0, 50.0],
        [359.0, 198.0, 163.0, 115.0, 67.0],
        [49.0, 49.0, 48.0, 49.0, 49.0],
    ];
    Figure {
        name: "fig9",
        title: "Figure 9: an idle VM leaves for a destination that is short of memory",
        shows: "Eviction time (ET) and total migration time (TMT): scatter-gather evicts in 49 s whatever the \
                destination has, pre-copy and post-copy take up to six times as long; its total time is up to \
                10 % longer.",
        differs: "The destination's two VMs are two neighbours that rank a graph; beyond its memory is a swap file.",
        x: HOST_MEMORY,
        kind: Kind::Curves,
        series: by_host_memory(scale, IDLE, paper),
    }
}

fn figure_10(scale: &Scale) -> Figure {
    let paper = [
        [452.0, 358.0, 221.0, 176.0, 119.0],
        [297.0, 202.0, 144.0, 101.0, 47.0],
        [334.0, 210.0, 153.0, 117.0, 55.0],
        [49.0, 50.0, 49.0, 51.0, 49.0],
    ];
    Figure {
        name: "fig10",
        title: "Figure 10: the same with a busy VM",
        shows: "Pre-copy sends again what the VM writes meanwhile; post-copy and scatter-gather send each page once \
                and take as long as with an idle VM.",
        differs: "The VM writes random pages, 10,000 a second; TunkRank in the paper.",
        x: HOST_MEMORY,
        kind: Kind::Curves,
        series: by_host_memory(scale, BUSY, paper),
    }
}

fn figure_11(scale: &Scale) -> Figure {
    let paper: [(&str, [f64; 5], [f64; 5]); 3] = [
        ("pre-copy", [44.0, 88.0, 136.0, 261.0, 449.0], [120.0, 191.0, 282.0, 411.0, 571.0]),
        ("post-copy", [44.0, 88.0, 136.0, 256.0, 448.0], [45.0, 92.0, 142.0, 298.0, 450.0]),
        ("scatter-gather", [47.0, 94.0, 142.0, 201.0, 257.0], [48.0, 94.0, 143.0, 202.0, 268.0]),
    ];
    let mut series = Vec::new();
    for (workload, what) in [(IDLE, "idle"), (BUSY, "busy")] {
        for (mode, name, look) in MODES {
            let paper = paper.iter().find(|(of, ..)| *of == mode);
            let paper = paper.map(|(_, idle, busy)| if what == "idle" { &idle[..] } else { &busy[..] });
            let look = if what == "idle" { look } else { look.dashed() };
            let name = format!("{name}, {what}");
            series.push(of(&name, look, EVICTION, &VMS, paper, |vms| several(scale, mode, workload, vms)));
        }
    }
    Figure {
        name: "fig11",
        title: "Figure 11: several VMs leave at once",
        shows: "From the first start to the last eviction. Up to three VMs fit at the destination; from the fourth on \
                pre-copy and post-copy wait for its swapping, scatter-gather does not.",
        differs: "As in figure 9, with 26 GB.",
        x: NUMBER,
        kind: Kind::Curves,
        series,
    }
}

fn figure_12(scale: &Scale) -> Figure {
    let paper = [("pre-copy", 378.0), ("post-copy", 261.0), ("scatter-gather", 57.0)];
    let working_set = scale.memory(4.5);
    let series = MODES.into_iter().map(|(mode, name, look)| {
        let paper = paper.iter().find(|(of, _)| *of == mode).map(|(_, seconds)| [*seconds]);
        let paper = paper.as_ref().map(|paper| &paper[..]);
        of(name, look, EVICTION, &[0.0], paper, |_| {
            let host = busy_host(scale, 12.0);
            scale.experiment(&format!("--mode {mode} {BUSY} --working-set {working_set} {host}"))
        })
    });
    Figure {
        name: "fig12",
        title: "Figure 12: what the guest gets done while it leaves",
        shows: "YCSB's operations a second on 4.5 GB of Redis in a 5 GB VM. With post-copy and scatter-gather they \
                fall from 15,000 to some 300 until most pages are there, with pre-copy to 8,000 to 10,000; evicted \
                after 57 s (scatter-gather), 261 s (post-copy), 378 s (pre-copy).",
        differs: "A random writer over 0.9 of the memory, held to 10,000 pages a second, stands for Redis and its \
                  client; it has no traffic of its own. From the start of the migration until all is gathered: what \
                  comes before and after is not recorded.",
        x: "time since the start, s",
        kind: Kind::Timeline,
        series: series.collect(),
    }
}

fn table_1(scale: &Scale) -> Figure {
    // By limit: 256 Mb/s, none. Eviction, then the requests' mean.
    let paper = [
        ("pre-copy", [160.8, 109.7], [6.00, 18.74]),
        ("post-copy", [164.3, 109.3], [6.92, 18.94]),
        ("scatter-gather", [49.8, 49.2], [5.47, 18.66]),
    ];
    let limits = [256.0, 1000.0];
    let experiment = |mode: &str, mbit: f64| {
        let limit = if mbit < 1000.0 { LIMIT } else { "" };
        scale.experiment(&format!("--mode {mode} {IDLE} {limit} --cotenant destination"))
    };
    let idle = [(IDLE_MEDIAN_LATENCY, "half within", Some(2.71)), (IDLE_P95_LATENCY, "95 % within", None)];
    let mut series: Vec<Series> = Vec::new();
    for (measure, what, paper) in idle {
        let (name, paper) = (format!("No migration, requests: {what}"), paper.map(|paper| [paper]));
        let paper = paper.as_ref().map(|paper| &paper[..]);
        let (_, _, look) = MODES[2];
        series.push(of(&name, look, measure, &limits[1..], paper, |mbit| experiment("scatter-gather", mbit)));
    }
    for (mode, name, look) in MODES {
        let paper = paper.iter().find(|(of, ..)| *of == mode);
        let (eviction, latency) = (paper.map(|of| &of.1[..]), paper.map(|of| &of.2[..]));
        for (measure, what, paper) in [
            (EVICTION, "ET", eviction),
            (MEDIAN_LATENCY, "requests: half within", latency),
            (P95_LATENCY, "requests: 95 % within", None),
        ] {
            series.push(of(&format!("{name}, {what}"), look, measure, &limits, paper, |mbit| {
                experiment(mode, mbit)
            }));
        }
    }
    Figure {
        name: "table1",
        title: "Table 1: the migration held to 256 Mb/s for the sake of others at the destination",
        shows: "An idle VM leaves while two VMs at the destination serve Memcached. Held to 256 Mb/s pre-copy and \
                post-copy take 1.5 times as long; of scatter-gather only the gather is held, and its eviction \
                takes no longer. The requests' times are means.",
        differs: "A service at the destination answers 250 requests a second with 4 KiB each, 8 Mb/s, measured from \
                  when each was to be sent: median and 95th percentile over the whole migration. It leaves the \
                  destination's link to the migration; Memcached's traffic in the paper does not, so that there even \
                  without a limit pre-copy and post-copy take 110 s instead of 44.",
        x: "limit in Mb/s (1000: none)",
        kind: Kind::Table,
        series,
    }
}

fn figure_13(scale: &Scale) -> Figure {
    let mut series = figure_14(scale).series;
    for line in &mut series {
        line.measure = SENT;
        line.points.iter_mut().for_each(|point| point.paper = None);
    }
    Figure {
        name: "fig13",
        title: "Figure 13: what the source sends when several busy VMs leave at once",
        shows: "Bytes of the runs of figure 14, with and without deduplication: of five VMs it saves 24 % with \
                post-copy. Its other values are not read off here.",
        differs: "As in figure 14, of whose runs it is. With scatter-gather only what goes to intermediaries is offered \
                  by its hashes; what the destination takes at once is sent as it is.",
        x: NUMBER,
        kind: Kind::Bytes,
        series,
    }
}

fn figure_14(scale: &Scale) -> Figure {
    let figure = figure_11(scale);
    let busy = |series: &Series| series.name.ends_with("busy");
    let mut series: Vec<Series> = figure.series.into_iter().filter(busy).collect();
    for line in &mut series {
        line.look = Look { dashed: false, ..line.look };
        line.name = line.name.replace(", busy", "");
    }
    for (mode, paper) in [
        ("pre-copy", [117.0, 267.0, 384.0, 509.0, 756.0]),
        ("scatter-gather", [52.0, 74.0, 100.0, 111.0, 146.0]),
    ] {
        for (_, name, look) in MODES.into_iter().filter(|(of, ..)| *of == mode) {
            let name = format!("{name}, deduplicated");
            let workload = format!("{BUSY} --dedup on --common {COMMON}");
            series.push(of(&name, look.dashed(), EVICTION, &VMS, Some(&paper), |vms| {
                several(scale, mode, &workload, vms)
            }));
        }
    }
    Figure {
        name: "fig14",
        title: "Figure 14: several busy VMs leave at once, with and without deduplication",
        shows: "Pages that several VMs have alike are sent once: it shortens scatter-gather's eviction by up to half; \
                pre-copy takes longer with it, for it looks for them while the VM goes on writing.",
        differs: "As in figure 11. Pre-copy sends its rounds to the destination, where nothing is deduplicated: ours takes as \
                  long with as without.",
        x: NUMBER,
        kind: Kind::Curves,
        series,
    }
}

/// Share of the pages that the VMs of figure 14 have alike. With five VMs it saves the 24 % that figure 13 has for
/// post-copy.
const COMMON: f64 = 0.3;

fn figure_15(scale: &Scale) -> Figure {
    let numbers = [0.0, 1.0, 2.0, 3.0, 4.0];
    let mut series = Vec::new();
    for (mode, name, look) in MODES {
        let paper = match mode {
            "pre-copy" => [328.0; 5],
            "post-copy" => [309.0; 5],
            "scatter-gather" => [317.0, 124.0, 76.0, 52.0, 48.0],
            // Its rounds are no eviction, and its last is scatter-gather's.
            _ => continue,
        };
        let host = busy_host(scale, 12.0);
        series.push(of(name, look, EVICTION, &numbers, Some(&paper), |n| {
            let more = if mode == "scatter-gather" {
                format!(" --intermediaries {n} --intermediary-rate 200mbit")
            } else {
                String::new()
            };
            scale.experiment(&format!("--mode {mode} {IDLE} {host}{more}"))
        }));
    }
    Figure {
        name: "fig15",
        title: "Figure 15: each intermediary adds 200 Mb/s",
        shows: "An idle VM leaves for a destination of 12 GB with two busy VMs: without an intermediary scatter-gather \
                is post-copy; each one shortens it until the source's link is full.",
        differs: "As in figure 9. The dotted line is what the destination alone took, plus 200 Mb/s for each \
                  intermediary, at most the source's link.",
        x: "number of intermediaries",
        kind: Kind::AddingUp(200.0),
        series,
    }
}

/// A destination with so much memory.
fn host(scale: &Scale, gb: f64) -> String {
    format!("--destination-memory {}", scale.memory(gb))
}

/// The same with two VMs of its own at work.
fn busy_host(scale: &Scale, gb: f64) -> String {
    format!("{} --neighbours 2 --neighbour-memory {}", host(scale, gb), scale.memory(VM_GB))
}

/// So many VMs to the big host with its own two.
fn several(scale: &Scale, mode: &str, workload: &str, vms: f64) -> Experiment {
    let host = busy_host(scale, BIG_HOST_GB);
    scale.experiment(&format!("--mode {mode} {workload} --vms {vms} {host}"))
}

/// A line.
fn of(
    name: &str,
    look: Look,
    measure: Measure,
    xs: &[f64],
    paper: Option<&[f64]>,
    experiment: impl Fn(f64) -> Experiment,
) -> Series {
    let points = xs.iter().enumerate().map(|(n, x)| Point {
        x: *x,
        experiment: experiment(*x),
        paper: paper.and_then(|paper| paper.get(n).copied()),
    });
    Series { name: name.to_owned(), look, measure, points: points.collect(), drawn: true }
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::paper::experiment::NotInThisBuild;
    use crate::paper::experiment::test::scale;

    #[test]
    fn every_experiment_can_be_run() {
        for figure in all(&scale()) {
            for experiment in figure.experiments() {
                if let Err(NotInThisBuild(what)) = experiment.args() {
                    panic!("{}: {}: {what}", figure.name, experiment.0);
                }
            }
        }
    }

    #[test]
    fn the_paper_has_a_value_wherever_it_has_a_line() {
        for figure in all(&scale()) {
            for series in &figure.series {
                let known = series.points.iter().filter(|point| point.paper.is_some()).count();
                let ours_alone = series.name.starts_with("Hybrid")
                    || series.name.ends_with("95 % within")
                    || figure.kind == Kind::Bytes;
                assert_eq!(
                    known,
                    if ours_alone { 0 } else { series.points.len() },
                    "{} {}",
                    figure.name,
                    series.name
                );
            }
        }
    }

    #[test]
    fn figures_that_show_the_same_share_their_runs() {
        let figures = all(&scale());
        let of = |name: &str| figures.iter().find(|figure| figure.name == name).expect("there");
        let within = |inner: &str, outer: &str| {
            let outer = of(outer).experiments();
            of(inner).experiments().iter().filter(|experiment| outer.contains(experiment)).count()
        };
        assert_eq!(within("fig1", "fig9"), 10);
        assert_eq!(within("fig2", "fig11"), of("fig2").experiments().len());
        assert_eq!(within("fig13", "fig14"), of("fig14").experiments().len());
        assert_eq!(within("fig15", "fig9"), 2);
        assert_eq!(of("fig15").experiments().len(), 7);
    }

    #[test]
    fn lines_of_one_figure_can_be_told_apart() {
        for figure in all(&scale()).into_iter().filter(|figure| figure.kind != Kind::Table) {
            let mut looks: Vec<Look> = Vec::new();
            for series in figure.series.iter().filter(|series| series.drawn) {
                assert!(!looks.contains(&series.look), "{}: {}", figure.name, series.name);
                looks.push(series.look);
            }
        }
    }
}

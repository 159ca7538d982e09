//! From runs to what is drawn: means with their spread, the bound, rates over time.

use anyhow::Result;
use libsg::report::Sample;
use serde::Serialize;

use super::experiment::{Experiment, Scale};
use super::figure::{BOUND, EVICTION, Figure, Kind, Look, Measure};
use super::store::Store;
use crate::stats;

/// What so many runs say of one value.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Stat {
    /// Each run's.
    pub values: Vec<f64>,
    /// As the paper has it.
    pub mean: f64,
    /// Of the sample; 0 of one run.
    pub deviation: f64,
    /// The middle one.
    pub median: f64,
    /// Least and most.
    pub spread: (f64, f64),
}

impl Stat {
    /// `None` of nothing.
    pub fn of(values: Vec<f64>) -> Option<Self> {
        let (median, spread) = (stats::median(&values)?, stats::spread(&values)?);
        let n = values.len() as f64;
        let mean = values.iter().sum::<f64>() / n;
        let squares: f64 = values.iter().map(|value| (value - mean).powi(2)).sum();
        let deviation = if values.len() > 1 { (squares / (n - 1.0)).sqrt() } else { 0.0 };
        Some(Self { values, mean, deviation, median, spread })
    }
}

/// A figure with its values.
#[derive(Serialize)]
pub struct Reduced {
    /// See [`Figure`].
    pub name: &'static str,
    /// See [`Figure`].
    pub title: &'static str,
    /// See [`Figure`].
    pub x: &'static str,
    /// Its lines.
    pub series: Vec<Line>,
    /// Lines of what is possible at all.
    pub bounds: Vec<Bound>,
}

/// A line with its values.
#[derive(Serialize)]
pub struct Line {
    /// See [`super::figure::Series`].
    pub name: String,
    /// How it looks.
    #[serde(skip)]
    pub look: Look,
    /// What is shown.
    pub measure: Measure,
    /// False: only in tables.
    pub drawn: bool,
    /// Its points.
    pub points: Vec<Dot>,
    /// In a timeline, guest operations a second: by seconds since the start.
    pub over_time: Vec<(f64, Stat)>,
}

/// A point with its values.
#[derive(Serialize)]
pub struct Dot {
    /// Where.
    pub x: f64,
    /// What was run.
    pub experiment: Experiment,
    /// What the paper has.
    pub paper: Option<f64>,
    /// What we have.
    pub here: Option<Stat>,
    /// Ours, were the VM as large as the paper's; `null` of what does not grow with memory.
    pub at_the_papers_size: Option<f64>,
    /// The mean of the same runs' bounds; `null` as above.
    pub bound: Option<f64>,
    /// Why we have nothing.
    pub why_not: Option<String>,
}

/// A line of what is possible at all.
#[derive(Serialize)]
pub struct Bound {
    /// In the legend.
    pub name: &'static str,
    /// Where and how much.
    pub points: Vec<(f64, f64)>,
}

/// Reduces a figure; at most `runs` of each experiment count. `why_not` says why an experiment has no run.
///
/// # Errors
/// A run cannot be read any more.
pub fn reduce(
    figure: &Figure,
    store: &Store,
    (scale, runs): (&Scale, usize),
    why_not: impl Fn(&Experiment) -> Option<String>,
) -> Result<Reduced> {
    let numbers = |experiment: &Experiment, key: &str, times: f64| {
        let of = |run: &super::store::Run| Some(run.report.pointer(key)?.as_f64()? * times);
        Stat::of(store.of(experiment).take(runs).filter_map(of).collect())
    };
    let value = |experiment: &Experiment, measure: Measure| numbers(experiment, measure.key, measure.times);
    let mut series = Vec::new();
    for line in &figure.series {
        let dots = line.points.iter().map(|point| {
            let here = value(&point.experiment, line.measure);
            let grows = line.measure.grows_with_memory;
            let is_time = grows && figure.kind != Kind::Bytes;
            Dot {
                x: point.x,
                experiment: point.experiment.clone(),
                paper: point.paper,
                at_the_papers_size: here.as_ref().filter(|_| grows).map(|here| here.mean * scale.times()),
                bound: value(&point.experiment, BOUND).filter(|_| is_time).map(|stat| stat.mean),
                why_not: if here.is_none() { why_not(&point.experiment) } else { None },
                here,
            }
        });
        let points: Vec<Dot> = dots.collect();
        let over_time = match (figure.kind, line.points.first()) {
            (Kind::Timeline, Some(point)) => rates(&store.samples(&point.experiment, runs)?),
            _ => Vec::new(),
        };
        let (name, look) = (line.name.clone(), line.look);
        series.push(Line { name, look, measure: line.measure, drawn: line.drawn, points, over_time });
    }
    let link_mbps = |experiment: &Experiment| numbers(experiment, "/link_mbps", 1.0).map(|stat| stat.mean);
    let bounds = bounds(figure.kind, &series, link_mbps);
    Ok(Reduced { name: figure.name, title: figure.title, x: figure.x, series, bounds })
}

/// What is possible: at each x the mean of what its runs' links needed for the bytes; and what adds up.
fn bounds(kind: Kind, series: &[Line], link_mbps: impl Fn(&Experiment) -> Option<f64>) -> Vec<Bound> {
    if matches!(kind, Kind::Timeline | Kind::Bytes) {
        return Vec::new();
    }
    let mut by_x: Vec<(f64, Vec<f64>)> = Vec::new();
    for dot in series.iter().flat_map(|line| &line.points) {
        let Some(bound) = dot.bound else { continue };
        match by_x.iter_mut().find(|(x, _)| (*x - dot.x).abs() < 1e-9) {
            Some((_, bounds)) => bounds.push(bound),
            None => by_x.push((dot.x, vec![bound])),
        }
    }
    by_x.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mean = |values: &[f64]| values.iter().sum::<f64>() / values.len() as f64;
    let points: Vec<_> = by_x.iter().map(|(x, bounds)| (*x, mean(bounds))).collect();
    let mut all = vec![Bound { name: "Bound: the bytes at the source link's rate", points }];
    if let Kind::AddingUp(each_mbps) = kind
        && let Some(line) = series
            .iter()
            .find(|line| line.points.iter().any(|dot| dot.experiment != line.points[0].experiment))
        && let Some(points) = added_up(line, each_mbps, link_mbps)
    {
        all.push(Bound { name: "Adding up: destination, and 200 Mb/s each", points });
    }
    all
}

/// What the first point took, with so much more at each further one, up to the link's rate.
fn added_up(
    line: &Line,
    each_mbps: f64,
    link_mbps: impl Fn(&Experiment) -> Option<f64>,
) -> Option<Vec<(f64, f64)>> {
    let first = line.points.first()?;
    let alone_s = first.here.as_ref()?.mean;
    let link = link_mbps(&first.experiment)?;
    let megabits = first.bound? * link;
    let took = |x: f64| (x, megabits / link.min(megabits / alone_s + each_mbps * x));
    Some(line.points.iter().map(|dot| took(dot.x)).collect())
}

/// Points of a timeline.
const TIMES: f64 = 60.0;

/// Operations a second in equal parts of the longest run; each run counts as long as it lasted.
fn rates(runs: &[Vec<Sample>]) -> Vec<(f64, Stat)> {
    let end = runs.iter().filter_map(|samples| samples.last()).map(|sample| sample.t_s).fold(0.0, f64::max);
    // Samples are 100 ms apart.
    let step = (end / TIMES).max(0.2);
    let mut all = Vec::new();
    let mut from = 0.0;
    while from + step <= end + 1e-9 {
        let values = runs.iter().filter_map(|samples| {
            let last = samples.last().filter(|last| last.t_s + 1e-9 >= from + step)?;
            (last.t_s > 0.0).then(|| (operations(samples, from + step) - operations(samples, from)) / step)
        });
        if let Some(stat) = Stat::of(values.collect()) {
            all.push((from + step / 2.0, stat));
        }
        from += step;
    }
    all
}

/// Guest operations up to a moment, between two samples in proportion.
fn operations(samples: &[Sample], t_s: f64) -> f64 {
    let of = |sample: &Sample| sample.guest_ops.unwrap_or(0) as f64;
    let after = samples.partition_point(|sample| sample.t_s < t_s);
    match (after.checked_sub(1).and_then(|n| samples.get(n)), samples.get(after)) {
        (Some(a), Some(b)) if b.t_s > a.t_s => of(a) + (of(b) - of(a)) * (t_s - a.t_s) / (b.t_s - a.t_s),
        (_, Some(one)) | (Some(one), None) => of(one),
        (None, None) => 0.0,
    }
}

/// Of a reduced timeline, when each line's source had evicted.
pub fn evicted_at(line: &Line) -> Option<f64> {
    (line.measure == EVICTION).then(|| line.points.first()?.here.as_ref().map(|stat| stat.mean))?
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::paper::experiment::test::scale;
    use crate::paper::figures;
    use crate::paper::store::test::run;
    use libsg::report::Report;

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() < 1e-9
    }

    #[test]
    fn means_and_their_spread() {
        let stat = Stat::of(vec![1.0, 2.0, 6.0]).expect("three");
        assert!(close(stat.mean, 3.0) && close(stat.median, 2.0) && close(stat.deviation, 7f64.sqrt()));
        assert_eq!(stat.spread, (1.0, 6.0));
        assert!(close(Stat::of(vec![4.0]).expect("one").deviation, 0.0));
        assert_eq!(Stat::of(Vec::new()), None);
    }

    #[test]
    fn rates_are_between_samples_and_end_with_each_run() {
        let sample = |t_s, ops| Sample { t_s, guest_ops: Some(ops), ..Sample::default() };
        let steady =
            |seconds: u64| (0..=seconds * 10).map(|n| sample(n as f64 / 10.0, 50 + n * 10)).collect();
        let all = rates(&[steady(12), steady(6)]);
        assert_eq!(all.len(), 60);
        assert!(all.iter().all(|(_, stat)| (stat.mean - 100.0).abs() < 1e-6));
        let lasting: Vec<usize> = all.iter().map(|(_, stat)| stat.values.len()).collect();
        assert_eq!((lasting[0], lasting[29], lasting[31]), (2, 2, 1));
        assert!(rates(&[]).is_empty());
    }

    #[test]
    fn points_have_ours_the_papers_and_the_bound() {
        let directory = tempfile::tempdir().expect("made");
        let mut store = Store::open(directory.path(), "a").expect("opens");
        let figure = figures::all(&scale()).into_iter().find(|figure| figure.name == "fig15").expect("there");
        let alone =
            &figure.series.iter().find(|line| line.name == "Scatter-gather").expect("there").points[0];
        for seconds in [18.0, 22.0, 1000.0] {
            let mut report = Report { eviction_s: Some(seconds), ..Report::default() };
            report.pages.present = Some(262_144);
            report.set_link(800.0);
            store.add(run(&alone.experiment.0, "a", &report)).expect("written");
        }
        let not_yet = |_: &Experiment| Some("not yet".to_owned());
        let reduced = reduce(&figure, &store, (&scale(), 2), not_yet).expect("reduces");
        let line = reduced.series.iter().find(|line| line.name == "Scatter-gather").expect("there");
        let dot = &line.points[0];
        assert!(close(dot.here.as_ref().expect("run").mean, 20.0), "only two runs count");
        assert_eq!((dot.paper, dot.at_the_papers_size), (Some(317.0), Some(100.0)));
        assert_eq!((&dot.why_not, line.points[1].why_not.as_deref()), (&None, Some("not yet")));
        let bound = dot.bound.expect("told");
        assert!((bound - 10.737).abs() < 0.001);
        // 429 Mb/s alone; with one more 200 Mb/s 629, with two the link's 800.
        let [link, added] = &reduced.bounds[..] else { panic!("two bounds") };
        assert_eq!(link.points, [(0.0, bound)]);
        let took: Vec<i64> = added.points.iter().map(|(_, s)| (s * 10.0).round() as i64).collect();
        assert_eq!(took, [200, 136, 107, 107, 107]);
    }
}

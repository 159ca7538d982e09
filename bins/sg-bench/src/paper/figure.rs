//! What a figure is made of, as data: series of points, each an experiment, what of its report is shown, and what
//! the paper has at the same place.

use serde::Serialize;

use super::experiment::Experiment;

/// A figure, or the table.
pub struct Figure {
    /// What `--only` calls it.
    pub name: &'static str,
    /// Its caption, in our words.
    pub title: &'static str,
    /// What the paper shows.
    pub shows: &'static str,
    /// How it is made here, and what differs.
    pub differs: &'static str,
    /// What its points are spread over.
    pub x: &'static str,
    /// How it is drawn.
    pub kind: Kind,
    /// In the order of the legend.
    pub series: Vec<Series>,
}

/// How a figure is drawn.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// Times over whatever was varied, and the bound.
    Curves,
    /// Bytes over whatever was varied.
    Bytes,
    /// The same; each x adds an intermediary of so many megabits a second to what the destination takes alone.
    AddingUp(f64),
    /// Guest operations a second over time; evictions as vertical lines.
    Timeline,
    /// Not at all.
    Table,
}

/// One line of a figure.
pub struct Series {
    /// In the legend.
    pub name: String,
    /// How it looks.
    pub look: Look,
    /// What is shown.
    pub measure: Measure,
    /// Where.
    pub points: Vec<Point>,
    /// False: only in the table beside the figure.
    pub drawn: bool,
}

/// One point of a line.
pub struct Point {
    /// Where on the x axis.
    pub x: f64,
    /// What is run for it.
    pub experiment: Experiment,
    /// The paper's value.
    pub paper: Option<f64>,
}

/// What of a report is shown.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Measure {
    /// For people.
    pub name: &'static str,
    /// Of its values.
    pub unit: &'static str,
    /// Where it is in a report: a JSON pointer.
    pub key: &'static str,
    /// What the report's number is multiplied by for the unit.
    pub times: f64,
    /// Whether it grows with the memory of the VM, so that ours times the scale is the paper's.
    pub grows_with_memory: bool,
}

/// See `eviction_s` in the report.
pub const EVICTION: Measure = seconds("eviction time", "/eviction_s");
/// See `total_migration_s` in the report.
pub const TOTAL: Measure = seconds("total migration time", "/total_migration_s");
/// See `line_rate_bound_s` in the report: our physical bound.
pub const BOUND: Measure = seconds("bound", "/line_rate_bound_s");
/// See `cotenants` in the report: of requests during the whole migration.
pub const MEDIAN_LATENCY: Measure = latency("median latency", "/cotenants/0/migration/p50_us");
/// The same, 95th percentile.
pub const P95_LATENCY: Measure = latency("95th percentile of latency", "/cotenants/0/migration/p95_us");
/// Of requests before the migration.
pub const IDLE_MEDIAN_LATENCY: Measure = latency("median latency, idle", "/cotenants/0/idle/p50_us");
/// The same, 95th percentile.
pub const IDLE_P95_LATENCY: Measure = latency("95th percentile of latency, idle", "/cotenants/0/idle/p95_us");

/// See `wire_bytes.source` in the report: everything that left on the source's sockets, of all VMs together.
pub const SENT: Measure = Measure {
    name: "sent by the source",
    unit: "GB",
    key: "/wire_bytes/source",
    times: 1e-9,
    grows_with_memory: true,
};

const fn seconds(name: &'static str, key: &'static str) -> Measure {
    Measure { name, unit: "s", key, times: 1.0, grows_with_memory: true }
}

const fn latency(name: &'static str, key: &'static str) -> Measure {
    Measure { name, unit: "ms", key, times: 1e-3, grows_with_memory: false }
}

/// How a line looks. Colours (of Okabe and Ito) are told apart by colour-blind people; marker and dash tell lines
/// apart in black and white.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Look {
    /// Red, green, blue.
    pub colour: (u8, u8, u8),
    /// At each point.
    pub marker: Marker,
    /// Whether the line is dashed, and its markers are hollow.
    pub dashed: bool,
}

/// What stands at a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Marker {
    /// A triangle.
    Triangle,
    /// An x.
    Cross,
    /// A square.
    Square,
    /// A circle.
    Circle,
}

/// The modes that are compared: what `--mode` calls each, for people, and its look.
pub const MODES: [(&str, &str, Look); 4] = [
    ("pre-copy", "Pre-copy", Look { colour: (0xd5, 0x5e, 0x00), marker: Marker::Triangle, dashed: false }),
    ("post-copy", "Post-copy", Look { colour: (0x00, 0x72, 0xb2), marker: Marker::Cross, dashed: false }),
    (
        "scatter-gather",
        "Scatter-gather",
        Look { colour: (0x00, 0x9e, 0x73), marker: Marker::Square, dashed: false },
    ),
    ("hybrid", "Hybrid", Look { colour: (0x8b, 0x4a, 0xa0), marker: Marker::Circle, dashed: false }),
];

impl Look {
    /// The same, dashed.
    pub fn dashed(self) -> Self {
        Self { dashed: true, ..self }
    }
}

impl Figure {
    /// Every experiment of it, each once.
    pub fn experiments(&self) -> Vec<&Experiment> {
        let mut all: Vec<&Experiment> = Vec::new();
        for point in self.series.iter().flat_map(|series| &series.points) {
            if !all.contains(&&point.experiment) {
                all.push(&point.experiment);
            }
        }
        all
    }
}

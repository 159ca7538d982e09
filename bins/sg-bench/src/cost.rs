//! What a migration costs in processor time, by role.

use libsg::report::{CpuPerGib, Ends, Report};
use libsg::wire::message::NodeStatistics;

use crate::cluster::Cluster;
use crate::lab::Lab;
use crate::stream::Cost;

/// What the intermediaries had used before the migration, and at a moment of it, in seconds. Both ends tell their own.
#[derive(Debug, Default)]
pub struct Meter {
    at_start: Option<f64>,
    at_evicted: Option<Option<f64>>,
    /// What the intermediaries said of themselves then.
    said_at_evicted: Vec<NodeStatistics>,
}

impl Meter {
    /// The migration starts.
    pub fn note_start(&mut self, cluster: &Cluster) {
        self.at_start = used(cluster);
    }

    /// All have evicted; noted once.
    pub fn note_evicted(&mut self, lab: &Lab, cluster: &Cluster) {
        if self.at_evicted.is_none() {
            self.at_evicted = Some(used(cluster));
            self.said_at_evicted = cluster.statistics(lab);
        }
    }

    /// What the intermediaries said of themselves then, and say at the end.
    pub fn add_intermediaries(&self, report: &mut Report, at_end: &[NodeStatistics]) {
        for entry in &mut report.intermediaries {
            let of =
                |said: &[NodeStatistics]| said.iter().find(|node| is_it(&entry.id, &node.node.name)).cloned();
            entry.touched_bytes = of(at_end).map(|node| node.touched_bytes);
            entry.unused_leased_slots = of(&self.said_at_evicted).map(|node| node.leased_slots);
        }
    }

    /// Of the whole run, as its VMs' reports tell it: a source may be gone, and has told its own time before.
    pub fn per_gib(&self, reports: &[Report], stream: Cost) -> CpuPerGib {
        let stream =
            Ends { source: Some(stream.send_cpu_s_per_gib), destination: Some(stream.receive_cpu_s_per_gib) };
        self.of(reports)
            .map(|cost| CpuPerGib { stream, ..cost })
            .unwrap_or(CpuPerGib { stream, ..CpuPerGib::default() })
    }

    fn of(&self, reports: &[Report]) -> Option<CpuPerGib> {
        let sum = |of: fn(&Report) -> Option<f64>| reports.iter().map(of).sum::<Option<f64>>();
        let bytes = |of: fn(&Report) -> Option<u64>| reports.iter().map(of).sum::<Option<u64>>();
        let direct = bytes(|r| r.bytes.direct)?;
        let staged = bytes(|r| r.bytes.staged).unwrap_or(0);
        let gathered = bytes(|r| r.bytes.gathered).unwrap_or(0);
        let staging = self.at_evicted.flatten().zip(self.at_start).map(|(end, start)| (end - start).max(0.0));
        Some(CpuPerGib {
            source: over(sum(|r| r.migration_cpu_s.source), direct + staged),
            destination: over(sum(|r| r.migration_cpu_s.destination), direct + gathered),
            intermediaries: over(staging, staged),
            ..CpuPerGib::default()
        })
    }
}

fn over(cpu_s: Option<f64>, bytes: u64) -> Option<f64> {
    (bytes > 0).then(|| cpu_s.map(|s| s * (1_u64 << 30) as f64 / bytes as f64))?
}

/// Whether an id is of that name: it is the name, or the name and an incarnation: `i1#3f2a90bc`.
pub fn is_it(id: &str, name: &str) -> bool {
    id.split('#').next() == Some(name)
}

/// Processor time of all intermediaries so far.
fn used(cluster: &Cluster) -> Option<f64> {
    cluster.intermediaries.iter().map(|process| process.usage().cpu_s).sum()
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn cost_is_of_the_migration_alone() {
        let meter = Meter { at_start: Some(0.1), at_evicted: Some(Some(0.6)), ..Meter::default() };
        let mut report = Report {
            cpu_s: Ends { source: Some(4.0), destination: Some(2.5) },
            migration_cpu_s: Ends { source: Some(1.0), destination: Some(2.0) },
            ..Report::default()
        };
        report.bytes.direct = Some(1 << 30);
        report.bytes.staged = Some(1 << 29);
        report.bytes.gathered = Some(1 << 30);
        let stream = Cost { mbps: 1.0, send_cpu_s_per_gib: 0.7, receive_cpu_s_per_gib: 0.8 };
        let cost = meter.per_gib(&[report], stream);
        assert_eq!(
            (cost.source, cost.destination, cost.intermediaries),
            (Some(1.0 / 1.5), Some(1.0), Some(1.0))
        );
        assert_eq!(cost.stream, Ends { source: Some(0.7), destination: Some(0.8) });
        assert_eq!(meter.per_gib(&[Report::default()], stream).source, None);
    }
}

//! What a migration costs in processor time, by role.

use libsg::report::{CpuPerGib, Ends, Report};

use crate::cluster::Cluster;
use crate::process::Process;
use crate::stream::Cost;

/// Processor time so far, in seconds, of all processes of a role.
#[derive(Clone, Copy, Debug, Default)]
struct Used {
    source: Option<f64>,
    destination: Option<f64>,
    intermediaries: Option<f64>,
}

/// What was used before the migration, and at a moment of it: processes have done other things before, such as
/// filling a VM's memory.
#[derive(Debug, Default)]
pub struct Meter {
    at_start: Used,
    at_evicted: Option<Used>,
}

impl Meter {
    /// The migration starts.
    pub fn note_start(&mut self, cluster: &Cluster) {
        self.at_start = Used::by(cluster);
    }

    /// All have evicted; noted once.
    pub fn note_evicted(&mut self, cluster: &Cluster) {
        self.at_evicted.get_or_insert_with(|| Used::by(cluster));
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
        let since = |end: Option<f64>, start: Option<f64>| Some((end? - start?).max(0.0));
        let evicted = self.at_evicted.unwrap_or_default();
        Some(CpuPerGib {
            source: over(since(sum(|r| r.cpu_s.source), self.at_start.source), direct + staged),
            destination: over(
                since(sum(|r| r.cpu_s.destination), self.at_start.destination),
                direct + gathered,
            ),
            intermediaries: over(since(evicted.intermediaries, self.at_start.intermediaries), staged),
            ..CpuPerGib::default()
        })
    }
}

fn over(cpu_s: Option<f64>, bytes: u64) -> Option<f64> {
    (bytes > 0).then(|| cpu_s.map(|s| s * (1_u64 << 30) as f64 / bytes as f64))?
}

impl Used {
    fn by(cluster: &Cluster) -> Self {
        let sum = |processes: &mut dyn Iterator<Item = &Process>| {
            processes.map(|process| process.usage().cpu_s).sum()
        };
        Self {
            source: sum(&mut cluster.pairs.iter().map(|pair| &pair.source.process)),
            destination: sum(&mut cluster.pairs.iter().map(|pair| &pair.destination.process)),
            intermediaries: sum(&mut cluster.intermediaries.iter()),
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn cost_is_of_the_migration_alone() {
        let used = |source, destination, intermediaries| Used {
            source: Some(source),
            destination: Some(destination),
            intermediaries: Some(intermediaries),
        };
        let meter = Meter { at_start: used(3.0, 0.5, 0.1), at_evicted: Some(used(9.0, 9.0, 0.6)) };
        let mut report =
            Report { cpu_s: Ends { source: Some(4.0), destination: Some(2.5) }, ..Report::default() };
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

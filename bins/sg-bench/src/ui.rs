//! What people see while a run goes on: bars on a terminal, a line a second anywhere else.

use std::io::IsTerminal as _;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use libsg::report::Sample;
use serde_json::Value;

/// How progress is shown, on standard error.
pub enum Ui {
    /// On a terminal.
    Bars {
        /// What keeps the bars together.
        multi: MultiProgress,
        /// Of the run that goes on.
        bars: Option<Bars>,
    },
    /// Into a file or a pipe.
    Lines {
        /// What runs.
        title: String,
        /// When the last line was written.
        last: Option<Instant>,
        /// The sample of that line.
        shown: Sample,
    },
}

/// The bars of one run.
pub struct Bars {
    evicted: ProgressBar,
    gathered: ProgressBar,
    rates: ProgressBar,
    recent: std::collections::VecDeque<Sample>,
}

/// Time between two plain lines.
const LINE_EVERY: Duration = Duration::from_secs(1);
/// Samples over which rates are taken: a second.
const RECENT: usize = 10;

impl Ui {
    /// Bars when standard error is a terminal, else lines.
    pub fn new() -> Self {
        if std::io::stderr().is_terminal() {
            Self::Bars { multi: MultiProgress::new(), bars: None }
        } else {
            Self::Lines { title: String::new(), last: None, shown: Sample::default() }
        }
    }

    /// A run begins.
    pub fn begin(&mut self, what: &str) {
        match self {
            Self::Bars { multi, bars } => {
                let _ = multi.println(what);
                *bars = Some(Bars::new(multi));
            }
            Self::Lines { title, last, shown } => {
                eprintln!("{what}");
                (*title, *last, *shown) = (what.to_owned(), None, Sample::default());
            }
        }
    }

    /// Something worth a line.
    pub fn say(&self, text: &str) {
        match self {
            Self::Bars { multi, .. } => {
                let _ = multi.println(text);
            }
            Self::Lines { .. } => eprintln!("{text}"),
        }
    }

    /// Where the run stands.
    pub fn show(&mut self, sample: &Sample) {
        match self {
            Self::Bars { bars: Some(bars), .. } => bars.show(sample),
            Self::Lines { last, shown, .. } => {
                let now = Instant::now();
                if last.is_none_or(|last| now - last >= LINE_EVERY) {
                    eprintln!("{}", line(shown, sample));
                    (*last, *shown) = (Some(now), sample.clone());
                }
            }
            Self::Bars { bars: None, .. } => {}
        }
    }

    /// The run is over.
    pub fn end(&mut self) {
        if let Self::Bars { bars, .. } = self
            && let Some(bars) = bars.take()
        {
            for bar in [&bars.evicted, &bars.gathered, &bars.rates] {
                bar.finish_and_clear();
            }
        }
    }
}

impl Bars {
    fn new(multi: &MultiProgress) -> Self {
        let style = |template: &str| {
            ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
        };
        let bar = |name: &'static str| {
            let bar = multi.add(ProgressBar::new(1000));
            bar.set_style(style("  {prefix:9} {wide_bar:.cyan} {msg:>6}"));
            bar.set_prefix(name);
            bar
        };
        let (evicted, gathered) = (bar("evicted"), bar("gathered"));
        let rates = multi.add(ProgressBar::new(1));
        rates.set_style(style("  {msg}"));
        Self { evicted, gathered, rates, recent: std::collections::VecDeque::new() }
    }

    fn show(&mut self, sample: &Sample) {
        for (bar, percent) in
            [(&self.evicted, sample.evicted_percent), (&self.gathered, sample.gathered_percent)]
        {
            let percent = percent.unwrap_or(0.0);
            bar.set_position((percent * 10.0) as u64);
            bar.set_message(format!("{percent:.1} %"));
        }
        let before = self.recent.front().cloned().unwrap_or_default();
        self.rates.set_message(rates(&before, sample));
        self.recent.push_back(sample.clone());
        if self.recent.len() > RECENT {
            self.recent.pop_front();
        }
    }
}

fn line(before: &Sample, now: &Sample) -> String {
    let percent = |value: Option<f64>| value.map_or("-".to_owned(), |p| format!("{p:.1} %"));
    format!(
        "  evicted {:>7}  gathered {:>7}  {}",
        percent(now.evicted_percent),
        percent(now.gathered_percent),
        rates(before, now)
    )
}

/// Time, megabits a second by path, faults, how co-tenants fare.
fn rates(before: &Sample, now: &Sample) -> String {
    let seconds = now.t_s - before.t_s;
    let rate = |before: Option<u64>, now: Option<u64>| match (before.unwrap_or(0), now) {
        (before, Some(now)) if seconds > 0.0 => {
            format!("{:.0}", now.saturating_sub(before) as f64 * 8e-6 / seconds)
        }
        _ => "-".to_owned(),
    };
    let cotenants: Vec<String> =
        now.cotenants_p95_us.iter().map(|(node, us)| format!("{node} {us:.0}")).collect();
    let cotenants = match &cotenants[..] {
        [] => String::new(),
        each => format!("  co-tenants' p95 us: {}", each.join(", ")),
    };
    format!(
        "{:6.1} s  Mb/s: direct {:>5}, staged {:>5}, gathered {:>5}  faults {}{cotenants}",
        now.t_s,
        rate(before.bytes.direct, now.bytes.direct),
        rate(before.bytes.staged, now.bytes.staged),
        rate(before.bytes.gathered, now.bytes.gathered),
        now.faults.map_or("-".to_owned(), |n| n.to_string()),
    )
}

/// A table for people on standard output, or on standard error where JSON goes there.
pub struct Table<'a> {
    json: Option<&'a Path>,
}

impl<'a> Table<'a> {
    /// Beside JSON that goes to this file, or `-`; or none.
    pub fn beside(json: Option<&'a Path>) -> Self {
        Self { json }
    }

    fn is_on_stderr(&self) -> bool {
        self.json == Some(Path::new("-"))
    }

    /// One more line.
    pub fn say(&self, line: &str) {
        if self.is_on_stderr() {
            eprintln!("{line}");
        } else {
            println!("{line}");
        }
    }

    /// The JSON, where some was asked for.
    pub fn write(&self, told: &Value) -> Result<()> {
        match self.json {
            Some(_) if self.is_on_stderr() => println!("{told}"),
            Some(path) => std::fs::write(path, told.to_string())
                .with_context(|| format!("cannot write {}", path.display()))?,
            None => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use libsg::report::Bytes;

    #[test]
    fn a_line_has_percents_rates_and_faults() {
        let bytes = |direct| Bytes { direct: Some(direct), ..Bytes::default() };
        let before = Sample { t_s: 1.0, bytes: bytes(1_000_000), ..Sample::default() };
        let now = Sample {
            t_s: 2.0,
            bytes: bytes(2_000_000),
            faults: Some(7),
            evicted_percent: Some(12.34),
            cotenants_p95_us: [("destination".to_owned(), 81.4), ("i1".to_owned(), 77.0)].into(),
            ..Sample::default()
        };
        assert_eq!(
            line(&before, &now),
            "  evicted  12.3 %  gathered       -     2.0 s  Mb/s: direct     8, staged     -, gathered     -  faults 7  \
             co-tenants' p95 us: destination 81, i1 77"
        );
    }
}

//! What operators see while VMs leave, or arrive: bars on a terminal, a line now and then anywhere else.

use std::collections::VecDeque;
use std::io::IsTerminal as _;
use std::time::Duration;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};

use crate::{logs, table};

/// Time between two lines.
const LINE_EVERY: Duration = Duration::from_secs(2);

/// Over what time rates are taken.
const RECENT: Duration = Duration::from_secs(1);

/// One VM now.
#[derive(Clone, Debug, Default)]
pub struct Row {
    /// Its name.
    pub name: String,
    /// How far it is.
    pub percent: f64,
    /// Page bytes that went so far.
    pub bytes: u64,
    /// Nothing more happens.
    pub over: bool,
}

/// Shows it, on standard error.
pub struct Show {
    /// `evicted`, `gathered`.
    what: &'static str,
    bars: Option<Bars>,
    recent: VecDeque<(Duration, Vec<u64>)>,
    said: Option<Duration>,
}

/// Each VM's, and that of all.
struct Bars {
    multi: MultiProgress,
    vms: Vec<ProgressBar>,
}

impl Show {
    /// Of so many VMs, and of the host.
    pub fn new(what: &'static str, vms: usize) -> Self {
        let bars = std::io::stderr().is_terminal().then(|| Bars::new(vms));
        Self { what, bars, recent: VecDeque::new(), said: None }
    }

    /// Something worth a line.
    pub fn say(&self, text: &str) {
        match &self.bars {
            Some(bars) => {
                let _ = bars.multi.println(text);
            }
            None => eprintln!("{text}"),
        }
    }

    /// Where all stand, so long after the start.
    pub fn rows(&mut self, rows: &[Row], at: Duration) {
        let rates = self.rates(rows, at);
        let host = together(rows);
        let all = rows.iter().chain([&host]);
        match &self.bars {
            Some(bars) => {
                for ((bar, row), rate) in bars.vms.iter().zip(all).zip(&rates) {
                    bar.set_prefix(row.name.clone());
                    bar.set_position((row.percent * 10.0) as u64);
                    bar.set_message(format!("{:5.1} % {} {:>9}", row.percent, self.what, table::bits(*rate)));
                }
            }
            None if self.said.is_none_or(|said| at.saturating_sub(said) >= LINE_EVERY) => {
                self.said = Some(at);
                eprintln!("{}", line(self.what, rows, &host, &rates, at));
            }
            None => {}
        }
    }

    /// Nothing more is shown.
    pub fn end(&mut self) {
        for bar in self.bars.take().into_iter().flat_map(|bars| bars.vms) {
            bar.finish_and_clear();
        }
        logs::beside(None);
    }

    /// Bytes a second of each, and of all together.
    fn rates(&mut self, rows: &[Row], at: Duration) -> Vec<u64> {
        let bytes: Vec<u64> = rows.iter().map(|row| row.bytes).collect();
        self.recent.push_back((at, bytes.clone()));
        while self.recent.len() > 2 && at.saturating_sub(self.recent[1].0) >= RECENT {
            self.recent.pop_front();
        }
        let (since, before) = &self.recent[0];
        let seconds = at.saturating_sub(*since).as_secs_f64();
        let rate = |(now, before): (&u64, &u64)| match seconds {
            0.0 => 0,
            seconds => (now.saturating_sub(*before) as f64 / seconds) as u64,
        };
        let mut rates: Vec<u64> = bytes.iter().zip(before).map(rate).collect();
        rates.push(rates.iter().sum());
        rates
    }
}

impl Drop for Show {
    fn drop(&mut self) {
        self.end();
    }
}

impl Bars {
    fn new(vms: usize) -> Self {
        let multi = MultiProgress::new();
        let style = ProgressStyle::with_template("  {prefix:12} {wide_bar:.cyan} {msg}");
        let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
        logs::beside(Some(multi.clone()));
        let bar = |_| multi.add(ProgressBar::new(1000).with_style(style.clone()));
        let vms = (0..=vms).map(bar).collect();
        Self { multi, vms }
    }
}

/// All of them as one: each counts alike.
fn together(rows: &[Row]) -> Row {
    Row {
        name: "host".into(),
        percent: rows.iter().map(|row| row.percent).sum::<f64>() / rows.len().max(1) as f64,
        bytes: rows.iter().map(|row| row.bytes).sum(),
        over: rows.iter().all(|row| row.over),
    }
}

fn line(what: &str, rows: &[Row], host: &Row, rates: &[u64], at: Duration) -> String {
    /// Those that are named; of more only the sum is said.
    const NAMED: usize = 8;
    let each = |(row, rate): (&Row, &u64)| {
        let rate = if row.over { "over".to_owned() } else { table::bits(*rate) };
        format!("{} {:.1} % {rate}", row.name, row.percent)
    };
    let named: Vec<String> = rows.iter().zip(rates).take(NAMED).map(each).collect();
    let more = if rows.len() > NAMED { format!(", and {} more", rows.len() - NAMED) } else { String::new() };
    let rate = table::bits(rates.last().copied().unwrap_or(0));
    format!("{:6.1} s  {what} {:.1} % {rate}: {}{more}", at.as_secs_f64(), host.percent, named.join(", "))
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_line_has_each_vm_and_the_host() {
        let row = |name: &str, percent, bytes, over| Row { name: name.into(), percent, bytes, over };
        let mut show = Show { what: "evicted", bars: None, recent: VecDeque::new(), said: None };
        let before = [row("a", 0.0, 0, false), row("b", 0.0, 0, false)];
        assert_eq!(show.rates(&before, Duration::ZERO), [0, 0, 0]);
        let rows = [row("a", 50.0, 12_500_000, false), row("b", 100.0, 25_000_000, true)];
        let rates = show.rates(&rows, Duration::from_secs(1));
        assert_eq!(rates, [12_500_000, 25_000_000, 37_500_000]);
        let text = line("evicted", &rows, &together(&rows), &rates, Duration::from_secs(1));
        assert_eq!(text, "   1.0 s  evicted 75.0 % 300mbit: a 50.0 % 100mbit, b 100.0 % over");
        let many: Vec<Row> = (0..20).map(|n| row(&format!("v{n}"), 1.0, 0, false)).collect();
        let text = line("evicted", &many, &together(&many), &[0; 21], Duration::ZERO);
        assert!(text.ends_with("v7 1.0 % 0mbit, and 12 more"), "{text}");
    }
}

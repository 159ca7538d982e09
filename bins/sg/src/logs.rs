//! Logs of the libraries, on standard error.

use std::io::{IsTerminal as _, Write};

use indicatif::MultiProgress;
use parking_lot::Mutex;
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::cli::LogFormat;

/// What a daemon says of its own accord.
pub const DAEMON: &str = "info";

/// What a command says beside what it was asked for.
pub const COMMAND: &str = "warn";

/// The bars that are on the terminal now.
static BARS: Mutex<Option<MultiProgress>> = Mutex::new(None);

/// Logs go to standard error: those that `RUST_LOG` asks for, or else those of `level` and above.
pub fn start(format: LogFormat, level: &str) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| level.into());
    let logs = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(BesideBars);
    match format {
        LogFormat::Text => logs.init(),
        LogFormat::Json => logs.json().init(),
    }
}

/// From now on these bars are on the terminal, or none: lines are written above them.
pub fn beside(bars: Option<MultiProgress>) {
    *BARS.lock() = bars;
}

/// Standard error; bars make room for each line.
struct BesideBars;

impl MakeWriter<'_> for BesideBars {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        Self
    }
}

impl Write for BesideBars {
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        let write = || std::io::stderr().write_all(line).map(|()| line.len());
        let bars = BARS.lock().clone();
        bars.map_or_else(write, |bars| bars.suspend(write))
    }

    fn flush(&mut self) -> std::io::Result<()> {
        std::io::stderr().flush()
    }
}

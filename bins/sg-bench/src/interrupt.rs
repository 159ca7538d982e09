//! ^C and SIGTERM: noted at once, acted on where it is safe to leave, so that everything is cleaned up.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Result, bail};

static NOTED: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// Exit code of an interrupted run.
pub const EXIT_CODE: u8 = 130;

/// Starts to listen for the signals.
pub fn listen() -> Result<()> {
    let noted = NOTED.get_or_init(Arc::default);
    for signal in [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(noted))?;
    }
    Ok(())
}

/// Whether a signal came.
pub fn noted() -> bool {
    NOTED.get().is_some_and(|flag| flag.load(Ordering::Relaxed))
}

/// Leaves when a signal came.
///
/// # Errors
/// [`Interrupted`] when one came.
pub fn check() -> Result<()> {
    if noted() {
        bail!(Interrupted);
    }
    Ok(())
}

/// Sleeps, and leaves early when a signal comes.
pub fn sleep(time: Duration) -> Result<()> {
    const STEP: Duration = Duration::from_millis(50);
    let until = std::time::Instant::now() + time;
    loop {
        check()?;
        let left = until.saturating_duration_since(std::time::Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        std::thread::sleep(left.min(STEP));
    }
}

/// The run was interrupted by a signal.
#[derive(Debug)]
pub struct Interrupted;

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("interrupted")
    }
}

impl std::error::Error for Interrupted {}

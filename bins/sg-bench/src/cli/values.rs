//! Values of the command line that are more than a word or a number.

use libsg::units::Size;

pub(super) fn count(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| (1..=1_000_000).contains(n)).ok_or_else(|| "not from 1 to 1000000".into())
}

/// One that has rows here: those of 5 are made between guests (`ci/rxe accept`).
pub(super) fn issue(text: &str) -> Result<u8, String> {
    text.parse().ok().filter(|n| matches!(n, 2..=4 | 6)).ok_or_else(|| "not 2, 3, 4 or 6".into())
}

pub(super) fn fraction(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|f| (0.0..=1.0).contains(f)).ok_or_else(|| "not a number from 0 to 1".into())
}

pub(super) fn neighbour_memory(text: &str) -> Result<Size, String> {
    let size: Size = text.parse().map_err(|error| format!("{error}"))?;
    // A graph has at most 2^32 edges.
    if ((1 << 20)..=(16 << 30)).contains(&size.0) { Ok(size) } else { Err("not from 1M to 16G".into()) }
}

pub(super) fn on_off(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("on or off".into()),
    }
}

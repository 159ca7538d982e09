//! Tables for terminals.

/// Rows under a heading, each column as wide as its widest cell.
pub fn render(heading: &[&str], rows: &[Vec<String>]) -> String {
    let mut widths: Vec<usize> = heading.iter().map(|cell| cell.chars().count()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let padded: Vec<String> =
            cells.zip(&widths).map(|(cell, width)| format!("{cell:<width$}", width = *width)).collect();
        format!("{}\n", padded.join("  ").trim_end())
    };
    let mut text = line(&mut heading.iter().copied());
    for row in rows {
        text.push_str(&line(&mut row.iter().map(String::as_str)));
    }
    text
}

/// Bytes, in the unit that leaves one to four digits.
pub fn bytes(bytes: u64) -> String {
    let units = [(1_u64 << 40, "T"), (1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")];
    match units.iter().find(|(unit, _)| bytes >= *unit) {
        Some((unit, name)) => format!("{:.1}{name}", bytes as f64 / *unit as f64),
        None => format!("{bytes}"),
    }
}

/// Bytes a second, as bits a second.
pub fn bits(bytes_per_s: u64) -> String {
    let bits = bytes_per_s as f64 * 8.0;
    match bits {
        bits if bits >= 1e9 => format!("{:.1}gbit", bits / 1e9),
        bits => format!("{:.0}mbit", bits / 1e6),
    }
}

/// Seconds, as days, hours, minutes.
pub fn age(seconds: u64) -> String {
    match seconds {
        s if s >= 86_400 => format!("{}d{}h", s / 86_400, s % 86_400 / 3600),
        s if s >= 3600 => format!("{}h{}m", s / 3600, s % 3600 / 60),
        s if s >= 60 => format!("{}m{}s", s / 60, s % 60),
        s => format!("{s}s"),
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn columns_line_up() {
        let text = render(&["A", "LONG"], &[vec!["abc".into(), "x".into()], vec!["d".into(), "y".into()]]);
        assert_eq!(text, "A    LONG\nabc  x\nd    y\n");
        assert_eq!([0, 1023, 1536, 3 << 30].map(bytes), ["0", "1023", "1.5K", "3.0G"]);
        assert_eq!([125_000_000, 12_500_000, 0].map(bits), ["1.0gbit", "100mbit", "0mbit"]);
        assert_eq!([5, 65, 3700, 90_000].map(age), ["5s", "1m5s", "1h1m", "1d1h"]);
    }
}

//! Sizes and rates as they are written on the command line: `512M` is a power of two, `256mbit` a
//! power of ten (as in tc).

use std::fmt;
use std::str::FromStr;

use anyhow::{Result, anyhow};

/// Bytes of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

impl FromStr for Size {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let shift = match &text[digits.len()..].to_ascii_uppercase()[..] {
            "" | "B" => 0,
            "K" | "KIB" => 10,
            "M" | "MIB" => 20,
            "G" | "GIB" => 30,
            "T" | "TIB" => 40,
            _ => return Err(anyhow!("{text:?} is not a size: write 4096, 64K, 512M or 1G")),
        };
        let number: u64 = digits.parse().map_err(|_| anyhow!("{text:?} is not a size: write 512M or 1G"))?;
        let bytes = number.checked_mul(1 << shift).ok_or_else(|| anyhow!("{text:?} is too large"))?;
        Ok(Self(bytes))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(30, "G"), (20, "M"), (10, "K")] {
            if self.0 != 0 && self.0.is_multiple_of(1 << shift) {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

/// Bits a second; zero is unlimited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rate(pub u64);

impl Rate {
    /// No limit.
    pub const UNLIMITED: Self = Self(0);

    /// A whole number of megabits.
    pub const fn mbit(megabits: u64) -> Self {
        Self(megabits * 1_000_000)
    }

    /// Whether nothing limits it.
    pub fn is_unlimited(self) -> bool {
        self.0 == 0
    }

    /// Megabits a second.
    pub fn as_mbps(self) -> f64 {
        self.0 as f64 / 1e6
    }
}

impl FromStr for Rate {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || anyhow!("{text:?} is not a rate: write 256mbit, 1gbit, or 0 for unlimited");
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let factor = match &text[digits.len()..].to_ascii_lowercase()[..] {
            "" | "bit" => 1,
            "kbit" => 1_000,
            "mbit" => 1_000_000,
            "gbit" => 1_000_000_000,
            _ => return Err(wrong()),
        };
        let number: u64 = digits.parse().map_err(|_| wrong())?;
        number.checked_mul(factor).map(Self).ok_or_else(|| anyhow!("{text:?} is too large"))
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (factor, unit) in [(1_000_000_000, "gbit"), (1_000_000, "mbit"), (1_000, "kbit")] {
            if self.0 != 0 && self.0.is_multiple_of(factor) {
                return write!(f, "{}{unit}", self.0 / factor);
            }
        }
        match self.0 {
            0 => f.write_str("0"),
            bits => write!(f, "{bits}bit"),
        }
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn sizes_are_powers_of_two() {
        for (text, bytes) in [("4096", 4096), ("64K", 64 << 10), ("512M", 512 << 20), ("1g", 1 << 30)] {
            assert_eq!(text.parse::<Size>().expect(text), Size(bytes));
        }
        for wrong in ["", "M", "1.5G", "-1", "1gbit", "99999999999T"] {
            assert!(wrong.parse::<Size>().is_err(), "{wrong}");
        }
        assert_eq!(Size(1 << 30).to_string(), "1G");
        assert_eq!(Size((1 << 20) * 384).to_string(), "384M");
    }

    #[test]
    fn rates_are_powers_of_ten() {
        for (text, bits) in [("0", 0), ("256mbit", 256_000_000), ("1gbit", 1_000_000_000), ("9kbit", 9_000)] {
            let rate = text.parse::<Rate>().expect(text);
            assert_eq!((rate, &*rate.to_string()), (Rate(bits), text));
        }
        for wrong in ["", "mbit", "1M", "1.5gbit", "-1", "99999999999gbit"] {
            assert!(wrong.parse::<Rate>().is_err(), "{wrong}");
        }
        assert!(Rate::UNLIMITED.is_unlimited());
    }
}

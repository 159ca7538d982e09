//! Sizes and rates as they are written on the command line: `512M` is a power of two, `256mbit` a
//! power of ten (as in tc).

use std::fmt;
use std::str::FromStr;

use crate::error::{Error, ErrorKind};

/// Bytes of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

/// Bits a second; zero is unlimited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rate(pub u64);

impl Rate {
    /// No limit.
    pub const UNLIMITED: Self = Self(0);

    /// A whole number of megabits a second.
    #[must_use]
    pub const fn mbit(megabits: u64) -> Self {
        Self(megabits * 1_000_000)
    }

    /// Megabits a second.
    #[must_use]
    pub fn as_mbps(self) -> f64 {
        self.0 as f64 / 1e6
    }

    /// Whether nothing limits it.
    #[must_use]
    pub const fn is_unlimited(self) -> bool {
        self.0 == 0
    }

    /// Bytes a second; zero is unlimited. A rate of less than a byte is one byte, not unlimited.
    #[must_use]
    pub const fn bytes_per_s(self) -> u64 {
        self.0.div_ceil(8)
    }
}

/// The number and the unit behind it, in lower case.
fn split(text: &str) -> Option<(u64, String)> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let plain = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    let number = if plain { digits.parse().ok()? } else { return None };
    Some((number, text[digits.len()..].to_ascii_lowercase()))
}

impl FromStr for Size {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let bytes = split(text).and_then(|(number, unit)| {
            let shift = match &*unit {
                "" | "b" => 0,
                "k" | "kib" => 10,
                "m" | "mib" => 20,
                "g" | "gib" => 30,
                "t" | "tib" => 40,
                _ => return None,
            };
            number.checked_mul(1 << shift)
        });
        let wrong = || Error::new(ErrorKind::Input, format!("{text:?} is not a size: write 512M or 1G"));
        bytes.map(Self).ok_or_else(wrong)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
            if self.0 != 0 && self.0.is_multiple_of(1 << shift) {
                return write!(f, "{}{unit}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

impl FromStr for Rate {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let bits = split(text).and_then(|(number, unit)| {
            let factor = match &*unit {
                "" | "bit" => 1,
                "kbit" => 1_000,
                "mbit" => 1_000_000,
                "gbit" => 1_000_000_000,
                _ => return None,
            };
            number.checked_mul(factor)
        });
        let wrong = || {
            let what = format!("{text:?} is not a rate: write 256mbit, 1gbit, or 0 for unlimited");
            Error::new(ErrorKind::Input, what)
        };
        bits.map(Self).ok_or_else(wrong)
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
        for wrong in ["", "M", "1.5G", "-1", "+1", "1gbit", "99999999999T"] {
            assert!(wrong.parse::<Size>().is_err(), "{wrong}");
        }
        assert_eq!(Size((1 << 20) * 384).to_string(), "384M");
        assert_eq!(Size(1 << 30).to_string(), "1G");
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
        assert_eq!(
            (Rate::UNLIMITED.bytes_per_s(), Rate(1).bytes_per_s(), Rate(80).bytes_per_s()),
            (0, 1, 10)
        );
    }
}

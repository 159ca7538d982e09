//! What the guest says on its console.

/// One beat of the guest's program, every 50 ms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Beat {
    /// From 0, each the next one.
    pub number: u64,
    /// Pages written so far.
    pub writes: u64,
    /// How often every page was looked at.
    pub passes: u64,
    /// Pages found that were not what was written there last.
    pub wrong: u64,
}

/// What was said until now.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Said {
    /// Beats that are whole.
    pub beats: Vec<Beat>,
    /// Whatever tells of something that should not be: wrong pages, and a kernel that stumbles over its own.
    pub complaints: Vec<String>,
}

/// What a kernel says when it stumbles.
const STUMBLES: [&str; 7] =
    ["wrong page", "Kernel panic", "Oops", "BUG:", "general protection", "segfault", "Bad page"];

impl Said {
    /// Of what a serial port wrote; a last line without its end is not said yet.
    #[must_use]
    pub fn parse(console: &[u8]) -> Self {
        let mut said = Self::default();
        for line in console.split_inclusive(|byte| *byte == b'\n').filter(|line| line.ends_with(b"\n")) {
            let line = String::from_utf8_lossy(line);
            let line = line.trim_end();
            if let Some(beat) = beat(line) {
                said.beats.push(beat);
            } else if STUMBLES.iter().any(|stumble| line.contains(stumble)) {
                said.complaints.push(line.to_owned());
            }
        }
        said
    }
}

fn beat(line: &str) -> Option<Beat> {
    let mut words = line.strip_prefix("beat ")?.split(' ');
    let number = words.next()?.parse().ok()?;
    let mut field = |name: &str| words.next()?.strip_prefix(name)?.strip_prefix('=')?.parse().ok();
    Some(Beat { number, writes: field("writes")?, passes: field("passes")?, wrong: field("wrong")? })
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn beats_and_complaints_are_told_apart() {
        let said = Said::parse(
            b"SeaBIOS\r\nbeat 7 writes=12 passes=1 wrong=0\r\nwrong page=3 word=0 words=512\r\n\
              [    1.0] Kernel panic - not syncing\r\nbeat 8 writes\r\nbeat 9 writes=1 passes=2 wr",
        );
        assert_eq!(said.beats, [Beat { number: 7, writes: 12, passes: 1, wrong: 0 }]);
        assert_eq!(said.complaints.len(), 2, "{said:?}");
    }
}

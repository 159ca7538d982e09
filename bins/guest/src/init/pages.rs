//! Pages of which each is known: by its number, and how often it was written.

/// Words of a page of 4 KiB.
pub const PAGE_WORDS: usize = 512;

/// Of so many versions of a page the last is all zeros: pages become zero, and others again.
const ZERO_EVERY: u32 = 8;

/// The next number of a sequence (splitmix64).
pub fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut word = *state;
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// Memory, and how often each page of it was written.
pub struct Pages {
    words: Vec<u64>,
    versions: Vec<u32>,
    first: u32,
}

impl Pages {
    /// So many pages, each written once; the first one has this number.
    pub fn new(first: u32, pages: usize) -> Self {
        let mut all = Self { words: vec![0; pages * PAGE_WORDS], versions: vec![0; pages], first };
        (0..pages).for_each(|page| all.write(page));
        all
    }

    /// The number of a page beside those of all others.
    pub fn number(&self, page: usize) -> u32 {
        self.first + page as u32
    }

    pub fn len(&self) -> usize {
        self.versions.len()
    }

    /// Writes a page anew.
    pub fn write(&mut self, page: usize) {
        let version = self.versions[page].wrapping_add(1);
        self.versions[page] = version;
        let words = words(self.number(page), version);
        self.words[page * PAGE_WORDS..].iter_mut().zip(words).for_each(|(word, wanted)| *word = wanted);
    }

    /// The word of a page that is not what was written there last, if there is one, and how many they are.
    pub fn wrong(&self, page: usize) -> Option<(usize, usize)> {
        let is = &self.words[page * PAGE_WORDS..];
        let wanted = words(self.number(page), self.versions[page]);
        let mut wrong = is.iter().zip(wanted).enumerate().filter(|(_, (is, wanted))| *is != wanted);
        let (first, _) = wrong.next()?;
        Some((first, 1 + wrong.count()))
    }
}

/// What a page has in a version.
fn words(number: u32, version: u32) -> impl Iterator<Item = u64> {
    let is_zero = version % ZERO_EVERY == ZERO_EVERY - 1;
    let mut state = u64::from(number) << 32 | u64::from(version);
    (0..PAGE_WORDS).map(move |_| if is_zero { 0 } else { next(&mut state) })
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn what_changed_by_itself_is_found() {
        let mut pages = Pages::new(7, 3);
        for _ in 0..2 * ZERO_EVERY {
            pages.write(1);
            assert!((0..pages.len()).all(|page| pages.wrong(page).is_none()));
        }
        pages.words[PAGE_WORDS + 9] ^= 1;
        assert_eq!((pages.wrong(0), pages.wrong(1), pages.wrong(2)), (None, Some((9, 1)), None));
        pages.words[PAGE_WORDS + 9] ^= 1;
        pages.versions[1] += 1;
        assert_eq!(pages.wrong(1), Some((0, PAGE_WORDS)), "an older page");
        let first = pages.words[..PAGE_WORDS].to_vec();
        pages.words[2 * PAGE_WORDS..].copy_from_slice(&first);
        assert!(pages.wrong(2).is_some(), "another's page");
    }

    #[test]
    fn some_versions_are_zero() {
        let mut pages = Pages::new(0, 1);
        let mut zero = 0;
        for _ in 0..3 * ZERO_EVERY {
            pages.write(0);
            zero += u32::from(pages.words.iter().all(|word| *word == 0));
        }
        assert_eq!(zero, 3);
    }
}

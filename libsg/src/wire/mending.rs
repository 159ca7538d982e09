//! What is said of the copies of a volume's pages.

use serde::{Deserialize, Serialize};

/// How many copies a volume's pages are to have, and what an intermediary knows of those that there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mending {
    /// At how many members each page is to lie.
    pub copies: u8,
    /// Members that were away when this one last looked.
    pub away_members: u16,
    /// Copies of pages here that were missing elsewhere when it was through with making them again, as there was no room,
    /// or nobody to have them; `None` while it is at it.
    pub missing_copies: Option<u64>,
}

impl Mending {
    /// So many copies, and none is known to be missing.
    #[must_use]
    pub const fn whole(copies: u8) -> Self {
        Self { copies, away_members: 0, missing_copies: Some(0) }
    }
}

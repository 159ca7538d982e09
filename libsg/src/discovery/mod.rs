//! Which intermediaries a migration uses: a pure choice among those that announced themselves.

pub mod select;

//! Gather: how the destination comes by the pages of a VM that runs already.

mod books;
mod tracker;
#[cfg(test)]
mod tracker_test;

pub use tracker::{Claim, Counts, Path, Read, Tracker, Wanted, Word};

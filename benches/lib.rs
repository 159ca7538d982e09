//! Criterion micro-benchmarks of the page path; see the files beside this one.

//! sg-bench

fn main() {}

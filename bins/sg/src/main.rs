//! sg

fn main() {}

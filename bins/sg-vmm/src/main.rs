//! sg-vmm

fn main() {}

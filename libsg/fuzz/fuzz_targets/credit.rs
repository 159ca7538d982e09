//! See [`libsg_fuzz::targets::credit`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| libsg_fuzz::targets::credit(data));

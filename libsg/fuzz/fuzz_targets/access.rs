//! See [`libsg_fuzz::targets::access`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| libsg_fuzz::targets::access(data));

//! See [`libsg_fuzz::targets::final_set`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| libsg_fuzz::targets::final_set(data));

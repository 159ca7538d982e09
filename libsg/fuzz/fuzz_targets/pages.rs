//! See [`libsg_fuzz::targets::pages`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| libsg_fuzz::targets::pages(data));

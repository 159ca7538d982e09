//! See [`qemu_stream_fuzz::targets::stream`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| qemu_stream_fuzz::targets::stream(data));

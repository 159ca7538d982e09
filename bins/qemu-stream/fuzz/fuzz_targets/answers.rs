//! See [`qemu_stream_fuzz::targets::answers`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| qemu_stream_fuzz::targets::answers(data));

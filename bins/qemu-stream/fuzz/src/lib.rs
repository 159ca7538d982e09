//! What the fuzz targets do with their bytes. The same functions run on the stable toolchain in
//! `bins/qemu-stream/tests/fuzz.rs`.

pub mod targets;

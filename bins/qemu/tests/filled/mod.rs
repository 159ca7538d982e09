//! A VM without an operating system, whose memory was filled when it began, and can be looked at.
#![allow(dead_code, reason = "each test uses a part of it")]

use std::path::Path;

use qemu::Qmp;
use serde_json::json;

use crate::process::Qemu;

/// What is put into the guest's memory, and where.
pub const FILLED: usize = 16 << 20;
pub const FILLED_AT: u64 = 16 << 20;

/// Pages that no other is like, every fourth of them zero.
pub fn filling() -> Vec<u8> {
    let mut word = 0x9e37_79b9_7f4a_7c15_u64;
    let mut bytes = Vec::with_capacity(FILLED);
    for page in 0..FILLED / 4096 {
        for _ in 0..512 {
            word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            bytes.extend(if page % 4 == 3 { [0; 8] } else { word.to_le_bytes() });
        }
    }
    bytes
}

/// A source QEMU whose guest's memory is filled, and the bytes.
pub fn source(directory: &Path) -> (Qemu, Vec<u8>) {
    let bytes = filling();
    (source_of(directory, &["-machine", "q35", "-m", "64M"], &bytes), bytes)
}

/// One of another machine, whose guest's memory has these bytes.
pub fn source_of(directory: &Path, machine: &[&str], bytes: &[u8]) -> Qemu {
    let file = directory.join("filling");
    std::fs::write(&file, bytes).expect("written");
    let loader = format!("loader,file={},addr={FILLED_AT:#x},force-raw=on", file.display());
    Qemu::start(directory, "source", &[machine, &["-device", &loader]].concat())
}

/// The guest's memory where it was filled.
pub fn filled(qmp: &mut Qmp, directory: &Path) -> Vec<u8> {
    let file = directory.join("dump");
    let arguments = json!({ "val": FILLED_AT, "size": FILLED, "filename": file });
    qmp.execute("pmemsave", &arguments).expect("saved");
    std::fs::read(&file).expect("a dump")
}

//! Links the guest's first program once more, with all that it needs inside: a guest has no other file.

use std::path::PathBuf;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=src/init");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("init");
    let mut rustc = Command::new(std::env::var_os("RUSTC").expect("cargo sets RUSTC"));
    rustc.args(["--crate-name", "init", "--crate-type", "bin", "--edition", "2024", "-C", "opt-level=3"]);
    rustc.args(["-C", "panic=abort", "-C", "strip=symbols", "-C", "target-feature=+crt-static"]);
    rustc.args(["-C", "relocation-model=static", "src/init/main.rs", "-o"]).arg(&out);
    match rustc.status() {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("the guest's program cannot be linked ({status}): install libc6-dev"),
        Err(error) => panic!("rustc cannot be run: {error}"),
    }
}

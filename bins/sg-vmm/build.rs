//! Assembles the guest's code into a flat binary that the VMM carries inside itself.

use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=guest/guest.S");
    println!("cargo::rerun-if-env-changed=AS");
    println!("cargo::rerun-if-env-changed=OBJCOPY");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let (object, binary) = (out.join("guest.o"), out.join("guest.bin"));
    run("AS", "as", &["--64", "-o"], &object, Path::new("guest/guest.S"));
    run("OBJCOPY", "objcopy", &["-O", "binary", "-j", ".text"], &object, &binary);
}

/// Runs a tool of binutils (the environment variable `variable` names another one).
fn run(variable: &str, tool: &str, arguments: &[&str], first: &Path, second: &Path) {
    let tool = std::env::var(variable).unwrap_or_else(|_| tool.to_owned());
    let status = Command::new(&tool).args(arguments).arg(first).arg(second).status();
    match status {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("{tool} failed on the guest's code: {status}"),
        Err(error) => panic!("{tool} cannot be run ({error}): install binutils, or name one in ${variable}"),
    }
}

//! `guest initramfs`: what a guest has for files.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use clap::Parser;
use guest::{INIT, Initramfs};

/// Guests for tests and experiments with QEMU.
#[derive(Debug, Parser)]
enum Cli {
    /// Writes an archive with /init and a console, for -initrd
    Initramfs {
        /// Where to
        archive: PathBuf,
        /// The first program, linked statically [default: one that checks its own memory]
        #[arg(long, value_name = "PROGRAM")]
        init: Option<PathBuf>,
        /// Another file, and where it is in the guest (repeatable)
        #[arg(long, value_name = "PATH=FILE", value_parser = file)]
        file: Vec<(String, PathBuf)>,
    },
}

fn file(text: &str) -> Result<(String, PathBuf)> {
    let (path, file) = text.split_once('=').context("write PATH=FILE")?;
    Ok((path.trim_matches('/').to_owned(), file.into()))
}

fn main() -> Result<()> {
    let Cli::Initramfs { archive, init, file } = Cli::parse();
    let read =
        |path: &PathBuf| std::fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    let init = init.as_ref().map(read).transpose()?;
    let mut all = Initramfs::new(init.as_deref().unwrap_or(INIT));
    for (path, file) in &file {
        all.file(path, &read(file)?);
    }
    std::fs::write(&archive, all.finish()).with_context(|| format!("cannot write {}", archive.display()))
}

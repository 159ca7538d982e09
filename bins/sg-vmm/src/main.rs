//! The reference VMM: a small virtual machine on KVM whose guest checks its own memory, and which
//! migrates with libsg.

use std::process::ExitCode;

use clap::Parser;
use libsg::ErrorKind;
use sg_vmm::{app, cli};
use tracing_subscriber::EnvFilter;

fn main() -> ExitCode {
    let filter = EnvFilter::try_from_env("SG_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    let cli::Command::Run(arguments) = cli::Cli::parse().command;
    let code = app::run(&arguments).unwrap_or_else(|error| {
        tracing::error!("{}", error.chain());
        match error.kind {
            ErrorKind::Input => app::exit::USAGE,
            ErrorKind::Lost => app::exit::LOST,
            ErrorKind::Cancelled => app::exit::CANCELLED,
            _ => app::exit::FAILED,
        }
    });
    ExitCode::from(code)
}

//! Migration experiments: hosts in network namespaces, links measured in the same run, reports.

use std::process::ExitCode;

use clap::Parser as _;

mod cli;
mod interrupt;
mod lab;
mod link;
mod stats;
mod stream;
mod units;

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn".into()),
        )
        .with_writer(std::io::stderr)
        .init();
    let cli = cli::Cli::parse();
    let done = interrupt::listen().and_then(|()| match cli.command {
        cli::Command::Link(args) => link::run(&args),
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<interrupt::Interrupted>() => ExitCode::from(interrupt::EXIT_CODE),
        Err(error) => {
            eprintln!("sg-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

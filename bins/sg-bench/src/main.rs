//! Migration experiments: hosts in network namespaces, links measured in the same run, reports.

use std::process::ExitCode;

use clap::Parser as _;

mod accept;
mod beside;
mod cli;
mod cluster;
mod cost;
mod demo;
mod disk;
mod error;
mod events;
mod experiment;
mod follow;
mod interrupt;
mod lab;
mod link;
mod micro;
mod paper;
mod process;
mod rdma;
mod select;
mod stats;
mod stock;
mod stream;
mod table;
mod ui;
mod valid;

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "warn".into()),
        )
        .with_writer(std::io::stderr)
        .init();
    let cli = cli::Cli::parse();
    let done = interrupt::listen().and_then(|()| match cli.command {
        cli::Command::Migrate(args) => experiment::command(&args),
        cli::Command::Qemu(args) => stock::command(&args),
        cli::Command::Demo(args) => demo::run(&args),
        cli::Command::Accept(args) => accept::run(&args),
        cli::Command::Paper(args) => paper::run(&args),
        cli::Command::Select(args) => select::run(&args),
        cli::Command::Rdma(args) => rdma::run(&args),
        cli::Command::RdmaRows(args) => rdma::rows::run(&args),
        cli::Command::Micro => micro::run().map(|()| 0),
        cli::Command::Link(args) => link::run(&args).map(|()| 0),
        cli::Command::Beside(what) => match what {
            cli::Beside::Service { listen } => beside::service::run(listen),
            cli::Beside::Client { to, rate } => beside::client::run(to, rate),
            cli::Beside::Neighbour { memory, seed, procs } => {
                beside::neighbour::run(memory, seed, procs.as_deref())
            }
        }
        .map(|()| 0),
    });
    match done {
        Ok(code) => ExitCode::from(code),
        Err(error) if error.is::<interrupt::Interrupted>() => ExitCode::from(interrupt::EXIT_CODE),
        Err(error) => {
            eprintln!("sg-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

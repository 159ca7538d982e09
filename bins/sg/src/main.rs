//! sg: libsg for operators. The intermediary daemon, and what one asks of a pool.

mod announce;
mod ask;
mod cli;
mod evict;
mod leave;
mod local_first;
mod logs;
mod nbd;
mod notify;
mod operate;
mod others;
mod plan;
mod process;
mod rdma;
mod serve;
mod table;

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    let done = match &cli.command {
        cli::Command::Serve(args) => serve::run(args),
        cli::Command::Status(args) => operate::status(args),
        cli::Command::Ls(args) => operate::list(args),
        cli::Command::Dissolve(args) => operate::dissolve(args),
        cli::Command::Plan(args) => plan::run(args),
        cli::Command::Evict(args) => evict::run(args),
        cli::Command::Gather(args) => evict::gather(args),
        cli::Command::Cancel(args) => evict::cancel(args),
        cli::Command::Limit(args) => evict::limit(args),
        cli::Command::Nbd(args) => nbd::run(args),
        cli::Command::Rdma(args) => rdma::run(args),
    };
    match done {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("sg: {error:#}");
            // What the arguments said cannot be done; nothing was lost by it.
            let wrong = error.downcast_ref::<cli::WrongArguments>().is_some();
            ExitCode::from(if wrong { 2 } else { 1 })
        }
    }
}

//! The command line.

use clap::{ArgAction, Args, Parser, Subcommand};

use crate::lab::node::INTERMEDIARIES_MAX;
use crate::lab::{CongestionControl, LabSpec, Queue};
use crate::units::{Rate, Size};

/// Migration experiments in network namespaces, acceptance rows and micro-benchmarks
#[derive(Parser)]
#[command(version)]
pub struct Cli {
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Subcommand)]
pub enum Command {
    /// Builds the hosts and measures their links, without any VM
    Link(LabArgs),
}

/// The hosts and their links.
#[derive(Args, Clone, Debug)]
pub struct LabArgs {
    /// How many intermediaries
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u8).range(..=i64::from(INTERMEDIARIES_MAX)))]
    pub intermediaries: u8,
    /// Rate of every link; 0 = unlimited
    #[arg(long, value_name = "RATE", default_value = "1gbit")]
    pub link_rate: Rate,
    /// Rate of the intermediaries' links [default: the link rate]
    #[arg(long, value_name = "RATE")]
    pub intermediary_rate: Option<Rate>,
    /// Rate of the destination's link [default: the link rate]
    #[arg(long, value_name = "RATE")]
    pub destination_rate: Option<Rate>,
    /// Congestion control
    #[arg(long, default_value = "cubic")]
    pub cc: CongestionControl,
    /// What stands in front of each link
    #[arg(long, default_value = "prio")]
    pub queue: Queue,
    /// off = no namespaces and no limits: everything on loopback
    #[arg(long, value_name = "on|off", default_value = "on", value_parser = on_off, action = ArgAction::Set)]
    pub shape: bool,
}

impl LabArgs {
    /// The lab to build.
    pub fn spec(&self, destination_memory: Option<(Size, Size)>) -> LabSpec {
        LabSpec {
            intermediaries: self.intermediaries,
            link_rate: self.link_rate,
            destination_rate: self.destination_rate.unwrap_or(self.link_rate),
            intermediary_rate: self.intermediary_rate.unwrap_or(self.link_rate),
            queue: self.queue,
            cc: self.cc,
            shape: self.shape,
            destination_memory,
        }
    }
}

fn on_off(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("on or off".into()),
    }
}

#[cfg(test)]
mod test {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn rates_default_to_the_link_rate() {
        let cli = Cli::try_parse_from(["sg-bench", "link", "--link-rate", "2gbit", "--shape", "off"])
            .expect("parses");
        let Command::Link(args) = cli.command;
        let spec = args.spec(None);
        assert_eq!((spec.destination_rate, spec.shape), (Rate::mbit(2000), false));
    }
}

//! The command line, and what it means.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use libsg::{Error, ErrorKind, Result};

use crate::config::{BackingKind, VcpuKind, VmConfig, Workload};
use crate::kvm::KvmVm;

/// A small virtual machine whose guest checks every page of its own memory.
///
/// Start one, then tell it what to do over its control socket, one JSON object a line:
///
///   sg-vmm run --memory 1G --workload random --control /tmp/vm &
///   echo '{"do":"report"}' | socat - UNIX-CONNECT:/tmp/vm
///
/// Exit codes: 0 done; 1 failed, nothing lost; 2 wrong arguments; 3 something was lost (a page was
/// not what it must be); 4 cancelled; 130 interrupted.
#[derive(Debug, Parser)]
#[command(name = "sg-vmm", version, verbatim_doc_comment)]
pub struct Cli {
    /// What to do
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a VM until it is told to quit
    Run(Box<RunArguments>),
}

/// Which kind of vCPU was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum VcpuChoice {
    /// Of KVM, or none
    Kvm,
    /// Host threads that do natively what the guest does
    Thread,
    /// Of KVM where it can be used, else threads, with a warning
    Auto,
}

/// Arguments of `sg-vmm run`.
#[derive(Debug, Args)]
pub struct RunArguments {
    /// Guest memory: a multiple of 2M (512M, 1G, ... are powers of two)
    #[arg(long, value_parser = parse_size, value_name = "SIZE", default_value = "512M")]
    pub memory: u64,
    /// What the guest does
    #[arg(long, value_enum, default_value = "random")]
    pub workload: Workload,
    /// Page operations a second, of all vCPUs together; 0 = as many as they can
    #[arg(long, value_name = "PAGES_PER_S", default_value_t = 0)]
    pub write_rate: u64,
    /// How much of its memory the workload touches; 0 = all
    #[arg(long, value_parser = parse_size, value_name = "SIZE", default_value = "0")]
    pub working_set: u64,
    /// Fraction of pages (0 to 1) that are zero at the start; the rest is filled with random bytes
    #[arg(long, value_name = "F", default_value_t = 0.0)]
    pub zero_fraction: f64,
    /// Fraction of pages (0 to 1) whose content is the same in every VM
    #[arg(long, value_name = "F", default_value_t = 0.0)]
    pub common: f64,
    /// vCPUs; each has its own pages
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub vcpus: u16,
    /// What runs them
    #[arg(long, value_enum, default_value = "auto")]
    pub vcpu: VcpuChoice,
    /// What guest memory is made of
    #[arg(long, value_enum, default_value = "anon")]
    pub backing: BackingKind,
    /// What page contents and random choices come from
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// The VM's name, for operators
    #[arg(long, default_value = "vm")]
    pub name: String,
    /// Unix socket to listen on for commands, one JSON object a line: {"do":"stats"}, report, verify
    /// ("by": guest or vmm), pause, resume, quit, and as a canary spoil ("page": a page that is made
    /// wrong, which must be reported as exactly one mismatch)
    #[arg(long, value_name = "PATH")]
    pub control: Option<PathBuf>,
    /// Where the guest's serial output goes; - = standard output
    #[arg(long, value_name = "PATH")]
    pub serial: Option<PathBuf>,
}

impl RunArguments {
    /// The VM that these arguments describe.
    ///
    /// # Errors
    /// [`ErrorKind::Input`] for arguments out of bounds, [`ErrorKind::Vm`] when KVM was asked for
    /// and cannot be used.
    pub fn config(&self) -> Result<VmConfig> {
        let config = VmConfig {
            name: self.name.clone(),
            memory_bytes: self.memory,
            backing: self.backing,
            vcpus: self.vcpus,
            vcpu: choose(self.vcpu)?,
            workload: self.workload,
            write_rate: self.write_rate,
            working_set_bytes: self.working_set,
            zero_fraction: self.zero_fraction,
            common: self.common,
            seed: self.seed,
        };
        config.check()?;
        Ok(config)
    }
}

fn choose(choice: VcpuChoice) -> Result<VcpuKind> {
    match choice {
        VcpuChoice::Thread => Ok(VcpuKind::Thread),
        VcpuChoice::Kvm => KvmVm::probe().map(|()| VcpuKind::Kvm),
        VcpuChoice::Auto => Ok(KvmVm::probe().map_or_else(
            |error| {
                let why = error.chain();
                tracing::warn!(why, "no KVM here: vCPUs are threads, which check the same pages natively");
                VcpuKind::Thread
            },
            |()| VcpuKind::Kvm,
        )),
    }
}

/// A size: a number of bytes, or of K, M, G, T (powers of two).
fn parse_size(text: &str) -> Result<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" => Some(0),
        "K" => Some(10),
        "M" => Some(20),
        "G" => Some(30),
        "T" => Some(40),
        _ => None,
    };
    let bytes = digits.parse::<u64>().ok().zip(shift).and_then(|(n, shift)| n.checked_mul(1 << shift));
    bytes.ok_or_else(|| {
        Error::new(ErrorKind::Input, format!("{text:?} is not a size: write bytes, or 512M, 1G and the like"))
    })
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn sizes() {
        assert_eq!(parse_size("512M").expect("size"), 512 << 20);
        assert_eq!(parse_size("1g").expect("size"), 1 << 30);
        assert_eq!(parse_size("4096").expect("size"), 4096);
        for bad in ["", "M", "1.5G", "1X", "99999999999T", "-1"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_command_line_is_well_formed() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }
}

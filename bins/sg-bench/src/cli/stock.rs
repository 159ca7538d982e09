//! A stock QEMU's VM on the command line.

use std::path::PathBuf;

use clap::{Args, Parser, ValueEnum};
use libsg::units::{Rate, Size};

use super::LabArgs;

/// One VM of a stock QEMU.
///
/// A Linux of Debian's kernel (ci/guest) fills its memory, writes pages at random and checks what it reads, under QEMU's
/// software emulation: figures say how one way of moving it compares with another, not how fast QEMU is.
#[derive(Args, Clone, Debug)]
#[command(after_help = "Examples:
  sg-bench qemu --destination-rate 256mbit
  sg-bench qemu --destination-rate 256mbit --mode post-copy
  PATH=$(ci/qemu-10):$PATH sg-bench qemu --mode pre-copy --json -     # with another QEMU than the installed one")]
pub struct StockArgs {
    /// The hosts and their links
    #[command(flatten)]
    pub lab: LabArgs,
    /// How it moves: through intermediaries by sg evict, or by QEMU's own migration
    #[arg(long, default_value = "scatter-gather")]
    pub mode: StockMode,
    /// Guest memory, of which 160M are not filled
    #[arg(long, value_name = "SIZE", default_value = "1G")]
    pub memory: Size,
    /// Pages that the guest writes in a second
    #[arg(long, value_name = "PAGES_PER_S", default_value_t = 3000)]
    pub write_rate: u32,
    /// Pages that the guest checks in a second
    #[arg(long, value_name = "PAGES_PER_S", default_value_t = 20_000)]
    pub check_rate: u32,
    /// scatter-gather, hybrid: limits what enters the destination in the background; 0 = unlimited
    #[arg(long, value_name = "RATE", default_value = "0")]
    pub gather_limit: Rate,
    /// post-copy, pre-copy: the stream goes through a socat at the source, whose processor time is told
    #[arg(long)]
    pub socat: bool,
    /// Where the report goes, - for standard output
    #[arg(long, value_name = "PATH")]
    pub json: Option<PathBuf>,
}

/// Its arguments without a command.
#[derive(Parser)]
struct Bare {
    #[command(flatten)]
    args: StockArgs,
}

impl StockArgs {
    /// The defaults, as on an empty command line.
    pub fn new() -> Self {
        Bare::parse_from(["sg-bench"]).args
    }
}

/// How the VM of a stock QEMU moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum StockMode {
    /// sg evict, sg gather
    ScatterGather,
    /// The same, a round while it runs before
    Hybrid,
    /// QEMU's own, from the start on
    PostCopy,
    /// QEMU's own
    PreCopy,
}

impl StockMode {
    /// The name in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::ScatterGather => "scatter-gather",
            Self::Hybrid => "hybrid",
            Self::PostCopy => "post-copy",
            Self::PreCopy => "pre-copy",
        }
    }
}

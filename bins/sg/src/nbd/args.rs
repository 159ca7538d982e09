//! The command line of `sg nbd`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use libsg::units::Size;

use super::shared::Unwritten;
use crate::cli::{Intermediaries, LogFormat, WrongArguments, seconds};

/// Where clients come when nothing is said: the port of NBD, on this host alone.
const DEFAULT_LISTEN: ([u8; 4], u16) = ([127, 0, 0, 1], 10809);

/// Arguments of `sg nbd`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sg nbd --create scratch --size 1G --socket /run/scratch.sock --pool static:/etc/sg/pool --secret pool.secret
  nbdinfo 'nbd+unix:///scratch?socket=/run/scratch.sock'
  nbdcopy disk.img 'nbd+unix:///scratch?socket=/run/scratch.sock'
  nbd-client -unix /run/scratch.sock /dev/nbd0 -name scratch && mkfs.ext4 /dev/nbd0

  sg nbd --volume scratch --socket /run/scratch.sock --intermediary 10.0.0.3
      finds it again after sg nbd has ended, or was killed; whoever served it for writing until now is refused
  sg nbd --volume web-7 --unwritten error --intermediary 10.0.0.3
      the memory of a VM that is being evicted, to be read: nbdcopy nbd://127.0.0.1/web-7 web-7.mem

A volume made by --create is a disk: it reads as zeros until it is written, and stays at the intermediaries when sg nbd
ends (--dissolve gives it back; so does `sg dissolve`). One sg nbd writes it; any number read it. What a client has
flushed (FLUSH, FUA) is known to the intermediaries, and outlives sg nbd. There is one copy: an intermediary that dies
takes its blocks with it; reading them fails from then on, and so does the next flush.

Any other volume is a VM's memory, its regions one behind the other, and can only be read. A block that nobody has
written yet is never read as zeros: see --unwritten. What the index says is zero reads as zeros.

Clients are not authenticated: the socket's file is for this user alone, and a port beyond loopback needs --insecure.
Once it listens, one line is written to standard output:
{\"event\":\"listening\",\"uri\":\"nbd://...\",\"volume\":\"...\",\"name\":\"...\",\"bytes\":...,\"read_only\":...}

On SIGTERM or SIGINT it answers what was asked, tells the index servers all, and goes; a second one ends it at once. Exit
codes: 0 ended by a signal, 1 failed, 2 wrong arguments, 3 every intermediary of the volume is gone.")]
pub struct NbdArgs {
    /// Make a volume of this name, to be read and written
    #[arg(
        long,
        value_name = "NAME",
        requires = "size",
        required_unless_present = "volume",
        conflicts_with = "volume"
    )]
    pub create: Option<String>,
    /// How large it is: a multiple of 4096 bytes. Nothing is taken before it is written
    #[arg(long, value_name = "SIZE", requires = "create")]
    pub size: Option<Size>,
    /// Serve a volume that there is, by its name or number (see `sg ls`): to be written, too, if it was made by --create.
    /// Any one of its intermediaries is enough to find it
    #[arg(long, value_name = "VOLUME")]
    pub volume: Option<String>,
    /// Only to be read, whatever it is: beside whoever writes it
    #[arg(long, conflicts_with = "create")]
    pub read_only: bool,
    /// Listen on a Unix socket
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Listen on a TCP port; port 0 picks a free one [default: 127.0.0.1:10809, without --socket]
    #[arg(long, value_name = "ADDR:PORT", conflicts_with = "socket")]
    pub listen: Option<SocketAddr>,
    /// Listen beyond loopback: whoever reaches the port reads, and may write, the volume
    #[arg(long, requires = "listen")]
    pub insecure: bool,
    /// What becomes of a read of a block that nobody has written yet
    #[arg(long, value_enum, default_value = "wait")]
    pub unwritten: Unwritten,
    /// How long such a read waits; and how long an intermediary may be silent before it counts as gone
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    pub timeout: Duration,
    /// Serve it although not all of its intermediaries can be reached: what lies there cannot be read
    #[arg(long)]
    pub degraded: bool,
    /// Give the volume's memory back at the end; its blocks are gone
    #[arg(long, conflicts_with = "read_only")]
    pub dissolve: bool,
    /// How logs are written, to standard error
    #[arg(long, value_enum, default_value = "text")]
    pub log_format: LogFormat,
    /// Which intermediaries.
    #[command(flatten)]
    pub at: Intermediaries,
}

impl NbdArgs {
    /// The TCP port to listen on, if any.
    ///
    /// # Errors
    /// It is one that anybody may reach.
    pub fn address(&self) -> Result<SocketAddr> {
        let address = self.listen.unwrap_or_else(|| DEFAULT_LISTEN.into());
        if address.ip().is_loopback() || self.insecure {
            return Ok(address);
        }
        let what = format!(
            "listening on {address} would let anybody read the volume: listen on 127.0.0.1, or on a --socket, or say \
             --insecure"
        );
        Err(WrongArguments(what).into())
    }
}

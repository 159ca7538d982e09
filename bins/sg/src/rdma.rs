//! `sg rdma`: what devices there are, and whether a pair of hosts moves pages with them.

use std::path::PathBuf;

use anyhow::{Result, anyhow};
use clap::{Args, Subcommand};
use transports::DeviceArgs;
use vmd_rdma::RdmaConnector;
use vmd_rdma::check::{Found, check};
use vmd_rdma::verbs::kernel::{self, GidKind, LinkLayer, Port};

use crate::cli::{PORT, resolve_at, secret};

/// What to do with devices.
#[derive(Debug, Subcommand)]
pub enum RdmaCommand {
    /// Show this host's devices, and try the chosen one with an intermediary, end to end; says what is wrong, and what to do
    Check(CheckArgs),
}

/// Arguments of `sg rdma check`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sg rdma check                                                what this host has
  sg rdma check 10.0.0.3 --secret pool.secret                  with `sg serve` there
  sg rdma check 10.0.0.3 --secret pool.secret --rdma-device mlx5_0/1 --rdma-gid 3 --rdma-traffic-class 104

What it writes, 9 MiB at most, is a volume of its own there, which goes again.
Exit codes: 0 pages go over the devices, and come back as they were; 1 they do not: why; 2 wrong arguments.")]
pub struct CheckArgs {
    /// Where an intermediary listens (the port 7701 need not be named); without it only devices are shown
    #[arg(value_name = "HOST[:PORT]")]
    pub host: Option<String>,
    /// File with the pool's secret
    #[arg(long, value_name = "FILE")]
    pub secret: Option<PathBuf>,
    /// Which device.
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Does it.
pub fn run(command: &RdmaCommand) -> Result<u8> {
    let RdmaCommand::Check(args) = command;
    let chained = |error: libsg::Error| anyhow!("{}", error.chain());
    for port in kernel::ports().map_err(chained)? {
        print!("{}", told(&port));
    }
    let device = kernel::open(&args.device.choice(None)).map_err(chained)?;
    let limits = device.limits();
    println!(
        "{} is used: {} work requests at once, of {} pieces and {} MiB; {} reads at once",
        device.name(),
        limits.works_max,
        limits.pieces_max,
        limits.message_bytes_max >> 20,
        limits.reads_max
    );
    let Some(host) = &args.host else { return Ok(0) };
    let address = resolve_at(host, PORT)?;
    let connector = RdmaConnector::new(secret(args.secret.as_deref())?, device);
    let Found { node, write, read, write_bytes_per_s, read_bytes_per_s, pages } =
        check(&connector, address).map_err(chained)?;
    println!(
        "{node} at {address}: {pages} pages written, read and compared
  a page: {} µs to be safe there, {} µs to be read
  1 MiB at a time: {:.1} MB/s written, {:.1} MB/s read",
        write.as_micros(),
        read.as_micros(),
        write_bytes_per_s / 1e6,
        read_bytes_per_s / 1e6
    );
    Ok(0)
}

/// A port, for people.
fn told(port: &Port) -> String {
    let layer = match port.layer {
        LinkLayer::Ethernet => "Ethernet".to_owned(),
        LinkLayer::InfiniBand => format!("InfiniBand, LID {}", port.lid),
    };
    let state = if port.is_active { "up" } else { "down" };
    let mut text =
        format!("{}/{}: {layer}, {state}, packets of {} bytes\n", port.device, port.number, port.mtu_bytes);
    for gid in &port.gids {
        let kind = match (gid.kind, port.layer) {
            (GidKind::RoceV2, _) => "RoCE v2",
            (GidKind::Link, LinkLayer::Ethernet) => "RoCE v1, not used unless chosen",
            (GidKind::Link, LinkLayer::InfiniBand) => "InfiniBand",
        };
        text += &format!("  GID {:<3} {}  {kind}\n", gid.index, gid.address);
    }
    text
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_port_is_told_with_its_identifiers() {
        let gid =
            |index, address: &str, kind| kernel::Gid { index, address: address.parse().expect("one"), kind };
        let port = Port {
            device: "rxe0".into(),
            number: 1,
            is_active: true,
            layer: LinkLayer::Ethernet,
            lid: 0,
            mtu_bytes: 1024,
            message_bytes_max: 1 << 23,
            gids: vec![gid(0, "fe80::1", GidKind::Link), gid(1, "::ffff:10.0.0.1", GidKind::RoceV2)],
        };
        let expected = "\
rxe0/1: Ethernet, up, packets of 1024 bytes
  GID 0   fe80::1  RoCE v1, not used unless chosen
  GID 1   ::ffff:10.0.0.1  RoCE v2
";
        assert_eq!(told(&port), expected);
    }
}

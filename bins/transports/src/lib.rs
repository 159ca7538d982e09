//! How pages reach intermediaries, as operators say it: by TCP, by RDMA, or by RDMA where there is some. What commands have in
//! common; libsg itself knows the seams only.

use std::net::IpAddr;
use std::sync::Arc;

use clap::{Args, ValueEnum};
use libsg::Result;
use libsg::server::backend::Backend;
use libsg::transport::PoolSecret;
use libsg::vmd::{Connector, TcpConnector};
use vmd_rdma::verbs::kernel::{self, Choice};
use vmd_rdma::{RdmaBackend, RdmaConnector, Several};

/// How pages reach an intermediary.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Transport {
    /// RDMA where both ends have a device and packets pass between them, on each link; else TCP, which is said once
    #[default]
    Auto,
    /// TCP
    Tcp,
    /// RDMA, or not at all
    Rdma,
}

/// How pages reach intermediaries, and over which device.
#[derive(Args, Clone, Debug, Default)]
pub struct TransportArgs {
    /// How pages reach intermediaries. Everything else goes by TCP in any case, and so do the first pages of a link
    #[arg(long, value_enum, default_value = "auto")]
    pub transport: Transport,
    /// Over which device.
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Which RDMA device, and how it is used.
#[derive(Args, Clone, Debug, Default)]
pub struct DeviceArgs {
    /// The RDMA device and its port, as `rdma link` shows them: rxe0, mlx5_0/1 [default: the one with the address that is
    /// listened on, else the first that is up; of links to intermediaries the one with the address by which each goes]
    #[arg(long, value_name = "NAME[/PORT]", value_parser = device)]
    pub rdma_device: Option<(String, Option<u8>)>,
    /// The port's GID by its index (`sg rdma check` shows all) [default: the address that is listened on, else RoCE v2 with an
    /// IPv4 address, else with an IPv6 address; on InfiniBand the first]
    #[arg(long, value_name = "INDEX")]
    pub rdma_gid: Option<u32>,
    /// The traffic class of packets of RoCE: what switches choose a queue by (DSCP, times 4)
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub rdma_traffic_class: u8,
    /// Bytes of the largest packet of RDMA: 256, 512, 1024, 2048, 4096 [default: what the port sends]; of two ends the
    /// smaller counts
    #[arg(long, value_name = "BYTES", value_parser = mtu)]
    pub rdma_mtu: Option<u32>,
}

fn device(text: &str) -> std::result::Result<(String, Option<u8>), String> {
    let Some((name, port)) = text.split_once('/') else { return Ok((text.to_owned(), None)) };
    match port.parse() {
        Ok(port) if port > 0 => Ok((name.to_owned(), Some(port))),
        _ => Err("write NAME, or NAME/PORT with a port from 1".into()),
    }
}

fn mtu(text: &str) -> std::result::Result<u32, String> {
    let bytes = text.parse().ok().filter(|bytes| [256, 512, 1024, 2048, 4096].contains(bytes));
    bytes.ok_or_else(|| "one of 256, 512, 1024, 2048, 4096".into())
}

impl DeviceArgs {
    /// What they mean on a host that has this address, if it is known.
    #[must_use]
    pub fn choice(&self, near: Option<IpAddr>) -> Choice {
        Choice {
            device: self.rdma_device.as_ref().map(|(name, _)| name.clone()),
            port: self.rdma_device.as_ref().and_then(|(_, port)| *port),
            gid_index: self.rdma_gid,
            traffic_class: self.rdma_traffic_class,
            mtu_bytes: self.rdma_mtu,
            near: near.filter(|address| !address.is_unspecified() && !address.is_loopback()),
        }
    }

    /// Whether one of them says something.
    fn are_said(&self) -> bool {
        let Self { rdma_device, rdma_gid, rdma_traffic_class, rdma_mtu } = self;
        rdma_device.is_some() || rdma_gid.is_some() || *rdma_traffic_class != 0 || rdma_mtu.is_some()
    }
}

impl TransportArgs {
    /// What pages go over, opened as said, if they do.
    ///
    /// # Errors
    /// There is none, where there must be: by RDMA only, or one was described.
    fn open<D>(&self, near: Option<IpAddr>, open: fn(&Choice) -> Result<D>) -> Result<Option<D>> {
        if self.transport == Transport::Tcp {
            return Ok(None);
        }
        match open(&self.device.choice(near)) {
            Ok(device) => Ok(Some(device)),
            Err(error) if self.transport == Transport::Rdma || self.device.are_said() => Err(error),
            Err(error) => {
                tracing::info!(why = error.chain(), "pages go by TCP: no RDMA here");
                Ok(None)
            }
        }
    }

    /// What makes links to intermediaries.
    ///
    /// # Errors
    /// There is no device, where there must be one.
    pub fn connector(&self, secret: PoolSecret, near: Option<IpAddr>) -> Result<Arc<dyn Connector>> {
        let Some(devices) = self.open(near, Several::open)? else {
            return Ok(Arc::new(TcpConnector::new(secret)));
        };
        let connector = RdmaConnector::among(secret, Arc::new(devices));
        Ok(Arc::new(if self.transport == Transport::Rdma { connector.strict() } else { connector }))
    }

    /// What an intermediary offers beside TCP.
    ///
    /// # Errors
    /// There is no device, where there must be one.
    pub fn backend(&self, near: IpAddr) -> Result<Option<Arc<dyn Backend>>> {
        let device = self.open(Some(near), kernel::open)?;
        Ok(device.map(|device| {
            tracing::info!(device = device.name(), "clients may move pages by RDMA");
            Arc::new(RdmaBackend::new(device)) as Arc<dyn Backend>
        }))
    }
}

#[cfg(test)]
mod test {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: TransportArgs,
    }

    fn parse(words: &[&str]) -> std::result::Result<TransportArgs, clap::Error> {
        Cli::try_parse_from([&["x"], words].concat()).map(|cli| cli.args)
    }

    #[test]
    fn arguments_say_which_device() {
        let args = parse(&[]).expect("good");
        assert_eq!((args.transport, args.device.choice(None)), (Transport::Auto, Choice::default()));
        let words = [
            "--transport",
            "rdma",
            "--rdma-device",
            "mlx5_0/2",
            "--rdma-gid",
            "3",
            "--rdma-traffic-class",
            "104",
        ];
        let args = parse(&[&words[..], &["--rdma-mtu", "1024"]].concat()).expect("good");
        assert_eq!(args.transport, Transport::Rdma);
        let choice = args.device.choice(Some(IpAddr::from([10, 0, 0, 1])));
        let expected = Choice {
            device: Some("mlx5_0".into()),
            port: Some(2),
            gid_index: Some(3),
            traffic_class: 104,
            mtu_bytes: Some(1024),
            near: Some(IpAddr::from([10, 0, 0, 1])),
        };
        assert_eq!(choice, expected);
        assert_eq!(args.device.choice(Some(IpAddr::from([0, 0, 0, 0]))).near, None);
        for wrong in [
            ["--transport", "udp"],
            ["--rdma-device", "rxe0/x"],
            ["--rdma-device", "rxe0/0"],
            ["--rdma-mtu", "1500"],
        ] {
            assert!(parse(&wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn what_was_asked_for_by_name_is_not_replaced_by_tcp() {
        let said = parse(&["--rdma-device", "no-such-device"]).expect("good");
        assert!(said.connector(PoolSecret::open(), None).is_err());
        assert!(said.backend(IpAddr::from([127, 0, 0, 1])).is_err());
        let tcp = parse(&["--transport", "tcp", "--rdma-device", "no-such-device"]).expect("good");
        assert!(tcp.connector(PoolSecret::open(), None).is_ok());
        assert!(tcp.backend(IpAddr::from([127, 0, 0, 1])).expect("none needed").is_none());
        // Whatever this host has.
        assert!(parse(&[]).expect("good").connector(PoolSecret::open(), None).is_ok());
    }
}

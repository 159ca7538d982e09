//! Ports, and which of them is meant: from what they are, without a device.

use std::net::{IpAddr, Ipv6Addr};

use libsg::{Error, ErrorKind, Result};

use super::{Choice, refusal};

/// A port of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// The device, as the kernel names it.
    pub device: String,
    /// From 1.
    pub number: u8,
    /// Whether it carries anything.
    pub is_active: bool,
    /// What is below.
    pub layer: LinkLayer,
    /// The local identifier, on InfiniBand.
    pub lid: u16,
    /// Bytes of the largest packet at the moment.
    pub mtu_bytes: u32,
    /// Bytes of the largest message.
    pub message_bytes_max: u32,
    /// Its global identifiers, those of all zeroes left out.
    pub gids: Vec<Gid>,
}

/// What carries the packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkLayer {
    /// Ethernet: RoCE.
    Ethernet,
    /// InfiniBand.
    InfiniBand,
}

/// A global identifier of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gid {
    /// Where it is in the port's table.
    pub index: u32,
    /// IPv4 addresses are mapped ones.
    pub address: Ipv6Addr,
    /// What is sent under it.
    pub kind: GidKind,
}

/// What is sent under an identifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GidKind {
    /// InfiniBand, or RoCE version 1: its own kind of frames, which no router passes on.
    Link,
    /// RoCE version 2: UDP.
    RoceV2,
}

/// A port with the identifier and settings that are used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Picked {
    pub port: Port,
    pub gid: Gid,
    pub mtu_bytes: u32,
    pub traffic_class: u8,
}

impl Gid {
    pub(super) fn is(&self, address: IpAddr) -> bool {
        let own = match address {
            IpAddr::V4(address) => address.to_ipv6_mapped(),
            IpAddr::V6(address) => address,
        };
        self.address == own
    }

    /// The best first, on Ethernet.
    fn rank(&self) -> u8 {
        match (self.address.to_ipv4_mapped(), self.address.is_unicast_link_local()) {
            (Some(_), _) => 0,
            (None, false) => 1,
            (None, true) => 2,
        }
    }
}

impl std::fmt::Display for Port {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "port {} of {}", self.number, self.device)
    }
}

/// The port that is meant, with its identifier.
pub(super) fn pick(ports: &[Port], choice: &Choice) -> Result<Picked> {
    let named: Vec<&Port> = ports
        .iter()
        .filter(|port| choice.device.as_ref().is_none_or(|name| *name == port.device))
        .filter(|port| choice.port.is_none_or(|number| number == port.number))
        .collect();
    if named.is_empty() {
        return Err(refusal::no_such_port(ports, choice));
    }
    let active: Vec<&Port> = named.iter().copied().filter(|port| port.is_active).collect();
    let near = |port: &&Port| choice.near.is_some_and(|near| port.gids.iter().any(|gid| gid.is(near)));
    let Some(port) = active.iter().copied().find(near).or(active.first().copied()) else {
        let what = format!("{} is down: is its link up, and its interface? See `rdma link`", named[0]);
        return Err(Error::new(ErrorKind::Input, what));
    };
    let mtu_bytes = choice.mtu_bytes.unwrap_or(port.mtu_bytes);
    if mtu_bytes > port.mtu_bytes {
        let what = format!(
            "packets of {mtu_bytes} bytes are more than {port} sends now, which is {}: raise the interface's MTU, or ask \
             for less",
            port.mtu_bytes
        );
        return Err(Error::new(ErrorKind::Input, what));
    }
    let gid = gid_of(port, choice)?;
    Ok(Picked { port: port.clone(), gid, mtu_bytes, traffic_class: choice.traffic_class })
}

fn gid_of(port: &Port, choice: &Choice) -> Result<Gid> {
    let told = || port.gids.iter().map(|gid| format!("{} {}", gid.index, gid.address)).collect::<Vec<_>>();
    if let Some(index) = choice.gid_index {
        return port.gids.iter().copied().find(|gid| gid.index == index).ok_or_else(|| {
            let what = format!("{port} has no GID {index}: it has {}", told().join(", "));
            Error::new(ErrorKind::Input, what)
        });
    }
    let own = port.gids.iter().filter(|gid| match port.layer {
        LinkLayer::Ethernet => gid.kind == GidKind::RoceV2,
        LinkLayer::InfiniBand => gid.kind == GidKind::Link,
    });
    let near = own.clone().find(|gid| choice.near.is_some_and(|near| gid.is(near)));
    let best = || match port.layer {
        LinkLayer::Ethernet => own.clone().min_by_key(|gid| gid.rank()),
        LinkLayer::InfiniBand => own.clone().next(),
    };
    near.or_else(best).copied().ok_or_else(|| {
        let what = format!(
            "{port} has no RoCE v2 GID: give its interface an IP address (its GIDs: {})",
            told().join(", ")
        );
        Error::new(ErrorKind::Input, what)
    })
}

#[cfg(test)]
mod test {
    use super::*;

    fn gid(index: u32, address: &str, kind: GidKind) -> Gid {
        Gid { index, address: address.parse().expect("an address"), kind }
    }

    fn ethernet(device: &str, v4: &str) -> Port {
        let gids = vec![
            gid(0, "fe80::1", GidKind::Link),
            gid(1, "fe80::1", GidKind::RoceV2),
            gid(2, "2001:db8::1", GidKind::RoceV2),
            gid(3, &format!("::ffff:{v4}"), GidKind::RoceV2),
        ];
        Port {
            device: device.into(),
            number: 1,
            is_active: true,
            layer: LinkLayer::Ethernet,
            lid: 0,
            mtu_bytes: 1024,
            message_bytes_max: 8 << 20,
            gids,
        }
    }

    fn infiniband() -> Port {
        let gids = vec![gid(0, "fe80::9", GidKind::Link)];
        Port {
            device: "mlx5_0".into(),
            layer: LinkLayer::InfiniBand,
            lid: 7,
            gids,
            ..ethernet("", "10.0.0.9")
        }
    }

    fn near(address: &str) -> Choice {
        Choice { near: Some(address.parse().expect("an address")), ..Choice::default() }
    }

    #[test]
    fn the_port_near_an_address_and_its_own_gid_are_picked() {
        let ports = [ethernet("rxe0", "10.0.0.1"), ethernet("rxe1", "10.0.1.1"), infiniband()];
        let picked = |choice: &Choice| {
            let picked = pick(&ports, choice).expect("one");
            (picked.port.device, picked.gid.index)
        };
        assert_eq!(picked(&Choice::default()), ("rxe0".into(), 3), "IPv4 first");
        assert_eq!(picked(&near("10.0.1.1")), ("rxe1".into(), 3));
        assert_eq!(picked(&near("2001:db8::1")), ("rxe0".into(), 2));
        assert_eq!(picked(&near("192.0.2.1")), ("rxe0".into(), 3), "nobody has it");
        let named = |device: &str| Choice { device: Some(device.into()), ..Choice::default() };
        assert_eq!(picked(&named("mlx5_0")), ("mlx5_0".into(), 0));
        assert_eq!(picked(&Choice { gid_index: Some(1), ..named("rxe1") }), ("rxe1".into(), 1));
    }

    #[test]
    fn what_there_is_not_is_said_with_what_there_is() {
        let down = Port { is_active: false, ..ethernet("rxe1", "10.0.1.1") };
        let bare = Port { gids: vec![gid(0, "fe80::1", GidKind::Link)], ..ethernet("rxe2", "10.0.2.1") };
        let ports = [ethernet("rxe0", "10.0.0.1"), down, bare];
        let refused = |choice: Choice| {
            let error = pick(&ports, &choice).expect_err("none");
            assert_eq!(error.kind, ErrorKind::Input);
            error.message
        };
        let named = |device: &str| Choice { device: Some(device.into()), ..Choice::default() };
        assert!(refused(named("rxe9")).contains("rxe0"));
        assert!(refused(Choice { port: Some(2), ..named("rxe0") }).contains("rxe0"));
        assert!(refused(named("rxe1")).contains("down"));
        assert!(refused(named("rxe2")).contains("RoCE v2"));
        assert!(refused(Choice { gid_index: Some(8), ..Choice::default() }).contains("3 ::ffff:10.0.0.1"));
        assert!(refused(Choice { mtu_bytes: Some(2048), ..Choice::default() }).contains("1024"));
        let less = Choice { mtu_bytes: Some(512), ..Choice::default() };
        assert_eq!(pick(&ports, &less).expect("less").mtu_bytes, 512);
    }
}

//! Where announcements are kept: `etcd://HOST:PORT[,HOST:PORT…]/PREFIX`.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, ToSocketAddrs as _, UdpSocket};
use std::str::FromStr;

use libsg::{Error, ErrorKind, Result};

/// The port of etcd's clients.
const PORT: u16 = 2379;

/// Members of one etcd cluster that may be named: it has seven at most.
const ENDPOINTS_MAX: usize = 16;

/// Bytes of the longest prefix.
const PREFIX_BYTES_MAX: usize = 128;

/// An etcd, and the prefix of a pool's keys in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// `HOST:PORT` of each member that may be asked.
    endpoints: Vec<String>,
    prefix: String,
}

impl Place {
    /// `HOST:PORT` of each member that may be asked.
    #[must_use]
    pub fn endpoints(&self) -> &[String] {
        &self.endpoints
    }

    /// What all keys of the pool begin with, before a slash.
    #[must_use]
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// Our own address on the way there.
    ///
    /// # Errors
    /// [`ErrorKind::System`] when no member's name is known, or no route leads there.
    pub fn own_address(&self) -> Result<IpAddr> {
        let mut last = None;
        for endpoint in &self.endpoints {
            match towards(endpoint) {
                Ok(own) => return Ok(own),
                Err(error) => last = Some(error),
            }
        }
        let what = format!("no route leads to {}", self.endpoints.join(", "));
        let error = Error::new(ErrorKind::System, what);
        Err(match last {
            Some(cause) => error.because(cause),
            None => error,
        })
    }
}

fn towards(endpoint: &str) -> std::io::Result<IpAddr> {
    let known = endpoint.to_socket_addrs()?.next();
    let there = known.ok_or_else(|| std::io::Error::other("the name has no address"))?;
    let any: IpAddr =
        if there.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    // Nothing is sent by this.
    let socket = UdpSocket::bind((any, 0))?;
    socket.connect(there)?;
    Ok(socket.local_addr()?.ip())
}

impl FromStr for Place {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let refuse = |why: &str| {
            let what = format!("{text:?} is not like etcd://10.0.0.1:2379,10.0.0.2:2379/sg/rack7: {why}");
            Error::new(ErrorKind::Input, what)
        };
        let rest = text.strip_prefix("etcd://").ok_or_else(|| refuse("it begins with etcd://"))?;
        let (hosts, prefix) = rest.split_once('/').ok_or_else(|| refuse("a /PREFIX follows the hosts"))?;
        let prefix = prefix.trim_matches('/');
        if prefix.is_empty() || prefix.len() > PREFIX_BYTES_MAX {
            return Err(refuse("the prefix has 1 to 128 bytes"));
        }
        if !prefix.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-/".contains(&byte)) {
            return Err(refuse("the prefix is of letters, digits, '.', '_', '-' and '/'"));
        }
        let endpoints: Option<Vec<_>> = hosts.split(',').map(endpoint).collect();
        let endpoints = endpoints.ok_or_else(|| refuse("a host is HOST, HOST:PORT or [IPV6]:PORT"))?;
        if endpoints.len() > ENDPOINTS_MAX {
            return Err(refuse("at most 16 members are named"));
        }
        Ok(Self { endpoints, prefix: prefix.to_owned() })
    }
}

/// `HOST:PORT` of what may lack the port.
fn endpoint(text: &str) -> Option<String> {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']')?;
            host.parse::<Ipv6Addr>().ok()?;
            (format!("[{host}]"), if port.is_empty() { None } else { Some(port.strip_prefix(':')?) })
        }
        None => match text.split_once(':') {
            Some((host, port)) => (host.to_owned(), Some(port)),
            None => (text.to_owned(), None),
        },
    };
    let is_name = |name: &str| {
        !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte))
    };
    if !host.starts_with('[') && !is_name(&host) {
        return None;
    }
    let port = port.map_or(Some(PORT), |port| port.parse().ok().filter(|port| *port != 0))?;
    Some(format!("{host}:{port}"))
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "etcd://{}/{}", self.endpoints.join(","), self.prefix)
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn places_are_read_as_they_are_written() {
        for (text, endpoints, prefix) in [
            ("etcd://10.0.0.1/sg", "10.0.0.1:2379", "sg"),
            (
                "etcd://a.example:1,b-2,[::1]:9,[::1]/sg/rack7/",
                "a.example:1 b-2:2379 [::1]:9 [::1]:2379",
                "sg/rack7",
            ),
        ] {
            let place: Place = text.parse().expect("good");
            assert_eq!((&*place.endpoints.join(" "), place.prefix()), (endpoints, prefix));
            assert_eq!(place.to_string().parse::<Place>().expect("good"), place);
        }
        let many = format!("etcd://{}a/sg", "a,".repeat(ENDPOINTS_MAX));
        let long = format!("etcd://a/{}", "x".repeat(PREFIX_BYTES_MAX + 1));
        for wrong in [
            "",
            "etcd://",
            "etcd://a",
            "etcd://a/",
            "etcd:///sg",
            "etcd://a:0/sg",
            "etcd://a:b/sg",
            "etcd://a,/sg",
            "etcd://a b/sg",
            "etcd://[a]:1/sg",
            "etcd://[::1]x/sg",
            "etcd://::1/sg",
            "etcd://a/s g",
            "etcd://u@a/sg",
            "http://a/sg",
            &many,
            &long,
        ] {
            let error = wrong.parse::<Place>().expect_err(wrong);
            assert_eq!(error.kind, ErrorKind::Input, "{wrong}");
        }
    }

    #[test]
    fn our_own_address_is_the_one_that_leads_there() {
        let place: Place = "etcd://no-such-host.invalid,127.0.0.1:1/sg".parse().expect("good");
        assert_eq!(place.own_address().expect("loopback"), Ipv4Addr::LOCALHOST);
    }
}

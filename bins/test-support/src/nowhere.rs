//! Addresses at which nobody listens yet.

use std::net::{SocketAddr, TcpListener};

/// Where a process can be told to listen. It was free a moment ago, at an address of loopback that only this process asks the
/// kernel for ports of: nobody else is given it meanwhile.
///
/// # Panics
/// No port is free.
#[must_use]
pub fn free_address() -> SocketAddr {
    // Numbers of processes have 22 bits.
    let [_, high, middle, low] = std::process::id().to_be_bytes();
    let listener =
        TcpListener::bind(SocketAddr::from(([127, 64 | high, middle, low], 0))).expect("a port is free");
    listener.local_addr().expect("it is bound")
}

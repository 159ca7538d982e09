//! A port that is listened on.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};

/// A port that is listened on.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    address: SocketAddr,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    /// Readable while somebody waits to be accepted.
    #[cfg(feature = "simulation")]
    Simulated(std::os::fd::OwnedFd),
}

impl Listener {
    /// Over the socket that `bind` makes.
    ///
    /// # Errors
    /// Of `bind`; in a simulated world, that somebody listens there.
    pub fn bind(
        address: SocketAddr,
        bind: impl FnOnce(SocketAddr) -> io::Result<TcpListener>,
    ) -> io::Result<Self> {
        #[cfg(feature = "simulation")]
        if let Some(world) = super::simulation::world() {
            let socket = Socket::Simulated(world.listen(address)?);
            return Ok(Self { socket, address });
        }
        let socket = bind(address)?;
        let address = socket.local_addr()?;
        Ok(Self { socket: Socket::Tcp(socket), address })
    }

    /// Where it listens.
    #[must_use]
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// The next connection. Waits for it, unless the socket does not block.
    ///
    /// # Errors
    /// Of the kernel; [`io::ErrorKind::WouldBlock`] where there is none and the socket does not block, and always
    /// in a simulated world.
    pub fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        match &self.socket {
            Socket::Tcp(socket) => socket.accept(),
            #[cfg(feature = "simulation")]
            Socket::Simulated(_) => match super::simulation::world() {
                Some(world) => world.accept(self.address),
                None => Err(io::ErrorKind::NotConnected.into()),
            },
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.socket {
            Socket::Tcp(socket) => socket.as_fd(),
            #[cfg(feature = "simulation")]
            Socket::Simulated(socket) => socket.as_fd(),
        }
    }
}

//! Where clients come: a Unix socket, or a TCP port. Each client has a thread of its own.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use libsg::transport::wait;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};

use super::connection;
use super::shared::Shared;

/// Connections at once; further ones are closed at once. Each may hold the bytes of one long request, 32 MiB.
const CONNECTIONS_MAX: usize = 16;

/// How long it is waited where nothing happens; stopping wakes.
const LONG: Duration = Duration::from_secs(60);

/// A socket that is listened on. Its file goes with it.
#[derive(Debug)]
pub enum Listener {
    /// A TCP port.
    Tcp(TcpListener),
    /// A Unix socket, and its file.
    Unix(UnixListener, PathBuf),
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            // Somebody may have removed it.
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Listener {
    /// On a TCP port.
    ///
    /// # Errors
    /// It is in use, or may not be used.
    pub fn tcp(address: SocketAddr) -> Result<Self> {
        let listener = TcpListener::bind(address).with_context(|| {
            format!("cannot listen on {address}: is another `sg nbd` there? --listen names another")
        })?;
        listener.set_nonblocking(true)?;
        Ok(Self::Tcp(listener))
    }

    /// On a Unix socket that only this user can reach.
    ///
    /// # Errors
    /// Somebody listens there, or what is there is no socket.
    pub fn unix(path: &Path) -> Result<Self> {
        if path.exists() {
            // What a killed process left is in nobody's way.
            match UnixStream::connect(path) {
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
                    use std::os::unix::fs::FileTypeExt as _;
                    if !std::fs::metadata(path)?.file_type().is_socket() {
                        bail!("{} is there, and is no socket: --socket names another", path.display());
                    }
                    std::fs::remove_file(path)?;
                }
                Err(error) => bail!("{} is there, and is no socket to listen on: {error}", path.display()),
                Ok(_) => bail!("{} is in use by another process: --socket names another", path.display()),
            }
        }
        let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None)?;
        let what = || format!("cannot listen on {}", path.display());
        rustix::net::bind(&socket, &SocketAddrUnix::new(path)?).with_context(what)?;
        // Nobody can connect before it is listened on.
        use std::os::unix::fs::PermissionsExt as _;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).with_context(what)?;
        rustix::net::listen(&socket, 64).with_context(what)?;
        let listener = UnixListener::from(socket);
        listener.set_nonblocking(true)?;
        Ok(Self::Unix(listener, path.to_owned()))
    }

    /// How clients name it, with the name of the export.
    pub fn uri(&self, name: &str) -> String {
        let name = percent(name);
        match self {
            Self::Tcp(listener) => {
                let address =
                    listener.local_addr().map_or_else(|_| "?".into(), |address| address.to_string());
                format!("nbd://{address}/{name}")
            }
            Self::Unix(_, path) => {
                let path = path.canonicalize().unwrap_or_else(|_| path.clone());
                format!("nbd+unix:///{name}?socket={}", percent(&path.to_string_lossy()))
            }
        }
    }

    /// The next client, if there is one.
    fn accept(&self) -> std::io::Result<OwnedFd> {
        match self {
            Self::Tcp(listener) => {
                let (stream, _) = listener.accept()?;
                stream.set_nodelay(true)?;
                stream.set_nonblocking(true)?;
                Ok(stream.into())
            }
            Self::Unix(listener, _) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(true)?;
                Ok(stream.into())
            }
        }
    }

    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(listener) => listener.as_fd(),
            Self::Unix(listener, _) => listener.as_fd(),
        }
    }
}

/// A text in a URI.
fn percent(text: &str) -> String {
    let mut out = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~/".contains(&byte) {
            out.push(byte.into());
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

/// Takes clients until the end is asked for, and waits then for those that are there.
///
/// # Errors
/// The kernel does not let it wait.
pub fn run(shared: &Arc<Shared>, listener: &Listener) -> Result<()> {
    let open = Arc::new(AtomicUsize::new(0));
    let mut threads: Vec<JoinHandle<()>> = Vec::new();
    let mut number = 0;
    while !shared.is_stopping() && !shared.has_failed() {
        wait(&[(Some(listener.as_fd()), false), (Some(shared.last.as_fd()), false)], LONG)?;
        while let Ok(socket) = listener.accept() {
            threads.retain(|thread| !thread.is_finished());
            number += 1;
            if open.load(Ordering::SeqCst) >= CONNECTIONS_MAX {
                tracing::warn!(connections = CONNECTIONS_MAX, "a client is sent away: too many are here");
                continue;
            }
            open.fetch_add(1, Ordering::SeqCst);
            let (shared, open) = (Arc::clone(shared), Arc::clone(&open));
            let name = format!("sg-nbd-{number}");
            let thread = std::thread::Builder::new().name(name).spawn(move || {
                let _open = Open(open);
                serve(&shared, socket, number);
            })?;
            threads.push(thread);
        }
    }
    for thread in threads {
        if thread.join().is_err() {
            tracing::error!("a connection's thread panicked");
        }
    }
    Ok(())
}

/// Counts a connection until its thread ends, however that is.
struct Open(Arc<AtomicUsize>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

fn serve(shared: &Arc<Shared>, socket: OwnedFd, number: u64) {
    tracing::debug!(number, "a client");
    match connection::run(shared, socket, number) {
        Ok(()) => tracing::debug!(number, "a client has gone"),
        Err(error) => tracing::warn!(number, error = error.chain(), "a connection ended"),
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_socket_in_use_is_refused_and_a_left_one_is_taken() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("a b");
        let one = Listener::unix(&path).expect("free");
        assert!(one.uri("my disk").starts_with("nbd+unix:///my%20disk?socket=/"), "{}", one.uri("my disk"));
        let error = Listener::unix(&path).expect_err("in use").to_string();
        assert!(error.contains("in use"), "{error}");
        drop(one);
        assert!(!path.exists());
        drop(UnixListener::bind(&path).expect("free"));
        assert!(path.exists(), "as a killed process leaves it");
        let _two = Listener::unix(&path).expect("nobody listens");
        let file = directory.path().join("file");
        std::fs::write(&file, "x").expect("written");
        assert!(Listener::unix(&file).is_err() && file.exists());
    }
}

//! A network that can be cut: a TCP proxy on loopback.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Duration;

use libsg::wire::header::MAGIC;
use libsg::wire::message::{Talk, encode};
use libsg::wire::{HEADER_BYTES, Header, Kind};
use parking_lot::Mutex;

use super::PATIENCE;

const PASS: u8 = 0;
const HOLD: u8 = 1;
const CUT: u8 = 2;
const END: u8 = 3;
/// Passes until READY is said, and then holds it.
const UNTIL_READY: u8 = 4;

const LOOK: Duration = Duration::from_millis(5);

struct Shared {
    /// To whom.
    to: SocketAddr,
    /// What happens to bytes of the client.
    up: AtomicU8,
    /// What happens to bytes of the server.
    down: AtomicU8,
    open: Mutex<Vec<TcpStream>>,
}

/// A proxy to one address. Ends, with all its connections, when dropped.
pub struct Proxy {
    /// Where it listens.
    pub address: SocketAddr,
    shared: Arc<Shared>,
}

impl Proxy {
    /// To this address.
    pub fn to(to: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("listens");
        let address = listener.local_addr().expect("an address");
        listener.set_nonblocking(true).expect("non-blocking");
        let shared = Arc::new(Shared { to, up: PASS.into(), down: PASS.into(), open: Mutex::default() });
        let of = Arc::clone(&shared);
        std::thread::spawn(move || {
            while of.up.load(Ordering::SeqCst) != END {
                match listener.accept() {
                    Ok((client, _)) if of.up.load(Ordering::SeqCst) != CUT => of.connect(client),
                    Ok(_) => {}
                    Err(_) => std::thread::sleep(LOOK),
                }
            }
        });
        Self { address, shared }
    }

    /// Passes bytes both ways again, and takes new connections.
    pub fn pass(&self) {
        self.set(PASS);
    }

    /// Bytes go nowhere, as when a cable is out: nobody is told.
    pub fn hold(&self) {
        self.set(HOLD);
    }

    /// What the client says goes nowhere.
    pub fn hold_requests(&self) {
        self.shared.up.store(HOLD, Ordering::SeqCst);
    }

    /// What the server says goes nowhere.
    pub fn hold_answers(&self) {
        self.shared.down.store(HOLD, Ordering::SeqCst);
    }

    /// What a destination says, from READY on, goes nowhere.
    pub fn hold_ready(&self) {
        self.shared.down.store(UNTIL_READY, Ordering::SeqCst);
    }

    /// What the server says goes on, and what it has said.
    pub fn pass_answers(&self) {
        self.shared.down.store(PASS, Ordering::SeqCst);
    }

    /// Every connection is reset, and no new one is made.
    pub fn cut(&self) {
        self.set(CUT);
        for stream in self.shared.open.lock().drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    fn set(&self, what: u8) {
        self.shared.up.store(what, Ordering::SeqCst);
        self.shared.down.store(what, Ordering::SeqCst);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.cut();
        self.set(END);
    }
}

impl Shared {
    fn connect(self: &Arc<Self>, client: TcpStream) {
        let Ok(server) = TcpStream::connect_timeout(&self.to, PATIENCE) else { return };
        let _ = client.set_nonblocking(false);
        let (Ok(client_too), Ok(server_too)) = (client.try_clone(), server.try_clone()) else { return };
        let clones = [client.try_clone(), server.try_clone()];
        self.open.lock().extend(clones.into_iter().flatten());
        let (up, down) = (Arc::clone(self), Arc::clone(self));
        std::thread::spawn(move || up.pump(client, server, |shared| &shared.up));
        std::thread::spawn(move || down.pump(server_too, client_too, |shared| &shared.down));
    }

    fn pump(&self, mut from: TcpStream, mut to: TcpStream, mode: impl Fn(&Self) -> &AtomicU8) {
        let mut bytes = vec![0; 64 << 10];
        let _ = from.set_nodelay(true);
        let _ = to.set_nodelay(true);
        while let Ok(n @ 1..) = from.read(&mut bytes) {
            let mode = mode(self);
            if says_ready(&bytes[..n]) {
                // Unless it passes by now.
                let _ = mode.compare_exchange(UNTIL_READY, HOLD, Ordering::SeqCst, Ordering::SeqCst);
            }
            while mode.load(Ordering::SeqCst) == HOLD {
                std::thread::sleep(LOOK);
            }
            if !matches!(mode.load(Ordering::SeqCst), PASS | UNTIL_READY)
                || to.write_all(&bytes[..n]).is_err()
            {
                break;
            }
        }
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
    }
}

fn says_ready(bytes: &[u8]) -> bool {
    let ready = encode(&Talk::Ready).expect("encodes");
    bytes.windows(HEADER_BYTES + ready.len()).any(|frame| {
        let (header, body) = frame.split_at(HEADER_BYTES);
        let header = header.try_into().ok().filter(|_| header.starts_with(&MAGIC) && body == ready);
        let header = header.and_then(|header| Header::decode(header).ok());
        header.is_some_and(|it| it.kind == Kind::Talk && it.body_bytes as usize == ready.len())
    })
}

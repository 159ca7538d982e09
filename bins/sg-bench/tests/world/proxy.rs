//! A network that can be cut: a TCP proxy on loopback.

use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

const PASS: u8 = 0;
const HOLD: u8 = 1;
const CUT: u8 = 2;
const END: u8 = 3;

const LOOK: Duration = Duration::from_millis(5);

struct Shared {
    /// To whom.
    to: SocketAddr,
    /// What happens to bytes of the client.
    up: AtomicU8,
    /// What happens to bytes of the server.
    down: AtomicU8,
    /// How long bytes of the server take.
    delay_ms: AtomicU64,
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
        let shared = Arc::new(Shared {
            to,
            up: PASS.into(),
            down: PASS.into(),
            delay_ms: 0.into(),
            open: Mutex::default(),
        });
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

    /// What the server says takes so long.
    pub fn delay_answers(&self, delay: Duration) {
        self.shared.delay_ms.store(delay.as_millis() as u64, Ordering::SeqCst);
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
        let Ok(server) = TcpStream::connect_timeout(&self.to, Duration::from_secs(1)) else { return };
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
            if std::ptr::eq(mode(self), &self.down) {
                std::thread::sleep(Duration::from_millis(self.delay_ms.load(Ordering::SeqCst)));
            }
            while mode(self).load(Ordering::SeqCst) == HOLD {
                std::thread::sleep(LOOK);
            }
            if mode(self).load(Ordering::SeqCst) != PASS || to.write_all(&bytes[..n]).is_err() {
                break;
            }
        }
        let _ = from.shutdown(Shutdown::Both);
        let _ = to.shutdown(Shutdown::Both);
    }
}

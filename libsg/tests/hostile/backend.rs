//! A backend whose other network is this process's memory: it checks what a device would, and forgets nothing.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use libsg::server::backend::{Attached, Backend, ChunkMemory, Domain, Opened, Rights};
use libsg::wire::access::{AccessKey, Endpoint};
use libsg::{Error, ErrorKind, Result};
use parking_lot::Mutex;

/// Who is let in, and what is open.
#[derive(Debug, Default)]
struct Books {
    numbers: u64,
    /// Domains by client.
    clients: HashMap<u64, u64>,
    open: HashMap<u64, (u64, ChunkMemory, Rights)>,
    /// Clients that were let in before and are not any more.
    gone: HashSet<u64>,
}

/// The backend, and the network at the same time.
#[derive(Clone, Debug, Default)]
pub struct Network {
    books: Arc<Mutex<Books>>,
    /// Lets no more memory be reached.
    pub refuses: Arc<AtomicBool>,
    meanwhile: Meanwhile,
}

/// What happens once, while somebody is let in or memory is opened.
#[derive(Clone, Default)]
struct Meanwhile(Arc<Mutex<Option<Happens>>>);

type Happens = Box<dyn FnOnce() + Send>;

impl std::fmt::Debug for Meanwhile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("meanwhile")
    }
}

impl Meanwhile {
    fn happen(&self) {
        let happens = self.0.lock().take();
        happens.into_iter().for_each(|happens| happens());
    }
}

#[derive(Debug)]
struct Circle {
    number: u64,
    network: Network,
}

impl Network {
    fn number(&self) -> u64 {
        let mut books = self.books.lock();
        books.numbers += 1;
        books.numbers
    }

    /// Has something happen while the next is let in, or the next memory is opened.
    pub fn meanwhile(&self, happens: impl FnOnce() + Send + 'static) {
        *self.meanwhile.0.lock() = Some(Box::new(happens));
    }

    fn find(&self, client: u64, key: &AccessKey, rights: Rights) -> Option<ChunkMemory> {
        let key = u64::from_le_bytes(key.as_bytes().try_into().ok()?);
        let books = self.books.lock();
        let domain = books.clients.get(&client)?;
        let (of, memory, may) = books.open.get(&key)?;
        (of == domain && *may == rights).then(|| memory.clone())
    }

    /// What a client's write does: whether it landed.
    pub fn write(&self, client: u64, key: &AccessKey, offset: usize, bytes: &[u8]) -> bool {
        let found = self.find(client, key, Rights::Write);
        found.map(|memory| memory.bytes().skip(offset).take(bytes.len()).copy_from(bytes)).is_some()
    }

    /// What a client's read brings.
    pub fn read(&self, client: u64, key: &AccessKey, offset: usize, bytes: usize) -> Option<Vec<u8>> {
        let memory = self.find(client, key, Rights::Read)?;
        let mut out = vec![0; bytes];
        memory.bytes().readable().skip(offset).take(bytes).copy_to(&mut out);
        Some(out)
    }

    /// Clients that are let in, and chunks that are open.
    pub fn counts(&self) -> (usize, usize) {
        let books = self.books.lock();
        (books.clients.len(), books.open.len())
    }

    /// Whether that client was let in once, and is not any more.
    pub fn is_gone(&self, client: u64) -> bool {
        self.books.lock().gone.contains(&client)
    }
}

impl Backend for Network {
    fn domain(&self) -> Result<Arc<dyn Domain>> {
        Ok(Arc::new(Circle { number: self.number(), network: self.clone() }))
    }
}

/// Calls what it holds when it is dropped.
struct Guard<F: FnMut()>(F);

impl<F: FnMut()> Drop for Guard<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

impl Domain for Circle {
    fn attach(&self, peer: &Endpoint) -> Result<Attached> {
        if peer.as_bytes() != b"a client" {
            return Err(Error::new(ErrorKind::Protocol, "no end of this network"));
        }
        self.network.meanwhile.happen();
        let (client, network) = (self.network.number(), self.network.clone());
        network.books.lock().clients.insert(client, self.number);
        let endpoint = Endpoint::decode(&client.to_le_bytes())?;
        let guard = Guard(move || {
            let mut books = network.books.lock();
            books.clients.remove(&client);
            books.gone.insert(client);
        });
        Ok(Attached { endpoint, guard: Box::new(guard) })
    }

    fn open(&self, memory: ChunkMemory, rights: Rights) -> Result<Opened> {
        if self.network.refuses.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Full, "no more memory may be locked"));
        }
        self.network.meanwhile.happen();
        let (number, network) = (self.network.number(), self.network.clone());
        network.books.lock().open.insert(number, (self.number, memory, rights));
        let key = AccessKey::decode(&number.to_le_bytes())?;
        let guard = Guard(move || {
            let closed = network.books.lock().open.remove(&number);
            drop(closed);
        });
        Ok(Opened { key, guard: Box::new(guard) })
    }
}

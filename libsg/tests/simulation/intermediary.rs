//! An intermediary's host.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use libsg::host::simulation::{Bug, has_bug};
use libsg::server::{Config, DrainOptions, Others, Server, ServerHandle};
use parking_lot::Mutex;

use crate::clock::Node;
use crate::scenario::{Role, address, secret};

/// The server there; gone when its host was killed.
pub type Handle = Arc<Mutex<Weak<ServerHandle>>>;

/// Starts it, with so much memory. Others may become members of volumes that have copies too few.
pub fn start(node: &Arc<Node>, role: Role, memory_bytes: u64, others: Vec<SocketAddr>) -> Handle {
    let handle = Handle::default();
    let (given, backend) = (Arc::clone(&handle), node.backend());
    node.spawn("intermediary", move || {
        let memory_bytes = if has_bug(Bug::LimitIgnored) { 4 * memory_bytes } else { memory_bytes };
        let mut config = Config::new(address(role), format!("{role:?}"), memory_bytes, secret());
        config.others = (!others.is_empty()).then(|| Arc::new(others) as Arc<dyn Others>);
        config.backend = backend;
        let server = Arc::new(Server::bind(config).expect("listens").spawn().expect("serves"));
        *given.lock() = Arc::downgrade(&server);
        loop {
            libsg::host::thread::sleep(Duration::from_secs(1000));
        }
    });
    handle
}

/// How long it may take to hand over what is there.
const LEAVING_MAX: Duration = Duration::from_secs(20);

/// Tells it to leave; what is returned says when its process has ended by itself. Others may become members.
pub fn leave(node: &Arc<Node>, handle: &Handle, others: Vec<SocketAddr>) -> Arc<AtomicBool> {
    let (server, left) = (handle.lock().upgrade(), Arc::<AtomicBool>::default());
    let tells = Arc::clone(&left);
    node.spawn("leaves", move || {
        let others = || others.clone();
        let options = DrainOptions { timeout: LEAVING_MAX, others: &others };
        if server.is_some_and(|server| server.drain(&options).is_ok()) {
            tells.store(true, Ordering::Release);
        }
    });
    left
}

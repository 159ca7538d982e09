//! A co-tenant's service: answers each request of 64 bytes with 4 KiB, in order.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};

use anyhow::{Context, Result};

use super::told::go_first;

/// A request, whatever it says.
pub const REQUEST_BYTES: usize = 64;
/// Its answer.
pub const ANSWER_BYTES: usize = 4096;

/// Serves until it is killed.
pub fn run(listen: SocketAddr) -> Result<()> {
    go_first();
    let listener = TcpListener::bind(listen).with_context(|| format!("cannot listen on {listen}"))?;
    loop {
        let (stream, _) = listener.accept()?;
        std::thread::Builder::new().name("answer".into()).spawn(move || answer(stream))?;
    }
}

/// Until the client hangs up.
fn answer(mut stream: TcpStream) {
    let (mut request, answer) = ([0; REQUEST_BYTES], [0x5a; ANSWER_BYTES]);
    // Without it an answer waits for the acknowledgement of the one before, which is worse and no error.
    let _ = stream.set_nodelay(true);
    while stream.read_exact(&mut request).is_ok() && stream.write_all(&answer).is_ok() {}
}

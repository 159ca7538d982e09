//! Says one line to a VMM's control socket, and prints the line that it answers: what `socat` does, without it.
//!
//! ```sh
//! cargo run -p vmms --example say -- /tmp/vm '{"do":"progress"}'
//! ```

use std::io::{BufRead as _, BufReader, Error, ErrorKind, Write as _};
use std::os::unix::net::UnixStream;

fn main() -> std::io::Result<()> {
    let mut words = std::env::args().skip(1);
    let (Some(socket), Some(line), None) = (words.next(), words.next(), words.next()) else {
        return Err(Error::new(ErrorKind::InvalidInput, "say CONTROL_SOCKET '{\"do\":\"progress\"}'"));
    };
    let mut stream = UnixStream::connect(socket)?;
    writeln!(stream, "{line}")?;
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer)?;
    print!("{answer}");
    if answer.is_empty() { Err(ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
}

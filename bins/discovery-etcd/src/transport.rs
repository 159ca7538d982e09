//! The connections under the HTTP client: plain TCP, of which nobody waits longer than it may be silent, nor any longer
//! once it is cut.
//!
//! ureq's own connections know time limits of whole answers only, and a watch is an answer that never ends.

use std::fmt;
use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;
use std::os::fd::AsFd as _;
use std::time::Duration;

use libsg::transport::{Waker, wait};
use ureq::unversioned::transport::{
    Buffers, ConnectionDetails, Connector, LazyBuffers, NextTimeout, Transport,
};

/// How long connecting, and writing a request, may take.
pub const STEP: Duration = Duration::from_secs(1);

/// Ends what waits on connections, for good.
#[derive(Clone, Debug)]
pub struct Cut(Waker);

impl Cut {
    /// Nothing is cut yet.
    ///
    /// # Errors
    /// The kernel gives no eventfd.
    pub fn new() -> libsg::Result<Self> {
        Ok(Self(Waker::new()?))
    }

    /// Whoever waits, or will, is told that it was cut off.
    pub fn cut(&self) {
        self.0.wake();
    }

    /// Waits; `false` when it is cut, now or before.
    pub fn wait(&self, time: Duration) -> bool {
        // It is never made unreadable again. What cannot be waited for is over.
        wait(&[(Some(self.0.as_fd()), false)], time).is_ok_and(|ready| ready == 0)
    }
}

/// Makes connections that end when they were silent for too long, or are cut.
pub struct Dialer {
    /// How long nothing may come.
    pub silence: Duration,
    /// Ends them.
    pub cut: Cut,
}

impl fmt::Debug for Dialer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Dialer")
    }
}

impl Connector for Dialer {
    type Out = Line;

    fn connect(
        &self,
        details: &ConnectionDetails<'_>,
        _: Option<()>,
    ) -> Result<Option<Self::Out>, ureq::Error> {
        let mut last = io::Error::other("the name has no address");
        for address in details.addrs.iter() {
            match TcpStream::connect_timeout(address, STEP) {
                Ok(stream) => {
                    stream.set_nodelay(true)?;
                    stream.set_write_timeout(Some(STEP))?;
                    let config = details.config;
                    let buffers = LazyBuffers::new(config.input_buffer_size(), config.output_buffer_size());
                    return Ok(Some(Line { stream, buffers, silence: self.silence, cut: self.cut.clone() }));
                }
                Err(error) => last = error,
            }
        }
        Err(last.into())
    }
}

/// A connection.
pub struct Line {
    stream: TcpStream,
    buffers: LazyBuffers,
    silence: Duration,
    cut: Cut,
}

impl fmt::Debug for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Line({:?})", self.stream)
    }
}

impl Transport for Line {
    fn buffers(&mut self) -> &mut dyn Buffers {
        &mut self.buffers
    }

    fn transmit_output(&mut self, amount: usize, _: NextTimeout) -> Result<(), ureq::Error> {
        let output = &self.buffers.output()[..amount];
        self.stream.write_all(output)?;
        Ok(())
    }

    fn await_input(&mut self, timeout: NextTimeout) -> Result<bool, ureq::Error> {
        let silence =
            if timeout.after.is_not_happening() { self.silence } else { self.silence.min(*timeout.after) };
        let on = [(Some(self.stream.as_fd()), false), (Some(self.cut.0.as_fd()), false)];
        let ready = wait(&on, silence).map_err(|error| io::Error::other(error.chain()))?;
        if ready & 0b10 != 0 {
            return Err(io::Error::from(io::ErrorKind::ConnectionAborted).into());
        }
        if ready == 0 {
            return Err(ureq::Error::Timeout(timeout.reason));
        }
        let came = self.stream.read(self.buffers.input_append_buf())?;
        self.buffers.input_appended(came);
        Ok(came > 0)
    }

    fn is_open(&mut self) -> bool {
        // Where something can be read, it is the end, or what nobody asked for.
        wait(&[(Some(self.stream.as_fd()), false)], Duration::ZERO).is_ok_and(|ready| ready == 0)
    }
}

//! Asks etcd: one of its members, and when that does not answer, the next.

use std::io::BufReader;
use std::time::Duration;

use libsg::{Error, ErrorKind, Result};
use serde::de::DeserializeOwned;
use serde_json::Value;
use ureq::unversioned::resolver::DefaultResolver;
use ureq::{Agent, Body, BodyReader};

use crate::message::{No, Streamed};
use crate::place::Place;
use crate::transport::{Cut, Dialer, STEP};

/// Bytes of the longest answer, and of the longest message of a stream. What else lies under a pool's prefix may be larger
/// than an announcement; nobody may make us hold more.
pub const ANSWER_BYTES_MAX: usize = 4 << 20;

/// How long an answer may take.
pub const ANSWER: Duration = Duration::from_secs(2);

/// What is told of what etcd says, which may be anything.
const TOLD_MAX: usize = 200;

/// Why there is no answer.
#[derive(Debug)]
pub enum Trouble {
    /// etcd says no: the code, and why.
    No(i64, Error),
    /// It does not answer, or what it answers makes no sense.
    Lost(Error),
}

impl From<Trouble> for Error {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::No(_, error) | Trouble::Lost(error) => error,
        }
    }
}

impl From<No> for Trouble {
    fn from(no: No) -> Self {
        let message: String = no.message.chars().take(TOLD_MAX).collect();
        let (kind, advice) = match no.code {
            // Its space is used up, or too much is asked at once.
            8 => (
                ErrorKind::Full,
                ": it takes nothing more. Where its space is used up: etcdctl compact, defrag and alarm disarm; started \
                 with --auto-compaction-retention it does not come to that",
            ),
            3 | 7 | 16 => (ErrorKind::Refused, ": libsg speaks to an etcd that asks for no user"),
            14 => (ErrorKind::Unreachable, ": most of its members are away"),
            _ => (ErrorKind::Protocol, ""),
        };
        Self::No(no.code, Error::new(kind, format!("etcd says no, {message:?}{advice}")))
    }
}

/// A client of one etcd.
pub struct Client {
    agent: Agent,
    endpoints: Vec<String>,
    /// Which of them is asked.
    at: usize,
}

impl Client {
    /// Connections end when nothing came for so long, and when they are cut.
    pub fn new(place: &Place, silence: Duration, cut: Cut) -> Self {
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            // Whatever the environment says of a proxy is about the web.
            .proxy(None)
            .timeout_resolve(Some(STEP))
            .timeout_recv_response(Some(ANSWER))
            .max_idle_connections_per_host(1)
            .input_buffer_size(64 << 10)
            .output_buffer_size(16 << 10)
            .build();
        let agent = Agent::with_parts(config, Dialer { silence, cut }, DefaultResolver::default());
        Self { agent, endpoints: place.endpoints().to_vec(), at: 0 }
    }

    /// Asks for one answer.
    ///
    /// # Errors
    /// Nobody answers, or it is a no.
    pub fn ask<T: DeserializeOwned>(&mut self, what: &str, request: &Value) -> Result<T, Trouble> {
        self.somebody(what, request, |body| {
            let read = body.into_with_config().limit(ANSWER_BYTES_MAX as u64).read_to_vec();
            decode(&read.map_err(|error| lost(&error))?)
        })
    }

    /// Asks for an answer that goes on.
    ///
    /// # Errors
    /// As [`Self::ask`].
    pub fn stream(&mut self, what: &str, request: &Value) -> Result<Lines, Trouble> {
        self.somebody(what, request, |body| {
            Ok(Lines { reader: BufReader::new(body.into_reader()), line: Vec::new() })
        })
    }

    /// Asks for the only answer of a stream.
    ///
    /// # Errors
    /// As [`Self::ask`].
    pub fn ask_stream<T: DeserializeOwned>(&mut self, what: &str, request: &Value) -> Result<T, Trouble> {
        match self.ask(what, request)? {
            Streamed::Result(answer) => Ok(answer),
            Streamed::Error(no) => Err(no.into()),
        }
    }

    /// The first answer of a member, each asked once, and the first once more: its connection may have been old.
    fn somebody<T>(
        &mut self,
        what: &str,
        request: &Value,
        read: impl Fn(Body) -> Result<T, Trouble>,
    ) -> Result<T, Trouble> {
        let request = request.to_string();
        let mut last = None;
        for _ in 0..=self.endpoints.len() {
            let endpoint = &self.endpoints[self.at % self.endpoints.len()];
            match self.one(endpoint, what, &request).and_then(&read) {
                Err(trouble @ (Trouble::Lost(_) | Trouble::No(14, _))) => {
                    let told = Error::from(trouble);
                    let named = Error::new(told.kind, format!("etcd at {endpoint}")).because(told);
                    last = Some(Trouble::Lost(named));
                    self.at = self.at.wrapping_add(1);
                }
                answered => return answered,
            }
        }
        Err(last.unwrap_or_else(|| Trouble::Lost(Error::new(ErrorKind::Input, "no etcd is named"))))
    }

    fn one(&self, endpoint: &str, what: &str, request: &str) -> Result<Body, Trouble> {
        let asked = self.agent.post(format!("http://{endpoint}/v3/{what}"));
        let answer = asked.content_type("application/json").send(request).map_err(|error| lost(&error))?;
        let status = answer.status();
        let mut body = answer.into_body();
        if status.is_success() {
            return Ok(body);
        }
        let told = body.with_config().limit(ANSWER_BYTES_MAX as u64).read_to_vec().unwrap_or_default();
        Err(serde_json::from_slice::<No>(&told).map_or_else(
            |_| {
                let what = format!("HTTP {status}: is it etcd 3.4 or newer that answers there?");
                Trouble::Lost(Error::new(ErrorKind::Protocol, what))
            },
            Trouble::from,
        ))
    }
}

/// The messages of a stream, one a line.
pub struct Lines {
    reader: BufReader<BodyReader<'static>>,
    line: Vec<u8>,
}

impl Lines {
    /// The next message; `None` at the end.
    ///
    /// # Errors
    /// The connection's end, a message that is too long or makes no sense, and a no.
    pub fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, Trouble> {
        self.line.clear();
        if !read_line(&mut self.reader, &mut self.line)? {
            return Ok(None);
        }
        match decode(&self.line)? {
            Streamed::Result(message) => Ok(Some(message)),
            Streamed::Error(no) => Err(no.into()),
        }
    }
}

/// Reads up to the next newline; `false` where there is nothing more.
fn read_line(reader: &mut impl std::io::BufRead, line: &mut Vec<u8>) -> Result<bool, Trouble> {
    loop {
        let came = reader.fill_buf().map_err(|error| lost(&error.into()))?;
        let end = came.iter().position(|byte| *byte == b'\n');
        let take = end.unwrap_or(came.len());
        if line.len() + take > ANSWER_BYTES_MAX {
            let what = "a message of more than 4 MiB: what else is kept under this prefix?";
            return Err(Trouble::Lost(Error::new(ErrorKind::Protocol, what)));
        }
        line.extend_from_slice(&came[..take]);
        let is_over = came.is_empty();
        reader.consume(take + usize::from(end.is_some()));
        if end.is_some() || is_over {
            return Ok(end.is_some() || !line.is_empty());
        }
    }
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Trouble> {
    serde_json::from_slice(bytes).map_err(|cause| {
        Trouble::Lost(Error::new(ErrorKind::Protocol, "not an answer of etcd's").because(cause))
    })
}

fn lost(error: &ureq::Error) -> Trouble {
    let kind = match error {
        ureq::Error::Timeout(_) => ErrorKind::Timeout,
        ureq::Error::BodyExceedsLimit(_) | ureq::Error::Protocol(_) => ErrorKind::Protocol,
        _ => ErrorKind::Unreachable,
    };
    Trouble::Lost(Error::new(kind, error.to_string()))
}

#[cfg(test)]
mod test {
    use super::*;

    fn lines(bytes: &[u8]) -> Vec<Result<Vec<u8>, ErrorKind>> {
        let mut reader = BufReader::with_capacity(7, bytes);
        let mut all = Vec::new();
        loop {
            let mut line = Vec::new();
            match read_line(&mut reader, &mut line) {
                Ok(false) => return all,
                Ok(true) => all.push(Ok(line)),
                Err(trouble) => {
                    all.push(Err(Error::from(trouble).kind));
                    return all;
                }
            }
        }
    }

    #[test]
    fn streams_are_read_by_line_and_bounded() {
        assert_eq!(lines(b""), []);
        let of = |text: &str| Ok(text.as_bytes().to_vec());
        assert_eq!(lines(b"one, longer\ntwo\n\nend"), [of("one, longer"), of("two"), of(""), of("end")]);
        let long = vec![b'x'; ANSWER_BYTES_MAX + 1];
        assert_eq!(lines(&long), [Err(ErrorKind::Protocol)]);
        let fits = [&long[1..], b"\n"].concat();
        assert_eq!(lines(&fits).len(), 1);
    }

    #[test]
    fn what_etcd_says_is_told_with_what_to_do() {
        let said = |code, message: &str| Error::from(Trouble::from(No { code, message: message.into() }));
        let full = said(8, "mvcc: database space exceeded");
        assert!(full.kind == ErrorKind::Full && full.message.contains("alarm disarm"), "{full}");
        assert_eq!(said(16, "x").kind, ErrorKind::Refused);
        assert!(said(2, &"\u{1b}".repeat(10_000)).message.len() < 2000, "it may say anything");
    }
}

//! A thread's own connections to the members of a volume, with what is outstanding on each.

use std::collections::HashMap;
use std::os::fd::BorrowedFd;
use std::time::{Duration, Instant};

use libsg::ids::MemberIndex;
use libsg::vmd::{Link, Reply, Request, Ticket};
use libsg::{Error, ErrorKind, Result};

/// One member.
struct Peer<P> {
    link: Option<Box<dyn Link>>,
    parts: HashMap<Ticket, P>,
    /// When it last answered, or was asked something after it had nothing to answer.
    heard: Instant,
    /// How often the connection to it broke since.
    breaks: u8,
}

/// A member whose connection breaks so often in a row is as good as gone.
const BREAKS_MAX: u8 = 4;

/// A connection that is of no further use, and what was outstanding on it.
pub struct Broken<P> {
    /// Whose.
    pub member: MemberIndex,
    /// Why.
    pub error: Error,
    /// Whether it is of no use to connect again.
    pub gone: bool,
    /// May have been done, or not.
    pub parts: Vec<P>,
}

/// Connections to the members, of which each is opened when it is needed.
pub struct Links<P> {
    peers: Vec<Peer<P>>,
    /// How long a member may be silent.
    timeout: Duration,
}

impl<P> Links<P> {
    /// To nobody yet.
    pub const fn new(timeout: Duration) -> Self {
        Self { peers: Vec::new(), timeout }
    }

    fn peer(&mut self, member: MemberIndex) -> &mut Peer<P> {
        while self.peers.len() <= member.as_usize() {
            self.peers.push(Peer { link: None, parts: HashMap::new(), heard: Instant::now(), breaks: 0 });
        }
        &mut self.peers[member.as_usize()]
    }

    /// Whether there is a connection to it.
    pub fn has(&self, member: MemberIndex) -> bool {
        self.peers.get(member.as_usize()).is_some_and(|peer| peer.link.is_some())
    }

    /// From now on there is.
    pub fn open(&mut self, member: MemberIndex, link: Box<dyn Link>) {
        self.peer(member).link = Some(link);
    }

    /// Bytes that are outstanding there.
    pub fn outstanding_bytes(&self, member: MemberIndex) -> usize {
        let link = self.peers.get(member.as_usize()).and_then(|peer| peer.link.as_ref());
        link.map_or(0, |link| link.outstanding_bytes())
    }

    /// Whether anything is outstanding anywhere.
    pub fn is_idle(&self) -> bool {
        self.peers.iter().all(|peer| peer.parts.is_empty())
    }

    /// Asks a member over the connection that there is.
    ///
    /// # Errors
    /// The part, which was not submitted: without a connection, or over a broken one.
    pub fn submit(&mut self, member: MemberIndex, request: Request<'_>, part: P) -> Result<(), (Error, P)> {
        let peer = self.peer(member);
        let Some(link) = &mut peer.link else {
            return Err((Error::new(ErrorKind::Unreachable, "no connection to the intermediary"), part));
        };
        match link.submit(request) {
            Ok(ticket) => {
                if peer.parts.is_empty() {
                    peer.heard = Instant::now();
                }
                peer.parts.insert(ticket, part);
                Ok(())
            }
            Err(error) => Err((error, part)),
        }
    }

    /// Moves bytes, and hands out what came to its end. Returns the connections that broke, or whose member has
    /// been silent for too long.
    pub fn progress(&mut self, mut done: impl FnMut(MemberIndex, P, Result<Reply<'_>>)) -> Vec<Broken<P>> {
        let mut broken = Vec::new();
        for (at, peer) in self.peers.iter_mut().enumerate() {
            let member = MemberIndex(at as u16);
            let Some(link) = &mut peer.link else { continue };
            let mut failed = link.progress(usize::MAX).err();
            while let Some(completion) = link.completion() {
                (peer.heard, peer.breaks) = (Instant::now(), 0);
                if let Some(part) = peer.parts.remove(&completion.ticket) {
                    done(member, part, completion.result);
                }
            }
            if failed.is_none() && !peer.parts.is_empty() && peer.heard.elapsed() > self.timeout {
                let message = format!("no answer for {} s", self.timeout.as_secs_f64());
                failed = Some(Error::new(ErrorKind::Timeout, message).at(&link.member().node));
            }
            if let Some(error) = failed {
                broken.push(peer.broken(member, error));
            }
        }
        broken
    }

    /// Closes a connection.
    pub fn close(&mut self, member: MemberIndex) -> Vec<P> {
        let peer = self.peer(member);
        peer.link = None;
        peer.parts.drain().map(|(_, part)| part).collect()
    }

    /// The members to whom there is a connection.
    pub fn open_members(&self) -> impl Iterator<Item = MemberIndex> {
        let open = self.peers.iter().enumerate().filter(|(_, peer)| peer.link.is_some());
        open.map(|(at, _)| MemberIndex(at as u16))
    }

    /// What to wait for.
    pub fn awaited<'l>(&'l self, on: &mut Vec<(Option<BorrowedFd<'l>>, bool)>) {
        let links = self.peers.iter().filter_map(|peer| peer.link.as_ref());
        on.extend(links.map(|link| (link.poll_fd(), link.queued_bytes() > 0)));
    }
}

impl<P> Peer<P> {
    fn broken(&mut self, member: MemberIndex, error: Error) -> Broken<P> {
        self.link = None;
        self.breaks = self.breaks.saturating_add(1);
        // Whoever broke off may be there still; whoever says nothing, or what he should not, is not.
        let gone = error.kind != ErrorKind::Unreachable || self.breaks >= BREAKS_MAX;
        Broken { member, error, gone, parts: self.parts.drain().map(|(_, part)| part).collect() }
    }
}

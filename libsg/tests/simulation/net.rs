//! The simulated network. Each connection is two pairs of sockets: the threads of the product hold one end of
//! each, and here are the others, between which bytes are carried: late, at a rate, in order within a connection
//! and in none between them, or not at all.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use libsg::transport::Waker;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, Shutdown};

use crate::frames::Frames;
use crate::random::Random;
use crate::side::SideNetwork;

/// A node, of which one that restarts is another one.
pub type NodeNumber = usize;

/// Bytes of a connection that are on their way in one direction.
const WINDOW_BYTES: usize = 256 << 10;

/// Bytes taken from a sender at once.
const PIECE_BYTES: usize = 64 << 10;

/// What a kernel sends again of a process that is gone comes so much later, at most.
const RESENT_MAX: Duration = Duration::from_millis(400);

/// What the network is like.
#[derive(Clone, Copy, Debug)]
pub struct Weather {
    /// The least time that bytes are on their way.
    pub delay: Duration,
    /// What comes on top, at most: drawn for each piece.
    pub jitter: Duration,
    /// Bytes/s of each node's port, each way; zero is unlimited.
    pub port_rate: u64,
}

impl Weather {
    /// Whether nothing takes long.
    pub fn is_fast(&self) -> bool {
        self.port_rate == 0 && self.delay + self.jitter < Duration::from_millis(1)
    }
}

/// The network.
pub struct Net {
    weather: Weather,
    random: Random,
    hosts: BTreeMap<NodeNumber, Host>,
    listeners: BTreeMap<SocketAddr, Listener>,
    links: Vec<Link>,
    /// Nodes between which nothing is carried.
    cut: Vec<(NodeNumber, NodeNumber)>,
    carried_bytes: u64,
    /// Where bytes are taken into.
    scratch: Vec<u8>,
    /// Nodes of whose descriptors some may have become ready, or be so no more, since they were looked at.
    pub stirred: Vec<NodeNumber>,
    flips: Flips,
    side: Option<Box<dyn SideNetwork>>,
}

/// Bits that are flipped on the way.
#[derive(Default)]
struct Flips {
    /// Some will be: streams are followed, so that it is known what their bytes are.
    expected: bool,
    /// From which node to which, and what draws where.
    waiting: Vec<([NodeNumber; 2], Random)>,
    done: usize,
}

struct Host {
    address: SocketAddr,
    /// When the port is free again: out, in.
    free: [Duration; 2],
}

struct Listener {
    node: NodeNumber,
    waker: Waker,
    pending: VecDeque<UnixStream>,
}

/// A connection.
struct Link {
    nodes: [NodeNumber; 2],
    /// Our ends of the sockets of both nodes.
    ends: [UnixStream; 2],
    /// From the first node to the second, and back.
    ways: [Way; 2],
    broken: bool,
    /// Of a side whose process is gone, what it had sent is carried still.
    orphan: Option<usize>,
}

#[derive(Default)]
struct Way {
    pieces: VecDeque<Piece>,
    bytes: usize,
    last: Duration,
    /// The window is used up, and the sender may have more.
    full: bool,
    /// The receiver takes nothing.
    blocked: bool,
    /// The sender closed its end.
    ended: bool,
    shut: bool,
    frames: Frames,
}

struct Piece {
    due: Duration,
    bytes: Vec<u8>,
    written: usize,
}

impl Net {
    pub fn new(seed: u64, weather: Weather) -> Self {
        Self {
            weather,
            random: Random::new(seed).fork(2),
            hosts: BTreeMap::new(),
            listeners: BTreeMap::new(),
            links: Vec::new(),
            cut: Vec::new(),
            carried_bytes: 0,
            scratch: vec![0; PIECE_BYTES],
            stirred: Vec::new(),
            flips: Flips::default(),
            side: crate::side_network(seed, &weather),
        }
    }

    /// The network beside the connections.
    pub fn side(&self) -> Option<&dyn SideNetwork> {
        self.side.as_deref()
    }

    /// Bytes that were carried.
    pub const fn carried_bytes(&self) -> u64 {
        self.carried_bytes
    }

    /// A node is there now, at this address.
    pub fn add(&mut self, node: NodeNumber, address: SocketAddr) {
        self.hosts.insert(node, Host { address, free: [Duration::ZERO; 2] });
    }

    /// A node is gone: its connections break, at once (its kernel says so).
    pub fn remove(&mut self, node: NodeNumber) {
        self.hosts.remove(&node);
        self.listeners.retain(|_, listener| listener.node != node);
        self.links.retain(|link| !link.nodes.contains(&node));
        if let Some(side) = &mut self.side {
            side.remove(node);
        }
    }

    /// A process is gone, and its host is not: what it had sent is carried still, late as everything, and its connections end
    /// behind that.
    pub fn orphan(&mut self, node: NodeNumber, now: Duration) {
        let Self { weather, random, hosts, links, carried_bytes, scratch, flips, .. } = self;
        let mut ports = Ports { weather, random, hosts, carried_bytes, scratch, flips };
        for link in links.iter_mut() {
            if let Some(side) = link.nodes.iter().position(|of| *of == node) {
                link.take(side, true, now, &mut ports);
                link.orphan = Some(side);
                let late = RESENT_MAX * ports.random.below(1000) as u32 / 1000;
                link.ways[side].pieces.iter_mut().for_each(|piece| piece.due += late);
                link.ways[side].last += late;
            }
        }
        self.listeners.retain(|_, listener| listener.node != node);
        if let Some(side) = &mut self.side {
            side.remove(node);
        }
    }

    /// Breaks every connection between two nodes.
    pub fn break_links(&mut self, one: NodeNumber, other: NodeNumber) {
        if self.side.as_mut().is_some_and(|side| !side.break_links(one, other)) {
            return;
        }
        self.links.retain(|link| !(link.nodes.contains(&one) && link.nodes.contains(&other)));
    }

    /// Bits will be flipped.
    pub const fn expect_flips(&mut self) {
        self.flips.expected = true;
    }

    /// Flips a bit of what the first node sends to the second one next.
    pub fn flip(&mut self, from: NodeNumber, to: NodeNumber, random: Random) {
        self.flips.waiting.push(([from, to], random));
    }

    /// How many bits were flipped.
    pub const fn flipped(&self) -> usize {
        self.flips.done
    }

    /// Carries nothing between two nodes from now on, or again. Connections stay.
    pub fn cut(&mut self, one: NodeNumber, other: NodeNumber, cut: bool) {
        self.cut.retain(|pair| *pair != (one, other) && *pair != (other, one));
        if cut {
            self.cut.push((one, other));
        }
        if let Some(side) = &mut self.side {
            side.cut(one, other, cut);
        }
    }

    fn is_cut(cut: &[(NodeNumber, NodeNumber)], [one, other]: [NodeNumber; 2]) -> bool {
        cut.contains(&(one, other)) || cut.contains(&(other, one))
    }

    /// How long it takes to connect; `None` where nobody ever answers.
    pub fn way(&mut self, from: NodeNumber, to: SocketAddr) -> Option<Duration> {
        let (there, _) = self.hosts.iter().find(|(_, host)| host.address.ip() == to.ip())?;
        (!Self::is_cut(&self.cut, [from, *there])).then_some(2 * self.weather.delay)
    }

    pub fn connect(&mut self, from: NodeNumber, to: SocketAddr) -> io::Result<TcpStream> {
        let listener = self.listeners.get_mut(&to).ok_or(io::ErrorKind::ConnectionRefused)?;
        let (near, our_near) = pair()?;
        let (far, our_far) = pair()?;
        listener.pending.push_back(far);
        listener.waker.wake();
        self.stirred.push(listener.node);
        self.links.push(Link {
            nodes: [from, listener.node],
            ends: [our_near, our_far],
            ways: Default::default(),
            broken: false,
            orphan: None,
        });
        Ok(TcpStream::from(OwnedFd::from(near)))
    }

    pub fn listen(&mut self, node: NodeNumber, address: SocketAddr) -> io::Result<Waker> {
        if self.listeners.contains_key(&address) {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        let waker = Waker::new().map_err(|error| io::Error::other(error.to_string()))?;
        self.listeners.insert(address, Listener { node, waker: waker.clone(), pending: VecDeque::new() });
        Ok(waker)
    }

    pub fn accept(&mut self, address: SocketAddr) -> io::Result<(TcpStream, SocketAddr)> {
        let listener = self.listeners.get_mut(&address).ok_or(io::ErrorKind::NotConnected)?;
        match listener.pending.pop_front() {
            Some(stream) => Ok((TcpStream::from(OwnedFd::from(stream)), address)),
            None => {
                listener.waker.drain();
                Err(io::ErrorKind::WouldBlock.into())
            }
        }
    }

    /// Takes what a node has sent.
    pub fn collect(&mut self, node: NodeNumber, now: Duration) {
        let Self { weather, random, hosts, links, carried_bytes, scratch, flips, .. } = self;
        let mut ports = Ports { weather, random, hosts, carried_bytes, scratch, flips };
        for (at, side, ends) in heard(links, node) {
            links[at].take(side, ends, now, &mut ports);
        }
        self.let_go();
    }

    /// Closes what is broken.
    fn let_go(&mut self) {
        for link in self.links.extract_if(.., |link| link.broken) {
            self.stirred.extend(link.nodes);
        }
    }

    /// Gives what is due.
    pub fn deliver(&mut self, now: Duration) {
        let Self { weather, random, hosts, links, carried_bytes, cut, scratch, stirred, flips, side, .. } =
            self;
        let mut ports = Ports { weather, random, hosts, carried_bytes, scratch, flips };
        for link in links.iter_mut().filter(|link| !Self::is_cut(cut, link.nodes)) {
            for side in 0..2 {
                if link.give(side, now) {
                    stirred.push(link.nodes[1 - side]);
                }
                if link.ways[side].full && link.ways[side].bytes < WINDOW_BYTES {
                    link.take(side, true, now, &mut ports);
                    stirred.push(link.nodes[side]);
                }
            }
            let [there, back] = &link.ways;
            link.broken |= there.shut && back.shut;
        }
        if let Some(side) = side {
            side.deliver(now, stirred);
        }
        self.let_go();
    }

    /// When something can be given next.
    pub fn next_delivery(&self) -> Option<Duration> {
        let open = self.links.iter().filter(|link| !Self::is_cut(&self.cut, link.nodes));
        let ways = open.flat_map(|link| &link.ways);
        // What is blocked goes on when its receiver has read.
        let pieces = ways.filter(|way| !way.blocked).filter_map(|way| way.pieces.front());
        let beside = self.side.as_ref().and_then(|side| side.next_delivery());
        pieces.map(|piece| piece.due).chain(beside).min()
    }
}

/// The nodes' ports, and what draws how long something takes.
struct Ports<'n> {
    weather: &'n Weather,
    random: &'n mut Random,
    hosts: &'n mut BTreeMap<NodeNumber, Host>,
    carried_bytes: &'n mut u64,
    scratch: &'n mut [u8],
    flips: &'n mut Flips,
}

impl Ports<'_> {
    /// When bytes that are sent now arrive.
    fn arrival(&mut self, [from, to]: [NodeNumber; 2], bytes: usize, now: Duration) -> Duration {
        *self.carried_bytes += bytes as u64;
        let mut at = now;
        if let Some(nanos) = (bytes as u64 * 1_000_000_000).checked_div(self.weather.port_rate) {
            let time = Duration::from_nanos(nanos);
            for (node, port) in [(from, 0), (to, 1)] {
                if let Some(host) = self.hosts.get_mut(&node) {
                    host.free[port] = at.max(host.free[port]) + time;
                    at = host.free[port];
                }
            }
        }
        at + self.weather.delay + self.weather.jitter * self.random.below(1000) as u32 / 1000
    }
}

impl Flips {
    /// Flips what is to be flipped of these bytes: as often in what is short, and few in number, as in pages.
    fn apply(&mut self, nodes: [NodeNumber; 2], frames: &mut Frames, bytes: &mut [u8]) {
        if !self.expected {
            return;
        }
        let parts = frames.follow(bytes);
        let Some(waiting) = self.waiting.iter().position(|(way, _)| *way == nodes) else { return };
        if parts.is_empty() {
            return;
        }
        let (_, mut random) = self.waiting.swap_remove(waiting);
        let part = &parts[random.below(parts.len() as u64) as usize];
        let at = part.start + random.below(part.len() as u64) as usize;
        bytes[at] ^= 1 << random.below(8);
        self.done += 1;
    }
}

impl Link {
    /// Takes what one side sent, up to the window; less than was asked for is all that there is, unless the stream
    /// `ends`.
    fn take(&mut self, side: usize, ends: bool, now: Duration, ports: &mut Ports<'_>) {
        let (end, way) = (&self.ends[side], &mut self.ways[side]);
        way.full = false;
        while !way.ended {
            if way.bytes >= WINDOW_BYTES {
                way.full = true;
                return;
            }
            match rustix::net::recv(end, &mut *ports.scratch, RecvFlags::DONTWAIT) {
                Ok((0, _)) => way.ended = true,
                Ok((got, _)) => {
                    let last = got < ports.scratch.len();
                    let mut bytes = ports.scratch[..got].to_vec();
                    ports.flips.apply([self.nodes[side], self.nodes[1 - side]], &mut way.frames, &mut bytes);
                    way.bytes += got;
                    way.last =
                        way.last.max(ports.arrival([self.nodes[side], self.nodes[1 - side]], got, now));
                    way.pieces.push_back(Piece { due: way.last, bytes, written: 0 });
                    if last && !ends {
                        return;
                    }
                }
                Err(Errno::AGAIN) => return,
                Err(_) => {
                    self.broken = true;
                    return;
                }
            }
        }
    }

    /// Gives the other side what is due; whether there was anything.
    fn give(&mut self, side: usize, now: Duration) -> bool {
        let (end, way) = (&self.ends[1 - side], &mut self.ways[side]);
        if self.orphan == Some(1 - side) {
            way.pieces.clear();
            way.shut = way.ended;
            return false;
        }
        way.blocked = false;
        let mut gave = false;
        while let Some(piece) = way.pieces.front_mut().filter(|piece| piece.due <= now) {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match rustix::net::send(end, &piece.bytes[piece.written..], flags) {
                Ok(sent) => {
                    gave = true;
                    piece.written += sent;
                    way.bytes -= sent;
                    if piece.written == piece.bytes.len() {
                        way.pieces.pop_front();
                    }
                }
                Err(Errno::AGAIN) => {
                    way.blocked = true;
                    return gave;
                }
                Err(_) => {
                    self.broken = true;
                    return gave;
                }
            }
        }
        if way.ended && way.pieces.is_empty() && !way.shut {
            (way.shut, gave) = (true, true);
            self.broken |= rustix::net::shutdown(end, Shutdown::Write).is_err();
        }
        gave
    }
}

/// Which ends of connections of a node have something to say, and whether that is their last word: one question for
/// all, since most have not.
fn heard(links: &mut [Link], node: NodeNumber) -> Vec<(usize, usize, bool)> {
    let mut asked = Vec::new();
    for (at, link) in links.iter_mut().enumerate() {
        for side in (0..2).filter(|side| link.nodes[*side] == node) {
            let way = &mut link.ways[side];
            way.full = way.bytes >= WINDOW_BYTES;
            if !way.full && !way.ended {
                asked.push((at, side));
            }
        }
    }
    let end =
        |&(at, side): &(usize, usize)| PollFd::new(&links[at].ends[side], PollFlags::IN | PollFlags::RDHUP);
    let mut polled: Vec<_> = asked.iter().map(end).collect();
    let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
    if polled.is_empty() || rustix::event::poll(&mut polled, Some(&at_once)).expect("polled") == 0 {
        return Vec::new();
    }
    let says = asked.iter().zip(&polled).filter(|(_, end)| !end.revents().is_empty());
    says.map(|((at, side), end)| (*at, *side, end.revents() != PollFlags::IN)).collect()
}

fn pair() -> io::Result<(UnixStream, UnixStream)> {
    let (one, other) = UnixStream::pair()?;
    one.set_nonblocking(true)?;
    other.set_nonblocking(true)?;
    Ok((one, other))
}

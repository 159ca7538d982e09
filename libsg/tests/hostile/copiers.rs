//! What a server does whose copies go to members that do not keep to the protocol, or do not answer: it names them, and
//! goes on.

use std::net::TcpListener;
use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;
use std::time::Instant;

use libsg::ids::{Epoch, MemberIndex, MemberSet, NodeId, VolumeId};
use libsg::server::ServerHandle;
use libsg::transport::{Channel, Inbox, Outbox, accept};
use libsg::vmd::link::ask;
use libsg::vmd::{Class, Connector, Reply, Request, TcpConnector};
use libsg::wire::message::{Member, VmdRequest};
use libsg::wire::{Header, Kind, Missing, Status};

use super::support::{Client, PATIENCE, batch, manifest, secret, serve};

/// Takes connections as a member that is no server, and does with each what `behaves` says.
pub struct Stranger {
    pub member: Member,
    thread: Option<JoinHandle<()>>,
    stop: Sender<()>,
}

impl Stranger {
    pub fn new(says_it_is: &str, behaves: impl Fn(&Channel) + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let says = NodeId { name: says_it_is.into(), incarnation: 7 };
        let (stop, stopped) = channel::<()>();
        let thread = std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                if stopped.try_recv().is_ok() {
                    return;
                }
                if let Ok((channel, _)) = accept(stream, &secret(), &says, Instant::now() + PATIENCE) {
                    behaves(&channel);
                }
            }
        });
        let node = NodeId { name: "liar".into(), incarnation: 7 };
        Self { member: Member { node, address }, thread: Some(thread), stop }
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        let _ = self.stop.send(());
        let _ = std::net::TcpStream::connect(self.member.address);
        self.thread.take().unwrap().join().unwrap();
    }
}

/// The next frame; `None` at the end of the connection.
pub fn next(channel: &Channel, inbox: &mut Inbox) -> Option<Header> {
    loop {
        match inbox.poll(channel) {
            Ok(Some(frame)) => return Some(frame.header),
            Ok(None) => {
                libsg::transport::wait(&[(Some(std::os::fd::AsFd::as_fd(channel)), false)], PATIENCE)
                    .unwrap();
            }
            Err(_) => return None,
        }
    }
}

fn answer(channel: &Channel, header: Header) {
    let mut outbox = Outbox::new();
    outbox.push_frame(header, &[], []).unwrap();
    // Whoever has hung up hears nothing.
    let _ = outbox.flush(channel, usize::MAX);
}

/// A volume on a server and a stranger. Puts pages at the server with copies at both; who has none.
fn put_beside(server: &ServerHandle, stranger: &Member, volume: u128) -> Missing {
    let mut client = Client::connect(server, volume, 1);
    let members = vec![Member { node: server.node().clone(), address: server.address() }, stranger.clone()];
    client.control(&VmdRequest::Create { manifest: manifest(1000), members }).unwrap();
    let (entries, slices) = batch(client.volume, 0..64);
    let request = Request::Put { entries: &entries, slices: &slices, copies: MemberSet(3) };
    let missing = ask(&mut *client.link, request, PATIENCE, |reply| match reply {
        Reply::Stored { placements, missing } => {
            assert!(placements.iter().all(Option::is_some), "here it is stored");
            Ok(missing)
        }
        other => panic!("{other:?}"),
    });
    // The session goes on.
    client.check(100..164);
    missing.unwrap()
}

#[test]
fn a_member_that_lies_has_no_copies() {
    let server = serve(|_| {});
    let lost = Missing { full: MemberSet::NONE, lost: MemberSet::of(MemberIndex(1)) };
    let said = |change: fn(Header) -> Header| {
        move |channel: &Channel| {
            let mut inbox = Inbox::new();
            while let Some(asked) = next(channel, &mut inbox) {
                assert_eq!(asked.kind, Kind::Copy);
                answer(channel, change(asked.answer(Kind::CopyReply)));
            }
        }
    };
    let honest = Stranger::new("liar", said(|answer| answer));
    assert_eq!(put_beside(&server, &honest.member, 1), Missing::NONE, "as far as anybody can tell");
    let full = Stranger::new("liar", said(|answer| Header { status: Status::Full, ..answer }));
    assert_eq!(put_beside(&server, &full.member, 2).full, MemberSet::of(MemberIndex(1)));
    let lies: [fn(Header) -> Header; 4] = [
        |answer| Header { kind: Kind::PutReply, ..answer },
        |answer| Header { sequence: libsg::ids::Sequence(answer.sequence.0 + 1), ..answer },
        |answer| Header { volume: VolumeId(77), ..answer },
        |answer| Header { kind: Kind::Refused, status: Status::Busy, ..answer },
    ];
    for (nth, lie) in lies.into_iter().enumerate() {
        let liar = Stranger::new("liar", said(lie));
        assert_eq!(put_beside(&server, &liar.member, 10 + nth as u128), lost, "lie {nth}");
    }
    let hangs_up = Stranger::new("liar", |_: &Channel| {});
    assert_eq!(put_beside(&server, &hangs_up.member, 20), lost);
    let other = Stranger::new("somebody else", said(|answer| answer));
    assert_eq!(put_beside(&server, &other.member, 21), lost);
}

#[test]
fn a_member_that_is_silent_or_not_there_has_no_copies() {
    let server = serve(|_| {});
    let lost = MemberSet::of(MemberIndex(1));
    let silent = Stranger::new("liar", |channel: &Channel| {
        let mut inbox = Inbox::new();
        while next(channel, &mut inbox).is_some() {}
    });
    assert_eq!(put_beside(&server, &silent.member, 1).lost, lost);
    let nobody = Member { address: ([127, 0, 0, 1], 1).into(), ..silent.member.clone() };
    assert_eq!(put_beside(&server, &nobody, 2).lost, lost);
}

/// Copies that a client sends as if it were a member are stored like anybody's: whoever has the secret is trusted. But
/// not beyond the volume, and not of another.
#[test]
fn copies_stay_in_their_volume() {
    let server = serve(|_| {});
    let mut owner = Client::create(&server, 1, 100);
    owner.check(0..10);
    let connector = TcpConnector::new(secret());
    let stranger = connector.connect(server.address(), VolumeId(2), Epoch(1), Class::Bulk, PATIENCE);
    let mut stranger = stranger.unwrap();
    let (entries, slices) = batch(VolumeId(2), 0..10);
    let request = Request::Put { entries: &entries, slices: &slices, copies: MemberSet(1) };
    let refused = ask(&mut *stranger, request, PATIENCE, |_| Ok(()));
    assert_eq!(refused.unwrap_err().kind, libsg::ErrorKind::Volume);
    let (entries, slices) = batch(owner.volume, 95..105);
    let request = Request::Put { entries: &entries, slices: &slices, copies: MemberSet(1) };
    let refused = ask(&mut *owner.link, request, PATIENCE, |_| Ok(()));
    assert_eq!(refused.unwrap_err().kind, libsg::ErrorKind::Protocol);
    owner.check(20..30);
}

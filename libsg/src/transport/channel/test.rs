//! Handshakes that fail, and what becomes of a channel whose peer does not keep to the rules.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::thread;

use super::*;
use crate::transport::Conversation;
use crate::wire::handshake::{MAC_BYTES, NONCE_BYTES};
use crate::wire::message::Talk;

const LONG: Duration = Duration::from_secs(60);

fn node() -> NodeId {
    NodeId { name: "rack2".into(), incarnation: 5 }
}

fn secret(text: &str) -> PoolSecret {
    PoolSecret::from_bytes(text.as_bytes()).expect("not empty")
}

type Accepted = Result<(Channel, Greeting)>;

/// A server that answers one connection, and what became of it.
fn server(secret: PoolSecret, patience: Duration) -> (SocketAddr, thread::JoinHandle<Accepted>) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
    let address = listener.local_addr().expect("address");
    let answer = move || {
        let (stream, _) = listener.accept().expect("accepted");
        accept(stream, &secret, &node(), Instant::now() + patience)
    };
    (address, thread::spawn(answer))
}

fn dialled(address: SocketAddr, secret: &PoolSecret) -> Result<Channel> {
    dial(address, Purpose::VmdUrgent, VolumeId(77), Epoch(3), secret, LONG)
}

#[test]
fn both_ends_know_what_was_agreed_and_talk() {
    let (address, answer) = server(secret("s"), LONG);
    let near = dialled(address, &secret("s")).expect("connected");
    let (far, greeting) = answer.join().expect("joined").expect("accepted");
    assert_eq!(near.node(), &node());
    assert_eq!(near.greeting(), &greeting);
    assert_eq!((greeting.volume, greeting.epoch), (VolumeId(77), Epoch(3)));
    assert_eq!(greeting.purpose, Purpose::VmdUrgent);
    let header = near.header(Kind::Ping);
    assert_eq!((header.volume, header.epoch, header.version), (VolumeId(77), Epoch(3), VERSION_NEWEST));

    let (mut near, mut far) = (Conversation::new(near), Conversation::new(far));
    let state: Vec<u8> = (0..3_000_000_u32).map(|at| (at % 251) as u8).collect();
    let expected = state.clone();
    let sender = thread::spawn(move || {
        near.send_talk(&Talk::Ready, Instant::now() + LONG).expect("sent");
        near.send_state(&state, Instant::now() + LONG).expect("sent");
        near
    });
    assert_eq!(far.recv_talk(Instant::now() + LONG).expect("came"), Talk::Ready);
    assert!(far.recv_state(Instant::now() + LONG).expect("came") == expected);
    let late = far.recv_talk(Instant::now() + Duration::from_millis(5)).expect_err("nothing comes");
    assert_eq!(late.kind, ErrorKind::Timeout);
    drop(sender.join().expect("joined"));
    assert_eq!(far.recv_talk(Instant::now() + LONG).expect_err("closed").kind, ErrorKind::Unreachable);
}

#[test]
fn secrets_must_be_the_same() {
    let pairs =
        [(secret("a"), secret("b")), (secret("a"), PoolSecret::open()), (PoolSecret::open(), secret("a"))];
    for (theirs, ours) in pairs {
        let (address, answer) = server(theirs, LONG);
        let near = dialled(address, &ours).expect_err("refused");
        assert_eq!(near.kind, ErrorKind::Refused, "{near}");
        let far = answer.join().expect("joined").expect_err("refused");
        assert_eq!(far.kind, ErrorKind::Refused, "{far}");
    }
    let (address, answer) = server(PoolSecret::open(), LONG);
    dialled(address, &PoolSecret::open()).expect("connected");
    answer.join().expect("joined").expect("accepted");
}

#[test]
fn a_server_without_the_secret_is_not_believed() {
    // It reflects our own proof, which is the best it has.
    let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
    let address = listener.local_addr().expect("address");
    let imposter = thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("accepted");
        let mut hello = [0; HEADER_BYTES + 8 + NONCE_BYTES];
        stream.read_exact(&mut hello).expect("hello");
        let body = Challenge { version: VERSION_NEWEST, nonce: [1; NONCE_BYTES], node: node() }
            .encode()
            .expect("fits");
        let header = Header::new(Kind::Challenge).with_body(&body, 0);
        stream.write_all(&header.encode()).expect("written");
        stream.write_all(&body).expect("written");
        let mut auth = [0; HEADER_BYTES + MAC_BYTES];
        stream.read_exact(&mut auth).expect("auth");
        let header = Header::new(Kind::Welcome).with_body(&auth[HEADER_BYTES..], 0);
        stream.write_all(&header.encode()).expect("written");
        stream.write_all(&auth[HEADER_BYTES..]).expect("written");
        stream
    });
    assert_eq!(dialled(address, &secret("s")).expect_err("imposter").kind, ErrorKind::Refused);
    imposter.join().expect("joined");
}

#[test]
fn time_is_bounded_as_a_whole() {
    let patience = Duration::from_millis(150);
    // One says nothing, one drips a good Hello byte by byte.
    for drip in [false, true] {
        let (address, answer) = server(secret("s"), patience);
        let mut stream = TcpStream::connect(address).expect("connected");
        let start = Instant::now();
        let bytes = Header { body_bytes: 40, ..Header::new(Kind::Hello) }.encode();
        let mut sent = 0;
        while !answer.is_finished() {
            if drip && sent < bytes.len() {
                let _ = stream.write_all(&bytes[sent..=sent]);
                sent += 1;
            }
            thread::sleep(Duration::from_millis(20));
            assert!(start.elapsed() < LONG, "still waiting");
        }
        let error = answer.join().expect("joined").expect_err("too slow");
        assert_eq!(error.kind, ErrorKind::Timeout, "{error}");
    }
    // A server that takes the connection and never answers.
    let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
    let address = listener.local_addr().expect("address");
    let error = dial(address, Purpose::Operator, VolumeId(0), Epoch(0), &secret("s"), patience);
    assert_eq!(error.expect_err("silent").kind, ErrorKind::Timeout);
}

#[test]
fn strangers_get_a_typed_refusal() {
    let newer =
        Hello { version_min: 900, version_max: 901, purpose: Purpose::VmdBulk, nonce: [0; NONCE_BYTES] };
    let newer = newer.encode();
    let header = Header { version: 901, ..Header::new(Kind::Hello) }.with_body(&newer, 0);
    let hello = [&header.encode()[..], &newer].concat();
    let mut long = Header::new(Kind::Put).encode().to_vec();
    long[12] = 0xff;
    for (bytes, kind, status) in [
        (hello, ErrorKind::Version, Status::Version),
        (
            b"GET / HTTP/1.1\r\nHost: 10.0.0.1\r\nUser-Agent: some browser or other\r\n\r\n".to_vec(),
            ErrorKind::Protocol,
            Status::Malformed,
        ),
        (Header::new(Kind::Ping).encode().to_vec(), ErrorKind::Protocol, Status::Malformed),
        (long, ErrorKind::Protocol, Status::Malformed),
    ] {
        let (address, answer) = server(secret("s"), LONG);
        let mut stream = TcpStream::connect(address).expect("connected");
        stream.write_all(&bytes).expect("written");
        let mut reply = [0; HEADER_BYTES];
        stream.read_exact(&mut reply).expect("a refusal");
        let reply = Header::decode(&reply).expect("a header");
        assert_eq!((reply.kind, reply.status), (Kind::Refused, status));
        assert_eq!(answer.join().expect("joined").expect_err("refused").kind, kind);
    }
}

#[test]
fn a_busy_server_says_so() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
    let address = listener.local_addr().expect("address");
    let busy = thread::spawn(move || {
        let (stream, _) = listener.accept().expect("accepted");
        refuse(&stream, Status::Busy);
        // Closed first, with something unread, the connection would be reset under the refusal.
        let _ = std::io::copy(&mut &stream, &mut std::io::sink());
    });
    assert_eq!(dialled(address, &secret("s")).expect_err("busy").kind, ErrorKind::Full);
    busy.join().expect("joined");
}

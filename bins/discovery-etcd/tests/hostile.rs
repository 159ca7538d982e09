//! What answers in etcd's place: nothing, anything, and without end.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use discovery_etcd::{EtcdPool, Place, Watcher};
use libsg::discovery::Pool as _;
use libsg::transport::PoolSecret;
use libsg::{ErrorKind, Result};

const PATIENCE: Duration = Duration::from_secs(60);

/// Answers every connection in one way.
struct Impostor {
    port: u16,
    over: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Impostor {
    fn start(answer: impl Fn(&mut TcpStream) -> std::io::Result<()> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bound");
        let port = listener.local_addr().expect("address").port();
        let over = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&over);
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming() {
                if ended.load(Ordering::Acquire) {
                    return;
                }
                let mut stream = stream.expect("accepted");
                let mut request = [0; 4096];
                // Who was asked may have gone again.
                let _ = stream.read(&mut request).and_then(|_| answer(&mut stream));
            }
        });
        Self { port, over, thread: Some(thread) }
    }

    fn place(&self) -> Place {
        format!("etcd://127.0.0.1:{}/sg", self.port).parse().expect("good")
    }

    fn find(&self) -> Result<usize> {
        let mut pool = EtcdPool::open(&self.place(), &PoolSecret::open())?;
        pool.find(PATIENCE).map(|found| found.len())
    }
}

impl Drop for Impostor {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Release);
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        if let Some(thread) = self.thread.take() {
            thread.join().expect("joined");
        }
    }
}

fn says(answer: &'static str) -> Impostor {
    Impostor::start(move |stream| stream.write_all(answer.as_bytes()))
}

fn ok(body: &str) -> String {
    format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}", body.len())
}

#[test]
fn nonsense_is_an_error_that_says_where() {
    for answer in [
        "",
        "\0\0\0\0",
        "SSH-2.0-OpenSSH_9.2\r\n",
        "HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\n\r\nnot found",
        "HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nnull",
        "HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{}",
        "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff1\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 18\r\n\r\n{\"kvs\":[{\"key\":1}]",
    ] {
        let impostor = says(answer);
        let error = impostor.find().expect_err(answer);
        let told = error.chain();
        assert!(told.contains(&format!("etcd at 127.0.0.1:{}", impostor.port)), "{told}");
        let kinds = [ErrorKind::Unreachable, ErrorKind::Protocol, ErrorKind::Timeout];
        assert!(kinds.contains(&error.kind), "{told}");
    }
}

#[test]
fn a_no_is_told_with_what_to_do() {
    let no =
        r#"{"error":"etcdserver: user name is empty","message":"etcdserver: user name is empty","code":3}"#;
    let impostor = Impostor::start(move |stream| {
        write!(stream, "HTTP/1.1 400 Bad Request\r\nContent-Length: {}\r\n\r\n{no}", no.len())
    });
    let error = impostor.find().expect_err("no");
    assert!(error.kind == ErrorKind::Refused && error.message.contains("asks for no user"), "{error}");
}

#[test]
fn an_answer_without_end_is_cut_short() {
    let impostor = Impostor::start(|stream| {
        stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n[")?;
        loop {
            stream.write_all(&[b' '; 65536])?;
        }
    });
    assert_eq!(impostor.find().expect_err("too long").kind, ErrorKind::Protocol);
    // So is a listing that always has more, of which nobody is there.
    let more = ok(r#"{"header":{"revision":"5"},"kvs":[{"key":"eA==","value":"eA=="}],"more":true}"#);
    let impostor = Impostor::start(move |stream| stream.write_all(more.as_bytes()));
    assert_eq!(impostor.find().expect("nobody"), 0);
}

#[test]
fn one_that_says_nothing_is_not_waited_for() {
    let (release, held) = std::sync::mpsc::channel::<()>();
    let held = parking_lot::Mutex::new(held);
    // Each is held until the test is over.
    let impostor = Impostor::start(move |_| {
        let _ = held.lock().recv();
        Ok(())
    });
    assert_eq!(impostor.find().expect_err("silent").kind, ErrorKind::Timeout);
    // One who watches meanwhile can be told to end at any time.
    let watcher = Watcher::start(&impostor.place(), &PoolSecret::open()).expect("started");
    drop(watcher);
    drop(release);
}

#[test]
fn who_watches_ends_though_etcd_says_nothing_more() {
    // It lists, and then the watch begins, and stays silent.
    let listed = ok(r#"{"header":{"revision":"5"}}"#);
    let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
    let created = "{\"result\":{\"header\":{\"revision\":\"5\"},\"created\":true}}\n";
    let (tell, told) = std::sync::mpsc::channel();
    let kept = parking_lot::Mutex::new((false, Vec::new()));
    let impostor = Impostor::start(move |stream| {
        let mut kept = kept.lock();
        if !std::mem::replace(&mut kept.0, true) {
            return stream.write_all(listed.as_bytes());
        }
        write!(stream, "{head}{:x}\r\n{created}\r\n", created.len())?;
        kept.1.push(stream.try_clone()?);
        // The test may be over.
        let _ = tell.send(());
        Ok(())
    });
    let watcher = Watcher::start(&impostor.place(), &PoolSecret::open()).expect("started");
    told.recv_timeout(PATIENCE).expect("it watches");
    drop(watcher);
}

//! Strangers at the ports of a VMM that waits for a VM, a thousand at once: what they cost is bounded, and whoever is
//! honest is served.

mod places;
// Nothing is parked here, and nothing goes through a proxy.
#[allow(dead_code)]
mod world;

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use serde_json::{Value, json};
use test_support::{Strangers, raise_open_files, resident_bytes};
use world::{PATIENCE, Vmm, World};

/// What strangers may cost, stacks of threads included.
const COST_BYTES_MAX: u64 = 32 << 20;

/// Memory that a process takes meanwhile.
fn grown(vmm: &Vmm, before: u64) -> u64 {
    resident_bytes(vmm.process.id()).saturating_sub(before)
}

#[test]
fn a_vm_arrives_at_a_port_full_of_strangers() {
    raise_open_files();
    let world = World::new(2, &["--limit-in", "200mbit"]);
    let (source, destination) =
        (world.vm("source", ""), world.incoming("destination", "--gather-limit 100mbit"));
    let before = resident_bytes(destination.process.id());
    let to = destination.address;
    let strangers = Strangers::come(&[], move || TcpStream::connect(to));
    // While they hold every place, whoever comes is told to come again; a stranger's place is free after 5 s.
    let began = Instant::now();
    let refused = || source.process.told().iter().filter(|line| line["event"] == "failed").count();
    let committed = || source.process.told().iter().any(|line| line["event"] == "commit");
    while !committed() {
        assert!(began.elapsed() < PATIENCE, "an honest source is locked out: {}", destination.process.log());
        assert!(grown(&destination, before) < COST_BYTES_MAX, "{}", grown(&destination, before));
        let times = refused();
        source.leave(to, &world.members());
        while refused() == times && !committed() {
            assert!(began.elapsed() < PATIENCE, "{}{}", source.process.log(), destination.process.log());
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
    source.process.wait("evicted");
    destination.arrived(32);
    drop(strangers);
    source.quit(0);
    destination.quit(0);
}

/// The answer on a control connection.
fn heard(stream: &mut BufReader<UnixStream>) -> Value {
    let mut line = String::new();
    stream.read_line(&mut line).expect("answered");
    serde_json::from_str(&line).expect("JSON")
}

#[test]
fn a_control_socket_full_of_strangers_serves_who_is_there() {
    raise_open_files();
    let world = World::new(0, &[]);
    let vmm = world.vm("vm", "--memory 16M --workload idle");
    let before = resident_bytes(vmm.process.id());
    let socket = vmm.socket.clone();
    let strangers = Strangers::come(b"{\"do\":\"", move || UnixStream::connect(&socket));
    // All places are taken, this one's too: others are told so.
    assert_eq!(vmm.ask(&json!({"do": "stats"}))["ok"], true);
    let refused = heard(&mut vmm.process.connect(&vmm.socket));
    assert_eq!(refused["error"]["kind"], "full", "{refused}");
    assert!(grown(&vmm, before) < COST_BYTES_MAX, "{}", grown(&vmm, before));
    drop(strangers);
    let comes_in = || {
        let mut stream = vmm.process.connect(&vmm.socket);
        // It may be sent away before it has spoken.
        let _ = stream.get_mut().write_all(b"{\"do\":\"stats\"}\n");
        heard(&mut stream)["ok"] == true
    };
    let began = Instant::now();
    while !comes_in() {
        assert!(began.elapsed() < PATIENCE, "nobody is let in any more");
    }
    vmm.quit(0);
}

#[test]
fn nonsense_at_a_control_socket_costs_its_connection_and_no_more() {
    let world = World::new(0, &[]);
    let vmm = world.vm("vm", "--memory 16M --workload idle");
    let before = resident_bytes(vmm.process.id());
    let connect = || vmm.process.connect(&vmm.socket);
    // A line that is cut off is no command.
    connect().get_mut().write_all(b"{\"do\":\"quit\"}").expect("sent");
    // One that never ends is read up to its limit.
    let mut endless = connect();
    let piece = [b'x'; 64 << 10];
    while endless.get_mut().write_all(&piece).is_ok() {}
    let deep = "[".repeat(60_000);
    for bad in ["nonsense", "{}", "\u{0}", "{\"do\":7}", "{\"do\":\"limit\",\"gather\":[]}", &deep] {
        let mut stream = connect();
        writeln!(stream.get_mut(), "{bad}").expect("sent");
        assert_eq!(heard(&mut stream)["ok"], false, "{bad:.20}");
    }
    // Who asks and does not listen is not asked for more than a socket takes.
    let mut deaf = connect();
    deaf.get_mut().set_nonblocking(true).expect("set");
    let began = Instant::now();
    let request = b"{\"do\":\"report\"}\n".repeat(1000);
    while began.elapsed().as_secs() < 2 {
        if deaf.get_mut().write(&request).is_err() {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
    assert_eq!(vmm.ask(&json!({"do": "stats"}))["ok"], true);
    assert!(grown(&vmm, before) < COST_BYTES_MAX, "{}", grown(&vmm, before));
    // It is let go in the end.
    deaf.get_mut().set_nonblocking(false).expect("set");
    vmm.quit(0);
    let mut rest = Vec::new();
    let _ = deaf.read_to_end(&mut rest);
}

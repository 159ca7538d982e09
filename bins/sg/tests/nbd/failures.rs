//! What dies, is stopped, is full, or talks nonsense.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

use rustix::process::Signal;
use test_support::{Strangers, raise_open_files, resident_bytes};

use crate::world::{Client, M, World, done, eventually, fails, random, text, tool};

const WRITE: (u16, u16) = (0, 1);
const FLUSH: (u16, u16) = (0, 3);
const IO: u32 = 5;
const NO_SPACE: u32 = 28;

/// Every block, by whether it can be read.
fn readable(client: &mut Client, blocks: u64) -> Vec<bool> {
    (0..blocks).map(|block| client.read(block * 4096, 4096).is_ok()).collect()
}

#[test]
fn a_killed_intermediary_takes_its_blocks_and_no_more() {
    let mut world = World::new(3);
    let mut nbd = world.nbd("sock", &["--create", "disk", "--size", "16M"]);
    let uri = nbd.text("uri").to_owned();
    let image = world.image("image", 16 * M, 1);
    done("nbdcopy", &["--flush", text(&image), &uri]);
    let mut client = Client::new(&world, "sock");
    assert_eq!(client.ask(FLUSH, 0, 0, &[]), 0);
    world.nodes[1].kill();
    let lost = readable(&mut client, 4096);
    let lost = lost.iter().filter(|readable| !**readable).count();
    assert!(lost > 100 && lost < 4000, "{lost} of 4096 blocks");
    assert_eq!(client.ask(FLUSH, 0, 0, &[]), IO, "who wrote is told");
    assert_eq!(client.ask(FLUSH, 0, 0, &[]), 0, "once");
    fails("nbdcopy", &[&uri, text(&world.path("back"))]);

    // What is written anew is there again, its index entries too: also for who opens it next.
    let image = world.image("image", 16 * M, 2);
    done("nbdcopy", &["--flush", text(&image), &uri]);
    assert!(nbd.is_running());
    nbd.kill();
    let (code, said) = world.try_nbd("sock", &["--volume", "disk"]).err().expect("one is away");
    assert!(code == Some(1) && said.contains("--degraded") && said.contains("i2"), "{said}");
    let nbd = world.nbd("sock", &["--volume", "disk", "--degraded"]);
    done("qemu-img", &["compare", "-f", "raw", "-F", "raw", nbd.text("uri"), text(&image)]);
}

#[test]
fn a_block_that_only_a_dead_index_server_knew_is_an_error_not_zeros() {
    let mut world = World::new(2);
    let mut nbd = world.nbd("sock", &["--create", "disk", "--size", "16M"]);
    done("nbdcopy", &["--flush", text(&world.image("image", 16 * M, 1)), nbd.text("uri")]);
    nbd.kill();
    world.nodes[0].kill();
    let _nbd = world.nbd("sock", &["--volume", "disk", "--degraded"]);
    let mut client = Client::new(&world, "sock");
    let wanted = random(16 * M, 1);
    let mut lost = 0;
    for block in 0..4096 {
        match client.read(block * 4096, 4096) {
            Ok(bytes) => assert!(bytes == wanted[block as usize * 4096..][..4096], "block {block}"),
            Err(fault) => {
                assert_eq!(fault, IO);
                lost += 1;
            }
        }
    }
    // Half of the index, and of the other half what content was there: on a busy machine that may be none.
    assert!((2048..4096).contains(&lost), "{lost}");
}

#[test]
fn a_stopped_intermediary_is_given_up_in_time() {
    let world = World::new(2);
    let nbd = world.nbd("sock", &["--create", "disk", "--size", "8M", "--timeout", "1"]);
    done("nbdcopy", &["--flush", text(&world.image("image", 8 * M, 1)), nbd.text("uri")]);
    world.nodes[0].signal(Signal::STOP);
    let mut client = Client::new(&world, "sock");
    let lost = readable(&mut client, 2048).iter().filter(|readable| !**readable).count();
    assert!(lost > 50 && lost < 2000, "{lost}");
    done("nbdcopy", &["--flush", text(&world.path("image")), nbd.text("uri")]);
    // Whatever it does when it comes back, it is not asked, and its old entries do not hold.
    world.nodes[0].signal(Signal::CONT);
    done("qemu-img", &["compare", "-f", "raw", "-F", "raw", nbd.text("uri"), text(&world.path("image"))]);
    drop((client, nbd));
    let again = world.nbd("sock", &["--volume", "disk"]);
    done("qemu-img", &["compare", "-f", "raw", "-F", "raw", again.text("uri"), text(&world.path("image"))]);
}

#[test]
fn the_last_intermediary_takes_the_disk_with_it() {
    let mut world = World::new(1);
    let mut nbd = world.nbd("sock", &["--create", "disk", "--size", "8M"]);
    let mut client = Client::new(&world, "sock");
    assert_eq!(client.ask(WRITE, 0, 4096, &random(4096, 1)), 0);
    world.nodes[0].kill();
    // It may have noticed, or notices by this: a page that lay there is to be read.
    let read = [&0x2560_9513_u32.to_be_bytes()[..], &[0; 20], &4096_u32.to_be_bytes()].concat();
    let _ = client.0.write_all(&read);
    assert_eq!(nbd.end().code(), Some(3));
    assert!(nbd.log().contains("no intermediary of the volume is left"), "{}", nbd.log());
}

#[test]
fn a_full_pool_is_told_and_what_is_given_back_is_used_again() {
    let world = World::new(1);
    let nbd = world.nbd("sock", &["--create", "disk", "--size", "512M"]);
    let uri = nbd.text("uri");
    let image = world.image("image", 300 * M, 1);
    let said = fails("nbdcopy", &["--flush", text(&image), uri]);
    assert!(said.contains("No space left"), "{said}");
    let mut client = Client::new(&world, "sock");
    // All of it is of no use any more; what nbdcopy had under way when it gave up may come behind that.
    eventually(|| {
        assert_eq!(client.ask((0, 4), 0, 512 << 20, &[]), 0);
        assert_eq!(client.ask(FLUSH, 0, 0, &[]), 0);
        world.stored_pages("disk") == Some(0)
    });
    let image = world.image("image", 200 * M, 2);
    done("nbdcopy", &["--flush", text(&image), uri]);
    assert_ne!(client.ask(WRITE, 300 * M, 4096, &random(4096, 3)), NO_SPACE);
}

/// A thousand of them, at a port and at a Unix socket: a client that is there is served, others when they have gone.
#[test]
fn strangers_cost_a_bounded_amount_of_memory() {
    raise_open_files();
    let world = World::new(1);
    let unix = world.nbd("sock", &["--create", "disk", "--size", "8M"]);
    let tcp = world.nbd_tcp(&["--create", "other", "--size", "8M"]);
    let (path, address) = (world.path("sock"), tcp.port());
    let mut at_unix = Client::new(&world, "sock");
    let mut at_tcp = Client::begin(TcpStream::connect(address).unwrap());
    let before = [&unix, &tcp].map(|nbd| resident_bytes(nbd.id()));
    // Flags, and an option of 256 bytes that are long in coming.
    let opening = b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\x01\0";
    let strangers = Strangers::come(opening, move || UnixStream::connect(&path));
    let others = Strangers::come(opening, move || TcpStream::connect(address));
    for round in 0..20_u64 {
        let bytes = random(4096, round);
        assert_eq!(at_unix.ask(WRITE, round * 4096, 4096, &bytes), 0);
        assert_eq!(at_tcp.ask(WRITE, round * 4096, 4096, &bytes), 0);
        assert!(at_unix.read(round * 4096, 4096).unwrap() == bytes);
        assert!(at_tcp.read(round * 4096, 4096).unwrap() == bytes);
    }
    for (nbd, before) in [&unix, &tcp].into_iter().zip(before) {
        let grown = resident_bytes(nbd.id()).saturating_sub(before);
        assert!(grown < 32 << 20, "{grown} bytes for strangers: {}", nbd.log());
        assert!(nbd.log().contains("too many"));
    }
    drop((strangers, others));
    for uri in [unix.text("uri"), tcp.text("uri")] {
        eventually(|| tool("nbdinfo", &["--size", uri]).status.success());
    }
}

#[test]
fn nonsense_ends_one_connection() {
    let world = World::new(1);
    let nbd = world.nbd("sock", &["--create", "disk", "--size", "8M"]);
    let mut honest = Client::new(&world, "sock");
    let ends = |mut stream: UnixStream, bytes: &[u8]| {
        // The server may have closed it before all is written.
        let _ = stream.write_all(bytes);
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest);
        rest.len()
    };
    let connect = || UnixStream::connect(world.path("sock")).unwrap();
    assert_eq!(ends(connect(), &[0xff; 64]), 18, "flags that there are not");
    assert_eq!(ends(connect(), b"\0\0\0\x03GET / HTTP/1.1\r\n\r\n"), 18);
    assert_eq!(ends(connect(), b"\0\0\0\x03IHAVEOPT\0\0\0\x07\xff\xff\xff\xff"), 18);
    assert_eq!(ends(Client::new(&world, "sock").0, &[0; 28]), 0);
    let mut long = Client::new(&world, "sock");
    long.send(WRITE, 0, u32::MAX, &[]);
    assert_eq!(ends(long.0, &[]), 0);
    // One that goes in the middle of a write has written nothing.
    let mut half = Client::new(&world, "sock");
    half.send(WRITE, 0, 8192, &[7; 5000]);
    drop(half);
    // A write that is refused is read all the same.
    assert_eq!(honest.ask(WRITE, 8 * M, 4096, &[1; 4096]), NO_SPACE);
    assert_eq!(honest.ask((1 << 9, 1), 0, 4096, &[1; 4096]), 22);
    assert_eq!(honest.ask((0, 77), 0, 0, &[]), 95);
    assert_eq!(honest.read(8 * M - 1, 2), Err(22));
    assert_eq!(honest.read(0, 8192).unwrap(), [0; 8192]);
    // Too many at once are sent away, and come in when others have gone.
    let many: Vec<Client> = (0..15).map(|_| Client::new(&world, "sock")).collect();
    let mut greeting = Vec::new();
    connect().read_to_end(&mut greeting).unwrap();
    assert!(greeting.is_empty());
    drop(many);
    assert!(nbd.log().contains("too many"));
    assert_eq!(honest.ask(WRITE, 0, 4096, &[1; 4096]), 0);
}

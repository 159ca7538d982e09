//! Disks: volumes that `sg nbd` makes and writes.

use rustix::process::Signal;

use crate::world::{Client, M, World, done, fails, random, text, tool};

const WRITE: (u16, u16) = (0, 1);
const FUA_WRITE: (u16, u16) = (1, 1);
const FLUSH: (u16, u16) = (0, 3);
const TRIM: (u16, u16) = (0, 4);
const ZERO: (u16, u16) = (0, 6);

#[test]
fn what_tools_copy_in_they_copy_out() {
    let world = World::new(2);
    let mut nbd = world.nbd("sock", &["--create", "disk", "--size", "64M"]);
    let uri = nbd.text("uri").to_owned();
    let info = done("nbdinfo", &["--json", &uri]);
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    let export = &info["exports"][0];
    assert_eq!((&info["structured"], &export["export-size"]), (&true.into(), &(64 * M).into()), "{info}");
    for can in ["can_multi_conn", "can_flush", "can_fua", "can_trim", "can_zero", "can_df", "can_fast_zero"] {
        assert_eq!(export[can], true, "{can}");
    }
    assert_eq!((&export["is_read_only"], &export["block_size_preferred"]), (&false.into(), &4096.into()));
    assert!(done("nbdinfo", &["--list", &uri]).contains("disk"));
    assert!(done("nbdinfo", &["--map", &uri]).contains("hole,zero"));

    let image = world.image("image", 40 * M, 1);
    done("nbdcopy", &["--flush", text(&image), &uri]);
    assert_eq!(world.stored_pages("disk"), Some(40 * M / 4096));
    let back = world.path("back");
    done("nbdcopy", &[&uri, text(&back)]);
    let bytes = std::fs::read(&back).unwrap();
    assert_eq!(bytes.len() as u64, 64 * M);
    assert!(bytes[..40 << 20] == random(40 * M, 1) && bytes[40 << 20..].iter().all(|byte| *byte == 0));
    done("qemu-img", &["compare", "-f", "raw", "-F", "raw", &uri, text(&back)]);
    let map = done("nbdinfo", &["--map", "--totals", &uri]);
    assert!(map.contains(&format!("{}", 40 * M)), "{map}");

    // Another image over it, by QEMU, whose zeros give memory back.
    let mut other = random(20 * M, 2);
    other.resize(64 << 20, 0);
    std::fs::write(&back, &other).unwrap();
    done("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", text(&back), &uri]);
    done("qemu-img", &["compare", "-f", "raw", "-F", "raw", &uri, text(&back)]);
    nbd.signal(Signal::TERM);
    assert_eq!(nbd.end().code(), Some(0));
    assert!(!world.path("sock").exists());
    // Ended in peace, it has given back every slot that nothing points to.
    assert_eq!(world.stored_pages("disk"), Some(20 * M / 4096));
}

#[test]
fn fio_verifies_what_it_wrote_at_random() {
    let world = World::new(2);
    let nbd = world.nbd("sock", &["--create", "disk", "--size", "32M"]);
    let uri = format!("--uri={}", nbd.text("uri"));
    let common = [
        "--name=mixed",
        "--ioengine=nbd",
        &uri,
        "--size=24M",
        "--verify=crc32c",
        "--verify_state_save=0",
        "--output-format=terse",
    ];
    // Pages, parts of pages that share one, and requests across pages.
    for shape in
        [["--bs=4k", "--iodepth=32"], ["--bsrange=512-64k", "--iodepth=16"], ["--bs=512", "--iodepth=8"]]
    {
        let small = if shape[0] == "--bs=512" { "--io_size=2M" } else { "--io_size=24M" };
        let mut all = common.to_vec();
        all.extend(shape);
        all.extend(["--rw=randwrite", "--fsync=64", "--do_verify=1", "--verify_fatal=1", small]);
        done("fio", &all);
    }
}

#[test]
fn parts_of_a_page_written_at_once_are_all_there() {
    let world = World::new(2);
    let _nbd = world.nbd("sock", &["--create", "disk", "--size", "1M"]);
    let mut clients = [Client::new(&world, "sock"), Client::new(&world, "sock")];
    let wanted = random(64 << 10, 9);
    // Two connections, each with half of the sectors, all outstanding at once.
    for (number, client) in clients.iter_mut().enumerate() {
        for sector in (0..128).skip(number).step_by(2) {
            client.send(WRITE, sector * 512, 512, &wanted[sector as usize * 512..][..512]);
        }
    }
    for client in &mut clients {
        for _ in 0..64 {
            assert_eq!(client.answer().1, 0);
        }
    }
    assert_eq!(clients[0].read(0, 64 << 10).unwrap(), wanted);
    assert_eq!(clients[1].read(1000, 5000).unwrap(), wanted[1000..6000]);

    assert_eq!(clients[0].ask(ZERO, 1000, 9000, &[]), 0);
    assert_eq!(clients[0].ask(TRIM, 20_000, 10_000, &[]), 0);
    let mut wanted = wanted;
    wanted[1000..10_000].fill(0);
    // What is of no use is given back by whole pages.
    wanted[20_480..28_672].fill(0);
    assert_eq!(clients[1].read(0, 64 << 10).unwrap(), wanted);
    assert_eq!(clients[0].ask(FLUSH, 0, 0, &[]), 0);
    let pages = wanted.chunks(4096).filter(|page| page.iter().any(|byte| *byte != 0)).count();
    world.comes_to("disk", pages as u64);
}

#[test]
fn what_was_flushed_outlives_a_killed_writer() {
    let world = World::new(2);
    let mut nbd = world.nbd("sock", &["--create", "disk", "--size", "64M"]);
    let uri = nbd.text("uri").to_owned();
    let image = world.image("image", 16 * M, 3);
    done("nbdcopy", &["--flush", text(&image), &uri]);
    let mut client = Client::new(&world, "sock");
    assert_eq!(client.ask(FUA_WRITE, 20 * M + 100, 5000, &random(5000, 4)), 0);
    // In the middle of writes of another.
    let fio = std::process::Command::new("fio")
        .args(["--name=w", "--ioengine=nbd", &format!("--uri={uri}"), "--rw=randwrite", "--bsrange=512-128k"])
        .args(["--offset=32M", "--size=32M", "--time_based", "--runtime=60", "--iodepth=16"])
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn();
    let mut fio = fio.expect("fio is missing: `ci/setup` installs it");
    while world.stored_pages("disk").unwrap() < 20 * M / 4096 {
        assert!(fio.try_wait().unwrap().is_none(), "fio writes");
    }
    nbd.kill();
    assert!(!fio.wait().unwrap().success());

    // Its socket's file is still there, and in nobody's way.
    let nbd = world.nbd("sock", &["--volume", "disk"]);
    assert_eq!((&nbd.ready["read_only"], &nbd.ready["bytes"]), (&false.into(), &(64 * M).into()));
    let back = world.path("back");
    done("nbdcopy", &[nbd.text("uri"), text(&back)]);
    let bytes = std::fs::read(&back).unwrap();
    assert!(bytes[..16 << 20] == random(16 * M, 3));
    let at = (20 * M + 100) as usize;
    assert_eq!(bytes[at..at + 4992], random(5000, 4)[..4992]);
    assert!(bytes[at + 8192..32 << 20].iter().all(|byte| *byte == 0));
}

#[test]
fn a_new_writer_shuts_the_old_one_out() {
    let world = World::new(2);
    let mut old = world.nbd("old", &["--create", "disk", "--size", "8M"]);
    let mut client = Client::new(&world, "old");
    assert_eq!(client.ask(FUA_WRITE, 0, 8192, &random(8192, 5)), 0);
    let mut new = world.nbd("new", &["--volume", "disk"]);
    // It may be told so before the write, or by it.
    client.send(WRITE, 0, 8192, &random(8192, 6));
    assert_eq!(old.end().code(), Some(1));
    assert!(old.log().contains("another writer has taken the volume over"), "{}", old.log());
    let mut client = Client::new(&world, "new");
    assert_eq!(client.read(0, 8192).unwrap(), random(8192, 5));
    assert_eq!(client.ask(FUA_WRITE, 4096, 4096, &random(4096, 7)), 0);
    // Readers beside it see it, and any number of them.
    let reader = world.nbd("reader", &["--volume", "disk", "--read-only"]);
    assert_eq!(reader.ready["read_only"], true);
    let mut client = Client::new(&world, "reader");
    assert_eq!(client.read(4096, 4096).unwrap(), random(4096, 7));
    assert_eq!(client.read(16_384, 4096).unwrap(), [0; 4096]);
    assert_eq!(client.ask(WRITE, 0, 512, &[1; 512]), 1, "not permitted");
    assert!(new.is_running());
    drop(reader);
    new.kill();
    let mut last = world.nbd("new", &["--volume", "disk", "--dissolve"]);
    last.signal(Signal::INT);
    assert_eq!((last.end().code(), world.stored_pages("disk")), (Some(0), None));
}

#[test]
fn over_tcp_and_by_number() {
    let world = World::new(1);
    let number = {
        let nbd = world.nbd("sock", &["--create", "disk", "--size", "8M"]);
        done("nbdcopy", &["--flush", text(&world.image("image", 8 * M, 8)), nbd.text("uri")]);
        nbd.text("volume").to_owned()
    };
    let address = world.address(0).to_string();
    let arguments = ["--volume", &number, "--listen", "127.0.0.1:0", "--intermediary", &address];
    let nbd = world.nbd_plain(&arguments).expect("it listens");
    assert!(nbd.text("uri").starts_with("nbd://127.0.0.1:"), "{}", nbd.text("uri"));
    done("qemu-img", &["compare", "-f", "raw", "-F", "raw", nbd.text("uri"), text(&world.path("image"))]);
    fails("nbdinfo", &[&nbd.text("uri").replace("/disk", "/other")]);
}

#[test]
fn arguments_that_cannot_be_used_are_explained() {
    let world = World::new(1);
    let nbd = world.nbd("sock", &["--create", "disk", "--size", "1M"]);
    let refused = |socket: &str, arguments: &[&str]| world.try_nbd(socket, arguments).err().expect("refused");
    let (code, said) = refused("other", &["--create", "disk", "--size", "1M"]);
    assert!(code == Some(1) && said.contains("sg nbd --volume disk"), "{said}");
    let (code, said) = refused("sock", &["--volume", "disk"]);
    assert!(code == Some(1) && said.contains("in use"), "{said}");
    let (code, said) = refused("other", &["--volume", "desk"]);
    assert!(code == Some(1) && said.contains("sg ls"), "{said}");
    let (code, said) = refused("other", &["--create", "odd", "--size", "1000"]);
    assert!(code == Some(2) && said.contains("4096"), "{said}");
    let (code, said) = refused("other", &["--volume", "disk", "--timeout", "0"]);
    assert!(code == Some(2) && said.contains("0.1"), "{said}");
    let plain = |arguments: &[&str]| world.nbd_plain(arguments).err().expect("refused");
    let (code, said) = plain(&["--volume", "disk", "--listen", "0.0.0.0:0", "--intermediary", "127.0.0.1:1"]);
    assert!(code == Some(2) && said.contains("--insecure"), "{said}");
    let (code, said) = plain(&["--volume", "disk", "--listen", "127.0.0.1:0"]);
    assert!(code == Some(2) && said.contains("--intermediary"), "{said}");
    let (code, said) =
        plain(&["--volume", "disk", "--listen", "127.0.0.1:0", "--intermediary", "127.0.0.1:1"]);
    assert!(code == Some(1) && said.contains("127.0.0.1:1"), "{said}");
    assert_eq!(plain(&["--create", "x"]).0, Some(2));
    assert!(tool("nbdinfo", &["--size", nbd.text("uri")]).status.success(), "it was in nobody's way");
}

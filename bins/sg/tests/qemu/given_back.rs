//! A VM that does not leave, and is not given back at once: both are told, and how it comes back.

use std::net::TcpListener;

use rustix::process::{Signal, kill_process};

use crate::commands::{path, spawn};
use crate::evict_resume::{noted, resume, state_file};
use crate::machine::Machine;
use crate::resume::{host, intermediaries};

#[test]
fn why_it_did_not_leave_is_told_beside_why_it_is_not_back() {
    let machine = Machine::new("q35", 1, &[]);
    let mut from = host(&machine);
    let before = crate::process::settings(&mut from.qemu.connect());
    let qemu = from.qemu.connect().process().expect("it is known");
    let [one, _] = intermediaries();
    let nobody = TcpListener::bind("127.0.0.1:0").expect("listens");
    let to = nobody.local_addr().expect("is bound").to_string();
    let evict = ["evict", "--qmp", path(&from.qemu.qmp), "--to", &to, "--quit", "--intermediary", &one.1];
    let evicting = spawn(&evict);
    // Its destination goes away, and its QEMU does not answer any more.
    let (connection, _) = nobody.accept().expect("it comes");
    kill_process(qemu, Signal::STOP).expect("stopped");
    drop((connection, nobody));
    let ended = evicting.wait_with_output().expect("ends");
    kill_process(qemu, Signal::CONT).expect("goes on");
    let said = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(1), "{said}");
    let hint = format!("to have the VM run on as it was: sg evict --qmp {} --resume\n", path(&from.qemu.qmp));
    let told = said.lines().find(|line| line.contains("and its QEMU is not what it is to be"));
    let told = told.unwrap_or_else(|| panic!("{said}"));
    assert!(told.contains("does not answer") && told.contains(&to), "{said}");
    assert!(said.contains(&hint), "{said}");
    assert!(noted(&from.qemu).contains("\"unscattered\":null"), "{}", noted(&from.qemu));

    let beat = from.said().beats.last().map_or(0, |beat| beat.number);
    let (code, said) = resume(&from.qemu.qmp, &[]);
    assert!(code == Some(1) && said.contains("runs on here"), "{said}");
    assert!(!state_file(&from.qemu).exists());
    from.await_beat("it does not run on", |now| now.number > beat + 3);
    assert_eq!(crate::process::settings(&mut from.qemu.connect()), before);
}

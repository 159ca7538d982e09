//! Claims of a parked VM at a real etcd: one is granted at a time, whoever asks, and whatever dies.

mod process;

use std::thread;

use discovery_etcd::{EtcdArbiter, Place};
use libsg::ErrorKind;
use libsg::ids::{Epoch, NodeId, VolumeId};
use libsg::manifest::{Manifest, Region};
use libsg::page::InstallUnit;
use libsg::vmd::Arbiter as _;
use libsg::wire::message::{VolumeInfo, VolumeState};
use libsg::wire::parking::{Claim, Parking, Verdict};
use process::{Etcd, until};

fn place(etcd: &Etcd) -> Place {
    etcd.pool("sg/test").parse().expect("good")
}

fn arbiter(etcd: &Etcd) -> EtcdArbiter {
    EtcdArbiter::new(place(etcd)).expect("started")
}

fn node(name: &str) -> NodeId {
    NodeId { name: name.into(), incarnation: 7 }
}

fn claim(by: &str, epoch: u64) -> Claim {
    Claim { epoch: Epoch(epoch), by: node(by), force: false }
}

fn parked(etcd: &Etcd, volume: u128) -> VolumeInfo {
    let region =
        Region { name: "ram".into(), guest_address: None, length_bytes: 1 << 20, unit: InstallUnit::Page };
    let manifest = Manifest { vm: "web".into(), regions: vec![region], vm_config: Vec::new(), sharing: None };
    let arbiter = Some(place(etcd).to_string());
    VolumeInfo {
        volume: VolumeId(volume),
        epoch: Epoch(1),
        manifest,
        members: Vec::new(),
        state: VolumeState::Parked,
        committed: true,
        has_state: true,
        stored_pages: 0,
        copied_pages: 0,
        mending: libsg::wire::mending::Mending::whole(1),
        indexed_pages: 0,
        age_s: 1,
        parking: Some(Parking { name: "web".into(), keeper: node("i1"), term: 0, arbiter }),
        owner: None,
    }
}

#[test]
fn of_all_who_claim_at_once_one_has_it_and_runs_it_once() {
    let etcd = Etcd::start();
    let web = parked(&etcd, 1);
    let verdicts = thread::scope(|scope| {
        let ask = |who: usize| {
            let (etcd, web) = (&etcd, &web);
            move || arbiter(etcd).claim(web, &claim(&format!("host{who}"), 2)).expect("an answer")
        };
        let threads: Vec<_> = (0..6).map(|who| scope.spawn(ask(who))).collect();
        threads.into_iter().map(|thread| thread.join().expect("joined")).collect::<Vec<_>>()
    });
    let granted = |verdict: &Verdict| *verdict == Verdict::Granted;
    assert_eq!(verdicts.iter().filter(|verdict| granted(verdict)).count(), 1, "{verdicts:?}");
    let who = verdicts.iter().position(granted).expect("one");
    let owner = node(&format!("host{who}"));
    for verdict in verdicts.iter().filter(|verdict| !granted(verdict)) {
        assert!(
            matches!(verdict, Verdict::Claimed { by, for_ms: 1..=11_000 } if *by == owner),
            "{verdict:?}"
        );
    }
    let arbiter = arbiter(&etcd);
    let (mine, other) = (claim(&owner.name, 2), claim("late", 3));
    // Asked again, it is granted again; another volume is another matter.
    assert_eq!(arbiter.claim(&web, &mine).expect("an answer"), Verdict::Granted);
    assert_eq!(arbiter.claim(&parked(&etcd, 2), &other).expect("an answer"), Verdict::Granted);
    assert_eq!(arbiter.run(&web, &other).expect_err("not its").kind, ErrorKind::Fenced);
    for _ in 0..2 {
        arbiter.run(&web, &mine).expect("it runs");
    }
    for force in [false, true] {
        let late = Claim { force, ..claim("late", 9) };
        assert_eq!(arbiter.claim(&web, &late).expect("an answer"), Verdict::Runs { by: owner.clone() });
    }
    // None of that is a host of the pool's.
    let mut pool =
        discovery_etcd::EtcdPool::open(&place(&etcd), &libsg::transport::PoolSecret::open()).expect("open");
    assert!(libsg::discovery::Pool::find(&mut pool, process::PATIENCE).expect("listed").is_empty());
}

#[test]
fn who_claimed_and_died_is_replaced_and_runs_nothing() {
    let etcd = Etcd::start();
    let (web, arbiter) = (parked(&etcd, 1), arbiter(&etcd));
    let first = claim("first", 2);
    assert_eq!(arbiter.claim(&web, &first).expect("an answer"), Verdict::Granted);
    let second = |epoch| arbiter.claim(&web, &claim("second", epoch)).expect("an answer");
    assert!(matches!(second(3), Verdict::Claimed { .. }));
    // It says nothing more: its lease runs out.
    until("its time is over", || second(2) == Verdict::Newer(Epoch(2)));
    assert_eq!(second(3), Verdict::Granted);
    assert_eq!(arbiter.run(&web, &first).expect_err("replaced").kind, ErrorKind::Fenced);
    assert!(matches!(arbiter.claim(&web, &first).expect("an answer"), Verdict::Claimed { .. }));
    // The operator knows that the second is dead, too.
    let forced = Claim { force: true, ..claim("third", 4) };
    assert_eq!(arbiter.claim(&web, &forced).expect("an answer"), Verdict::Granted);
    arbiter.run(&web, &forced).expect("it runs");
}

#[test]
fn an_etcd_that_is_away_grants_nothing_and_remembers_when_it_is_back() {
    let mut etcd = Etcd::start();
    let (web, arbiter) = (parked(&etcd, 1), arbiter(&etcd));
    let mine = claim("first", 2);
    assert_eq!(arbiter.claim(&web, &mine).expect("an answer"), Verdict::Granted);
    etcd.kill();
    for error in [
        arbiter.claim(&web, &mine).expect_err("nobody answers"),
        arbiter.run(&web, &mine).expect_err("nobody answers"),
    ] {
        assert_eq!(error.kind, ErrorKind::Unreachable);
        assert!(error.chain().contains("who may have the parked VM \"web\""), "{}", error.chain());
    }
    etcd.restart();
    arbiter.run(&web, &mine).expect("it runs");
    assert_eq!(
        arbiter.claim(&web, &claim("second", 3)).expect("an answer"),
        Verdict::Runs { by: node("first") }
    );
    // Nobody has it by an etcd that was emptied, and what is no claim is not taken for one.
    etcd.restart_empty();
    assert_eq!(arbiter.run(&web, &mine).expect_err("forgotten").kind, ErrorKind::Volume);
    let key = format!("sg/test.claims/{}", web.volume);
    let put = format!("{{\"key\":\"{}\",\"value\":\"bm8=\"}}", base64(key.as_bytes()));
    etcd.post(etcd.port, "kv/put", &put);
    assert_eq!(arbiter.claim(&web, &mine).expect_err("no claim").kind, ErrorKind::Protocol);
}

fn base64(bytes: &[u8]) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

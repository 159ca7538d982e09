//! Pages that lie at several intermediaries, with real processes: any of them but one may die, at any moment, also when
//! the source is gone.

mod places;
// Of what the tests of real processes have in common, these need no proxies.
#[allow(dead_code)]
mod world;

use std::time::Duration;

use rustix::process::Signal;
use serde_json::json;
use world::{Vmm, World};

/// Starts to leave, with each page at so many intermediaries.
fn leave(source: &Vmm, replicas: u8, destination: &Vmm, world: &World) {
    let members: Vec<String> = world.members().iter().map(ToString::to_string).collect();
    let to = destination.address.to_string();
    let answer =
        source.ask(&json!({"do": "start", "to": to, "intermediaries": members, "replicas": replicas}));
    assert_eq!(answer["ok"], true, "{answer}");
}

/// The same, sharing pages with others; once all that is left is at intermediaries.
fn leave_and_share(source: &Vmm, replicas: u8, destination: &Vmm, world: &World) -> serde_json::Value {
    let members: Vec<String> = world.members().iter().map(ToString::to_string).collect();
    let start = json!({
        "do": "start", "to": destination.address.to_string(), "intermediaries": members, "replicas": replicas,
        "dedup": {"domain": "tenant"},
    });
    let answer = source.ask(&start);
    assert_eq!(answer["ok"], true, "{answer}");
    source.process.wait("evicted")["report"].clone()
}

/// Three intermediaries, a VM of 16 MiB, and a destination for it.
fn usual(seed: u64) -> (World, Vmm, Vmm) {
    let world = World::new(3, &["--limit-in", "200mbit"]);
    let source = world.vm("source", &format!("--memory 16M --zero-fraction 0.1 --seed {seed}"));
    let destination = world.incoming("destination", "--gather-limit 50mbit");
    (world, source, destination)
}

/// A number that follows from a seed.
fn drawn(seed: u64, below: u64) -> u64 {
    let mut word = seed.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (word ^ (word >> 27)) % below
}

/// Of two copies one is lost, of three two. A first holder between data and acknowledgement is among what dies.
#[test]
fn all_holders_but_one_die_at_any_moment_and_the_source_when_it_has_evicted() {
    let rounds = std::env::var("SG_SOAK").ok().and_then(|n| n.parse().ok()).unwrap_or(5);
    for seed in 0..rounds {
        let (world, source, destination) = usual(seed);
        let deaths = 1 + (drawn(seed ^ 0x77, 2) as usize);
        let first = drawn(seed, 3) as usize;
        let kill = |nth: usize| world.intermediaries[(first + nth) % 3].process.kill();
        leave(&source, 1 + deaths as u8, &destination, &world);
        // Kept from coming at one speed on every machine by some milliseconds.
        let later = Duration::from_millis(drawn(seed ^ 0xabcd, 20));
        let percent = 5 * (1 + drawn(seed ^ 0x1234, 19));
        if seed % 3 == 1 {
            source.process.wait_percent("scattered", percent);
            std::thread::sleep(later);
            kill(0);
        }
        source.process.wait("evicted");
        source.process.kill();
        if seed % 3 == 2 {
            std::thread::sleep(10 * later);
        }
        (usize::from(seed % 3 == 1)..deaths).for_each(kill);
        destination.arrived(16);
        destination.quit(0);
    }
}

#[test]
fn what_is_sent_once_lies_at_two() {
    let (world, source, destination) = usual(7);
    leave(&source, 2, &destination, &world);
    let report = source.process.wait("evicted")["report"].clone();
    let bytes = |key: &str| report["bytes"][key].as_u64().unwrap_or_else(|| panic!("{report}"));
    assert!(bytes("staged") > 0 && bytes("replicated") > 0, "{report}");
    assert!(bytes("replicated") <= bytes("staged"), "{report}");
    let sent = bytes("direct") + bytes("staged");
    assert!(bytes("wire_total") < sent + sent / 8, "each page goes over the source's link once: {report}");
    destination.arrived(16);
    source.quit(0);
    destination.quit(0);
    world.holds_nothing();
}

/// The second VM's pages are there already, by reference at two holders each: whichever dies, and though the first VM,
/// who sent them, is gone.
#[test]
fn references_survive_a_holder() {
    for dies in 0..3 {
        let world = World::new(3, &[]);
        // Little goes directly, so that it lies at intermediaries.
        let vms = ["first", "second"].map(|name| {
            let vm = world.vm(name, "--memory 16M --zero-fraction 0.1 --common 0.8 --workload idle");
            (vm, world.incoming(&format!("to-{name}"), "--gather-limit 10mbit"))
        });
        let reports =
            vms.each_ref().map(|(source, destination)| leave_and_share(source, 2, destination, &world));
        let pages = |report: &serde_json::Value, key: &str| {
            report["pages"][key].as_u64().unwrap_or_else(|| panic!("{report}"))
        };
        let (referenced, staged) = (pages(&reports[1], "referenced"), pages(&reports[1], "staged"));
        assert!(referenced > staged, "most of it was there: {} {}", reports[0], reports[1]);
        let [(source, destination), (other, there)] = &vms;
        other.process.kill();
        destination.ask(&json!({"do": "limit", "gather": "0"}));
        destination.arrived(16);
        destination.quit(0);
        source.quit(0);
        world.intermediaries[dies].process.kill();
        there.ask(&json!({"do": "limit", "gather": "0"}));
        there.arrived(16);
        there.quit(0);
    }
}

#[test]
fn an_intermediary_is_stopped_and_the_others_have_the_copies() {
    let (world, source, destination) = usual(11);
    leave(&source, 2, &destination, &world);
    source.process.wait_percent("scattered", 20);
    world.intermediaries[1].process.signal(Signal::STOP);
    source.process.wait("evicted");
    source.process.kill();
    destination.arrived(16);
    destination.quit(0);
}

#[test]
fn with_fewer_intermediaries_than_copies_it_goes_on_and_says_so() {
    let world = World::new(1, &["--limit-in", "200mbit"]);
    let (source, destination) =
        (world.vm("source", "--memory 16M"), world.incoming("destination", "--gather-limit 50mbit"));
    leave(&source, 3, &destination, &world);
    source.process.wait("evicted");
    assert!(
        source.process.has_told("warning", "pages lie at fewer intermediaries"),
        "{}",
        source.process.log()
    );
    destination.arrived(16);
    source.quit(0);
    destination.quit(0);
}

/// Waits until all intermediaries that live are through with the copies of the volume there is; how many pages each has.
fn until_whole_without(world: &World, away: u64) -> Vec<u64> {
    let is_whole = |at: &serde_json::Value| {
        at["mending"]["away_members"].as_u64() == Some(away)
            && at["mending"]["missing_copies"].as_u64() == Some(0)
    };
    let begun = std::time::Instant::now();
    loop {
        let listed = world.sg(&["ls", "--json"]);
        let volumes: serde_json::Value = serde_json::from_str(&listed).expect("JSON");
        let at = volumes["volumes"][0]["at"].as_array().cloned().unwrap_or_default();
        if at.len() == world.intermediaries.len() && at.iter().all(is_whole) {
            return at.iter().map(|at| at["stored_pages"].as_u64().expect("pages")).collect();
        }
        assert!(begun.elapsed() < world::PATIENCE, "{listed}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// Evicted long ago: with each death the copies that went with it are made again by those that are left.
#[test]
fn parked_pages_outlive_all_intermediaries_but_one_that_die_one_after_the_other() {
    let mut world = World::new(3, &[]);
    let source = world.vm("source", "--memory 16M --zero-fraction 0.1");
    let members: Vec<String> = world.members().iter().map(ToString::to_string).collect();
    let start = json!({"do": "start", "park": "web", "intermediaries": members, "replicas": 2});
    assert_eq!(source.ask(&start)["ok"], true);
    let report = source.process.wait("evicted")["report"].clone();
    source.process.kill();
    let count = |key: &str| report["pages"][key].as_u64().unwrap_or_else(|| panic!("{report}"));
    let pages = count("present") - count("zero");
    let before = until_whole_without(&world, 0);
    assert!(before.iter().sum::<u64>() >= 2 * pages && before.iter().any(|has| *has < pages), "{before:?}");
    world.intermediaries.remove(2).process.kill();
    // Of what an intermediary was late with there may be more copies than were asked for.
    let mended = until_whole_without(&world, 1);
    assert!(mended.iter().all(|has| *has >= pages), "each has every page: {mended:?} of {pages}");
    // The first is the keeper.
    world.intermediaries.remove(1).process.kill();
    let claimant = world.claim("claimant", "web", "");
    claimant.arrived(16);
    claimant.quit(0);
}

//! VMs move while whoever carries them is killed at random: with two copies of each page nothing is lost, and nobody waits for
//! ever.

use std::time::{Duration, Instant};

use guest::Work;

use crate::commands::{Sg, path};
use crate::machine::{Machine, one_heart};
use crate::process::PATIENCE;
use crate::resume::{hosts, resumed};

/// Each of a move's choices, by its seed.
struct Draw(u64);

impl Draw {
    /// One of so many.
    fn below(&mut self, many: u64) -> u64 {
        // SplitMix64.
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ mixed >> 31) % many
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }
}

#[derive(Clone, Copy, Debug)]
enum Dies {
    Nobody,
    Intermediary(usize),
    Feeder,
}

/// As each of these, in turn; 50 of them in ci/soak. `SG_MOVE` is one alone.
#[test]
fn vms_move_whoever_is_killed() {
    let number = |name: &str| std::env::var(name).ok().and_then(|said| said.parse::<u64>().ok());
    let seeds = match (number("SG_MOVE"), number("SG_SOAK")) {
        (Some(seed), _) => seed..seed + 1,
        (None, soak) => 0..soak.map_or(3, |soak| soak.div_ceil(2)),
    };
    seeds.for_each(moves);
}

fn moves(seed: u64) {
    let mut draw = Draw(seed);
    // In check, one of each.
    let dies = match seed % 3 {
        0 => Dies::Intermediary(draw.below(3) as usize),
        1 => Dies::Feeder,
        _ => draw.of(&[Dies::Nobody, Dies::Intermediary(0), Dies::Feeder]),
    };
    let work = Work {
        filled_mib: draw.of(&[48, 100]),
        writes_per_s: draw.of(&[0, 300, 3000]),
        checks_per_s: 20_000,
        threads: draw.of(&[1, 2]),
    };
    let (mode, limit) = (draw.of(&["scatter-gather", "hybrid"]), draw.of(&["40mbit", "200mbit", "0"]));
    let (scatter, after_ms) = (draw.of(&["150mbit", "400mbit"]), draw.below(3000));
    let which = draw.of(&["pc", "q35"]);
    eprintln!(
        "SG_MOVE={seed}: {which}, {work:?}, {mode} at {scatter}, gathered at {limit}; {dies:?} dies after {after_ms} ms"
    );

    let machine = Machine::of(which, "192M", work, &[]);
    let (mut from, mut there) = hosts(&machine);
    let mut serve = ["i1", "i2", "i3"].map(|name| {
        let serve = ["serve", "--memory", "256M", "--listen", "127.0.0.1:0", "--name", name];
        let (sg, address) = Sg::listening(&serve);
        (Some(sg), address)
    });
    let qmp = there.qemu.qmp.clone();
    let gather = ["gather", "--qmp", path(&qmp), "--listen", "127.0.0.1:0", "--limit", limit];
    let (mut feeder, to) = Sg::listening(&gather);
    let evict = ["evict", "--qmp", path(&from.qemu.qmp), "--to", &to, "--quit", "--replicas", "2"];
    let at = serve.iter().flat_map(|(_, at)| ["--intermediary", at]);
    let how = ["--mode", mode, "--scatter", scatter];
    let mut evicting = Sg::start(&evict.into_iter().chain(how).chain(at).collect::<Vec<_>>());

    let after = Duration::from_millis(after_ms);
    match dies {
        Dies::Nobody => {}
        Dies::Intermediary(at) => {
            std::thread::sleep(after);
            drop(serve[at].0.take());
        }
        // Behind the switch: before it, the VM stays where it is.
        Dies::Feeder => {
            there.await_beat("it does not run there", |_| true);
            std::thread::sleep(after);
            let _ = feeder.0.kill();
        }
    }
    let fed = ended(&mut feeder, "sg gather");
    if !fed {
        assert!(matches!(dies, Dies::Feeder), "sg gather failed");
        resumed(&qmp, &[]);
    }
    assert!(ended(&mut evicting, "sg evict"), "sg evict failed: {}", evicting.told());
    assert!(from.qemu.has_ended_well(), "{}", from.qemu.said());
    there.await_passes();
    one_heart(&from.console, &there.console);
}

/// Waits for its end: whether that was a good one.
fn ended(sg: &mut Sg, what: &str) -> bool {
    let deadline = Instant::now() + 2 * PATIENCE;
    loop {
        if let Some(status) = sg.0.try_wait().expect("waits") {
            return status.success();
        }
        assert!(Instant::now() < deadline, "{what} does not end");
        std::thread::sleep(Duration::from_millis(50));
    }
}

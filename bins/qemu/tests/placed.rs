//! A page that libsg takes for placed is placed: a QEMU that loses its feeder then has it, and says so.

mod filled;
mod process;

use std::sync::Arc;
use std::time::{Duration, Instant};

use filled::{filled, source};
use libsg::memory::PresenceMap;
use libsg::migrate::{IncomingVm as _, OutgoingVm as _};
use libsg::page::{PAGE_BYTES, PageRange};
use libsg::sink::{PageSink, SinkEvent};
use libsg::source::{Outcome, PageSource as _, Supply};
use process::{PATIENCE, Qemu, await_paused};
use qemu::{ArrivingQemu, Departure, OnLost, Qmp, Relay};
use serde_json::json;

/// How often the destination loses its feeder, and behind how many pages since the last time: of one it may be said to be
/// placed as it is sent, of many it may be said too early.
const LOSES: [u32; 6] = [1, 512, 64, 512, 700, 512];

/// No more pages are given at once.
const AT_ONCE: u32 = 512;

/// What the source has said, and what of it is placed.
struct Moved {
    relay: Relay,
    /// Given to nobody yet.
    here: PresenceMap,
    placed: PresenceMap,
}

impl Moved {
    fn new(departure: &Departure) -> Self {
        let none = || PresenceMap::new(departure.manifest().pages());
        Self { relay: departure.pages(), here: none(), placed: none() }
    }

    /// Waits until such pages have come; `None` where nothing is to come any more.
    fn await_some(&mut self, which: impl Fn(&PresenceMap) -> Option<PageRange>) -> Option<PageRange> {
        let begun = Instant::now();
        loop {
            let mut runs = Vec::new();
            let supply = self.relay.available(&mut runs).expect("it lives");
            runs.into_iter().for_each(|run| self.here.insert(run));
            match which(&self.here) {
                None if supply == Supply::More => {}
                found => return found,
            }
            assert!(begun.elapsed() < PATIENCE, "nothing comes");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn give(&mut self, sink: &dyn PageSink, range: PageRange) {
        let mut bytes = vec![0; range.pages as usize * PAGE_BYTES];
        for (page, to) in range.iter().zip(bytes.chunks_mut(PAGE_BYTES)) {
            self.relay.slice(PageRange::new(page, 1)).expect("it came").copy_to(to);
        }
        let placed = sink.install(range.first, &bytes).unwrap_or_else(|error| panic!("{}", error.chain()));
        assert_eq!(placed.installed_pages(), range.pages);
        self.here.remove(range);
        self.placed.insert(range);
        self.relay.outcome(range, Outcome::Safe);
    }

    /// Gives up to so many of the next pages; how many that were.
    fn give_next(&mut self, sink: &dyn PageSink, at_most: u32) -> u32 {
        let next = self.await_some(|here| here.runs().next());
        let Some(run) = next else { return 0 };
        let range = PageRange::new(run.first, run.pages.min(at_most));
        self.give(sink, range);
        range.pages
    }

    /// Gives those that QEMU waits for.
    fn give_wanted(&mut self, sink: &dyn PageSink) {
        let mut events = Vec::new();
        sink.events(&mut events).expect("it lives");
        for event in events {
            let SinkEvent::Fault { page, .. } = event else { continue };
            if !self.placed.contains(page) {
                self.relay.want(page).expect("it lives");
                let one = PageRange::new(page, 1);
                self.await_some(|here| here.contains(page).then_some(one)).expect("it comes");
                self.give(sink, one);
            }
        }
    }
}

/// What the destination has, where it lost its feeder, and is gone on with.
fn go_on(there: &Qemu, departure: &Departure) -> (ArrivingQemu, Arc<dyn PageSink>, PresenceMap) {
    let mut arriving = ArrivingQemu::new(there.connect(), OnLost::Pause).going_on();
    let sink = arriving.prepare(departure.manifest()).unwrap_or_else(|error| panic!("{}", error.chain()));
    let mut has = PresenceMap::new(departure.manifest().pages());
    sink.in_place(&mut |range| has.insert(range));
    (arriving, sink, has)
}

#[test]
fn what_is_said_to_be_placed_is_there_when_the_feeder_is_gone() {
    let directory = tempfile::tempdir().expect("creates");
    let (from, bytes) = source(directory.path());
    let second = directory.path().join("second.qmp");
    let asked = format!("unix:{},server=on,wait=off", second.display());
    // Its vCPU does not run: one that waits for a page may hold QMP up.
    let arguments = ["-machine", "q35", "-m", "64M", "-S", "-incoming", "defer", "-qmp", &asked];
    let there = Qemu::start(directory.path(), "destination", &arguments);
    let mut second = Qmp::connect(&second).expect("greets");

    let departure = Departure::begin(from.connect(), "vm").expect("begins");
    let mut vm = departure.vm();
    let state = vm.pause().expect("paused");
    let mut arriving = ArrivingQemu::new(there.connect(), OnLost::Pause);
    let mut sink = arriving.prepare(departure.manifest()).unwrap_or_else(|error| panic!("{}", error.chain()));
    arriving.load(&state).expect("it is the same machine");
    arriving.run().expect("runs");
    vm.committed();
    let mut moved = Moved::new(&departure);
    // Its devices are loaded before it can lose anything. It does not answer while they wait for a page.
    std::thread::scope(|scope| {
        let loads = scope.spawn(|| {
            while second.execute("query-status", &json!({})).expect("answers")["status"] != "paused" {
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        while !loads.is_finished() {
            moved.give_wanted(&*sink);
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    for (time, many) in LOSES.into_iter().enumerate() {
        let mut left = many;
        while left > 0 {
            let given = moved.give_next(&*sink, left.min(AT_ONCE));
            assert!(given > 0, "there are too few pages");
            left -= given;
        }
        // We hang up, or QEMU does, which then reads nothing of what was sent.
        if time % 2 == 1 {
            second.execute("migrate-pause", &json!({})).expect("lets go of it");
        }
        drop((sink, arriving));
        await_paused(&mut second);
        let has;
        (arriving, sink, has) = go_on(&there, &departure);
        let [has, placed] = [&has, &moved.placed].map(|map| map.runs().collect::<Vec<_>>());
        assert_eq!(has, placed, "the {time}. time");
    }
    while moved.give_next(&*sink, AT_ONCE) > 0 {}
    sink.finish().unwrap_or_else(|error| panic!("{}", error.chain()));
    departure.complete(false).expect("the source QEMU completes");
    assert_eq!(second.migration().expect("answers"), "completed");
    assert!(filled(&mut second, directory.path()) == bytes, "the memory is not what it was");
}

//! A VM whose source died with its process while it was parked: another parks it, or it runs on, and never both.
#![allow(clippy::unwrap_used)]

mod gather_common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use gather_common::stream::Stream;
use gather_common::*;
use libsg::ids::{Epoch, NodeId, Round};
use libsg::memory::Backing;
use libsg::migrate::destination::{ClaimOptions, DestinationOptions, claim};
use libsg::migrate::source::{Outgoing, SourceOptions, To, Unscattered, resume, start};
use libsg::migrate::{Event, Mode, OutgoingVm, RoundOptions};
use libsg::page::{PageIndex, PageRange};
use libsg::report::Status;
use libsg::source::MemorySource;
use libsg::vmd::link::ask;
use libsg::vmd::{Class, Connector as _, Request};
use libsg::wire::IndexEntry;
use libsg::wire::message::VmdRequest;
use libsg::wire::parking::{Claim, Parking};
use libsg::{Error, ErrorKind, Result};
use parking_lot::Mutex;

const PAGES: u32 = 3000;
const STATE: &[u8] = b"state of the vCPUs";

/// What the first has left behind at intermediaries, and known there to be zero.
const STAGED: PageRange = PageRange::new(PageIndex(0), 1900);
const ZERO: PageRange = PageRange::new(PageIndex(2900), 100);
const ALL: PageRange = PageRange::new(PageIndex(0), PAGES);

fn is_zero(page: u32) -> bool {
    ZERO.positions().contains(&(page as usize))
}

/// A VM that is paused here, and what becomes of it.
#[derive(Default)]
struct Fate {
    runs: AtomicBool,
    committed: AtomicBool,
    /// What was written down, last.
    noted: Mutex<Vec<Unscattered>>,
    events: Mutex<Vec<Event>>,
}

struct Vm {
    stream: Arc<Stream>,
    fate: Arc<Fate>,
    /// Whether it can be run here still, or what stands against its going on.
    goes_on: std::result::Result<bool, ErrorKind>,
}

impl OutgoingVm for Vm {
    fn pause(&mut self) -> Result<Vec<u8>> {
        panic!("it does not run here");
    }

    fn resume(&mut self) -> Result<()> {
        assert!(!self.fate.committed.load(Ordering::SeqCst), "it never runs here again");
        self.fate.runs.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn note(&mut self, unscattered: &Unscattered) -> Result<()> {
        self.fate.noted.lock().push(unscattered.clone());
        Ok(())
    }

    fn go_on(&mut self) -> Result<bool> {
        let may_run = self.goes_on.map_err(|kind| Error::new(kind, "it has said everything"));
        self.stream.flows.store(may_run.is_ok(), Ordering::SeqCst);
        may_run
    }

    fn committed(&mut self) {
        self.fate.committed.store(true, Ordering::SeqCst);
    }
}

/// Intermediaries with what the first has left there.
struct Left(Scene);

impl Left {
    /// These pages, and the VM's state.
    fn behind(staged: PageRange) -> Self {
        let scene = Scene::new(Plan { pages: PAGES.into(), nodes: 2, ..Plan::default() });
        scene.incoming.cancel().unwrap();
        for node in &scene.nodes {
            scene.ask(node, Request::PutState(&blob(STATE)), |_| Ok(()));
        }
        let mut entries = vec![IndexEntry::zero(ZERO.first, ZERO.pages, Round(0))];
        for node in 0..2_u32 {
            let here = staged.iter().map(|page| page.0).filter(|page| !is_zero(*page));
            entries.extend(scene.stage(node as usize, here.filter(|page| page / 64 % 2 == node)));
        }
        scene.index_at_owners(&entries);
        Self(scene)
    }

    fn keeper(&self) -> NodeId {
        self.0.nodes[0].member().node
    }

    fn parking(&self) -> Parking {
        Parking { name: "web".into(), keeper: self.keeper(), term: 0, arbiter: None }
    }

    /// The first has told these that it is parked.
    fn tell(&self, nodes: &[usize]) {
        nodes.iter().for_each(|node| self.0.control(&self.0.nodes[*node], &VmdRequest::Park(self.parking())));
    }

    /// Somebody claims it, and tells everybody.
    fn claimed(&self) {
        let by = NodeId { name: "there".into(), incarnation: 7 };
        let claim = VmdRequest::ClaimParked(Claim { epoch: Epoch(2), by, force: false });
        self.0.nodes.iter().for_each(|node| self.0.control(node, &claim));
    }

    fn unscattered(&self, keeper: Option<NodeId>) -> Unscattered {
        Unscattered {
            volume: self.0.volume,
            epoch: EPOCH,
            to: To::parked("web"),
            keeper,
            mode: Mode::ScatterGather,
            round: Round(0),
            replicas: 1,
            members: self.0.members(),
            manifest: self.0.manifest.clone(),
        }
    }

    fn options(&self, fate: &Arc<Fate>) -> SourceOptions {
        let told = Arc::clone(fate);
        SourceOptions {
            to: To::parked("web"),
            intermediaries: self.0.members().iter().map(|member| member.address).collect(),
            replacements: None,
            replicas: 1,
            mode: Mode::ScatterGather,
            rounds: RoundOptions::default(),
            secret: secret(),
            connector: Arc::new(self.0.connector.clone()),
            scatter_limit_bytes_per_s: 0,
            ready_timeout: LONG,
            observer: Arc::new(move |event| told.events.lock().push(event.clone())),
        }
    }

    fn go_on_as(
        &self,
        of: Unscattered,
        goes_on: std::result::Result<bool, ErrorKind>,
        change: impl FnOnce(&mut SourceOptions),
    ) -> (Outgoing, Arc<Stream>, Arc<Fate>) {
        let (stream, fate) = (Stream::new(&self.0.manifest, is_zero), Arc::new(Fate::default()));
        let mut options = self.options(&fate);
        change(&mut options);
        let vm = Vm { stream: Arc::clone(&stream), fate: Arc::clone(&fate), goes_on };
        let outgoing = resume(Box::new(vm), Arc::clone(&stream) as _, of, options).unwrap();
        (outgoing, stream, fate)
    }

    fn go_on(&self, keeper: Option<NodeId>) -> (Outgoing, Arc<Stream>, Arc<Fate>) {
        self.go_on_as(self.unscattered(keeper), Ok(true), |_| {})
    }

    /// It is parked, and the source is needed by nobody: whoever claims it has all of it.
    fn is_parked(&self, outgoing: Outgoing, fate: &Fate) {
        let report = outgoing.wait_evicted(LONG).unwrap_or_else(|error| panic!("{}", error.chain()));
        assert_eq!(report.status, Status::Ok);
        assert!(outgoing.cancel().is_err(), "there is no way back");
        assert!(fate.committed.load(Ordering::SeqCst) && !fate.runs.load(Ordering::SeqCst));
        drop(outgoing);
        let seen = Arc::new(Seen::default());
        let nowhere = ([127, 0, 0, 1], 0).into();
        let options = DestinationOptions::new(nowhere, secret(), Arc::new(self.0.connector.clone()));
        let intermediaries = self.0.members().iter().map(|member| member.address).collect();
        let wanted = ClaimOptions { name: "web".into(), intermediaries, force: false, engines: None };
        let incoming = claim(arriving(&seen, Backing::Anon, vec![3, 1500]), wanted, options).unwrap();
        assert_eq!(incoming.wait_gathered(LONG).unwrap().status, Status::Ok);
        assert_eq!(*seen.state.lock(), STATE);
        let memory = seen.memory();
        for page in 0..PAGES {
            let want = if is_zero(page) { vec![0; 4096] } else { content(page) };
            assert!(read(&memory, page) == want, "page {page}");
        }
        incoming.wait_dissolved(LONG).unwrap();
        self.0.nothing_staged();
    }

    /// It is not parked, and runs here.
    fn runs_here(&self, outgoing: &Outgoing, fate: &Fate, kind: ErrorKind) {
        let error = outgoing.wait_evicted(LONG).unwrap_err();
        assert_eq!(error.kind, kind, "{error}");
        assert!(fate.runs.load(Ordering::SeqCst) && !fate.committed.load(Ordering::SeqCst));
        assert!(!outgoing.progress().committed);
    }

    /// It is left as it is, paused here.
    fn stays_paused(outgoing: &Outgoing, fate: &Fate, kind: ErrorKind) {
        let error = outgoing.wait_evicted(LONG).unwrap_err();
        assert_eq!(error.kind, kind, "{error}");
        until("it is over", || outgoing.is_over());
        assert!(!fate.runs.load(Ordering::SeqCst) && !fate.committed.load(Ordering::SeqCst));
        assert!(outgoing.progress().committed, "nobody is to run the VM here for that");
    }
}

#[test]
fn what_is_safe_is_not_sent_again_and_it_is_parked() {
    let left = Left::behind(STAGED);
    let (outgoing, stream, fate) = left.go_on(None);
    let report = outgoing.wait_evicted(LONG).unwrap();
    assert_eq!(stream.safe(), [STAGED, ZERO]);
    assert_eq!(report.bytes.staged, Some(u64::from(PAGES - STAGED.pages - ZERO.pages) * 4096), "{report:?}");
    let keepers: Vec<_> = fate.noted.lock().iter().map(|noted| noted.keeper.clone()).collect();
    assert_eq!(keepers, [Some(left.keeper())], "written down before anybody is told");
    left.is_parked(outgoing, &fate);
}

/// With all of it safe, and these told that it is parked: nothing is sent, and the others are told.
#[test]
fn who_was_told_hears_it_again_and_the_others_hear_it() {
    for told in [&[][..], &[1], &[0, 1]] {
        let left = Left::behind(ALL);
        left.tell(told);
        // One that has said everything is asked for nothing.
        let (outgoing, stream, fate) =
            left.go_on_as(left.unscattered(Some(left.keeper())), Ok(false), |_| {});
        assert_eq!(outgoing.wait_evicted(LONG).unwrap().bytes.staged, Some(0));
        assert_eq!(stream.safe(), [ALL]);
        let parked = |event: &Event| matches!(event, Event::Parked { keeper, .. } if *keeper == left.keeper().to_string());
        assert!(fate.events.lock().iter().any(parked));
        left.is_parked(outgoing, &fate);
    }
}

/// Some are told, and what lay at one that died since comes again, also to those.
#[test]
fn what_is_lost_behind_commit_is_sent_to_who_was_told() {
    let left = Left::behind(ALL);
    left.tell(&[1]);
    left.0.nodes[0].kill();
    let (outgoing, stream, fate) = left.go_on(Some(left.keeper()));
    outgoing.wait_evicted(LONG).unwrap();
    let safe: u32 = stream.safe().iter().map(|run| run.pages).sum();
    assert!(safe < PAGES, "{safe}");
    let forced = |event: &Event| matches!(event, Event::Warning { message } if message.contains("--force"));
    assert!(fate.events.lock().iter().any(forced), "its keeper is gone");
    assert!(fate.committed.load(Ordering::SeqCst) && !fate.runs.load(Ordering::SeqCst));
}

/// It was claimed before anybody said so here, and may be gathered and gone by now: it never runs here again, whatever was
/// written down.
#[test]
fn one_that_was_claimed_is_let_go() {
    for (dissolves, was_written) in [(false, true), (true, true), (false, false), (true, false)] {
        let left = Left::behind(ALL);
        left.tell(&[1, 0]);
        left.claimed();
        if dissolves {
            for node in left.0.members() {
                let connector = &left.0.connector;
                let mut link =
                    connector.connect(node.address, left.0.volume, Epoch(2), Class::Bulk, LONG).unwrap();
                ask(&mut *link, Request::Control(&VmdRequest::Dissolve), LONG, |_| Ok(())).unwrap();
            }
        }
        let (outgoing, stream, fate) = left.go_on(was_written.then(|| left.keeper()));
        assert_eq!(outgoing.wait_evicted(LONG).unwrap().status, Status::Ok);
        assert_eq!(stream.safe(), [ALL]);
        let told =
            |event: &Event| matches!(event, Event::Warning { message } if message.contains("has claimed it"));
        assert!(fate.events.lock().iter().any(told));
        assert!(fate.committed.load(Ordering::SeqCst) && !fate.runs.load(Ordering::SeqCst));
    }
}

/// Nobody was told that it is parked, and who has it is gone, has forgotten it, or never had the state: it runs on here, and
/// nobody can claim it.
#[test]
fn where_it_cannot_be_parked_and_nobody_was_told_it_runs_on() {
    let left = Left::behind(STAGED);
    left.0.nodes.iter().for_each(|node| node.kill());
    let (outgoing, _, fate) = left.go_on(None);
    left.runs_here(&outgoing, &fate, ErrorKind::Unreachable);

    let left = Left::behind(STAGED);
    left.0.nodes.iter().for_each(|node| left.0.control(node, &VmdRequest::Dissolve));
    let (outgoing, _, fate) = left.go_on(None);
    left.runs_here(&outgoing, &fate, ErrorKind::Unreachable);

    // Called off while it goes on.
    let left = Left::behind(STAGED);
    let slowly = |options: &mut SourceOptions| options.scatter_limit_bytes_per_s = 1 << 16;
    let (outgoing, _, fate) = left.go_on_as(left.unscattered(None), Ok(true), slowly);
    until("pages are sent", || outgoing.progress().staged_bytes > 0);
    outgoing.cancel().unwrap();
    left.runs_here(&outgoing, &fate, ErrorKind::Cancelled);
    left.0.nothing_staged();
}

/// What may be parked already, is somebody else's, or cannot be run here any more, is not touched.
#[test]
fn where_it_may_be_elsewhere_it_is_left_as_it_is() {
    let left = Left::behind(ALL);
    left.tell(&[1, 0]);
    left.0.nodes.iter().for_each(|node| left.0.control(node, &VmdRequest::Dissolve));
    let (outgoing, _, fate) = left.go_on(Some(left.keeper()));
    Left::stays_paused(&outgoing, &fate, ErrorKind::Volume);

    let left = Left::behind(STAGED);
    let claim = VmdRequest::Claim { epoch: Epoch(2) };
    left.0.nodes.iter().for_each(|node| left.0.control(node, &claim));
    let (outgoing, _, fate) = left.go_on(None);
    Left::stays_paused(&outgoing, &fate, ErrorKind::Fenced);

    // It has said everything, and not all of that is there.
    let left = Left::behind(STAGED);
    let (outgoing, ..) = left.go_on_as(left.unscattered(None), Err(ErrorKind::Lost), |_| {});
    let error = outgoing.wait_evicted(LONG).unwrap_err();
    assert!(error.kind == ErrorKind::Lost && outgoing.progress().committed, "{error}");
    let (outgoing, stream, fate) = left.go_on(None);
    outgoing.wait_evicted(LONG).unwrap();
    assert_eq!(stream.safe(), [STAGED, ZERO], "what was there is kept");
    left.is_parked(outgoing, &fate);
}

/// A VM that is parked from its beginning.
struct Leaving {
    fate: Arc<Fate>,
    /// It cannot be written down the nth time.
    fails: Option<usize>,
}

impl OutgoingVm for Leaving {
    fn pause(&mut self) -> Result<Vec<u8>> {
        Ok(STATE.to_vec())
    }

    fn resume(&mut self) -> Result<()> {
        self.fate.runs.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn note(&mut self, unscattered: &Unscattered) -> Result<()> {
        let mut noted = self.fate.noted.lock();
        noted.push(unscattered.clone());
        if self.fails == Some(noted.len()) {
            Err(Error::new(ErrorKind::System, "the disk is full"))
        } else {
            Ok(())
        }
    }

    fn committed(&mut self) {
        assert_eq!(self.fate.noted.lock().len(), 2, "written down before");
        self.fate.committed.store(true, Ordering::SeqCst);
    }
}

#[test]
fn it_is_written_down_when_its_state_is_safe_and_when_all_is() {
    for fails in [None, Some(1), Some(2)] {
        let scene = Scene::new(Plan { pages: PAGES.into(), nodes: 2, ..Plan::default() });
        scene.incoming.cancel().unwrap();
        let (left, fate) = (Left(scene), Arc::new(Fate::default()));
        let memory = MemorySource::new(Stream::new(&left.0.manifest, is_zero).memory.clone());
        let vm = Leaving { fate: Arc::clone(&fate), fails };
        let manifest = left.0.manifest.clone();
        let outgoing = start(Box::new(vm), Arc::new(memory), manifest, left.options(&fate)).unwrap();
        let volume = |of: &Unscattered| Unscattered { volume: left.0.volume, ..of.clone() };
        if fails.is_some() {
            left.runs_here(&outgoing, &fate, ErrorKind::System);
        } else {
            left.is_parked(outgoing, &fate);
        }
        let noted: Vec<_> = fate.noted.lock().iter().map(volume).collect();
        let both = [left.unscattered(None), left.unscattered(Some(left.keeper()))];
        assert_eq!(noted, both[..fails.unwrap_or(2)]);
    }
}

//! The rules that every backend keeps, as one suite: [`run_all`] runs it over whatever a [`Fixture`] sets
//! up. It panics at the first rule that is broken, with the rule's name.

mod copies;
mod known;
mod links;
mod parking;
mod sharing;
mod spread;
mod volumes;
mod writers;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use super::device::{PagePut, Vmd, Volume};
use super::link::{Connector, Link, Reply, Request, ask};
use super::{Class, VmdClient};
use crate::error::{ErrorKind, Result};
use crate::ids::{Checksum, Epoch, Round, VolumeId};
use crate::manifest::{Manifest, Region};
use crate::memory::PageSlice;
use crate::page::{InstallUnit, PAGE_BYTES, PageIndex};
use crate::wire::PageEntry;

/// How long any one thing of the suite may take. An in-memory backend needs none of it.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Sets up intermediaries of a backend.
pub trait Fixture {
    /// Reaches the intermediaries of this fixture.
    fn connector(&self) -> Arc<dyn Connector>;

    /// Starts an intermediary that gives at most `limit_bytes` bytes to pages, a multiple of 2 MiB.
    fn start(&self, limit_bytes: u64) -> Box<dyn FixtureNode>;
}

/// An intermediary of a [`Fixture`].
pub trait FixtureNode {
    /// Where it listens, now and after a restart.
    fn address(&self) -> SocketAddr;

    /// It dies at once, with all that it holds.
    fn kill(&mut self);

    /// It comes back after [`Self::kill`], at the same address, as somebody else.
    fn restart(&mut self);
}

/// Runs every rule.
///
/// # Panics
/// At the first rule that is broken.
pub fn run_all(fixture: &dyn Fixture) {
    for (name, rule) in RULES {
        eprintln!("conformance: {name}");
        rule(&Bench { fixture });
    }
}

type Rule = fn(&Bench<'_>);

/// All rules, by what holds.
const RULES: &[(&str, Rule)] = &[
    ("what one client puts another gets", links::put_then_get),
    ("a placement is of one page, one volume and one generation", links::placements_are_exact),
    ("many outstanding requests all come to their end", links::many_outstanding),
    ("what is known of pages changes nothing of what is had", known::known_pages),
    ("bytes are metered", links::writes_are_metered),
    ("an empty or too long request is refused before it is sent", links::requests_are_bounded),
    ("a full node stores what fits, and more when there is room", links::full_node),
    ("slots that are dropped are free, others stay", links::dropped_slots),
    ("index entries are replaced by newer rounds only", links::rounds),
    ("runs of zero pages are index entries", links::zero_runs),
    ("a large index is paged", links::locate_pages),
    ("discard drops older rounds from store and index", links::discard),
    ("a replaced writer is refused", writers::fencing),
    ("what a dead writer has under way enters no index", writers::dead_writers),
    ("a sealed volume takes nothing more", links::sealed),
    ("the state blob comes back as it was", links::state_blob),
    ("pieces of a final set come back as they were, in their order", links::pieces),
    ("an unknown volume is no volume", links::unknown_volume),
    ("a dissolved volume gives its memory back and stays gone", links::dissolved),
    ("a link to a killed node fails for good", links::killed_node),
    ("a volume is found through any of its members", volumes::found_through_any_member),
    ("pages and index go on without a member that died", volumes::member_dies),
    ("a member that restarted is somebody else", volumes::member_restarts),
    ("the whole volume is scanned in order", volumes::scan),
    ("members can be added", volumes::grows),
    ("commit, seal, claim and dissolve reach every member", volumes::states_everywhere),
    ("a parked volume has one owner", parking::has_one_owner),
    ("where an engine decides, a keeper does not", parking::grants_nothing_itself),
    ("a writer of an open volume is succeeded by another", volumes::writers_succeed),
    ("copies lie where they are said to", copies::copies_are_there),
    ("many batches with copies all come to their end", copies::many_copies_outstanding),
    ("who has no copy is named", copies::missing_copies_are_named),
    ("copies are given back with what they are copies of", copies::copies_are_given_back),
    ("an older copy hides no newer one", copies::newest_copy_is_named),
    ("of pages that lie at several members any but one may die", copies::any_but_one_may_die),
    (
        "of several holders one that lives is named, also when another is found dead meanwhile",
        copies::copies_are_named_that_live,
    ),
    ("pages of volumes that share are stored once", sharing::stored_once),
    ("nothing is shared with another domain", sharing::domains_are_apart),
    ("one is told to send what others wait for", sharing::one_sends),
    ("who is asked about a hash says who has its bytes", sharing::hints),
    ("pages of one SHA-1 are told apart", sharing::collisions),
    ("a shared page is each one's own", sharing::own_until_given_back),
    ("a page that was stored by reference may have copies", spread::references_have_copies),
    ("copies of references are given back with them", spread::copies_of_references_are_given_back),
    ("who has no copy of a reference is named", spread::missing_copies_of_references_are_named),
];

/// What rules work with.
struct Bench<'f> {
    fixture: &'f dyn Fixture,
}

/// Memory that no rule but the one about full nodes uses up.
const PLENTY_BYTES: u64 = 64 << 20;

/// Pages of the volumes of the suite.
const VOLUME_PAGES: u32 = 1 << 20;

impl Bench<'_> {
    fn node(&self) -> Box<dyn FixtureNode> {
        self.fixture.start(PLENTY_BYTES)
    }

    fn client(&self) -> VmdClient {
        VmdClient::new(self.fixture.connector(), PATIENCE)
    }

    fn link(&self, node: &dyn FixtureNode, volume: VolumeId, epoch: u64) -> Box<dyn Link> {
        let connector = self.fixture.connector();
        connector.connect(node.address(), volume, Epoch(epoch), Class::Bulk, PATIENCE).expect("a link")
    }

    /// A new volume at these nodes, under epoch 1.
    fn volume(&self, nodes: &[&dyn FixtureNode]) -> Box<dyn Volume> {
        let addresses: Vec<SocketAddr> = nodes.iter().map(|node| node.address()).collect();
        let id = VolumeId::random().expect("random bytes");
        self.client().create(id, Epoch::FIRST, &manifest(), &addresses).expect("a volume")
    }

    /// A node with a volume, and its writer's link.
    fn one(&self) -> (Box<dyn FixtureNode>, VolumeId, Box<dyn Link>) {
        let node = self.node();
        let volume = self.volume(&[&*node]).id();
        let link = self.link(&*node, volume, 1);
        (node, volume, link)
    }
}

fn manifest() -> Manifest {
    let region = Region {
        name: "ram".into(),
        guest_address: Some(0),
        length_bytes: u64::from(VOLUME_PAGES) * PAGE_BYTES as u64,
        unit: InstallUnit::Page,
    };
    Manifest { vm: "conformance".into(), regions: vec![region], vm_config: vec![1, 2, 3], sharing: None }
}

/// Bytes that tell page and round apart.
fn content(page: u32, round: u16) -> Vec<u8> {
    let seed = u64::from(page) << 16 | u64::from(round);
    let word = |at: u64| {
        (seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ at.wrapping_mul(0xff51_afd7_ed55_8ccd)).to_le_bytes()
    };
    (0..PAGE_BYTES as u64 / 8).flat_map(word).collect()
}

fn put_of(page: u32, round: u16) -> PagePut {
    let bytes = content(page, round);
    let checksum = Checksum::of(&bytes);
    PagePut { page: PageIndex(page), round: Round(round), checksum, bytes: PageSlice::owned(bytes.into()) }
}

/// A batch of pages with their bytes.
fn batch(pages: impl IntoIterator<Item = u32>, round: u16) -> (Vec<PageEntry>, Vec<PageSlice>) {
    pages
        .into_iter()
        .map(|page| put_of(page, round))
        .map(|put| (PageEntry::raw(put.page, put.round, put.checksum), put.bytes))
        .unzip()
}

/// Asks and takes the answer apart.
fn asked<T>(
    link: &mut dyn Link,
    request: Request<'_>,
    take: impl FnOnce(Reply<'_>) -> Option<T>,
) -> Result<T> {
    ask(link, request, PATIENCE, |reply| {
        let said = format!("{reply:?}");
        Ok(take(reply).unwrap_or_else(|| panic!("not an answer to that: {said:.200}")))
    })
}

#[track_caller]
fn refused<T>(result: Result<T>, kind: ErrorKind) {
    match result {
        Ok(_) => panic!("done, where {kind:?} belongs"),
        Err(error) => assert_eq!(error.kind, kind, "{}", error.chain()),
    }
}

//! Copies that went with an intermediary that died are made again, by those that have the pages, while the volume lives.
//!
//! ```text
//!  sg-serve-mend   each second   watch    who of the members of volumes is there: a pure core
//!                  other members than before
//!                                volume   asks them all what they have, and gives what is missing to who has it not;
//!                                         where too few are left, or have room, another becomes a member
//! ```
//!
//! Nobody leads: each does so for what lies there. What two give to one for the same placement is one copy, and who has a
//! page together with others leaves it to the first of them at first. Whoever reads goes before.

mod volume;
mod watch;

use std::collections::BTreeMap;
use std::time::Duration;

use self::volume::Left;
use self::watch::{Care, Watch};
use super::Others;
use super::drain::Around;
use super::limit::Limit;
use super::store::{Mended, Store, Tended};
use crate::host;
use crate::ids::{Epoch, MemberSet, NodeId, VolumeId};
use crate::transport::dial;
use crate::wire::handshake::Purpose;

/// How often members are looked at, and how many at once: of more, each is looked at less often.
const LOOK_EVERY: Duration = Duration::from_secs(1);
const LOOKS_AT_ONCE: usize = 16;

/// How long one has to answer.
const LOOK_TIME: Duration = Duration::from_millis(500);

/// The thread `sg-serve-mend`, until the server closes. With nobody named, no others are asked.
pub(super) fn run(store: &Store, limit_out: &Limit, others: Option<&dyn Others>) {
    let mut mender = Mender { store, limit_out, others, watch: Watch::default(), cares: BTreeMap::new() };
    while !store.is_closing() {
        let tended = store.tended();
        mender.look(&tended);
        if !mender.mend_one(&tended) {
            store.wait_to_tend(LOOK_EVERY);
        }
    }
}

struct Mender<'s> {
    store: &'s Store,
    limit_out: &'s Limit,
    others: Option<&'s dyn Others>,
    watch: Watch,
    cares: BTreeMap<VolumeId, Care>,
}

impl Mender<'_> {
    /// Looks who is there.
    fn look(&mut self, tended: &[Tended]) {
        let me = self.store.node();
        let members = tended.iter().flat_map(|of| &of.members);
        self.watch.keep(members.filter(|member| member.node != *me));
        for _ in 0..self.watch.len().min(LOOKS_AT_ONCE) {
            let Some(member) = self.watch.next().filter(|_| !self.store.is_closing()) else { return };
            let secret = self.store.secret();
            let there = dial(member.address, Purpose::Operator, VolumeId(0), Epoch(0), secret, LOOK_TIME);
            let node = there.as_ref().ok().map(|channel| channel.node());
            // One that has no room for another connection is there.
            let is_full = there.as_ref().is_err_and(|error| error.kind == crate::error::ErrorKind::Full);
            self.watch.found(&member, node.or(is_full.then_some(&member.node)), host::now());
        }
    }

    /// Makes copies of one volume again; `false` where there is nothing to do.
    fn mend_one(&mut self, tended: &[Tended]) -> bool {
        self.cares.retain(|volume, _| tended.iter().any(|of| of.volume == *volume));
        let now = host::now();
        for Tended { volume, members, copies, me } in tended {
            let living = self.watch.living(members, now).with(*me);
            let begin = || Care::begin(members.len(), *copies, now);
            let care = self.cares.entry(*volume).or_insert_with(begin);
            if care.is_due(living, now) {
                let tries = care.tries;
                let away: Vec<NodeId> = members
                    .iter()
                    .map(|m| &m.node)
                    .filter(|node| self.watch.is_away(node, now))
                    .cloned()
                    .collect();
                let left = self.mend(*volume, away, tries);
                if let Some(care) = self.cares.get_mut(volume) {
                    care.tried(left, host::now());
                }
                return true;
            }
        }
        false
    }

    /// Whether something is left to do with those that are there.
    fn mend(&self, volume: VolumeId, away: Vec<NodeId>, tries: u32) -> bool {
        let away_members = away.len() as u16;
        let now = |missing_copies| self.store.set_mended(volume, Mended { away_members, missing_copies });
        now(None);
        let others = || self.others.map(Others::others).unwrap_or_default();
        let around = Around::new(self.store, self.limit_out, &others);
        match volume::mend(&around, volume, away, tries) {
            Ok(Left { missing, to_do, lacks_members, missed, .. }) => {
                now((!missed).then_some(missing));
                to_do > 0 || missed || (lacks_members && self.others.is_some())
            }
            Err(error) => {
                tracing::info!(%volume, error = error.chain(), "copies are not made again yet");
                true
            }
        }
    }
}

/// Those that come before a member among these.
fn before(members: MemberSet, me: crate::ids::MemberIndex) -> u32 {
    members.iter().filter(|member| *member < me).count() as u32
}

//! A VM that runs here already, whose memory another process was gathering when it ended; and what is written down meanwhile, so
//! that another can go on.
//!
//! ```text
//!            whose is it? fence            prepare: what is in place
//!  Waiting ---------------------> Waiting --------------------------> Running --> Gathered
//!     |                              |
//!     +-- refused: nothing changes   +-- failed: it waits as before, for the next who goes on
//! ```
//!
//! Where nobody writes the volume any more, whoever gathered before is shut out by a newer epoch. As long as a source may be at
//! it, it keeps its epoch, and dials the one address: whoever listens there is the destination.

use std::sync::Arc;
use std::time::Duration;

use super::super::{ArrivalPhase, Unfinished};
use super::{Conductor, Offer};
use crate::error::{Error, ErrorKind, Result};
use crate::host;
use crate::ids::Epoch;
use crate::manifest::Manifest;
use crate::migrate::Event;
use crate::usage::Cpu;
use crate::vmd::{Connector, is_away, visit_all};
use crate::wire::message::{Member, Rounds, VmdReply, VmdRequest, VolumeInfo, VolumeState};
use crate::wire::parking::{Claim, Verdict};

/// How long each intermediary has for an answer.
const ANSWER_MAX: Duration = Duration::from_secs(2);

/// What is written down of the VM.
#[derive(Default)]
pub(in crate::migrate::destination) struct Notes {
    unfinished: Option<Unfinished>,
    is_kept: bool,
    /// Another process began it.
    pub is_resumed: bool,
}

impl Notes {
    /// Whether another process can go on.
    pub fn are_kept(&self) -> bool {
        self.is_kept
    }
}

impl Conductor {
    /// Goes on with the VM.
    pub(super) fn resume(&mut self, mut unfinished: Unfinished) -> Result<()> {
        let (at, used) = (host::now(), Cpu::now());
        unfinished.manifest.check()?;
        let connector = Arc::clone(&self.options.connector);
        let known = look(&*connector, &unfinished)?;
        unfinished.members.clone_from(&known.members);
        let fences = unfinished.source_gone && known.is_there;
        if fences {
            unfinished.epoch = Epoch(unfinished.epoch.0.saturating_add(1));
        }
        let Unfinished { volume, epoch, members, manifest, source_gone, .. } = unfinished.clone();
        (self.notes.unfinished, self.notes.is_resumed) = (Some(unfinished.clone()), true);
        // Who was told of an epoch that nobody has written down would take us for somebody else the next time.
        self.write_notes()?;
        if fences {
            fence(&*connector, &unfinished)?;
        }
        tracing::info!(%volume, epoch = epoch.0, source_gone, "another process goes on with it");
        self.desk.change(|stage| stage.committed = true);
        let offer = Offer { volume, epoch, members, elapsed_us: 0, at, used, rounds: Rounds::None };
        self.build(offer, &manifest)?;
        if let Some(gather) = &self.gather {
            let shared = gather.shared();
            if source_gone && !known.is_there && !shared.tracker.lock().is_complete() {
                return Err(is_gone());
            }
            if source_gone {
                shared.set_evicted();
            }
            // It may come back.
            self.away_since = Some(host::now());
            shared.set_source_away(self.away_since);
            shared.set_running();
        }
        self.set_phase(ArrivalPhase::Running);
        self.desk.change(|stage| stage.running = Some(Ok(())));
        self.tell(&Event::Resumed);
        Ok(())
    }

    /// Has written down for the first time what another would need: before READY, and so before anything depends on it.
    pub(super) fn begin_notes(&mut self, manifest: &Manifest) -> Result<()> {
        let Some(offer) = self.offer.as_ref().filter(|_| self.notes.unfinished.is_none()) else {
            return Ok(());
        };
        self.notes.unfinished = Some(Unfinished {
            volume: offer.volume,
            epoch: offer.epoch,
            source_gone: self.claim.is_some(),
            claimant: self.claim.as_ref().map(|claimant| claimant.claim.by.clone()),
            members: offer.members.clone(),
            manifest: manifest.clone(),
        });
        self.write_notes()
    }

    fn write_notes(&mut self) -> Result<()> {
        if let (Some(unfinished), Some(vm)) = (&self.notes.unfinished, &mut self.vm) {
            self.notes.is_kept = vm.note(unfinished)?;
        }
        Ok(())
    }

    /// Writes down what has changed. What was written before does as well, with more to be looked for.
    pub(in crate::migrate::destination) fn keep_notes(&mut self) {
        let (Some(gather), Some(offer), Some(noted)) =
            (&self.gather, &self.offer, &mut self.notes.unfinished)
        else {
            return;
        };
        let gone = noted.source_gone || gather.shared().source().evicted;
        let is_new = gone != noted.source_gone || offer.members.len() > noted.members.len();
        if !is_new || self.vm.is_none() {
            return;
        }
        noted.source_gone = gone;
        noted.members.clone_from(&offer.members);
        if let Err(error) = self.write_notes() {
            tracing::warn!(error = error.chain(), "what has changed is not written down");
        }
    }
}

/// What intermediaries know of the volume.
struct Known {
    members: Vec<Member>,
    /// One of them has it.
    is_there: bool,
}

/// Whether nobody else has the volume.
fn look(connector: &dyn Connector, unfinished: &Unfinished) -> Result<Known> {
    let Unfinished { volume, epoch, claimant, .. } = unfinished;
    let mut members = unfinished.members.clone();
    let of = (*volume, Epoch(u64::MAX));
    let told = visit_all(connector, &members, of, &VmdRequest::Describe, ANSWER_MAX, |reply| match reply {
        VmdReply::Volume(info) => Some(*info),
        _ => None,
    });
    let (mut is_there, mut is_gone, mut away) = (false, members.is_empty(), None);
    for answer in told {
        match answer {
            Ok(info) if info.state == VolumeState::Dissolved => is_gone = true,
            Ok(info) => {
                let is_ours = info.owner.is_none() || info.owner == *claimant;
                if info.epoch > *epoch || !is_ours {
                    return Err(is_elsewhere(&info, *epoch));
                }
                is_there = true;
                if info.members.len() > members.len() && info.members.starts_with(&unfinished.members) {
                    members = info.members;
                }
            }
            Err(error) if error.kind == ErrorKind::Volume => is_gone = true,
            Err(error) => away = Some(error),
        }
    }
    match away {
        Some(error) if !is_there && !is_gone => {
            let message =
                "none of the VM's intermediaries answers: go on when one does; until then the VM waits";
            Err(Error::new(ErrorKind::Unreachable, message).because(error))
        }
        _ => Ok(Known { members, is_there }),
    }
}

/// Tells every intermediary of the new epoch: what a process before asks is refused from now on.
fn fence(connector: &dyn Connector, unfinished: &Unfinished) -> Result<()> {
    let Unfinished { volume, epoch, members, claimant, .. } = unfinished;
    let request = match claimant {
        Some(by) => VmdRequest::ClaimParked(Claim { epoch: *epoch, by: by.clone(), force: true }),
        None => VmdRequest::Claim { epoch: *epoch },
    };
    let told = visit_all(connector, members, (*volume, *epoch), &request, ANSWER_MAX, |reply| match reply {
        VmdReply::Verdict(verdict) => Some(verdict),
        VmdReply::Done => Some(Verdict::Granted),
        _ => None,
    });
    for (member, answer) in members.iter().zip(told) {
        match answer {
            // One that does not know that it was parked has no other owner for it either.
            Ok(Verdict::Granted | Verdict::NotParked) => {}
            Ok(verdict) => {
                let message = format!("the VM is somebody else's, as {} says: {verdict:?}", member.node);
                return Err(Error::new(ErrorKind::Fenced, message));
            }
            Err(error) if is_away(&error) || error.kind == ErrorKind::Volume => {
                tracing::warn!(member = %member.node, error = error.chain(), "cannot be told of the new owner");
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn is_elsewhere(info: &VolumeInfo, epoch: Epoch) -> Error {
    let whose = info.owner.as_ref().map(|owner| format!(", {owner}")).unwrap_or_default();
    let message = format!(
        "the volume {} has another owner since{whose} (epoch {}, and not {}): it was claimed elsewhere, and this VM is not gone on \
         with",
        info.volume, info.epoch.0, epoch.0
    );
    Error::new(ErrorKind::Fenced, message)
}

fn is_gone() -> Error {
    let message = "no intermediary has the VM's volume any more: it was dissolved, or they were all restarted. What the VM lacks is \
                   lost, and it stays paused";
    Error::new(ErrorKind::Lost, message)
}

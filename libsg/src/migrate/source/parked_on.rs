//! The thread `sg-source` of a VM whose source died with its process while it was parked: another process takes its place.
//!
//! ```text
//!   its keeper knows that it is parked, or somebody has claimed it  -->  nothing is left to do here: "evicted"
//!   else: what the index knows is safe, the rest is scattered       -->  COMMIT, parked, "evicted"
//!                                     |
//!                                     +-- before COMMIT, where that cannot be: it runs here again
//! ```
//!
//! The VM may run here as long as nobody was told that it is parked. That is written down before anybody is, and what
//! intermediaries know counts more than what was written down.

use parking_lot::Mutex;

use super::manager::Manager;
use super::resumed::Found;
use super::{To, Unscattered};
use crate::error::{Error, ErrorKind, Result};
use crate::host;
use crate::ids::NodeId;
use crate::migrate::Event;
use crate::migrate::recruit::Recruiter;
use crate::page::{PageIndex, PageRange};
use crate::scatter::telling::Feed;
use crate::source::Outcome;
use crate::wire::message::{VolumeInfo, VolumeState};

impl Manager {
    pub(super) fn park_on(self, of: &Unscattered) -> Result<()> {
        // By the one before: where it is called off, it is to run again.
        self.control.mark_paused();
        let found = Found::look(&self.options, of);
        if let Some(info) = found.parked(of) {
            return self.was_parked(of, info);
        }
        let keeper = of.keeper.clone().or_else(|| found.keeper());
        if keeper.is_some() || found.is_fenced() {
            self.control.set_committed();
        }
        // Whoever has forgotten it, it was given to nobody: then it runs here.
        let found = if self.control.is_committed() { found.checked(of)? } else { found };
        let (scatter, mut members) = self.take_place(of, found)?;
        // Where pages have copies, all of them were there before COMMIT.
        if of.replicas == 1 || self.control.is_committed() {
            self.read_index(&scatter, &mut members);
        }
        let (safe, total) = scatter.planner.lock().progress();
        tracing::info!(volume = %of.volume, safe, total, "another process goes on parking it");
        let recruiter = Mutex::new(Recruiter::new(&self.options, &self.manifest, (of.volume, of.epoch)));
        self.parks(&scatter, &recruiter, members, |parking, vm, members, _| {
            let lead = &parking.lead;
            scatter.take_stock()?;
            // What is safe is told first.
            Feed::default().turn(&scatter)?;
            let may_run_here = vm.go_on();
            if !matches!(may_run_here, Ok(true)) {
                lead.control.set_committed();
            }
            may_run_here?;
            parking.until_all_is_safe(members)?;
            let Some(keeper) = keeper else { return parking.keeper(members) };
            scatter.members.list().iter().position(|member| member.node == keeper).ok_or_else(|| {
                let message = format!("the keeper {keeper} of the parked VM is none of its intermediaries");
                Error::new(ErrorKind::Volume, message)
            })
        })
    }

    /// It was parked before anybody said so here, and may be anywhere by now.
    fn was_parked(mut self, of: &Unscattered, info: VolumeInfo) -> Result<()> {
        self.control.set_committed();
        let scatter = self.books(of)?;
        self.source.outcome(PageRange::new(PageIndex(0), self.manifest.pages()), Outcome::Safe);
        self.vm.go_on()?;
        self.vm.committed();
        let To::Parked { name, .. } = &of.to else { return Ok(()) };
        if info.epoch > of.epoch {
            let by = info.owner.map_or_else(|| "somebody".into(), |owner| owner.to_string());
            let message = format!(
                "the VM was parked as {name:?}, and {by} has claimed it since (epoch {}): it never runs here again",
                info.epoch.0
            );
            (self.options.observer)(&Event::Warning { message });
        } else if let Some(parking) = info.parking {
            let (name, keeper) = (parking.name, parking.keeper.to_string());
            (self.options.observer)(&Event::Parked { volume: of.volume.to_string(), name, keeper });
        }
        self.evicted(&scatter, host::now(), (None, None));
        Ok(())
    }
}

impl Found {
    /// What one knows by whom it is parked: its keeper, which is told last, or whoever knows of a claim, or of a keeper behind
    /// the first. One that was dissolved unclaimed is nowhere but here.
    fn parked(&self, of: &Unscattered) -> Option<VolumeInfo> {
        let is_parked = |(node, info): &&(NodeId, VolumeInfo)| {
            info.parking.as_ref().is_some_and(|parking| {
                let is_told = parking.keeper == *node || parking.term > 0;
                info.epoch > of.epoch || (info.state == VolumeState::Parked && is_told)
            })
        };
        self.known.iter().filter(is_parked).max_by_key(|(_, info)| info.epoch).map(|(_, info)| info.clone())
    }

    /// Who was said to be the keeper, where somebody was told.
    fn keeper(&self) -> Option<NodeId> {
        self.known.iter().find_map(|(_, info)| Some(info.parking.as_ref()?.keeper.clone()))
    }
}

//! Looks at the volume now and then: whether it is there, who owns it, and who its members are.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crossbeam::channel::{Receiver, RecvTimeoutError};
use libsg::vmd::{Role, Vmd, VmdClient, Volume};
use libsg::wire::message::{VolumeInfo, VolumeState};
use libsg::{Error, ErrorKind};

use super::shared::{Kind, Own, Shared, View};

/// How often.
const PERIOD: Duration = Duration::from_secs(1);

/// Runs until `look`, by which others ask it to look at once, has no other end.
pub fn run(shared: &Arc<Shared>, vmd: &VmdClient, known: &[SocketAddr], look: &Receiver<()>) {
    while !matches!(look.recv_timeout(PERIOD), Err(RecvTimeoutError::Disconnected)) {
        if shared.is_stopping() || shared.has_failed() {
            return;
        }
        match &shared.kind {
            Kind::Own(own) => look_at_own(shared, own),
            Kind::View(view) => look_at(shared, view, vmd, known),
        }
    }
}

/// What the members that answer say.
fn described(volume: &dyn Volume) -> Vec<VolumeInfo> {
    volume.describe().into_iter().filter_map(Result::ok).collect()
}

/// One's own volume may be taken over, or dissolved.
fn look_at_own(shared: &Shared, own: &Own) {
    let infos = described(&*own.volume);
    if let Some(newer) = infos.iter().map(|info| info.epoch).find(|epoch| *epoch > own.volume.epoch()) {
        let message = format!("another writer has taken the volume over (epoch {})", newer.0);
        return shared.fail(Error::new(ErrorKind::Fenced, message));
    }
    if infos.iter().any(|info| info.state == VolumeState::Dissolved) {
        shared.fail(Error::new(ErrorKind::Volume, "the volume was dissolved"));
    }
}

/// A volume of others may be dissolved, have a new owner, further members, or be complete.
fn look_at(shared: &Shared, view: &View, vmd: &VmdClient, known: &[SocketAddr]) {
    let volume = view.volume();
    let infos = described(&*volume);
    if !infos.is_empty() && infos.iter().all(|info| info.state == VolumeState::Dissolved) {
        return shared.fail(Error::new(ErrorKind::Volume, "the volume was dissolved"));
    }
    let Some(newest) = infos.iter().max_by_key(|info| (info.epoch, info.members.len())) else { return };
    view.note(newest.state);
    if newest.epoch == view.epoch() && newest.members.len() == volume.members().len() {
        return;
    }
    let members = newest.members.iter().map(|member| member.address);
    let addresses: Vec<SocketAddr> = members.chain(known.iter().copied()).collect();
    match vmd.open(volume.id(), Role::Reader, &addresses) {
        Ok(found) => {
            tracing::info!(
                epoch = found.epoch().0,
                members = found.members().len(),
                "the volume was found anew"
            );
            view.replace(found);
            shared.wake_all();
        }
        Err(error) => tracing::warn!(error = error.chain(), "the volume is not found now"),
    }
}

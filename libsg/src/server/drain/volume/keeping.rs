//! Who grants claims of a parked volume when this intermediary has left.

use super::{Handing, nobody};
use crate::error::{Error, ErrorKind, Result};
use crate::host;
use crate::server::drain::Around;
use crate::server::drain::heirs::Heirs;
use crate::server::drain::line::{Line, SILENCE_MAX};
use crate::server::store::Portrait;
use crate::transport::refusal;
use crate::wire::handover::Inheritance;
use crate::wire::message::{self, Member, VmdRequest};
use crate::wire::parking::Parking;
use crate::wire::{Kind, Status};

impl Handing {
    /// Another grants claims from now on: the first that does not leave itself. Between the moment at which this one stops and
    /// the one at which that is known to have begun, nobody does.
    pub(super) fn hand_keeping(
        &mut self,
        around: &Around<'_>,
        portrait: &Portrait,
        heirs: &mut Heirs<'_>,
    ) -> Result<()> {
        let able = || heirs.iter().filter(|heir| heir.takes).map(|heir| heir.member.clone()).collect();
        // One that may have begun is the only one that can be asked.
        let candidates = self.keeper.clone().map_or_else(able, |asked| vec![asked]);
        let mut failed = nobody();
        for to in candidates {
            around.store.set_stopped(self.volume, true);
            match self.ask_to_keep(around, &to) {
                Ok(Some(parking)) => {
                    around.store.set_keeper(self.volume, parking.clone()).map_err(refusal)?;
                    heirs.name_keeper(portrait, &parking);
                    return Ok(());
                }
                Ok(None) => return Ok(()),
                Err(error) if self.keeper.is_some() => return Err(error),
                Err(error) => failed = error,
            }
            // It was not asked, or has said no: nobody decides but this one.
            around.store.set_stopped(self.volume, false);
        }
        Err(failed)
    }

    /// Names it, with what was decided until now. `None` where there is nothing to grant any more.
    fn ask_to_keep(&mut self, around: &Around<'_>, to: &Member) -> Result<Option<Parking>> {
        let Some(last) = around.store.portrait(self.volume) else { return Ok(None) };
        let Some(before) = last.said.parking.clone() else { return Ok(None) };
        let parking = Parking { keeper: to.node.clone(), term: before.term + 1, ..before };
        let mut line = Line::open((around.store, around.limit_out), to.address, (self.volume, last.epoch))?;
        if *line.node() != to.node {
            return Err(if self.keeper.is_some() { in_doubt(to) } else { nobody() });
        }
        self.keeper = Some(to.clone());
        let said = Inheritance { parking: Some(parking.clone()), ..last.said };
        let body = message::encode(&VmdRequest::Inherit(Box::new(said)))?;
        let (header, _) = line.ask(Kind::Vmd, (0, &body), host::now() + SILENCE_MAX)?;
        // Yes or no: it is known.
        self.keeper = None;
        if header.status == Status::Ok { Ok(Some(parking)) } else { Err(refusal(header.status)) }
    }
}

fn in_doubt(to: &Member) -> Error {
    let message = format!(
        "{} was to grant claims and was restarted before it answered: whether it granted one is not known, and whoever claims \
         the VM must force it",
        to.node
    );
    Error::new(ErrorKind::Unreachable, message)
}

//! The migration as an embedder sees it: who calls what, when.
//!
//! A VMM gives libsg two things at each end: its memory ([`crate::source::PageSource`],
//! [`crate::sink::PageSink`]) and the VM itself ([`OutgoingVm`], [`IncomingVm`]).
//!
//! ```text
//! source                                      destination
//!   Offer: manifest, members  ------------->    IncomingVm::prepare: build the VM, memory under userfaultfd
//!   OutgoingVm::pause -> state
//!   state -> destination and volume  ------>    IncomingVm::load: paused, complete
//!   <------------------------------------- READY
//!   COMMIT -> volume                            (from here on the source never runs the VM again)
//!   RUN ------------------------------------>   IncomingVm::run
//!   scatter: pages out by every path            gather: faults first, the rest in the background
//!   "evicted"                                   "gathered", volume dissolved
//! ```
//!
//! The destination first: [`destination::Destination::listen`], then [`accept`], which returns an
//! [`Incoming`] at once. Then the source: [`source::start`] returns an [`Outgoing`] at once. Both handles
//! tell the progress, change limits, cancel, and wait; [`wait_evicted`] is what an operator of the source waits
//! for, [`wait_gathered`] at the destination. What happens on the way is told to the [`Observer`]. The calls to
//! the VM come from libsg's threads.
//!
//! **A handle that is dropped**: before COMMIT it calls the migration off, and the VM runs on at the source.
//! After COMMIT it changes nothing: the source's threads go on until every page is safe, the destination's until
//! every page is there, for that is the only copy of the VM. Only the end of the process ends them earlier; at
//! the source nothing is lost by that once "evicted" was told.
//!
//! **A failure** before COMMIT leaves the VM at the source ([`OutgoingVm::resume`], [`IncomingVm::abandon`]).
//! After it, either end makes the connections again, and what is lost for good is told by page
//! ([`IncomingVm::lost`], [`Event::Lost`], the report's status).
//!
//! [`accept`]: destination::Destination::accept
//! [`Incoming`]: destination::Incoming
//! [`Outgoing`]: source::Outgoing
//! [`wait_evicted`]: source::Outgoing::wait_evicted
//! [`wait_gathered`]: destination::Incoming::wait_gathered

pub mod destination;
mod handover;
mod live;
mod members;
mod parking;
mod recruit;
mod rounds;
pub mod source;

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use self::recruit::{Replacements, Vacancy};
pub use crate::event::{Event, Observer};
pub use crate::transport::PoolSecret;

use crate::dirty::DirtyLog;
use crate::error::{Error, ErrorKind, Result};
use crate::manifest::Manifest;
use crate::page::PageRange;
use crate::sink::PageSink;

/// How the memory leaves the source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// To the destination as fast as it takes it, the rest to intermediaries.
    #[default]
    ScatterGather,
    /// To the destination only.
    PostCopy,
    /// In rounds while the VM runs ([`RoundOptions`]), which is paused when little is left.
    PreCopy,
    /// In rounds to intermediaries while the VM runs, then as scatter-gather what it has written meanwhile.
    Hybrid,
}

/// Where the rounds of pre-copy go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Via {
    /// To the destination.
    #[default]
    Direct,
    /// To the destination as fast as it takes them, the rest to intermediaries, from which it gathers meanwhile.
    Vmd,
}

/// How rounds go, in the modes that have them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoundOptions {
    /// Most rounds while the VM runs, the first one included; `None` is 30 for pre-copy and 1 for hybrid.
    pub rounds_max: Option<u16>,
    /// The VM is paused as soon as what it has written can be sent in this time.
    pub downtime_limit: Duration,
    /// Where the rounds of pre-copy go.
    pub via: Via,
    /// Bytes of the list of pages that were sent again, from which on it travels in pieces, each as long. Nobody but tests
    /// needs another than [`crate::limits::FINAL_PIECE_BYTES`].
    pub final_piece_bytes: usize,
}

impl RoundOptions {
    /// A downtime limit of 300 ms, directly.
    pub const USUAL: Self = Self {
        rounds_max: None,
        downtime_limit: Duration::from_millis(300),
        via: Via::Direct,
        final_piece_bytes: crate::limits::FINAL_PIECE_BYTES,
    };
}

impl Default for RoundOptions {
    /// [`RoundOptions::USUAL`].
    fn default() -> Self {
        Self::USUAL
    }
}

impl RoundOptions {
    /// Most rounds in that mode.
    #[must_use]
    pub fn most(&self, mode: Mode) -> u16 {
        match mode {
            Mode::ScatterGather | Mode::PostCopy => 0,
            Mode::PreCopy => self.rounds_max.unwrap_or(30).max(1),
            Mode::Hybrid => self.rounds_max.unwrap_or(1),
        }
    }
}

impl Mode {
    /// The name that commands and reports use.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::ScatterGather => "scatter-gather",
            Self::PostCopy => "post-copy",
            Self::PreCopy => "pre-copy",
            Self::Hybrid => "hybrid",
        }
    }
}

/// The VM that leaves. Called from one of libsg's threads, one call at a time.
pub trait OutgoingVm: Send {
    /// Stops every vCPU and returns the CPU and device state, opaque to libsg. From the return on
    /// nothing writes the VM's memory.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Vm`]; the VM then runs on.
    fn pause(&mut self) -> Result<Vec<u8>>;

    /// The migration failed or was cancelled before COMMIT: the VM runs on here, unharmed.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Vm`] when it cannot.
    fn resume(&mut self) -> Result<()>;

    /// What another process would need to go on, should this one die before "evicted" ([`source::resume`]). Said when the
    /// destination is READY, right before COMMIT, with the VM paused: whoever can go on writes it down, so that it outlives the
    /// process. Of a VM that is parked it is said when its state is at the intermediaries, and again right before COMMIT.
    ///
    /// # Errors
    /// Whatever stands against writing it down: the VM then runs on here.
    fn note(&mut self, unscattered: &source::Unscattered) -> Result<()> {
        let _ = unscattered;
        Ok(())
    }

    /// Of one that is gone on with ([`source::resume`]) before COMMIT, and is paused here: which pages are safe was told, the
    /// others are to come. Whether it can still be run here again.
    ///
    /// # Errors
    /// Its memory does not come, or not all of it: what is elsewhere is kept, and the VM is not run here.
    fn go_on(&mut self) -> Result<bool> {
        Ok(true)
    }

    /// COMMIT: the VM never runs here again. Its memory is still needed until "evicted". Of one that is gone on with
    /// ([`source::resume`]), which pages are safe was told before.
    fn committed(&mut self);

    /// What logs which pages the VM writes while it runs, not yet started; asked for once in a migration, by
    /// the modes that send memory in rounds. A VM that has none is moved by the others.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Vm`] when the VM has none, which is what this default says; the VM runs on.
    fn dirty_log(&mut self) -> Result<Box<dyn DirtyLog>> {
        let why = "this VM cannot log which pages it writes: use scatter-gather or post-copy";
        Err(Error::new(ErrorKind::Vm, why))
    }
}

/// The VM that arrives. Called from one of libsg's threads, one call at a time.
pub trait IncomingVm: Send {
    /// Builds the VM that the manifest describes, with empty memory registered with the returned
    /// sink, which from now on answers its faults. Nobody touches the memory before [`Self::load`]: what is there may be
    /// out of date until then.
    ///
    /// # Errors
    /// Anything that stands against running this VM here; the source is told and keeps the VM.
    fn prepare(&mut self, manifest: &Manifest) -> Result<Arc<dyn PageSink>>;

    /// Loads CPU and device state. The VM stays paused. May touch guest memory: faults are
    /// answered by the source.
    ///
    /// # Errors
    /// The state does not fit; the source is told and keeps the VM.
    fn load(&mut self, state: &[u8]) -> Result<()>;

    /// COMMIT was given: the vCPUs run.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Vm`]. There is no way back: the VM is lost unless it can be run later.
    fn run(&mut self) -> Result<()>;

    /// What another process would need to go on with this VM, should this one die with its memory not all there
    /// ([`destination::resume`]). Said behind [`Self::prepare`], and again when it changes; whoever can go on writes it down, so
    /// that it outlives the process, and says `true`: a failure behind COMMIT is not told to the source as the end then.
    ///
    /// # Errors
    /// Whatever stands against writing it down. The first time, the source is told and keeps the VM.
    fn note(&mut self, unfinished: &destination::Unfinished) -> Result<bool> {
        let _ = unfinished;
        Ok(false)
    }

    /// The migration ended before COMMIT: the VM lives on at the source, this one is thrown away.
    fn abandon(&mut self);

    /// These pages are lost for good. A vCPU that touches them gets an error, not a wrong page.
    fn lost(&mut self, pages: &[PageRange]);
}

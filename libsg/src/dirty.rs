//! Which pages a running VM writes: the seam between rounds (pre-copy, hybrid) and a VMM.
//!
//! [`DirtyLog`] is served by the hypervisor's own log where the VM has one, and by userfaultfd for
//! memory of this process that no hypervisor writes ([`crate::uffd`]). A round is one
//! [`collect`](DirtyLog::collect), then sending what it named:
//!
//! ```text
//!   start     every write is logged from here on
//!   send      every page that is present (round 0)
//!   collect   -> what was written meanwhile; send that (round 1)
//!   ...
//!   pause     the VM stops: nothing writes any more
//!   collect   -> what is left, complete; stop
//! ```

use crate::error::Result;
use crate::page::PageRange;

/// Which pages a running VM writes. One call at a time, from any thread.
///
/// **What a write is.** Everything that changes the bytes of the VM's memory: writes of vCPUs, and those of
/// the VMM itself, of its device models, and of devices that reach the memory on their own (vhost, another
/// process, DMA). A VMM whose hypervisor logs vCPUs only adds what the others wrote, before it returns from
/// `collect`; it refuses `start` while something writes that it cannot log. Whoever notes a write by hand notes it
/// *after* the bytes are written: noted before, the page could be named and read in between. Pages that are
/// given up (balloon, `MADV_DONTNEED`) change to zero: a VMM names them like written ones, or gives none up
/// until `stop`.
///
/// **What may be named in excess.** A page that was not written: costs its bytes, nothing else. A page
/// that is not present, for which the kernel keeps a trace of an earlier write. A log that knows only larger
/// pieces (hugetlb memory, huge pages) names whole pieces. In a region whose install unit is 2 MiB single
/// pages may be named all the same, where the log knows them: whoever needs whole units rounds up.
///
/// **While the VM is paused** all of it works. A `collect` after [`OutgoingVm::pause`] has returned names all
/// that is left, since from that return on nothing writes. A VM that resumes goes on being logged.
///
/// **After an error** of `start` or `collect` the log is of no further use until the next `start`: pages may
/// have been forgotten that were never named. Call `stop`. Dropping a log stops it.
///
/// [`OutgoingVm::pause`]: crate::migrate::OutgoingVm::pause
pub trait DirtyLog: Send {
    /// From the return on every write is logged. What was written before is not named, or is named in excess.
    /// Once more after [`Self::stop`], it begins anew; while it runs, it does nothing.
    ///
    /// # Errors
    /// [`crate::ErrorKind::System`] or [`crate::ErrorKind::Vm`] when the kernel cannot log this memory; the
    /// message names what can be done.
    fn start(&mut self) -> Result<()>;

    /// Appends, as ascending runs that do not overlap, every page written since `start` or the last `collect`,
    /// and forgets them: a page whose bytes are read after the return and which is written after that is
    /// named by the next call. A page written during the call is named by this one, the next, or both.
    ///
    /// A run lies in one region, and may be longer than a batch. Allocates nothing for each page but in `out`.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Input`] when it was not started; else as [`Self::start`].
    fn collect(&mut self, out: &mut Vec<PageRange>) -> Result<()>;

    /// Ends it: the VM runs at full speed. What was not collected is forgotten. Does nothing when it is
    /// not started.
    ///
    /// # Errors
    /// [`crate::ErrorKind::System`] when the kernel refuses; the VM then runs on, if more slowly.
    fn stop(&mut self) -> Result<()>;
}

//! VMMs that are driven from outside: what `sg` and `sg-bench` have in common.
//!
//! [`Vmm`] is what somebody who empties a host asks of a VMM, whichever it is; [`ControlSocket`] is `sg-vmm`'s way of it, and
//! [`Control`] its socket. [`Divider`] divides the host's link among those that leave together: it carries what they tell to
//! a [`LinkDivision`](libsg::pace::LinkDivision), and its word back.

mod control;
mod divider;
mod socket;
mod vmm;

pub use control::Control;
pub use divider::Divider;
pub use socket::ControlSocket;
pub use vmm::{Backlog, Described, Leaving, Start, State, Vmm, Wanted};

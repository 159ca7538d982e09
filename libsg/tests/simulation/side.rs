//! A network beside the connections, over which clients reach intermediaries' memory by themselves. Here there is none;
//! a backend that has one runs the same migrations over it.

use std::sync::Arc;
use std::time::Duration;

use libsg::server::backend::Backend;
use libsg::vmd::Connector;

use crate::net::NodeNumber;

/// Such a network, on the simulated clock.
pub trait SideNetwork: Send {
    /// What makes a client's links on this node, where it has a part in it.
    fn connector(&self, node: NodeNumber) -> Option<Arc<dyn Connector>>;

    /// What an intermediary on this node lets clients in by, where it has a part in it.
    fn backend(&self, node: NodeNumber) -> Option<Arc<dyn Backend>>;

    /// The node was killed.
    fn remove(&mut self, node: NodeNumber);

    /// What is between two nodes breaks. Whether their connections do, too.
    fn break_links(&mut self, one: NodeNumber, other: NodeNumber) -> bool;

    /// Carries nothing between two nodes from now on, or again.
    fn cut(&mut self, one: NodeNumber, other: NodeNumber, cut: bool);

    /// Does what is due. Appends the nodes of whose descriptors some may have become ready.
    fn deliver(&mut self, now: Duration, stirred: &mut Vec<NodeNumber>);

    /// When something is due next.
    fn next_delivery(&self) -> Option<Duration>;

    /// Bytes of pages that it has moved.
    fn moved_bytes(&self) -> u64;
}

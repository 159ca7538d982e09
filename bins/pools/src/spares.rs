//! Others in the place of intermediaries that die, where operators name them.

use std::net::SocketAddr;

use libsg::migrate::{Replacements, Vacancy};

/// A list of others, taken in its order.
pub struct Spares(pub Vec<SocketAddr>);

impl Replacements for Spares {
    fn replacement(&self, vacancy: &Vacancy<'_>) -> Option<SocketAddr> {
        let members = || vacancy.living.iter().chain(vacancy.gone);
        let is_free =
            |at: &&SocketAddr| !vacancy.tried.contains(at) && members().all(|member| member.address != **at);
        self.0.iter().find(is_free).copied()
    }
}

#[cfg(test)]
mod test {
    use libsg::ids::NodeId;
    use libsg::wire::message::Member;

    use super::*;

    #[test]
    fn spares_are_taken_in_their_order_and_once() {
        let at = |host: u8| SocketAddr::from(([10, 0, 0, host], 7701));
        let member = |host: u8| Member {
            node: NodeId { name: format!("n{host}"), incarnation: 1 },
            address: at(host),
        };
        let spares = Spares(vec![at(4), at(5)]);
        let (living, gone) = ([member(1), member(2)], [member(3)]);
        let vacancy = Vacancy { dead: &gone[0], living: &living, gone: &gone, tried: &[] };
        assert_eq!(spares.replacement(&vacancy), Some(at(4)));
        assert_eq!(spares.replacement(&Vacancy { tried: &[at(4)], ..vacancy }), Some(at(5)));
        // It took a place, and died in it.
        let gone = [member(3), member(4)];
        assert_eq!(spares.replacement(&Vacancy { gone: &gone, ..vacancy }), Some(at(5)));
        assert_eq!(spares.replacement(&Vacancy { living: &[member(4), member(5)], ..vacancy }), None);
    }
}

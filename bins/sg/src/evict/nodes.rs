//! Who takes the pages of each VM: all that are named, or those that are chosen among the ones that announce themselves.

use std::net::{IpAddr, SocketAddr};

use libsg::discovery::Found;
use libsg::discovery::select::{Need, Selection, Verdict, ZoneRule, select};
use libsg::wire::announcement::Announcement;

use super::plan::Leaver;

/// Others that are named for one VM: more are never asked.
const SPARES_MAX: usize = 24;

/// What a choice is made by, beside the VMs.
pub struct Rules {
    /// What the host's link carries, in bytes a second.
    pub link_bytes_per_s: u64,
    /// Copies of each page.
    pub copies: u8,
    /// The zone that is left.
    pub zone: Option<String>,
    /// All of it is emptied.
    pub evacuate: bool,
    /// Who takes the place of those that die, where operators say it.
    pub spares: Vec<SocketAddr>,
    /// This host.
    pub own: Option<IpAddr>,
    /// What draws come from.
    pub seed: u64,
}

/// Who takes one VM's pages.
#[derive(Debug, Default)]
pub struct Chosen {
    /// The intermediaries.
    pub addresses: Vec<SocketAddr>,
    /// Others that could have been, in the order in which they take the place of those that die.
    pub spares: Vec<SocketAddr>,
    /// What was said of each that was looked at: where, and why it was taken or not.
    pub said: Vec<(SocketAddr, String)>,
    /// What they lack, in words.
    pub lacks: Vec<String>,
    /// They have room for all of it.
    pub has_room: bool,
    /// What they take in, and the destination, in bytes a second; nothing where it is not known.
    pub takes_bytes_per_s: Option<u64>,
}

/// Chooses for each VM, one after the other: what one takes of a node is not there for the next.
pub fn choose(found: &[Found], vms: &[(Leaver, Option<SocketAddr>)], rules: &Rules) -> Vec<Chosen> {
    let (mut announced, mut listed) = (Vec::new(), Vec::new());
    for found in found {
        match &found.announced {
            Some(said) => announced.push(said.clone()),
            None => listed.push(found.address),
        }
    }
    let all: u64 = vms.iter().map(|(vm, _)| vm.bytes).sum();
    let each = |(at, (vm, to)): (usize, &(Leaver, Option<SocketAddr>))| {
        let mut chosen = Chosen { addresses: listed.clone(), has_room: true, ..Chosen::default() };
        if !announced.is_empty() {
            let part = vm.bytes as f64 / all.max(1) as f64;
            let link = (rules.link_bytes_per_s as f64 * part) as u64;
            let need = need(vm.bytes, *to, link, rules, &announced, at as u64);
            let selection = select(&announced, &need);
            add(&mut chosen, &announced, &need, &selection);
            take(&mut announced, &need, &selection);
        }
        chosen.spares.splice(0..0, rules.spares.iter().copied());
        chosen.spares.retain(|spare| !chosen.addresses.contains(spare));
        chosen.spares.truncate(SPARES_MAX);
        chosen
    };
    vms.iter().enumerate().map(each).collect()
}

fn need(
    bytes: u64,
    to: Option<SocketAddr>,
    link: u64,
    rules: &Rules,
    nodes: &[Announcement],
    at: u64,
) -> Need {
    let there = to.and_then(|to| nodes.iter().find(|node| node.address.ip() == to.ip()));
    let takes = match (to, there) {
        (None, _) => 0,
        (Some(_), Some(node)) if node.link.bytes_per_s > 0 => node.link.free_in_bytes_per_s.min(link),
        (Some(_), _) => link,
    };
    Need {
        copies: rules.copies,
        source_zone: rules.zone.clone(),
        destination_zone: there.and_then(|node| node.zone.clone()),
        zones: if rules.evacuate { ZoneRule::Evacuate } else { ZoneRule::Prefer },
        never: to.iter().map(SocketAddr::ip).chain(rules.own).collect(),
        ..Need::new(bytes, link, takes, rules.seed.wrapping_add(at))
    }
}

fn add(chosen: &mut Chosen, nodes: &[Announcement], need: &Need, selection: &Selection) {
    chosen.addresses.extend(selection.members.iter().map(|at| nodes[*at].address));
    let lends = |(node, verdict): (&Announcement, &Verdict)| {
        (node.address.port() != 0).then(|| (node.address, verdict.to_string()))
    };
    let spare = |(node, verdict): (&Announcement, &Verdict)| {
        (node.address.port() != 0 && *verdict == Verdict::Spare).then_some(node.address)
    };
    chosen.spares.extend(nodes.iter().zip(&selection.verdicts).filter_map(spare));
    // VMs that lose the same node shall not all turn to one other.
    let first = need.seed.checked_rem(chosen.spares.len() as u64).unwrap_or(0);
    chosen.spares.rotate_left(first as usize);
    chosen.said.extend(nodes.iter().zip(&selection.verdicts).filter_map(lends));
    chosen.lacks = selection.lacks.iter().map(ToString::to_string).collect();
    chosen.has_room = selection.fits();
    let takes = selection.eviction.map_or(0.0, |time| need.bytes as f64 / time.as_secs_f64().max(1e-3));
    chosen.takes_bytes_per_s = Some((takes as u64).min(need.source_bytes_per_s));
}

/// What was taken of nodes is not free any more: each has its part of the whole, by what it is counted for.
fn take(nodes: &mut [Announcement], need: &Need, selection: &Selection) {
    let counted = |verdict: &Verdict| match verdict {
        Verdict::Taken { memory_bytes, .. } => *memory_bytes as f64,
        _ => 0.0,
    };
    let all: f64 = selection.verdicts.iter().map(counted).sum();
    let copies = u64::from(need.copies.max(1));
    for (node, verdict) in nodes.iter_mut().zip(&selection.verdicts) {
        let part = counted(verdict) / all.max(1.0);
        if part == 0.0 {
            continue;
        }
        let of = |whole: u64| (whole as f64 * part) as u64;
        let (bytes, rate) = (of(need.bytes * copies), of(need.source_bytes_per_s * copies));
        let room = &mut node.memory;
        room.used_bytes = room.used_bytes.saturating_add(bytes).min(room.limit_bytes);
        room.available_bytes = room.available_bytes.saturating_sub(bytes);
        let link = &mut node.link;
        link.free_in_bytes_per_s = link.free_in_bytes_per_s.saturating_sub(rate);
        node.volumes_free = node.volumes_free.saturating_sub(1);
    }
}

#[cfg(test)]
mod test {
    use libsg::ids::NodeId;
    use libsg::wire::announcement::{Duty, LinkRoom, MemoryRoom, Transports};

    use super::*;

    const GIB: u64 = 1 << 30;

    fn node(at: u8, lends: u64) -> Found {
        let address = SocketAddr::from(([10, 0, 0, at], 7701));
        let announced = Announcement {
            node: NodeId { name: format!("n{at}"), incarnation: 1 },
            address,
            zone: None,
            duty: Duty::Lends,
            transports: Transports::TCP,
            memory: MemoryRoom {
                host_bytes: 64 * GIB,
                available_bytes: 48 * GIB,
                limit_bytes: lends,
                used_bytes: 0,
            },
            link: LinkRoom {
                bytes_per_s: 125_000_000,
                free_in_bytes_per_s: 125_000_000,
                free_out_bytes_per_s: 125_000_000,
                ..LinkRoom::default()
            },
            cpu_idle_permille: 900,
            connections_free: 1000,
            volumes_free: 1000,
        };
        Found { address, announced: Some(announced) }
    }

    fn rules() -> Rules {
        let link_bytes_per_s = 125_000_000;
        let spares = Vec::new();
        Rules { link_bytes_per_s, copies: 1, zone: None, evacuate: false, spares, own: None, seed: 7 }
    }

    fn vm(bytes: u64) -> (Leaver, Option<SocketAddr>) {
        (Leaver { bytes, weight: 1.0 }, None)
    }

    #[test]
    fn what_one_vm_takes_is_not_there_for_the_next() {
        let found: Vec<Found> = (1..=4).map(|at| node(at, 2 * GIB)).collect();
        let fits = |count| choose(&found, &vec![vm(3 * GIB); count], &rules());
        assert!(fits(2).iter().all(|chosen| chosen.has_room), "{:?}", fits(2));
        let three = fits(3);
        assert!(three[0].has_room && three[1].has_room && !three[2].has_room, "{three:?}");
        assert!(!three[2].lacks.is_empty());
    }

    #[test]
    fn who_is_not_needed_stands_by_and_who_is_named_before_them() {
        let found: Vec<Found> = (1..=12).map(|at| node(at, 64 * GIB)).collect();
        let named = SocketAddr::from(([10, 0, 0, 99], 7701));
        let rules = Rules { spares: vec![named, found[0].address], ..rules() };
        let chosen = choose(&found, &[vm(GIB), vm(GIB)], &rules);
        for chosen in &chosen {
            let all = chosen.addresses.iter().chain(&chosen.spares);
            let all: std::collections::BTreeSet<_> = all.copied().collect();
            assert_eq!(all.len(), 13, "each once: {chosen:?}");
            assert_eq!(chosen.spares[0], named);
            assert!(chosen.spares.iter().all(|spare| !chosen.addresses.contains(spare)));
        }
        assert_ne!(chosen[0].spares.last(), chosen[1].spares.last(), "each begins at another");
    }

    #[test]
    fn a_list_is_taken_as_it_is() {
        let listed = Found { address: SocketAddr::from(([10, 0, 0, 9], 7701)), announced: None };
        let chosen = choose(std::slice::from_ref(&listed), &[vm(GIB), vm(GIB)], &rules());
        assert!(chosen.iter().all(|chosen| chosen.addresses == [listed.address] && chosen.has_room));
        assert_eq!(chosen[0].takes_bytes_per_s, None);
    }

    #[test]
    fn what_takes_the_pages_in_may_be_less_than_the_link() {
        let mut slow = node(1, 64 * GIB);
        if let Some(said) = &mut slow.announced {
            said.link.free_in_bytes_per_s = 60_000_000;
        }
        let chosen = choose(&[slow], &[vm(GIB)], &rules());
        let takes = chosen[0].takes_bytes_per_s.expect("announced");
        assert!(takes < 60_000_000, "{takes}");
    }
}

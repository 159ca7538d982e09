//! Each rule of selection, held against any pool and any need.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use proptest::prelude::*;

use super::*;
use crate::wire::announcement::{LinkRoom, MemoryRoom};

const GIB: u64 = 1 << 30;
const MBIT: u64 = 125_000;

/// A node with nothing against it: 64 GiB, of which it lends 32, and a link of 10 Gb/s, half of it free.
fn node(number: u16) -> Announcement {
    let [high, low] = number.to_be_bytes();
    Announcement {
        node: NodeId { name: format!("n{number}"), incarnation: u64::from(number) << 40 | 7 },
        address: SocketAddr::from(([10, 0, high, low], 7701)),
        zone: Some(format!("rack{}", number % 4)),
        duty: Duty::Lends,
        transports: Transports::TCP,
        memory: MemoryRoom {
            host_bytes: 64 * GIB,
            available_bytes: 40 * GIB,
            limit_bytes: 32 * GIB,
            used_bytes: 0,
        },
        link: LinkRoom {
            bytes_per_s: 10_000 * MBIT,
            free_in_bytes_per_s: 5_000 * MBIT,
            free_out_bytes_per_s: 5_000 * MBIT,
            ..LinkRoom::default()
        },
        cpu_idle_permille: 500,
        connections_free: 100,
        volumes_free: 100,
    }
}

fn pool(nodes: u16) -> Vec<Announcement> {
    (0..nodes).map(node).collect()
}

fn any_node(number: u16) -> impl Strategy<Value = Announcement> {
    let zone = prop_oneof![1 => Just(None), 6 => (0..4_u8).prop_map(|z| Some(format!("rack{z}")))];
    let duty = prop_oneof![
        12 => Just(Duty::Lends), 1 => Just(Duty::Source), 1 => Just(Duty::Pressed), 1 => Just(Duty::Leaves)
    ];
    let memory = (0..64_u64, 0..32_u64, 0..32_u64).prop_map(|(available, limit, used)| MemoryRoom {
        host_bytes: 64 * GIB,
        available_bytes: available * GIB,
        limit_bytes: limit * GIB,
        used_bytes: used * GIB / 4,
    });
    let link = (0..10_000_u64, 0..10_000_u64).prop_map(|(incoming, out)| LinkRoom {
        bytes_per_s: 10_000 * MBIT,
        free_in_bytes_per_s: incoming * MBIT,
        free_out_bytes_per_s: out * MBIT,
        ..LinkRoom::default()
    });
    let rest = (0..1000_u16, 0..40_u32, prop_oneof![9 => Just(1_u16), 1 => Just(2)]);
    // Some share a host.
    let host = prop_oneof![4 => Just(number), 1 => 0..number.max(1)];
    (zone, duty, memory, link, rest, host).prop_map(
        move |(zone, duty, memory, link, (idle, connections, transports), host)| Announcement {
            address: SocketAddr::new(node(host).address.ip(), 7701 + number),
            zone,
            duty,
            memory,
            link,
            cpu_idle_permille: idle,
            connections_free: connections,
            transports: Transports(transports),
            ..node(number)
        },
    )
}

fn any_pool() -> impl Strategy<Value = Vec<Announcement>> {
    (1..100_u16).prop_flat_map(|nodes| (0..nodes).map(any_node).collect::<Vec<_>>())
}

fn any_need() -> impl Strategy<Value = Need> {
    let zone = || prop_oneof![1 => Just(None), 4 => (0..4_u8).prop_map(|z| Some(format!("rack{z}")))];
    let rule = prop_oneof![Just(ZoneRule::Prefer), Just(ZoneRule::Evacuate)];
    let size = (1..200_u64, 1..4_u8, 100..40_000_u64, 0..40_000_u64);
    (size, zone(), zone(), rule, 0..100_u16, any::<u64>(), 1..5_u8).prop_map(
        |((gib, copies, source, destination), source_zone, destination_zone, zones, own, seed, choices)| {
            Need {
                copies,
                source_zone,
                destination_zone,
                zones,
                never: vec![node(own).address.ip()],
                choices,
                ..Need::new(gib * GIB, source * MBIT, destination * MBIT, seed)
            }
        },
    )
}

/// What a zone can be counted for, summed over zones, of that part of what nodes offer.
fn by_zone(members: &[&Announcement], at_most: u64, part: impl Fn(&Announcement) -> u64) -> u64 {
    let mut zones: BTreeMap<String, u64> = BTreeMap::new();
    for member in members {
        let name = member.zone.clone().unwrap_or_else(|| format!("of {}", member.node));
        *zones.entry(name).or_default() += part(member);
    }
    zones.values().map(|zone| (*zone).min(at_most)).sum()
}

fn is_busy(nodes: &[Announcement], host: IpAddr) -> bool {
    let busy = |node: &Announcement| matches!(node.duty, Duty::Source | Duty::Pressed);
    nodes.iter().any(|node| node.address.ip() == host && busy(node))
}

proptest! {
    #[test]
    fn nobody_is_taken_who_must_not_be(nodes in any_pool(), need in any_need()) {
        let selection = select(&nodes, &need);
        prop_assert!(selection.members.len() <= limits::MEMBERS_MAX);
        prop_assert_eq!(selection.members.iter().collect::<BTreeSet<_>>().len(), selection.members.len());
        for at in &selection.members {
            let node = &nodes[*at];
            prop_assert!(node.duty == Duty::Lends && !is_busy(&nodes, node.address.ip()));
            prop_assert!(!need.never.contains(&node.address.ip()));
            prop_assert!(node.transports.meets(need.transports) && node.connections_free >= 4);
            prop_assert!(node.cpu_idle_permille >= CPU_HEADROOM_PERMILLE);
            // What it is counted for leaves its own VMs their head-room.
            let Verdict::Taken { memory_bytes, in_bytes_per_s, out_bytes_per_s } = selection.verdicts[*at] else {
                panic!("{:?}", selection.verdicts[*at])
            };
            prop_assert!(memory_bytes > 0 && in_bytes_per_s > 0);
            prop_assert!(memory_bytes + 8 * GIB <= node.memory.available_bytes);
            prop_assert!(memory_bytes + node.memory.used_bytes <= node.memory.limit_bytes);
            prop_assert!(in_bytes_per_s + 2000 * MBIT <= node.link.free_in_bytes_per_s);
            prop_assert!(out_bytes_per_s + 2000 * MBIT <= node.link.free_out_bytes_per_s);
            // And no death costs more than its part.
            prop_assert!(memory_bytes <= (need.bytes * u64::from(need.copies)).div_ceil(SPREAD));
        }
        for (at, verdict) in selection.verdicts.iter().enumerate() {
            let taken = matches!(verdict, Verdict::Taken { .. });
            prop_assert_eq!(taken, selection.members.contains(&at));
        }
    }

    #[test]
    fn zones_are_kept(nodes in any_pool(), need in any_need()) {
        let selection = select(&nodes, &need);
        let there = |at: usize| nodes[at].zone.is_some() && nodes[at].zone == need.destination_zone;
        let spare_there = (0..nodes.len()).any(|at| there(at) && selection.verdicts[at] == Verdict::Spare);
        for at in &selection.members {
            if need.zones == ZoneRule::Evacuate {
                prop_assert!(nodes[*at].zone.is_some());
                prop_assert!(need.source_zone.is_none() || nodes[*at].zone != need.source_zone);
                prop_assert!(need.copies > 1 || need.destination_zone.is_none() || there(*at));
            }
            // One elsewhere is taken when nobody is left there.
            prop_assert!(need.copies > 1 || there(*at) || !spare_there);
        }
    }

    #[test]
    fn it_fits_where_copies_lie_in_different_zones(nodes in any_pool(), need in any_need()) {
        let selection = select(&nodes, &need);
        let members: Vec<_> = selection.members.iter().map(|at| &nodes[*at]).collect();
        let room = by_zone(&members, need.bytes, memory_offer);
        let in_evacuated: Vec<_> =
            members.iter().copied().filter(|node| node.zone == need.destination_zone).collect();
        let first = need.zones == ZoneRule::Prefer
            || need.destination_zone.is_none()
            || by_zone(&in_evacuated, need.bytes, memory_offer) == need.bytes;
        prop_assert_eq!(selection.fits(), first && room >= need.bytes * u64::from(need.copies));
        prop_assert_eq!(selection.eviction.is_none(), !selection.fits() && need.destination_bytes_per_s == 0);
        if selection.lacks.is_empty() {
            // The source is empty as soon as its link has carried everything.
            let flat = need.bytes as f64 / need.source_bytes_per_s as f64;
            let eviction = selection.eviction.expect("it fits").as_secs_f64();
            prop_assert!((eviction - flat).abs() < 1e-6 * flat + 1e-6, "{eviction} {flat}");
        }
    }

    #[test]
    fn nodes_are_added_until_it_is_enough_and_no_further(nodes in any_pool(), need in any_need()) {
        let selection = select(&nodes, &need);
        let plan = |members: &[usize]| {
            let mut plan = Plan::new(&need);
            members.iter().for_each(|at| _ = plan.take(*at, &nodes[*at]));
            plan.lacks(Want::Memory) || plan.lacks(Want::Bandwidth)
        };
        let full = selection.members.len() == limits::MEMBERS_MAX;
        let is_spare = selection.verdicts.contains(&Verdict::Spare);
        if need.copies == 1 {
            prop_assert!(full || !is_spare || !plan(&selection.members), "somebody would have helped");
        }
        if let Some((_, before)) = selection.members.split_last() {
            prop_assert!(plan(before), "the last one was not needed");
        }
    }

    #[test]
    fn the_same_question_has_the_same_answer(nodes in any_pool(), need in any_need()) {
        prop_assert_eq!(select(&nodes, &need), select(&nodes, &need));
    }

    #[test]
    fn a_dead_node_is_replaced_by_one_that_may_be_taken(nodes in any_pool(), need in any_need(), which in any::<prop::sample::Index>()) {
        let selection = select(&nodes, &need);
        prop_assume!(!selection.members.is_empty());
        let mut members: Vec<_> = selection.members.iter().map(|at| nodes[*at].node.clone()).collect();
        let dead = members.swap_remove(which.index(members.len()));
        let spare = |at: &usize| selection.verdicts[*at] == Verdict::Spare;
        let spares: Vec<_> = (0..nodes.len()).filter(spare).collect();
        match replacement(&nodes, &need, &members, &dead) {
            None => prop_assert!(spares.is_empty()),
            Some(found) => {
                prop_assert!(spares.contains(&found));
                let there = |at: usize| nodes[at].zone.is_some() && nodes[at].zone == need.destination_zone;
                let better = spares.iter().any(|at| there(*at));
                prop_assert!(need.copies > 1 || there(found) || !better);
            }
        }
    }
}

#[test]
fn every_reason_has_its_node() {
    let need = Need {
        never: vec![node(0).address.ip()],
        zones: ZoneRule::Evacuate,
        source_zone: Some("rack1".into()),
        destination_zone: Some("rack2".into()),
        ..Need::new(8 * GIB, 1000 * MBIT, 1000 * MBIT, 1)
    };
    let mut nodes: Vec<_> =
        pool(14).into_iter().map(|n| Announcement { zone: Some("rack2".into()), ..n }).collect();
    nodes[1].duty = Duty::Source;
    nodes[2].duty = Duty::Pressed;
    nodes[3].duty = Duty::Leaves;
    nodes[4].transports = Transports(2);
    nodes[5].memory.used_bytes = nodes[5].memory.limit_bytes;
    nodes[6].memory.available_bytes = 8 * GIB;
    nodes[7].link.free_out_bytes_per_s = 2000 * MBIT;
    nodes[8].cpu_idle_permille = 99;
    nodes[9].volumes_free = 0;
    nodes[10].zone = Some("rack3".into());
    nodes[11].zone = Some("rack1".into());
    // Another process of a host that VMs leave.
    nodes[12].address = SocketAddr::new(nodes[1].address.ip(), 1);
    let selection = select(&nodes, &need);
    let reasons = [
        Reason::Own,
        Reason::Source,
        Reason::Pressed,
        Reason::Leaves,
        Reason::Transport,
        Reason::Full,
        Reason::MemoryHeadroom,
        Reason::LinkHeadroom,
        Reason::Cpu,
        Reason::Busy,
        Reason::Zone,
        Reason::Evacuated,
        Reason::Source,
    ];
    assert_eq!(selection.verdicts[..13], reasons.map(Verdict::Left));
    assert_eq!(selection.members, [13]);
    assert!(selection.fits() && selection.lacks.is_empty(), "{:?}", selection.lacks);
    assert_eq!(selection.verdicts[13].to_string(), "taken for 1.00 GiB, 125 Mb/s in, 125 Mb/s out");
}

#[test]
fn what_is_missing_is_said() {
    let need = Need { copies: 2, ..Need::new(100 * GIB, 8000 * MBIT, 0, 1) };
    let mut nodes = pool(4);
    let enough = select(&nodes, &need);
    assert!(!enough.fits() && enough.eviction.is_none() && enough.total.is_none());
    assert_eq!(enough.lacks[0], Lack::Memory(200 * GIB - 4 * 32 * GIB));
    assert_eq!(enough.lacks[1], Lack::In(2 * 8000 * MBIT - 4 * 3000 * MBIT));
    let taking = Need { destination_bytes_per_s: 1000 * MBIT, ..need.clone() };
    let direct = select(&nodes, &taking);
    // What has no room goes to the destination, however slow that is.
    let beside = (100.0 - 64.0) * GIB as f64 / (1000.0 * MBIT as f64);
    assert!((direct.eviction.expect("it ends").as_secs_f64() - beside).abs() < 1e-3);
    // All in one zone: the second copy has nowhere to go.
    nodes.iter_mut().for_each(|node| node.zone = Some("rack1".into()));
    let small = Need { bytes: 10 * GIB, ..need };
    assert_eq!(select(&nodes, &small).lacks[0], Lack::Memory(10 * GIB));
    nodes[3].zone = None;
    assert!(select(&nodes, &small).fits());
}

#[test]
fn many_who_decide_at_once_do_not_take_the_same() {
    let nodes: Vec<_> = (0..1000)
        .map(|number| {
            let mut node = node(number);
            // Loads differ: there is a best one.
            node.link.free_in_bytes_per_s -= u64::from(number % 100) * 10 * MBIT;
            node
        })
        .collect();
    let most_taken = |choices| {
        let mut picks = vec![0; nodes.len()];
        for seed in 0..500 {
            let need = Need { choices, ..Need::new(8 * GIB, 1000 * MBIT, 1000 * MBIT, seed) };
            let selection = select(&nodes, &need);
            assert_eq!(selection.members.len() as u64, SPREAD);
            selection.members.iter().for_each(|at| picks[*at] += 1);
        }
        picks.into_iter().max()
    };
    // 4 on average. Of independent draws from all of them, the most loaded has 12 or so.
    assert!(most_taken(CHOICES) < Some(25), "{:?}", most_taken(CHOICES));
    assert!(most_taken(u8::MAX) > Some(100), "a herd");
}

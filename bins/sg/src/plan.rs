//! `sg plan`: who would take a VM's memory, and why. Nothing is done.

use std::net::IpAddr;

use anyhow::Result;
use libsg::discovery::select::{Need, Selection, Verdict, ZoneRule, select};
use libsg::units::Rate;
use libsg::wire::announcement::Announcement;
use serde_json::json;

use crate::cli::{PlanArgs, WrongArguments, secret};
use crate::table;

/// What a source's link sends when nobody says.
const LINK: Rate = Rate::mbit(1000);

/// Prints the selection; 0 when the VM fits.
pub fn run(args: &PlanArgs) -> Result<u8> {
    let found = args.pool.at.find(&secret(args.pool.at.secret.as_deref())?)?;
    let (all, nodes) = (found.len(), found.into_iter().filter_map(|found| found.announced));
    let nodes: Vec<Announcement> = nodes.collect();
    if nodes.is_empty() {
        let what = format!(
            "a list says nothing of its {all} intermediaries: a migration takes them all. --pool multicast:GROUP \
             or etcd://HOST/PREFIX finds those that announce what they have"
        );
        return Err(WrongArguments(what).into());
    }
    let need = need(args, &nodes);
    let selection = select(&nodes, &need);
    if args.pool.json {
        println!("{}", told(args, &nodes, &need, &selection));
    } else {
        print_all(args, &nodes, &need, &selection);
    }
    Ok(u8::from(!selection.fits()))
}

fn need(args: &PlanArgs, nodes: &[Announcement]) -> Need {
    let host = |ip: Option<IpAddr>| nodes.iter().find(|node| Some(node.address.ip()) == ip);
    let (from, to) = (host(args.from), host(args.to));
    let link = args.link.map(Rate::bytes_per_s);
    let link = link.or(from.map(|node| node.link.bytes_per_s)).unwrap_or(LINK.bytes_per_s());
    let destination = args.destination_rate.map(Rate::bytes_per_s);
    let destination = destination.or(to.map(|node| node.link.free_in_bytes_per_s)).unwrap_or(link);
    let zone = |named: &Option<String>, host: Option<&Announcement>| {
        named.clone().or_else(|| host.and_then(|node| node.zone.clone()))
    };
    Need {
        copies: args.copies,
        source_zone: zone(&args.from_zone, from),
        destination_zone: zone(&args.to_zone, to),
        zones: if args.evacuate { ZoneRule::Evacuate } else { ZoneRule::Prefer },
        never: args.from.into_iter().chain(args.to).collect(),
        ..Need::new(args.memory.0, link, destination, args.seed)
    }
}

fn print_all(args: &PlanArgs, nodes: &[Announcement], need: &Need, selection: &Selection) {
    println!(
        "{} in {} copies, from a link of {} to a destination that takes {}: {}",
        table::bytes(need.bytes),
        need.copies,
        table::bits(need.source_bytes_per_s),
        table::bits(need.destination_bytes_per_s),
        if selection.fits() { "fits" } else { "DOES NOT FIT" }
    );
    for lack in &selection.lacks {
        println!("  {lack}");
    }
    let time = |time: Option<std::time::Duration>| {
        time.map_or("never".to_owned(), |time| format!("{:.1} s", time.as_secs_f64()))
    };
    println!("evicted in {}, gathered in {}", time(selection.eviction), time(selection.total));
    let shown = |at: &usize| args.explain || matches!(selection.verdicts[*at], Verdict::Taken { .. });
    let row = |at: usize| {
        let node = &nodes[at];
        vec![
            node.node.to_string(),
            node.address.to_string(),
            node.zone.clone().unwrap_or_else(|| "-".into()),
            table::bytes(node.memory.limit_bytes.saturating_sub(node.memory.used_bytes)),
            table::bits(node.link.free_in_bytes_per_s),
            table::bits(node.link.free_out_bytes_per_s),
            selection.verdicts[at].to_string(),
        ]
    };
    let rows: Vec<_> = (0..nodes.len()).filter(shown).map(row).collect();
    let heading = ["NODE", "ADDRESS", "ZONE", "LENDS", "FREE IN", "FREE OUT", "WHY"];
    print!("{}", table::render(&heading, &rows));
    if !args.explain {
        println!("{} of {}; --explain says why the others are not taken", rows.len(), nodes.len());
    }
}

fn told(args: &PlanArgs, nodes: &[Announcement], need: &Need, selection: &Selection) -> serde_json::Value {
    let node = |(at, node): (usize, &Announcement)| {
        json!({
            "id": node.node.to_string(),
            "address": node.address.to_string(),
            "zone": node.zone,
            "taken": matches!(selection.verdicts[at], Verdict::Taken { .. }),
            "why": selection.verdicts[at].to_string(),
        })
    };
    let shown = |(at, _): &(usize, &Announcement)| {
        args.explain || matches!(selection.verdicts[*at], Verdict::Taken { .. })
    };
    json!({
        "schema": libsg::report::SCHEMA,
        "status": "ok",
        "fits": selection.fits(),
        "lacks": selection.lacks.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "eviction_s": selection.eviction.map(|time| time.as_secs_f64()),
        "total_migration_s": selection.total.map(|time| time.as_secs_f64()),
        "bytes": need.bytes,
        "copies": need.copies,
        "link_bytes_per_s": need.source_bytes_per_s,
        "destination_bytes_per_s": need.destination_bytes_per_s,
        "nodes": nodes.iter().enumerate().filter(shown).map(node).collect::<Vec<_>>(),
    })
}

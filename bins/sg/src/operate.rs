//! What operators ask of a pool.

use std::collections::BTreeMap;
use std::io::{IsTerminal as _, Write as _};
use std::net::SocketAddr;

use anyhow::Result;
use libsg::discovery::Found;
use libsg::ids::{Epoch, VolumeId};
use libsg::page::PAGE_BYTES_U64;
use libsg::transport::PoolSecret;
use libsg::wire::announcement::LinkRoom;
use libsg::wire::handover::Leaving;
use libsg::wire::link_use::LocalTraffic;
use libsg::wire::message::{NodeStatistics, VmdReply, VmdRequest, VolumeInfo, VolumeSummary};
use libsg::{Error, ErrorKind};
use serde_json::json;

use crate::ask::Node;
use crate::cli::{DissolveArgs, PoolArgs, WrongArguments, secret};
use crate::table;

/// The version of what is written with `--json`.
const SCHEMA: u32 = 1;

/// Intermediaries that are asked at once, each by a thread.
const ASKED_AT_ONCE: usize = 64;

type Answer<T> = (Found, libsg::Result<T>);

/// `sg status`.
pub fn status(args: &PoolArgs) -> Result<u8> {
    let answers = statistics(args)?;
    if args.json {
        let nodes: Vec<_> = answers.iter().map(node_json).collect();
        println!("{}", json!({ "schema": SCHEMA, "status": "ok", "nodes": nodes }));
    } else {
        let known = answers.iter().filter_map(|(host, answer)| Some((host, answer.as_ref().ok()?)));
        let rows: Vec<_> = known.map(|(host, node)| node_row(host, node)).collect();
        let heading = [
            "NODE",
            "ADDRESS",
            "ZONE",
            "USED",
            "OF",
            "FULL",
            "FREE IN",
            "FREE OUT",
            "TAKEN IN",
            "GIVEN OUT",
            "MAY IN",
            "MAY OUT",
            "LOCAL IN",
            "LOCAL OUT",
            "CONNS",
            "LEAVING",
            "VMS",
        ];
        print!("{}", table::render(&heading, &rows));
        report_failures(&answers);
    }
    Ok(code(&answers))
}

/// `sg ls`.
pub fn list(args: &PoolArgs) -> Result<u8> {
    let answers = statistics(args)?;
    let mut volumes: BTreeMap<VolumeId, Vec<(&NodeStatistics, &VolumeSummary)>> = BTreeMap::new();
    for statistics in answers.iter().filter_map(|(_, answer)| answer.as_ref().ok()) {
        for volume in &statistics.volumes {
            volumes.entry(volume.volume).or_default().push((statistics, volume));
        }
    }
    if args.json {
        let volumes: Vec<_> = volumes.iter().map(|(id, parts)| volume_json(*id, parts)).collect();
        println!("{}", json!({ "schema": SCHEMA, "status": "ok", "volumes": volumes }));
    } else {
        let rows: Vec<_> = volumes.iter().map(|(id, parts)| volume_row(*id, parts)).collect();
        let heading = [
            "VOLUME",
            "VM",
            "NAME",
            "STATE",
            "COMMITTED",
            "OWNER",
            "PAGES",
            "COPIES",
            "MISSING",
            "AGE",
            "AT",
        ];
        print!("{}", table::render(&heading, &rows));
        report_failures(&answers);
    }
    Ok(code(&answers))
}

/// `sg dissolve`.
pub fn dissolve(args: &DissolveArgs) -> Result<u8> {
    let secret = secret(args.pool.at.secret.as_deref())?;
    let Some(volume) = named(args)? else {
        eprintln!("sg: no intermediary that answered knows a volume, or a parked VM, {:?}", args.volume);
        return Ok(1);
    };
    let mut found: Vec<(Node, VolumeInfo)> = Vec::new();
    let mut failed = false;
    for host in args.pool.at.find(&secret)? {
        let address = host.address;
        match describe(address, &secret, volume) {
            Ok(Some(known)) => found.push(known),
            Ok(None) => {}
            Err(error) => {
                failed = true;
                eprintln!("sg: {address}: {}", error.chain());
            }
        }
    }
    let Some((_, first)) = found.first() else {
        eprintln!("sg: no intermediary that answered knows volume {volume}");
        return Ok(1);
    };
    let pages: u64 = found.iter().map(|(_, info)| info.stored_pages).sum();
    let what = format!(
        "volume {volume} of VM {:?}: {} in {pages} pages at {} intermediaries",
        first.manifest.vm,
        table::bytes(pages * PAGE_BYTES_U64),
        found.len()
    );
    if !args.yes && !confirmed(&what)? {
        eprintln!("sg: nothing was done");
        return Ok(4);
    }
    // Whoever claimed it last did so at some of them, perhaps not at all.
    let epoch = found.iter().map(|(_, info)| info.epoch).max().unwrap_or(Epoch::FIRST);
    for (node, _) in &mut found {
        if let Err(error) = node.ask(volume, epoch, &VmdRequest::Dissolve) {
            failed = true;
            eprintln!("sg: {}: {}", node.id(), error.chain());
        }
    }
    if args.pool.json {
        let done = json!({ "volume": volume.to_string(), "pages": pages, "intermediaries": found.len() });
        println!("{}", json!({ "schema": SCHEMA, "status": "ok", "dissolved": done }));
    } else {
        println!("dissolved {what}");
    }
    Ok(u8::from(failed))
}

/// The volume that is meant: by its id, else the one that is parked under that name.
fn named(args: &DissolveArgs) -> Result<Option<VolumeId>> {
    const ID_DIGITS: usize = 32;
    let id = args.volume.parse::<VolumeId>().ok().filter(|_| args.volume.len() == ID_DIGITS);
    if id.is_some() {
        return Ok(id);
    }
    let answers = statistics(&args.pool)?;
    report_failures(&answers);
    let nodes = answers.iter().filter_map(|(_, answer)| answer.as_ref().ok());
    let parked = nodes.flat_map(|node| &node.volumes);
    let mut ids: Vec<_> = parked
        .filter(|volume| volume.parked_as.as_deref() == Some(&*args.volume))
        .map(|volume| volume.volume)
        .collect();
    ids.sort_unstable();
    ids.dedup();
    if ids.len() > 1 {
        let ids: Vec<_> = ids.iter().map(ToString::to_string).collect();
        let what = format!("several VMs are parked as {:?}: say which, {}", args.volume, ids.join(" or "));
        return Err(WrongArguments(what).into());
    }
    Ok(ids.first().copied())
}

fn describe(
    address: SocketAddr,
    secret: &PoolSecret,
    volume: VolumeId,
) -> libsg::Result<Option<(Node, VolumeInfo)>> {
    let mut node = Node::connect(address, secret)?;
    match node.ask(volume, Epoch(0), &VmdRequest::Describe) {
        Ok(VmdReply::Volume(info)) => {
            let gone = info.state == libsg::wire::message::VolumeState::Dissolved;
            Ok((!gone).then_some((node, *info)))
        }
        Ok(_) => Err(Error::new(ErrorKind::Protocol, "an answer to something else")),
        Err(error) if error.kind == ErrorKind::Volume => Ok(None),
        Err(error) => Err(error),
    }
}

fn confirmed(what: &str) -> Result<bool> {
    if !std::io::stdin().is_terminal() {
        return Err(WrongArguments(format!("would dissolve {what}; say --yes to do it")).into());
    }
    print!("Dissolve {what}?\nIts pages are gone for good. Type yes: ");
    std::io::stdout().flush()?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    Ok(answer.trim() == "yes")
}

fn statistics(args: &PoolArgs) -> Result<Vec<Answer<NodeStatistics>>> {
    let secret = secret(args.at.secret.as_deref())?;
    let ask = |address| -> libsg::Result<NodeStatistics> {
        let mut node = Node::connect(address, &secret)?;
        match node.ask(VolumeId(0), Epoch(0), &VmdRequest::Statistics)? {
            VmdReply::Statistics(statistics) => Ok(statistics),
            _ => Err(Error::new(ErrorKind::Protocol, "an answer to something else")),
        }
    };
    // All at once: one that does not answer shall not hold up the others.
    let hosts = args.at.find(&secret)?;
    let mut answers = Vec::new();
    for some in hosts.chunks(ASKED_AT_ONCE) {
        std::thread::scope(|scope| {
            let asked: Vec<_> = some.iter().map(|host| scope.spawn(|| ask(host.address))).collect();
            for (host, thread) in some.iter().zip(asked) {
                let panicked = |_| Err(Error::new(ErrorKind::Poisoned, "asking it failed"));
                answers.push((host.clone(), thread.join().unwrap_or_else(panicked)));
            }
        });
    }
    Ok(answers)
}

fn code<T>(answers: &[Answer<T>]) -> u8 {
    u8::from(answers.iter().any(|(_, answer)| answer.is_err()))
}

fn report_failures<T>(answers: &[Answer<T>]) {
    for (host, answer) in answers {
        if let Err(error) = answer {
            eprintln!("sg: {}: {}", host.address, error.chain());
        }
    }
}

fn node_json((host, answer): &Answer<NodeStatistics>) -> serde_json::Value {
    let address = host.address;
    match answer {
        Ok(node) => json!({
            "address": address.to_string(),
            "id": node.node.to_string(),
            "name": node.node.name,
            "zone": node.zone,
            "limit_bytes": node.limit_bytes,
            "used_bytes": node.used_bytes,
            "arena_bytes": node.arena_bytes,
            "bytes_in": node.bytes_in,
            "bytes_out": node.bytes_out,
            "touched_bytes": node.touched_bytes,
            "leased_slots": node.leased_slots,
            "link": node.link,
            "connections": node.connections,
            "volumes": node.volumes.iter().map(summary_json).collect::<Vec<_>>(),
            "leaving": node.leaving,
            "announced": host.announced,
            "error": null,
        }),
        Err(error) => json!({
            "address": address.to_string(),
            "error": { "kind": error.kind, "message": error.chain() },
        }),
    }
}

fn summary_json(volume: &VolumeSummary) -> serde_json::Value {
    json!({
        "volume": volume.volume.to_string(),
        "vm": volume.vm,
        "state": volume.state,
        "committed": volume.committed,
        "stored_pages": volume.stored_pages,
        "copied_pages": volume.copied_pages,
        "age_s": volume.age_s,
        "parked_as": volume.parked_as,
        "owner": volume.owner.as_ref().map(ToString::to_string),
        "mending": volume.mending,
    })
}

fn node_row(host: &Found, node: &NodeStatistics) -> Vec<String> {
    let rate = |of: fn(&LinkRoom) -> u64| {
        host.announced.as_ref().map_or_else(|| "-".into(), |said| table::bits(of(&said.link)))
    };
    let may = |limit: u64| if limit == 0 { "-".into() } else { table::bits(limit) };
    let local = |of: fn(&LocalTraffic) -> u64| {
        node.link.local.as_ref().map_or_else(|| "-".into(), |local| table::bits(of(local)))
    };
    vec![
        node.node.to_string(),
        host.address.to_string(),
        node.zone.clone().unwrap_or_else(|| "-".into()),
        table::bytes(node.used_bytes),
        table::bytes(node.limit_bytes),
        format!("{:.0}%", 100.0 * node.used_bytes as f64 / node.limit_bytes.max(1) as f64),
        rate(|link| link.free_in_bytes_per_s),
        rate(|link| link.free_out_bytes_per_s),
        table::bytes(node.bytes_in),
        table::bytes(node.bytes_out),
        may(node.link.limit_in_bytes_per_s),
        may(node.link.limit_out_bytes_per_s),
        local(|local| local.in_bytes_per_s),
        local(|local| local.out_bytes_per_s),
        node.connections.to_string(),
        node.leaving.map_or_else(|| "-".into(), how_far),
        vms(&node.volumes),
    ]
}

/// How much of what was there others have.
fn how_far(leaving: Leaving) -> String {
    let all = leaving.handed_pages + leaving.left_pages;
    format!("{}%", leaving.handed_pages * 100 / all.max(1))
}

/// Whose pages are there: how many VMs', and the first names.
fn vms(volumes: &[VolumeSummary]) -> String {
    const NAMED: usize = 3;
    let names: Vec<&str> = volumes.iter().take(NAMED).map(|volume| &*volume.vm).collect();
    let more = if volumes.len() > NAMED { ", …" } else { "" };
    if names.is_empty() { "0".into() } else { format!("{}: {}{more}", volumes.len(), names.join(", ")) }
}

fn volume_json(id: VolumeId, parts: &[(&NodeStatistics, &VolumeSummary)]) -> serde_json::Value {
    let at = |(node, volume): &(&NodeStatistics, &VolumeSummary)| {
        let mut part = summary_json(volume);
        part["id"] = json!(node.node.to_string());
        part
    };
    json!({
        "volume": id.to_string(),
        "vm": parts.first().map(|(_, volume)| &volume.vm),
        "parked_as": parked_as(parts),
        "owner": owner(parts),
        "stored_pages": parts.iter().map(|(_, volume)| volume.stored_pages).sum::<u64>(),
        "copied_pages": parts.iter().map(|(_, volume)| volume.copied_pages).sum::<u64>(),
        "at": parts.iter().map(at).collect::<Vec<_>>(),
    })
}

/// Copies that are missing, as far as those that have the pages know; while some are made again that is not known.
fn missing(parts: &[(&NodeStatistics, &VolumeSummary)]) -> String {
    if parts.iter().all(|(_, volume)| volume.mending.copies == 1) {
        return "-".into();
    }
    let all = parts.iter().map(|(_, volume)| volume.mending.missing_copies).sum::<Option<u64>>();
    all.map_or_else(|| "?".into(), |missing| missing.to_string())
}

/// The name under which it is parked.
fn parked_as(parts: &[(&NodeStatistics, &VolumeSummary)]) -> Option<String> {
    parts.iter().find_map(|(_, volume)| volume.parked_as.clone())
}

/// Who has claimed it: some may have missed that.
fn owner(parts: &[(&NodeStatistics, &VolumeSummary)]) -> Option<String> {
    parts.iter().find_map(|(_, volume)| volume.owner.as_ref().map(ToString::to_string))
}

fn volume_row(id: VolumeId, parts: &[(&NodeStatistics, &VolumeSummary)]) -> Vec<String> {
    let mut states: Vec<String> =
        parts.iter().map(|(_, v)| format!("{:?}", v.state).to_lowercase()).collect();
    states.dedup();
    let committed = parts.iter().any(|(_, volume)| volume.committed);
    let nodes: Vec<&str> = parts.iter().map(|(node, _)| &*node.node.name).collect();
    vec![
        id.to_string(),
        parts.first().map(|(_, volume)| volume.vm.clone()).unwrap_or_default(),
        parked_as(parts).unwrap_or_else(|| "-".into()),
        states.join(","),
        if committed { "yes" } else { "no" }.into(),
        owner(parts).unwrap_or_else(|| "-".into()),
        parts.iter().map(|(_, volume)| volume.stored_pages).sum::<u64>().to_string(),
        parts.iter().map(|(_, volume)| volume.copied_pages).sum::<u64>().to_string(),
        missing(parts),
        table::age(parts.iter().map(|(_, volume)| volume.age_s).max().unwrap_or(0)),
        nodes.join(","),
    ]
}

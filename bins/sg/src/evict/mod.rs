//! `sg evict`: a host is emptied of its VMs, whose VMMs are driven from outside.

mod args;
mod driven;
mod eviction;
mod gather;
mod nodes;
mod plan;
mod qemu;
mod show;
mod sockets;
mod tell;
mod told;
mod who;

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result};
use libsg::content::Sharing;
use libsg::discovery::meter::Meter;
use libsg::ids::random_bytes;
use libsg::migrate::Mode;
use libsg::units::Rate;
use signal_hook::consts::{SIGINT, SIGTERM};
use vmms::Start;

pub use self::args::{CancelArgs, EvictArgs, GatherArgs, LimitArgs};
pub use self::gather::run as gather;
pub use self::tell::{cancel, limit};

use self::driven::Driven;
use self::eviction::{Eviction, Vm};
use self::nodes::{Chosen, Rules};
use self::plan::{Leaver, Plan, Terms};
use self::qemu::{Again, Through};
use self::show::Show;
use self::who::{Asked, Found, Note};
use crate::cli::{Intermediaries, LogFormat, WrongArguments, secret};
use crate::logs;

/// What is missing where a VM is to be parked, or was, and nobody is named.
const PARKED_WHERE: &str = "VMs are parked at intermediaries: --intermediary HOST:PORT, or --pool";

/// What an interrupted command ends with.
const INTERRUPTED: u8 = 130;

/// What is going to be done.
struct Prepared {
    vms: Vec<Vm>,
    chosen: Vec<Chosen>,
    plan: Plan,
    link_bytes_per_s: u64,
}

impl Prepared {
    /// One that leaves already.
    fn of_one(vm: Vm) -> Self {
        let mode = vm.how.as_ref().map_or_else(Mode::default, |how| how.mode);
        let plan = Plan {
            mode,
            why: "as it was begun",
            waves: vec![vec![0]],
            late: Vec::new(),
            takes: Duration::ZERO,
        };
        Self { vms: vec![vm], chosen: vec![Chosen::default()], plan, link_bytes_per_s: 0 }
    }
}

/// Evicts them; the exit code.
pub fn run(args: &EvictArgs) -> Result<u8> {
    logs::start(LogFormat::Text, logs::COMMAND);
    let interrupted = interruptible()?;
    args.check()?;
    if let Some(socket) = args.only_qemu().filter(|_| args.resume) {
        return match qemu::go_on(args, socket)? {
            Again::Over(code) => Ok(code),
            Again::Leaves(prepared) => see_out(args, &prepared, &Asked::default(), &interrupted),
        };
    }
    if !args.qmp.is_empty() {
        qemu::check(args)?;
        check_whither(args)?;
    }
    let asked = who::ask(args, &Through::of(args))?;
    for Note { socket, why } in asked.warnings.iter().chain(&asked.notes) {
        eprintln!("sg: {}: {why}", socket.display());
    }
    let prepared = prepare(args, &asked.found)?;
    told::print_plan(args, &prepared);
    let late = !prepared.plan.late.is_empty();
    if args.dry_run || (args.strict && late) {
        write_json(args.json.as_deref(), &told::planned(args, &prepared, &asked.notes))?;
        return Ok(u8::from(late || asked.failed));
    }
    see_out(args, &prepared, &asked, &interrupted)
}

/// Evicts what is prepared, and says what became of each; the exit code.
fn see_out(
    args: &EvictArgs,
    prepared: &Prepared,
    asked: &Asked,
    interrupted: &Arc<AtomicBool>,
) -> Result<u8> {
    let mut show = Show::new("evicted", prepared.vms.len());
    let waves = prepared.plan.waves.clone();
    let fates = Eviction::new(&prepared.vms, waves, Arc::clone(interrupted)).run(&mut show)?;
    told::print_fates(prepared, &fates);
    write_json(args.json.as_deref(), &told::report(args, prepared, &asked.notes, &fates))?;
    let code = told::exit_code(&fates).max(u8::from(asked.failed));
    let was_interrupted = interrupted.load(Ordering::Acquire) && ![0, told::LOST].contains(&code);
    Ok(if was_interrupted { INTERRUPTED } else { code })
}

fn check_whither(args: &EvictArgs) -> Result<()> {
    let what = match &args.park {
        None if args.to.is_empty() => {
            "say where the VMs go: --to HOST:PORT, where a destination waits, or --park"
        }
        Some(_) if args.at.is_empty() => PARKED_WHERE,
        _ => return Ok(()),
    };
    Err(WrongArguments(what.into()).into())
}

fn prepare(args: &EvictArgs, found: &[Found]) -> Result<Prepared> {
    let destinations = args.destinations()?;
    if found.iter().any(|vm| !vm.leaves) {
        check_whither(args)?;
    }
    if found.iter().any(|vm| vm.driven.qemu().is_some()) {
        qemu::check(args)?;
    }
    let secret = secret(args.at.secret.as_deref())?;
    let nodes = if args.at.is_empty() { Vec::new() } else { args.at.find(&secret)? };
    if args.park.is_some() && nodes.is_empty() {
        return Err(WrongArguments(PARKED_WHERE.into()).into());
    }
    let own = args.at.own_address();
    let link = link_bytes_per_s(own, args.link);
    let to = |at: usize| (!destinations.is_empty()).then(|| destinations[at % destinations.len()]);
    let leaver = |vm: &Found| Leaver { bytes: vm.bytes, weight: args.weight_of(&vm.name).unwrap_or(1.0) };
    let wanted: Vec<_> = found.iter().enumerate().map(|(at, vm)| (leaver(vm), to(at))).collect();
    let rules = Rules {
        link_bytes_per_s: link,
        copies: args.replicas,
        zone: args.zone.clone(),
        evacuate: args.evacuate,
        spares: args.spares()?,
        own,
        seed: u64::from_le_bytes(random_bytes()?),
    };
    let chosen = nodes::choose(&nodes, &wanted, &rules);
    let takes: Option<u64> = chosen.iter().map(|chosen| chosen.takes_bytes_per_s).sum();
    let limit = args.scatter.filter(|rate| !rate.is_unlimited()).map(Rate::bytes_per_s);
    let may = limit.map_or(link, |limit| limit.saturating_mul(found.len() as u64).min(link));
    let terms = Terms {
        bytes_per_s: takes.filter(|_| !chosen.is_empty()).map_or(may, |takes| takes.min(may)),
        deadline: args.deadline,
        mode: args.mode.map(Into::into),
        staged: !nodes.is_empty(),
    };
    let leavers: Vec<Leaver> = wanted.iter().map(|(vm, _)| vm.clone()).collect();
    let plan = plan::plan(&leavers, &terms);
    let names = args.park.as_ref().map(|prefix| who::parking_names(found, prefix));
    let mode = |vm: &Found| match vm.driven {
        Driven::Control(_) => plan.mode,
        Driven::Qemu(_) => qemu::mode_of(plan.mode, args.park.is_some()).0,
    };
    let start = |at: usize| Start {
        mode: mode(&found[at]),
        to: to(at),
        park: names.as_ref().map(|names| names[at].clone()),
        arbiter: args.arbiter(),
        intermediaries: chosen[at].addresses.clone(),
        spares: chosen[at].spares.clone(),
        dedup: args
            .domain_of(&found[at].name)
            .map(|domain| Sharing { domain: domain.to_owned(), ..Sharing::default() }),
        replicas: args.replicas,
        scatter: args.scatter.map(|rate| rate.to_string()),
    };
    let vm = |(at, vm): (usize, &Found)| Vm {
        driven: vm.driven.clone(),
        name: vm.name.clone(),
        how: (!vm.leaves).then(|| start(at)),
        leaves: vm.leaves,
        weight: args.weight_of(&vm.name),
    };
    let vms = found.iter().enumerate().map(vm).collect();
    Ok(Prepared { vms, chosen, plan, link_bytes_per_s: link })
}

/// What the link of this host carries.
fn link_bytes_per_s(own: Option<IpAddr>, said: Option<Rate>) -> u64 {
    let interface = match own {
        Some(IpAddr::V4(own)) => own,
        _ => Ipv4Addr::UNSPECIFIED,
    };
    let said = said.filter(|rate| !rate.is_unlimited()).map(Rate::bytes_per_s);
    Meter::new(interface, said).measure().link.bytes_per_s
}

/// The first ^C or SIGTERM is noted, the second ends the process.
fn interruptible() -> Result<Arc<AtomicBool>> {
    let noted = Arc::<AtomicBool>::default();
    for signal in [SIGINT, SIGTERM] {
        // In this order: the first does not see that it is the first itself.
        signal_hook::flag::register_conditional_shutdown(signal, INTERRUPTED.into(), Arc::clone(&noted))?;
        signal_hook::flag::register(signal, Arc::clone(&noted))?;
    }
    Ok(noted)
}

fn write_json(path: Option<&Path>, value: &serde_json::Value) -> Result<()> {
    match path {
        None => Ok(()),
        Some(path) if path == Path::new("-") => {
            println!("{value}");
            Ok(())
        }
        Some(path) => std::fs::write(path, value.to_string())
            .with_context(|| format!("cannot write {}", path.display())),
    }
}

/// Who is asked for a parked VM.
fn addresses(at: &Intermediaries) -> Result<Vec<std::net::SocketAddr>> {
    let found = at.find(&secret(at.secret.as_deref())?)?;
    Ok(found.into_iter().map(|found| found.address).collect())
}

//! What an operator is told: the plan before, the report after.

use libsg::ErrorKind;
use libsg::report::{Failure, Host, Report, SCHEMA, SourceReport, Status};
use serde_json::{Value, json};

use super::args::EvictArgs;
use super::eviction::{Fate, Vm};
use super::who::Note;
use super::{Prepared, qemu};
use crate::table;

/// The exit code when something was lost.
pub const LOST: u8 = 3;
const CANCELLED: u8 = 4;

/// Says what is going to be done: on standard error, where progress is, too.
pub fn print_plan(args: &EvictArgs, prepared: &Prepared) {
    let Prepared { vms, plan, chosen, link_bytes_per_s } = prepared;
    if vms.is_empty() {
        eprintln!("no VM is to be evicted");
        return;
    }
    let why = if args.explain { format!(": {}", plan.why) } else { String::new() };
    eprintln!(
        "{} VMs by {}{why}; out in about {:.0} s over a link of {}",
        vms.len(),
        plan.mode.name(),
        plan.takes.as_secs_f64(),
        table::bits(*link_bytes_per_s)
    );
    if let Some(deadline) = args.deadline {
        let late: Vec<&str> = plan.late.iter().map(|at| &*vms[*at].name).collect();
        let seconds = deadline.as_secs_f64();
        match &late[..] {
            [] => eprintln!("all are out within {seconds:.0} s"),
            late => eprintln!("NOT out within {seconds:.0} s, and leaving last: {}", late.join(", ")),
        }
    }
    for (vm, chosen) in vms.iter().zip(chosen) {
        for lack in &chosen.lacks {
            eprintln!("{}: {lack}", vm.name);
        }
        let of_qemu = vm.driven.qemu().and(qemu::mode_of(plan.mode, args.park.is_some()).1);
        if let Some((why, how)) = of_qemu.zip(vm.how.as_ref()) {
            eprintln!("{} by {}: {why}", vm.name, how.mode.name());
        }
        if args.explain {
            eprintln!("{} goes {}", vm.name, whither(vm));
            for (address, why) in &chosen.said {
                eprintln!("  {address}: {why}");
            }
        }
    }
}

fn whither(vm: &Vm) -> String {
    match &vm.how {
        None => "where it was told to before".into(),
        Some(how) => match (&how.to, &how.park) {
            (Some(to), _) => format!("to {to}"),
            (None, name) => format!("nowhere yet, parked as {}", name.as_deref().unwrap_or_default()),
        },
    }
}

/// Says what became of each.
pub fn print_fates(prepared: &Prepared, fates: &[Fate]) {
    let row = |(vm, fate): (&Vm, &Fate)| {
        let bytes = fate.report.bytes.direct.unwrap_or(0) + fate.report.bytes.staged.unwrap_or(0);
        let said = match &fate.report.status {
            Status::Ok if fate.is_out() => {
                let qemu = vm.driven.qemu().map(|qemu| format!(", {}", qemu.afterwards()));
                format!("evicted{}", qemu.unwrap_or_default())
            }
            Status::Ok => "-".to_owned(),
            Status::Failed(failure) => failure.message.clone(),
        };
        let time = fate.report.eviction_s.map_or("-".to_owned(), |s| format!("{s:.1} s"));
        vec![vm.name.clone(), whither(vm), table::bytes(bytes.max(fate.leaving.sent_bytes)), time, said]
    };
    let rows: Vec<_> = prepared.vms.iter().zip(fates).map(row).collect();
    if !rows.is_empty() {
        eprint!("{}", table::render(&["VM", "GOES", "SENT", "TOOK", "NOW"], &rows));
        let host = host(fates);
        let time = host.eviction_s.map_or("not emptied".to_owned(), |s| format!("emptied in {s:.1} s"));
        eprintln!("host: {time}, {} sent", table::bytes(host.bytes.unwrap_or(0)));
    }
    for hint in prepared.vms.iter().filter_map(|vm| vm.driven.qemu()?.hint()) {
        eprintln!("{hint}");
    }
}

/// From the first told to leave to the last that is out, if all are.
fn host(fates: &[Fate]) -> Host {
    let all_out = !fates.is_empty() && fates.iter().all(Fate::is_out);
    let last = fates.iter().filter_map(|fate| fate.over).max().filter(|_| all_out);
    let bytes = fates.iter().map(|fate| {
        let told =
            fate.report.bytes.direct.zip(fate.report.bytes.staged).map(|(direct, staged)| direct + staged);
        told.unwrap_or(fate.leaving.sent_bytes)
    });
    Host {
        eviction_s: last.map(|last| last.as_secs_f64()),
        total_migration_s: None,
        bytes: Some(bytes.sum()),
    }
}

/// The plan alone.
pub fn planned(args: &EvictArgs, prepared: &Prepared, left_out: &[Note]) -> Value {
    let vms: Vec<Value> = (0..prepared.vms.len()).map(|at| of_vm(prepared, at, json!({}))).collect();
    let (status, host) = (json!(Status::Ok), Value::Null);
    whole(args, prepared, (status, host, vms), left_out)
}

/// All that is known.
pub fn report(args: &EvictArgs, prepared: &Prepared, left_out: &[Note], fates: &[Fate]) -> Value {
    let failed = fates.iter().map(|fate| &fate.report.status).find(|status| **status != Status::Ok);
    let vm = |(at, fate): (usize, &Fate)| {
        let report = json!(Report::merged(Some(&fate.report), None));
        of_vm(prepared, at, report)
    };
    let vms = fates.iter().enumerate().map(vm).collect();
    let status = json!(failed.unwrap_or(&Status::Ok));
    whole(args, prepared, (status, json!(host(fates)), vms), left_out)
}

/// Of the host; of one QEMU that was named alone, its VM's.
fn whole(
    args: &EvictArgs,
    prepared: &Prepared,
    (status, host, mut vms): (Value, Value, Vec<Value>),
    left_out: &[Note],
) -> Value {
    if args.only_qemu().is_some() {
        let mut vm = vms.pop().unwrap_or_else(|| {
            let why: Vec<_> = left_out.iter().map(|note| note.why.as_str()).collect();
            let failure = Failure { kind: ErrorKind::Vm, message: why.join("; "), lost: Vec::new() };
            let report = SourceReport { status: Status::Failed(failure), ..SourceReport::default() };
            let mut vm = json!(Report::merged(Some(&report), None));
            vm["socket"] = json!(args.only_qemu());
            vm
        });
        vm["plan"] = of_plan(args, prepared);
        return vm;
    }
    let left_out: Vec<_> =
        left_out.iter().map(|note| json!({ "socket": note.socket, "why": note.why })).collect();
    json!({
        "schema": SCHEMA, "status": status, "host": host, "plan": of_plan(args, prepared), "vms": vms, "left_out": left_out,
    })
}

fn of_plan(args: &EvictArgs, prepared: &Prepared) -> Value {
    json!({
        "mode": prepared.plan.mode.name(),
        "why": prepared.plan.why,
        "eviction_s": prepared.plan.takes.as_secs_f64(),
        "deadline_s": args.deadline.map(|deadline| deadline.as_secs_f64()),
        "fits": prepared.plan.late.is_empty(),
        "link_bytes_per_s": prepared.link_bytes_per_s,
    })
}

fn of_vm(prepared: &Prepared, at: usize, mut report: Value) -> Value {
    let (vm, chosen) = (&prepared.vms[at], &prepared.chosen[at]);
    let how = vm.how.as_ref();
    report["vm"] = json!(vm.name);
    report["socket"] = json!(vm.driven.socket());
    report["to"] = json!(how.and_then(|how| how.to));
    report["parked_as"] = json!(how.and_then(|how| how.park.clone()));
    report["fits"] = json!(!prepared.plan.late.contains(&at));
    report["wave"] = json!(prepared.plan.waves.iter().position(|wave| wave.contains(&at)));
    report["intermediary_addresses"] = json!(chosen.addresses);
    report["spare_addresses"] = json!(chosen.spares);
    report["domain"] = json!(how.and_then(|how| how.dedup.as_ref()).map(|sharing| &sharing.domain));
    if let Some(qemu) = vm.driven.qemu() {
        report["resumed"] = json!(qemu.resumed());
    }
    report
}

/// 0 all are out; the worst of what else there was.
pub fn exit_code(fates: &[Fate]) -> u8 {
    fates.iter().map(|fate| code(&fate.report.status)).max_by_key(|code| severity(*code)).unwrap_or(0)
}

/// The exit code of one end's status.
pub fn code(status: &Status) -> u8 {
    match status {
        Status::Ok => 0,
        Status::Failed(failure) if !failure.lost.is_empty() => LOST,
        Status::Failed(failure) => match failure.kind {
            ErrorKind::Lost => LOST,
            ErrorKind::Cancelled => CANCELLED,
            _ => 1,
        },
    }
}

/// A failure is worse than one that was called off, and a loss worse than any.
pub fn severity(code: u8) -> u8 {
    match code {
        LOST => 3,
        1 => 2,
        CANCELLED => 1,
        _ => 0,
    }
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn the_worst_that_happened_is_the_exit_code() {
        let fate = |kind: Option<ErrorKind>| {
            let failed = |kind| Failure { kind, message: "x".into(), lost: Vec::new() };
            let mut fate = Fate::default();
            fate.report.status = kind.map_or(Status::Ok, |kind| Status::Failed(failed(kind)));
            fate
        };
        let code = |kinds: &[Option<ErrorKind>]| {
            exit_code(&kinds.iter().map(|kind| fate(*kind)).collect::<Vec<_>>())
        };
        assert_eq!(code(&[None, None]), 0);
        assert_eq!(code(&[None, Some(ErrorKind::Cancelled)]), 4);
        assert_eq!(code(&[Some(ErrorKind::Full), Some(ErrorKind::Cancelled)]), 1);
        assert_eq!(code(&[Some(ErrorKind::Lost), Some(ErrorKind::Full)]), 3);
        assert_eq!(code(&[]), 0);
    }
}

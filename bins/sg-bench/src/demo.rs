//! `sg-bench demo`: the same busy VM leaves twice for a slow destination, and both runs side by side.

use std::path::Path;

use anyhow::{Context, Result};
use libsg::report::Report;

use crate::cli::{DemoArgs, MigrateArgs, Mode};
use crate::lab::{Lab, LabSpec};
use crate::ui::Ui;
use crate::{experiment, interrupt, table};
use libsg::units::{Rate, Size};

const DESTINATION_RATE: Rate = Rate::mbit(256);

/// Runs both, prints the table; the worse exit code of the two.
pub fn run(demo: &DemoArgs) -> Result<u8> {
    let mut args = arguments(demo)?;
    println!(
        "A VM of {} whose guest writes random pages moves to a destination that takes {} Mb/s; the source is \
         killed the moment it reports evicted.",
        args.vm.memory,
        DESTINATION_RATE.as_mbps()
    );
    for without in go_without(&mut args) {
        println!("Without {without}");
    }
    let mut ui = Ui::new();
    let mut reports = Vec::new();
    let through = format!("scatter-gather: through {} intermediaries", args.lab.intermediaries);
    let straight = "post-copy: straight to the destination".to_owned();
    for (mode, text) in [(Mode::PostCopy, straight), (Mode::ScatterGather, through)] {
        interrupt::check()?;
        args.mode = mode;
        ui.begin(&text);
        let report = experiment::run(&args, &mut ui).with_context(|| format!("the {} run", mode.name()))?;
        reports.push((mode.name(), report));
    }
    let columns: Vec<(&str, &Report)> = reports.iter().map(|(name, report)| (*name, report)).collect();
    println!("\n{}", table::of(&columns));
    if let [(_, before), (_, after)] = &reports[..]
        && let (Some(before), Some(after)) = (before.eviction_s, after.eviction_s)
    {
        println!("The source was free {:.1} times as soon.", before / after);
    }
    Ok(reports.iter().map(|(_, report)| experiment::exit_code(&report.status)).max().unwrap_or(0))
}

fn arguments(demo: &DemoArgs) -> Result<MigrateArgs> {
    let mut args = MigrateArgs::new();
    args.vm.memory = demo.memory;
    args.lab.destination_rate = Some(DESTINATION_RATE);
    args.lab.intermediaries = demo.intermediaries;
    args.kill = vec!["source@evicted".parse()?];
    Ok(args)
}

/// Finds out what this machine lacks, and adapts.
fn go_without(args: &mut MigrateArgs) -> Vec<String> {
    let mut without = Vec::new();
    let smallest = LabSpec { intermediaries: 0, ..args.lab.spec(None) };
    if let Err(error) = Lab::create(&smallest) {
        args.lab.shape = false;
        args.gather_limit = DESTINATION_RATE;
        without.push(format!(
            "network namespaces ({error:#}): everything runs on loopback, and the destination limits itself"
        ));
    }
    let kvm = Path::new("/dev/kvm");
    if let Err(error) = std::fs::File::options().read(true).write(true).open(kvm) {
        args.vm.vcpu = "thread".into();
        without.push(format!("KVM (/dev/kvm: {error}): threads play the vCPUs and check the same pages"));
    }
    without
}

/// What the demo shows by default.
pub const MEMORY: Size = Size(384 << 20);

//! `sg-bench qemu`: a Linux guest under a stock QEMU leaves a host of the lab, by QEMU's own migration or by `sg evict`, and
//! checks its memory where it arrives. QEMU emulates it: what is compared is one way of moving it with another.

mod machine;
mod moves;

use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use libsg::page::PAGE_BYTES_U64;
use libsg::report::Report;
use libsg::units::{Rate, Size};

use crate::cli::{StockArgs, StockMode};
use crate::lab::{Lab, Node, Reserve};
use crate::ui::{Table, Ui};
use crate::valid::LINKS_MAX;
use crate::{interrupt, stream, table};
use machine::{Host, Machine};

/// Of a slow destination.
const SLOW: Rate = Rate::mbit(256);

/// One run: the VM moves, and has checked all of its memory at the destination.
///
/// # Errors
/// Something that it needs is missing; the move failed; a page is wrong; or it was interrupted.
pub fn run(args: &StockArgs, ui: &mut Ui) -> Result<Report> {
    let (lab, mbps) = fit_lab(args, ui)?;
    // Both ends, what the relay holds, and intermediaries.
    let mut reserve = Reserve::fill(Size(args.memory.0 * 4))?;
    reserve.hand_out()?;
    let machine = Machine::new(&lab, args.memory, args.write_rate, args.check_rate)?;
    ui.say("  a guest starts, and fills its memory");
    let from = Host::start(&lab, Node::Source, &machine, &[])?;
    let there = Host::start(&lab, Node::Destination, &machine, &["-incoming", "defer"])?;
    from.await_filled()?;
    interrupt::check()?;
    // It was handed out for the guest, a while ago.
    reserve.renew();
    let start = Instant::now();
    let moved = match args.mode {
        StockMode::ScatterGather | StockMode::Hybrid => moves::by_us(&lab, args, &from, &there),
        StockMode::PostCopy | StockMode::PreCopy => moves::by_itself(&lab, args, &from, &there),
    };
    let mut report =
        moved.with_context(|| format!("{}{}", from.process.log_tail(), there.process.log_tail()))?;
    ui.say("  it has moved, and checks its memory");
    there.verify()?;
    let gap = machine::longest_gap(from, &there, start)?;
    report.guest.longest_pause_ms = Some(gap.as_secs_f64() * 1e3);
    let guest = &mut report.guest;
    (guest.mismatches, guest.fill_pages) = (Some(0), Some(machine.filled_pages()));
    guest.verified_pages = guest.fill_pages;
    let per_gib =
        |cpu_s: f64| cpu_s * (1_u64 << 30) as f64 / (machine.filled_pages() * PAGE_BYTES_U64) as f64;
    report.cpu_s_per_gib.source = report.cpu_s.source.map(per_gib);
    report.cpu_s_per_gib.destination = report.cpu_s.destination.map(per_gib);
    report.mode = Some(args.mode.name().into());
    report.set_link(mbps);
    Ok(report)
}

/// Hosts whose links are what they were set to, as far as they are limited, and what the source's carries.
fn fit_lab(args: &StockArgs, ui: &Ui) -> Result<(Lab, f64)> {
    let spec = args.lab.spec(None);
    let mut tries = 0;
    loop {
        interrupt::check()?;
        let lab = Lab::create(&spec)?;
        let mbps = stream::link_mbps(&lab, Node::Source, spec.best_sink())?;
        let Some(nominal) = spec.nominal() else { return Ok((lab, mbps)) };
        if stream::BAND.contains(&(mbps / nominal.as_mbps())) {
            return Ok((lab, mbps));
        }
        tries += 1;
        ensure!(
            tries < LINKS_MAX,
            "the source's link carries {mbps:.0} Mb/s of {:.0}: the machine is too busy",
            nominal.as_mbps()
        );
        ui.say(&format!(
            "  the source's link carries {mbps:.0} Mb/s of {:.0}: built again",
            nominal.as_mbps()
        ));
    }
}

/// `sg-bench qemu`: one run, and its report where it is wanted.
///
/// # Errors
/// [`run`]'s.
pub fn command(args: &StockArgs) -> Result<u8> {
    let mut ui = Ui::new();
    ui.begin(&format!("{} of a stock QEMU's {}", args.mode.name(), args.memory));
    let report = run(args, &mut ui)?;
    ui.end();
    Table::beside(args.json.as_deref()).write(&serde_json::to_value(&report)?)?;
    if args.json.is_none() {
        print!("{}", table::of(&[("", &report)]));
    }
    Ok(0)
}

/// One round of runs that are compared with each other: to a destination of 256 Mb/s, and to one as fast as the source.
pub struct Round {
    /// `sg evict`, slow.
    pub slow: Report,
    /// QEMU's post-copy, slow.
    pub slow_post_copy: Report,
    /// QEMU's pre-copy, slow.
    pub slow_pre_copy: Report,
    /// `sg evict`, fast.
    pub fast: Report,
    /// QEMU's post-copy, fast.
    pub fast_post_copy: Report,
    /// The same through a `socat` at the source.
    pub socat: Report,
}

/// So many rounds.
///
/// # Errors
/// [`run`]'s.
pub fn compare(rounds: u32) -> Result<Vec<Round>> {
    let mut ui = Ui::new();
    let one = |mode, rate: Option<Rate>, socat, ui: &mut Ui| {
        let mut args = StockArgs::new();
        (args.mode, args.lab.destination_rate, args.socat) = (mode, rate, socat);
        let where_to = if rate.is_some() { "a slow destination" } else { "a fast destination" };
        ui.begin(&format!("a stock QEMU by {} to {where_to}", mode.name()));
        let report = run(&args, ui).with_context(|| format!("{} to {where_to}", mode.name()));
        ui.end();
        report
    };
    let mut done = Vec::new();
    for _ in 0..rounds {
        use StockMode::{PostCopy, PreCopy, ScatterGather};
        done.push(Round {
            slow: one(ScatterGather, Some(SLOW), false, &mut ui)?,
            slow_post_copy: one(PostCopy, Some(SLOW), false, &mut ui)?,
            slow_pre_copy: one(PreCopy, Some(SLOW), false, &mut ui)?,
            fast: one(ScatterGather, None, false, &mut ui)?,
            fast_post_copy: one(PostCopy, None, false, &mut ui)?,
            socat: one(PostCopy, None, true, &mut ui)?,
        });
    }
    Ok(done)
}

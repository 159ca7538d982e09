//! `sg-bench paper`: the paper's figures and its table, measured here, drawn, and put beside the paper's own.
//!
//! [`figures`] says which experiments there are, as data; [`mod@run`] carries them out into a [`store`] from which an
//! interrupted command goes on; [`reduce`] makes values of the runs, [`draw`] makes drawings of them, [`page`] the
//! page.

mod draw;
mod experiment;
mod figure;
mod figures;
mod page;
mod reduce;
mod run;
mod store;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use libsg::discovery::meter::available_bytes;
use serde_json::json;

use crate::cli::{MigrateArgs, PaperArgs};
use crate::ui::Ui;
use experiment::{Experiment, NotInThisBuild, Scale, memory_needed};
use figure::{Figure, Kind};
use page::{Heading, Shown};
use run::{Outcome, Planned, left_s, span};
use store::{Store, write_whole};

/// Exit codes: an experiment failed; a page was wrong or lost in some run.
const FAILED: u8 = 1;
const WRONG: u8 = 3;

/// What one command is to do.
struct Paper<'a> {
    args: &'a PaperArgs,
    scale: Scale,
    figures: Vec<Figure>,
    /// What can be run, each experiment once.
    plan: Vec<Planned>,
    /// What cannot, and why.
    left_out: BTreeMap<Experiment, String>,
}

/// Runs what is missing of the figures asked for, and draws them; 0 when every experiment that this build and this
/// machine have could be run.
pub fn run(args: &PaperArgs) -> Result<u8> {
    let paper = Paper::new(args)?;
    if args.list {
        paper.list();
        return Ok(0);
    }
    let out = args.out.as_deref().context("--out DIR says where everything goes")?;
    let programs = store::digest_of_programs()?;
    let mut store = Store::open(out, &programs)?;
    paper.say_what_is_to_be_done(&store);
    let repeat = args.repeat as usize;
    let done = |store: &Store, outcome: &Outcome| paper.publish(out, store, outcome);
    let mut ui = Ui::new();
    let outcome = run::all(&paper.plan, (repeat, &programs), &mut store, &mut ui, run::measure, done)?;
    paper.publish(out, &store, &outcome)?;
    println!("{}", out.join("paper.html").display());
    for (experiment, why) in &outcome.failed {
        println!("FAILED: {}: {why}", experiment.0);
    }
    Ok(match (outcome.wrong, outcome.failed.is_empty()) {
        (true, _) => WRONG,
        (false, true) => 0,
        (false, false) => FAILED,
    })
}

impl<'a> Paper<'a> {
    fn new(args: &'a PaperArgs) -> Result<Self> {
        if let Err(error) = MigrateArgs::from_words(args.besides.iter().map(String::as_str)) {
            // As a wrong argument of this very command.
            error.exit();
        }
        let scale = Scale { vm: args.scale, besides: args.besides.clone() };
        let mut figures = figures::all(&scale);
        if let Some(name) = args.only.iter().find(|name| !figures.iter().any(|figure| figure.name == **name))
        {
            let names: Vec<_> = figures.iter().map(|figure| figure.name).collect();
            bail!("there is no {name:?}: {}", names.join(", "));
        }
        figures.retain(|figure| args.only.is_empty() || args.only.iter().any(|name| name == figure.name));
        let (plan, left_out) = planned(&figures, memory_available());
        Ok(Self { args, scale, figures, plan, left_out })
    }

    fn list(&self) {
        for figure in &self.figures {
            let alone = planned(std::slice::from_ref(figure), memory_available());
            let seconds = expected_s(&alone.0, self.args.repeat);
            let missing =
                if alone.1.is_empty() { String::new() } else { format!(", {} left out", alone.1.len()) };
            println!(
                "{:8} {:4} runs, about {:>10}{missing:14}  {}",
                figure.name,
                alone.0.len() * self.args.repeat as usize,
                span(seconds),
                figure.title
            );
        }
        let all = expected_s(&self.plan, self.args.repeat);
        println!(
            "{:8} {:4} runs, about {:>10}: figures share runs",
            "together",
            self.plan.len() * self.args.repeat as usize,
            span(all)
        );
    }

    fn say_what_is_to_be_done(&self, store: &Store) {
        let repeat = self.args.repeat as usize;
        let done: usize = self.plan.iter().map(|one| store.count(&one.experiment).min(repeat)).sum();
        let left = left_s(&self.plan, repeat, store, &Outcome::default());
        println!(
            "{} experiments, {repeat} runs of each; {done} of {} runs are done. It takes about {}; ^C is safe, and the \
             same command goes on.",
            self.plan.len(),
            self.plan.len() * repeat,
            span(left)
        );
        if store.others() > 0 {
            println!(
                "{} runs there are of other builds of sg and sg-vmm: kept, not counted.",
                store.others()
            );
        }
        let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
        for why in self.left_out.values() {
            *reasons.entry(why).or_default() += 1;
        }
        for (why, experiments) in reasons {
            println!("Left out, {experiments} experiments: {why}");
        }
    }

    /// Everything that is known by now, for people and for programs.
    fn publish(&self, out: &Path, store: &Store, outcome: &Outcome) -> Result<()> {
        let repeat = self.args.repeat as usize;
        let why_not = |experiment: &Experiment| {
            let why = self.left_out.get(experiment).cloned();
            let failed = || outcome.failed.get(experiment).map(|why| format!("failed: {why}"));
            Some(why.or_else(failed).unwrap_or_else(|| "not run yet".to_owned()))
        };
        let values =
            self.figures.iter().map(|figure| reduce::reduce(figure, store, (&self.scale, repeat), why_not));
        let values = values.collect::<Result<Vec<_>>>()?;
        let mut shown = Vec::new();
        for (figure, values) in self.figures.iter().zip(&values) {
            let mut svg = None;
            if figure.kind != Kind::Table {
                let drawing = draw::svg(values)?;
                write_whole(&out.join(format!("{}.svg", figure.name)), drawing.as_bytes())?;
                write_whole(&out.join(format!("{}.png", figure.name)), &draw::png(values)?)?;
                svg = Some(drawing);
            }
            shown.push(Shown { figure, values, svg });
        }
        let facts = self.facts(store);
        let json = json!({
            "scale_bytes": self.args.scale.0, "repeat": repeat, "besides": self.args.besides, "facts": facts,
            "figures": values, "left_out": named(&self.left_out), "failed": named(&outcome.failed),
            "repeated": repeated(&self.plan, store),
        });
        write_whole(&out.join("paper.json"), json.to_string().as_bytes())?;
        let page = page::page(&Heading { facts }, &shown);
        write_whole(&out.join("paper.html"), page.as_bytes())
    }

    /// What somebody who reads the page wants to know of how it was made.
    fn facts(&self, store: &Store) -> Vec<(&'static str, String)> {
        let repeat = self.args.repeat as usize;
        let done: usize = self.plan.iter().map(|one| store.count(&one.experiment).min(repeat)).sum();
        let mut facts = vec![
            ("Scale", format!("{} for a VM of 5 GB", self.args.scale)),
            ("Runs", format!("{repeat} of each experiment; {done} of {} are done", self.plan.len() * repeat)),
            ("Machine", machine()),
            (
                "Build",
                if cfg!(debug_assertions) { "debug: times mean nothing" } else { "release" }.to_owned(),
            ),
        ];
        if !self.args.besides.is_empty() {
            facts.push(("Besides", format!("every run has {}", self.args.besides.join(" "))));
        }
        let repeated: usize = repeated(&self.plan, store).values().map(Vec::len).sum();
        if repeated > 0 {
            facts.push(("Repeated", format!("{repeated} runs did not count; paper.json says why")));
        }
        if !self.left_out.is_empty() {
            facts.push(("Left out", format!("{} experiments; the tables say why", self.left_out.len())));
        }
        facts
    }
}

/// The experiments of figures, each once: what can be run, and why the rest cannot.
fn planned(figures: &[Figure], available: u64) -> (Vec<Planned>, BTreeMap<Experiment, String>) {
    let (mut plan, mut left_out): (Vec<Planned>, BTreeMap<Experiment, String>) = Default::default();
    for experiment in figures.iter().flat_map(Figure::experiments) {
        if plan.iter().any(|one| one.experiment == *experiment) {
            continue;
        }
        let why = match experiment.args() {
            Ok(args) if memory_needed(&args) <= available => {
                plan.push(Planned { experiment: experiment.clone(), args });
                continue;
            }
            Ok(args) => format!(
                "needs {:.1} GiB of memory where {:.1} are free (a smaller --scale needs less)",
                gib(memory_needed(&args)),
                gib(available)
            ),
            Err(NotInThisBuild(what)) => format!("this build has no {what}"),
        };
        left_out.insert(experiment.clone(), why);
    }
    (plan, left_out)
}

fn expected_s(plan: &[Planned], repeat: u32) -> f64 {
    plan.iter().map(|one| experiment::seconds_expected(&one.args) * f64::from(repeat)).sum()
}

/// Why runs were repeated, by experiment.
fn repeated<'a>(plan: &[Planned], store: &'a Store) -> BTreeMap<String, Vec<&'a String>> {
    let of = |one: &Planned| -> Vec<&'a String> {
        store.of(&one.experiment).flat_map(|run| &run.repeated).collect()
    };
    let all = plan.iter().map(|one| (one.experiment.0.clone(), of(one)));
    all.filter(|(_, why)| !why.is_empty()).collect()
}

fn named(reasons: &BTreeMap<Experiment, String>) -> BTreeMap<&str, &str> {
    reasons.iter().map(|(experiment, why)| (&*experiment.0, &**why)).collect()
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 30)
}

/// Bytes that can be had without taking them from somebody.
fn memory_available() -> u64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    available_bytes(&meminfo).unwrap_or(u64::MAX)
}

/// Processors, kernel, memory.
fn machine() -> String {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    let model = model.map_or("processors", |(_, model)| model);
    let processors = std::thread::available_parallelism().map_or(0, |n| n.get());
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let memory = gib(rustix::system::sysinfo().totalram);
    format!("{processors} x {model}, {memory:.0} GiB, Linux {}", kernel.trim())
}

#[cfg(test)]
mod test;

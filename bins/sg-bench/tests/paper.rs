//! `sg-bench paper` as others run it: measured, drawn, gone on with.

mod places;

use std::path::Path;
use std::process::{Command, Output};
use std::time::SystemTime;

use places::Place;
use serde_json::Value;

/// The smallest figure, with VMs of a few MiB, on loopback, with threads for vCPUs, and as much memory as they want.
fn paper(out: &Path, repeat: u32) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sg-bench"));
    command.args(["paper", "--only", "fig12", "--scale", "16M", "--repeat", &repeat.to_string(), "--out"]);
    command.arg(out).args("-- --shape off --vcpu thread --destination-memory 256M --neighbours 0".split(' '));
    command.output().expect("runs")
}

fn runs(out: &Path) -> Vec<SystemTime> {
    let entries = std::fs::read_dir(out.join("runs")).expect("there").flatten();
    let mut times: Vec<_> =
        entries.map(|entry| entry.metadata().expect("there").modified().expect("known")).collect();
    times.sort();
    times
}

/// What the page is made of.
fn json(out: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(out.join("paper.json")).expect("there")).expect("JSON")
}

#[test]
fn a_figure_is_measured_drawn_and_gone_on_with() {
    let _place = Place::take();
    let directory = tempfile::tempdir().expect("made");
    let out = directory.path();
    let first = paper(out, 1);
    let json = json(out);
    // A mode that a vCPU of threads cannot have is named.
    assert_eq!(first.status.success(), json["failed"] == Value::Object(Default::default()), "{first:?}");
    let html = std::fs::read_to_string(out.join("paper.html")).expect("a page");
    assert!(html.contains("<svg") && html.contains("<td>Scatter-gather</td><td>57.0 s</td>"), "{html}");
    assert!(std::fs::read(out.join("fig12.png")).expect("drawn").starts_with(b"\x89PNG"));
    let lines = json["figures"][0]["series"].as_array().expect("lines");
    let measured = |line: &&Value| {
        let seconds = line["points"][0]["here"]["mean"].as_f64();
        seconds.is_some_and(|seconds| seconds > 0.0) && line["over_time"].is_array()
    };
    let names: Vec<_> = lines.iter().filter(measured).filter_map(|line| line["name"].as_str()).collect();
    assert!(names.contains(&"Post-copy") && names.contains(&"Scatter-gather"), "{json}");
    let before = runs(out);
    assert_eq!(before.len(), names.len());
    // Everything that could be run is there: nothing is run again.
    paper(out, 1);
    assert_eq!(runs(out), before);
}

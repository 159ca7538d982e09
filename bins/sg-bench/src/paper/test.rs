//! The page as a whole, from runs that were never run.

use libsg::report::{Report, Sample};

use super::experiment::test::scale;
use super::*;

/// Some report for every experiment that this build has.
fn publish(out: &Path, args: &PaperArgs) -> String {
    let paper = Paper::new(args).expect("figures");
    let mut store = Store::open(out, "a").expect("opens");
    for (n, one) in paper.plan.iter().enumerate() {
        let sample = |t: u64| Sample { t_s: t as f64 / 10.0, guest_ops: Some(t * 1000), ..Sample::default() };
        let mut report = Report { eviction_s: Some(9.0 + n as f64), ..Report::default() };
        report.total_migration_s = Some(20.0 + n as f64);
        report.pages.present = Some(262_144);
        report.set_link(950.0);
        report.samples = (0..200).map(sample).collect();
        store.add(store::test::run(&one.experiment.0, "a", &report)).expect("written");
    }
    paper.publish(out, &store, &Outcome::default()).expect("published");
    fs::read_to_string(out.join("paper.html")).expect("a page")
}

fn paper_args(words: &str) -> PaperArgs {
    use clap::Parser as _;
    let words = ["sg-bench", "paper"].into_iter().chain(words.split_whitespace());
    match crate::cli::Cli::parse_from(words).command {
        crate::cli::Command::Paper(args) => args,
        _ => panic!("another command"),
    }
}

#[test]
fn the_page_has_every_figure_and_fetches_nothing() {
    let directory = tempfile::tempdir().expect("made");
    let html = publish(directory.path(), &paper_args("--out x"));
    let figures = figures::all(&scale());
    assert_eq!(figures.len(), 10);
    for figure in &figures {
        assert!(html.contains(&format!("id=\"{}\"", figure.name)), "{}", figure.name);
        let drawn = figure.kind != Kind::Table;
        for (extension, begins) in [("svg", &b"<svg"[..]), ("png", &b"\x89PNG"[..])] {
            let path = directory.path().join(format!("{}.{extension}", figure.name));
            assert_eq!(path.exists(), drawn, "{}", path.display());
            assert!(!drawn || fs::read(&path).expect("there").starts_with(begins), "{}", path.display());
        }
    }
    assert_eq!(html.matches("<svg").count(), 9);
    for what in ["http:", "https:", "<script", "src=", "<link", "url(", "@import", "<iframe", "<object"] {
        assert!(!html.contains(what), "{what}");
    }
    // A point of the paper's beside ours: post-copy at 12 GB.
    assert!(html.contains("<td>Post-copy (ET)</td><td>12</td><td>309 s</td><td>"), "{html}");
    let json: serde_json::Value =
        serde_json::from_slice(&fs::read(directory.path().join("paper.json")).expect("there")).expect("JSON");
    assert_eq!(json["figures"].as_array().map(Vec::len), Some(10));
}

#[test]
fn a_figure_alone_and_names_that_are_none() {
    let args = paper_args("--out x --only fig15,table1");
    let paper = Paper::new(&args).expect("figures");
    let names: Vec<_> = paper.figures.iter().map(|figure| figure.name).collect();
    assert_eq!(names, ["table1", "fig15"]);
    let wrong = paper_args("--out x --only fig3");
    assert!(Paper::new(&wrong).err().expect("no such figure").to_string().contains("fig15"));
}

#[test]
fn what_does_not_fit_is_left_out_with_a_word() {
    let figures: Vec<Figure> = figures::all(&scale()).into_iter().filter(|f| f.name == "fig11").collect();
    let (plan, left_out) = planned(&figures, 8 << 30);
    assert!(!plan.is_empty() && plan.iter().all(|one| memory_needed(&one.args) <= 8 << 30));
    assert!(left_out.values().any(|why| why.contains("where 8.0 are free")), "{left_out:?}");
    assert!(planned(&figures, u64::MAX).1.values().all(|why| why.starts_with("this build has no")));
}

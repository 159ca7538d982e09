//! Finished runs on disk: a file each, written whole before it has its name, so that an interrupted command goes on
//! where it was. A run belongs to its words *and* to the programs that were measured: with other ones it is
//! another experiment, is kept, and is not counted.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use libsg::report::{Report, Sample};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::experiment::Experiment;

/// Directory of the runs.
const RUNS: &str = "runs";

/// A finished run as it lies on disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Run {
    /// What was run.
    pub experiment: Experiment,
    /// The programs that were measured: a digest of `sg` and `sg-vmm`.
    pub programs: String,
    /// Seconds it took, all in all.
    pub took_s: f64,
    /// Why it was repeated before it counted.
    pub repeated: Vec<String>,
    /// The whole report.
    pub report: Value,
}

/// A run whose samples stay on disk: they are most of it.
struct Kept {
    run: Run,
    path: PathBuf,
}

/// The runs of one directory.
pub struct Store {
    directory: PathBuf,
    programs: String,
    runs: BTreeMap<Experiment, Vec<Kept>>,
    others: usize,
}

impl Store {
    /// Opens the directory, which is made if it is not there. What is in it and no whole run is left out with a
    /// warning.
    ///
    /// # Errors
    /// The directory can be neither made nor read.
    pub fn open(out: &Path, programs: &str) -> Result<Self> {
        let directory = out.join(RUNS);
        fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
        let mut store = Self { directory, programs: programs.to_owned(), runs: BTreeMap::new(), others: 0 };
        let entries = fs::read_dir(&store.directory)?.collect::<std::io::Result<Vec<_>>>()?;
        let mut paths: Vec<_> = entries.iter().map(fs::DirEntry::path).collect();
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "json"));
        paths.sort_by_key(|path| (path.metadata().and_then(|of| of.modified()).ok(), path.clone()));
        for path in paths {
            match read(&path) {
                Ok(run) if run.programs == store.programs => store.keep(run, path),
                Ok(_) => store.others += 1,
                Err(error) => tracing::warn!("{} is left out: {error:#}", path.display()),
            }
        }
        Ok(store)
    }

    /// The runs of an experiment, in the order in which they were made; without samples.
    pub fn of(&self, experiment: &Experiment) -> impl Iterator<Item = &Run> {
        self.runs.get(experiment).into_iter().flatten().map(|kept| &kept.run)
    }

    /// How many runs of an experiment there are.
    pub fn count(&self, experiment: &Experiment) -> usize {
        self.runs.get(experiment).map_or(0, Vec::len)
    }

    /// The samples of the first runs of an experiment.
    ///
    /// # Errors
    /// A run cannot be read any more.
    pub fn samples(&self, experiment: &Experiment, runs: usize) -> Result<Vec<Vec<Sample>>> {
        let kept = self.runs.get(experiment).into_iter().flatten().take(runs);
        let read = kept.map(|kept| {
            let report = read(&kept.path)?.report;
            let report: Report = serde_json::from_value(report)
                .with_context(|| format!("{} is no run of this build", kept.path.display()))?;
            Ok(report.samples)
        });
        read.collect()
    }

    /// How many runs of other programs there are.
    pub fn others(&self) -> usize {
        self.others
    }

    /// Writes a run down.
    ///
    /// # Errors
    /// The disk does not take it.
    pub fn add(&mut self, run: Run) -> Result<()> {
        let digest = blake3::hash(format!("{}\n{}", run.experiment.0, run.programs).as_bytes()).to_hex();
        let name = |n: usize| self.directory.join(format!("{}-{n}.json", &digest[..16]));
        let path = (1..).map(name).find(|path| !path.exists()).context("no name is left")?;
        write_whole(&path, &serde_json::to_vec(&run)?)?;
        self.keep(run, path);
        Ok(())
    }

    fn keep(&mut self, mut run: Run, path: PathBuf) {
        drop_samples(&mut run.report);
        self.runs.entry(run.experiment.clone()).or_default().push(Kept { run, path });
    }
}

/// Whoever sees the file sees all of it.
///
/// # Errors
/// The disk does not take it.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let half = path.with_extension("part");
    let written = fs::write(&half, bytes).and_then(|()| fs::rename(&half, path));
    written.with_context(|| format!("cannot write {}", path.display()))
}

/// What tells one build of the measured programs from another.
///
/// # Errors
/// They are not beside this executable.
pub fn digest_of_programs() -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    for program in ["sg", "sg-vmm"] {
        let path = crate::process::beside_this_executable(program)?;
        let bytes = fs::read(&path)
            .with_context(|| format!("cannot read {} (cargo build --workspace builds it)", path.display()))?;
        hasher.update(&bytes);
    }
    Ok(hasher.finalize().to_hex()[..16].to_owned())
}

fn read(path: &Path) -> Result<Run> {
    Ok(serde_json::from_slice(&fs::read(path)?)?)
}

fn drop_samples(report: &mut Value) {
    if let Some(samples) = report.get_mut("samples") {
        *samples = Value::Array(Vec::new());
    }
    for vm in report.get_mut("vms").and_then(Value::as_array_mut).into_iter().flatten() {
        drop_samples(vm);
    }
}

#[cfg(test)]
pub(super) mod test {
    use super::*;

    pub(crate) fn run(words: &str, programs: &str, report: &Report) -> Run {
        Run {
            experiment: Experiment(words.into()),
            programs: programs.into(),
            took_s: 2.0,
            repeated: Vec::new(),
            report: serde_json::to_value(report).expect("encodes"),
        }
    }

    fn report(eviction_s: f64) -> Report {
        let sample = Sample { t_s: 0.5, guest_ops: Some(7), ..Sample::default() };
        Report { eviction_s: Some(eviction_s), samples: vec![sample], ..Report::default() }
    }

    #[test]
    fn what_was_run_is_there_the_next_time() {
        let directory = tempfile::tempdir().expect("made");
        let experiment = Experiment("--mode post-copy".into());
        let mut store = Store::open(directory.path(), "a").expect("opens");
        for seconds in [1.0, 2.0] {
            store.add(run(&experiment.0, "a", &report(seconds))).expect("written");
        }
        let store = Store::open(directory.path(), "a").expect("opens");
        let seconds: Vec<_> = store.of(&experiment).map(|run| run.report["eviction_s"].as_f64()).collect();
        assert_eq!((seconds, store.count(&experiment)), (vec![Some(1.0), Some(2.0)], 2));
        // Samples are read when they are wanted.
        assert!(store.of(&experiment).all(|run| run.report["samples"] == Value::Array(Vec::new())));
        let samples = store.samples(&experiment, 1).expect("reads");
        assert_eq!((samples.len(), samples[0][0].guest_ops), (1, Some(7)));
    }

    #[test]
    fn another_configuration_is_another_experiment_and_another_build_too() {
        let directory = tempfile::tempdir().expect("made");
        let mut store = Store::open(directory.path(), "a").expect("opens");
        store.add(run("--memory 1G", "a", &report(1.0))).expect("written");
        assert_eq!(store.count(&Experiment("--memory 2G".into())), 0);
        let other = Store::open(directory.path(), "b").expect("opens");
        assert_eq!((other.count(&Experiment("--memory 1G".into())), other.others()), (0, 1));
    }

    #[test]
    fn half_a_run_is_no_run() {
        let directory = tempfile::tempdir().expect("made");
        let mut store = Store::open(directory.path(), "a").expect("opens");
        store.add(run("x", "a", &report(1.0))).expect("written");
        let path =
            fs::read_dir(directory.path().join(RUNS)).expect("there").next().expect("one").expect("ok");
        fs::write(path.path(), "{").expect("cut off");
        fs::write(directory.path().join(RUNS).join("x.part"), "{").expect("written");
        let mut store = Store::open(directory.path(), "a").expect("opens");
        assert_eq!((store.count(&Experiment("x".into())), store.others()), (0, 0));
        store.add(run("x", "a", &report(1.0))).expect("beside it");
        assert_eq!(Store::open(directory.path(), "a").expect("opens").count(&Experiment("x".into())), 1);
    }
}

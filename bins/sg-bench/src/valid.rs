//! Runs that count: repeated while something went wrong in them that makes their figures worthless.

use anyhow::{Result, bail, ensure};
use libsg::report::{Report, Status};

use crate::cli::{MigrateArgs, Until};
use crate::experiment::{self, Unfit};
use crate::ui::Ui;

/// How often one run is repeated that did not count.
pub const REPEATS_MAX: u32 = 3;
/// How often links are built and measured again that were not what they were set to. It takes seconds.
pub const LINKS_MAX: u32 = 8;

/// Why a run does not count.
#[derive(Debug)]
pub struct Invalid {
    /// In words.
    pub why: String,
    /// Pages were wrong or lost: whatever the repeated run says, this was seen.
    pub wrong: bool,
}

/// No run counted. One that is made later may.
#[derive(Debug)]
pub struct NoneValid(String);

impl std::fmt::Display for NoneValid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "no valid run: {}", self.0)
    }
}

impl std::error::Error for NoneValid {}

/// Runs an experiment until a run counts, and tells of each that does not.
///
/// # Errors
/// [`NoneValid`] after some; it could not be carried out; or it was interrupted.
pub fn run(args: &MigrateArgs, ui: &mut Ui, mut repeated: impl FnMut(Invalid)) -> Result<Report> {
    let (mut runs, mut links) = (0, 0);
    loop {
        let invalid = match experiment::run_on_fit_links(args, ui) {
            Ok(report) => match doubt(&report, args.until) {
                None => return Ok(report),
                Some(invalid) => {
                    runs += 1;
                    invalid
                }
            },
            Err(error) if error.is::<Unfit>() => {
                links += 1;
                Invalid { why: error.to_string(), wrong: false }
            }
            Err(error) => return Err(error),
        };
        ui.say(&format!("  INVALID, repeated: {}", invalid.why));
        let why = invalid.why.clone();
        repeated(invalid);
        if runs > REPEATS_MAX || links > LINKS_MAX {
            bail!(NoneValid(why));
        }
    }
}

/// Why a run does not count, if it does not.
fn doubt(report: &Report, until: Until) -> Option<Invalid> {
    let error = check(report, until).err()?;
    let lost = matches!(&report.status, Status::Failed(failure) if !failure.lost.is_empty());
    let wrong = lost || report.guest.mismatches.is_some_and(|pages| pages > 0);
    Some(Invalid { why: format!("{error:#}"), wrong })
}

/// Fails when a run went wrong in a way that makes its figures worthless.
fn check(report: &Report, until: Until) -> Result<()> {
    if let Status::Failed(failure) = &report.status {
        bail!("the migration failed: {}", failure.message);
    }
    let guest = &report.guest;
    ensure!(guest.mismatches == Some(0), "{:?} pages did not read as written", guest.mismatches);
    if until == Until::Gathered {
        ensure!(
            guest.verified_pages.is_some() && guest.verified_pages >= guest.fill_pages,
            "the guest verified {:?} of {:?} pages",
            guest.verified_pages,
            guest.fill_pages
        );
    }
    Ok(())
}

#[cfg(test)]
mod test {
    use super::*;
    use libsg::ErrorKind;
    use libsg::report::{Failure, Guest};

    #[test]
    fn a_run_counts_when_every_page_was_verified() {
        let mut run = Report::default();
        let why = |run: &Report, until| doubt(run, until).map(|invalid| invalid.why);
        assert!(why(&run, Until::Evicted).is_some(), "nobody looked");
        run.guest = Guest { mismatches: Some(0), fill_pages: Some(9), ..Guest::default() };
        assert_eq!(why(&run, Until::Evicted), None);
        assert!(why(&run, Until::Gathered).is_some());
        run.guest.verified_pages = Some(9);
        assert_eq!(why(&run, Until::Gathered), None);
        let failure = Failure { kind: ErrorKind::Cancelled, message: "x".into(), lost: Vec::new() };
        run.status = Status::Failed(failure);
        assert!(why(&run, Until::Evicted).is_some_and(|why| why.ends_with('x')));
    }

    #[test]
    fn wrong_pages_are_more_than_a_reason_to_repeat() {
        let guest =
            Guest { mismatches: Some(0), verified_pages: Some(8), fill_pages: Some(9), ..Guest::default() };
        let mut run = Report { guest, ..Report::default() };
        assert!(!doubt(&run, Until::Gathered).expect("a page was not looked at").wrong);
        run.guest.mismatches = Some(1);
        assert!(doubt(&run, Until::Gathered).expect("a wrong page").wrong);
    }
}

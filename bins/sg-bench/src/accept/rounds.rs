//! Figures that are all of the same rounds of a comparison, which are made when the first of them is asked for.

use std::cell::OnceCell;
use std::rc::Rc;

use anyhow::{Context as _, Result, bail};

use super::rows::{Part, Want};
use super::runs::Results;

/// Rounds of a comparison.
pub struct Rounds<T> {
    /// They, or why there are none.
    made: Rc<OnceCell<std::result::Result<Vec<T>, String>>>,
    make: fn() -> Result<Vec<T>>,
}

impl<T: 'static> Rounds<T> {
    /// Made by this.
    pub fn of(make: fn() -> Result<Vec<T>>) -> Self {
        Self { made: Rc::default(), make }
    }

    /// A figure of each round.
    pub fn part(&self, name: &str, want: Want, of: fn(&T) -> Option<f64>) -> Part {
        let (made, make) = (Rc::clone(&self.made), self.make);
        let values =
            move |_: &Results| match made.get_or_init(|| make().map_err(|error| format!("{error:#}"))) {
                Ok(rounds) => rounds.iter().map(|round| of(round).context("a run did not tell")).collect(),
                Err(error) => bail!("{error}"),
            };
        Part { name: name.to_owned(), experiments: Vec::new(), want, values: Box::new(values) }
    }
}

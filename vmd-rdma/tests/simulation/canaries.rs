//! Bugs put in on purpose in what is new where clients move pages themselves: each must be found within a thousand seeds.

use libsg::host::simulation::Bug;

use crate::seeds::find;

#[test]
fn nobody_writes_behind_the_end_of_its_epoch() {
    find(Bug::WayLeftOpen, &["epochs"]);
}

#[test]
fn a_page_is_there_before_it_counts() {
    find(Bug::SettledEarly, &["evicted means evicted", "a death is an event"]);
}

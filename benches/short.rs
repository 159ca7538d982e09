//! How long the benches take.

use std::time::Duration;

use criterion::Criterion;

/// Short runs: differences that matter here are of tens of percents.
pub fn short() -> Criterion {
    Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(2))
        .configure_from_args()
}

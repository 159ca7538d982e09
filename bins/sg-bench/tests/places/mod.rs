//! How many migrations of tests go on beside each other. They wait for most of their time, for rates and for
//! deadlines, but more of them would take each other's processors.

use parking_lot::{Condvar, Mutex};

const PLACES: usize = 2;

static TAKEN: Mutex<usize> = Mutex::new(0);
static LEFT: Condvar = Condvar::new();

/// One of few; free again when dropped.
pub struct Place(());

impl Place {
    /// Waits for one.
    pub fn take() -> Self {
        let mut taken = TAKEN.lock();
        LEFT.wait_while(&mut taken, |taken| *taken == PLACES);
        *taken += 1;
        Self(())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        *TAKEN.lock() -= 1;
        LEFT.notify_one();
    }
}

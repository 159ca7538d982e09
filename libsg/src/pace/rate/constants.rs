//! What the rate finder goes by: delays, times and shares, each with its reason.

use std::time::Duration;

/// Delay beyond a slice's own time that counts as a queue.
pub(super) const QUEUE_DELAY: Duration = Duration::from_micros(150);

/// The same while unpaced: windows bound the queue there, and a path without a bottleneck (loopback) shows
/// delays of this order from copying alone.
pub(super) const QUEUE_DELAY_STARTUP: Duration = Duration::from_micros(600);

/// How long a delay lasts, without one low reading in between, and how many readings show it at least,
/// before it is a queue. Where one is to be expected: unpaced, or while probing.
pub(super) const DETECT: (Duration, u32) = (Duration::from_millis(8), 3);

/// The same at cruising speed. The queue of a rate that is 1 % too high grows by no more than half a
/// millisecond in this time; on a host whose cores are all busy, late readings come many in a row, but not
/// for as long, and each one that is believed would cost 1.5 % of the rate.
pub(super) const DETECT_CRUISING: (Duration, u32) = (Duration::from_millis(50), 6);

/// A delay of more than this is believed soon, cruising or not: somebody else took a share of the link.
pub(super) const DELAY_EXCESSIVE: Duration = Duration::from_millis(3);

/// How long a queue is kept to measure by: with acknowledgements in lumps of 64 KiB, 1 % at 1 Gb/s.
pub(super) const MEASURE_TIME: Duration = Duration::from_millis(40);

/// The least time over which a measurement is used.
pub(super) const MEASURE_TIME_MIN: Duration = Duration::from_millis(25);

/// A queue longer than this is drained at once, measured or not: draining it takes long enough to measure.
pub(super) const QUEUE_DELAY_MAX: Duration = Duration::from_millis(2);

/// Drain rates as shares of the measured rate: between these, the longer the queue the lower.
pub(super) const DRAIN_SHARE: (f64, f64) = (0.6, 0.9);

/// The delay that is drained at the lower of the two.
pub(super) const DRAIN_DELAY: Duration = Duration::from_millis(20);

/// A drain that moves nothing for this long does not drain our queue.
pub(super) const DRAIN_STUCK_TIME: Duration = Duration::from_millis(100);

/// The longest drain, whatever moves: windows and send buffers of the unpaced start are drained by then.
pub(super) const DRAIN_TIME_MAX: Duration = Duration::from_secs(2);

/// Share of the capacity that is used between probes.
pub(super) const CRUISE_SHARE: f64 = 0.99;

/// Calm time before probing.
pub(super) const CRUISE_TIME: Duration = Duration::from_millis(250);

/// A probe that finds the estimate to within this share confirms it, and each in turn doubles the calm time before the
/// next, so often at most: a probe is a queue of a millisecond in front of faults, and its drain leaves the link unused.
pub(super) const CONFIRMED: (f64, u32) = (0.015, 2);

/// Time between two steps up.
pub(super) const PROBE_STEP_TIME: Duration = Duration::from_millis(100);

/// The first step up, what each further one is multiplied by, and the largest: twice the rate is found
/// after about twelve.
pub(super) const PROBE_STEP: (f64, f64, f64) = (0.006, 1.5, 0.25);

/// The same, and the number of the first step up, while the estimate is from the unpaced start: hosts that have just
/// begun stall, and what was delivered meanwhile may be a third of what the link carries.
pub(super) const YOUNG: (Duration, u32) = (Duration::from_millis(60), 5);

/// More than the estimate by this factor was carried, when it is too low beyond what bursts explain.
pub(super) const CARRIED_MORE: f64 = 1.02;

/// Less than this share of the rate delivered, with more to send: the rest stands in a queue of ours, that windows bound.
pub(super) const STUCK_SHARE: f64 = 0.97;

/// Weight of one reading in whether less is sent than allowed, and from which average on it is.
pub(super) const LIMITED: (f64, f64) = (1.0 / 16.0, 0.2);

/// Share of the rate that must be delivered for calm to mean anything.
pub(super) const USED_SHARE: f64 = 0.9;

/// Steps without use after which probing ends.
pub(super) const PROBE_UNUSED_STEPS: u32 = 5;

/// Measurements of which the largest is the estimate.
pub(super) const ESTIMATES: usize = 3;

/// Two queues at cruising speed within this time: the estimate is too large.
pub(super) const REPEAT_TIME: Duration = Duration::from_millis(1_500);

/// What is left of the estimate at least when that happens: a stalled core looks like a slow link too.
pub(super) const FALL_SHARE_MIN: f64 = 0.8;

/// Share of what was sent that counts as all of it: acknowledgements come in lumps.
pub(super) const ALL_DELIVERED: f64 = 0.99;

/// What is left of the rate when a queue stands again and again although all is delivered.
pub(super) const STEP_BACK: f64 = 0.998;

/// A queue with more than one in so many readings limited by the sender is not measured by.
pub(super) const LIMITED_PARTS: u32 = 5;

/// Weight of one reading in the usual delay of calm times, and how much of it is allowed for.
pub(super) const USUAL_DELAY: (f64, f64) = (1.0 / 64.0, 2.0);

/// The most that is allowed for: as much of a queue of our own may stand unseen in front of faults. Simulated on a
/// host whose readings are 0.3 ms late on average, 0.2 ms cost 1.8 % of the rate, 0.4 ms 0.5 %, 0.6 ms 0.1 %.
pub(super) const USUAL_DELAY_MAX: Duration = Duration::from_micros(500);

/// Time over which the delivered rate is taken for everything but capacity, and its longest memory.
pub(super) const HISTORY_TIME: Duration = Duration::from_millis(500);

/// How many more slices each time covers where a slice of one page takes longer than usual.
pub(super) const SLICES_PER_TIME: u32 = 20;

/// The lowest rate ever set, in bytes/s: 1 Mb/s. Slower than this nothing could be learned any more.
pub(super) const RATE_MIN: f64 = 125_000.0;

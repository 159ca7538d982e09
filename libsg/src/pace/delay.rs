//! Whose queue is it? Several links of one host share a bottleneck (the host's own port); each may have
//! one of its own as well. A delay that all of them see is the shared one's.

use std::time::Duration;

use super::TcpInfo;

/// What is known of one link (one peer, over one or more connections) at one instant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LinkReading {
    /// Bytes that arrived at the other end since the link exists: acknowledged at a sender, read at a
    /// receiver.
    pub delivered: u64,
    /// Queueing delay now: round trip less the least round trip. `None` when unknown.
    pub queue_delay: Option<Duration>,
    /// The least round trip; zero when unknown.
    pub base_rtt: Duration,
    /// More waits to be sent than its share let through.
    pub backlogged: bool,
}

impl From<&TcpInfo> for LinkReading {
    fn from(info: &TcpInfo) -> Self {
        Self {
            delivered: info.bytes_acked,
            queue_delay: info.queue_delay(),
            base_rtt: info.base_rtt().unwrap_or_default(),
            backlogged: info.notsent_bytes > 0,
        }
    }
}

/// The links of a host as one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Aggregate {
    /// Bytes delivered since the earlier readings.
    pub moved: u64,
    /// The least delay over the links that moved data; `None` if none did or none knows.
    pub queue_delay: Option<Duration>,
    /// The largest base round trip over the links that moved data: no answer comes sooner.
    pub base_rtt: Duration,
}

/// Combines links, each given as its earlier and its present reading, into what their shared bottleneck shows.
#[must_use]
pub fn aggregate(links: impl IntoIterator<Item = (LinkReading, LinkReading)>) -> Aggregate {
    let mut sum = Aggregate::default();
    for (earlier, present) in links {
        let moved = present.delivered.saturating_sub(earlier.delivered);
        if moved == 0 {
            continue;
        }
        sum.moved += moved;
        sum.base_rtt = sum.base_rtt.max(present.base_rtt);
        sum.queue_delay = match (sum.queue_delay, present.queue_delay) {
            (Some(least), Some(delay)) => Some(least.min(delay)),
            (known, None) | (None, known) => known,
        };
    }
    sum
}

/// The part of a link's delay that is not the shared bottleneck's: its own queue.
#[must_use]
pub fn own_delay(link: Option<Duration>, shared: Option<Duration>) -> Option<Duration> {
    link.map(|delay| delay.saturating_sub(shared.unwrap_or_default()))
}

#[cfg(test)]
mod test {
    use super::*;

    fn reading(delivered: u64, delay_us: Option<u64>) -> LinkReading {
        LinkReading { delivered, queue_delay: delay_us.map(Duration::from_micros), ..LinkReading::default() }
    }

    #[test]
    fn shared_delay_is_the_least_of_those_that_moved() {
        let sum = aggregate([
            (reading(0, None), reading(100, Some(900))),
            (reading(50, None), reading(80, Some(300))),
            (reading(70, None), reading(70, Some(0))),
            (reading(0, None), reading(5, None)),
        ]);
        assert_eq!(sum.moved, 135);
        assert_eq!(sum.queue_delay, Some(Duration::from_micros(300)));
        assert_eq!(
            own_delay(Some(Duration::from_micros(900)), sum.queue_delay),
            Some(Duration::from_micros(600))
        );
    }

    #[test]
    fn nothing_moved_says_nothing() {
        let still = reading(10, Some(5_000));
        assert_eq!(aggregate([(still, still)]), Aggregate::default());
        assert_eq!(own_delay(None, Some(Duration::ZERO)), None);
    }

    #[test]
    fn a_counter_that_went_back_counts_as_still() {
        assert_eq!(aggregate([(reading(10, None), reading(3, Some(1)))]).moved, 0);
    }
}

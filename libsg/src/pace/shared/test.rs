//! What takers get, and what links that report are told.

use super::*;

const LIMIT: u64 = 100_000_000;

/// Drives takers for a second of made-up time; returns what each was granted.
fn run(
    pacer: &SharedPacer,
    start: Instant,
    takers: &[Class],
    busy: impl Fn(Class, Duration) -> bool,
) -> Vec<u64> {
    let mut granted = vec![0; takers.len()];
    let mut next = vec![start; takers.len()];
    let mut now = start;
    while now < start + Duration::from_secs(1) {
        for (taker, class) in takers.iter().enumerate() {
            if next[taker] > now || !busy(*class, now - start) {
                continue;
            }
            match pacer.acquire(*class, 64 << 10, now) {
                Acquire::Grant(bytes) => granted[taker] += bytes,
                Acquire::WaitUntil(at) => next[taker] = at,
            }
        }
        now += Duration::from_micros(10);
    }
    granted
}

#[test]
fn those_who_ask_alike_get_alike() {
    let start = Instant::now();
    let pacer = SharedPacer::new(start, LIMIT);
    let got = run(&pacer, start, &[Class::Bulk, Class::Bulk], |_, _| true);
    assert!(got.iter().sum::<u64>() as f64 > 0.98 * LIMIT as f64, "{got:?}");
    assert!(got.iter().sum::<u64>() as f64 <= 1.005 * LIMIT as f64, "{got:?}");
    assert!(got[0].abs_diff(got[1]) < LIMIT / 10, "{got:?}");
}

#[test]
fn credit_ahead_of_its_time_keeps_to_the_rate_however_late_it_is_asked_for() {
    const AHEAD: Duration = Duration::from_millis(16);
    let start = Instant::now();
    let pacer = SharedPacer::new(start, LIMIT);
    let (mut now, mut granted) = (start, 0);
    for step in 0..200 {
        while let Acquire::Grant(bytes) = pacer.acquire_ahead(100_000, AHEAD, now) {
            granted += bytes;
        }
        assert!(matches!(pacer.acquire(Class::Bulk, 4096, now), Acquire::WaitUntil(_)));
        now += Duration::from_millis(1 + step % 15);
    }
    let time = (now - start).as_secs_f64();
    let most = LIMIT as f64 * (time + 0.022);
    assert!(granted as f64 > 0.995 * LIMIT as f64 * time && (granted as f64) < most, "{granted} {time}");
}

#[test]
fn urgent_never_waits_and_is_exempt_from_the_limit() {
    let start = Instant::now();
    let pacer = SharedPacer::new(start, 1_000_000);
    for _ in 0..1_000 {
        assert_eq!(pacer.acquire(Class::Urgent, 4096, start), Acquire::Grant(4096));
    }
    assert_eq!(pacer.acquire(Class::Direct, 4096, start), Acquire::Grant(4096));
}

#[test]
fn whoever_has_nothing_to_tell_leaves_its_share() {
    let start = Instant::now();
    let pacer = SharedPacer::new(start, LIMIT);
    let (direct, bulk) = (pacer.add_link(Class::Direct), pacer.add_link(Class::Bulk));
    let (mut now, mut came, mut share) = (start, [0_u64; 2], None);
    let mut step = |direct_comes: bool| {
        now += Duration::from_millis(4);
        let reading = |delivered| LinkReading { delivered, ..LinkReading::default() };
        if direct_comes {
            came[0] += LIMIT / 250;
            pacer.observe(direct, reading(came[0]), now);
        }
        came[1] += share.unwrap_or(LIMIT).min(LIMIT) / 250;
        share = pacer.report(bulk, reading(came[1]), now);
        share.unwrap_or(u64::MAX)
    };
    let beside = (0..250).map(|_| step(true)).last();
    assert!(beside.is_some_and(|share| share < LIMIT / 20), "{beside:?}");
    let alone = (0..250).map(|_| step(false)).last();
    assert!(alone.is_some_and(|share| share > LIMIT - LIMIT / 20), "{alone:?}");
}

#[test]
fn a_limit_holds_from_now_on_and_can_be_lifted() {
    let start = Instant::now();
    let pacer = SharedPacer::new(start, 0);
    assert_eq!(pacer.acquire(Class::Bulk, 1 << 30, start), Acquire::Grant(1 << 30));
    pacer.set_limit(32_000_000, start);
    assert_eq!(pacer.rate(), Some(32_000_000));
    let got = run(&pacer, start, &[Class::Bulk], |_, _| true);
    assert!(got[0] > 31_500_000 && got[0] < 32_300_000, "{got:?}");
    pacer.set_limit(0, start + Duration::from_secs(1));
    assert_eq!(pacer.rate(), None);
}

#[test]
fn a_queue_that_all_links_see_sets_the_rate_and_one_that_one_sees_does_not() {
    let start = Instant::now();
    let (shared, own) = (SharedPacer::new(start, 0), SharedPacer::new(start, 0));
    for (pacer, second) in [(&shared, 5_000), (&own, 0)] {
        let links = [pacer.add_link(Class::Bulk), pacer.add_link(Class::Bulk)];
        for step in 0..40 {
            let now = start + step as u32 * Duration::from_millis(5);
            for (link, delay_us) in links.iter().zip([5_000, second]) {
                let reading = LinkReading {
                    delivered: step * 300_000,
                    queue_delay: Some(Duration::from_micros(delay_us)),
                    base_rtt: Duration::from_micros(50),
                    backlogged: true,
                };
                pacer.observe(*link, reading, now);
            }
        }
    }
    let rate = shared.rate().unwrap();
    assert!(rate > 50_000_000 && rate < 120_000_000, "{rate}");
    assert_eq!(own.rate(), None);
    assert_eq!(own.shared_delay(), Some(Duration::ZERO));
}

#[test]
fn a_limit_is_not_taken_for_what_the_link_carries() {
    const LOW: u64 = 2_500_000;
    let start = Instant::now();
    let pacer = SharedPacer::new(start, LOW);
    let link = pacer.add_link(Class::Bulk);
    let (mut now, mut next, mut delivered) = (start, start, 0);
    // Half a minute on a busy host: now and then readings are late for a while, whatever is sent.
    for step in 0..15_000_u32 {
        now += Duration::from_millis(2);
        while next <= now {
            match pacer.acquire(Class::Bulk, 4096, now) {
                Acquire::Grant(bytes) => delivered += bytes,
                Acquire::WaitUntil(at) => next = at,
            }
        }
        let late = step % 150 < 40;
        let queue_delay = Some(Duration::from_micros(if late { 3_500 } else { 20 }));
        pacer.report(
            link,
            LinkReading { delivered, queue_delay, base_rtt: Duration::from_micros(50), backlogged: true },
            now,
        );
    }
    let carried = (now - start).as_secs_f64() * LOW as f64;
    assert!(delivered as f64 > 0.9 * carried, "{delivered} of {carried}, {:?}", pacer.capacity());
    pacer.set_limit(0, now);
    assert_eq!(pacer.rate(), None, "nothing but the limit was in the way");
}

#[test]
fn removed_links_are_reused_and_ignored() {
    let now = Instant::now();
    let pacer = SharedPacer::new(now, 0);
    let first = pacer.add_link(Class::Bulk);
    pacer.remove_link(first);
    pacer.observe(first, LinkReading::default(), now);
    assert_eq!(pacer.add_link(Class::Bulk), first);
}

#[test]
fn what_is_granted_takes_the_place_of_what_is_found_until_nobody_says_more() {
    const GRANTED: u64 = 10_000_000;
    let start = Instant::now();
    let pacer = SharedPacer::new(start, 0);
    let (bulk, urgent) = (pacer.add_link(Class::Bulk), pacer.add_link(Class::Urgent));
    let (mut now, mut sent, mut told) = (start, [0_u64; 2], Told::default());
    let mut run = |grant: Option<Option<u64>>, ticks: u32, delay_ms: u64| {
        for _ in 0..ticks {
            now += TICK_TIME;
            if let Some(bytes_per_s) = grant {
                pacer.grant(bytes_per_s, now + Duration::from_millis(100));
            }
            let share = pacer.rate().map_or(20_000_000, |rate| rate.min(20_000_000) - 1_000_000);
            sent = [sent[0] + share / 250, sent[1] + 1_000_000 / 250];
            let reading = |delivered, queue_delay| LinkReading {
                delivered,
                queue_delay,
                base_rtt: Duration::from_micros(50),
                backlogged: true,
            };
            pacer.observe(urgent, reading(sent[1], None), now);
            pacer.report(bulk, reading(sent[0], Some(Duration::from_millis(delay_ms))), now);
            let before = std::mem::replace(&mut told, pacer.tell(now));
            assert!(told.paced.delivered >= before.paced.delivered, "it goes back: {told:?}");
        }
        (pacer.rate(), told, sent)
    };
    // A queue that is not ours to give way to: who grants sees it.
    assert_eq!(run(Some(None), 50, 4).0, None, "any rate");
    let (rate, told, sent) = run(Some(Some(GRANTED)), 100, 4);
    let rate = rate.unwrap();
    assert!(rate.abs_diff(GRANTED + 1_000_000) < 50_000, "what is urgent comes on top: {rate}");
    assert!(told.paced.delivered.abs_diff(sent[0]) < GRANTED / 50, "{told:?} of {sent:?}");
    assert!(told.urgent_bytes.abs_diff(sent[1]) < GRANTED / 50, "{told:?} of {sent:?}");
    assert_eq!(told.paced.queue_delay, Some(Duration::from_millis(4)));
    // The last word holds for 100 ms. Then it is looked for, from there on.
    assert_eq!(run(None, 20, 4).0, Some(rate));
    let alone = run(None, 10, 0).0.unwrap();
    assert!(alone.abs_diff(rate) < rate / 20, "{alone} after {rate}");
}

//! A network on a clock that somebody else moves: each work is sent, gets there, and is acknowledged, late, at a rate,
//! in the order of its queue pair. What was sent may get there when its queue pair, or its host, is no more.

use std::time::Duration;

use super::fabric::{Fabric, Flying, Stage, host_of};
use crate::verbs::Fault;

/// How fast a network on a clock is.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    /// The least time that a packet is on its way.
    pub delay: Duration,
    /// What comes on top, at most: drawn for each work and way.
    pub jitter: Duration,
    /// Bytes/s of a queue pair; zero is unlimited.
    pub bytes_per_s: u64,
}

/// The clock.
#[derive(Debug)]
pub(super) struct Clock {
    pace: Pace,
    now: Duration,
    /// Hosts whose completion channels became readable.
    pub woken: Vec<u16>,
}

/// When a work is sent, gets there, and has ended.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Times {
    sent: Duration,
    lands: Duration,
    ends: Duration,
}

impl Clock {
    pub(super) fn new(pace: Pace) -> Self {
        Self { pace, now: Duration::ZERO, woken: Vec::new() }
    }
}

/// The next step of a pair.
#[derive(Clone, Copy)]
enum Step {
    Send,
    Land,
    End,
}

impl Fabric {
    /// When a work that is posted now behind another gets on.
    pub(super) fn times(&mut self, last: Times, bytes: usize) -> Times {
        let Some((pace, now)) = self.clock.as_ref().map(|clock| (clock.pace, clock.now)) else { return last };
        let nanos = (bytes as u64 * 1_000_000_000).checked_div(pace.bytes_per_s).unwrap_or(0);
        let mut under_way = || pace.delay + pace.jitter * self.draw(1000) as u32 / 1000;
        let sent = last.sent.max(now) + Duration::from_nanos(nanos);
        let lands = last.lands.max(sent + under_way());
        Times { sent, lands, ends: last.ends.max(lands + under_way()) }
    }

    /// What happens next, when, and to which pair.
    fn next_step(&self) -> Option<(Duration, u32, Step)> {
        let mut first: Option<(Duration, u32, Step)> = None;
        for (number, pair) in &self.pairs {
            let at = |nth: usize| pair.works.get(nth).map(|flying| flying.times);
            let (landed, sent) = (pair.landed, pair.sent);
            let steps = [
                at(0).filter(|_| landed > 0).map(|times| (times.ends, *number, Step::End)),
                at(landed).filter(|_| sent > 0).map(|times| (times.lands, *number, Step::Land)),
                at(landed + sent).map(|times| (times.sent, *number, Step::Send)),
            ];
            for step in steps.into_iter().flatten() {
                if first.is_none_or(|first| step.0 < first.0) {
                    first = Some(step);
                }
            }
        }
        first
    }

    pub(super) fn next(&self) -> Option<Duration> {
        self.next_step().map(|(at, ..)| at)
    }

    /// It is that late: what is due has happened. Appends the hosts where somebody is woken by it.
    pub(super) fn advance(&mut self, now: Duration, woken: &mut Vec<u16>) {
        let Some(mut time) = self.clock.as_ref().map(|clock| clock.now) else { return };
        while let Some((at, number, step)) = self.next_step()
            && at <= now
        {
            // What waited for another in front of it is late.
            time = time.max(at);
            match step {
                Step::Send => self.send(number),
                Step::Land => self.arrive(number, time),
                Step::End => self.acknowledge(number, time),
            }
        }
        if let Some(clock) = &mut self.clock {
            clock.now = now;
            woken.append(&mut clock.woken);
        }
    }

    /// The first work that was not sent is sent, with the bytes that are there now.
    fn send(&mut self, number: u32) {
        let Some(pair) = self.pairs.get(&number) else { return };
        let nth = pair.landed + pair.sent;
        let Some(flying) = pair.works.get(nth) else { return };
        let taken = self.take(number, &flying.work);
        if let Some(pair) = self.pairs.get_mut(&number) {
            pair.works[nth].stage = Stage::Sent(taken);
            pair.sent += 1;
        }
    }

    /// The first work that is under way gets there, or is sent again.
    fn arrive(&mut self, number: u32, now: Duration) {
        let peer = self.reached(number);
        let Some(pair) = self.pairs.get_mut(&number) else { return };
        let (failed, landed) = (pair.failed, pair.landed);
        let Some(mut flying) = pair.works.remove(landed) else { return };
        pair.sent -= 1;
        let result = match (std::mem::replace(&mut flying.stage, Stage::Posted), peer) {
            (Stage::Sent(Ok(bytes)), Some(peer)) => self.land(peer, &flying.work, &bytes),
            (Stage::Sent(Ok(bytes)), None) if !failed => {
                flying.stage = Stage::Sent(Ok(bytes));
                let Some(next) = self.again(number, &mut flying, now) else {
                    return self.put_back(number, flying, Err(Fault::RetriesExceeded));
                };
                flying.times.lands = next;
                if let Some(pair) = self.pairs.get_mut(&number) {
                    pair.works.insert(landed, flying);
                    pair.sent += 1;
                }
                return;
            }
            (Stage::Sent(Err(fault)), _) => Err(fault),
            // Whoever is in the error state sends nothing again.
            _ => Err(Fault::Flushed),
        };
        self.put_back(number, flying, result);
    }

    /// The work has landed; where its queue pair has failed, nobody hears of it.
    fn put_back(&mut self, number: u32, mut flying: Flying, result: Result<Vec<u8>, Fault>) {
        let Some(pair) = self.pairs.get_mut(&number) else { return };
        if pair.failed {
            if pair.gone && pair.works.is_empty() {
                self.pairs.remove(&number);
            }
            return;
        }
        flying.stage = Stage::Landed(result);
        flying.tries = 0;
        pair.works.insert(pair.landed, flying);
        pair.landed += 1;
    }

    /// When a packet is sent again; `None` when it was often enough.
    fn again(&self, number: u32, flying: &mut Flying, now: Duration) -> Option<Duration> {
        let (within, retries) = self.patience(number);
        flying.tries += 1;
        (flying.tries <= retries).then_some(now + within)
    }

    /// The first work that has landed comes to its end, unless its acknowledgement does not get here.
    fn acknowledge(&mut self, number: u32, now: Duration) {
        let Some(pair) = self.pairs.get(&number) else { return };
        let peer_host = pair.peer.map(|(_, gid)| host_of(gid));
        let is_cut = peer_host.is_some_and(|peer| self.is_cut(host_of(pair.gid), peer));
        let Some(pair) = self.pairs.get_mut(&number) else { return };
        let Some(mut flying) = pair.works.pop_front() else { return };
        pair.landed -= 1;
        let mut result = match std::mem::replace(&mut flying.stage, Stage::Posted) {
            Stage::Landed(result) => result,
            Stage::Posted | Stage::Sent(_) => Err(Fault::Flushed),
        };
        if is_cut && result.is_ok() {
            match self.again(number, &mut flying, now) {
                Some(next) => {
                    flying.times.ends = next;
                    flying.stage = Stage::Landed(result);
                    if let Some(pair) = self.pairs.get_mut(&number) {
                        pair.works.push_front(flying);
                        pair.landed += 1;
                    }
                    return;
                }
                None => result = Err(Fault::RetriesExceeded),
            }
        }
        self.end(number, &flying.work, result);
    }
}

//! What is lost while the source lives is sent again: the source is played, and so is how it is driven.

use std::io::Read as _;
use std::sync::mpsc::{Receiver, Sender, channel};

use libsg::source::Outcome;
use qemu_stream::{AnswerDecoder, AnswerItem, BlockIndex, Command, END_OF_STREAM, Span};

use super::test::{HUGE, PATIENCE, RAM, Source, all, byte_of, failure};
use super::*;

/// Few pages are read ahead of, so that a small VM has all that a large one has.
const LIMITS: Limits = Limits {
    window_pages: 600,
    unread_pages: 0,
    narrowed_pages: 0,
    asked_pages: 512,
    last_pages: 2,
    least_pages: 0,
};

/// What a source is told beside its stream.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Told {
    Rate(u64),
    Resume,
    Listens,
}

/// Drives nobody, and says what it was told.
pub(super) struct Driven {
    pub told: Sender<Told>,
    /// Connections over which it goes on; none: it refuses.
    pub next: Receiver<UnixStream>,
}

impl Steering for Driven {
    fn rate(&mut self, bytes_per_s: u64) -> Result<()> {
        let _ = self.told.send(Told::Rate(bytes_per_s));
        Ok(())
    }

    fn goes_on(&mut self) -> Result<()> {
        Ok(())
    }

    fn listens(&mut self) {
        let _ = self.told.send(Told::Listens);
    }

    fn resume(&mut self) -> Result<Stream> {
        let _ = self.told.send(Told::Resume);
        self.next
            .try_recv()
            .map(Stream::from)
            .map_err(|_| Error::new(ErrorKind::Vm, "QEMU refuses migrate: it does not want to"))
    }
}

/// A source that has switched and is driven, and the connection over which it goes on when it is resumed.
fn flowing(limits: Limits) -> (Source, Relay, Receiver<Told>, Option<UnixStream>) {
    let (mut source, relay) = Source::begin_with(limits);
    source.switch_with(&[
        (RAM, Span { start_bytes: 0, length_bytes: 16 << 12 }),
        (HUGE, Span { start_bytes: 0, length_bytes: 4 << 20 }),
    ]);
    relay.state(PATIENCE).expect("switches");
    let (heard, next) = drive(&relay);
    (source, relay, heard, Some(next))
}

/// Its source is driven from now on: what that is told, and the connection over which it goes on.
fn drive(relay: &Relay) -> (Receiver<Told>, UnixStream) {
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    let ((told, heard), (next, given)) = (channel(), channel());
    next.send(theirs).expect("taken");
    relay.flow(Box::new(Driven { told, next: given })).expect("flows");
    (heard, ours)
}

pub(super) fn pages(first: u32, pages: u32) -> PageRange {
    PageRange::new(PageIndex(first), pages)
}

/// Waits until these pages can be had.
fn await_pages(relay: &Relay, range: PageRange) {
    let begun = Instant::now();
    while range.iter().any(|page| relay.slice(PageRange::new(page, 1)).is_err()) {
        assert!(begun.elapsed() < PATIENCE, "{range} does not come");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// What a relay says that a block has: of pages, as many bits.
pub(super) fn received(source: &mut Source, block: BlockIndex) -> Vec<bool> {
    let mut ask = Vec::new();
    Command::ReceivedBitmap(block).encode(&source.blocks, &mut ask);
    source.say(&ask);
    let (mut decoder, mut bytes, mut bits) = (AnswerDecoder::new(), Vec::new(), Vec::new());
    loop {
        let mut byte = [0];
        source.connection.read_exact(&mut byte).expect("an answer");
        bytes.push(byte[0]);
        let Some((item, _)) = decoder.next(&source.blocks, &bytes).expect("an honest answer") else {
            continue;
        };
        match item {
            AnswerItem::Answer(answer) => assert_eq!(answer, Answer::ReceivedBitmap(block)),
            AnswerItem::BitmapBytes { bytes: range, .. } => {
                bits.extend(bytes[range].iter().flat_map(|byte| (0..8).map(move |bit| byte >> bit & 1 == 1)));
            }
            AnswerItem::BitmapEnd => return bits,
        }
        bytes.clear();
    }
}

/// The source says that it goes on, and hears that it may.
pub(super) fn goes_on(source: &mut Source) {
    let mut resume = Vec::new();
    Command::PostcopyResume.encode(&source.blocks, &mut resume);
    source.say(&resume);
    assert_eq!(source.answers(1), [AnswerItem::Answer(Answer::ResumeAck)]);
}

pub(super) fn set(bits: &[bool]) -> Vec<usize> {
    (0..bits.len()).filter(|at| bits[*at]).collect()
}

#[test]
fn what_was_lost_is_sent_again() {
    let (mut source, relay, heard, next) = flowing(LIMITS);
    assert_eq!(heard.recv().expect("told"), Told::Rate(UNLIMITED));
    source.pages(RAM, (0..8).map(|page| (page, Some(page as u8 + 1))), false);
    source.pages(HUGE, (0..512).map(|page| (page, Some(7))), false);
    await_pages(&relay, pages(0, 8));
    await_pages(&relay, pages(16, 512));
    relay.outcome(pages(0, 6), Outcome::Safe);
    relay.outcome(pages(16, 512), Outcome::Safe);
    assert!(relay.slice(pages(3, 1)).is_err(), "it was let go");
    // Half of a unit is under way when the intermediary dies that had pages 2 to 4 and the first of the units.
    source.pages(HUGE, (512..700).map(|page| (page, Some(8))), false);
    relay.want(PageIndex(12)).expect("asked");
    relay.outcome(pages(2, 3), Outcome::Lost);
    relay.outcome(pages(16, 512), Outcome::Lost);

    // Over the next connection what is safe, or here, counts as received.
    let mut source = Source { connection: next.expect("a connection"), ..source };
    assert_eq!(set(&received(&mut source, RAM)), [0, 1, 5, 6, 7]);
    assert_eq!(set(&received(&mut source, HUGE)), Vec::<usize>::new());
    goes_on(&mut source);
    let again = Answer::RequestPages { block: RAM, span: Span { start_bytes: 12 << 12, length_bytes: 4096 } };
    assert_eq!(source.answers(1), [AnswerItem::Answer(again)], "what the guest waits for is asked for again");
    assert_eq!(heard.iter().take(2).collect::<Vec<_>>(), [Told::Rate(UNLIMITED), Told::Resume]);

    let rest = [2, 3, 4].into_iter().chain(8..16);
    source.pages(RAM, rest.map(|page| (page, Some(page as u8 + 1))), false);
    source.pages(HUGE, (0..1024).map(|page| (page, Some(7 + (page / 512) as u8))), true);
    source.say(&[END_OF_STREAM]);
    await_pages(&relay, pages(2, 3));
    await_pages(&relay, pages(6, 10));
    let mut came = all(&relay);
    came.sort_unstable_by_key(|run| run.first);
    assert_eq!(
        [2, 3, 4, 6, 7, 12, 16, 527, 528, 1039].map(|page| byte_of(&relay, page)),
        [3, 4, 5, 7, 8, 13, 7, 7, 8, 8]
    );
    assert!([0, 1, 5].iter().all(|page| relay.slice(pages(*page, 1)).is_err()), "those are safe");
}

/// A source that believes that there is more when all has come says so for ever: it is told again what has come.
#[test]
fn a_source_that_has_lost_count_counts_anew() {
    let (mut source, relay, heard, next) = flowing(LIMITS);
    source.pages(RAM, (0..16).map(|page| (page, Some(1))), false);
    // Before all has come that is no sign of anything.
    (0..100).for_each(|_| source.pages(RAM, [], false));
    source.pages(HUGE, (0..1024).map(|page| (page, Some(2))), false);
    await_pages(&relay, pages(16, 1024));
    (0..100).for_each(|_| {
        let mut part = Vec::new();
        source.records.begin(false, &mut part);
        source.records.end(&mut part);
        // It is not heard to the end.
        let _ = std::io::Write::write_all(&mut source.connection, &part);
    });
    let mut source = Source { connection: next.expect("a connection"), ..source };
    assert_eq!(set(&received(&mut source, RAM)).len(), 16);
    assert_eq!(set(&received(&mut source, HUGE)).len(), 1024);
    goes_on(&mut source);
    // One more is none too many, whatever was said before.
    source.pages(RAM, [], false);
    let mut ping = Vec::new();
    Command::Ping(9).encode(&source.blocks, &mut ping);
    source.say(&ping);
    assert_eq!(source.answers(1), [AnswerItem::Answer(Answer::Pong(9))]);
    source.pages(RAM, [], true);
    source.say(&[END_OF_STREAM]);
    all(&relay);
    let told: Vec<Told> = heard.try_iter().filter(|told| !matches!(told, Told::Rate(_))).collect();
    assert_eq!((told, relay.resumed()), (vec![Told::Resume, Told::Listens], 1));
}

/// An intermediary dies with pages of a round, the only copies of some that were let go, while the source cannot be resumed: it is
/// broken off when it can be, and asked for them.
#[test]
fn what_was_lost_in_a_round_is_sent_again_behind_the_switch() {
    let (mut source, relay) = Source::begin_with(LIMITS);
    relay.manifest("web", &Devices::default(), PATIENCE).expect("begins");
    relay.begin_rounds().expect("it comes");
    source.pages(RAM, (0..8).map(|page| (page, Some(page as u8 + 1))), false);
    await_pages(&relay, pages(0, 8));
    relay.outcome(pages(0, 6), Outcome::Safe);
    assert!(relay.slice(pages(3, 1)).is_err(), "it was let go");
    relay.outcome(pages(2, 2), Outcome::Lost);
    // Nothing is broken off: the pages that the source names at the switch come over the same connection. Page 1 was written.
    relay.end_rounds();
    source.switch_with(&[
        (RAM, Span { start_bytes: 4096, length_bytes: 4096 }),
        (RAM, Span { start_bytes: 8 << 12, length_bytes: 8 << 12 }),
        (HUGE, Span { start_bytes: 0, length_bytes: 4 << 20 }),
    ]);
    relay.state(PATIENCE).expect("switches");
    let (heard, next) = drive(&relay);

    let mut source = Source { connection: next, ..source };
    assert_eq!(set(&received(&mut source, RAM)), [0, 4, 5, 6, 7]);
    assert_eq!(set(&received(&mut source, HUGE)), [0; 0]);
    goes_on(&mut source);
    let unlimited = || Told::Rate(UNLIMITED);
    assert_eq!(heard.iter().take(3).collect::<Vec<_>>(), [unlimited(), unlimited(), Told::Resume]);
    let rest = [1, 2, 3].into_iter().chain(8..16);
    source.pages(RAM, rest.map(|page| (page, Some(page as u8 + 101))), false);
    source.pages(HUGE, (0..1024).map(|page| (page, None)), true);
    source.say(&[END_OF_STREAM]);
    all(&relay);
    assert_eq!([1, 2, 3, 6, 8].map(|page| byte_of(&relay, page)), [102, 103, 104, 7, 109]);
    assert!([0, 4, 5].iter().all(|page| relay.slice(pages(*page, 1)).is_err()), "those are safe");
    assert_eq!(relay.resumed(), 1);
}

#[test]
fn what_is_lost_while_it_resumes_is_asked_for_once_more() {
    let (mut source, relay, heard, next) = flowing(LIMITS);
    source.pages(RAM, (0..8).map(|page| (page, Some(page as u8 + 1))), false);
    await_pages(&relay, pages(0, 8));
    relay.outcome(pages(0, 8), Outcome::Safe);
    relay.outcome(pages(0, 1), Outcome::Lost);
    let mut second = Source { connection: next.expect("a connection"), ..source };
    assert_eq!(set(&received(&mut second, RAM))[..3], [1, 2, 3]);
    // Another dies behind what was said: the source would not send it.
    relay.outcome(pages(5, 1), Outcome::Lost);
    goes_on(&mut second);
    let mut rest = Vec::new();
    second.connection.read_to_end(&mut rest).expect("broken off");
    assert_eq!(rest, [0; 0]);
    // There is no third connection: that is said, and what to do.
    let refused = failure(&relay);
    assert!(
        refused.chain().contains("do not end it") && refused.chain().contains("refuses"),
        "{}",
        refused.chain()
    );
    assert_eq!(heard.try_iter().filter(|told| *told == Told::Resume).count(), 2);
}

#[test]
fn a_source_that_has_said_everything_sends_nothing_again() {
    let (mut source, relay, _heard, _next) = flowing(Limits { window_pages: 2000, ..LIMITS });
    relay.outcome(pages(0, 1), Outcome::Lost);
    source.pages(RAM, (0..16).map(|page| (page, Some(1))), false);
    source.pages(HUGE, (0..1024).map(|page| (page, None)), true);
    source.say(&[END_OF_STREAM]);
    all(&relay);
    relay.outcome(pages(0, 1040), Outcome::Safe);
    relay.outcome(pages(4, 1), Outcome::Lost);
    let lost = failure(&relay);
    assert_eq!(lost.kind, ErrorKind::Lost);
    assert!(lost.message.contains("said everything"), "{}", lost.chain());
}

#[test]
fn a_source_that_does_not_send_again_what_was_lost_is_not_taken_for_one_of_zeros() {
    let (mut source, relay, _heard, next) = flowing(Limits { window_pages: 2000, ..LIMITS });
    source.pages(RAM, (0..16).map(|page| (page, Some(1))), false);
    await_pages(&relay, pages(0, 16));
    relay.outcome(pages(0, 16), Outcome::Safe);
    relay.outcome(pages(3, 2), Outcome::Lost);
    let mut source = Source { connection: next.expect("a connection"), ..source };
    received(&mut source, RAM);
    goes_on(&mut source);
    source.pages(RAM, [(3, Some(1))], false);
    source.pages(HUGE, (0..1024).map(|page| (page, None)), true);
    source.say(&[END_OF_STREAM]);
    let missing = failure(&relay);
    assert_eq!(missing.kind, ErrorKind::Protocol, "{}", missing.chain());
    assert!(relay.slice(pages(4, 1)).is_err());
}

#[test]
fn no_more_is_read_than_there_is_room_for_but_what_the_guest_waits_for() {
    let limits = Limits { window_pages: 4, ..LIMITS };
    let (mut source, relay, _heard, _next) = flowing(limits);
    source.pages(RAM, (0..14).map(|page| (page, Some(page as u8 + 1))), false);
    await_pages(&relay, pages(0, 4));
    // Where it reads on, it has by now; what came in one piece may be more than there is room for.
    std::thread::sleep(Duration::from_millis(50));
    assert!(relay.slice(pages(13, 1)).is_err(), "it is beyond the window");
    relay.want(PageIndex(13)).expect("asked");
    await_pages(&relay, pages(13, 1));
    relay.outcome(pages(0, 14), Outcome::Safe);
    source.pages(RAM, [(14, Some(1))], false);
    await_pages(&relay, pages(14, 1));
}

#[test]
fn a_source_that_is_through_is_not_broken_off() {
    let limits =
        Limits { unread_pages: 2000, narrowed_pages: 2000, window_pages: 2000, asked_pages: 2000, ..LIMITS };
    let (mut source, relay, heard, _next) = flowing(limits);
    // Guests wait for the last pages, too: all of them come before any is safe.
    source.pages(RAM, (0..16).map(|page| (page, Some(1))), false);
    source.pages(HUGE, (0..1024).map(|page| (page, Some(2))), true);
    await_pages(&relay, pages(16 + 512, 512));
    source.say(&[END_OF_STREAM]);
    all(&relay);
    assert!(heard.try_iter().all(|told| told != Told::Resume));
    relay.release(PATIENCE).expect("let go");
}

#[test]
fn the_last_pages_come_when_all_others_are_safe() {
    // It may be through with what it has from the beginning: it sends as it is asked.
    let limits =
        Limits { unread_pages: 2000, narrowed_pages: 2000, window_pages: 2000, asked_pages: 2000, ..LIMITS };
    let (mut source, relay, heard, _next) = flowing(limits);
    assert_eq!(heard.recv().expect("told"), Told::Rate(NEXT_TO_NOTHING));
    let request = |block, start_bytes, length_bytes| {
        AnswerItem::Answer(Answer::RequestPages { block, span: Span { start_bytes, length_bytes } })
    };
    // All but the last unit, in which the last two pages are.
    let (ram, huge) = (request(RAM, 0, 16 << 12), request(HUGE, 0, 2 << 20));
    assert_eq!(source.answers(3)[1..], [ram, huge]);
    source.pages(RAM, (0..16).map(|page| (page, Some(1))), false);
    source.pages(HUGE, (0..512).map(|page| (page, Some(2))), false);
    await_pages(&relay, pages(0, 16));
    await_pages(&relay, pages(16, 512));
    relay.outcome(pages(0, 16), Outcome::Safe);
    assert_eq!(heard.try_recv().ok(), None, "others are not safe");
    relay.outcome(pages(16, 512), Outcome::Safe);
    assert_eq!(heard.recv().expect("told"), Told::Rate(UNLIMITED));
    assert_eq!(source.answers(1), [request(HUGE, 2 << 20, 2 << 20)]);
    source.pages(HUGE, (512..1024).map(|page| (page, Some(3))), true);
    source.say(&[END_OF_STREAM]);
    all(&relay);
    relay.release(PATIENCE).expect("let go");
}

//! The feeder beside a destination QEMU that is played.

use std::io::Read as _;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use qemu_stream::{Block, BlockIndex, Blocks, Item, StreamDecoder};

use super::*;

const PATIENCE: Duration = Duration::from_secs(30);

/// Behind those of the other blocks, 1024 pages that are two huge ones.
const HUGE: u32 = 68;
const HUGE_BLOCK: BlockIndex = BlockIndex(2);

fn layout() -> Layout {
    let huge = Block { page_bytes: 2 << 20, ..Block::new("huge", 4 << 20) };
    let blocks = vec![Block::new("pc.ram", 64 << 12), Block::new("pc.rom", 4 << 12), huge];
    Layout::new(Blocks::new(blocks).expect("blocks"))
}

fn state() -> Vec<u8> {
    let none = Blocks::default();
    let mut state = vec![0];
    Command::PostcopyListen.encode(&none, &mut state);
    state.extend(b"devices");
    [Command::Ping(3), Command::PostcopyRun].iter().for_each(|command| command.encode(&none, &mut state));
    state
}

/// A feeder, and a destination at its other end that is played on a thread: `answer` says what is answered to each item. It
/// ends with the connection, and tells every item.
fn beside(mut answer: impl FnMut(&Item) -> Vec<Answer> + Send + 'static) -> (Feeder, JoinHandle<Vec<Item>>) {
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    let feeder = Feeder::start(theirs, of()).expect("starts");
    let played = play(ours, StreamDecoder::new(), move |item, out| {
        answer(item).iter().for_each(|answer| answer.encode(layout().blocks(), out));
    });
    (feeder, played)
}

fn of() -> (Layout, Configuration, u32) {
    (layout(), Configuration::new("pc-q35-7.2"), 2)
}

/// The other end of a connection: what is answered to each item. It ends with the connection, and tells every item.
fn play(
    mut ours: UnixStream,
    mut decoder: StreamDecoder,
    mut answer: impl FnMut(&Item, &mut Vec<u8>) + Send + 'static,
) -> JoinHandle<Vec<Item>> {
    std::thread::spawn(move || {
        let (mut bytes, mut items, mut piece) = (Vec::new(), Vec::new(), [0; 8192]);
        loop {
            while let Some((item, taken)) = decoder.next(&bytes).expect("an honest stream") {
                bytes.drain(..taken);
                let mut out = Vec::new();
                answer(&item, &mut out);
                items.push(item);
                let _ = ours.write_all(&out);
            }
            if decoder.is_over() {
                return items;
            }
            match ours.read(&mut piece) {
                Ok(0) | Err(_) => return items,
                Ok(count) => bytes.extend(&piece[..count]),
            }
        }
    })
}

/// What an honest one answers.
fn honest(item: &Item) -> Vec<Answer> {
    match item {
        Item::Command(Command::Ping(number)) => vec![Answer::Pong(*number)],
        Item::PackageBytes { left_bytes: 0, .. } => {
            let span = Span { start_bytes: 5 << 12, length_bytes: 4096 };
            vec![Answer::RequestPages { block: BlockIndex(0), span }, Answer::Pong(3)]
        }
        Item::End => vec![Answer::Shut(0)],
        _ => Vec::new(),
    }
}

fn range(first: u32, pages: u32) -> PageRange {
    PageRange::new(PageIndex(first), pages)
}

/// Waits until somebody waits for a page: for this one alone.
fn await_fault(feeder: &Feeder, page: u32) {
    let (mut events, begun) = (Vec::new(), Instant::now());
    while feeder.events(&mut events).expect("alive") == 0 {
        assert!(begun.elapsed() < PATIENCE, "nobody waits for a page");
    }
    assert_eq!(events, [SinkEvent::Fault { page: PageIndex(page), write: false, thread: 0 }]);
}

#[test]
fn pages_are_in_place_when_their_ping_is_answered() {
    let (feeder, played) = beside(honest);
    let feeder = Arc::new(feeder);
    feeder.head(&state()).expect("it is the same machine");
    // What comes before the VM runs waits for that.
    let early = Arc::clone(&feeder);
    let early = std::thread::spawn(move || early.install(PageIndex(1), &[1; 2 * PAGE_BYTES]));
    feeder.run(&state()).expect("runs");
    let placed = early.join().expect("no panic").expect("placed");
    assert_eq!(placed.installed().collect::<Vec<_>>(), [range(1, 2)]);
    await_fault(&feeder, 5);
    assert_eq!(feeder.install_zero(range(63, 2)).expect("placed").installed_pages(), 2);
    assert!(feeder.install(PageIndex(HUGE + 1023), &[0; 2 * PAGE_BYTES]).is_err(), "there is one page less");
    feeder.finish().expect("it has everything");
    let items = played.join().expect("an honest stream");
    let pages: Vec<_> = items
        .iter()
        .filter_map(|item| match item {
            Item::Page { block, offset_bytes, .. } => Some((block.0, offset_bytes >> 12, true)),
            Item::Zero { block, offset_bytes } => Some((block.0, offset_bytes >> 12, false)),
            _ => None,
        })
        .collect();
    assert_eq!(pages, [(0, 1, true), (0, 2, true), (0, 63, false), (1, 0, false)]);
    let forgotten = items.iter().filter(|item| matches!(item, Item::Command(Command::RamDiscard(_)))).count();
    assert_eq!(forgotten, 3, "LISTEN needs one at least");
}

/// QEMU places a huge page when its last sub-page has come, and takes nothing else between them.
#[test]
fn a_huge_page_is_one_section_of_its_pages_in_order() {
    let (feeder, played) = beside(|item| match item {
        Item::PackageBytes { left_bytes: 0, .. } => {
            let span = Span { start_bytes: 2 << 20, length_bytes: 2 << 20 };
            vec![Answer::RequestPages { block: HUGE_BLOCK, span }, Answer::Pong(3)]
        }
        item => honest(item),
    });
    feeder.head(&state()).expect("it is the same machine");
    feeder.run(&state()).expect("runs");
    let waited_for = PageIndex(HUGE + 512);
    await_fault(&feeder, waited_for.0);
    let bytes = vec![7; 512 * PAGE_BYTES];
    // Beside it somebody gives other pages.
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for page in 0..64 {
                let placed = feeder.install(PageIndex(page), &[1; PAGE_BYTES]).expect("placed");
                assert_eq!(placed.installed_pages(), 1);
            }
        });
        assert_eq!(feeder.install(waited_for, &bytes).expect("placed").installed_pages(), 512);
        assert_eq!(feeder.install_zero(range(HUGE, 512)).expect("placed").installed_pages(), 512);
    });
    feeder.finish().expect("it has everything");
    let items = played.join().expect("an honest stream");
    let mut units = Vec::new();
    for section in items.split(|item| matches!(item, Item::PartBegins { .. })) {
        let pages: Vec<_> = section
            .iter()
            .filter_map(|item| match item {
                Item::Page { block, offset_bytes, .. } => Some((*block, offset_bytes >> 12, true)),
                Item::Zero { block, offset_bytes } => Some((*block, offset_bytes >> 12, false)),
                _ => None,
            })
            .collect();
        if let Some((HUGE_BLOCK, first, has_bytes)) = pages.first().copied() {
            let unit: Vec<_> = (first..first + 512).map(|page| (HUGE_BLOCK, page, has_bytes)).collect();
            assert_eq!(pages, unit);
            units.push((first, has_bytes));
        }
    }
    assert_eq!(units, [(512, true), (0, false)]);
}

#[test]
fn a_destination_that_is_gone_or_fails_is_told() {
    // It hangs up at the head: it is another machine.
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    let feeder = Feeder::start(theirs, of()).expect("starts");
    drop(ours);
    let refused = feeder.head(&state()).expect_err("nobody is there");
    assert!(refused.kind == ErrorKind::Vm && refused.message.contains("machine type"), "{refused}");
    assert_eq!(feeder.events(&mut Vec::new()).expect("nothing runs yet"), 0);
    feeder.finish().expect("there is nothing to end");
    // It fails at its end.
    let (feeder, played) = beside(|item| match item {
        Item::End => vec![Answer::Shut(1)],
        item => honest(item),
    });
    feeder.head(&state()).expect("it is the same machine");
    feeder.run(&state()).expect("runs");
    assert_eq!(feeder.finish().expect_err("it failed").kind, ErrorKind::Vm);
    played.join().expect("an honest stream");
    // What is lost is no zero: the stream does not end.
    let (feeder, played) = beside(honest);
    feeder.head(&state()).expect("it is the same machine");
    feeder.run(&state()).expect("runs");
    feeder.poison(range(7, 1)).expect("noted");
    feeder.finish().expect("left as it is");
    feeder.hang_up();
    assert!(!played.join().expect("an honest stream").contains(&Item::End));
    assert!(feeder.install(PageIndex(0), &[1; PAGE_BYTES]).is_err());
}

#[test]
fn answers_that_cannot_be_end_it() {
    let (mut ours, theirs) = UnixStream::pair().expect("a pair");
    let feeder = Feeder::start(theirs, of()).expect("starts");
    ours.write_all(&[0, 9, 0, 0]).expect("written");
    let refused = feeder.head(&state()).expect_err("it is no QEMU");
    let cause = std::error::Error::source(&refused).expect("a cause").to_string();
    assert!(cause.contains("answers what cannot be"), "{cause}");
    for wrong in [&[][..], &[2, 1], &[0, 1, 2, 3]] {
        assert_eq!(feeder.head(wrong).expect_err("no state").kind, ErrorKind::Input, "{wrong:?}");
    }
}

/// What a destination that goes on says of a block: which of its pages are among these.
fn bitmap(block: BlockIndex, has: &[PageRange], out: &mut Vec<u8>) {
    let layout = layout();
    Answer::ReceivedBitmap(block).encode(layout.blocks(), out);
    let of = layout.blocks().get(block).expect("a block");
    let mut bits = vec![0_u8; Answer::bitmap_bytes(of) as usize];
    let places = has.iter().flat_map(|run| run.iter()).filter_map(|page| layout.place(page));
    for (_, offset) in places.filter(|(there, _)| *there == block) {
        bits[(offset >> 15) as usize] |= 1 << (offset >> 12 & 7);
    }
    out.extend(bits);
    Answer::encode_bitmap_end(out);
}

/// A feeder that goes on with a destination that is played, and has these pages.
fn recovering(
    has: Vec<PageRange>,
    mut answer: impl FnMut(&Item, &mut Vec<u8>) + Send + 'static,
) -> (Result<Feeder>, JoinHandle<Vec<Item>>) {
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    let decoder = StreamDecoder::recovering(layout().blocks().clone(), 2);
    let played = play(ours, decoder, move |item, out| match item {
        Item::Command(Command::ReceivedBitmap(block)) => bitmap(*block, &has, out),
        item => answer(item, out),
    });
    (Feeder::recover(theirs, of()), played)
}

#[test]
fn a_destination_that_lost_its_feeder_says_what_it_has_and_gets_the_rest() {
    let (feeder, played) = recovering(vec![range(0, 2), range(7, 2), range(63, 1)], |item, out| {
        let answers = match item {
            // It asks again for what it waits for.
            Item::Command(Command::PostcopyResume) => {
                let span = Span { start_bytes: 9 << 12, length_bytes: 4096 };
                vec![Answer::ResumeAck, Answer::RequestPages { block: BlockIndex(0), span }]
            }
            item => honest(item),
        };
        answers.iter().for_each(|answer| answer.encode(layout().blocks(), out));
    });
    let feeder = feeder.expect("goes on");
    let mut there = Vec::new();
    feeder.in_place(&mut |range| there.push(range));
    assert_eq!(there, [range(0, 2), range(7, 2), range(63, 1)]);
    await_fault(&feeder, 9);
    assert_eq!(feeder.install(PageIndex(9), &[1; PAGE_BYTES]).expect("placed").installed_pages(), 1);
    feeder.finish().expect("it has everything");
    let items = played.join().expect("an honest stream");
    let begins = [0, 1, 2].map(|block| Command::ReceivedBitmap(BlockIndex(block)));
    let begins = begins.into_iter().chain([Command::PostcopyResume]).map(Item::Command);
    assert_eq!(items[..4], begins.collect::<Vec<_>>()[..], "nothing is asked for twice, or said before");
    assert_eq!(items.last(), Some(&Item::End));
}

#[test]
fn a_destination_that_lost_its_feeder_says_which_huge_pages_it_has() {
    // The last of the pages before, and the second huge one.
    let has = [range(HUGE - 1, 1), range(HUGE + 512, 512)];
    let (feeder, played) = recovering(has.to_vec(), |item, out| {
        let answers = match item {
            Item::Command(Command::PostcopyResume) => {
                let span = Span { start_bytes: 0, length_bytes: 2 << 20 };
                vec![Answer::ResumeAck, Answer::RequestPages { block: HUGE_BLOCK, span }]
            }
            item => honest(item),
        };
        answers.iter().for_each(|answer| answer.encode(layout().blocks(), out));
    });
    let feeder = feeder.expect("goes on");
    let mut there = Vec::new();
    feeder.in_place(&mut |range| there.push(range));
    assert_eq!(there, has);
    await_fault(&feeder, HUGE);
    let bytes = vec![1; 512 * PAGE_BYTES];
    assert_eq!(feeder.install(PageIndex(HUGE), &bytes).expect("placed").installed_pages(), 512);
    feeder.finish().expect("it has everything");
    played.join().expect("an honest stream");
}

#[test]
fn a_destination_that_does_not_go_on_is_told() {
    // It hangs up instead of going on.
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    drop(ours);
    let refused = Feeder::recover(theirs, of()).err().expect("nobody is there");
    assert_eq!(refused.kind, ErrorKind::Vm, "{refused}");
    for wrong in [
        // A bitmap that was not asked for, of the block that was told already.
        &|out: &mut Vec<u8>| bitmap(BlockIndex(0), &[], out),
        // What is no bitmap's end, and another answer's number.
        &|out: &mut Vec<u8>| out.extend([0, 6, 0, 4, 0, 0, 0, 2]),
    ] as [&(dyn Fn(&mut Vec<u8>) + Sync); 2]
    {
        let (feeder, _played) = recovering(Vec::new(), move |item, out| {
            if matches!(item, Item::Command(Command::PostcopyResume)) {
                wrong(out);
            }
        });
        let refused = feeder.err().expect("it does not go on");
        let cause = std::error::Error::source(&refused).expect("a cause").to_string();
        assert!(cause.contains("cannot be") || cause.contains("not asked for"), "{cause}");
    }
}

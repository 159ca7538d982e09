//! Bytes that a QEMU 7.2.22 (Debian 12) really sent, with `-accel tcg -m 64M -nodefaults` and a guest that is only firmware.
//!
//! | file | what it is |
//! | --- | --- |
//! | `pc-7.2.stream` | a post-copy migration of `-machine pc`, from its first byte to its last, but for most pages |
//! | `q35-7.2.answers` | what the destination of a `-machine q35` answered, whole |
//! | `recovery-7.2.stream` | what the source of `-machine pc` sent after a break, but for most pages |
//! | `recovery-7.2.answers` | what its destination answered, whole |
//!
//! Of the pages only some are kept: what the others hold is firmware, and belongs to who wrote it.

mod common;

use common::{Seen, read, read_answers, write, write_answers};
use qemu_stream::{
    Answer, AnswerItem, Block, BlockIndex, Blocks, Command, Configuration, Discard, Item, Package, Span,
    StreamDecoder,
};

const STREAM: &[u8] = include_bytes!("golden/pc-7.2.stream");
const ANSWERS: &[u8] = include_bytes!("golden/q35-7.2.answers");
const RESUMED: &[u8] = include_bytes!("golden/recovery-7.2.stream");
const RESUMED_ANSWERS: &[u8] = include_bytes!("golden/recovery-7.2.answers");

/// What both machines have.
fn blocks() -> Blocks {
    Blocks::new(vec![
        Block::new("pc.ram", 64 << 20),
        Block::new("/rom@etc/acpi/tables", 128 << 10),
        Block::new("pc.bios", 256 << 10),
        Block::new("pc.rom", 128 << 10),
        Block::new("/rom@etc/table-loader", 4 << 10),
        Block::new("/rom@etc/acpi/rsdp", 4 << 10),
    ])
    .expect("blocks")
}

fn zero(block: u16, offset_bytes: u64) -> Item {
    Item::Zero { block: BlockIndex(block), offset_bytes }
}

#[test]
fn a_post_copy_migration() {
    let mut decoder = StreamDecoder::new();
    let (seen, error) = read(&mut decoder, STREAM, STREAM.len());
    assert_eq!(error, None);
    assert!(decoder.is_over());
    assert_eq!((decoder.section(), decoder.blocks()), (2, &blocks()));

    let mut expected = vec![
        Item::Configuration(Configuration::new("pc-i440fx-7.2")),
        Item::Command(Command::OpenReturnPath),
        Item::Command(Command::Ping(1)),
        Item::Command(Command::PostcopyAdvise { page_sizes: 4096 }),
        Item::Start,
    ];
    for (block, length_bytes) in blocks().iter().map(|(index, block)| (index, block.length_bytes)) {
        let spans = vec![Span { start_bytes: 0, length_bytes }];
        expected.push(Item::Command(Command::RamDiscard(Discard { block, spans })));
    }
    expected.extend([
        Item::Command(Command::Ping(2)),
        Item::Command(Command::Packaged { length_bytes: 12_907 }),
        Item::PackageBytes { bytes: 0..0, left_bytes: 0 },
        Item::Command(Command::Ping(4)),
        Item::PartBegins { last: false },
        Item::Page { block: BlockIndex(0), offset_bytes: 0, bytes: 0..0 },
        zero(0, 0x1000),
        zero(0, 0x2000),
        zero(0, 0x3000),
        zero(3, 0),
        zero(3, 0x1000),
        zero(3, 0x2000),
        Item::PartEnds { last: false },
        Item::PartBegins { last: true },
        Item::PartEnds { last: true },
        Item::End,
    ]);
    let items: Vec<_> = seen.iter().map(|seen| seen.item.clone()).collect();
    assert_eq!(items, expected);

    let of =
        |wanted: fn(&Item) -> bool| &seen.iter().find(|seen| wanted(&seen.item)).expect("it is there").bytes;
    let package = of(|item| matches!(item, Item::PackageBytes { .. }));
    assert_eq!(Package::inspect(package), Ok(Package { loaded: 3, awaited: None }));
    // The vectors of interrupts, as the firmware has left them.
    let page = of(|item| matches!(item, Item::Page { .. }));
    assert_eq!((page.len(), &page[..4]), (4096, &[0x53, 0xff, 0x00, 0xf0][..]));
    assert_eq!(write(&blocks(), 2, &seen), STREAM);
}

#[test]
fn in_pieces_it_is_the_same() {
    let whole = read(&mut StreamDecoder::new(), STREAM, STREAM.len());
    for piece in [1, 7, 64, 4096] {
        assert_eq!(read(&mut StreamDecoder::new(), STREAM, piece), whole, "{piece}");
    }
}

#[test]
fn cut_short_it_is_not_over() {
    for length in 0..STREAM.len() {
        let mut decoder = StreamDecoder::new();
        let (_, error) = read(&mut decoder, &STREAM[..length], length.max(1));
        assert_eq!(error, None, "{length}");
        assert!(!decoder.is_over(), "{length}");
    }
}

#[test]
fn answers() {
    let (seen, error) = read_answers(&blocks(), ANSWERS, 5);
    assert_eq!(error, None);
    let span = Span { start_bytes: 0xc_0000, length_bytes: 4096 };
    let expected = [
        Answer::Pong(1),
        Answer::Pong(2),
        Answer::Pong(4),
        Answer::RequestPages { block: BlockIndex(0), span },
        Answer::Pong(3),
        Answer::Shut(0),
    ];
    let items: Vec<_> = seen.iter().map(|seen| seen.item.clone()).collect();
    assert_eq!(items, expected.map(AnswerItem::Answer));
    assert_eq!(write_answers(&blocks(), &seen), ANSWERS);
}

#[test]
fn after_a_break() {
    let mut decoder = StreamDecoder::recovering(blocks(), 2);
    let (seen, error) = read(&mut decoder, RESUMED, 9);
    assert_eq!(error, None);
    assert!(decoder.is_over());
    let mut expected: Vec<Item> =
        blocks().iter().map(|(block, _)| Item::Command(Command::ReceivedBitmap(block))).collect();
    expected.extend([
        Item::Command(Command::PostcopyResume),
        Item::PartBegins { last: false },
        zero(3, 0),
        zero(3, 0x1000),
        zero(3, 0x2000),
        Item::PartEnds { last: false },
        Item::PartBegins { last: true },
        Item::PartEnds { last: true },
        Item::End,
    ]);
    let items: Vec<_> = seen.iter().map(|seen| seen.item.clone()).collect();
    assert_eq!(items, expected);
    assert_eq!(write(&blocks(), 2, &seen), RESUMED);
}

#[test]
fn answers_after_a_break() {
    let (seen, error) = read_answers(&blocks(), RESUMED_ANSWERS, 100);
    assert_eq!(error, None);
    let mut received = Vec::new();
    for (index, _) in blocks().iter() {
        let at = seen.iter().position(|it| it.item == AnswerItem::Answer(Answer::ReceivedBitmap(index)));
        let Seen { item, bytes } = &seen[at.expect("it was asked for") + 1];
        assert!(matches!(item, AnswerItem::BitmapBytes { left_bytes: 0, .. }), "{item:?}");
        received.push(bytes.iter().map(|byte| byte.count_ones()).sum::<u32>());
    }
    // The break came when all of pc.ram was there and nothing of the last blocks.
    assert_eq!((received[0], &received[3..]), (16_384, &[0, 0, 0][..]));
    let last: Vec<_> = seen.iter().rev().take(2).map(|seen| seen.item.clone()).collect();
    assert_eq!(last, [Answer::Shut(0), Answer::ResumeAck].map(AnswerItem::Answer));
    assert_eq!(write_answers(&blocks(), &seen), RESUMED_ANSWERS);
}

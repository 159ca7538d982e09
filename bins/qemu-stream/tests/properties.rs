//! Whatever stream is written is read the same, in whatever pieces it comes; and what is not one is refused by name.

mod common;

use common::{Seen, read, read_answers, write, write_answers};
use proptest::prelude::*;
use qemu_stream::{
    Answer, AnswerItem, Block, BlockIndex, Blocks, Command, Configuration, Discard, Item, Span,
    StreamDecoder, StreamErrorKind, Unsupported, limits,
};

fn any_blocks() -> impl Strategy<Value = Blocks> {
    let block = ("[ -~]{1,255}", 1_u64..64, prop_oneof![Just(12_u32), Just(21), Just(30)]);
    prop::collection::vec(block, 1..20).prop_map(|blocks| {
        let block = |(at, (name, pages, shift)): (usize, (String, u64, u32))| {
            let name: String = format!("{at}{name}").chars().take(limits::NAME_BYTES_MAX).collect();
            Block { page_bytes: 1 << shift, ..Block::new(&name, pages << shift) }
        };
        Blocks::new(blocks.into_iter().enumerate().map(block).collect()).expect("blocks")
    })
}

/// A block, and a page in it.
fn page_of(blocks: &Blocks, block: prop::sample::Index, page: prop::sample::Index) -> (BlockIndex, u64) {
    let index = BlockIndex(block.index(blocks.iter().count()) as u16);
    let pages = blocks.get(index).expect("a block").length_bytes >> 12;
    (index, (page.index(pages as usize) as u64) << 12)
}

type Pages = Vec<(prop::sample::Index, prop::sample::Index, Option<u8>)>;

fn any_pages() -> impl Strategy<Value = Vec<Pages>> {
    let page = (any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<Option<u8>>());
    prop::collection::vec(prop::collection::vec(page, 0..12), 0..4)
}

fn said(item: Item) -> Seen<Item> {
    Seen { item, bytes: Vec::new() }
}

fn parts(blocks: &Blocks, parts: &[Pages], end: bool) -> Vec<Seen<Item>> {
    let mut seen = Vec::new();
    for (at, pages) in parts.iter().enumerate() {
        let last = end && at + 1 == parts.len();
        seen.push(said(Item::PartBegins { last }));
        for (block, page, fill) in pages {
            let (block, offset_bytes) = page_of(blocks, *block, *page);
            seen.push(match fill {
                Some(fill) => {
                    Seen { item: Item::Page { block, offset_bytes, bytes: 0..0 }, bytes: vec![*fill; 4096] }
                }
                None => said(Item::Zero { block, offset_bytes }),
            });
        }
        seen.push(said(Item::PartEnds { last }));
    }
    seen
}

fn whole(
    blocks: &Blocks,
    uuid: Option<[u8; 16]>,
    before: &[Pages],
    after: &[Pages],
    package: Vec<u8>,
) -> Vec<Seen<Item>> {
    let mut seen: Vec<Seen<Item>> = [
        Item::Configuration(Configuration { uuid, ..Configuration::new("pc-q35-7.2") }),
        Item::Command(Command::OpenReturnPath),
        Item::Command(Command::Ping(1)),
        Item::Command(Command::PostcopyAdvise { page_sizes: blocks.page_sizes() }),
        Item::Start,
    ]
    .map(said)
    .into();
    seen.extend(parts(blocks, before, false));
    for (block, it) in blocks.iter() {
        let spans =
            vec![Span { start_bytes: 0, length_bytes: it.length_bytes }; 1 + usize::from(block.0 % 12)];
        seen.push(said(Item::Command(Command::RamDiscard(Discard { block, spans }))));
    }
    seen.push(said(Item::Command(Command::Packaged { length_bytes: package.len() as u32 })));
    seen.push(Seen { item: Item::PackageBytes { bytes: 0..0, left_bytes: 0 }, bytes: package });
    if after.is_empty() {
        return seen;
    }
    seen.extend(parts(blocks, after, true));
    seen.push(said(Item::End));
    seen
}

proptest! {
    #[test]
    fn what_is_written_is_read(
        blocks in any_blocks(),
        uuid in any::<Option<[u8; 16]>>(),
        before in any_pages(),
        after in any_pages(),
        package in prop::collection::vec(any::<u8>(), 1..3000),
        section in any::<u32>(),
        piece in 1_usize..9000,
    ) {
        let written = whole(&blocks, uuid, &before, &after, package);
        let stream = write(&blocks, section, &written);
        let mut decoder = StreamDecoder::new();
        prop_assert_eq!(read(&mut decoder, &stream, piece), (written, None));
        prop_assert_eq!(decoder.is_over(), !after.is_empty());
        prop_assert_eq!((decoder.section(), decoder.blocks()), (section, &blocks));
    }

    #[test]
    fn after_a_break_too(blocks in any_blocks(), after in any_pages(), piece in 1_usize..9000) {
        let mut written: Vec<_> =
            blocks.iter().map(|(block, _)| said(Item::Command(Command::ReceivedBitmap(block)))).collect();
        written.push(said(Item::Command(Command::PostcopyResume)));
        written.extend(parts(&blocks, &after, true));
        let stream = write(&blocks, 7, &written);
        prop_assert_eq!(read(&mut StreamDecoder::recovering(blocks, 7), &stream, piece), (written, None));
    }

    #[test]
    fn answers_that_are_written_are_read(
        blocks in any_blocks(),
        wishes in prop::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>()), 0..20),
        number in any::<u32>(),
        piece in 1_usize..3000,
    ) {
        let mut written = Vec::new();
        let mut say = |item, bytes| written.push(Seen { item, bytes });
        say(AnswerItem::Answer(Answer::Pong(number)), Vec::new());
        for (block, page) in wishes {
            let (block, offset) = page_of(&blocks, block, page);
            let length_bytes = blocks.get(block).expect("a block").page_bytes;
            let span = Span { start_bytes: offset & !(length_bytes - 1), length_bytes };
            say(AnswerItem::Answer(Answer::RequestPages { block, span }), Vec::new());
        }
        for (index, block) in blocks.iter().filter(|(_, block)| block.length_bytes < 1 << 30) {
            say(AnswerItem::Answer(Answer::ReceivedBitmap(index)), Vec::new());
            let bitmap = vec![number as u8; Answer::bitmap_bytes(block) as usize];
            say(AnswerItem::BitmapBytes { bytes: 0..0, left_bytes: 0 }, bitmap);
            say(AnswerItem::BitmapEnd, Vec::new());
        }
        for last in [Answer::ResumeAck, Answer::SwitchoverAck, Answer::Shut(number)] {
            say(AnswerItem::Answer(last), Vec::new());
        }
        let answers = write_answers(&blocks, &written);
        prop_assert_eq!(read_answers(&blocks, &answers, piece), (written, None));
    }
}

const RAM: &str = "pc.ram";

fn small() -> Blocks {
    Blocks::new(vec![Block::new(RAM, 1 << 20)]).expect("blocks")
}

/// A stream up to the memory's first section, and `behind` it.
fn behind_start(behind: &[u8]) -> Vec<u8> {
    let items = whole(&small(), None, &[], &[], vec![1]);
    let mut stream = write(&small(), 2, &items[..5]);
    stream.extend(behind);
    stream
}

/// One behind the package.
fn behind_package(behind: &[u8]) -> Vec<u8> {
    let mut stream = write(&small(), 2, &whole(&small(), None, &[], &[], vec![1]));
    stream.extend(behind);
    stream
}

fn refusal(stream: &[u8]) -> StreamErrorKind {
    let (_, error) = read(&mut StreamDecoder::new(), stream, stream.len());
    error.expect("it is refused").kind
}

fn named(kind: u8, name: &str) -> Vec<u8> {
    [&[kind, 0, 0, 0, 9, name.len() as u8], name.as_bytes(), &[0; 12]].concat()
}

fn in_part(word: u64) -> Vec<u8> {
    let record = [&word.to_be_bytes()[..], &[6], RAM.as_bytes(), &[0]].concat();
    behind_start(&[&[2, 0, 0, 0, 2][..], &record].concat())
}

#[test]
fn what_capabilities_and_devices_bring_is_refused_by_name() {
    let section = |name: &str| StreamErrorKind::Unsupported(Unsupported::Section(name.into()));
    let capability = |name| StreamErrorKind::Unsupported(Unsupported::Capability(name));
    assert_eq!(refusal(&behind_start(&named(1, "dirty-bitmap"))), section("dirty-bitmap"));
    assert_eq!(refusal(&behind_start(&named(1, "0000:00:03.0/vfio"))), section("0000:00:03.0/vfio"));
    assert_eq!(refusal(&behind_start(&named(4, "virtio-mem-early"))), section("virtio-mem-early"));
    assert_eq!(refusal(&in_part(0x40)), capability("xbzrle"));
    assert_eq!(refusal(&in_part(0x80)), capability("rdma-pin-all"));
    assert_eq!(refusal(&in_part(0x100)), capability("compress"));
    assert_eq!(refusal(&in_part(0x200)), capability("multifd"));
    assert_eq!(refusal(&behind_start(&[8, 0, 8, 0, 0])), capability("x-colo"));
    assert_eq!(
        refusal(&behind_start(&[3, 0, 0, 0, 2])),
        StreamErrorKind::Unsupported(Unsupported::FinishedInPreCopy)
    );
    let text = refusal(&in_part(0x200)).to_string();
    assert!(text.contains("multifd") && text.contains("migrate-set-capabilities"), "{text}");

    let mut configuration = Vec::new();
    Configuration::new("pc").encode(&mut configuration);
    let name = "configuration/capabilities";
    configuration.extend([&[5, name.len() as u8], name.as_bytes(), &[0, 0, 0, 1, 0, 0, 0, 1]].concat());
    configuration.extend(b"\x0fx-ignore-shared");
    let named = StreamErrorKind::Unsupported(Unsupported::Named("x-ignore-shared".into()));
    assert_eq!(refusal(&configuration), named);
    assert_eq!(refusal(b"QEVM\0\0\0\x03\x08"), StreamErrorKind::Unsupported(Unsupported::OldMachine));
    let advise = [&configuration[..15], &[8, 0, 3, 0, 0]].concat();
    assert_eq!(refusal(&advise), capability("dirty-bitmaps"));
}

#[test]
fn what_is_out_of_bounds_is_refused_before_it_has_come() {
    let bounds = |kind: &StreamErrorKind| matches!(kind, StreamErrorKind::Bounds { .. });
    // A machine's name of 4 GiB, a package of 4 GiB, a command longer than any, a table of blocks of 16 EiB.
    for stream in [
        b"QEVM\0\0\0\x03\x07\xff\xff\xff\xff".to_vec(),
        behind_start(&[8, 0, 7, 0, 4, 0xff, 0xff, 0xff, 0xff]),
        behind_start(&[8, 0, 6, 0xff, 0xff]),
        behind_start(&[8, 0, 2, 0, 5]),
        {
            let items = whole(&small(), None, &[], &[], vec![1]);
            let mut stream = write(&small(), 2, &items[..4]);
            stream.extend([&[1, 0, 0, 0, 2, 3], &b"ram"[..], &[0, 0, 0, 0, 0, 0, 0, 4]].concat());
            stream.extend((u64::MAX << 12 | 4).to_be_bytes());
            stream.extend([&[1, b'x'], &(u64::MAX << 12).to_be_bytes()[..], &[0xff; 8]].concat());
            stream
        },
        // A page outside its block; a page filled with something.
        in_part(0x10_0000 | 2),
        {
            let mut stream = in_part(2);
            *stream.last_mut().expect("bytes") = 1;
            stream
        },
    ] {
        let kind = refusal(&stream);
        assert!(bounds(&kind), "{kind:?}");
    }
}

#[test]
fn what_is_not_known_or_out_of_order_is_refused() {
    use StreamErrorKind::{Block, Magic, Order, Unknown, Version};
    assert_eq!(refusal(b"HTTP/1.1 200 OK"), Magic(u32::from_be_bytes(*b"HTTP")));
    assert_eq!(refusal(b"QEVM\0\0\0\x02"), Version("the stream", 2));
    assert_eq!(refusal(&behind_start(&[8, 0, 12, 0, 0])), Unknown("command", 12));
    assert_eq!(refusal(&behind_start(&[9])), Unknown("kind of section", 9));
    assert_eq!(refusal(&behind_start(&[2, 0, 0, 0, 3])), Unknown("section", 3));
    assert_eq!(refusal(&in_part(1)), Unknown("record of a page", 1));
    assert_eq!(refusal(&in_part(0x0a)), Unknown("record of a page", 0x0a));
    assert!(matches!(refusal(&in_part(0x22)), Order(_)));
    assert!(matches!(refusal(&behind_start(&[0])), Order(_)));
    // LISTEN and RUN outside of a package, a second package, pages to forget behind it, a resume where nothing broke.
    assert!(matches!(refusal(&behind_start(&[8, 0, 4, 0, 0])), Order(_)));
    assert!(matches!(refusal(&behind_start(&[8, 0, 5, 0, 0])), Order(_)));
    assert!(matches!(refusal(&behind_start(&[8, 0, 9, 0, 0])), Order(_)));
    assert!(matches!(refusal(&behind_package(&[8, 0, 7, 0, 4, 0, 0, 0, 1])), Order(_)));
    let mut discard = Vec::new();
    let spans = vec![Span { start_bytes: 0, length_bytes: 4096 }];
    Command::RamDiscard(Discard { block: BlockIndex(0), spans }).encode(&small(), &mut discard);
    assert!(matches!(refusal(&behind_package(&discard)), Order(_)));
    let end = [&[3, 0, 0, 0, 2], &0x10_u64.to_be_bytes()[..], &[0x7e, 0, 0, 0, 2, 0]].concat();
    assert!(matches!(refusal(&behind_package(&[&end[..], &[6]].concat())), Order(_)));
    let mut wrong = behind_start(&[2, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 2, 2]);
    wrong.extend(b"no\0");
    assert_eq!(refusal(&wrong), Block("no".into()));
    // Without the capability at the source the table of blocks would mean something else.
    let items = whole(&small(), None, &[], &[], vec![1]);
    let without: Vec<_> = items
        .iter()
        .filter(|seen| !matches!(seen.item, Item::Command(Command::PostcopyAdvise { .. })))
        .cloned()
        .collect();
    assert!(matches!(refusal(&write(&small(), 2, &without)), Order(_)));
}

#[test]
fn answers_of_no_honest_destination_are_refused() {
    let refusal =
        |answers: &[u8]| read_answers(&small(), answers, answers.len()).1.expect("it is refused").kind;
    let request = |start: u64, length: u32, name: &[u8]| {
        let length_of = (13 + name.len()) as u8;
        [&[0, 3, 0, length_of], &start.to_be_bytes()[..], &length.to_be_bytes(), &[name.len() as u8], name]
            .concat()
    };
    assert_eq!(refusal(&[0, 9, 0, 0]), StreamErrorKind::Unknown("answer", 9));
    assert_eq!(refusal(&request(0, 4096, b"no")), StreamErrorKind::Block("no".into()));
    for (start, length) in [(1, 4096), (0, 4095), (0, 0), (1 << 20, 4096), (u64::MAX << 12, 8192)] {
        let kind = refusal(&request(start, length, RAM.as_bytes()));
        assert!(matches!(kind, StreamErrorKind::Bounds { .. }), "{start:#x} {length}: {kind:?}");
    }
    // The same block as before, where nothing came before; a byte behind SHUT; a long bitmap; a bitmap that does not end.
    assert!(matches!(
        refusal(&[&[0, 4, 0, 12][..], &[0; 10], &[0x10, 0]].concat()),
        StreamErrorKind::Order(_)
    ));
    assert!(matches!(refusal(&[0, 1, 0, 4, 0, 0, 0, 0, 0]), StreamErrorKind::Order(_)));
    let bitmap = |bytes: u64| [&[0, 5, 0, 7, 6], RAM.as_bytes(), &bytes.to_be_bytes()].concat();
    assert!(matches!(refusal(&bitmap(1 << 60)), StreamErrorKind::Bounds { .. }));
    let ended = [bitmap(32), vec![0; 40]].concat();
    assert_eq!(refusal(&ended), StreamErrorKind::Unknown("end of a bitmap", 0));
}

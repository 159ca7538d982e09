//! The relay beside a source QEMU that is played: one that says what a real one does, and some that do not.

use std::io::{Read as _, Write as _};
use std::time::Duration;

use qemu_stream::{
    AnswerDecoder, AnswerItem, Block, BlockIndex, Command, Configuration, Discard, END_OF_STREAM, Records,
    Span,
};

use super::*;

pub(super) const PATIENCE: Duration = Duration::from_secs(30);
pub(super) const RAM: BlockIndex = BlockIndex(0);
pub(super) const HUGE: BlockIndex = BlockIndex(1);

pub(super) fn blocks() -> Blocks {
    let huge = Block { page_bytes: 2 << 20, ..Block::new("huge", 4 << 20) };
    Blocks::new(vec![Block::new("pc.ram", 16 << 12), huge]).expect("blocks")
}

/// A source that is played, at the other end of a relay.
pub(super) struct Source {
    pub(super) connection: UnixStream,
    pub(super) records: Records,
    pub(super) blocks: Blocks,
}

impl Source {
    /// One that has begun.
    fn begin() -> (Self, Relay) {
        Self::begin_with(Limits::of_window(256 << 20))
    }

    /// One whose relay has these limits.
    pub(super) fn begin_with(limits: Limits) -> (Self, Relay) {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let mut source = Self { connection: ours, records: Records::new(2), blocks: blocks() };
        let mut head = Vec::new();
        Configuration::new("pc-q35-7.2").encode(&mut head);
        Command::OpenReturnPath.encode(&source.blocks, &mut head);
        Command::Ping(1).encode(&source.blocks, &mut head);
        Command::PostcopyAdvise { page_sizes: source.blocks.page_sizes() }.encode(&source.blocks, &mut head);
        source.blocks.encode(2, &mut head);
        source.say(&head);
        (source, Relay::start(theirs, limits).expect("reads"))
    }

    pub(super) fn say(&mut self, bytes: &[u8]) {
        self.connection.write_all(bytes).expect("written");
    }

    /// A section of pages: each full of the byte beside it, or of zeros.
    pub(super) fn pages(
        &mut self,
        block: BlockIndex,
        pages: impl IntoIterator<Item = (u64, Option<u8>)>,
        last: bool,
    ) {
        let mut out = Vec::new();
        self.records.begin(last, &mut out);
        for (page, fill) in pages {
            match fill {
                Some(fill) => {
                    self.records.page(&self.blocks, block, page << 12, &mut out);
                    out.extend([fill; 4096]);
                }
                None => self.records.zero(&self.blocks, block, page << 12, &mut out),
            }
        }
        self.records.end(&mut out);
        self.say(&out);
    }

    fn switch(&mut self, forget: Span) {
        self.switch_with(&[(RAM, forget)]);
    }

    /// The switch: these parts of blocks are to come.
    pub(super) fn switch_with(&mut self, forget: &[(BlockIndex, Span)]) {
        let none = Blocks::default();
        let mut package = Vec::new();
        Command::PostcopyListen.encode(&none, &mut package);
        package.extend(b"devices");
        [Command::Ping(3), Command::Ping(0x42), Command::PostcopyRun]
            .iter()
            .for_each(|it| it.encode(&none, &mut package));
        let mut out = Vec::new();
        Command::SwitchoverStart.encode(&self.blocks, &mut out);
        for (block, span) in forget {
            Command::RamDiscard(Discard { block: *block, spans: vec![*span] }).encode(&self.blocks, &mut out);
        }
        Command::Packaged { length_bytes: package.len() as u32 }.encode(&self.blocks, &mut out);
        out.extend(package);
        self.say(&out);
    }

    /// So many answers of the relay.
    pub(super) fn answers(&mut self, count: usize) -> Vec<AnswerItem> {
        let (mut decoder, mut bytes, mut answers) = (AnswerDecoder::new(), Vec::new(), Vec::new());
        while answers.len() < count {
            let mut byte = [0];
            self.connection.read_exact(&mut byte).expect("an answer");
            bytes.push(byte[0]);
            if let Some((item, _)) = decoder.next(&self.blocks, &bytes).expect("an honest answer") {
                answers.push(item);
                bytes.clear();
            }
        }
        answers
    }
}

/// Everything that can be had, once there is nothing more to come.
pub(super) fn all(relay: &Relay) -> Vec<PageRange> {
    let (mut runs, begun) = (Vec::new(), Instant::now());
    while relay.available(&mut runs).expect("no failure") == Supply::More {
        assert!(begun.elapsed() < PATIENCE, "{runs:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
    runs
}

/// The error that a relay ends with.
pub(super) fn failure(relay: &Relay) -> Error {
    let begun = Instant::now();
    loop {
        if let Err(error) = relay.available(&mut Vec::new()) {
            return error;
        }
        assert!(begun.elapsed() < PATIENCE, "it does not fail");
        std::thread::sleep(Duration::from_millis(1));
    }
}

pub(super) fn byte_of(relay: &Relay, page: u32) -> u8 {
    let slice = relay.slice(PageRange::new(PageIndex(page), 1)).expect("it came");
    let mut bytes = [0; 4096];
    slice.copy_to(&mut bytes);
    assert!(bytes.iter().all(|byte| *byte == bytes[0]), "page {page} is torn");
    bytes[0]
}

#[test]
fn what_counts_is_what_came_last_and_each_page_is_told_once() {
    let (mut source, relay) = Source::begin();
    let manifest = relay.manifest("web", &Devices::default(), PATIENCE).expect("begins");
    assert_eq!((manifest.vm.as_str(), manifest.pages()), ("web", 16 + 1024));
    // While the VM runs: pages 0 to 3, of which 2 and 3 are written again.
    source.pages(RAM, [(0, Some(10)), (1, None), (2, Some(12)), (3, Some(13))], false);
    source.switch(Span { start_bytes: 2 << 12, length_bytes: 14 << 12 });
    let state = relay.state(PATIENCE).expect("switches");
    assert_eq!(state[0], 1, "the switch was said");
    assert!(Package::inspect(&state[1..]).is_ok());
    let mut runs = Vec::new();
    assert_eq!(relay.available(&mut runs).expect("no failure"), Supply::More);
    assert_eq!(runs, [PageRange::new(PageIndex(0), 2)]);
    assert!(relay.slice(PageRange::new(PageIndex(2), 1)).is_err(), "it is out of date");

    // A page of zeros over one that was none; half of a huge page, then the rest of it.
    source.pages(RAM, [(2, None), (3, Some(23))], false);
    source.pages(HUGE, (512..768).map(|page| (page, Some(7))), false);
    source.pages(HUGE, (768..1024).map(|page| (page, Some(8))), false);
    source.pages(RAM, [(9, Some(29))], true);
    source.say(&[END_OF_STREAM]);
    runs.extend(all(&relay));
    let mut told: Vec<u32> = runs.iter().flat_map(|run| run.iter()).map(|page| page.0).collect();
    told.sort_unstable();
    assert_eq!(told, (0..1040).collect::<Vec<_>>(), "what never came is zero");
    let bytes = [0, 1, 2, 3, 4, 9, 16, 16 + 512, 16 + 1023].map(|page| byte_of(&relay, page));
    assert_eq!(bytes, [10, 0, 0, 23, 0, 29, 0, 7, 8]);
}

#[test]
fn half_of_a_huge_page_is_nothing_yet() {
    let (mut source, relay) = Source::begin();
    source.switch(Span { start_bytes: 0, length_bytes: 16 << 12 });
    relay.state(PATIENCE).expect("switches");
    source.pages(HUGE, (0..300).map(|page| (page, Some(7))), false);
    source.pages(RAM, [], false);
    // Something behind it, so that it is known to have been read.
    let mut ping = Vec::new();
    Command::Ping(5).encode(&source.blocks, &mut ping);
    source.say(&ping);
    assert!(source.answers(2).contains(&AnswerItem::Answer(Answer::Pong(5))));
    let mut runs = Vec::new();
    relay.available(&mut runs).expect("no failure");
    assert_eq!(runs, []);
}

#[test]
fn the_source_is_asked_once_and_let_go_when_all_is_safe() {
    let (mut source, relay) = Source::begin();
    let all_of = |length_bytes| Span { start_bytes: 0, length_bytes };
    source.switch_with(&[(RAM, all_of(16 << 12)), (HUGE, all_of(4 << 20))]);
    relay.state(PATIENCE).expect("switches");
    relay.taken();
    relay.want(PageIndex(5)).expect("asked");
    relay.want(PageIndex(5)).expect("asked already");
    relay.want(PageIndex(16 + 600)).expect("asked");
    let early = relay.release(Duration::from_millis(20));
    assert_eq!(early.expect_err("pages are to come").kind, ErrorKind::Timeout);
    source.pages(RAM, [(5, Some(5))], true);
    source.say(&[END_OF_STREAM]);
    all(&relay);
    relay.want(PageIndex(5)).expect("it is there");
    relay.release(PATIENCE).expect("let go");
    let request = |block, start_bytes, length_bytes| Answer::RequestPages {
        block,
        span: Span { start_bytes, length_bytes },
    };
    let expected = [
        Answer::Pong(1),
        Answer::Pong(0x42),
        request(RAM, 5 << 12, 4096),
        request(HUGE, 2 << 20, 2 << 20),
        Answer::Shut(0),
    ];
    assert_eq!(source.answers(5), expected.map(AnswerItem::Answer));
}

#[test]
fn a_source_is_refused_when_it_has_said_everything() {
    let (mut source, relay) = Source::begin();
    source.switch(Span { start_bytes: 0, length_bytes: 16 << 12 });
    relay.state(PATIENCE).expect("switches");
    source.pages(RAM, [(5, Some(5))], false);
    let slow = relay.refuse(Duration::from_millis(50)).expect_err("it says nothing more");
    assert_eq!(slow.kind, ErrorKind::Timeout);
    source.pages(RAM, [], true);
    source.say(&[END_OF_STREAM]);
    relay.refuse(PATIENCE).expect("told");
    // It is asked for the rest before.
    let answers = std::iter::from_fn(|| source.answers(1).pop());
    let before = answers.take_while(|answer| *answer != AnswerItem::Answer(Answer::Shut(1)));
    assert!(before.count() >= 2);
    // One that is gone keeps nothing.
    let (source, relay) = Source::begin();
    drop(source);
    assert_eq!(relay.refuse(PATIENCE).expect_err("it hung up").kind, ErrorKind::Unreachable);
}

#[test]
fn a_source_that_dies_lies_or_is_slow() {
    // It says nothing.
    let (_ours, theirs) = UnixStream::pair().expect("a pair");
    let slow = Relay::start(theirs, Limits::of_window(0)).expect("reads").manifest(
        "vm",
        &Devices::default(),
        Duration::from_millis(20),
    );
    assert_eq!(slow.expect_err("nothing comes").kind, ErrorKind::Timeout);
    // It is gone before the switch, and before its end.
    let (source, relay) = Source::begin();
    relay.manifest("vm", &Devices::default(), PATIENCE).expect("begins");
    drop(source);
    assert_eq!(relay.state(PATIENCE).expect_err("it hung up").kind, ErrorKind::Unreachable);
    let (mut source, relay) = Source::begin();
    source.switch(Span { start_bytes: 0, length_bytes: 16 << 12 });
    drop(source);
    assert!(failure(&relay).message.contains("hung up"));
    assert!(relay.want(PageIndex(0)).is_err() && relay.presence().is_err());
    // A page comes a second time when its bytes may be under way.
    let (mut source, relay) = Source::begin();
    source.switch(Span { start_bytes: 0, length_bytes: 16 << 12 });
    source.pages(RAM, [(1, Some(1))], false);
    source.pages(RAM, [(1, Some(2))], false);
    assert!(failure(&relay).message.contains("a second time"));
    // What cannot be carried is named.
    let (mut source, relay) = Source::begin();
    source.say(&[2, 0, 0, 0, 2]);
    source.say(&0x200_u64.to_be_bytes());
    assert!(failure(&relay).message.contains("multifd"));
    // A package that is none.
    let (mut source, relay) = Source::begin();
    source.say(&[8, 0, 7, 0, 4, 0, 0, 0, 4, 1, 2, 3, 4]);
    assert!(relay.state(PATIENCE).expect_err("it is none").message.contains("package"));
}

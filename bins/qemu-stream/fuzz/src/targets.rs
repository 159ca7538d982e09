//! One function for each decoder of a peer's bytes. None may panic, whatever the bytes are and in whatever pieces they
//! come; what decodes must say the same when it is encoded again.

#[path = "../../tests/common/mod.rs"]
mod common;

use common::{read, read_answers, write, write_answers};
use qemu_stream::{Block, Blocks, Package, StreamDecoder};

/// The blocks of the VM whose stream broke, and whose destination answers.
pub fn blocks() -> Blocks {
    let huge = Block { page_bytes: 2 << 20, ..Block::new("huge", 4 << 20) };
    Blocks::new(vec![Block::new("pc.ram", 1 << 20), huge, Block::new("/rom@etc/acpi/rsdp", 4096)])
        .expect("blocks")
}

/// What a source sends: the first byte says in what pieces it comes, and with its lowest bit whether from the beginning.
pub fn stream(data: &[u8]) {
    let Some((how, stream)) = data.split_first() else { return };
    let decoder = || match how & 1 {
        0 => StreamDecoder::new(),
        _ => StreamDecoder::recovering(blocks(), 2),
    };
    let mut whole = decoder();
    let (seen, error) = read(&mut whole, stream, stream.len());
    let mut pieces = decoder();
    assert_eq!(read(&mut pieces, stream, usize::from(*how) * 16 + 1), (seen.clone(), error));
    let mut again = write(whole.blocks(), whole.section(), &seen);
    if seen.len() == 1 {
        // Only the byte behind a configuration tells that it is over.
        again.push(8);
    }
    assert!(again.len() <= stream.len() + seen.len() * 256 + 1);
    assert_eq!(read(&mut decoder(), &again, again.len()), (seen, None));
}

/// What a destination answers: the first byte says in what pieces it comes.
pub fn answers(data: &[u8]) {
    let Some((how, answers)) = data.split_first() else { return };
    let blocks = blocks();
    let (seen, error) = read_answers(&blocks, answers, answers.len());
    assert_eq!(read_answers(&blocks, answers, usize::from(*how) + 1), (seen.clone(), error));
    let again = write_answers(&blocks, &seen);
    assert_eq!(read_answers(&blocks, &again, again.len()), (seen, None));
}

/// A package.
pub fn package(data: &[u8]) {
    if Package::inspect(data).is_ok() {
        assert!(data.len() >= 19);
        assert!(Package::inspect(&data[1..]).is_err());
    }
}

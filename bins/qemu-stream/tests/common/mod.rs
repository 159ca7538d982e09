//! Streams read and written whole: what the tests and the fuzz targets have in common.

use qemu_stream::{
    Answer, AnswerDecoder, AnswerItem, Blocks, END_OF_STREAM, Item, Records, StreamDecoder, StreamError,
    limits,
};

/// Items with the bytes that their ranges are of, and with ranges from zero on. The package is one item.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen<I> {
    pub item: I,
    pub bytes: Vec<u8>,
}

/// Everything that a decoder says of a stream that comes in pieces, and the error that ends it. No item takes more bytes
/// than are promised.
pub fn read(
    decoder: &mut StreamDecoder,
    stream: &[u8],
    piece: usize,
) -> (Vec<Seen<Item>>, Option<StreamError>) {
    let mut seen: Vec<Seen<Item>> = Vec::new();
    let error = feed(stream, piece, |input| {
        let Some((mut item, taken)) = decoder.next(input)? else { return Ok(None) };
        let range = match &mut item {
            Item::Page { bytes, .. } | Item::PackageBytes { bytes, .. } => std::mem::take(bytes),
            _ => 0..0,
        };
        let bytes = input[range].to_vec();
        match (seen.last_mut(), &item) {
            (
                Some(Seen { item: last @ Item::PackageBytes { .. }, bytes: before }),
                Item::PackageBytes { .. },
            ) => {
                before.extend(bytes);
                *last = item;
            }
            _ => seen.push(Seen { item, bytes }),
        }
        Ok(Some(taken))
    });
    (seen, error)
}

/// The same of a return path; a bitmap is one item.
pub fn read_answers(
    blocks: &Blocks,
    answers: &[u8],
    piece: usize,
) -> (Vec<Seen<AnswerItem>>, Option<StreamError>) {
    let (mut decoder, mut seen) = (AnswerDecoder::new(), Vec::<Seen<AnswerItem>>::new());
    let error = feed(answers, piece, |input| {
        let Some((mut item, taken)) = decoder.next(blocks, input)? else { return Ok(None) };
        let range = match &mut item {
            AnswerItem::BitmapBytes { bytes, .. } => std::mem::take(bytes),
            _ => 0..0,
        };
        let bytes = input[range].to_vec();
        match (seen.last_mut(), &item) {
            (
                Some(Seen { item: last @ AnswerItem::BitmapBytes { .. }, bytes: before }),
                AnswerItem::BitmapBytes { .. },
            ) => {
                before.extend(bytes);
                *last = item;
            }
            _ => seen.push(Seen { item, bytes }),
        }
        Ok(Some(taken))
    });
    (seen, error)
}

fn feed(
    bytes: &[u8],
    piece: usize,
    mut next: impl FnMut(&[u8]) -> Result<Option<usize>, StreamError>,
) -> Option<StreamError> {
    let (mut from, mut to) = (0, 0);
    loop {
        match next(&bytes[from..to]) {
            Err(error) => return Some(error),
            Ok(Some(taken)) => {
                assert!(taken > 0 && taken <= to - from, "{taken} of {} bytes", to - from);
                from += taken;
            }
            Ok(None) => {
                assert!(to - from < limits::ITEM_BYTES_MAX, "{} bytes are no item", to - from);
                if to == bytes.len() {
                    return None;
                }
                to = (to + piece.max(1)).min(bytes.len());
            }
        }
    }
}

/// Writes what was read.
pub fn write(blocks: &Blocks, section: u32, seen: &[Seen<Item>]) -> Vec<u8> {
    let (mut out, mut records) = (Vec::new(), Records::new(section));
    for Seen { item, bytes } in seen {
        match item {
            Item::Configuration(configuration) => configuration.encode(&mut out),
            Item::Command(command) => command.encode(blocks, &mut out),
            Item::Start => blocks.encode(section, &mut out),
            Item::PartBegins { last } => records.begin(*last, &mut out),
            Item::Page { block, offset_bytes, .. } => records.page(blocks, *block, *offset_bytes, &mut out),
            Item::Zero { block, offset_bytes } => records.zero(blocks, *block, *offset_bytes, &mut out),
            Item::PartEnds { .. } => records.end(&mut out),
            Item::PackageBytes { .. } => {}
            Item::End => out.push(END_OF_STREAM),
        }
        out.extend(bytes);
    }
    out
}

/// Writes answers that were read.
pub fn write_answers(blocks: &Blocks, seen: &[Seen<AnswerItem>]) -> Vec<u8> {
    let mut out = Vec::new();
    for Seen { item, bytes } in seen {
        match item {
            AnswerItem::Answer(answer) => answer.encode(blocks, &mut out),
            AnswerItem::BitmapBytes { .. } => out.extend(bytes),
            AnswerItem::BitmapEnd => Answer::encode_bitmap_end(&mut out),
        }
    }
    out
}

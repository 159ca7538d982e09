//! The fuzz targets of `bins/qemu-stream/fuzz` on the stable toolchain: valid bytes, mutated by seed.
//!
//! `SG_FUZZ_SECONDS` says for how long (half a second a target without it), `SG_FUZZ_SEED` with which seed.

#[path = "../fuzz/src/targets.rs"]
mod targets;

use std::fs;
use std::path::Path;

use qemu_stream::{
    Answer, BlockIndex, Blocks, Command, Configuration, Discard, END_OF_STREAM, Records, Span,
};
use test_support::fuzz;

const TARGETS: [fuzz::Target; 3] = [
    ("stream", targets::stream, streams),
    ("answers", targets::answers, answers),
    ("package", targets::package, packages),
];

#[test]
fn no_bytes_break_a_decoder() {
    fuzz::no_bytes_break(&TARGETS);
}

/// `cargo fuzz` runs what is a binary of the fuzz crate, which is built nowhere else.
#[test]
fn every_target_is_a_binary_of_the_fuzz_crate() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz");
    fuzz::are_binaries(&TARGETS, &directory, "qemu_stream_fuzz");
}

/// Whoever takes bytes of a peer is called by a target.
#[test]
fn every_decoder_has_a_fuzz_target() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &Path| fs::read_to_string(path).expect("a source");
    let called = read(&root.join("fuzz/src/targets.rs")) + &read(&root.join("tests/common/mod.rs"));
    let mut found = Vec::new();
    for entry in fs::read_dir(root.join("src")).expect("the sources") {
        let text = read(&entry.expect("a source").path());
        let (code, _) = text.split_once("#[cfg(test)]").unwrap_or((&text, ""));
        let mut within = "";
        for line in code.lines() {
            if let Some(name) = line.strip_prefix("impl ") {
                within = name.trim_end_matches('{').trim();
            }
            // With its arguments over several lines, or on the same.
            if let Some((name, _)) = line.strip_prefix("    pub fn ").and_then(|line| line.split_once('(')) {
                let (_, behind) = code.split_once(line).expect("it is there");
                let signature = format!("{line}{}", behind.split_once("{\n").map_or("", |(first, _)| first));
                if signature.split_once("->").map_or(&*signature, |(head, _)| head).contains("&[u8]") {
                    found.push(format!("{within}::{name}"));
                    assert!(
                        called.contains(within) && called.contains(&format!("{name}(")),
                        "{within}::{name}"
                    );
                }
            }
        }
    }
    found.sort();
    assert_eq!(found, ["AnswerDecoder::next", "Package::inspect", "StreamDecoder::next"]);
}

fn package() -> Vec<u8> {
    let mut bytes = Vec::new();
    Command::PostcopyListen.encode(&Blocks::default(), &mut bytes);
    bytes.extend_from_slice(b"devices");
    for command in [Command::Ping(3), Command::Ping(0x42), Command::PostcopyRun] {
        command.encode(&Blocks::default(), &mut bytes);
    }
    bytes
}

fn packages() -> Vec<Vec<u8>> {
    vec![package()]
}

fn streams() -> Vec<Vec<u8>> {
    let blocks = targets::blocks();
    let part = |last, out: &mut Vec<u8>| {
        let mut records = Records::new(2);
        records.begin(last, out);
        records.zero(&blocks, BlockIndex(0), 0x5000, out);
        records.zero(&blocks, BlockIndex(0), 0x6000, out);
        records.page(&blocks, BlockIndex(2), 0, out);
        out.extend([7; 4096]);
        records.end(out);
    };
    let mut first = vec![0];
    Configuration { uuid: Some([5; 16]), ..Configuration::new("pc-q35-7.2") }.encode(&mut first);
    for command in [
        Command::OpenReturnPath,
        Command::Ping(1),
        Command::PostcopyAdvise { page_sizes: blocks.page_sizes() },
    ] {
        command.encode(&blocks, &mut first);
    }
    blocks.encode(2, &mut first);
    part(false, &mut first);
    let spans =
        vec![Span { start_bytes: 0, length_bytes: 1 << 20 }, Span { start_bytes: 4096, length_bytes: 8192 }];
    let package = package();
    for command in [
        Command::SwitchoverStart,
        Command::RamDiscard(Discard { block: BlockIndex(0), spans }),
        Command::Ping(2),
        Command::Packaged { length_bytes: package.len() as u32 },
    ] {
        command.encode(&blocks, &mut first);
    }
    first.extend(package);
    part(true, &mut first);
    first.push(END_OF_STREAM);

    let mut resumed = vec![1];
    for command in [
        Command::ReceivedBitmap(BlockIndex(0)),
        Command::ReceivedBitmap(BlockIndex(1)),
        Command::PostcopyResume,
    ] {
        command.encode(&blocks, &mut resumed);
    }
    part(true, &mut resumed);
    resumed.push(END_OF_STREAM);
    let recorded = [&[0], &include_bytes!("golden/pc-7.2.stream")[..]].concat();
    vec![first, resumed, recorded]
}

fn answers() -> Vec<Vec<u8>> {
    let blocks = targets::blocks();
    let mut first = vec![3];
    for answer in [
        Answer::Pong(1),
        Answer::SwitchoverAck,
        Answer::RequestPages {
            block: BlockIndex(1),
            span: Span { start_bytes: 2 << 20, length_bytes: 2 << 20 },
        },
        Answer::Shut(0),
    ] {
        answer.encode(&blocks, &mut first);
    }
    let mut resumed = vec![9];
    for (index, block) in blocks.iter() {
        Answer::ReceivedBitmap(index).encode(&blocks, &mut resumed);
        resumed.extend(vec![0x5a; Answer::bitmap_bytes(block) as usize]);
        Answer::encode_bitmap_end(&mut resumed);
    }
    Answer::ResumeAck.encode(&blocks, &mut resumed);
    vec![first, resumed]
}

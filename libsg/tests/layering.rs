//! The rules of the code base that no lint checks: who may import whom, where `unsafe` may be, which words
//! stay out, and how long a file may be. It reads the sources; DESIGN.md says why the rules are.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// What everybody may use: it knows nothing of peers.
const VOCABULARY: &[&str] = &[
    "page", "crc", "ids", "limits", "error", "content", "manifest", "latency", "event", "report", "usage",
    "units", "host",
];

/// Each module above the vocabulary with those that it may use. What is not listed is a breach.
const MAY_USE: &[(&str, &[&str])] = &[
    ("memory", &[]),
    ("source", &["memory"]),
    ("sink", &[]),
    ("dirty", &[]),
    ("uffd", &["memory", "sink", "dirty"]),
    ("wire", &[]),
    ("pace", &[]),
    ("transport", &["wire", "pace", "memory"]),
    ("vmd", &["wire", "transport", "memory"]),
    ("server", &["wire", "transport", "pace", "memory"]),
    ("discovery", &["wire", "transport"]),
    ("scatter", &["source", "memory", "wire", "pace", "transport", "vmd"]),
    ("gather", &["sink", "memory", "wire", "pace", "transport", "vmd"]),
    (
        "migrate",
        &["scatter", "gather", "source", "sink", "dirty", "memory", "wire", "pace", "transport", "vmd"],
    ),
];

/// The only files with `unsafe`: memory that others may change, system calls that no crate offers, and an instruction
/// that a processor may lack.
const UNSAFE_FILES: &[&str] = &[
    "crc.rs",
    "memory/mapping.rs",
    "memory/raw.rs",
    "memory/vectored.rs",
    "memory/vm_memory.rs",
    "pace/tcp_info.rs",
    "server/arena.rs",
    "uffd/raw.rs",
];

/// Those of the backend over devices, in `vmd-rdma/src`: memory that is registered, one promise that callers keep, and the
/// calls of the devices' library, real and simulated.
const BACKEND_UNSAFE_FILES: &[&str] = &[
    "link/way.rs",
    "region.rs",
    "verbs/kernel/context.rs",
    "verbs/kernel/domain.rs",
    "verbs/kernel/pair.rs",
    "verbs/kernel/queue.rs",
    "verbs/mod.rs",
    "verbs/simulated/memory.rs",
    "verbs/simulated.rs",
];

/// Lines of a file up to its tests.
const LINES_MAX: usize = 500;

/// Words of what libsg must not know by name.
const FOREIGN: &[&str] = &["rdma", "qemu", "ibverbs"];

struct Source {
    /// Under `src`.
    name: String,
    text: String,
}

impl Source {
    fn module(&self) -> &str {
        self.name.split('/').next().unwrap_or_default().trim_end_matches(".rs")
    }

    fn is_test(&self) -> bool {
        self.name.ends_with("/test.rs") || self.name.ends_with("_test.rs")
    }

    /// Line numbers and lines, without comments and without the tests at the end.
    fn code(&self) -> impl Iterator<Item = (usize, &str)> {
        let lines = self.text.lines().enumerate().take_while(|(_, line)| !line.starts_with("#[cfg(test)]"));
        lines.map(|(at, line)| (at + 1, line.split("//").next().unwrap_or_default()))
    }
}

fn sources() -> Vec<Source> {
    let found = sources_in("src");
    assert!(found.len() > 50, "these are not the sources");
    found
}

fn sources_in(directory: &str) -> Vec<Source> {
    fn walk(directory: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(directory).expect("a directory of sources") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                found.push(path);
            }
        }
    }
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join(directory);
    let mut found = Vec::new();
    walk(&root, &mut found);
    found.sort();
    let read = |path: PathBuf| Source {
        name: path.strip_prefix(&root).expect("under it").to_str().expect("UTF-8").into(),
        text: fs::read_to_string(&path).expect("a source"),
    };
    found.into_iter().map(read).collect()
}

/// Fails with every breach, not only the first.
fn none(breaches: Vec<String>) {
    assert!(breaches.is_empty(), "\n{}", breaches.join("\n"));
}

/// The modules of this crate that a piece of code names: in `crate::x`, and in `crate::{x, y::z}`.
fn modules_named(line: &str) -> Vec<String> {
    let word = |text: &str| -> String {
        text.trim_start().chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect()
    };
    let mut named = Vec::new();
    for behind in line.split("crate::").skip(1) {
        match behind.strip_prefix('{') {
            Some(list) => {
                let mut depth = 0;
                let top = list.split_inclusive(['{', '}', ',']).filter(|part| {
                    let at_top = depth == 0;
                    depth += i32::from(part.ends_with('{')) - i32::from(part.ends_with('}'));
                    at_top
                });
                named.extend(top.map(word));
            }
            None => named.push(word(behind)),
        }
    }
    // `crate::Error` and its like are re-exports of the vocabulary.
    named.retain(|name| name.starts_with(|c: char| c.is_ascii_lowercase()));
    named
}

#[test]
fn imports_point_downwards() {
    let known: BTreeSet<&str> =
        VOCABULARY.iter().copied().chain(MAY_USE.iter().map(|(name, _)| *name)).chain(["lib"]).collect();
    let mut breaches = Vec::new();
    for source in &sources() {
        let module = source.module();
        if !known.contains(module) {
            breaches.push(format!("{}: this test does not know where module {module} belongs", source.name));
        }
        let may = MAY_USE.iter().find(|(name, _)| *name == module).map_or(&[][..], |(_, may)| may);
        for (at, line) in source.code() {
            for used in modules_named(line) {
                let fine = module == "lib"
                    || used == module
                    || VOCABULARY.contains(&used.as_str())
                    || may.contains(&used.as_str());
                if !fine {
                    breaches.push(format!("{}:{at}: {module} must not use {used}", source.name));
                }
            }
        }
    }
    none(breaches);
}

#[test]
fn the_rules_have_no_circle() {
    // Each module uses only those that stand above it in the list, so that reading the list is reading the story.
    for (at, (module, may)) in MAY_USE.iter().enumerate() {
        for used in *may {
            let place = MAY_USE.iter().position(|(name, _)| name == used);
            let fine = place.is_some_and(|place| place < at) || (*module, *used) == ("uffd", "sink");
            assert!(fine, "{module} is to be listed behind {used}");
        }
    }
    for half in ["scatter", "gather"] {
        let (_, may) = MAY_USE.iter().find(|(name, _)| *name == half).expect("listed");
        assert!(
            !may.contains(&"scatter") && !may.contains(&"gather"),
            "the halves mirror each other, no more"
        );
    }
    let (_, server) = MAY_USE.iter().find(|(name, _)| *name == "server").expect("listed");
    assert!(!server.contains(&"scatter") && !server.contains(&"gather"));
}

#[test]
fn the_wire_knows_no_sockets() {
    let mut breaches = Vec::new();
    for source in sources().iter().filter(|source| source.module() == "wire") {
        for (at, line) in source.code() {
            for word in
                ["TcpStream", "TcpListener", "socket2", "std::io", "std::fs", "std::thread", "Instant::now"]
            {
                if line.contains(word) {
                    breaches.push(format!("{}:{at}: {word}", source.name));
                }
            }
        }
    }
    none(breaches);
}

/// Everybody else asks `host` for the time, and for all that waits: what asks behind its back cannot be simulated.
#[test]
fn only_host_asks_the_host() {
    const WORDS: &[&str] = &[
        "Instant::now",
        ".elapsed()",
        "thread::Builder::new",
        "thread::sleep",
        "thread::spawn",
        "scope.spawn",
    ];
    // The model of the VMD, and what is measured beside a migration, are in no simulated world.
    let stays_out = |name: &str| {
        name.starts_with("host/") || name.starts_with("vmd/memory") || name.contains("conformance")
    };
    let mut breaches = Vec::new();
    for source in sources().iter().filter(|source| !source.is_test() && !stays_out(&source.name)) {
        for (at, line) in source.code().filter(|(_, line)| !line.contains("host::thread::")) {
            for word in WORDS.iter().filter(|word| line.contains(**word)) {
                breaches.push(format!("{}:{at}: {word} is for host to call", source.name));
            }
        }
    }
    none(breaches);
}

#[test]
fn no_backend_and_no_vmm_by_name() {
    let mut breaches = Vec::new();
    for source in &sources() {
        for (at, line) in source.code() {
            let lower = line.to_ascii_lowercase();
            for word in FOREIGN.iter().filter(|word| lower.contains(*word)) {
                breaches.push(format!("{}:{at}: {word}", source.name));
            }
        }
    }
    none(breaches);
}

#[test]
fn unsafe_is_in_the_named_files() {
    let allows = |source: &Source| source.text.lines().any(|line| line.starts_with("#![allow(unsafe_code)]"));
    let sources = sources();
    let found: Vec<&str> = sources.iter().filter(|s| allows(s)).map(|s| s.name.as_str()).collect();
    assert_eq!(found, UNSAFE_FILES);
    // Elsewhere a test may, item by item.
    for source in sources.iter().filter(|source| !source.is_test() && !allows(source)) {
        assert!(!source.code().any(|(_, line)| line.contains("allow(unsafe_code)")), "{}", source.name);
    }
    // There a module's leave holds for those beneath it as well: so the word itself counts.
    let uses = |source: &&Source| {
        let is_it =
            |line: &str| line.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').any(|w| w == "unsafe");
        !source.is_test() && source.code().any(|(_, line)| is_it(line))
    };
    let backend = sources_in("../vmd-rdma/src");
    let found: Vec<&str> = backend.iter().filter(uses).map(|source| source.name.as_str()).collect();
    assert_eq!(found, BACKEND_UNSAFE_FILES);
}

#[test]
fn files_open_with_what_they_are_for_and_stay_short() {
    let mut breaches = Vec::new();
    for source in sources().iter().filter(|source| !source.is_test()) {
        if !source.text.starts_with("//! ") {
            breaches.push(format!("{} does not open with //!", source.name));
        }
        let lines = source.code().count();
        if lines > LINES_MAX {
            breaches
                .push(format!("{} has {lines} lines before its tests, more than {LINES_MAX}", source.name));
        }
    }
    none(breaches);
}

/// Decoders that others call on the same bytes: with what the fuzz targets reach them.
const REACHED_BY: &[(&str, &str)] = &[
    ("Announcement::decode", "Datagram::decode("),
    ("decode_heads", "decode_runs("),
    ("decode_checksums", "decode_runs("),
];

/// The decoder that a line of the wire opens, as a fuzz target names it. `within` is the type whose `impl` it is in.
fn decoder(line: &str, within: &str) -> Option<(String, String)> {
    let entry = |kind: &str| Some(line.strip_prefix(kind)?.trim_end_matches('{').trim().to_owned());
    if let Some(entry) = entry("impl Entry for ") {
        return Some((format!("table::<{entry}>("), entry));
    }
    if let Some(entry) = entry("impl RunEntry for ") {
        return Some((format!("runs::<{entry}>("), entry));
    }
    let (_, behind) = line.trim_start().split_once("pub fn decode")?;
    let end = behind.find(|c: char| !c.is_ascii_lowercase() && c != '_')?;
    let name = format!("decode{}", &behind[..end]);
    let name = if line.starts_with(' ') { format!("{within}::{name}") } else { name };
    let called = REACHED_BY.iter().find(|(reached, _)| *reached == name);
    Some((called.map_or_else(|| format!("{name}("), |(_, by)| (*by).to_owned()), name))
}

#[test]
fn every_decoder_has_a_fuzz_target() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/src/targets.rs");
    let targets = fs::read_to_string(path).expect("the fuzz targets");
    let (mut found, mut breaches) = (0, Vec::new());
    for source in sources().iter().filter(|source| source.module() == "wire") {
        let mut within = "";
        for (at, line) in source.code() {
            if let Some(name) = line.strip_prefix("impl ") {
                within = name.trim_end_matches('{').trim();
            }
            if let Some((call, name)) = decoder(line, within) {
                found += 1;
                if !targets.contains(&call) {
                    breaches.push(format!("{}:{at}: no fuzz target has {call}..) for {name}", source.name));
                }
            }
        }
    }
    none(breaches);
    assert!(found > 20, "only {found}: these are not all decoders");
}

#[test]
fn decoders_are_read_right() {
    let read = |line, within| decoder(line, within).map(|(call, _)| call);
    assert_eq!(read("impl Entry for Missing {", "").as_deref(), Some("table::<Missing>("));
    assert_eq!(
        read("impl RunEntry for Option<Placement> {", "").as_deref(),
        Some("runs::<Option<Placement>>(")
    );
    assert_eq!(read("    pub fn decode(bytes: &[u8]) {", "Credit").as_deref(), Some("Credit::decode("));
    assert_eq!(read("pub fn decode_mac(bytes: &[u8])", "Hello").as_deref(), Some("decode_mac("));
    assert_eq!(read("pub fn decode_table<E: Entry>(", "").as_deref(), Some("decode_table("));
    assert_eq!(read("    fn decode(bytes: &[u8])", "Referral"), None);
}

#[test]
fn imports_are_read_right() {
    assert_eq!(modules_named("use crate::error::{Error, Result};"), ["error"]);
    assert_eq!(modules_named("use crate::{page::{A, B}, wire, Error};"), ["page", "wire"]);
    assert_eq!(modules_named("let x = crate::ids::A(crate::page::B);"), ["ids", "page"]);
    assert_eq!(modules_named("use crate::Result;"), [""; 0]);
}

//! Whether a destination is the machine that a source is. A QEMU says so itself only when it loads the package, behind COMMIT:
//! what can be known is compared before, by the names that an operator knows.

use std::collections::BTreeMap;

use libsg::{ErrorKind, Result};
use qemu_stream::{Block, Blocks};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::qmp::Qmp;

/// Where QEMU has devices: those of the board, of `-device` with a name, and without.
const CONTAINERS: [&str; 3] = ["/machine/unattached", "/machine/peripheral", "/machine/peripheral-anon"];

/// What is among them and has no state that travels.
const STATELESS: [&str; 5] = ["guest-loader", "irq", "isa-debug-exit", "loader", "memory-region"];

/// Places on a PCI bus; other devices have addresses of other kinds.
const PLACES: u64 = 0x100;

/// How words of features of the first vCPU are called, with the leaf of CPUID and the register behind it. Those of the
/// hypervisor (KVM's, Hyper-V's) are none of them: a guest does without what it finds no more.
const FEATURES: &str = "features of the vCPU ";
const HYPERVISOR: std::ops::Range<u64> = 0x4000_0000..0x5000_0000;

/// Devices of a machine, vCPUs among them: how many of each kind, where it has one with its place on its PCI bus. And what
/// the vCPU has, bit by bit.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Devices(BTreeMap<String, u32>);

impl Devices {
    /// Of a QEMU.
    ///
    /// # Errors
    /// [`Qmp::execute`]'s.
    pub(crate) fn of(qmp: &mut Qmp) -> Result<Self> {
        let mut all = Self::default();
        for container in CONTAINERS {
            let listed = qmp.execute("qom-list", &json!({ "path": container }))?;
            for entry in listed.as_array().into_iter().flatten() {
                let kind =
                    entry["type"].as_str().and_then(|kind| kind.strip_prefix("child<")?.strip_suffix('>'));
                let Some(kind) = kind.filter(|kind| !STATELESS.contains(kind)) else { continue };
                let path = format!("{container}/{}", entry["name"].as_str().unwrap_or_default());
                let place = if container == CONTAINERS[0] { None } else { place(qmp, &path)? };
                let key = place.map_or_else(|| kind.to_owned(), |place| format!("{kind} at {place}"));
                *all.0.entry(key).or_default() += 1;
            }
        }
        all.0.extend(features(qmp)?);
        Ok(all)
    }

    /// What another machine, that is to be this one, has or lacks.
    pub(crate) fn differences(&self, other: &Self) -> Vec<String> {
        let names: std::collections::BTreeSet<&String> = self.0.keys().chain(other.0.keys()).collect();
        let of = |devices: &Self, name: &String| devices.0.get(name).copied().unwrap_or(0);
        let told = |name: &&String| {
            let (has, should) = (of(other, name), of(self, name));
            if let Some(word) = name.strip_prefix(FEATURES) {
                return lacks_features(word, should & !has);
            }
            let option = if name.ends_with("-cpu") { "-cpu and -smp" } else { "-device and its like" };
            (has != should).then(|| format!("it has {has} {name} and not {should} ({option})"))
        };
        names.iter().filter_map(told).collect()
    }
}

/// The words of features of a QEMU's first vCPU that are not empty; none where its vCPUs have none.
fn features(qmp: &mut Qmp) -> Result<BTreeMap<String, u32>> {
    let vcpus = qmp.execute("query-cpus-fast", &json!({}))?;
    let Some(path) = vcpus[0]["qom-path"].as_str() else { return Ok(BTreeMap::new()) };
    let words = match qmp.execute("qom-get", &json!({ "path": path, "property": "feature-words" })) {
        Ok(words) => words,
        Err(error) if error.kind == ErrorKind::Vm => return Ok(BTreeMap::new()),
        Err(error) => return Err(error),
    };
    let word = |word: &Value| {
        let leaf = word["cpuid-input-eax"].as_u64().filter(|leaf| !HYPERVISOR.contains(leaf))?;
        let bits =
            word["features"].as_u64().and_then(|bits| u32::try_from(bits).ok()).filter(|bits| *bits > 0)?;
        let part = word["cpuid-input-ecx"].as_u64().map_or_else(String::new, |part| format!(".{part}"));
        Some((format!("{FEATURES}{leaf:X}h{part} {}", word["cpuid-register"].as_str()?), bits))
    };
    Ok(words.as_array().into_iter().flatten().filter_map(word).collect())
}

/// A guest that found these bits uses them.
fn lacks_features(word: &str, lacking: u32) -> Option<String> {
    let bits: Vec<_> =
        (0..u32::BITS).filter(|bit| lacking >> bit & 1 == 1).map(|bit| bit.to_string()).collect();
    (lacking != 0).then(|| format!("its vCPU lacks features: bit {} of CPUID {word} (-cpu)", bits.join(", ")))
}

/// Where a device is on its PCI bus, if it is on one.
fn place(qmp: &mut Qmp, path: &str) -> Result<Option<String>> {
    match qmp.execute("qom-get", &json!({ "path": path, "property": "addr" })) {
        Ok(at) => Ok(at.as_u64().filter(|at| *at < PLACES).map(|at| format!("{:02x}.{}", at >> 3, at & 7))),
        // It has no such property.
        Err(error) if error.kind == ErrorKind::Vm => Ok(None),
        Err(error) => Err(error),
    }
}

/// The type of a QEMU's machine, with its version, as streams say it.
///
/// # Errors
/// [`Qmp::execute`]'s.
pub(crate) fn kind(qmp: &mut Qmp) -> Result<String> {
    let kind = qmp.execute("qom-get", &json!({ "path": "/machine", "property": "type" }))?;
    let kind = kind.as_str().unwrap_or_default();
    Ok(kind.strip_suffix("-machine").unwrap_or(kind).to_owned())
}

/// What a QEMU's memory lacks to take these blocks.
///
/// # Errors
/// [`Qmp::execute`]'s.
pub(crate) fn memory(qmp: &mut Qmp, blocks: &Blocks) -> Result<Vec<String>> {
    Ok(lacks(blocks, &qmp.monitor("info ramblock")?))
}

/// A block as the monitor for people prints it.
struct Printed<'a> {
    name: &'a str,
    page_bytes: u64,
    used_bytes: u64,
    most_bytes: u64,
}

fn lacks(blocks: &Blocks, printed: &str) -> Vec<String> {
    let there: Vec<Printed> = printed.lines().filter_map(printed_block).collect();
    if there.is_empty() {
        // It prints them in another way.
        return Vec::new();
    }
    let lack = |block: &Block| {
        let Some(here) = there.iter().find(|here| here.name == block.name) else {
            return Some(format!(
                "it has no memory called {} (devices, -m, or the names of memory backends)",
                block.name
            ));
        };
        if here.page_bytes != block.page_bytes {
            let [has, should] = [here.page_bytes, block.page_bytes].map(|bytes| bytes >> 10);
            return Some(format!(
                "pages of its {} have {has} KiB and not {should} KiB (memory backends)",
                block.name
            ));
        }
        // What the firmware is told may grow, up to what is there for it.
        let may_grow = here.used_bytes != here.most_bytes && block.length_bytes <= here.most_bytes;
        (here.used_bytes != block.length_bytes && !may_grow).then(|| {
            let [has, should] =
                [here.used_bytes, block.length_bytes].map(|bytes| bytes as f64 / f64::from(1 << 20));
            format!("its {} has {has} MiB and not {should} MiB (-m, for memory of the guest)", block.name)
        })
    };
    blocks.iter().filter_map(|(_, block)| lack(block)).collect()
}

/// `pc.ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000`, and newer ones more behind it.
fn printed_block(line: &str) -> Option<Printed<'_>> {
    let mut words = line.split_whitespace();
    let (name, pages, unit, _offset) = (words.next()?, words.next()?, words.next()?, words.next()?);
    let unit = match unit {
        "KiB" => 10,
        "MiB" => 20,
        "GiB" => 30,
        _ => return None,
    };
    let mut hex = || u64::from_str_radix(words.next()?.strip_prefix("0x")?, 16).ok();
    Some(Printed {
        name,
        page_bytes: pages.parse::<u64>().ok()? << unit,
        used_bytes: hex()?,
        most_bytes: hex()?,
    })
}

#[cfg(test)]
mod test {
    use super::*;

    const PRINTED: &str = "              Block Name    PSize              Offset               Used              Total\n\
        \x20                 pc.ram    4 KiB  0x0000000000000000 0x0000000004000000 0x0000000004000000\r\n\
        \x20                   huge    2 MiB  0x0000000008000000 0x0000000000400000 0x0000000000400000  0x00007f rw\r\n\
        \x20   /rom@etc/acpi/tables    4 KiB  0x0000000004080000 0x0000000000020000 0x0000000000200000\r\n";

    #[test]
    fn memory_that_does_not_fit_is_named() {
        let lacks = |block: Block| lacks(&Blocks::new(vec![block]).expect("a block"), PRINTED);
        let huge = Block { page_bytes: 2 << 20, ..Block::new("huge", 4 << 20) };
        for fits in [Block::new("pc.ram", 64 << 20), huge, Block::new("/rom@etc/acpi/tables", 0x2_1000)] {
            assert_eq!(lacks(fits), [""; 0]);
        }
        for (block, words) in [
            (Block::new("pc.ram", 128 << 20), "its pc.ram has 64 MiB and not 128 MiB"),
            (Block::new("/rom@etc/acpi/tables", 4 << 20), "tables has 0.125 MiB and not 4 MiB"),
            (Block::new("huge", 4 << 20), "pages of its huge have 2048 KiB and not 4 KiB"),
            (Block::new("vga.vram", 16 << 20), "no memory called vga.vram"),
        ] {
            assert!(matches!(&lacks(block)[..], [told] if told.contains(words)), "{words}");
        }
        assert_eq!(super::lacks(&Blocks::default(), "what"), [""; 0]);
    }

    #[test]
    fn devices_that_differ_are_named() {
        let of = |list: &[(&str, u32)]| {
            Devices(list.iter().map(|(name, count)| ((*name).into(), *count)).collect())
        };
        let source = of(&[("qemu64-x86_64-cpu", 2), ("virtio-net-pci at 02.0", 1), ("isa-serial", 1)]);
        let there = of(&[("qemu64-x86_64-cpu", 1), ("virtio-net-pci at 03.0", 1), ("isa-serial", 1)]);
        let told = source.differences(&there);
        assert_eq!(told.len(), 3, "{told:?}");
        assert_eq!(told[0], "it has 1 qemu64-x86_64-cpu and not 2 (-cpu and -smp)");
        assert!(told[1].contains("0 virtio-net-pci at 02.0 and not 1"), "{told:?}");
        assert_eq!(source.differences(&source), [""; 0]);
    }

    #[test]
    fn a_vcpu_has_the_features_that_the_guest_found() {
        let (_directory, socket) = crate::qmp::test::answering(|command, arguments| match command {
            "query-cpus-fast" => json!([{ "qom-path": "/machine/unattached/device[0]" }]),
            "qom-get" if arguments["property"] == "feature-words" => json!([
                { "cpuid-register": "EBX", "cpuid-input-eax": 7, "cpuid-input-ecx": 0, "features": 0b1010_0000 },
                { "cpuid-register": "EDX", "cpuid-input-eax": 0x8000_0001_u32, "features": 0 },
                { "cpuid-register": "EAX", "cpuid-input-eax": 0x4000_0001, "features": 255 },
            ]),
            _ => json!([]),
        });
        let source = Devices::of(&mut Qmp::connect(&socket).expect("greets")).expect("told");
        let word = "features of the vCPU 7h.0 EBX";
        assert_eq!(source, Devices(BTreeMap::from([(word.into(), 0b1010_0000)])));
        let there = |bits| source.differences(&Devices(BTreeMap::from([(word.into(), bits)])));
        assert_eq!(there(0b1110_0000), [""; 0], "more is as good");
        assert_eq!(there(0), ["its vCPU lacks features: bit 5, 7 of CPUID 7h.0 EBX (-cpu)"]);
        assert_eq!(source.differences(&Devices::default()).len(), 1);
        assert_eq!(
            Devices::default().differences(&source),
            [""; 0],
            "of one that told nothing, nothing is known"
        );
    }
}

//! What VM a QEMU has, if any.

use libsg::Result;
use serde_json::json;

use crate::qmp::{PAUSED, Qmp};

/// What becomes of a QEMU's VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whereabouts {
    /// There is none: one is waited for (`-incoming`).
    Awaited,
    /// It is here, whether it runs or not.
    Here,
    /// It arrives, and is not all there yet.
    Arriving,
    /// It was here, and was given away.
    Left,
}

/// A QEMU's VM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resident {
    /// As `-name` says.
    pub name: Option<String>,
    /// What becomes of it.
    pub whereabouts: Whereabouts,
    /// The memory that the guest has.
    pub memory_bytes: u64,
    /// What of that there is, about: what has to leave, at most.
    pub present_bytes: u64,
}

impl Resident {
    /// Asks a QEMU. Changes nothing.
    ///
    /// # Errors
    /// [`Qmp::execute`]'s.
    pub fn of(qmp: &mut Qmp) -> Result<Self> {
        let name = qmp.execute("query-name", &json!({}))?["name"].as_str().map(str::to_owned);
        let status = qmp.execute("query-status", &json!({}))?;
        let whereabouts = whereabouts(status["status"].as_str().unwrap_or_default(), &qmp.migration()?);
        let memory = qmp.execute("query-memory-size-summary", &json!({}))?;
        let bytes = |which: &str| memory[which].as_u64().unwrap_or(0);
        let memory_bytes = bytes("base-memory").saturating_add(bytes("plugged-memory"));
        // What the process has beside the guest's memory is little.
        let has = qmp.process().and_then(|process| {
            let told = std::fs::read_to_string(format!("/proc/{}/status", process.as_raw_nonzero())).ok()?;
            Some(present_bytes(&told))
        });
        let present_bytes = has.map_or(memory_bytes, |has| has.min(memory_bytes));
        Ok(Self { name, whereabouts, memory_bytes, present_bytes })
    }
}

/// By `query-status`, and by `query-migrate`, which at a destination tells of the VM that came.
fn whereabouts(status: &str, migration: &str) -> Whereabouts {
    match (status, migration) {
        ("inmigrate", "none" | "setup") => Whereabouts::Awaited,
        ("inmigrate", _) => Whereabouts::Arriving,
        ("postmigrate", _) => Whereabouts::Left,
        // A source that is so far does not run, and is about to have given it away.
        ("finish-migrate", _) => Whereabouts::Here,
        (_, "postcopy-active" | PAUSED | "postcopy-recover" | "postcopy-recover-setup") => {
            Whereabouts::Arriving
        }
        _ => Whereabouts::Here,
    }
}

/// What `/proc/PID/status` says that a process has: in memory, swapped out, and in huge pages.
fn present_bytes(status: &str) -> u64 {
    let kib = |line: &str| {
        let (key, value) = line.split_once(':')?;
        ["VmRSS", "VmSwap", "HugetlbPages"].contains(&key).then_some(())?;
        value.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    };
    status.lines().filter_map(kib).fold(0, |sum: u64, kib| sum.saturating_add(kib.saturating_mul(1024)))
}

#[cfg(test)]
mod test {
    use super::*;
    use crate::qmp::test::answering;

    #[test]
    fn what_becomes_of_a_vm_is_what_qemu_says() {
        for (status, migration, whereabouts) in [
            ("running", "none", Whereabouts::Here),
            ("running", "cancelled", Whereabouts::Here),
            ("running", "completed", Whereabouts::Here),
            ("paused", "none", Whereabouts::Here),
            ("inmigrate", "none", Whereabouts::Awaited),
            ("inmigrate", "active", Whereabouts::Arriving),
            ("running", "postcopy-active", Whereabouts::Arriving),
            ("paused", "postcopy-paused", Whereabouts::Arriving),
            ("finish-migrate", "postcopy-paused", Whereabouts::Here),
            ("postmigrate", "completed", Whereabouts::Left),
        ] {
            assert_eq!(super::whereabouts(status, migration), whereabouts, "{status}, {migration}");
        }
    }

    #[test]
    fn a_vm_is_described() {
        let (_directory, socket) = answering(|command, _| match command {
            "query-name" => json!({ "name": "web" }),
            "query-status" => json!({ "status": "running" }),
            "query-memory-size-summary" => json!({ "base-memory": 3 << 20, "plugged-memory": 1 << 20 }),
            _ => json!({}),
        });
        let resident = Resident::of(&mut Qmp::connect(&socket).expect("greets")).expect("answers");
        let web = Resident {
            name: Some("web".into()),
            whereabouts: Whereabouts::Here,
            memory_bytes: 4 << 20,
            // The process behind the socket is no QEMU.
            present_bytes: 4 << 20,
        };
        assert_eq!(resident, web);
    }

    #[test]
    fn what_a_process_has_is_added_up() {
        let told = "Name:\tqemu\nVmPeak:\t 900 kB\nVmRSS:\t 100 kB\nVmSwap:\t 20 kB\nHugetlbPages:\t 2048 kB\nVmRSS: x kB\n";
        assert_eq!(present_bytes(told), (100 + 20 + 2048) << 10);
        assert_eq!(present_bytes("what"), 0);
    }
}

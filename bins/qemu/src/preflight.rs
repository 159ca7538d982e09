//! What stands in the way of a migration, found while the VM still runs: by the name that an operator knows.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use libsg::{Error, ErrorKind, Result};
use rustix::process::Pid;
use serde_json::{Value, json};

use crate::qmp::{PAUSED, Qmp, Version};
use crate::settings::{Settings, capabilities};

/// The oldest QEMU whose streams are known.
const OLDEST: Version = Version { major: 7, minor: 2, micro: 0 };

/// Capabilities that change what is sent, or how, with what stands in the way.
const CAPABILITIES: [(&str, &str); 15] = [
    ("background-snapshot", "the memory would be written once, not sent as it is asked for"),
    ("block", "disks would travel in the stream"),
    ("compress", "pages would travel compressed"),
    ("dirty-bitmaps", "bitmaps of disks would travel beside the memory"),
    ("mapped-ram", "pages would have places in a file"),
    ("multifd", "pages would travel by connections of their own"),
    ("pause-before-switchover", "the switch would wait for another word"),
    ("postcopy-preempt", "pages that are asked for would travel by a connection of their own"),
    ("rdma-pin-all", "pages would travel by RDMA"),
    ("release-ram", "pages that were sent are gone: the VM could not run on here if its move failed"),
    ("switchover-ack", "the switch would wait for the destination's word"),
    ("x-colo", "the stream would not end"),
    ("x-ignore-shared", "shared memory would not travel"),
    ("xbzrle", "pages would travel as what has changed in them"),
    ("zero-copy-send", "it needs multifd"),
];

/// Devices, by how their types begin, with what stands in the way.
const DEVICES: [(&str, &str); 6] = [
    ("vfio-", "a device of the host that is passed through (VFIO) writes memory by itself: unplug it first"),
    ("virtio-mem", "virtio-mem sends a section of its own before the memory: unplug it first"),
    ("vhost-user-", "its back end (vhost-user) maps the memory by itself: unplug it first"),
    ("vhost-vdpa-", "its back end (vhost-vdpa) maps the memory by itself: unplug it first"),
    ("virtio-pmem", "its memory (virtio-pmem) is a file of this host: unplug it first"),
    ("nvdimm", "its memory (NVDIMM) is a file of this host: unplug it first"),
];

/// What a QEMU that waits for a VM is started with.
const DEFER: &str = "start it with -incoming defer";

/// Whether the files behind disks are where the destination finds them too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Disks {
    /// As their file systems say: those that several hosts mount are shared.
    AsFound,
    /// All of them: the operator says so.
    Shared,
}

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// What must go before the VM may.
    pub refusals: Vec<String>,
    /// What is worth knowing.
    pub warnings: Vec<String>,
}

impl Found {
    fn refuse(&mut self, what: String) {
        self.refusals.push(what);
    }
}

/// Looks at a QEMU whose VM is to leave. Changes nothing.
///
/// # Errors
/// [`Qmp::execute`]'s.
pub fn source(qmp: &mut Qmp, disks: Disks) -> Result<Found> {
    let mut found = Found::default();
    look_at_version(qmp, &mut found);
    look_at_capabilities(qmp, &mut found)?;
    let status = qmp.execute("query-status", &json!({}))?;
    let status = status["status"].as_str().unwrap_or_default();
    if status != "running" {
        found.refuse(format!("the VM does not run, it is \"{status}\": only a running one can leave (cont)"));
    }
    let state = qmp.migration()?;
    if is_under_way(&state) {
        let what = match state.as_str() {
            PAUSED => "what is not safe is here only: sg evict --qmp … --resume goes on with it",
            _ => "migrate_cancel, or wait for it",
        };
        found.refuse(format!("a migration of this VM is under way, \"{state}\": {what}"));
    }
    look_at_blockers(qmp, &mut found)?;
    look_at_devices(qmp, &mut found)?;
    look_at_networks(qmp, &mut found)?;
    look_at_disks(qmp, disks, &mut found)?;
    Ok(found)
}

/// Looks at a QEMU that is to take a VM. Changes nothing but whether it may do post-copy, which is tried, and put back.
///
/// # Errors
/// [`Qmp::execute`]'s.
pub fn destination(qmp: &mut Qmp) -> Result<Found> {
    let mut found = Found::default();
    look_at_version(qmp, &mut found);
    look_at_capabilities(qmp, &mut found)?;
    let status = qmp.execute("query-status", &json!({}))?;
    let status = status["status"].as_str().unwrap_or_default();
    if status != "inmigrate" {
        found.refuse(format!("this QEMU waits for no VM, it is \"{status}\": start it with -incoming defer"));
    }
    let migration = qmp.execute("query-migrate", &json!({}))?;
    // From QEMU 8 on one that was told where its VM comes from (exec:, fd:, rdma:) has no address, but begins.
    if let Some(at) = migration["socket-address"].as_array().filter(|at| !at.is_empty()) {
        let at = at.iter().map(Value::to_string).collect::<Vec<_>>().join(", ");
        found.refuse(format!("this QEMU listens for a migration already, at {at}: {DEFER}"));
    } else if text(&migration, "status") == "setup" {
        found.refuse(format!("this QEMU was told where its VM comes from: {DEFER}"));
    }
    look_at_devices(qmp, &mut found)?;
    look_at_networks(qmp, &mut found)?;
    // It looks for userfaultfd when it is told to; one that cannot take a VM anyway is left alone.
    if found.refusals.is_empty() {
        match switch_postcopy_on(qmp) {
            Ok(mut switched) => switched.restore(qmp)?,
            Err(error) if error.kind == ErrorKind::Vm => found.refuse(error.chain()),
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// Switches post-copy on at a QEMU that is to take a VM, and says what was before.
///
/// # Errors
/// [`ErrorKind::Vm`] when it has no userfaultfd, naming who may give it that; [`Qmp::execute`]'s.
pub(crate) fn switch_postcopy_on(qmp: &mut Qmp) -> Result<Settings> {
    Settings::change(qmp, &[("postcopy-ram", true)], &[]).map_err(|cause| {
        if cause.kind != ErrorKind::Vm {
            return cause;
        }
        let message = "the destination QEMU cannot do post-copy: run it as root, give it CAP_SYS_PTRACE or /dev/userfaultfd \
                       (QEMU 8.0), or set the sysctl vm.unprivileged_userfaultfd to 1";
        Error::new(ErrorKind::Vm, message).because(cause)
    })
}

/// Has a QEMU take its VM by a connection: our end of it.
///
/// # Errors
/// [`ErrorKind::Vm`] when another comes already: some say so only now. [`Qmp::execute`]'s.
pub(crate) fn begin_incoming(qmp: &mut Qmp) -> Result<UnixStream> {
    let begun = qmp.connect_by("migrate-incoming", json!({}));
    begun.map(|(ours, _)| ours).map_err(|cause| {
        if cause.kind != ErrorKind::Vm {
            return cause;
        }
        let message = format!("the destination QEMU was told already where its VM comes from: {DEFER}");
        Error::new(ErrorKind::Vm, message).because(cause)
    })
}

pub(crate) fn look_at_version(qmp: &Qmp, found: &mut Found) {
    if qmp.version() < OLDEST {
        found.refuse(format!("this QEMU is {}: 7.2 is the oldest whose stream is known", qmp.version()));
    }
}

fn is_under_way(state: &str) -> bool {
    !matches!(state, "none" | "completed" | "cancelled" | "failed")
}

fn look_at_capabilities(qmp: &mut Qmp, found: &mut Found) -> Result<()> {
    let has = capabilities(qmp)?;
    for (name, why) in CAPABILITIES {
        if has.iter().any(|(known, on)| known == name && *on) {
            found.refuse(format!(
                "the capability {name} is on: {why}; switch it off (migrate-set-capabilities)"
            ));
        }
    }
    let parameters = qmp.execute("query-migrate-parameters", &json!({}))?;
    if parameters["tls-creds"].as_str().is_some_and(|name| !name.is_empty()) {
        let why = "the stream would be sealed for somebody else; set it to \"\" (migrate-set-parameters)";
        found.refuse(format!("the parameter tls-creds is set: {why}"));
    }
    Ok(())
}

/// What QEMU itself knows that keeps it from sending its VM: devices that cannot be, say.
fn look_at_blockers(qmp: &mut Qmp, found: &mut Found) -> Result<()> {
    let migration = qmp.execute("query-migrate", &json!({}))?;
    for reason in migration["blocked-reasons"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        found.refuse(format!("this QEMU does not let its VM leave: {reason}"));
    }
    Ok(())
}

/// Devices of `-device` and of `device_add`, those with a name and those without.
fn look_at_devices(qmp: &mut Qmp, found: &mut Found) -> Result<()> {
    for path in ["/machine/peripheral", "/machine/peripheral-anon"] {
        let listed = qmp.execute("qom-list", &json!({ "path": path }))?;
        for entry in listed.as_array().into_iter().flatten() {
            let (name, kind) = (text(entry, "name"), text(entry, "type"));
            let Some(kind) = kind.strip_prefix("child<").and_then(|kind| kind.strip_suffix('>')) else {
                continue;
            };
            if let Some((_, why)) = DEVICES.iter().find(|(begins, _)| kind.starts_with(begins)) {
                found.refuse(format!("the device {name} ({kind}): {why}"));
            }
        }
    }
    Ok(())
}

/// Back ends of network devices, of which only the monitor for people tells.
fn look_at_networks(qmp: &mut Qmp, found: &mut Found) -> Result<()> {
    for line in qmp.monitor("info network")?.lines() {
        let Some((name, rest)) = line.split_once(": index=") else { continue };
        let kind = rest.split(',').find_map(|part| part.strip_prefix("type="));
        if let Some(kind) = kind.filter(|kind| matches!(*kind, "vhost-user" | "vhost-vdpa")) {
            let name = name.trim_start_matches([' ', '\\']);
            let why = "it maps the memory by itself: give the device another, tap say";
            found.refuse(format!("the network back end {name} ({kind}): {why}"));
        }
    }
    Ok(())
}

fn look_at_disks(qmp: &mut Qmp, disks: Disks, found: &mut Found) -> Result<()> {
    let listed = qmp.execute("query-block", &json!({}))?;
    let process = qmp.process();
    for entry in listed.as_array().into_iter().flatten() {
        let Some(inserted) = entry.get("inserted") else { continue };
        let name = [text(entry, "device"), text(entry, "qdev"), text(inserted, "node-name")];
        let name = name.into_iter().find(|name| !name.is_empty()).unwrap_or("without a name");
        if inserted["dirty-bitmaps"].as_array().is_some_and(|bitmaps| !bitmaps.is_empty()) {
            let why = "has dirty bitmaps, which stay behind: the next backup of it must be a full one";
            found.warnings.push(format!("the drive {name} {why}"));
        }
        let file = text(inserted, "file");
        let writable = inserted["ro"].as_bool() != Some(true);
        if !writable || disks == Disks::Shared || is_shared(file, process, &NETWORKED) {
            continue;
        }
        found.refuse(format!(
            "the drive {name} ({file}) is writable and on this host: its content does not travel. Put it where both hosts \
             find it, or say that they do (--shared-disks)"
        ));
    }
    Ok(())
}

/// NFS, CIFS and SMB2, Ceph, GFS2, OCFS2, Lustre, AFS: what `statfs(2)` calls them.
const NETWORKED: [u32; 8] =
    [0x6969, 0xff53_4d42, 0xfe53_4d42, 0x00c3_6400, 0x0116_1970, 0x7461_636f, 0x0bd0_0bd0, 0x5346_414f];

/// Whether a drive's file is there for several hosts: something else than a path, or on one of these file systems, which they
/// mount.
fn is_shared(file: &str, qemu: Option<Pid>, networked: &[u32]) -> bool {
    let described;
    let path = match file.strip_prefix("json:") {
        None if file.contains("://") => return true,
        None => file,
        Some(node) => {
            described = serde_json::from_str::<Value>(node).unwrap_or_default();
            match file_of(&described) {
                Some(path) => path,
                // A node without a file is somewhere else; of what is no description nothing is known.
                None => return described.is_object(),
            }
        }
    };
    let told = seen_by(qemu, path).and_then(|path| rustix::fs::statfs(path).ok());
    told.is_some_and(|told| networked.contains(&(told.f_type as u32)))
}

/// A path as a QEMU means it: from its own directory, of which nothing is known where the kernel does not tell its process.
fn seen_by(qemu: Option<Pid>, path: &str) -> Option<PathBuf> {
    if path.starts_with('/') {
        return Some(path.into());
    }
    Some(PathBuf::from(format!("/proc/{}/cwd", qemu?.as_raw_nonzero())).join(path))
}

/// The file in a description of a node, at whatever depth.
fn file_of(described: &Value) -> Option<&str> {
    let fields = described.as_object()?;
    fields.get("filename").and_then(Value::as_str).or_else(|| fields.values().find_map(file_of))
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

#[cfg(test)]
mod test;

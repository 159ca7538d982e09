//! What the kernel's refusals mean, and what an operator can do about them.

use std::io;

use libsg::{Error, ErrorKind};
use rustix::io::Errno;

use super::{Choice, Port};

fn system(kind: ErrorKind, what: impl Into<String>, cause: io::Error) -> Error {
    Error::new(kind, what).because(cause)
}

/// Devices cannot be listed.
pub(super) fn no_verbs(cause: io::Error) -> Error {
    let what = match Errno::from_io_error(&cause) {
        Some(Errno::OPNOTSUPP) => "RDMA needs libibverbs.so.1 (Debian: libibverbs1 and ibverbs-providers)",
        Some(Errno::NOSYS) => "this kernel has no RDMA, or its module ib_uverbs is not loaded",
        _ => "RDMA devices cannot be listed",
    };
    system(ErrorKind::System, what, cause)
}

/// There are none, or those that there are cannot be opened.
pub(super) fn no_device(unopened: &[(String, io::Error)]) -> Error {
    let Some((name, why)) = unopened.first() else {
        let what = "this host has no RDMA device that libibverbs knows: see `rdma link`; its driver, and its library of \
                    ibverbs-providers, must be there";
        return Error::new(ErrorKind::Input, what);
    };
    let what = format!("the RDMA device {name} cannot be opened: may this user use /dev/infiniband/uverbs*?");
    system(ErrorKind::System, what, io::Error::new(why.kind(), why.to_string()))
}

/// A device's identifiers are not known.
pub(super) fn no_gids(cause: io::Error) -> Error {
    let what = "the device's GIDs cannot be read: libibverbs must be of rdma-core 32 or newer";
    system(ErrorKind::System, what, cause)
}

/// None is called so.
pub(super) fn no_such_port(ports: &[Port], choice: &Choice) -> Error {
    let wanted = choice.device.as_deref().unwrap_or("any device");
    let wanted = choice.port.map_or(wanted.to_owned(), |port| format!("{wanted}, port {port}"));
    let there: Vec<String> = ports.iter().map(ToString::to_string).collect();
    let what = format!("there is no {wanted}: there is {}", there.join(", "));
    Error::new(ErrorKind::Input, what)
}

/// Memory was not registered.
pub(super) fn no_region(bytes: usize, cause: io::Error) -> Error {
    let (kind, what) = match Errno::from_io_error(&cause) {
        Some(Errno::NOMEM | Errno::PERM | Errno::AGAIN) => (
            ErrorKind::Full,
            format!(
                "{bytes} bytes cannot be locked for the device: raise the limit on locked memory (`ulimit -l unlimited`, \
                 systemd: LimitMEMLOCK=infinity), or grant CAP_IPC_LOCK"
            ),
        ),
        Some(Errno::NOSPC) => (ErrorKind::Full, "the device registers no more memory".to_owned()),
        Some(Errno::FAULT) => (
            ErrorKind::System,
            "the device cannot keep this memory where it is: it is of a file, or not mapped".to_owned(),
        ),
        _ => (ErrorKind::System, format!("the device registers no {bytes} bytes")),
    };
    system(kind, what, cause)
}

/// A domain, queue or queue pair was not made.
pub(super) fn no_more(what: &str, cause: io::Error) -> Error {
    let (kind, why) = match Errno::from_io_error(&cause) {
        Some(Errno::NOMEM | Errno::AGAIN) => (
            ErrorKind::Full,
            "the device has no more, or the limit on locked memory is reached (`ulimit -l unlimited`, systemd: \
             LimitMEMLOCK=infinity)",
        ),
        Some(Errno::NOSPC) => (ErrorKind::Full, "the device has no more"),
        _ => (ErrorKind::System, "the device refuses it"),
    };
    system(kind, format!("no {what}: {why}"), cause)
}

/// A queue pair was not connected.
pub(super) fn not_connected(ours: &super::Gid, peer: std::net::Ipv6Addr, cause: io::Error) -> Error {
    let why = match Errno::from_io_error(&cause) {
        Some(Errno::NETUNREACH | Errno::HOSTUNREACH) => "there is no route between them",
        Some(Errno::TIMEDOUT) => "nobody answers for it on the link",
        Some(Errno::INVAL) => {
            "the device does not take it: both ends need GIDs of one kind, and packets that both send"
        }
        _ => "the device refuses it",
    };
    let what = format!(
        "no way from the GID {} (index {}) to {peer}: {why}; other indexes can be chosen at both ends",
        ours.address, ours.index
    );
    system(ErrorKind::Unreachable, what, cause)
}

#[cfg(test)]
mod test {
    use super::*;

    #[test]
    fn a_cause_is_told_with_its_cure() {
        let of = |errno: Errno| io::Error::from(errno);
        let locked = no_region(4096, of(Errno::NOMEM));
        assert_eq!(locked.kind, ErrorKind::Full, "so that what is unused is let go");
        assert!(locked.message.contains("ulimit -l"));
        assert_eq!(no_region(4096, of(Errno::FAULT)).kind, ErrorKind::System);
        assert!(no_verbs(of(Errno::OPNOTSUPP)).message.contains("libibverbs1"));
        assert!(no_verbs(of(Errno::NOSYS)).message.contains("ib_uverbs"));
        assert!(no_device(&[]).message.contains("rdma link"));
        let unopened = [("rxe0".to_owned(), of(Errno::ACCESS))];
        assert!(no_device(&unopened).chain().contains("Permission denied"));
        assert_eq!(no_more("queue pair", of(Errno::NOMEM)).kind, ErrorKind::Full);
    }
}

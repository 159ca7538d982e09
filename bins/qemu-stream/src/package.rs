//! The package: the state of all devices, which only the destination reads.
//!
//! A device's state does not say how long it is, so that the package cannot be taken apart. Its two ends can be told, and
//! with them whether it is one: LISTEN stands first, and some pings and RUN last.

use crate::blocks::Blocks;
use crate::command::Command;

/// Why a package is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the package does not {0}: it is not that of a post-copy migration")]
pub struct PackageError(&'static str);

/// What a package shows of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Package {
    /// The ping after all devices, which QEMU sends since 2.5.
    pub loaded: u32,
    /// The ping whose answer a source from 10.2 on waits for before it completes.
    pub awaited: Option<u32>,
}

/// The number of the ping that stands last in the package of QEMU 10.2 and later.
const AWAITED: u32 = 0x42;

/// Bytes of a command without a body, and of a ping.
const COMMAND_BYTES: usize = 5;
const PING_BYTES: usize = 9;

impl Package {
    /// Looks at both ends of a package, all of whose bytes these are.
    ///
    /// # Errors
    /// When they are not those of a package.
    pub fn inspect(bytes: &[u8]) -> Result<Self, PackageError> {
        let command = |command: Command| {
            let mut bytes = Vec::with_capacity(PING_BYTES);
            command.encode(&Blocks::default(), &mut bytes);
            bytes
        };
        let devices = bytes
            .strip_prefix(&command(Command::PostcopyListen)[..])
            .ok_or(PackageError("begin with LISTEN"))?
            .strip_suffix(&command(Command::PostcopyRun)[..])
            .ok_or(PackageError("end with RUN"))?;
        let (devices, last) = ping(devices).ok_or(PackageError("end with a PING and RUN"))?;
        Ok(match ping(devices) {
            Some((_, loaded)) if last == AWAITED => Self { loaded, awaited: Some(last) },
            _ => Self { loaded: last, awaited: None },
        })
    }
}

/// The number of the ping at the end, and what stands before it.
fn ping(bytes: &[u8]) -> Option<(&[u8], u32)> {
    let (before, ping) = bytes.split_at_checked(bytes.len().checked_sub(PING_BYTES)?)?;
    let (head, number) = ping.split_at_checked(COMMAND_BYTES)?;
    let number = u32::from_be_bytes(number.try_into().ok()?);
    let mut expected = Vec::with_capacity(PING_BYTES);
    Command::Ping(number).encode(&Blocks::default(), &mut expected);
    expected.starts_with(head).then_some((before, number))
}

#[cfg(test)]
mod test {
    use super::*;

    fn package(middle: &[u8], tail: &[Command]) -> Vec<u8> {
        let mut bytes = Vec::new();
        Command::PostcopyListen.encode(&Blocks::default(), &mut bytes);
        bytes.extend_from_slice(middle);
        tail.iter().for_each(|command| command.encode(&Blocks::default(), &mut bytes));
        bytes
    }

    #[test]
    fn both_ends_are_told() {
        let of_7_2 = package(b"devices", &[Command::Ping(3), Command::PostcopyRun]);
        assert_eq!(Package::inspect(&of_7_2), Ok(Package { loaded: 3, awaited: None }));
        let of_10_2 = package(b"devices", &[Command::Ping(3), Command::Ping(0x42), Command::PostcopyRun]);
        assert_eq!(Package::inspect(&of_10_2), Ok(Package { loaded: 3, awaited: Some(0x42) }));
    }

    #[test]
    fn what_is_cut_is_no_package() {
        let whole = package(b"devices", &[Command::Ping(3), Command::PostcopyRun]);
        for length in 0..whole.len() {
            assert!(Package::inspect(&whole[..length]).is_err(), "{length}");
        }
        assert!(Package::inspect(&whole[1..]).is_err());
        assert!(Package::inspect(&package(b"devices", &[Command::PostcopyRun])).is_err());
    }
}

//! The first bytes of a stream, and what they say of the machine.

use crate::blocks::bounds;
use crate::bytes::{Cursor, Stop, put_name, put_u32, text};
use crate::error::{StreamErrorKind, Unsupported};
use crate::limits::MACHINE_BYTES_MAX;

const MAGIC: u32 = u32::from_be_bytes(*b"QEVM");
const VERSION: u32 = 3;
const CONFIGURATION: u8 = 0x07;
const SUBSECTION: u8 = 0x05;
const UUID: &str = "configuration/uuid";
const PAGE_BITS: &str = "configuration/target-page-bits";
const CAPABILITIES: &str = "configuration/capabilities";

/// What a stream says before anything else. The destination compares it with its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Configuration {
    /// The machine type, with its version: `pc-q35-7.2`.
    pub machine: String,
    /// The VM's, where the capability `validate-uuid` is on.
    pub uuid: Option<[u8; 16]>,
}

impl Configuration {
    /// Of that machine type, at most [`MACHINE_BYTES_MAX`] bytes.
    #[must_use]
    pub fn new(machine: &str) -> Self {
        Self { machine: machine.into(), uuid: None }
    }

    /// Appends the first bytes of a stream.
    pub fn encode(&self, out: &mut Vec<u8>) {
        put_u32(MAGIC, out);
        put_u32(VERSION, out);
        out.push(CONFIGURATION);
        put_u32(self.machine.len() as u32, out);
        out.extend_from_slice(self.machine.as_bytes());
        if let Some(uuid) = &self.uuid {
            out.push(SUBSECTION);
            put_name(UUID, out);
            put_u32(1, out);
            out.extend_from_slice(uuid);
        }
    }

    /// Off the front of a stream. What tells that it is over is the byte behind it.
    pub(crate) fn decode(cursor: &mut Cursor<'_>) -> Result<Self, Stop> {
        match cursor.u32()? {
            MAGIC => {}
            other => return Err(StreamErrorKind::Magic(other).into()),
        }
        match cursor.u32()? {
            VERSION => {}
            other => return Err(StreamErrorKind::Version("the stream", other).into()),
        }
        if cursor.u8()? != CONFIGURATION {
            return Err(Unsupported::OldMachine.into());
        }
        let length = cursor.u32()?;
        if length as usize > MACHINE_BYTES_MAX {
            return Err(bounds("the length of a machine type", length.into(), "255 bytes at most"));
        }
        let machine = text(cursor.take(length as usize)?, "a machine type")?;
        let mut configuration = Self::new(machine);
        while cursor.peek()? == SUBSECTION {
            cursor.u8()?;
            configuration.subsection(cursor)?;
        }
        Ok(configuration)
    }

    fn subsection(&mut self, cursor: &mut Cursor<'_>) -> Result<(), Stop> {
        let name = cursor.text("the name of a part of the configuration")?;
        let version = cursor.u32()?;
        if version != 1 {
            return Err(StreamErrorKind::Version("a part of the configuration", version).into());
        }
        match name {
            UUID if self.uuid.is_none() => self.uuid = Some(cursor.uuid()?),
            UUID => return Err(StreamErrorKind::Order("a second UUID").into()),
            PAGE_BITS => {
                return Err(Unsupported::Section("a machine with pages of its own size".into()).into());
            }
            CAPABILITIES => {
                // Whatever is named there changes what follows.
                let count = cursor.u32()?;
                if count == 0 {
                    return Err(bounds("the number of capabilities", 0, "one at least"));
                }
                return Err(Unsupported::Named(cursor.text("a capability's name")?.into()).into());
            }
            other => return Err(Unsupported::Section(other.into()).into()),
        }
        Ok(())
    }
}

//! The bytes of the NBD protocol behind the handshake: requests in, replies out. Pure; a request is of fixed size, and
//! says how long what follows it is before anything is taken for it.

/// Bytes of a request, without its payload.
pub const REQUEST_BYTES: usize = 28;

/// The longest payload of one request; clients are told so. A longer write is not answered: its bytes cannot be told
/// from requests, so the connection ends.
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_MAGIC: u32 = 0x6744_6698;
const STRUCTURED_MAGIC: u32 = 0x668e_33ef;

/// What clients are told of the device.
pub mod device {
    /// The flags say something.
    pub const HAS_FLAGS: u16 = 1;
    /// Nothing can be written.
    pub const READ_ONLY: u16 = 1 << 1;
    /// There is FLUSH.
    pub const FLUSH: u16 = 1 << 2;
    /// There is FUA.
    pub const FUA: u16 = 1 << 3;
    /// There is TRIM.
    pub const TRIM: u16 = 1 << 5;
    /// There is WRITE_ZEROES.
    pub const WRITE_ZEROES: u16 = 1 << 6;
    /// A read can be asked for in one chunk.
    pub const ONE_CHUNK: u16 = 1 << 7;
    /// Several connections see one device: what one has flushed, all have.
    pub const MULTI_CONN: u16 = 1 << 8;
    /// Zeroing is never slower than writing zeros.
    pub const FAST_ZERO: u16 = 1 << 11;
}

/// Flags of a request.
pub mod flag {
    /// Safe before it is answered.
    pub const FUA: u16 = 1;
    /// Space for zeros is to be kept. Nothing is ever reserved at intermediaries: it is heard and not heeded.
    pub const NO_HOLE: u16 = 1 << 1;
    /// A read is to be answered in one chunk, as every one is.
    pub const ONE_CHUNK: u16 = 1 << 2;
    /// Only the first extent is asked for.
    pub const ONE_EXTENT: u16 = 1 << 3;
    /// Zeroing is to fail rather than take long.
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Why a request failed, as the protocol numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Fault {
    /// Not allowed: the device is read-only.
    Permission = 1,
    /// Bytes could not be had, or not be made safe.
    Io = 5,
    /// A request that makes no sense.
    Invalid = 22,
    /// The intermediaries are full.
    NoSpace = 28,
    /// Longer than the server said that it takes.
    TooLong = 75,
    /// There is no such command.
    Unsupported = 95,
    /// The server ends.
    Shutdown = 108,
}

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// Give bytes.
    Read,
    /// Take the bytes that follow.
    Write,
    /// The client goes. Not answered.
    Disconnect,
    /// Everything that was answered before is to be safe.
    Flush,
    /// These bytes are of no use to anyone.
    Trim,
    /// These bytes are zero.
    WriteZeroes,
    /// Which bytes are data, and which are zero without being stored.
    BlockStatus,
    /// What this server does not know.
    Other,
}

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What is asked.
    pub command: Command,
    /// How.
    pub flags: u16,
    /// What the client calls it.
    pub cookie: u64,
    /// From which byte on.
    pub offset: u64,
    /// How many bytes.
    pub length: u32,
}

impl Request {
    /// Reads a request. `None`: this is none, and nothing that follows can be understood.
    pub fn decode(bytes: &[u8; REQUEST_BYTES]) -> Option<Self> {
        let mut rest = Fields(bytes);
        if rest.u32()? != REQUEST_MAGIC {
            return None;
        }
        let flags = rest.u16()?;
        let command = match rest.u16()? {
            0 => Command::Read,
            1 => Command::Write,
            2 => Command::Disconnect,
            3 => Command::Flush,
            4 => Command::Trim,
            6 => Command::WriteZeroes,
            7 => Command::BlockStatus,
            _ => Command::Other,
        };
        let request = Self { command, flags, cookie: rest.u64()?, offset: rest.u64()?, length: rest.u32()? };
        let too_long = command == Command::Write && request.length > PAYLOAD_BYTES_MAX;
        (!too_long).then_some(request)
    }

    /// Bytes that follow it.
    pub fn payload_bytes(&self) -> usize {
        if self.command == Command::Write { self.length as usize } else { 0 }
    }

    /// Whether it can be done on a device of so many bytes.
    ///
    /// # Errors
    /// What the client is answered.
    pub fn check(&self, device_bytes: u64, read_only: bool) -> Result<(), Fault> {
        let known = match self.command {
            Command::Read => flag::ONE_CHUNK | flag::FUA,
            Command::Write | Command::Trim | Command::Flush => flag::FUA,
            Command::WriteZeroes => flag::FUA | flag::NO_HOLE | flag::FAST_ZERO,
            Command::BlockStatus => flag::ONE_EXTENT,
            Command::Disconnect | Command::Other => u16::MAX,
        };
        if self.flags & !known != 0 {
            return Err(Fault::Invalid);
        }
        let ranged = match self.command {
            Command::Flush | Command::Disconnect => false,
            Command::Other => return Err(Fault::Unsupported),
            Command::Write | Command::Trim | Command::WriteZeroes if read_only => {
                return Err(Fault::Permission);
            }
            _ => true,
        };
        let end = self.offset.checked_add(u64::from(self.length));
        if ranged && self.length == 0 {
            return Err(Fault::Invalid);
        }
        if ranged && end.is_none_or(|end| end > device_bytes) {
            let writes = matches!(self.command, Command::Write | Command::WriteZeroes);
            return Err(if writes { Fault::NoSpace } else { Fault::Invalid });
        }
        if self.command == Command::Read && self.length > PAYLOAD_BYTES_MAX {
            return Err(Fault::TooLong);
        }
        Ok(())
    }
}

/// Numbers from the front of some bytes, most significant byte first.
pub struct Fields<'b>(pub &'b [u8]);

impl<'b> Fields<'b> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*head)
    }

    /// Two bytes.
    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    /// Four bytes.
    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    /// Eight bytes.
    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A text with its length in front.
    pub fn text(&mut self) -> Option<&'b [u8]> {
        let length = self.u32()?;
        let (text, rest) = self.0.split_at_checked(usize::try_from(length).ok()?)?;
        self.0 = rest;
        Some(text)
    }
}

/// An answer without bytes: done, or why not.
pub fn simple_reply(cookie: u64, fault: Option<Fault>) -> Vec<u8> {
    let mut out = Vec::with_capacity(16);
    out.extend(SIMPLE_MAGIC.to_be_bytes());
    out.extend(fault.map_or(0, |fault| fault as u32).to_be_bytes());
    out.extend(cookie.to_be_bytes());
    out
}

/// The only chunk of a structured answer: its head, and the part of its body that is given.
fn chunk(cookie: u64, kind: u16, body: &[u8], bytes_behind: u32) -> Vec<u8> {
    const DONE: u16 = 1;
    let mut out = Vec::with_capacity(20 + body.len());
    out.extend(STRUCTURED_MAGIC.to_be_bytes());
    out.extend(DONE.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend(cookie.to_be_bytes());
    out.extend((body.len() as u32).saturating_add(bytes_behind).to_be_bytes());
    out.extend(body);
    out
}

/// What stands in front of a read's bytes.
pub fn data_chunk(request: &Request) -> Vec<u8> {
    chunk(request.cookie, 1, &request.offset.to_be_bytes(), request.length)
}

/// A read whose bytes are all zero.
pub fn hole_chunk(request: &Request) -> Vec<u8> {
    let mut body = request.offset.to_be_bytes().to_vec();
    body.extend(request.length.to_be_bytes());
    chunk(request.cookie, 2, &body, 0)
}

/// Why a read or a question for extents failed, with words for whoever looks at the client's log.
pub fn error_chunk(cookie: u64, fault: Fault, why: &str) -> Vec<u8> {
    let why: String = why.chars().take(200).collect();
    let mut body = (fault as u32).to_be_bytes().to_vec();
    body.extend((why.len() as u16).to_be_bytes());
    body.extend(why.as_bytes());
    chunk(cookie, 0x8001, &body, 0)
}

/// The number of the one context for which extents can be asked: `base:allocation`.
pub const ALLOCATION: u32 = 1;

/// An extent of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Its length.
    pub bytes: u32,
    /// Whether it is known to read as zeros, and is stored nowhere.
    pub zero: bool,
}

/// The extents from the start of what was asked for on.
pub fn extents_chunk(cookie: u64, extents: &[Extent]) -> Vec<u8> {
    const HOLE_AND_ZERO: u32 = 3;
    let mut body = ALLOCATION.to_be_bytes().to_vec();
    for extent in extents {
        body.extend(extent.bytes.to_be_bytes());
        body.extend(if extent.zero { HOLE_AND_ZERO } else { 0 }.to_be_bytes());
    }
    chunk(cookie, 5, &body, 0)
}

#[cfg(test)]
mod test {
    use proptest::prelude::*;

    use super::*;

    fn bytes(command: u16, flags: u16, offset: u64, length: u32) -> [u8; REQUEST_BYTES] {
        let mut out = REQUEST_MAGIC.to_be_bytes().to_vec();
        out.extend(flags.to_be_bytes());
        out.extend(command.to_be_bytes());
        out.extend(7_u64.to_be_bytes());
        out.extend(offset.to_be_bytes());
        out.extend(length.to_be_bytes());
        out.try_into().expect("28 bytes")
    }

    #[test]
    fn requests_are_read_and_checked() {
        let read = Request::decode(&bytes(0, 0, 4096, 512)).expect("one");
        assert_eq!((read.command, read.cookie, read.offset, read.length), (Command::Read, 7, 4096, 512));
        assert_eq!(read.check(4608, true), Ok(()));
        assert_eq!(read.check(4607, true), Err(Fault::Invalid));
        let at = |command, flags, offset, length| {
            Request::decode(&bytes(command, flags, offset, length)).expect("one").check(1 << 30, false)
        };
        assert_eq!(at(1, flag::FUA, 0, 512), Ok(()));
        assert_eq!(at(1, 0, u64::MAX, 512), Err(Fault::NoSpace));
        assert_eq!(at(1, 0, 0, 0), Err(Fault::Invalid));
        assert_eq!(at(0, 0, u64::MAX, u32::MAX), Err(Fault::Invalid));
        assert_eq!(at(0, 0, 0, PAYLOAD_BYTES_MAX + 1), Err(Fault::TooLong));
        assert_eq!(at(4, flag::FAST_ZERO, 0, 1), Err(Fault::Invalid));
        assert_eq!(at(6, flag::FAST_ZERO | flag::NO_HOLE, 0, 1 << 30), Ok(()));
        assert_eq!(at(5, 0, 0, 1), Err(Fault::Unsupported));
        assert_eq!(at(3, 0, u64::MAX, 9), Ok(()), "a flush has no range");
        let write = Request::decode(&bytes(1, 0, 0, 1)).expect("one");
        assert_eq!(write.check(1 << 30, true), Err(Fault::Permission));
        assert_eq!((write.payload_bytes(), read.payload_bytes()), (1, 0));
    }

    #[test]
    fn what_cannot_be_followed_is_no_request() {
        assert_eq!(Request::decode(&[0; REQUEST_BYTES]), None);
        assert_eq!(Request::decode(&bytes(1, 0, 0, PAYLOAD_BYTES_MAX + 1)), None);
        assert!(Request::decode(&bytes(1, 0, 0, PAYLOAD_BYTES_MAX)).is_some());
    }

    #[test]
    fn replies_are_the_protocols() {
        assert_eq!(
            simple_reply(1, Some(Fault::Io)),
            [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 1]
        );
        let read = Request::decode(&bytes(0, 0, 4096, 512)).expect("one");
        let head = [0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 2, 8];
        assert_eq!(data_chunk(&read)[..20], head);
        assert_eq!(hole_chunk(&read).len(), 32);
        let extents = [Extent { bytes: 4096, zero: true }, Extent { bytes: 1, zero: false }];
        let told = extents_chunk(7, &extents);
        assert_eq!(told[16..], [0, 0, 0, 20, 0, 0, 0, 1, 0, 0, 16, 0, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0, 0]);
        let error = error_chunk(7, Fault::Io, &"x".repeat(70_000));
        assert_eq!(error.len(), 20 + 6 + 200);
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes: [u8; REQUEST_BYTES], device: u64, read_only: bool, begin: bool) {
            let mut bytes = bytes;
            if begin {
                bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
            }
            if let Some(request) = Request::decode(&bytes) {
                prop_assert!(request.payload_bytes() <= PAYLOAD_BYTES_MAX as usize);
                let ranged = !matches!(request.command, Command::Flush | Command::Disconnect);
                if request.check(device, read_only).is_ok() && ranged {
                    prop_assert!(request.offset + u64::from(request.length) <= device);
                }
            }
        }
    }
}

//! The fixed newstyle handshake of NBD, from the server's side: bytes in, bytes out, and at last what was agreed.
//! Pure. An option is looked at when it is there as a whole, and bounded before that.

use super::wire::{ALLOCATION, Fields, PAYLOAD_BYTES_MAX};

/// Bytes of an option's data; the longest that makes sense is a name with a list of contexts. A longer one ends the
/// connection.
pub const OPTION_BYTES_MAX: usize = 8 << 10;

/// Options of one client; more end the connection.
const OPTIONS_MAX: u32 = 64;

const HEAD_BYTES: usize = 16;
const OPTION_MAGIC: u64 = 0x4948_4156_454F_5054;
const REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const FIXED_NEWSTYLE: u16 = 1;
const NO_ZEROES: u16 = 2;
const CONTEXT: &[u8] = b"base:allocation";

/// What is served.
#[derive(Clone, Debug)]
pub struct Export {
    /// What it is called. The empty name means it, too.
    pub name: String,
    /// Another name of it.
    pub number: String,
    /// Its length.
    pub bytes: u64,
    /// What can be done with it.
    pub flags: u16,
}

/// How client and server go on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Agreed {
    /// Reads are answered in chunks.
    pub structured: bool,
    /// Extents may be asked for.
    pub extents: bool,
}

/// What came of looking at the client's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// There is no whole message yet.
    Incomplete,
    /// One message of so many bytes is through.
    Took(usize),
    /// The handshake is over: behind so many bytes there are requests.
    Begin(usize, Agreed),
    /// The client goes, or is no client.
    End,
}

/// A handshake that is going on.
#[derive(Debug)]
pub struct Negotiation<'e> {
    export: &'e Export,
    agreed: Agreed,
    greeted: bool,
    no_zeroes: bool,
    options: u32,
}

/// The first bytes that the server sends.
pub fn greeting() -> Vec<u8> {
    let mut out = b"NBDMAGIC".to_vec();
    out.extend(OPTION_MAGIC.to_be_bytes());
    out.extend((FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
    out
}

mod option {
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_CONTEXT: u32 = 9;
    pub const SET_CONTEXT: u32 = 10;
}

mod reply {
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const CONTEXT: u32 = 4;
    pub const UNSUPPORTED: u32 = 0x8000_0001;
    pub const INVALID: u32 = 0x8000_0003;
    pub const UNKNOWN: u32 = 0x8000_0006;
}

impl<'e> Negotiation<'e> {
    /// With a client that was sent the [`greeting`].
    pub const fn new(export: &'e Export) -> Self {
        let agreed = Agreed { structured: false, extents: false };
        Self { export, agreed, greeted: false, no_zeroes: false, options: 0 }
    }

    /// Looks at what the client sent and was not taken yet; answers are appended to `out`.
    pub fn step(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Step {
        if self.greeted { self.option(bytes, out) } else { self.client_flags(bytes) }
    }

    fn client_flags(&mut self, bytes: &[u8]) -> Step {
        let Some(flags) = Fields(bytes).u32() else { return Step::Incomplete };
        let fixed = flags & u32::from(FIXED_NEWSTYLE) != 0;
        if !fixed || flags & !u32::from(FIXED_NEWSTYLE | NO_ZEROES) != 0 {
            return Step::End;
        }
        self.no_zeroes = flags & u32::from(NO_ZEROES) != 0;
        self.greeted = true;
        Step::Took(4)
    }

    fn option(&mut self, bytes: &[u8], out: &mut Vec<u8>) -> Step {
        let mut head = Fields(bytes);
        let (Some(magic), Some(option), Some(length)) = (head.u64(), head.u32(), head.u32()) else {
            return Step::Incomplete;
        };
        let length = length as usize;
        if magic != OPTION_MAGIC || length > OPTION_BYTES_MAX || self.options >= OPTIONS_MAX {
            return Step::End;
        }
        let Some(data) = head.0.get(..length) else { return Step::Incomplete };
        self.options += 1;
        let took = HEAD_BYTES + length;
        match option {
            option::EXPORT_NAME => return self.export_name(data, took, out),
            option::ABORT => {
                answer(out, option, reply::ACK, &[]);
                return Step::End;
            }
            option::INFO | option::GO => match self.info(data, option, out) {
                Ok(()) if option == option::GO => return Step::Begin(took, self.agreed),
                Ok(()) => {}
                Err(refusal) => answer(out, option, refusal, &[]),
            },
            option::LIST if data.is_empty() => self.list(out),
            option::STRUCTURED_REPLY if data.is_empty() => {
                self.agreed.structured = true;
                answer(out, option, reply::ACK, &[]);
            }
            option::LIST_CONTEXT | option::SET_CONTEXT => {
                let refused = self.context(data, option, out).err();
                answer(out, option, refused.unwrap_or(reply::ACK), &[]);
            }
            option::LIST | option::STRUCTURED_REPLY => answer(out, option, reply::INVALID, &[]),
            _ => answer(out, option, reply::UNSUPPORTED, &[]),
        }
        Step::Took(took)
    }

    fn is_it(&self, name: &[u8]) -> bool {
        name.is_empty() || name == self.export.name.as_bytes() || name == self.export.number.as_bytes()
    }

    /// The oldest way to begin: it has no answer for a name that there is not.
    fn export_name(&self, name: &[u8], took: usize, out: &mut Vec<u8>) -> Step {
        if !self.is_it(name) {
            return Step::End;
        }
        out.extend(self.export.bytes.to_be_bytes());
        out.extend(self.export.flags.to_be_bytes());
        if !self.no_zeroes {
            out.extend([0; 124]);
        }
        Step::Begin(took, self.agreed)
    }

    fn list(&self, out: &mut Vec<u8>) {
        let mut body = (self.export.name.len() as u32).to_be_bytes().to_vec();
        body.extend(self.export.name.as_bytes());
        answer(out, option::LIST, reply::SERVER, &body);
        answer(out, option::LIST, reply::ACK, &[]);
    }

    fn info(&self, data: &[u8], option: u32, out: &mut Vec<u8>) -> Result<(), u32> {
        let mut data = Fields(data);
        let name = data.text().ok_or(reply::INVALID)?;
        let wanted = data.u16().ok_or(reply::INVALID)?;
        if data.0.len() != usize::from(wanted) * 2 {
            return Err(reply::INVALID);
        }
        if !self.is_it(name) {
            return Err(reply::UNKNOWN);
        }
        let mut export = vec![0, 0];
        export.extend(self.export.bytes.to_be_bytes());
        export.extend(self.export.flags.to_be_bytes());
        answer(out, option, reply::INFO, &export);
        // Any byte can be read and written; a page is what costs least.
        let mut sizes = vec![0, 3];
        for bytes in [1, libsg::page::PAGE_BYTES as u32, PAYLOAD_BYTES_MAX] {
            sizes.extend(bytes.to_be_bytes());
        }
        answer(out, option, reply::INFO, &sizes);
        answer(out, option, reply::ACK, &[]);
        Ok(())
    }

    fn context(&mut self, data: &[u8], option: u32, out: &mut Vec<u8>) -> Result<(), u32> {
        let mut data = Fields(data);
        let name = data.text().ok_or(reply::INVALID)?;
        let queries = data.u32().ok_or(reply::INVALID)?;
        if !self.agreed.structured {
            return Err(reply::INVALID);
        }
        if !self.is_it(name) {
            return Err(reply::UNKNOWN);
        }
        let lists = option == option::LIST_CONTEXT;
        let mut wanted = lists && queries == 0;
        for _ in 0..queries {
            // Each takes four bytes at least: a count that lies ends here soon.
            let query = data.text().ok_or(reply::INVALID)?;
            wanted |= query == CONTEXT || (lists && query == b"base:");
        }
        if !data.0.is_empty() {
            return Err(reply::INVALID);
        }
        if wanted {
            let mut body = if lists { 0 } else { ALLOCATION }.to_be_bytes().to_vec();
            body.extend(CONTEXT);
            answer(out, option, reply::CONTEXT, &body);
        }
        if !lists {
            self.agreed.extents = wanted;
        }
        Ok(())
    }
}

fn answer(out: &mut Vec<u8>, option: u32, kind: u32, body: &[u8]) {
    out.extend(REPLY_MAGIC.to_be_bytes());
    out.extend(option.to_be_bytes());
    out.extend(kind.to_be_bytes());
    out.extend((body.len() as u32).to_be_bytes());
    out.extend(body);
}

#[cfg(test)]
mod test {
    use proptest::prelude::*;

    use super::*;

    fn export() -> Export {
        Export { name: "disk".into(), number: "0abc".into(), bytes: 1 << 20, flags: 0x41 }
    }

    fn option(option: u32, data: &[u8]) -> Vec<u8> {
        let mut out = OPTION_MAGIC.to_be_bytes().to_vec();
        out.extend(option.to_be_bytes());
        out.extend((data.len() as u32).to_be_bytes());
        out.extend(data);
        out
    }

    fn name_then(name: &str, rest: &[u8]) -> Vec<u8> {
        let mut out = (name.len() as u32).to_be_bytes().to_vec();
        out.extend(name.as_bytes());
        out.extend(rest);
        out
    }

    /// What the server says to these messages, and where it ends.
    fn talk(messages: &[Vec<u8>]) -> (Vec<u8>, Step) {
        let export = export();
        let mut negotiation = Negotiation::new(&export);
        let (mut out, mut last) = (Vec::new(), Step::Incomplete);
        for message in messages {
            for end in 0..message.len() {
                assert_eq!(negotiation.step(&message[..end], &mut out), Step::Incomplete);
            }
            last = negotiation.step(message, &mut out);
        }
        (out, last)
    }

    fn flags(flags: u32) -> Vec<u8> {
        flags.to_be_bytes().to_vec()
    }

    /// Kinds of the replies in `out`.
    fn kinds(mut out: &[u8]) -> Vec<u32> {
        let mut kinds = Vec::new();
        while !out.is_empty() {
            let mut fields = Fields(out);
            assert_eq!(fields.u64(), Some(REPLY_MAGIC));
            fields.u32().expect("the option");
            kinds.push(fields.u32().expect("a kind"));
            fields.text().expect("a body");
            out = fields.0;
        }
        kinds
    }

    #[test]
    fn a_client_of_today() {
        let mut query = 1_u32.to_be_bytes().to_vec();
        query.extend(name_then("base:allocation", &[]));
        let (out, end) = talk(&[
            flags(3),
            option(8, &[]),
            option(10, &name_then("disk", &query)),
            option(7, &name_then("", &[0, 0])),
        ]);
        assert_eq!(
            kinds(&out),
            [reply::ACK, reply::CONTEXT, reply::ACK, reply::INFO, reply::INFO, reply::ACK]
        );
        let took = HEAD_BYTES + 6;
        assert_eq!(end, Step::Begin(took, Agreed { structured: true, extents: true }));
    }

    #[test]
    fn a_client_of_old() {
        let (out, end) = talk(&[flags(1), option(1, b"0abc")]);
        assert_eq!((out.len(), end), (8 + 2 + 124, Step::Begin(HEAD_BYTES + 4, Agreed::default())));
        assert_eq!(out[..10], [0, 0, 0, 0, 0, 16, 0, 0, 0, 0x41]);
        assert_eq!(talk(&[flags(3), option(1, b"disk")]).0.len(), 10);
        assert_eq!(talk(&[flags(3), option(1, b"other")]), (vec![], Step::End));
    }

    #[test]
    fn what_is_wrong_is_refused_and_what_is_unknown_too() {
        let refused = |message: Vec<u8>| kinds(&talk(&[flags(3), message]).0);
        assert_eq!(refused(option(7, &name_then("other", &[0, 0]))), [reply::UNKNOWN]);
        assert_eq!(
            refused(option(7, &name_then("disk", &[0, 1]))),
            [reply::INVALID],
            "a list that is not there"
        );
        assert_eq!(refused(option(7, &[0xff; 9])), [reply::INVALID], "a name longer than all there is");
        assert_eq!(refused(option(10, &name_then("disk", &[0, 0, 0, 0]))), [reply::INVALID], "no chunks");
        assert_eq!(refused(option(3, b"x")), [reply::INVALID]);
        for unknown in [0, 4, 5, 11, 99] {
            assert_eq!(refused(option(unknown, b"")), [reply::UNSUPPORTED]);
        }
        assert_eq!(refused(option(3, &[])), [reply::SERVER, reply::ACK]);
        let lies = [&u32::MAX.to_be_bytes()[..], b"\0\0\0\x01x"].concat();
        let (out, _) = talk(&[flags(3), option(8, &[]), option(9, &name_then("", &lies))]);
        assert_eq!(kinds(&out), [reply::ACK, reply::INVALID], "four thousand million queries");
        for end in
            [vec![flags(0)], vec![flags(4 | 3)], vec![flags(3), vec![0; 16]], vec![flags(3), option(2, &[])]]
        {
            assert_eq!(talk(&end).1, Step::End);
        }
        let mut long = option(7, &[]);
        long[12..16].copy_from_slice(&u32::MAX.to_be_bytes());
        let export = export();
        let mut negotiation = Negotiation { greeted: true, ..Negotiation::new(&export) };
        assert_eq!(
            negotiation.step(&long, &mut Vec::new()),
            Step::End,
            "nothing is waited for, or allocated"
        );
        let endless: Vec<Vec<u8>> =
            std::iter::once(flags(3)).chain((0..=OPTIONS_MAX).map(|_| option(99, &[]))).collect();
        let mut negotiation = Negotiation::new(&export);
        let steps: Vec<Step> = endless.iter().map(|one| negotiation.step(one, &mut Vec::new())).collect();
        assert_eq!(steps.iter().position(|step| *step == Step::End), Some(endless.len() - 1));
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken_or_refused(
            data in prop::collection::vec(any::<u8>(), 0..200), kind in 0..13_u32, structured: bool, framed: bool,
        ) {
            let export = export();
            let agreed = Agreed { structured, extents: false };
            let mut negotiation = Negotiation { greeted: true, agreed, ..Negotiation::new(&export) };
            let bytes = if framed { option(kind, &data) } else { data };
            let mut out = Vec::new();
            match negotiation.step(&bytes, &mut out) {
                Step::Took(took) | Step::Begin(took, _) => prop_assert!(took <= bytes.len()),
                Step::Incomplete | Step::End => {}
            }
            prop_assert!(out.len() < 4096);
        }
    }
}

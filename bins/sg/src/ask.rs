//! One question to one intermediary.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use libsg::ids::{Epoch, NodeId, Sequence, VolumeId};
use libsg::transport::{Conversation, PoolSecret, dial, refusal};
use libsg::wire::handshake::Purpose;
use libsg::wire::message::{self, VmdReply, VmdRequest};
use libsg::wire::{Header, Kind, Status};
use libsg::{Error, ErrorKind, Result};

/// How long an intermediary may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);

/// A connection to one intermediary.
pub struct Node {
    conversation: Conversation,
    sequence: u64,
}

impl Node {
    /// Connects.
    pub fn connect(address: SocketAddr, secret: &PoolSecret) -> Result<Self> {
        let channel = dial(address, Purpose::Operator, VolumeId(0), Epoch(0), secret, PATIENCE)?;
        Ok(Self { conversation: Conversation::new(channel), sequence: 0 })
    }

    /// Who it is.
    pub fn id(&self) -> &NodeId {
        self.conversation.channel().node()
    }

    /// Asks, and waits for the answer.
    pub fn ask(&mut self, volume: VolumeId, epoch: Epoch, request: &VmdRequest) -> Result<VmdReply> {
        self.sequence += 1;
        let sequence = Sequence(self.sequence);
        let header = Header { volume, epoch, sequence, ..self.conversation.channel().header(Kind::Vmd) };
        let deadline = Instant::now() + PATIENCE;
        self.conversation.send(header, &message::encode(request)?, deadline)?;
        let frame = self.conversation.recv(deadline)?;
        if frame.header.status != Status::Ok {
            return Err(refusal(frame.header.status));
        }
        if frame.header.kind != Kind::VmdReply || frame.header.sequence != sequence {
            return Err(Error::new(ErrorKind::Protocol, "an answer to something else"));
        }
        Ok(VmdReply::decode(frame.body)?)
    }
}

//! Tunnel messages out of a server's byte stream, without any I/O.

use std::borrow::Cow;

use crate::frame::{self, ControlPayload, Walker};
use crate::protocol::{HEADER, Header, MAX_SENT, TCP, Violation, kind};

/// What came over the link.
#[derive(Debug, PartialEq, Eq)]
pub enum Item<'a> {
    /// Some of a TCP stream's bytes, as many as have arrived of a DATA message.
    #[allow(missing_docs)]
    Bytes { id: u32, bytes: &'a [u8] },
    /// Any other message, whole. Of a payload longer than may be sent, only the first bytes (but
    /// more than may be sent).
    #[allow(missing_docs)]
    Message {
        header: Header,
        payload: Cow<'a, [u8]>,
    },
    /// A WebSocket control frame.
    #[allow(missing_docs)]
    Control { opcode: u8, payload: ControlPayload },
}

/// Reads messages, however frames and reads cut them.
#[derive(Default)]
pub struct Reader {
    walker: Walker,
    head: [u8; HEADER],
    have: usize,
    /// The payload so far of a message in several pieces that can't be passed on so.
    body: Vec<u8>,
}

impl Reader {
    /// A reader that takes messages of up to `longest` bytes.
    pub fn new(longest: u64) -> Self {
        Self {
            walker: Walker::new(longest),
            ..Self::default()
        }
    }

    /// Takes bytes off the front of `input` up to the next item; `None` once all are taken.
    pub fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Item<'a>>, Violation> {
        loop {
            match self.walker.next(input)? {
                None => return Ok(None),
                Some(frame::Event::Control { opcode, payload }) => {
                    return Ok(Some(Item::Control { opcode, payload }));
                }
                Some(frame::Event::Piece { bytes, last }) => {
                    if let Some(item) = self.piece(bytes, last)? {
                        return Ok(Some(item));
                    }
                }
            }
        }
    }

    fn piece<'a>(&mut self, bytes: &'a [u8], last: bool) -> Result<Option<Item<'a>>, Violation> {
        let (head, bytes) = bytes.split_at(bytes.len().min(HEADER - self.have));
        self.head[self.have..][..head.len()].copy_from_slice(head);
        self.have += head.len();
        if self.have < HEADER {
            let short = Violation::protocol("a message is shorter than its header");
            return if last { Err(short) } else { Ok(None) };
        }
        let header = Header::unpack(self.head);
        if last {
            self.have = 0;
        }
        if header.kind == kind::DATA && header.proto == TCP {
            return Ok((!bytes.is_empty()).then_some(Item::Bytes {
                id: header.id,
                bytes,
            }));
        }
        Ok(self
            .whole(bytes, last)
            .map(|payload| Item::Message { header, payload }))
    }

    /// The message's payload once all of it is here; a copy only if it came in pieces.
    fn whole<'a>(&mut self, bytes: &'a [u8], last: bool) -> Option<Cow<'a, [u8]>> {
        if last && self.body.is_empty() {
            return Some(Cow::Borrowed(bytes));
        }
        let room = MAX_SENT - self.body.len();
        self.body.extend_from_slice(&bytes[..bytes.len().min(room)]);
        last.then(|| Cow::Owned(std::mem::take(&mut self.body)))
    }
}

//! RFC 6455 frames, without any I/O: a walker for what a server sends, and the headers and the mask
//! of what a client sends.

use crate::protocol::{MAX_RECEIVED, Violation, close};
use crate::sys;

/// The opcodes of RFC 6455 §5.2.
#[allow(missing_docs)]
pub mod opcode {
    pub const CONTINUATION: u8 = 0x0;
    pub const TEXT: u8 = 0x1;
    pub const BINARY: u8 = 0x2;
    pub const CLOSE: u8 = 0x8;
    pub const PING: u8 = 0x9;
    pub const PONG: u8 = 0xa;
}

/// The longest header that a client writes: 2 bytes, a 64-bit length, the key.
pub const MAX_CLIENT_HEADER: usize = 14;
const MAX_CONTROL: usize = 125;

/// What the walker found.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<'a> {
    #[allow(missing_docs)]
    /// A piece of the current binary message, as much as has arrived; `last` ends the message.
    Piece { bytes: &'a [u8], last: bool },
    #[allow(missing_docs)]
    /// A whole control frame.
    Control { opcode: u8, payload: ControlPayload },
}

/// The payload of a control frame: at most 125 bytes, so it needs no allocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ControlPayload {
    bytes: [u8; MAX_CONTROL],
    length: u8,
}

impl ControlPayload {
    const EMPTY: Self = Self {
        bytes: [0; MAX_CONTROL],
        length: 0,
    };

    /// The bytes that have been received.
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }

    fn extend(&mut self, bytes: &[u8]) {
        let start = usize::from(self.length);
        self.bytes[start..start + bytes.len()].copy_from_slice(bytes);
        self.length += bytes.len() as u8;
    }
}

/// Walks the frames of a server's byte stream, however it is cut.
///
/// It never waits for a whole frame: a binary message is handed on piece by piece as it arrives.
pub struct Walker {
    head: [u8; 10],
    have: usize,
    /// What is left of the current frame's payload, while `in_payload`.
    left: u64,
    in_payload: bool,
    opcode: u8,
    fin: bool,
    in_message: bool,
    /// Bytes of the current message in all frames so far announced.
    message: u64,
    longest: u64,
    control: ControlPayload,
}

impl Default for Walker {
    fn default() -> Self {
        Self::new(MAX_RECEIVED)
    }
}

impl Walker {
    /// A walker that takes messages of up to `longest` bytes.
    pub fn new(longest: u64) -> Self {
        Self {
            head: [0; 10],
            have: 0,
            left: 0,
            in_payload: false,
            opcode: 0,
            fin: false,
            in_message: false,
            message: 0,
            longest,
            control: ControlPayload::EMPTY,
        }
    }

    /// Takes bytes off the front of `input` up to the next event; `None` once all are taken.
    pub fn next<'a>(&mut self, input: &mut &'a [u8]) -> Result<Option<Event<'a>>, Violation> {
        loop {
            if !self.in_payload && !self.read_head(input)? {
                return Ok(None);
            }
            if input.is_empty() && self.left > 0 {
                return Ok(None);
            }
            let piece = take(input, usize::try_from(self.left).unwrap_or(usize::MAX));
            self.left -= piece.len() as u64;
            let ended = self.left == 0;
            self.in_payload = !ended;
            if self.opcode < opcode::CLOSE {
                let last = ended && self.fin;
                self.in_message = !last;
                return Ok(Some(Event::Piece { bytes: piece, last }));
            }
            self.control.extend(piece);
            if ended {
                let payload = std::mem::replace(&mut self.control, ControlPayload::EMPTY);
                return Ok(Some(Event::Control {
                    opcode: self.opcode,
                    payload,
                }));
            }
        }
    }

    /// Collects a frame's header; true once it is whole, checked and applied.
    fn read_head(&mut self, input: &mut &[u8]) -> Result<bool, Violation> {
        loop {
            let need = match (self.have, self.head[1] & 0x7f) {
                (0 | 1, _) => 2,
                (_, 126) => 4,
                (_, 127) => 10,
                _ => 2,
            };
            if self.have == need {
                self.have = 0;
                return self.apply_head().map(|()| true);
            }
            let bytes = take(input, need - self.have);
            if bytes.is_empty() {
                return Ok(false);
            }
            self.head[self.have..self.have + bytes.len()].copy_from_slice(bytes);
            self.have += bytes.len();
        }
    }

    fn apply_head(&mut self) -> Result<(), Violation> {
        let [first, second, rest @ ..] = self.head;
        let (fin, opcode) = (first & 0x80 != 0, first & 0x0f);
        if first & 0x70 != 0 {
            return Err(Violation::protocol("a reserved bit is set"));
        }
        if second & 0x80 != 0 {
            return Err(Violation::protocol("a frame from the server is masked"));
        }
        let (length, shortest) = match second {
            126 => (u64::from(u16::from_be_bytes([rest[0], rest[1]])), 126),
            127 => (u64::from_be_bytes(rest), 1 << 16),
            short => (u64::from(short), 0),
        };
        if length < shortest {
            return Err(Violation::protocol("a length is longer than it need be"));
        }
        if length >> 63 != 0 {
            return Err(Violation::protocol("a frame claims 2^63 bytes or more"));
        }
        if opcode >= opcode::CLOSE {
            check_control(opcode, fin, length)?;
        } else {
            self.check_data(opcode, length)?;
        }
        (self.opcode, self.fin, self.left, self.in_payload) = (opcode, fin, length, true);
        Ok(())
    }

    fn check_data(&mut self, opcode: u8, length: u64) -> Result<(), Violation> {
        match (opcode, self.in_message) {
            (opcode::BINARY, false) => self.message = 0,
            (opcode::CONTINUATION, true) => {}
            (opcode::TEXT, false) => {
                return Err(Violation {
                    code: close::UNSUPPORTED,
                    reason: "text where binary is due",
                });
            }
            (opcode::BINARY | opcode::TEXT, true) => {
                return Err(Violation::protocol("a message begins inside another"));
            }
            (opcode::CONTINUATION, false) => {
                return Err(Violation::protocol("nothing to continue"));
            }
            _ => return Err(Violation::protocol("unknown opcode")),
        }
        self.message = self.message.saturating_add(length);
        if self.message > self.longest {
            return Err(Violation {
                code: close::TOO_BIG,
                reason: "a message is too long",
            });
        }
        Ok(())
    }
}

fn check_control(opcode: u8, fin: bool, length: u64) -> Result<(), Violation> {
    let reason = match (opcode, length) {
        (0xb.., _) => "unknown opcode",
        _ if !fin => "a control frame is fragmented",
        (_, 126..) => "a control frame is too long",
        (opcode::CLOSE, 1) => "half a close code",
        _ => return Ok(()),
    };
    Err(Violation::protocol(reason))
}

fn take<'a>(input: &mut &'a [u8], most: usize) -> &'a [u8] {
    let (head, tail) = input.split_at(most.min(input.len()));
    *input = tail;
    head
}

/// A client's frame header: its bytes are the *last* `len` of `bytes`, so that it can be put right
/// in front of a payload that already lies in a buffer.
pub struct ClientHeader {
    bytes: [u8; MAX_CLIENT_HEADER],
    start: usize,
}

impl ClientHeader {
    /// The header of an unfragmented frame with `length` bytes of payload, to be masked with `key`.
    pub fn new(opcode: u8, length: usize, key: [u8; 4]) -> Self {
        let mut bytes = [0; MAX_CLIENT_HEADER];
        bytes[10..].copy_from_slice(&key);
        bytes[2..10].copy_from_slice(&(length as u64).to_be_bytes());
        let (start, short) = match length {
            0..=125 => (8, length as u8),
            126..=0xffff => (6, 126),
            _ => (0, 127),
        };
        bytes[start] = 0x80 | opcode;
        bytes[start + 1] = 0x80 | short;
        Self { bytes, start }
    }

    /// The header as it goes on the wire.
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[self.start..]
    }
}

/// XORs `bytes` with `key`, RFC 6455 §5.3, the key's first byte falling on the first byte.
pub fn mask(bytes: &mut [u8], key: [u8; 4]) {
    let wide = u64::from_ne_bytes([
        key[0], key[1], key[2], key[3], key[0], key[1], key[2], key[3],
    ]);
    let (words, tail) = bytes.as_chunks_mut::<8>();
    for word in words {
        *word = (u64::from_ne_bytes(*word) ^ wide).to_ne_bytes();
    }
    for (byte, key) in tail.iter_mut().zip(key.iter().cycle()) {
        *byte ^= key;
    }
}

/// Puts `bytes`, XORed with `key` as [`mask`] does, into as many of another place.
pub fn mask_into(bytes: &[u8], key: [u8; 4], into: &mut [u8]) {
    let wide = u64::from_ne_bytes([
        key[0], key[1], key[2], key[3], key[0], key[1], key[2], key[3],
    ]);
    let (words, tail) = bytes.as_chunks::<8>();
    let (places, rest) = into.as_chunks_mut::<8>();
    for (place, word) in places.iter_mut().zip(words) {
        *place = (u64::from_ne_bytes(*word) ^ wide).to_ne_bytes();
    }
    for ((place, byte), key) in rest.iter_mut().zip(tail).zip(key.iter().cycle()) {
        *place = byte ^ key;
    }
}

/// Masking keys from the system's random source, fetched many at a time.
pub struct MaskKeys {
    pool: [u8; 1024],
    used: usize,
}

impl Default for MaskKeys {
    fn default() -> Self {
        Self {
            pool: [0; 1024],
            used: 1024,
        }
    }
}

impl MaskKeys {
    /// A key that nobody can predict.
    pub fn next_key(&mut self) -> [u8; 4] {
        if self.used == self.pool.len() {
            sys::random(&mut self.pool);
            self.used = 0;
        }
        let key = [0, 1, 2, 3].map(|i| self.pool[self.used + i]);
        self.used += 4;
        key
    }
}

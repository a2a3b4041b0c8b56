//! The sending side of a link: one WebSocket's socket, what is on its way out, and in which order.

use std::io::{self, IoSlice};

use crate::frame::{ClientHeader, MaskKeys, mask, mask_into, opcode};
use crate::net::TcpSocket;
use crate::protocol::{HEADER, Header, MAX_SENT};

/// Room in front of a payload for both headers; keeps the tunnel header 8-byte aligned for the mask.
const HEADROOM: usize = 32;
/// The most payload that one frame carries.
pub const MAX_PAYLOAD: usize = MAX_SENT - HEADROOM;

/// One frame with payload at a time, built where it was read, plus small messages that overtake the
/// next one.
pub struct Link {
    /// None between two links.
    sock: Option<Box<dyn TcpSocket>>,
    /// Set by an edge of readiness, cleared by a short write.
    writable: bool,
    frame: Vec<u8>,
    frame_at: usize,
    frame_end: usize,
    /// The frame's first byte is out, so nothing may come before its last.
    frame_begun: bool,
    urgent: Vec<u8>,
    urgent_at: usize,
    /// Frames that nobody waits for: they go with the next that are sent.
    late: Vec<u8>,
    keys: MaskKeys,
}

impl Default for Link {
    fn default() -> Self {
        Self {
            sock: None,
            writable: false,
            frame: vec![0; HEADROOM + MAX_PAYLOAD],
            frame_at: 0,
            frame_end: 0,
            frame_begun: false,
            urgent: Vec::new(),
            urgent_at: 0,
            late: Vec::new(),
            keys: MaskKeys::default(),
        }
    }
}

impl Link {
    /// Begins on a connected, non-blocking socket whose handshake is done.
    pub fn open(&mut self, sock: Box<dyn TcpSocket>) {
        self.close();
        (self.sock, self.writable) = (Some(sock), true);
    }

    /// Forgets the socket and what waited for it. Until the next one all messages are dropped.
    pub fn close(&mut self) {
        (self.sock, self.writable) = (None, false);
        (self.frame_at, self.frame_end, self.frame_begun) = (0, 0, false);
        (self.urgent, self.late) = (Vec::new(), Vec::new());
        self.urgent_at = 0;
    }

    /// Whether there is a socket.
    pub fn is_open(&self) -> bool {
        self.sock.is_some()
    }

    /// Whether the socket has to tell when it takes bytes again.
    pub fn is_full(&self) -> bool {
        self.is_open() && !self.writable
    }

    /// Notes that the socket may take bytes again.
    pub fn now_writable(&mut self) {
        self.writable = self.is_open();
    }

    /// Tells the runner that nothing more is sent.
    pub fn finish_writing(&mut self) -> io::Result<()> {
        self.sock
            .as_mut()
            .map_or(Ok(()), |sock| sock.finish_writing())
    }

    /// Reads once from the socket.
    pub fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match &mut self.sock {
            Some(sock) => sock.read(buffer),
            None => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    /// Whether a frame with payload can be sent now. Only then may a source be read.
    pub fn is_idle(&self) -> bool {
        self.writable && self.frame_at == self.frame_end
    }

    /// Where a source puts the payload of the next frame; at most [`MAX_PAYLOAD`] bytes.
    pub fn payload(&mut self) -> &mut [u8] {
        debug_assert!(self.is_idle());
        &mut self.frame[HEADROOM..]
    }

    /// Sends the first `length` bytes of [`Link::payload`] under `header`. What the socket doesn't
    /// take stays, and the link is not idle until it is gone.
    pub fn send_payload(&mut self, header: Header, length: usize) -> io::Result<()> {
        let key = self.begin(header, length);
        mask(&mut self.frame[HEADROOM..self.frame_end], key);
        self.flush()
    }

    /// The same with bytes from elsewhere, which stay as they are; at most [`MAX_PAYLOAD`].
    pub fn send_copy(&mut self, header: Header, bytes: &[u8]) -> io::Result<()> {
        let key = self.begin(header, bytes.len());
        mask_into(bytes, key, &mut self.frame[HEADROOM..self.frame_end]);
        self.flush()
    }

    /// Puts both headers in front of `length` bytes of payload; the key that these are to be masked with.
    fn begin(&mut self, header: Header, length: usize) -> [u8; 4] {
        self.send_late();
        let key = self.keys.next_key();
        let head = ClientHeader::new(opcode::BINARY, HEADER + length, key);
        let body_at = HEADROOM - HEADER;
        self.frame_end = HEADROOM + length;
        self.frame_at = body_at - head.as_slice().len();
        self.frame_begun = false;
        self.frame[self.frame_at..body_at].copy_from_slice(head.as_slice());
        self.frame[body_at..HEADROOM].copy_from_slice(&header.pack());
        mask(&mut self.frame[body_at..HEADROOM], key);
        key
    }

    /// Queues a small message. It goes out ahead of the next frame with payload.
    pub fn control(&mut self, header: Header, payload: &[u8]) {
        self.enqueue(opcode::BINARY, &[&header.pack(), payload]);
    }

    /// The same of a message that nobody waits for: it goes with the next that is sent, or by [`Link::send_late`].
    pub fn late(&mut self, header: Header) {
        if self.is_open() {
            let key = self.keys.next_key();
            push_frame(&mut self.late, opcode::BINARY, &[&header.pack()], key);
        }
    }

    /// Whether such messages wait.
    pub fn is_late(&self) -> bool {
        !self.late.is_empty()
    }

    /// They wait no longer.
    pub fn send_late(&mut self) {
        if self.is_late() {
            self.urgent.append(&mut self.late);
        }
    }

    /// Queues a WebSocket control frame, `payload` at most 125 bytes.
    pub fn websocket(&mut self, opcode: u8, payload: &[u8]) {
        self.enqueue(opcode, &[payload]);
    }

    /// Whether anything waits for the socket.
    pub fn is_waiting(&self) -> bool {
        self.backlog() > 0 || self.frame_at < self.frame_end
    }

    /// How many bytes of small messages wait.
    pub fn backlog(&self) -> usize {
        self.urgent.len() - self.urgent_at
    }

    /// Writes what waits, until there is none or the socket takes no more.
    pub fn flush(&mut self) -> io::Result<()> {
        while self.writable
            && self.is_waiting()
            && let Some(sock) = &mut self.sock
        {
            let urgent = IoSlice::new(&self.urgent[self.urgent_at..]);
            let frame = IoSlice::new(&self.frame[self.frame_at..self.frame_end]);
            let waiting = urgent.len() + frame.len();
            let order = if self.frame_begun {
                [frame, urgent]
            } else {
                [urgent, frame]
            };
            match sock.write_vectored(&order) {
                Ok(written) => {
                    self.writable = written == waiting;
                    self.advance(written);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn enqueue(&mut self, opcode: u8, parts: &[&[u8]]) {
        if !self.is_open() {
            return;
        }
        self.send_late();
        let key = self.keys.next_key();
        push_frame(&mut self.urgent, opcode, parts, key);
    }

    fn advance(&mut self, written: usize) {
        let frame_left = self.frame_end - self.frame_at;
        let urgent_left = self.urgent.len() - self.urgent_at;
        let of_frame = if self.frame_begun {
            written.min(frame_left)
        } else {
            written.saturating_sub(urgent_left)
        };
        self.frame_at += of_frame;
        self.urgent_at += written - of_frame;
        self.frame_begun = self.frame_at < self.frame_end && (self.frame_begun || of_frame > 0);
        if self.urgent_at == self.urgent.len() {
            self.urgent.clear();
            self.urgent.shrink_to(64 << 10);
            self.urgent_at = 0;
        }
    }
}

/// Appends a whole frame, masked.
fn push_frame(out: &mut Vec<u8>, opcode: u8, parts: &[&[u8]], key: [u8; 4]) {
    let length = parts.iter().map(|part| part.len()).sum();
    out.extend_from_slice(ClientHeader::new(opcode, length, key).as_slice());
    let body_at = out.len();
    for part in parts {
        out.extend_from_slice(part);
    }
    mask(&mut out[body_at..], key);
}

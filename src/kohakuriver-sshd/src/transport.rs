//! The transport layer (RFC 4253) without a socket: bytes in, messages out, and the other way round.
//!
//! The caller owes: bytes from the peer into [`Transport::space`], then [`Transport::advance`] and
//! [`Transport::next`] until it gives nothing more; and [`Transport::output`] to the peer, [`Transport::sent`] told.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use crate::algorithms::Algorithms;
use crate::crypto::{Opener, Sealer};
use crate::keys::HostKeys;
use crate::wire::{Malformed, Put, Reader};

mod exchange;
mod receive;

use exchange::Agreed;

/// Message numbers of the transport layer.
mod number {
    pub const DISCONNECT: u8 = 1;
    pub const IGNORE: u8 = 2;
    pub const UNIMPLEMENTED: u8 = 3;
    pub const DEBUG: u8 = 4;
    pub const SERVICE_REQUEST: u8 = 5;
    pub const EXT_INFO: u8 = 7;
    pub const KEXINIT: u8 = 20;
    pub const NEWKEYS: u8 = 21;
    pub const ECDH_INIT: u8 = 30;
    pub const ECDH_REPLY: u8 = 31;
    /// The last number that belongs to a method of key exchange.
    pub const LAST_OF_EXCHANGE: u8 = 49;
    /// From here on, nothing may be sent while keys are exchanged.
    pub const FIRST_OF_SERVICES: u8 = 50;
    pub const PING: u8 = 192;
    pub const PONG: u8 = 193;
}

/// Reasons for a disconnect (RFC 4253 §11.1).
pub mod reason {
    /// The peer broke the protocol.
    pub const PROTOCOL_ERROR: u32 = 2;
    /// No algorithm that both sides have.
    pub const KEY_EXCHANGE_FAILED: u32 = 3;
    /// A packet was forged or damaged.
    pub const MAC_ERROR: u32 = 5;
    /// A service that doesn't exist here.
    pub const SERVICE_NOT_AVAILABLE: u32 = 7;
    /// There is no place for another.
    pub const TOO_MANY_CONNECTIONS: u32 = 12;
    /// Nobody was let in.
    pub const NO_MORE_AUTH_METHODS: u32 = 14;
}

/// What this server calls itself.
pub const VERSION: &str = concat!("SSH-2.0-KohakuRiver_", env!("CARGO_PKG_VERSION"));

const INPUT: usize = 64 * 1024;
/// Length and padding's length.
const HEAD: usize = 5;
/// AES-GCM's counter of packets and the sequence number must not come round (RFC 5647 §7.1, RFC 4344 §3.1).
const REKEY_PACKETS: u64 = 1 << 30;
/// Answers that wait for the end of an exchange of keys.
const MOST_HELD: usize = 4096;

/// Why a connection has to end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fatal {
    /// We end it: one of [`reason`] and a sentence for the peer.
    Ours(u32, String),
    /// The peer said goodbye.
    Goodbye,
}

impl From<Malformed> for Fatal {
    fn from(_: Malformed) -> Self {
        protocol_error("a message is malformed")
    }
}

/// A disconnect because the peer broke the protocol.
pub fn protocol_error(sentence: &str) -> Fatal {
    Fatal::Ours(reason::PROTOCOL_ERROR, sentence.into())
}

/// One connection's transport layer, as the server.
pub struct Transport {
    host_keys: Arc<HostKeys>,
    algorithms: &'static Algorithms,
    rekey_bytes: u64,
    input: Vec<u8>,
    filled: Range<usize>,
    output: Vec<u8>,
    written: usize,
    opener: Opener,
    sealer: Sealer,
    received: u32,
    sealed: u32,
    peer_version: Option<Vec<u8>>,
    session: Option<[u8; 32]>,
    strict: bool,
    own_init: Option<Vec<u8>>,
    agreed: Option<Agreed>,
    next_opener: Option<Opener>,
    held: Vec<Vec<u8>>,
    /// Bytes and packets under the present keys, both directions.
    used: (u64, u64),
}

impl Transport {
    /// Starts with the version line and the first KEXINIT; new keys after `rekey_bytes` bytes.
    pub fn new(
        host_keys: Arc<HostKeys>,
        algorithms: &'static Algorithms,
        rekey_bytes: u64,
    ) -> Self {
        let mut transport = Self {
            host_keys,
            algorithms,
            rekey_bytes,
            input: vec![0; INPUT],
            filled: 0..0,
            output: format!("{VERSION}\r\n").into_bytes(),
            written: 0,
            opener: Opener::clear(),
            sealer: Sealer::clear(),
            received: 0,
            sealed: 0,
            peer_version: None,
            session: None,
            strict: false,
            own_init: None,
            agreed: None,
            next_opener: None,
            held: Vec::new(),
            used: (0, 0),
        };
        transport.begin_exchange();
        transport
    }

    /// Where the next bytes of the peer belong. Never empty.
    pub fn space(&mut self) -> &mut [u8] {
        if self.filled.is_empty() {
            self.filled = 0..0;
        } else if self.filled.start > 0 && self.input.len() - self.filled.end < INPUT / 2 {
            self.input.copy_within(self.filled.clone(), 0);
            self.filled = 0..self.filled.len();
        }
        if self.filled.end == self.input.len() {
            self.input.resize(self.input.len() * 2, 0);
        }
        &mut self.input[self.filled.end..]
    }

    /// `count` bytes were put into [`Transport::space`].
    pub fn advance(&mut self, count: usize) {
        self.filled.end += count;
    }

    /// What the peer has to get.
    pub fn output(&self) -> &[u8] {
        &self.output[self.written..]
    }

    /// The first `count` bytes of [`Transport::output`] are on their way.
    pub fn sent(&mut self, count: usize) {
        self.written += count;
        if self.written == self.output.len() {
            self.output.clear();
            self.written = 0;
        } else if self.written > self.output.len() / 2 {
            self.output.drain(..self.written);
            self.written = 0;
        }
    }

    /// Has the peer sent its version line?
    pub fn is_greeted(&self) -> bool {
        self.peer_version.is_some()
    }

    /// What signatures of this connection are bound to; there is none before the first keys.
    pub fn session(&self) -> Option<&[u8]> {
        self.session.as_ref().map(<[u8; 32]>::as_slice)
    }

    /// May messages of services leave now? They are held back while keys are exchanged.
    pub fn is_open(&self) -> bool {
        self.own_init.is_none()
    }

    /// A payload that [`Transport::next`] gave.
    pub fn payload(&self, range: Range<usize>) -> &[u8] {
        &self.input[range]
    }

    /// The next message for a service: where its payload lies until [`Transport::space`] is called again.
    pub fn next_message(&mut self) -> Result<Option<Range<usize>>, Fatal> {
        if self.peer_version.is_none() && !self.read_version()? {
            return Ok(None);
        }
        while let Some(range) = self.open_packet()? {
            let number = *self.input[range.clone()].first().ok_or(Malformed)?;
            if self.is_for_service(number, range.clone())? {
                return Ok(Some(range));
            }
        }
        Ok(None)
    }

    /// Deals with what is the transport's own; the rest is the caller's.
    fn is_for_service(&mut self, number: u8, range: Range<usize>) -> Result<bool, Fatal> {
        if self.held.len() > MOST_HELD {
            return Err(protocol_error("the exchange of keys takes too long"));
        }
        match number {
            number::DISCONNECT => return Err(Fatal::Goodbye),
            // Whatever it is: it was meant for a method that wasn't agreed on (RFC 4253 §7).
            number::ECDH_INIT..=number::LAST_OF_EXCHANGE if self.takes_back_guess() => {}
            number::KEXINIT => self.peer_init(range)?,
            number::ECDH_INIT => self.ecdh_init(range)?,
            number::NEWKEYS => self.new_keys()?,
            // Nothing else before the first keys: it would shift sequence numbers unseen.
            _ if !self.opener_is_set() => {
                return Err(protocol_error("the keys have to be exchanged first"));
            }
            number::IGNORE | number::UNIMPLEMENTED | number::DEBUG | number::EXT_INFO => {}
            _ if self.agreed.is_some() || self.next_opener.is_some() => {
                return Err(protocol_error(
                    "that message may not come while keys are exchanged",
                ));
            }
            number::PING => {
                let data = Reader::new(&self.input[range][1..]).string()?.to_vec();
                self.send(number::PONG, |message| message.put_string(&data));
            }
            number::SERVICE_REQUEST | number::FIRST_OF_SERVICES.. => return Ok(true),
            _ => self.unimplemented(),
        }
        Ok(false)
    }

    fn takes_back_guess(&mut self) -> bool {
        let agreed = self.agreed.as_mut();
        agreed.is_some_and(|agreed| std::mem::take(&mut agreed.wrong_guess))
    }

    fn opener_is_set(&self) -> bool {
        self.opener.tag() > 0
    }

    /// Tells the peer that its last message is unknown here.
    pub fn unimplemented(&mut self) {
        let sequence = self.received.wrapping_sub(1);
        self.send(number::UNIMPLEMENTED, |message| message.put_u32(sequence));
    }

    /// Sends a message: its number, then what `fill` appends. Held back while keys are exchanged, if it has to be.
    pub fn send(&mut self, number: u8, fill: impl FnOnce(&mut Vec<u8>)) {
        if number >= number::FIRST_OF_SERVICES && !self.is_open() {
            let mut message = vec![number];
            fill(&mut message);
            self.held.push(message);
            return;
        }
        let base = self.output.len();
        self.output.put_raw(&[0; HEAD]);
        self.output.put_u8(number);
        fill(&mut self.output);
        self.seal(base);
    }

    /// Sends a message that ends in a string of at most `room` bytes, which `read` puts straight into the packet.
    /// Nothing is sent where it reads nothing. Only while [`Transport::is_open`].
    pub fn send_string(
        &mut self,
        head: &[u8],
        room: usize,
        read: impl FnOnce(&mut [u8]) -> io::Result<usize>,
    ) -> io::Result<usize> {
        debug_assert!(self.is_open());
        let base = self.output.len();
        self.output.put_raw(&[0; HEAD]);
        self.output.put_raw(head);
        let length = self.output.len();
        self.output.put_u32(0);
        let start = self.output.len();
        self.output.resize(start + room, 0);
        let count = match read(&mut self.output[start..]) {
            Ok(count) if count > 0 => count,
            other => {
                self.output.truncate(base);
                return other;
            }
        };
        self.output.truncate(start + count);
        self.output[length..start].copy_from_slice(&(count as u32).to_be_bytes());
        self.seal(base);
        Ok(count)
    }

    /// Makes a packet of what stands in the output behind `base`: room for the head, then the payload.
    fn seal(&mut self, base: usize) {
        let payload = self.output.len() - base - HEAD;
        let padding = self.sealer.padding(payload);
        let length = 1 + payload + padding;
        self.output[base..base + 4].copy_from_slice(&(length as u32).to_be_bytes());
        self.output[base + 4] = padding as u8;
        // These ciphers need no randomness in the padding.
        self.output.resize(base + 4 + length + self.sealer.tag(), 0);
        self.sealer.seal(self.sealed, &mut self.output[base..]);
        self.sealed = self.sealed.wrapping_add(1);
        self.used.0 += length as u64;
        self.used.1 += 1;
    }

    /// Says why, where it is us who end the connection.
    pub fn disconnect(&mut self, why: &Fatal) {
        if let Fatal::Ours(code, sentence) = why {
            self.send(number::DISCONNECT, |message| {
                message.put_u32(*code);
                message.put_string(sentence.as_bytes());
                message.put_string(b"");
            });
        }
    }

    /// Starts an exchange of new keys where the present ones were used enough.
    pub fn rekey_if_due(&mut self) {
        let due = self.used.0 >= self.rekey_bytes || self.used.1 >= REKEY_PACKETS;
        if due && self.is_open() && self.next_opener.is_none() && self.opener_is_set() {
            self.begin_exchange();
        }
    }
}

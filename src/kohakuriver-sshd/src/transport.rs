//! The transport layer (RFC 4253) without a socket: bytes in, messages out, and the other way round.
//!
//! The caller owes: bytes from the peer into [`Transport::space`], then [`Transport::advance`] and
//! [`Transport::next`] until it gives nothing more; and [`Transport::output`] to the peer, [`Transport::sent`] told.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use crate::crypto::{Cipher, Direction, Exchange, LEAST_PADDING, Opener, Sealer, random, sha256};
use crate::keys::{ED25519_NAME, HostKey, SIGNATURES};
use crate::wire::{Malformed, Put, Reader};

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

const EXCHANGES: &str = "mlkem768x25519-sha256,curve25519-sha256,curve25519-sha256@libssh.org";
/// Stands among the exchanges and is none: sequence numbers begin anew with each key, and nothing else may come between.
const STRICT_SERVER: &str = "kex-strict-s-v00@openssh.com";
const STRICT_CLIENT: &str = "kex-strict-c-v00@openssh.com";
const EXT_INFO_CLIENT: &str = "ext-info-c";
const CIPHERS: &str = "aes256-gcm@openssh.com,aes128-gcm@openssh.com,chacha20-poly1305@openssh.com";
/// Never used, as every cipher proves its packets itself; some clients want a name all the same.
const MACS: &str = "hmac-sha2-256-etm@openssh.com";

const LONGEST_VERSION: usize = 255;
const LONGEST_PACKET: usize = 256 * 1024;
/// RFC 4253 §6.1: what everybody has to take. Strangers get no more memory than that.
const LONGEST_OF_STRANGERS: usize = 35_000;
const INPUT: usize = 64 * 1024;
/// Length and padding's length.
const HEAD: usize = 5;
/// AES-GCM's counter of packets and the sequence number must not come round (RFC 5647 §7.1, RFC 4344 §3.1).
const REKEY_PACKETS: u64 = 1 << 30;
/// A peer that is asked for new keys and goes on under the old ones has to go before that.
const MOST_PACKETS: u64 = 1 << 31;

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

/// What the two KEXINIT messages agree on.
struct Agreed {
    exchange: Exchange,
    inbound: Cipher,
    outbound: Cipher,
    peer_init: Vec<u8>,
    /// The peer sent a first message of an exchange that wasn't agreed on.
    wrong_guess: bool,
}

/// One connection's transport layer, as the server.
pub struct Transport {
    host_key: Arc<HostKey>,
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
    pub fn new(host_key: Arc<HostKey>, rekey_bytes: u64) -> Self {
        let mut transport = Self {
            host_key,
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

    fn read_version(&mut self) -> Result<bool, Fatal> {
        let bytes = &self.input[self.filled.clone()];
        let line = match bytes
            .iter()
            .take(LONGEST_VERSION)
            .position(|byte| *byte == b'\n')
        {
            Some(end) => &bytes[..end],
            None if bytes.len() < LONGEST_VERSION => return Ok(false),
            None => return Err(protocol_error("the version line is too long")),
        };
        let length = line.len() + 1;
        let version = line.strip_suffix(b"\r").unwrap_or(line);
        if !version.starts_with(b"SSH-2.0-") {
            return Err(protocol_error("this server speaks SSH 2.0"));
        }
        self.peer_version = Some(version.to_vec());
        self.filled.start += length;
        Ok(true)
    }

    /// Opens the next packet that is there in full.
    fn open_packet(&mut self) -> Result<Option<Range<usize>>, Fatal> {
        let start = self.filled.start;
        if self.filled.len() < 4 {
            return Ok(None);
        }
        let head: [u8; 4] = self.input[start..start + 4].try_into().expect("4 bytes");
        let length = self.opener.length(self.received, head) as usize;
        if length > self.longest_packet() || !self.opener.is_length(length) {
            return Err(Fatal::Ours(
                reason::MAC_ERROR,
                "a packet's length is impossible".into(),
            ));
        }
        let total = 4 + length + self.opener.tag();
        if self.filled.len() < total {
            return Ok(None);
        }
        let packet = &mut self.input[start..start + total];
        if self.opener.open(self.received, packet).is_err() {
            return Err(Fatal::Ours(
                reason::MAC_ERROR,
                "a packet was damaged on its way".into(),
            ));
        }
        let padding = packet[4] as usize;
        if padding < LEAST_PADDING || padding + 1 >= length {
            return Err(protocol_error("a packet's padding is impossible"));
        }
        if self.used.1 >= MOST_PACKETS {
            return Err(protocol_error("these keys have been used for too long"));
        }
        self.received = self.received.wrapping_add(1);
        self.filled.start += total;
        self.used.0 += total as u64;
        self.used.1 += 1;
        Ok(Some(start + HEAD..start + 4 + length - padding))
    }

    fn longest_packet(&self) -> usize {
        if self.opener_is_set() {
            LONGEST_PACKET
        } else {
            LONGEST_OF_STRANGERS
        }
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

    fn begin_exchange(&mut self) {
        let mut init = vec![number::KEXINIT];
        init.put_raw(&random::<16>());
        let exchanges = format!("{EXCHANGES},{STRICT_SERVER}");
        for list in [
            exchanges.as_str(),
            ED25519_NAME,
            CIPHERS,
            CIPHERS,
            MACS,
            MACS,
            "none",
            "none",
            "",
            "",
        ] {
            init.put_string(list.as_bytes());
        }
        init.put_bool(false);
        init.put_u32(0);
        self.send(number::KEXINIT, |message| message.put_raw(&init[1..]));
        self.own_init = Some(init);
    }

    fn peer_init(&mut self, range: Range<usize>) -> Result<(), Fatal> {
        if self.agreed.is_some() || self.next_opener.is_some() {
            return Err(protocol_error("keys are being exchanged already"));
        }
        if self.own_init.is_none() {
            self.begin_exchange();
        }
        let init = self.input[range].to_vec();
        let first = self.session.is_none();
        let (agreed, extras) = agree(init)?;
        if first {
            self.strict = extras.strict;
            if self.strict && self.received != 1 {
                return Err(protocol_error("the keys have to be exchanged first"));
            }
        }
        self.agreed = Some(agreed);
        Ok(())
    }

    fn ecdh_init(&mut self, range: Range<usize>) -> Result<(), Fatal> {
        let Some(agreed) = self.agreed.take() else {
            return Err(protocol_error("no exchange of keys was agreed on"));
        };
        let own_init = self.own_init.take().expect("an exchange has both inits");
        let share = Reader::new(&self.input[range][1..]).string()?.to_vec();
        let failed = |_| {
            Fatal::Ours(
                reason::KEY_EXCHANGE_FAILED,
                "the key share is not valid".into(),
            )
        };
        let (answer, secret) = agreed.exchange.answer(&share).map_err(failed)?;
        let mut hashed = Vec::new();
        hashed.put_string(
            self.peer_version
                .as_deref()
                .expect("the version came first"),
        );
        hashed.put_string(VERSION.as_bytes());
        for part in [
            &agreed.peer_init,
            &own_init,
            self.host_key.public(),
            &share,
            &answer,
        ] {
            hashed.put_string(part);
        }
        hashed.put_raw(secret.encoded());
        let hash = sha256(&[&hashed]);
        let signature = self.host_key.sign(&hash);
        let host_key = self.host_key.clone();
        self.send(number::ECDH_REPLY, |message| {
            message.put_string(host_key.public());
            message.put_string(&answer);
            message.put_string(&signature);
        });
        self.send(number::NEWKEYS, |_| {});
        let first = self.session.is_none();
        let session = *self.session.get_or_insert(hash);
        self.sealer = secret.sealer(agreed.outbound, &hash, &session, Direction::ToClient);
        let opener = secret.opener(agreed.inbound, &hash, &session, Direction::ToServer);
        self.next_opener = Some(opener);
        if self.strict {
            self.sealed = 0;
        }
        if first
            && names(&agreed.peer_init, 0)?
                .split(',')
                .any(|name| name == EXT_INFO_CLIENT)
        {
            self.send_ext_info();
        }
        for message in std::mem::take(&mut self.held) {
            self.send(message[0], |out| out.put_raw(&message[1..]));
        }
        Ok(())
    }

    /// RFC 8308: which signatures let users in, and that pings are answered.
    fn send_ext_info(&mut self) {
        self.send(number::EXT_INFO, |message| {
            message.put_u32(2);
            message.put_string(b"server-sig-algs");
            message.put_string(SIGNATURES.as_bytes());
            message.put_string(b"ping@openssh.com");
            message.put_string(b"0");
        });
    }

    fn new_keys(&mut self) -> Result<(), Fatal> {
        let Some(opener) = self.next_opener.take() else {
            return Err(protocol_error("there are no new keys to use"));
        };
        self.opener = opener;
        self.used = (0, 0);
        if self.strict {
            self.received = 0;
        }
        Ok(())
    }
}

struct Extras {
    strict: bool,
}

/// The list at `position` of a KEXINIT.
fn names(init: &[u8], position: usize) -> Result<&str, Malformed> {
    let mut reader = Reader::new(init);
    reader.take(17)?;
    for _ in 0..position {
        reader.string()?;
    }
    reader.text()
}

/// RFC 4253 §7.1: of each list, the client's first that the server has too.
fn agree(init: Vec<u8>) -> Result<(Agreed, Extras), Fatal> {
    let choose = |position: usize, ours: &str, what: &str| -> Result<String, Fatal> {
        let theirs = names(&init, position)?;
        let common = theirs
            .split(',')
            .find(|name| ours.split(',').any(|own| own == *name));
        common.map(str::to_owned).ok_or_else(|| {
            let sentence = format!("no {what} in common; this server has {ours}");
            Fatal::Ours(reason::KEY_EXCHANGE_FAILED, sentence)
        })
    };
    let exchange = choose(0, EXCHANGES, "key exchange")?;
    choose(1, ED25519_NAME, "kind of host key")?;
    let inbound = choose(2, CIPHERS, "cipher")?;
    let outbound = choose(3, CIPHERS, "cipher")?;
    choose(6, "none", "compression")?;
    choose(7, "none", "compression")?;
    let mut reader = Reader::new(&init);
    reader.take(17)?;
    for _ in 0..10 {
        reader.string()?;
    }
    let offered = names(&init, 0)?;
    // A guess is right where both sides like the same best (RFC 4253 §7), which need not be what is agreed on.
    let is_best = |theirs: &str, ours: &str| theirs.split(',').next() == ours.split(',').next();
    let wrong_guess =
        reader.bool()? && !(is_best(offered, EXCHANGES) && is_best(names(&init, 1)?, ED25519_NAME));
    let extras = Extras {
        strict: offered.split(',').any(|name| name == STRICT_CLIENT),
    };
    let agreed = Agreed {
        exchange: Exchange::named(&exchange).ok_or(Malformed)?,
        inbound: Cipher::named(&inbound).ok_or(Malformed)?,
        outbound: Cipher::named(&outbound).ok_or(Malformed)?,
        wrong_guess,
        peer_init: init,
    };
    Ok((agreed, extras))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_more_is_taken_under_keys_that_were_used_for_too_long() {
        let path =
            std::env::temp_dir().join(format!("transport-{:x}", u64::from_be_bytes(random())));
        let key = HostKey::load_or_make(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let mut transport = Transport::new(Arc::new(key), 1 << 30);
        let packet = [
            0,
            0,
            0,
            12,
            10,
            number::DISCONNECT,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
            0,
        ];
        let said = [b"SSH-2.0-test\r\n".as_slice(), &packet].concat();
        transport.space()[..said.len()].copy_from_slice(&said);
        transport.advance(said.len());
        transport.used.1 = MOST_PACKETS;
        let Err(Fatal::Ours(reason::PROTOCOL_ERROR, why)) = transport.next_message() else {
            panic!("it was taken");
        };
        assert!(why.contains("too long"), "{why}");
        transport.used.1 = MOST_PACKETS - 1;
        assert_eq!(transport.next_message(), Err(Fatal::Goodbye));
    }
}

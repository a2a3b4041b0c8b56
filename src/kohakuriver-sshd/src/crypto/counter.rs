//! AES in counter mode with a MAC beside it (RFC 4344 §4, RFC 6668), for clients that have no cipher which proves its
//! packets itself: Paramiko before 3.5, libssh2 before 1.11, OpenSSH where FIPS 140 or a policy took the others away.

use aes::{Aes128, Aes256};
use ctr::Ctr128BE;
use ctr::cipher::{KeyIvInit, StreamCipher};
use ctutils::CtEq;
use ring::hmac;

use super::{Forged, LENGTH};

/// The MACs offered, ours by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mac {
    /// `hmac-sha2-256-etm@openssh.com`: over what is ciphered.
    Sha256Behind,
    /// `hmac-sha2-512-etm@openssh.com`
    Sha512Behind,
    /// `hmac-sha2-256`: over what is plain.
    Sha256,
    /// `hmac-sha2-512`
    Sha512,
}

impl Mac {
    /// The MAC of that name, if it is one of ours.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "hmac-sha2-256-etm@openssh.com" => Some(Self::Sha256Behind),
            "hmac-sha2-512-etm@openssh.com" => Some(Self::Sha512Behind),
            "hmac-sha2-256" => Some(Self::Sha256),
            "hmac-sha2-512" => Some(Self::Sha512),
            _ => None,
        }
    }

    /// How long its key is, and what it adds to a packet.
    pub(super) fn length(self) -> usize {
        match self {
            Self::Sha256Behind | Self::Sha256 => 32,
            Self::Sha512Behind | Self::Sha512 => 64,
        }
    }

    fn algorithm(self) -> hmac::Algorithm {
        match self {
            Self::Sha256Behind | Self::Sha256 => hmac::HMAC_SHA256,
            Self::Sha512Behind | Self::Sha512 => hmac::HMAC_SHA512,
        }
    }

    /// It proves what is ciphered, and leaves a packet's length in the clear.
    fn is_behind(self) -> bool {
        matches!(self, Self::Sha256Behind | Self::Sha512Behind)
    }
}

enum Stream {
    Narrow(Box<Ctr128BE<Aes128>>),
    Wide(Box<Ctr128BE<Aes256>>),
}

impl Stream {
    /// Ciphers, or deciphers, the next bytes.
    fn apply(&mut self, bytes: &mut [u8]) {
        match self {
            Self::Narrow(stream) => stream.apply_keystream(bytes),
            Self::Wide(stream) => stream.apply_keystream(bytes),
        }
    }
}

/// One direction's cipher and MAC.
pub(super) struct Counter {
    stream: Stream,
    mac: Mac,
    key: hmac::Key,
    /// For who opens packets whose length is ciphered: that part of the stream, which is needed before the packet is there.
    ahead: [u8; LENGTH],
}

impl Counter {
    /// `key` has 16 or 32 bytes, `iv` 16, and `mac_key` as many as the MAC wants.
    pub fn new(key: &[u8], iv: &[u8], mac: Mac, mac_key: &[u8]) -> Self {
        const FITS: &str = "the derived key fits the cipher";
        let stream = match key.len() {
            16 => Stream::Narrow(Box::new(Ctr128BE::new_from_slices(key, iv).expect(FITS))),
            _ => Stream::Wide(Box::new(Ctr128BE::new_from_slices(key, iv).expect(FITS))),
        };
        Self {
            stream,
            mac,
            key: hmac::Key::new(mac.algorithm(), mac_key),
            ahead: [0; LENGTH],
        }
    }

    /// The same, for who opens packets.
    pub fn opening(mut self) -> Self {
        self.look_ahead();
        self
    }

    fn look_ahead(&mut self) {
        if !self.mac.is_behind() {
            self.ahead = [0; LENGTH];
            self.stream.apply(&mut self.ahead);
        }
    }

    pub fn tag(&self) -> usize {
        self.mac.length()
    }

    /// What has to fill whole blocks: with the length in front where that is ciphered, too.
    pub fn covered(&self, behind_length: usize) -> usize {
        if self.mac.is_behind() {
            behind_length
        } else {
            LENGTH + behind_length
        }
    }

    /// A packet's length by its first bytes. Not proven.
    pub fn length(&self, head: [u8; LENGTH]) -> [u8; LENGTH] {
        // Where the length is in the clear, nothing was looked at ahead, and this changes nothing.
        std::array::from_fn(|each| head[each] ^ self.ahead[each])
    }

    fn proof(&self, sequence: u32, packet: &[u8]) -> hmac::Tag {
        let mut context = hmac::Context::with_key(&self.key);
        context.update(&sequence.to_be_bytes());
        context.update(packet);
        context.sign()
    }

    /// Seals a packet with its length, and room for the tag behind it.
    pub fn seal(&mut self, sequence: u32, packet: &mut [u8]) {
        let (packet, tag) = packet.split_at_mut(packet.len() - self.mac.length());
        if self.mac.is_behind() {
            self.stream.apply(&mut packet[LENGTH..]);
            tag.copy_from_slice(self.proof(sequence, packet).as_ref());
        } else {
            tag.copy_from_slice(self.proof(sequence, packet).as_ref());
            self.stream.apply(packet);
        }
    }

    /// Opens what [`Counter::seal`] made.
    pub fn open(&mut self, sequence: u32, packet: &mut [u8]) -> Result<(), Forged> {
        let (packet, tag) = packet.split_at_mut(packet.len() - self.mac.length());
        if !self.mac.is_behind() {
            let head = self.length(packet[..LENGTH].try_into().expect("4 bytes"));
            packet[..LENGTH].copy_from_slice(&head);
            self.stream.apply(&mut packet[LENGTH..]);
        }
        if !self.proof(sequence, packet).as_ref().ct_eq(&*tag).to_bool() {
            return Err(Forged);
        }
        if self.mac.is_behind() {
            self.stream.apply(&mut packet[LENGTH..]);
        }
        self.look_ahead();
        Ok(())
    }
}

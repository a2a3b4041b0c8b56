//! Packet ciphers, key exchange and key derivation (RFC 4253, RFC 5647, RFC 5656, RFC 8731) on ring's primitives.

use ml_kem::kem::TryKeyInit;
use ml_kem::{B32, ml_kem_768};
use ring::aead::chacha20_poly1305_openssh as chacha;
use ring::aead::{AES_128_GCM, AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use ring::agreement::{
    Algorithm, ECDH_P256, EphemeralPrivateKey, UnparsedPublicKey, X25519, agree_ephemeral,
};
use ring::digest::{Context, SHA256, digest};
use ring::rand::{SecureRandom, SystemRandom};
use zeroize::{Zeroize, Zeroizing};

use crate::wire::Put;

mod counter;

use counter::Counter;
pub use counter::Mac;

/// Ciphers that prove their packets themselves end one with so many bytes.
const TAG: usize = 16;
const LENGTH: usize = 4;
/// RFC 4253 §6: padding has at least four bytes.
pub const LEAST_PADDING: usize = 4;
/// RFC 4253 §6: what is ciphered is a whole number of blocks, of 8 bytes where the cipher has none.
const CLEAR_BLOCK: usize = 8;
const CHACHA_BLOCK: usize = 8;
const AES_BLOCK: usize = 16;
/// What AES-GCM begins to count from.
const IV: usize = 12;
/// What SHA-256 makes.
const DIGEST: usize = 32;

/// A packet that was not made with the keys of this connection.
#[derive(Debug, PartialEq, Eq)]
pub struct Forged;

/// The ciphers offered, ours by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cipher {
    /// `chacha20-poly1305@openssh.com`
    ChaCha20,
    /// `aes128-gcm@openssh.com`
    Aes128,
    /// `aes256-gcm@openssh.com`
    Aes256,
    /// `aes128-ctr`, and the MAC that goes with it
    Aes128Counter(Mac),
    /// `aes256-ctr`, and the MAC that goes with it
    Aes256Counter(Mac),
}

impl Cipher {
    /// The cipher of that name, if it is one of ours. `mac` is asked for the MAC of one that needs one.
    pub fn named<E>(
        name: &str,
        mac: impl FnOnce() -> Result<Option<Mac>, E>,
    ) -> Result<Option<Self>, E> {
        Ok(match name {
            "chacha20-poly1305@openssh.com" => Some(Self::ChaCha20),
            "aes128-gcm@openssh.com" => Some(Self::Aes128),
            "aes256-gcm@openssh.com" => Some(Self::Aes256),
            "aes128-ctr" => mac()?.map(Self::Aes128Counter),
            "aes256-ctr" => mac()?.map(Self::Aes256Counter),
            _ => None,
        })
    }

    fn key_length(self) -> usize {
        match self {
            Self::ChaCha20 => chacha::KEY_LEN,
            Self::Aes128 | Self::Aes128Counter(_) => 16,
            Self::Aes256 | Self::Aes256Counter(_) => 32,
        }
    }

    fn mac_length(self) -> usize {
        match self {
            Self::Aes128Counter(mac) | Self::Aes256Counter(mac) => mac.length(),
            _ => 0,
        }
    }
}

/// AES-GCM with its nonce: four fixed bytes and a counter of packets (RFC 5647 §7.1).
struct Gcm {
    key: LessSafeKey,
    fixed: [u8; 4],
    counter: u64,
}

impl Gcm {
    fn new(algorithm: &'static ring::aead::Algorithm, key: &[u8], iv: &[u8]) -> Self {
        let key = UnboundKey::new(algorithm, key).expect("the derived key fits the cipher");
        let (fixed, counter) = iv[..IV].split_at(4);
        Self {
            key: LessSafeKey::new(key),
            fixed: fixed.try_into().expect("4 bytes"),
            counter: u64::from_be_bytes(counter.try_into().expect("8 bytes")),
        }
    }

    fn nonce(&mut self) -> Nonce {
        let mut bytes = [0; 12];
        bytes[..4].copy_from_slice(&self.fixed);
        bytes[4..].copy_from_slice(&self.counter.to_be_bytes());
        self.counter = self.counter.wrapping_add(1);
        Nonce::assume_unique_for_key(bytes)
    }
}

/// Which way packets go: each way has keys of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// From client to server.
    ToServer,
    /// From server to client.
    ToClient,
}

/// Makes packets of one direction unreadable and unforgeable.
pub struct Sealer(Sealing);

enum Sealing {
    Clear,
    ChaCha20(Box<chacha::SealingKey>),
    Gcm(Box<Gcm>),
    Counter(Counter),
}

impl Sealer {
    /// Before the first key exchange: packets as they are.
    pub fn clear() -> Self {
        Self(Sealing::Clear)
    }

    /// What is added behind a packet.
    pub fn tag(&self) -> usize {
        match &self.0 {
            Sealing::Clear => 0,
            Sealing::ChaCha20(_) | Sealing::Gcm(_) => TAG,
            Sealing::Counter(counter) => counter.tag(),
        }
    }

    /// What has to fill whole blocks: with the length in front where that is part of what is ciphered. And the block.
    fn blocks(&self, behind_length: usize) -> (usize, usize) {
        match &self.0 {
            Sealing::Clear => (LENGTH + behind_length, CLEAR_BLOCK),
            Sealing::ChaCha20(_) => (behind_length, CHACHA_BLOCK),
            Sealing::Gcm(_) => (behind_length, AES_BLOCK),
            Sealing::Counter(counter) => (counter.covered(behind_length), AES_BLOCK),
        }
    }

    /// How many bytes of padding follow `payload` bytes of payload.
    pub fn padding(&self, payload: usize) -> usize {
        let (covered, block) = self.blocks(1 + payload);
        let padding = block - covered % block;
        if padding < LEAST_PADDING {
            padding + block
        } else {
            padding
        }
    }

    /// Seals `packet`, which is the length, the padding's length, payload, padding, and room for [`Sealer::tag`].
    pub fn seal(&mut self, sequence: u32, packet: &mut [u8]) {
        let end = packet.len() - self.tag();
        match &mut self.0 {
            Sealing::Clear => {}
            Sealing::ChaCha20(key) => {
                let (plain, tag) = packet.split_at_mut(end);
                let tag = tag.try_into().expect("room for the tag");
                key.seal_in_place(sequence, plain, tag);
            }
            Sealing::Gcm(gcm) => {
                let nonce = gcm.nonce();
                let (length, rest) = packet.split_at_mut(LENGTH);
                let (plain, tag) = rest.split_at_mut(end - LENGTH);
                let made = gcm
                    .key
                    .seal_in_place_separate_tag(nonce, Aad::from(&*length), plain)
                    .expect("a packet is shorter than the cipher's limit");
                tag.copy_from_slice(made.as_ref());
            }
            Sealing::Counter(counter) => counter.seal(sequence, packet),
        }
    }
}

/// Opens what the other side's [`Sealer`] made.
pub struct Opener(Opening);

enum Opening {
    Clear,
    ChaCha20(Box<chacha::OpeningKey>),
    Gcm(Box<Gcm>),
    Counter(Counter),
}

impl Opener {
    /// Before the first key exchange: packets as they are.
    pub fn clear() -> Self {
        Self(Opening::Clear)
    }

    /// What follows a packet's last byte of padding.
    pub fn tag(&self) -> usize {
        match &self.0 {
            Opening::Clear => 0,
            Opening::ChaCha20(_) | Opening::Gcm(_) => TAG,
            Opening::Counter(counter) => counter.tag(),
        }
    }

    /// A packet's length, which counts neither itself nor the tag. Not proven before [`Opener::open`].
    pub fn length(&self, sequence: u32, head: [u8; LENGTH]) -> u32 {
        u32::from_be_bytes(match &self.0 {
            Opening::ChaCha20(key) => key.decrypt_packet_length(sequence, head),
            Opening::Counter(counter) => counter.length(head),
            _ => head,
        })
    }

    /// May a packet have this length? RFC 4253 §6: whole blocks, and room for the padding and at least one byte more.
    pub fn is_length(&self, length: usize) -> bool {
        let (covered, block) = match &self.0 {
            Opening::Clear => (LENGTH + length, CLEAR_BLOCK),
            Opening::ChaCha20(_) => (length, CHACHA_BLOCK),
            Opening::Gcm(_) => (length, AES_BLOCK),
            Opening::Counter(counter) => (counter.covered(length), AES_BLOCK),
        };
        covered % block == 0 && length > 1 + LEAST_PADDING
    }

    /// Opens `packet`, all of it from the length to the tag: its bytes 4.. are the padding's length and payload then.
    pub fn open(&mut self, sequence: u32, packet: &mut [u8]) -> Result<(), Forged> {
        match &mut self.0 {
            Opening::Clear => {}
            Opening::ChaCha20(key) => {
                let (ciphered, tag) = packet.split_at_mut(packet.len() - TAG);
                let tag = (&*tag).try_into().expect("16 bytes");
                key.open_in_place(sequence, ciphered, tag)
                    .map_err(|_| Forged)?;
            }
            Opening::Gcm(gcm) => {
                let nonce = gcm.nonce();
                let (length, ciphered) = packet.split_at_mut(LENGTH);
                let opened = gcm.key.open_in_place(nonce, Aad::from(&*length), ciphered);
                opened.map_err(|_| Forged)?;
            }
            Opening::Counter(counter) => counter.open(sequence, packet)?,
        }
        Ok(())
    }
}

/// Which exchange of keys was agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exchange {
    /// `curve25519-sha256` (RFC 8731)
    Curve25519,
    /// `ecdh-sha2-nistp256` (RFC 5656), for clients that FIPS 140 leaves no other
    NistP256,
    /// `mlkem768x25519-sha256`: the same, joined with ML-KEM-768 against recordings that a quantum computer may open
    MlKem768,
}

impl Exchange {
    /// The exchange of that name, if it is one of ours.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "mlkem768x25519-sha256" => Some(Self::MlKem768),
            "curve25519-sha256" | "curve25519-sha256@libssh.org" => Some(Self::Curve25519),
            "ecdh-sha2-nistp256" => Some(Self::NistP256),
            _ => None,
        }
    }

    /// The server's half: its answer to the client's `share`, and the secret as it enters hashes.
    pub fn answer(self, share: &[u8]) -> Result<(Vec<u8>, Secret), Forged> {
        match self {
            Self::Curve25519 => number(&X25519, share),
            Self::NistP256 => number(&ECDH_P256, share),
            Self::MlKem768 => hybrid(share),
        }
    }
}

/// A curve's exchange alone, whose secret is hashed as a number.
fn number(curve: &'static Algorithm, share: &[u8]) -> Result<(Vec<u8>, Secret), Forged> {
    let (public, shared) = on_curve(curve, share)?;
    Ok((public, Secret::number(&*shared)))
}

fn on_curve(
    curve: &'static Algorithm,
    share: &[u8],
) -> Result<(Vec<u8>, Zeroizing<[u8; 32]>), Forged> {
    let private = EphemeralPrivateKey::generate(curve, &SystemRandom::new()).map_err(|_| Forged)?;
    let public = private.compute_public_key().map_err(|_| Forged)?;
    // ring refuses a share that leads to the all-zero secret, as RFC 8731 §3 asks, and one that is no point of its
    // curve, as RFC 5656 §4 does.
    let shared = agree_ephemeral(private, &UnparsedPublicKey::new(curve, share), |shared| {
        Zeroizing::new(shared.try_into().expect("both curves make 32 bytes"))
    })
    .map_err(|_| Forged)?;
    Ok((public.as_ref().to_vec(), shared))
}

/// draft-ietf-sshm-mlkem-hybrid-kex: the client's share is an encapsulation key and a point.
fn hybrid(share: &[u8]) -> Result<(Vec<u8>, Secret), Forged> {
    const ENCAPSULATION_KEY: usize = 1184;
    if share.len() != ENCAPSULATION_KEY + 32 {
        return Err(Forged);
    }
    let (key, point) = share.split_at(ENCAPSULATION_KEY);
    let key = ml_kem_768::EncapsulationKey::new_from_slice(key).map_err(|_| Forged)?;
    let mut random = B32::default();
    SystemRandom::new().fill(&mut random).map_err(|_| Forged)?;
    let (ciphertext, mut quantum) = key.encapsulate_deterministic(&random);
    random.zeroize();
    let (public, classic) = on_curve(&X25519, point)?;
    let mut answer = ciphertext.to_vec();
    answer.put_raw(&public);
    let mut context = Context::new(&SHA256);
    context.update(&quantum);
    context.update(&*classic);
    quantum.zeroize();
    let mut secret = Zeroizing::new(Vec::with_capacity(4 + 32));
    secret.put_string(context.finish().as_ref());
    Ok((answer, Secret(secret)))
}

/// A key exchange's shared secret, encoded as its method says; wiped when it goes.
pub struct Secret(Zeroizing<Vec<u8>>);

impl Secret {
    /// What a curve's exchange gives, as a number (RFC 8731 §3.1).
    pub fn number(shared: &[u8]) -> Self {
        // Of the full size at once: a buffer that grows leaves copies.
        let mut secret = Zeroizing::new(Vec::with_capacity(4 + 1 + shared.len()));
        secret.put_mpint(shared);
        Self(secret)
    }

    /// The encoded secret, the last part of what the exchange hash is over.
    pub fn encoded(&self) -> &[u8] {
        &self.0
    }

    /// RFC 4253 §7.2: `length` bytes for the purpose that `letter` names.
    fn derive(&self, hash: &[u8], session: &[u8], letter: u8, length: usize) -> Zeroizing<Vec<u8>> {
        let mut key = Zeroizing::new(Vec::with_capacity(length.next_multiple_of(DIGEST)));
        key.put_raw(&sha256(&[&self.0, hash, &[letter], session]));
        while key.len() < length {
            let more = sha256(&[&self.0, hash, &key]);
            key.put_raw(&more);
        }
        key.truncate(length);
        key
    }

    /// The initial vector, the key and the MAC's key of one direction.
    fn keys(
        &self,
        cipher: Cipher,
        hash: &[u8],
        session: &[u8],
        direction: Direction,
    ) -> [Zeroizing<Vec<u8>>; 3] {
        let letters = match direction {
            Direction::ToServer => [b'A', b'C', b'E'],
            Direction::ToClient => [b'B', b'D', b'F'],
        };
        let lengths = [AES_BLOCK, cipher.key_length(), cipher.mac_length()];
        [0, 1, 2].map(|each| self.derive(hash, session, letters[each], lengths[each]))
    }

    /// What opens the packets of a direction.
    pub fn opener(
        &self,
        cipher: Cipher,
        hash: &[u8],
        session: &[u8],
        direction: Direction,
    ) -> Opener {
        let [iv, key, mac_key] = self.keys(cipher, hash, session, direction);
        Opener(match cipher {
            Cipher::ChaCha20 => {
                let key = key.as_slice().try_into().expect("64 bytes");
                Opening::ChaCha20(Box::new(chacha::OpeningKey::new(key)))
            }
            Cipher::Aes128 => Opening::Gcm(Box::new(Gcm::new(&AES_128_GCM, &key, &iv))),
            Cipher::Aes256 => Opening::Gcm(Box::new(Gcm::new(&AES_256_GCM, &key, &iv))),
            Cipher::Aes128Counter(mac) | Cipher::Aes256Counter(mac) => {
                Opening::Counter(Counter::new(&key, &iv, mac, &mac_key).opening())
            }
        })
    }

    /// What seals the packets of a direction.
    pub fn sealer(
        &self,
        cipher: Cipher,
        hash: &[u8],
        session: &[u8],
        direction: Direction,
    ) -> Sealer {
        let [iv, key, mac_key] = self.keys(cipher, hash, session, direction);
        Sealer(match cipher {
            Cipher::ChaCha20 => {
                let key = key.as_slice().try_into().expect("64 bytes");
                Sealing::ChaCha20(Box::new(chacha::SealingKey::new(key)))
            }
            Cipher::Aes128 => Sealing::Gcm(Box::new(Gcm::new(&AES_128_GCM, &key, &iv))),
            Cipher::Aes256 => Sealing::Gcm(Box::new(Gcm::new(&AES_256_GCM, &key, &iv))),
            Cipher::Aes128Counter(mac) | Cipher::Aes256Counter(mac) => {
                Sealing::Counter(Counter::new(&key, &iv, mac, &mac_key))
            }
        })
    }
}

/// SHA-256 over the parts, one behind the other.
pub fn sha256(parts: &[&[u8]]) -> [u8; 32] {
    match parts {
        [one] => digest(&SHA256, one),
        _ => {
            let mut context = Context::new(&SHA256);
            parts.iter().for_each(|part| context.update(part));
            context.finish()
        }
    }
    .as_ref()
    .try_into()
    .expect("SHA-256 makes 32 bytes")
}

/// Bytes that nobody can guess.
pub fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    SystemRandom::new()
        .fill(&mut bytes)
        .expect("the kernel has randomness");
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    const CIPHERS: [Cipher; 9] = [
        Cipher::ChaCha20,
        Cipher::Aes128,
        Cipher::Aes256,
        Cipher::Aes128Counter(Mac::Sha256Behind),
        Cipher::Aes256Counter(Mac::Sha512Behind),
        Cipher::Aes128Counter(Mac::Sha256),
        Cipher::Aes128Counter(Mac::Sha512),
        Cipher::Aes256Counter(Mac::Sha256),
        Cipher::Aes256Counter(Mac::Sha512),
    ];

    fn pair(cipher: Cipher) -> (Sealer, Opener) {
        let (secret, hash) = (Secret::number(&[7; 32]), [9; 32]);
        (
            secret.sealer(cipher, &hash, &hash, Direction::ToServer),
            secret.opener(cipher, &hash, &hash, Direction::ToServer),
        )
    }

    fn packet(sealer: &mut Sealer, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let padding = sealer.padding(payload.len());
        let mut packet = Vec::new();
        packet.put_u32((1 + payload.len() + padding) as u32);
        packet.put_u8(padding as u8);
        packet.put_raw(payload);
        packet.resize(packet.len() + padding + sealer.tag(), 0);
        sealer.seal(sequence, &mut packet);
        packet
    }

    #[test]
    fn packets_of_every_length_are_opened_one_after_the_other() {
        for cipher in CIPHERS {
            let (mut sealer, mut opener) = pair(cipher);
            for size in 1..100 {
                let sequence = size as u32;
                let payload = vec![size as u8; size];
                let mut sealed = packet(&mut sealer, sequence, &payload);
                let length = opener.length(sequence, sealed[..4].try_into().unwrap()) as usize;
                assert_eq!(sealed.len(), 4 + length + opener.tag(), "{cipher:?}");
                assert!(opener.is_length(length), "{cipher:?}, {size}");
                assert_eq!(opener.open(sequence, &mut sealed), Ok(()), "{cipher:?}");
                assert_eq!(sealed[5..5 + size], payload, "{cipher:?}");
            }
        }
    }

    #[test]
    fn a_packet_with_any_bit_changed_or_in_another_place_is_forged() {
        for cipher in CIPHERS {
            let sealed = packet(&mut pair(cipher).0, 3, b"some payload");
            for bit in 0..8 * sealed.len() {
                let mut changed = sealed.clone();
                changed[bit / 8] ^= 1 << (bit % 8);
                let opened = pair(cipher).1.open(3, &mut changed);
                assert_eq!(opened, Err(Forged), "{cipher:?}, bit {bit}");
            }
            // AES-GCM counts packets itself, and the number in the connection is nothing to it.
            if !matches!(cipher, Cipher::Aes128 | Cipher::Aes256) {
                assert_eq!(pair(cipher).1.open(4, &mut sealed.clone()), Err(Forged));
            }
        }
    }
}

//! Packet ciphers, key exchange and key derivation (RFC 4253, RFC 5647, RFC 8731) on ring's primitives.

use ml_kem::kem::TryKeyInit;
use ml_kem::{B32, ml_kem_768};
use ring::aead::chacha20_poly1305_openssh as chacha;
use ring::aead::{AES_128_GCM, AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use ring::agreement::{EphemeralPrivateKey, UnparsedPublicKey, X25519, agree_ephemeral};
use ring::digest::{Context, SHA256, digest};
use ring::rand::{SecureRandom, SystemRandom};
use zeroize::{Zeroize, Zeroizing};

use crate::wire::Put;

/// Every cipher here ends a packet with 16 bytes that prove it.
pub const TAG: usize = 16;
const LENGTH: usize = 4;
/// RFC 4253 §6: padding has at least four bytes.
pub const LEAST_PADDING: usize = 4;
/// RFC 4253 §6: what is ciphered is a whole number of blocks, of 8 bytes where the cipher has none.
const CLEAR_BLOCK: usize = 8;
const CHACHA_BLOCK: usize = 8;
const GCM_BLOCK: usize = 16;
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
}

impl Cipher {
    /// The cipher of that name, if it is one of ours.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "chacha20-poly1305@openssh.com" => Some(Self::ChaCha20),
            "aes128-gcm@openssh.com" => Some(Self::Aes128),
            "aes256-gcm@openssh.com" => Some(Self::Aes256),
            _ => None,
        }
    }

    fn key_length(self) -> usize {
        match self {
            Self::ChaCha20 => chacha::KEY_LEN,
            Self::Aes128 => 16,
            Self::Aes256 => 32,
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
}

impl Sealer {
    /// Before the first key exchange: packets as they are.
    pub fn clear() -> Self {
        Self(Sealing::Clear)
    }

    /// What is added behind a packet.
    pub fn tag(&self) -> usize {
        if matches!(self.0, Sealing::Clear) {
            0
        } else {
            TAG
        }
    }

    /// What has to fill whole blocks: with the length in front where that is part of what is ciphered. And the block.
    fn blocks(&self, behind_length: usize) -> (usize, usize) {
        match self.0 {
            Sealing::Clear => (LENGTH + behind_length, CLEAR_BLOCK),
            Sealing::ChaCha20(_) => (behind_length, CHACHA_BLOCK),
            Sealing::Gcm(_) => (behind_length, GCM_BLOCK),
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
        }
    }
}

/// Opens what the other side's [`Sealer`] made.
pub struct Opener(Opening);

enum Opening {
    Clear,
    ChaCha20(Box<chacha::OpeningKey>),
    Gcm(Box<Gcm>),
}

impl Opener {
    /// Before the first key exchange: packets as they are.
    pub fn clear() -> Self {
        Self(Opening::Clear)
    }

    /// What follows a packet's last byte of padding.
    pub fn tag(&self) -> usize {
        if matches!(self.0, Opening::Clear) {
            0
        } else {
            TAG
        }
    }

    /// A packet's length, which counts neither itself nor the tag. Not proven before [`Opener::open`].
    pub fn length(&self, sequence: u32, head: [u8; LENGTH]) -> u32 {
        u32::from_be_bytes(match &self.0 {
            Opening::ChaCha20(key) => key.decrypt_packet_length(sequence, head),
            _ => head,
        })
    }

    /// May a packet have this length? RFC 4253 §6: whole blocks, and room for the padding and at least one byte more.
    pub fn is_length(&self, length: usize) -> bool {
        let (covered, block) = match self.0 {
            Opening::Clear => (LENGTH + length, CLEAR_BLOCK),
            Opening::ChaCha20(_) => (length, CHACHA_BLOCK),
            Opening::Gcm(_) => (length, GCM_BLOCK),
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
        }
        Ok(())
    }
}

/// Which exchange of keys was agreed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exchange {
    /// `curve25519-sha256` (RFC 8731)
    Curve25519,
    /// `mlkem768x25519-sha256`: the same, joined with ML-KEM-768 against recordings that a quantum computer may open
    MlKem768,
}

impl Exchange {
    /// The exchange of that name, if it is one of ours.
    pub fn named(name: &str) -> Option<Self> {
        match name {
            "mlkem768x25519-sha256" => Some(Self::MlKem768),
            "curve25519-sha256" | "curve25519-sha256@libssh.org" => Some(Self::Curve25519),
            _ => None,
        }
    }

    /// The server's half: its answer to the client's `share`, and the secret as it enters hashes.
    pub fn answer(self, share: &[u8]) -> Result<(Vec<u8>, Secret), Forged> {
        match self {
            Self::Curve25519 => {
                let (public, shared) = curve25519(share)?;
                Ok((public, Secret::number(&*shared)))
            }
            Self::MlKem768 => hybrid(share),
        }
    }
}

fn curve25519(share: &[u8]) -> Result<(Vec<u8>, Zeroizing<[u8; 32]>), Forged> {
    let private =
        EphemeralPrivateKey::generate(&X25519, &SystemRandom::new()).map_err(|_| Forged)?;
    let public = private.compute_public_key().map_err(|_| Forged)?;
    // ring refuses a share that leads to the all-zero secret, as RFC 8731 §3 asks.
    let shared = agree_ephemeral(private, &UnparsedPublicKey::new(&X25519, share), |shared| {
        Zeroizing::new(shared.try_into().expect("X25519 makes 32 bytes"))
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
    let (public, classic) = curve25519(point)?;
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

    /// The initial vector and the key of one direction.
    fn keys(
        &self,
        cipher: Cipher,
        hash: &[u8],
        session: &[u8],
        direction: Direction,
    ) -> [Zeroizing<Vec<u8>>; 2] {
        let letters = match direction {
            Direction::ToServer => [b'A', b'C'],
            Direction::ToClient => [b'B', b'D'],
        };
        let lengths = [IV, cipher.key_length()];
        [0, 1].map(|each| self.derive(hash, session, letters[each], lengths[each]))
    }

    /// What opens the packets of a direction.
    pub fn opener(
        &self,
        cipher: Cipher,
        hash: &[u8],
        session: &[u8],
        direction: Direction,
    ) -> Opener {
        let [iv, key] = self.keys(cipher, hash, session, direction);
        Opener(match cipher {
            Cipher::ChaCha20 => {
                let key = key.as_slice().try_into().expect("64 bytes");
                Opening::ChaCha20(Box::new(chacha::OpeningKey::new(key)))
            }
            Cipher::Aes128 => Opening::Gcm(Box::new(Gcm::new(&AES_128_GCM, &key, &iv))),
            Cipher::Aes256 => Opening::Gcm(Box::new(Gcm::new(&AES_256_GCM, &key, &iv))),
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
        let [iv, key] = self.keys(cipher, hash, session, direction);
        Sealer(match cipher {
            Cipher::ChaCha20 => {
                let key = key.as_slice().try_into().expect("64 bytes");
                Sealing::ChaCha20(Box::new(chacha::SealingKey::new(key)))
            }
            Cipher::Aes128 => Sealing::Gcm(Box::new(Gcm::new(&AES_128_GCM, &key, &iv))),
            Cipher::Aes256 => Sealing::Gcm(Box::new(Gcm::new(&AES_256_GCM, &key, &iv))),
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

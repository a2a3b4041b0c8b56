//! Host key file, authorized keys, and the signatures of both.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::rand::SystemRandom;
use ring::signature::{
    self, ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED,
    ED25519, EcdsaKeyPair, Ed25519KeyPair, KeyPair, RSA_PKCS1_2048_8192_SHA256,
    RSA_PKCS1_2048_8192_SHA512, RsaPublicKeyComponents, UnparsedPublicKey,
};

use zeroize::Zeroizing;

use crate::crypto::{random, sha256};
use crate::sys;
use crate::wire::{Malformed, Put, Reader};

/// The names of host keys and of their signatures: what every client should take, and what FIPS 140 leaves to some.
const ED25519_NAME: &str = "ssh-ed25519";
const P256_NAME: &str = "ecdsa-sha2-nistp256";
const P256_CURVE: &str = "nistp256";
/// The algorithms whose signatures let a user in.
pub const SIGNATURES: &str = "ssh-ed25519,sk-ssh-ed25519@openssh.com,ecdsa-sha2-nistp256,ecdsa-sha2-nistp384,\
     sk-ecdsa-sha2-nistp256@openssh.com,rsa-sha2-512,rsa-sha2-256";

const MAGIC: &[u8] = b"openssh-key-v1\0";
const BEGIN: &str = "-----BEGIN OPENSSH PRIVATE KEY-----";
const END: &str = "-----END OPENSSH PRIVATE KEY-----";

/// What this server proves itself with: keys of different kinds, of which a client chooses one.
pub struct HostKeys(Vec<HostKey>);

impl HostKeys {
    /// The keys in these files, as [`HostKey::load_or_make`] reads them.
    pub fn load_or_make(paths: &[PathBuf]) -> io::Result<Self> {
        let mut keys: Vec<HostKey> = Vec::new();
        for path in paths {
            let key = HostKey::load_or_make(path)?;
            if keys.iter().any(|other| other.name() == key.name()) {
                let sentence = format!("{} holds a second {} key", path.display(), key.name());
                return Err(io::Error::new(io::ErrorKind::InvalidInput, sentence));
            }
            keys.push(key);
        }
        Ok(Self(keys))
    }

    /// Their names, with commas between them.
    pub fn names(&self) -> String {
        self.0
            .iter()
            .map(HostKey::name)
            .collect::<Vec<_>>()
            .join(",")
    }

    /// The one of that name.
    pub fn named(&self, name: &str) -> Option<&HostKey> {
        self.0.iter().find(|key| key.name() == name)
    }

    /// The one whose file was named first.
    pub fn first(&self) -> &HostKey {
        &self.0[0]
    }
}

enum Pair {
    Ed25519(Ed25519KeyPair),
    P256(EcdsaKeyPair),
}

/// One kind of key that this server proves itself with.
pub struct HostKey {
    pair: Pair,
    public: Vec<u8>,
}

impl HostKey {
    fn from_seed(seed: &[u8]) -> Option<Self> {
        let pair = Ed25519KeyPair::from_seed_unchecked(seed).ok()?;
        let mut public = Vec::new();
        public.put_string(ED25519_NAME.as_bytes());
        public.put_string(pair.public_key().as_ref());
        let pair = Pair::Ed25519(pair);
        Some(Self { pair, public })
    }

    fn on_p256(point: &[u8], private: &[u8]) -> Option<Self> {
        let kind = &ECDSA_P256_SHA256_FIXED_SIGNING;
        let mut full = Zeroizing::new([0; 32]);
        full.get_mut(32usize.checked_sub(private.len())?..)?
            .copy_from_slice(private);
        let random = SystemRandom::new();
        let pair = EcdsaKeyPair::from_private_key_and_public_key(kind, &*full, point, &random);
        let mut public = Vec::new();
        for part in [P256_NAME.as_bytes(), P256_CURVE.as_bytes(), point] {
            public.put_string(part);
        }
        let pair = Pair::P256(pair.ok()?);
        Some(Self { pair, public })
    }

    /// The key in `path`, an OpenSSH private key without a passphrase: Ed25519, or ECDSA on P-256. Where there is none,
    /// an Ed25519 key is made there (0600).
    pub fn load_or_make(path: &Path) -> io::Result<Self> {
        match sys::read_file(path).map(Zeroizing::new) {
            Ok(content) => std::str::from_utf8(&content)
                .ok()
                .and_then(parse_private)
                .ok_or_else(|| {
                    let sentence = format!(
                        "{} holds no Ed25519 key, and no ECDSA key on P-256, without a passphrase",
                        path.display()
                    );
                    io::Error::new(io::ErrorKind::InvalidData, sentence)
                }),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Self::make(path),
            Err(error) => Err(cannot_read(path, &error)),
        }
    }

    fn make(path: &Path) -> io::Result<Self> {
        let seed = Zeroizing::new(random::<32>());
        let key = Self::from_seed(&*seed).expect("any 32 bytes are a key");
        let named = |error: io::Error| {
            io::Error::new(
                error.kind(),
                format!("can't write {}: {error}", path.display()),
            )
        };
        // Complete under another name first: a second server that starts now never reads half a key.
        let mut fresh = path.as_os_str().to_owned();
        fresh.push(format!(".{}", std::process::id()));
        let mut file = fs::OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&fresh)
            .map_err(named)?;
        file.write_all(encoded(&*seed, &key.public).as_bytes())
            .map_err(named)?;
        let kept = fs::hard_link(&fresh, path);
        fs::remove_file(&fresh).map_err(named)?;
        match kept {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Self::load_or_make(path),
            other => other.map_err(named).map(|()| key),
        }
    }

    /// What its kind is called.
    pub fn name(&self) -> &'static str {
        match self.pair {
            Pair::Ed25519(_) => ED25519_NAME,
            Pair::P256(_) => P256_NAME,
        }
    }

    /// The public key as it stands in messages.
    pub fn public(&self) -> &[u8] {
        &self.public
    }

    /// The public key as it stands in a known_hosts file, behind the host's name.
    pub fn public_line(&self) -> String {
        format!("{} {}", self.name(), STANDARD.encode(&self.public))
    }

    /// A signature as it stands in messages.
    pub fn sign(&self, message: &[u8]) -> Vec<u8> {
        let mut encoded = Vec::new();
        encoded.put_string(self.name().as_bytes());
        match &self.pair {
            Pair::Ed25519(pair) => encoded.put_string(pair.sign(message).as_ref()),
            Pair::P256(pair) => {
                let made = pair.sign(&SystemRandom::new(), message);
                let made = made.expect("the kernel has randomness");
                let (r, s) = made.as_ref().split_at(32);
                let mut numbers = Vec::new();
                numbers.put_mpint(r);
                numbers.put_mpint(s);
                encoded.put_string(&numbers);
            }
        }
        encoded
    }
}

/// The file of an Ed25519 key (PROTOCOL.key): its seed, and the public key as it stands in messages.
fn encoded(seed: &[u8], public: &[u8]) -> Zeroizing<String> {
    // The last part of the message is the point itself.
    let point = &public[public.len() - 32..];
    let mut private = Zeroizing::new(Vec::with_capacity(256));
    let check = u32::from_be_bytes(random());
    private.put_u32(check);
    private.put_u32(check);
    private.put_raw(public);
    private.put_string(&Zeroizing::new([seed, point].concat()));
    private.put_string(b"");
    for padding in 1..=(8 - private.len() % 8) % 8 {
        private.put_u8(padding as u8);
    }
    let mut file = Zeroizing::new(Vec::with_capacity(512));
    file.put_raw(MAGIC);
    file.put_string(b"none");
    file.put_string(b"none");
    file.put_string(b"");
    file.put_u32(1);
    file.put_string(public);
    file.put_string(&private);
    let mut text = Zeroizing::new(String::with_capacity(1024));
    text.push_str(BEGIN);
    let encoded = Zeroizing::new(STANDARD.encode(&*file));
    for line in encoded.as_bytes().chunks(70) {
        text.push('\n');
        text.push_str(std::str::from_utf8(line).expect("base64 is ASCII"));
    }
    text.push('\n');
    text.push_str(END);
    text.push('\n');
    text
}

/// The same error, with the file's name.
pub fn cannot_read(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(
        error.kind(),
        format!("can't read {}: {error}", path.display()),
    )
}

/// The key in an OpenSSH private key file (PROTOCOL.key).
fn parse_private(text: &str) -> Option<HostKey> {
    let body = text.trim().strip_prefix(BEGIN)?.strip_suffix(END)?;
    let mut digits = Zeroizing::new(String::with_capacity(body.len()));
    digits.extend(body.split_whitespace());
    let file = Zeroizing::new(STANDARD.decode(digits.as_bytes()).ok()?);
    let parse = || -> Result<Option<HostKey>, Malformed> {
        let mut reader = Reader::new(file.strip_prefix(MAGIC).ok_or(Malformed)?);
        let (cipher, kdf, _options) = (reader.string()?, reader.string()?, reader.string()?);
        let (keys, _public) = (reader.u32()?, reader.string()?);
        let mut private = Reader::new(reader.string()?);
        if cipher != b"none" || kdf != b"none" || keys != 1 || private.u32()? != private.u32()? {
            return Ok(None);
        }
        let (kind, next) = (private.text()?, private.string()?);
        Ok(match kind {
            // The public key, then the seed with the public key again.
            ED25519_NAME => HostKey::from_seed(private.string()?.get(..32).ok_or(Malformed)?),
            P256_NAME if next == P256_CURVE.as_bytes() => {
                HostKey::on_p256(private.string()?, private.mpint()?)
            }
            _ => None,
        })
    };
    parse().ok().flatten()
}

/// Is the public key `blob` on a line of this authorized_keys file?
///
/// A line with options is no permission: they restrict what its key may do, and this server can't. Comments are in any
/// encoding.
pub fn is_authorized(file: &[u8], blob: &[u8]) -> bool {
    file.split(|byte| *byte == b'\n').any(|line| {
        let mut words = line
            .split(u8::is_ascii_whitespace)
            .filter(|word| !word.is_empty());
        let (Some(kind), Some(encoded)) = (words.next(), words.next()) else {
            return false;
        };
        let Ok(known) = STANDARD.decode(encoded) else {
            return false;
        };
        Reader::new(&known).string() == Ok(kind) && known == blob
    })
}

/// Did the owner of the public key `blob` sign `message`, by the named algorithm?
pub fn verify(algorithm: &str, blob: &[u8], signature: &[u8], message: &[u8]) -> bool {
    check(algorithm, blob, signature, message).unwrap_or(false)
}

fn check(algorithm: &str, blob: &[u8], encoded: &[u8], message: &[u8]) -> Result<bool, Malformed> {
    let mut key = Reader::new(blob);
    let kind = key.text()?;
    let mut encoded = Reader::new(encoded);
    if encoded.string()? != algorithm.as_bytes() || !fits(kind, algorithm) {
        return Ok(false);
    }
    let signature = encoded.string()?;
    if !algorithm.starts_with("sk-") {
        encoded.end()?;
    }
    Ok(match algorithm {
        "ssh-ed25519" => is_valid(&ED25519, key.string()?, signature, message),
        "rsa-sha2-256" | "rsa-sha2-512" => {
            let (e, n) = (key.mpint()?, key.mpint()?);
            let parameters = match algorithm {
                "rsa-sha2-256" => &RSA_PKCS1_2048_8192_SHA256,
                _ => &RSA_PKCS1_2048_8192_SHA512,
            };
            RsaPublicKeyComponents { n, e }
                .verify(parameters, message, signature)
                .is_ok()
        }
        "ecdsa-sha2-nistp256" | "ecdsa-sha2-nistp384" => {
            let curve = key.text()?;
            algorithm.ends_with(curve) && ecdsa(curve, key.string()?, signature, message)?
        }
        "sk-ssh-ed25519@openssh.com" => {
            let (point, application) = (key.string()?, key.string()?);
            let Some(signed) = from_token(application, encoded, message)? else {
                return Ok(false);
            };
            is_valid(&ED25519, point, signature, &signed)
        }
        "sk-ecdsa-sha2-nistp256@openssh.com" => {
            let (curve, point, application) = (key.text()?, key.string()?, key.string()?);
            let Some(signed) = from_token(application, encoded, message)? else {
                return Ok(false);
            };
            curve == "nistp256" && ecdsa(curve, point, signature, &signed)?
        }
        _ => false,
    })
}

/// An RSA key signs by either hash; every other kind of key by the algorithm of its own name.
fn fits(kind: &str, algorithm: &str) -> bool {
    match kind {
        "ssh-rsa" => matches!(algorithm, "rsa-sha2-256" | "rsa-sha2-512"),
        _ => kind == algorithm,
    }
}

/// May a key of this kind be used with this algorithm here?
pub fn is_supported(blob: &[u8], algorithm: &str) -> bool {
    let kind = Reader::new(blob).text().unwrap_or_default();
    SIGNATURES.split(',').any(|known| known == algorithm) && fits(kind, algorithm)
}

/// What a security key signs instead of `message` (PROTOCOL.u2f); None where its owner didn't touch it.
fn from_token(
    application: &[u8],
    mut rest: Reader<'_>,
    message: &[u8],
) -> Result<Option<Vec<u8>>, Malformed> {
    const TOUCHED: u8 = 1;
    let (flags, counter) = (rest.u8()?, rest.u32()?);
    rest.end()?;
    let mut signed = sha256(&[application]).to_vec();
    signed.put_u8(flags);
    signed.put_u32(counter);
    signed.put_raw(&sha256(&[message]));
    Ok((flags & TOUCHED != 0).then_some(signed))
}

/// RFC 5656 §3.1.2: the signature is two numbers; ring takes them at their full width.
fn ecdsa(curve: &str, point: &[u8], signature: &[u8], message: &[u8]) -> Result<bool, Malformed> {
    let (width, algorithm): (usize, &'static dyn signature::VerificationAlgorithm) = match curve {
        "nistp256" => (32, &ECDSA_P256_SHA256_FIXED),
        "nistp384" => (48, &ECDSA_P384_SHA384_FIXED),
        _ => return Ok(false),
    };
    let mut numbers = Reader::new(signature);
    let mut fixed = vec![0; 2 * width];
    for half in fixed.chunks_mut(width) {
        let number = numbers.mpint()?;
        if number.len() > width {
            return Ok(false);
        }
        half[width - number.len()..].copy_from_slice(number);
    }
    numbers.end()?;
    Ok(is_valid(algorithm, point, &fixed, message))
}

fn is_valid(
    algorithm: &'static dyn signature::VerificationAlgorithm,
    key: &[u8],
    signature: &[u8],
    message: &[u8],
) -> bool {
    UnparsedPublicKey::new(algorithm, key)
        .verify(message, signature)
        .is_ok()
}

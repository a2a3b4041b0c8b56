//! A client that says what it is told to, also what no honest one would.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use kohakuriver_sshd::crypto::{Cipher, Direction, Opener, Sealer, Secret, sha256};
use kohakuriver_sshd::keys::{HostKey, verify};
use kohakuriver_sshd::wire::{Put, Reader};
use ring::agreement::{EphemeralPrivateKey, UnparsedPublicKey, X25519, agree_ephemeral};
use ring::rand::SystemRandom;

pub const DISCONNECT: u8 = 1;
pub const KEXINIT: u8 = 20;
pub const NEWKEYS: u8 = 21;
pub const ECDH_INIT: u8 = 30;

const VERSION: &[u8] = b"SSH-2.0-test";
/// A server that says nothing fails the test, instead of holding it up for ever.
const PATIENCE: Duration = Duration::from_secs(60);
pub const CURVE: &str = "curve25519-sha256";
pub const STRICT: &str = "curve25519-sha256,kex-strict-c-v00@openssh.com";

/// One connection, in the clear at first.
pub struct Client {
    stream: TcpStream,
    input: Vec<u8>,
    opener: Opener,
    sealer: Sealer,
    pub sealed: u32,
    received: u32,
    server_version: Vec<u8>,
    pub session: Vec<u8>,
}

/// Begins a message.
pub fn message(number: u8) -> Vec<u8> {
    vec![number]
}

impl Client {
    pub fn connect(address: SocketAddr) -> Self {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(&[VERSION, b"\r\n"].concat()).unwrap();
        let mut client = Self {
            stream,
            input: Vec::new(),
            opener: Opener::clear(),
            sealer: Sealer::clear(),
            sealed: 0,
            received: 0,
            server_version: Vec::new(),
            session: Vec::new(),
        };
        let end = loop {
            if let Some(end) = client.input.windows(2).position(|pair| pair == b"\r\n") {
                break end;
            }
            assert!(client.fill());
        };
        client.server_version = client.input.drain(..end + 2).take(end).collect();
        client
    }

    /// One with keys, that has logged in.
    pub fn logged_in(address: SocketAddr, key: &HostKey) -> Self {
        let mut client = Self::connect(address);
        client.exchange(STRICT);
        client.log_in(key);
        client
    }

    fn fill(&mut self) -> bool {
        let mut space = [0; 64 * 1024];
        match self.stream.read(&mut space) {
            Ok(count @ 1..) => {
                self.input.extend_from_slice(&space[..count]);
                true
            }
            _ => false,
        }
    }

    /// Bytes as they are. The server may have closed already, which what it said tells.
    pub fn send_raw(&mut self, bytes: &[u8]) {
        let _ = self.stream.write_all(bytes);
    }

    pub fn send(&mut self, payload: &[u8]) {
        let padding = self.sealer.padding(payload.len());
        let length = 1 + payload.len() + padding;
        let mut packet = Vec::new();
        packet.put_u32(length as u32);
        packet.put_u8(padding as u8);
        packet.put_raw(payload);
        packet.resize(4 + length + self.sealer.tag(), 0);
        self.sealer.seal(self.sealed, &mut packet);
        self.sealed = self.sealed.wrapping_add(1);
        self.send_raw(&packet);
    }

    /// The next message of the server; None at the end.
    pub fn receive(&mut self) -> Option<Vec<u8>> {
        while self.input.len() < 4 {
            if !self.fill() {
                return None;
            }
        }
        let head = self.input[..4].try_into().unwrap();
        let total = 4 + self.opener.length(self.received, head) as usize + self.opener.tag();
        while self.input.len() < total {
            if !self.fill() {
                return None;
            }
        }
        let mut packet: Vec<u8> = self.input.drain(..total).collect();
        self.opener.open(self.received, &mut packet).unwrap();
        self.received += 1;
        let end = total - self.opener.tag() - packet[4] as usize;
        Some(packet[5..end].to_vec())
    }

    /// The next message with one of these numbers; None at the end.
    pub fn receive_one_of(&mut self, numbers: &[u8]) -> Option<Vec<u8>> {
        loop {
            let message = self.receive()?;
            if numbers.contains(&message[0]) {
                return Some(message);
            }
        }
    }

    /// Why the server ended the connection: its sentence. Panics where it did not.
    pub fn farewell(&mut self) -> String {
        let message = self
            .receive_one_of(&[DISCONNECT])
            .expect("a disconnect with its reason");
        let mut reader = Reader::new(&message[5..]);
        reader.text().unwrap().to_owned()
    }

    pub fn kexinit(exchanges: &str, follows: bool) -> Vec<u8> {
        let mut init = message(KEXINIT);
        init.put_raw(&[7; 16]);
        let cipher = "chacha20-poly1305@openssh.com";
        for list in [
            exchanges,
            "ssh-ed25519",
            cipher,
            cipher,
            "",
            "",
            "none",
            "none",
            "",
            "",
        ] {
            init.put_string(list.as_bytes());
        }
        init.put_bool(follows);
        init.put_u32(0);
        init
    }

    /// A whole exchange of keys. Sequence numbers begin anew where `exchanges` says that they do.
    pub fn exchange(&mut self, exchanges: &str) {
        let init = Self::kexinit(exchanges, false);
        self.send(&init);
        self.finish_exchange(init, exchanges.contains("strict"));
    }

    /// What follows a KEXINIT that was sent.
    pub fn finish_exchange(&mut self, init: Vec<u8>, strict: bool) {
        let their_init = self.receive_one_of(&[KEXINIT]).expect("their KEXINIT");
        let private = EphemeralPrivateKey::generate(&X25519, &SystemRandom::new()).unwrap();
        let public = private.compute_public_key().unwrap();
        let mut share = message(ECDH_INIT);
        share.put_string(public.as_ref());
        self.send(&share);
        let reply = self.receive_one_of(&[31]).expect("a reply");
        let mut reader = Reader::new(&reply[1..]);
        let (host_key, answer, signature) = (
            reader.string().unwrap(),
            reader.string().unwrap(),
            reader.string().unwrap(),
        );
        let answering = UnparsedPublicKey::new(&X25519, answer);
        let secret = agree_ephemeral(private, &answering, Secret::number).unwrap();
        let mut hashed = Vec::new();
        for part in [
            VERSION,
            &self.server_version,
            &init,
            &their_init,
            host_key,
            public.as_ref(),
            answer,
        ] {
            hashed.put_string(part);
        }
        hashed.put_raw(secret.encoded());
        let hash = sha256(&[&hashed]);
        assert!(verify("ssh-ed25519", host_key, signature, &hash));
        if self.session.is_empty() {
            self.session = hash.to_vec();
        }
        self.send(&[NEWKEYS]);
        let session = self.session.clone();
        self.sealer = secret.sealer(Cipher::ChaCha20, &hash, &session, Direction::ToServer);
        assert_eq!(self.receive(), Some(vec![NEWKEYS]));
        self.opener = secret.opener(Cipher::ChaCha20, &hash, &session, Direction::ToClient);
        if strict {
            (self.sealed, self.received) = (0, 0);
        }
    }

    pub fn ask_for_service(&mut self, name: &str) {
        let mut request = message(5);
        request.put_string(name.as_bytes());
        self.send(&request);
    }

    /// A request to log in up to its key, which is what a signature covers behind the session.
    pub fn request(user: &str, algorithm: &str, blob: &[u8], signed: bool) -> Vec<u8> {
        let mut request = message(50);
        for part in [user.as_bytes(), b"ssh-connection", b"publickey"] {
            request.put_string(part);
        }
        request.put_bool(signed);
        request.put_string(algorithm.as_bytes());
        request.put_string(blob);
        request
    }

    /// A request with the signature of `key` under this session.
    pub fn signed_request(&self, key: &HostKey, session: &[u8]) -> Vec<u8> {
        let mut request = Self::request("root", "ssh-ed25519", key.public(), true);
        let mut covered = Vec::new();
        covered.put_string(session);
        covered.put_raw(&request);
        request.put_string(&key.sign(&covered));
        request
    }

    pub fn log_in(&mut self, key: &HostKey) {
        self.ask_for_service("ssh-userauth");
        let request = self.signed_request(key, &self.session.clone());
        self.send(&request);
        let answer = self.receive_one_of(&[51, 52, DISCONNECT]);
        assert_eq!(answer, Some(vec![52]));
    }

    /// Asks for a channel; what follows `kind`, the numbers and `details` is the answer's business.
    pub fn open(&mut self, kind: &str, number: u32, details: &[u8]) {
        let mut open = message(90);
        open.put_string(kind.as_bytes());
        for value in [number, 1 << 20, 32 * 1024] {
            open.put_u32(value);
        }
        open.put_raw(details);
        self.send(&open);
    }

    /// Does the server still answer?
    pub fn is_alive(&mut self) -> bool {
        let mut ping = message(192);
        ping.put_string(b"still there");
        self.send(&ping);
        self.receive_one_of(&[193]).is_some()
    }
}

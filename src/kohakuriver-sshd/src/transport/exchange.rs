//! The exchange of keys (RFC 4253 §7, RFC 5656 §4): what both sides have, the hash that is signed, and the new keys.

use std::ops::Range;

use super::{Fatal, Transport, VERSION, number, protocol_error, reason};
use crate::algorithms::Algorithms;
use crate::crypto::{Cipher, Direction, Exchange, Mac, random, sha256};
use crate::keys::{HostKey, SIGNATURES};
use crate::wire::{Malformed, Put, Reader};

/// Stands among the exchanges and is none: sequence numbers begin anew with each key, and nothing else may come between.
const STRICT_SERVER: &str = "kex-strict-s-v00@openssh.com";
const STRICT_CLIENT: &str = "kex-strict-c-v00@openssh.com";
const EXT_INFO_CLIENT: &str = "ext-info-c";

/// What the two KEXINIT messages agree on.
pub(super) struct Agreed {
    exchange: Exchange,
    /// The name of the host key that the client wants.
    host_key: String,
    inbound: Cipher,
    outbound: Cipher,
    peer_init: Vec<u8>,
    /// The peer sent a first message of an exchange that wasn't agreed on.
    pub(super) wrong_guess: bool,
    /// The client keeps to the strict exchange.
    strict: bool,
}

impl Transport {
    pub(super) fn begin_exchange(&mut self) {
        let mut init = vec![number::KEXINIT];
        init.put_raw(&random::<16>());
        let Algorithms {
            exchanges,
            ciphers,
            macs,
        } = self.algorithms;
        let exchanges = format!("{exchanges},{STRICT_SERVER}");
        let host_keys = self.host_keys.names();
        for list in [
            exchanges.as_str(),
            &host_keys,
            ciphers,
            ciphers,
            macs,
            macs,
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

    pub(super) fn peer_init(&mut self, range: Range<usize>) -> Result<(), Fatal> {
        if self.agreed.is_some() || self.next_opener.is_some() {
            return Err(protocol_error("keys are being exchanged already"));
        }
        if self.own_init.is_none() {
            self.begin_exchange();
        }
        let init = self.input[range].to_vec();
        let first = self.session.is_none();
        let agreed = agree(init, &self.host_keys.names(), self.algorithms)?;
        if first {
            self.strict = agreed.strict;
            if self.strict && self.received != 1 {
                return Err(protocol_error("the keys have to be exchanged first"));
            }
        }
        self.agreed = Some(agreed);
        Ok(())
    }

    pub(super) fn ecdh_init(&mut self, range: Range<usize>) -> Result<(), Fatal> {
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
        let host_keys = self.host_keys.clone();
        let host_key = host_keys.named(&agreed.host_key).ok_or(Malformed)?;
        let shared = [host_key.public(), &share, &answer];
        let mut hashed = self.hashed(&agreed.peer_init, &own_init, shared);
        hashed.put_raw(secret.encoded());
        let hash = sha256(&[&hashed]);
        self.prove(host_key, &hash, &answer);
        let first = self.session.is_none();
        let session = *self.session.get_or_insert(hash);
        self.sealer = secret.sealer(agreed.outbound, &hash, &session, Direction::ToClient);
        let opener = secret.opener(agreed.inbound, &hash, &session, Direction::ToServer);
        self.next_opener = Some(opener);
        if self.strict {
            self.sealed = 0;
        }
        if first && offers(names(&agreed.peer_init, 0)?, EXT_INFO_CLIENT) {
            self.send_ext_info();
        }
        for message in std::mem::take(&mut self.held) {
            self.send(message[0], |out| out.put_raw(&message[1..]));
        }
        Ok(())
    }

    /// What both sides hash, up to the secret (RFC 5656 §4).
    fn hashed(&self, peer_init: &[u8], own_init: &[u8], shared: [&[u8]; 3]) -> Vec<u8> {
        let peer_version = self.peer_version.as_deref();
        let peer_version = peer_version.expect("the version came first");
        let inits = [peer_version, VERSION.as_bytes(), peer_init, own_init];
        let mut hashed = Vec::new();
        for part in inits.into_iter().chain(shared) {
            hashed.put_string(part);
        }
        hashed
    }

    /// Signs what was hashed. The last packet under the old keys follows.
    fn prove(&mut self, host_key: &HostKey, hash: &[u8; 32], answer: &[u8]) {
        let signature = host_key.sign(hash);
        self.send(number::ECDH_REPLY, |message| {
            message.put_string(host_key.public());
            message.put_string(answer);
            message.put_string(&signature);
        });
        self.send(number::NEWKEYS, |_| {});
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

    pub(super) fn new_keys(&mut self) -> Result<(), Fatal> {
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

/// The list at `position` of a KEXINIT.
fn names(init: &[u8], position: usize) -> Result<&str, Malformed> {
    let mut reader = Reader::new(init);
    reader.take(17)?;
    for _ in 0..position {
        reader.string()?;
    }
    reader.text()
}

fn offers(names: &str, name: &str) -> bool {
    names.split(',').any(|each| each == name)
}

/// RFC 4253 §7.1: of each list, the client's first that the server has too.
fn agree(init: Vec<u8>, host_keys: &str, ours: &Algorithms) -> Result<Agreed, Fatal> {
    let choose = |position: usize, ours: &str, what: &str| -> Result<String, Fatal> {
        let theirs = names(&init, position)?;
        let common = theirs.split(',').find(|name| offers(ours, name));
        common.map(str::to_owned).ok_or_else(|| {
            let sentence = format!("no {what} in common; this server has {ours}");
            Fatal::Ours(reason::KEY_EXCHANGE_FAILED, sentence)
        })
    };
    let exchange = choose(0, ours.exchanges, "key exchange")?;
    let host_key = choose(1, host_keys, "kind of host key")?;
    let cipher = |direction: usize| -> Result<Cipher, Fatal> {
        let name = choose(2 + direction, ours.ciphers, "cipher")?;
        let mac = || choose(4 + direction, ours.macs, "MAC").map(|name| Mac::named(&name));
        Ok(Cipher::named(&name, mac)?.ok_or(Malformed)?)
    };
    let (inbound, outbound) = (cipher(0)?, cipher(1)?);
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
    let wrong_guess = reader.bool()?
        && !(is_best(offered, ours.exchanges) && is_best(names(&init, 1)?, host_keys));
    Ok(Agreed {
        strict: offers(offered, STRICT_CLIENT),
        exchange: Exchange::named(&exchange).ok_or(Malformed)?,
        host_key,
        inbound,
        outbound,
        wrong_guess,
        peer_init: init,
    })
}

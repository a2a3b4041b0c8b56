//! What is offered in an exchange of keys: each list has the best first (RFC 4253 §7.1).

use std::str::FromStr;

/// One choice of them.
#[derive(Debug, PartialEq, Eq)]
pub struct Algorithms {
    /// Exchanges of keys.
    pub exchanges: &'static str,
    /// Ciphers, for both directions.
    pub ciphers: &'static str,
    /// For ciphers that don't prove their packets themselves. Some clients want a name all the same.
    pub macs: &'static str,
}

/// For clients of the last ten years, and those whom FIPS 140 leaves little.
pub const ALL: Algorithms = Algorithms {
    exchanges: "mlkem768x25519-sha256,curve25519-sha256,curve25519-sha256@libssh.org,ecdh-sha2-nistp256",
    ciphers: "aes256-gcm@openssh.com,aes128-gcm@openssh.com,chacha20-poly1305@openssh.com,\
              aes256-ctr,aes128-ctr",
    macs: "hmac-sha2-256-etm@openssh.com,hmac-sha2-512-etm@openssh.com,hmac-sha2-256,hmac-sha2-512",
};

/// No checker warns of these, and whoever records a session now can't read it with a quantum computer later.
pub const NEWEST: Algorithms = Algorithms {
    exchanges: "mlkem768x25519-sha256",
    ciphers: "aes256-gcm@openssh.com,aes128-gcm@openssh.com,chacha20-poly1305@openssh.com",
    macs: "hmac-sha2-256-etm@openssh.com,hmac-sha2-512-etm@openssh.com",
};

impl FromStr for &'static Algorithms {
    type Err = ();

    fn from_str(name: &str) -> Result<Self, ()> {
        match name {
            "all" => Ok(&ALL),
            "newest" => Ok(&NEWEST),
            _ => Err(()),
        }
    }
}

//! Tunnel messages (docs/protocol.md §1 and §3): an 8-byte big-endian header, then the payload.

/// Length of a message's header, in bytes.
pub const HEADER: usize = 8;
/// The longest message that may be sent, header included (§3 rule 8).
pub const MAX_SENT: usize = 1 << 20;
/// The longest message that is accepted, header included (§3 rule 8).
pub const MAX_RECEIVED: u64 = 16 << 20;
/// What an opener may send of a v2 stream before it learns its limit (§3 rule 2).
pub const EARLY_DATA: u64 = 64 << 10;
/// The subprotocol that asks for, and grants, version 2 (§2).
pub const SUBPROTOCOL_V2: &str = "kohakuriver.tunnel.v2";

/// `Proto` of a TCP stream.
pub const TCP: u8 = 0x00;
/// `Proto` of a UDP stream.
pub const UDP: u8 = 0x01;

/// The message types of §3. A plain byte, as a peer may send any.
#[allow(missing_docs)]
pub mod kind {
    pub const CONNECT: u8 = 0x01;
    pub const CONNECTED: u8 = 0x02;
    pub const DATA: u8 = 0x03;
    pub const CLOSE: u8 = 0x04;
    pub const ERROR: u8 = 0x05;
    pub const PING: u8 = 0x06;
    pub const PONG: u8 = 0x07;
    pub const WINDOW: u8 = 0x08;
    pub const EOF: u8 = 0x09;
}

/// WebSocket close codes that this endpoint sends or acts upon.
#[allow(missing_docs)]
pub mod close {
    pub const NORMAL: u16 = 1000;
    pub const GOING_AWAY: u16 = 1001;
    pub const PROTOCOL: u16 = 1002;
    pub const UNSUPPORTED: u16 = 1003;
    pub const TOO_BIG: u16 = 1009;
    /// Another tunnel client took this container's place (§4).
    pub const REPLACED: u16 = 4000;
}

/// The header of every message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Message type, see [`kind`].
    pub kind: u8,
    /// [`TCP`] or [`UDP`].
    pub proto: u8,
    /// ClientID: the stream, or 0 for the session itself.
    pub id: u32,
    /// Target port in CONNECT, 0 elsewhere.
    pub port: u16,
}

impl Header {
    /// A header of any message but CONNECT, whose port is 0.
    pub const fn new(kind: u8, proto: u8, id: u32) -> Self {
        Self {
            kind,
            proto,
            id,
            port: 0,
        }
    }

    /// The header's bytes on the wire.
    pub fn pack(&self) -> [u8; HEADER] {
        let mut bytes = [self.kind, self.proto, 0, 0, 0, 0, 0, 0];
        bytes[2..6].copy_from_slice(&self.id.to_be_bytes());
        bytes[6..8].copy_from_slice(&self.port.to_be_bytes());
        bytes
    }

    /// Reads what [`Header::pack`] wrote; any 8 bytes are a header.
    pub fn unpack(bytes: [u8; HEADER]) -> Self {
        let [kind, proto, a, b, c, d, e, f] = bytes;
        Self {
            kind,
            proto,
            id: u32::from_be_bytes([a, b, c, d]),
            port: u16::from_be_bytes([e, f]),
        }
    }
}

/// The `u64` of a WINDOW, CONNECT or CONNECTED; `None` unless the payload is exactly that.
pub fn limit(payload: &[u8]) -> Option<u64> {
    payload.try_into().ok().map(u64::from_be_bytes)
}

/// Why a link has to be closed: the WebSocket close code and the reason to send with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Violation {
    /// WebSocket close code.
    pub code: u16,
    /// What the peer did.
    pub reason: &'static str,
}

impl Violation {
    /// A breach of the protocol, close code 1002.
    pub const fn protocol(reason: &'static str) -> Self {
        Self {
            code: close::PROTOCOL,
            reason,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_has_its_fields_where_the_specification_puts_them() {
        let header = Header {
            kind: kind::CONNECT,
            proto: UDP,
            id: 0x0102_0304,
            port: 0x1f90,
        };
        assert_eq!(header.pack(), [1, 1, 1, 2, 3, 4, 0x1f, 0x90]);
        assert_eq!(Header::unpack(header.pack()), header);
    }

    #[test]
    fn a_limit_is_eight_bytes_and_nothing_else() {
        assert_eq!(limit(&[0, 0, 0, 0, 0, 1, 0, 0]), Some(65_536));
        assert_eq!(limit(&[]), None);
        assert_eq!(limit(&[0; 9]), None);
    }
}

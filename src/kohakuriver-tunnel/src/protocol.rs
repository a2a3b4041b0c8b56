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
/// Which tunnel client it is that dials, whatever token it shows.
pub const CLIENT_HEADER: &str = "KohakuRiver-Client";
/// The payload of a runner's PING of the session: a new token lies where ours was.
pub const NEW_TOKEN: &[u8] = b"tok1";
/// The payload of a host's PING that ends an agent (§4).
pub const END_TASK: &[u8] = b"end1";
/// In a host's answer to an agent: its task's id and name.
pub const TASK_HEADER: &str = "KohakuRiver-Task";

/// `Proto` of a TCP stream.
pub const TCP: u8 = 0x00;
/// `Proto` of a UDP stream.
pub const UDP: u8 = 0x01;

/// `Proto` of a terminal's CONNECT and RESUME; its other messages are those of a TCP stream.
pub const TERMINAL: u8 = 0x02;

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
    pub const RESUME: u8 = 0x0a;
    pub const RESUMED: u8 = 0x0b;
    pub const ACK: u8 = 0x0c;
    pub const DETACH: u8 = 0x0d;
    pub const REVOKE: u8 = 0x10;
    pub const PORTS: u8 = 0x11;
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

/// What names a kept stream: its opener's 12 bytes, then a number.
pub type StreamKey = [u8; 16];
/// What all keys of one opener begin with.
pub type Opener = [u8; 12];
/// Who opened a stream, in the runner's words; zeros where it said nothing.
pub type Mark = [u8; 16];
/// The total of a direction whose end-of-file has not been sent.
pub const UNKNOWN_TOTAL: u64 = u64::MAX;
/// For how many seconds a detached stream is held at most.
pub const LONGEST_HOLD: u32 = 86_400;

/// CONNECT of a kept stream.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Opening {
    pub limit: u64,
    pub key: StreamKey,
    /// Seconds.
    pub hold: u32,
    pub mark: Mark,
}

/// How long CONNECT of a kept stream is, mark included.
const OPENING: usize = 45;

/// CONNECT of a terminal: that of a kept stream with its mark, and what is to be started.
pub fn starting(payload: &[u8]) -> Option<(Opening, &[u8])> {
    let (opening, start) = payload.split_at_checked(OPENING)?;
    Some((Opening::parse(opening)?, start))
}

impl Opening {
    /// What such a payload holds, with a mark or without; `None` where it is of another length.
    pub fn parse(mut payload: &[u8]) -> Option<Self> {
        let rest = &mut payload;
        let (limit, key, hold) = (number(rest)?, take(rest)?, u32::from_be_bytes(take(rest)?));
        let [_flags] = take(rest)?;
        Some(Self {
            limit,
            key,
            hold: hold.min(LONGEST_HOLD),
            mark: mark(rest)?,
        })
    }
}

/// RESUME of one stream.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Resuming {
    pub key: StreamKey,
    pub epoch: u32,
    pub received: u64,
    pub limit: u64,
    /// [`UNKNOWN_TOTAL`] before the opener's end-of-file.
    pub total: u64,
    pub mark: Mark,
}

impl Resuming {
    /// What such a payload holds, with a mark or without; `None` where it is of another length.
    pub fn parse(mut payload: &[u8]) -> Option<Self> {
        let rest = &mut payload;
        Some(Self {
            key: take(rest)?,
            epoch: u32::from_be_bytes(take(rest)?),
            received: number(rest)?,
            limit: number(rest)?,
            total: number(rest)?,
            mark: mark(rest)?,
        })
    }
}

/// RESUME with ClientID 0: whose streams end but for those of this epoch.
pub fn roll(mut payload: &[u8]) -> Option<(Opener, u32, Mark)> {
    let rest = &mut payload;
    let (opener, epoch) = (take(rest)?, u32::from_be_bytes(take(rest)?));
    Some((opener, epoch, mark(rest)?))
}

/// CONNECTED and WINDOW of a kept stream (limit, received) and its EOF (total, received).
pub fn pair(mut payload: &[u8]) -> Option<[u64; 2]> {
    let pair = [number(&mut payload)?, number(&mut payload)?];
    payload.is_empty().then_some(pair)
}

/// Numbers as they go on the wire.
pub fn pack<const N: usize>(numbers: [u64; N]) -> Vec<u8> {
    numbers.map(u64::to_be_bytes).concat()
}

/// The next bytes, and what is behind them in their place.
pub(crate) fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (head, tail) = rest.split_first_chunk()?;
    *rest = tail;
    Some(*head)
}

fn number(rest: &mut &[u8]) -> Option<u64> {
    take(rest).map(u64::from_be_bytes)
}

fn mark(rest: &[u8]) -> Option<Mark> {
    if rest.is_empty() {
        return Some(Mark::default());
    }
    rest.try_into().ok()
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

    #[test]
    fn a_terminals_start_is_behind_its_mark() {
        let payload = [&[1; 45][..], b"start"].concat();
        let (opening, start) = starting(&payload).unwrap();
        assert_eq!((opening.mark, start), ([1; 16], &b"start"[..]));
        assert_eq!(starting(&payload[..44]), None);
    }

    #[test]
    fn a_mark_is_all_or_nothing_and_zeros_where_there_is_none() {
        let opening = [&7u64.to_be_bytes()[..], &[5; 16], &[0xff; 4], &[0]].concat();
        let parsed = Opening::parse(&opening).unwrap();
        assert_eq!(
            (parsed.limit, parsed.key, parsed.mark),
            (7, [5; 16], [0; 16])
        );
        assert_eq!(parsed.hold, LONGEST_HOLD);
        let marked = [&opening[..], &[9; 16]].concat();
        assert_eq!(Opening::parse(&marked).unwrap().mark, [9; 16]);
        for wrong in [0, 8, 28, 30, 44, 46] {
            assert_eq!(Opening::parse(&vec![1; wrong]), None, "{wrong} bytes");
        }
        for wrong in [0, 12, 43, 45, 61] {
            assert_eq!(Resuming::parse(&vec![1; wrong]), None, "{wrong} bytes");
        }
        assert_eq!(roll(&[1; 32]), Some(([1; 12], 0x0101_0101, [1; 16])));
        assert_eq!(roll(&[1; 16]), Some(([1; 12], 0x0101_0101, [0; 16])));
        assert_eq!(roll(&[1; 28]), None);
    }
}

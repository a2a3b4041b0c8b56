//! What the core asks of sockets. [`event_loop`](crate::event_loop) gives it the system's, unit tests give it
//! their own. Nothing here waits: what can't be done now fails with `WouldBlock`.

use std::io::{self, Read, Write};
use std::net::SocketAddr;

use crate::protocol::Mark;
use crate::streams::Key;

/// Opens sockets towards the container's services.
pub trait Network {
    #[allow(missing_docs)]
    type Tcp: TcpSocket;
    #[allow(missing_docs)]
    type Udp: UdpSocket;

    /// Whether what listens at `to` is offered; a number that stays the same as long as that listens there. Raises a
    /// refusal (see [`crate::offer`]), or `ECONNREFUSED`.
    fn check(&self, udp: bool, to: SocketAddr) -> io::Result<u64>;
    /// Begins to connect; readiness of the socket will be told under `key`.
    fn dial(&self, to: SocketAddr, key: Key) -> io::Result<Self::Tcp>;
    /// A datagram socket that talks to `to` only.
    fn open(&self, to: SocketAddr, key: Key) -> io::Result<Self::Udp>;
    /// Starts a terminal for the user of this mark; `start` is what its CONNECT says (docs/protocol.md §6).
    fn terminal(&self, start: &[u8], mark: &Mark, key: Key) -> io::Result<Self::Tcp>;
    /// The terminals of this user that outlive their streams end.
    fn revoke(&self, mark: &Mark);
    /// Begins to look which ports listen, as a PORTS says; not while a look is under way.
    fn look(&self, question: &[u8]);
    /// What a look found, once: the payload of the answer.
    fn looked(&self) -> Option<Vec<u8>>;
    /// Where else than on 127.0.0.1 and ::1 something listens on `port` (TCP), or takes datagrams.
    fn listeners(&self, udp: bool, port: u16) -> Vec<SocketAddr>;
}

/// A TCP connection.
pub trait TcpSocket: Read + Write {
    /// Whether the connection stands by now. Raises why it failed.
    fn dialled(&mut self) -> io::Result<bool>;
    /// Tells the peer that nothing more is written.
    fn finish_writing(&mut self) -> io::Result<()>;
    /// Makes the coming end of the connection a reset.
    fn reset_on_close(&mut self);
    /// Tells whether a link has the stream, from now on.
    fn attend(&mut self, yes: bool);
}

/// A datagram socket with one peer.
pub trait UdpSocket {
    #[allow(missing_docs)]
    fn send(&mut self, datagram: &[u8]) -> io::Result<usize>;
    #[allow(missing_docs)]
    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<usize>;
}

/// What a socket has become ready for since the last time.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ready {
    #[allow(missing_docs)]
    pub readable: bool,
    #[allow(missing_docs)]
    pub writable: bool,
    /// Its end-of-file or an error is behind what can be read.
    pub closed: bool,
}

//! A UDP stream: one local source address of the user, one connected socket here.

use std::io;
use std::net::Ipv4Addr;
use std::time::Instant;

use crate::context::{Context, Fate};
use crate::net::{Network, UdpSocket};
use crate::protocol::{Header, UDP, kind};
use crate::streams::Key;

/// While the link is blocked the socket isn't read: the kernel's bounded queue is the stream's.
pub struct Udp<S> {
    key: Key,
    id: u32,
    sock: S,
    readable: bool,
    deadline: Instant,
}

impl<S: UdpSocket> Udp<S> {
    /// Opens the stream; there is nothing to wait for.
    pub fn open(
        key: Key,
        header: Header,
        context: &mut Context,
        network: &impl Network<Udp = S>,
    ) -> io::Result<Self> {
        let sock = network.open((Ipv4Addr::LOCALHOST, header.port).into(), key)?;
        context.send(Header::new(kind::CONNECTED, UDP, header.id), &[]);
        let deadline = context.now + context.settings.udp_idle;
        context.set_timer(deadline, key);
        Ok(Self {
            key,
            id: header.id,
            sock,
            readable: false,
            deadline,
        })
    }

    /// The stream's id.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The socket has a datagram, or an error.
    pub fn on_event(&mut self, context: &mut Context) {
        self.readable = true;
        context.schedule(self.key);
    }

    /// One datagram from the user's side.
    pub fn on_datagram(&mut self, datagram: &[u8], context: &mut Context) {
        self.deadline = context.now + context.settings.udp_idle;
        context.counters.bytes_to_container += datagram.len() as u64;
        // A refusal of an earlier datagram is reported in place of sending this one.
        let sent = match self.sock.send(datagram) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                context.counters.udp_refused += 1;
                self.sock.send(datagram)
            }
            result => result,
        };
        if sent.is_err() {
            context.counters.udp_dropped += 1;
        }
    }

    /// One turn as a source: at most one datagram. True if there may be more.
    pub fn pump(&mut self, context: &mut Context) -> io::Result<bool> {
        if !self.readable {
            return Ok(false);
        }
        match self.sock.receive(context.link.payload()) {
            Ok(length) => {
                self.deadline = context.now + context.settings.udp_idle;
                context.counters.bytes_to_user += length as u64;
                context
                    .link
                    .send_payload(Header::new(kind::DATA, UDP, self.id), length)?;
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
            // Nothing listens there (yet): UDP goes on.
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                context.counters.udp_refused += 1;
            }
            Err(_) => self.readable = false,
        }
        Ok(self.readable)
    }

    /// Closes the stream if it has been idle for long enough.
    pub fn on_timer(&mut self, context: &mut Context) -> Fate {
        if self.deadline > context.now {
            context.set_timer(self.deadline, self.key);
            return Fate::Live;
        }
        context.send(Header::new(kind::CLOSE, UDP, self.id), &[]);
        Fate::Over
    }
}

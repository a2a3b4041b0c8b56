//! A UDP stream: one local source address of the user, one connected socket here.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Instant;

use crate::context::{Context, Fate};
use crate::errors;
use crate::net::{Network, UdpSocket};
use crate::protocol::{Header, UDP, kind};
use crate::streams::Key;

/// Datagrams, and bytes of them, that are kept until it is known who takes them.
const KEPT: usize = 16;
const KEPT_BYTES: usize = 128 << 10;

/// While the link is blocked the socket isn't read: the kernel's bounded queue is the stream's.
pub struct Udp<S> {
    key: Key,
    id: u32,
    port: u16,
    sock: S,
    readable: bool,
    deadline: Instant,
    /// Until the service has answered or refused nothing for a while.
    search: Option<Box<Search>>,
}

/// Which of the container's addresses takes the datagrams: each but the last may refuse them.
#[derive(Default)]
struct Search {
    tried: usize,
    /// Behind 127.0.0.1 and ::1; looked up when both refused.
    others: Vec<SocketAddr>,
    /// What was sent so far, for the next address.
    kept: Vec<Vec<u8>>,
    bytes: usize,
}

impl Search {
    /// A socket to the next address that has one.
    fn next<N: Network>(&mut self, port: u16, key: Key, network: &N) -> Option<N::Udp> {
        loop {
            let address = match self.tried {
                0 => (Ipv4Addr::LOCALHOST, port).into(),
                1 => (Ipv6Addr::LOCALHOST, port).into(),
                tried => {
                    if tried == 2 {
                        self.others = network.listeners(true, port);
                    }
                    *self.others.get(tried - 2)?
                }
            };
            self.tried += 1;
            if let Ok(sock) = network.open(address, key) {
                return Some(sock);
            }
        }
    }

    /// Keeps a datagram; false once so many were refused by nobody that there is no need to.
    fn keep(&mut self, datagram: &[u8]) -> bool {
        self.bytes += datagram.len();
        if self.kept.len() == KEPT || self.bytes > KEPT_BYTES {
            return false;
        }
        self.kept.push(datagram.to_vec());
        true
    }
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
        let search = Search {
            tried: 1,
            ..Search::default()
        };
        context.send(Header::new(kind::CONNECTED, UDP, header.id), &[]);
        let deadline = context.now + context.settings.udp_idle;
        context.set_timer(deadline, key);
        Ok(Self {
            key,
            id: header.id,
            port: header.port,
            sock,
            readable: false,
            deadline,
            search: Some(Box::new(search)),
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
    pub fn on_datagram(
        &mut self,
        datagram: &[u8],
        context: &mut Context,
        network: &impl Network<Udp = S>,
    ) -> Fate {
        self.deadline = context.now + context.settings.udp_idle;
        context.counters.bytes_to_container += datagram.len() as u64;
        let mut sent = self.sock.send(datagram);
        // A refusal of an earlier datagram is reported in place of sending this one.
        if is_refusal(&sent) {
            if self.refused(context, network) == Fate::Over {
                context.counters.udp_dropped += 1;
                return Fate::Over;
            }
            sent = self.sock.send(datagram);
        }
        if sent.is_err() && !is_refusal(&sent) {
            context.counters.udp_dropped += 1;
        } else if let Some(search) = &mut self.search
            && !search.keep(datagram)
        {
            self.search = None;
        }
        Fate::Live
    }

    /// One turn as a source: at most one datagram. True if there may be more.
    pub fn pump(
        &mut self,
        context: &mut Context,
        network: &impl Network<Udp = S>,
    ) -> io::Result<(Fate, bool)> {
        if !self.readable {
            return Ok((Fate::Live, false));
        }
        match self.sock.receive(context.link.payload()) {
            Ok(length) => {
                self.search = None;
                self.deadline = context.now + context.settings.udp_idle;
                context.counters.bytes_to_user += length as u64;
                let header = Header::new(kind::DATA, UDP, self.id);
                context.link.send_payload(header, length)?;
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                return Ok((self.refused(context, network), true));
            }
            Err(_) => self.readable = false,
        }
        Ok((Fate::Live, self.readable))
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

    /// Nothing takes datagrams at the address that was tried, or no longer: what is kept goes to the next one. When all
    /// have refused, the user's side is told, and the search begins anew: UDP services come and go.
    fn refused(&mut self, context: &mut Context, network: &impl Network<Udp = S>) -> Fate {
        let mut search = self.search.take().unwrap_or_else(|| {
            context.counters.udp_refused += 1;
            Box::default()
        });
        while let Some(sock) = search.next(self.port, self.key, network) {
            self.sock = sock;
            if !search
                .kept
                .iter()
                .any(|datagram| is_refusal(&self.sock.send(datagram)))
            {
                self.search = Some(search);
                return Fate::Live;
            }
        }
        context.counters.udp_refused += search.kept.len() as u64;
        if context.may_tell_refusal(self.port) {
            let text = errors::nobody_takes_datagrams(self.port);
            context.send(Header::new(kind::ERROR, UDP, self.id), text.as_bytes());
            return Fate::Over;
        }
        let mut search = Box::<Search>::default();
        if let Some(sock) = search.next(self.port, self.key, network) {
            self.sock = sock;
        }
        self.search = Some(search);
        Fate::Live
    }
}

fn is_refusal(sent: &io::Result<usize>) -> bool {
    matches!(sent, Err(error) if error.kind() == io::ErrorKind::ConnectionRefused)
}

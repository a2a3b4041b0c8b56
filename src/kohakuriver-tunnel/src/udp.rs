//! A UDP stream: one local source address of the user, one connected socket here.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use crate::context::{Context, Fate};
use crate::errors;
use crate::kept::Kept;
use crate::net::{Network, UdpSocket};
use crate::offer;
use crate::protocol::{self, Header, Opening, Resuming, UDP, kind};
use crate::registry::Ending;
use crate::streams::Key;

/// Datagrams, and bytes of them, that are kept until it is known who takes them.
const SEARCHED: usize = 16;
const SEARCHED_BYTES: usize = 128 << 10;
/// How often it is made sure that datagrams still go to what they were meant for, where that can be another user's.
const WATCH_EVERY: Duration = Duration::from_secs(1);

/// While the link is blocked the socket isn't read: the kernel's bounded queue is the stream's.
pub struct Udp<S> {
    key: Key,
    /// 0 while no link has the stream.
    id: u32,
    port: u16,
    sock: S,
    readable: bool,
    deadline: Instant,
    /// When the timer fires that sees to it.
    timer: Instant,
    /// Of a stream that outlives its link.
    kept: Option<Box<Kept>>,
    /// Until the service has answered or refused nothing for a while.
    search: Option<Box<Search>>,
    watched: Option<Box<Watched>>,
    /// Refused since anybody answered, and not told yet.
    untold: u64,
    /// When they are to be told: there is a timer for that.
    tell_at: Option<Instant>,
}

/// Which of the container's addresses takes the datagrams: each but the last may refuse them.
#[derive(Default)]
struct Search {
    tried: usize,
    /// Behind 127.0.0.1 and ::1; looked up when both refused.
    others: Vec<SocketAddr>,
    /// What listens at the address, where that matters.
    watched: Option<Box<Watched>>,
    /// What was sent so far, for the next address.
    sent: Vec<Vec<u8>>,
    bytes: usize,
}

/// What takes the datagrams of a stream, where another user's may come in its place.
struct Watched {
    at: SocketAddr,
    listener: u64,
    again: Instant,
}

impl Watched {
    fn is_there(&mut self, now: Instant, network: &impl Network) -> bool {
        if now < self.again {
            return true;
        }
        let there = matches!(network.check(true, self.at), Ok(found) if found == self.listener);
        self.again = if there { now + WATCH_EVERY } else { now };
        there
    }
}

impl Search {
    /// A socket to the next address that has one; why the first has none, where it is the last.
    fn next<N: Network>(
        &mut self,
        port: u16,
        key: Key,
        network: &N,
        now: Instant,
    ) -> io::Result<N::Udp> {
        let mut why = None;
        loop {
            let address = match self.tried {
                0 => (Ipv4Addr::LOCALHOST, port).into(),
                1 => (Ipv6Addr::LOCALHOST, port).into(),
                tried => {
                    if tried == 2 {
                        self.others = network.listeners(true, port);
                    }
                    match self.others.get(tried - 2) {
                        Some(address) => *address,
                        None => return Err(why.unwrap_or(io::ErrorKind::ConnectionRefused.into())),
                    }
                }
            };
            self.tried += 1;
            let opened = network.check(true, address).and_then(|listener| {
                let watched = (listener != 0).then(|| Watched {
                    at: address,
                    listener,
                    again: now + WATCH_EVERY,
                });
                self.watched = watched.map(Box::new);
                network.open(address, key)
            });
            match opened {
                Ok(sock) => return Ok(sock),
                Err(error) if offer::is_refusal(&error) => why = Some(error),
                Err(error) => drop(why.get_or_insert(error)),
            }
        }
    }

    /// Keeps a datagram; false once so many were refused by nobody that there is no need to.
    fn keep(&mut self, datagram: &[u8]) -> bool {
        self.bytes += datagram.len();
        if self.sent.len() == SEARCHED || self.bytes > SEARCHED_BYTES {
            return false;
        }
        self.sent.push(datagram.to_vec());
        true
    }
}

impl<S: UdpSocket> Udp<S> {
    /// Opens the stream; there is nothing to wait for.
    pub fn open(
        key: Key,
        header: Header,
        opening: Option<&Opening>,
        context: &mut Context,
        network: &impl Network<Udp = S>,
    ) -> io::Result<Self> {
        let mut search = Search::default();
        let sock = search.next(header.port, key, network, context.now)?;
        let kept = opening.map(|opening| Box::new(Kept::new(opening, key, context)));
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
            timer: deadline,
            kept,
            watched: search.watched.take(),
            search: Some(Box::new(search)),
            untold: 0,
            tell_at: None,
        })
    }

    /// The stream's id, if it has one.
    pub fn id(&self) -> Option<u32> {
        (self.id != 0).then_some(self.id)
    }

    /// What the stream has if it outlives its link.
    pub fn kept(&mut self) -> Option<&mut Kept> {
        self.kept.as_deref_mut()
    }

    /// The port that it was opened with.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// RESUME: under `id` from now on, on the same socket. The epoch is higher than the last.
    pub fn resume(&mut self, id: u32, resuming: &Resuming, context: &mut Context) {
        self.id = id;
        if let Some(kept) = &mut self.kept {
            kept.resume(resuming.epoch, context);
        }
        self.deadline = context.now + context.settings.udp_idle;
        let header = Header::new(kind::RESUMED, UDP, id);
        context.send(header, &protocol::pack([0, 0, 0]));
        context.schedule(self.key);
    }

    /// No link has the stream any more. What the service sends meanwhile waits in the socket, as far as there is room.
    pub fn detach(&mut self, hold: u32, context: &mut Context) {
        self.id = 0;
        if let Some(kept) = &mut self.kept {
            kept.detach(self.key, hold, 0, 0, context);
        }
    }

    /// Ends the stream with this message.
    pub fn end(&mut self, kind: u8, text: &str, context: &mut Context) -> Fate {
        if self.id != 0 {
            context.send(Header::new(kind, UDP, self.id), text.as_bytes());
        }
        let ending = match kind {
            kind::ERROR => Ending::error(text),
            _ => Ending::WELL,
        };
        self.bury(ending, context);
        Fate::Over
    }

    /// Notes how the stream ended.
    pub fn bury(&mut self, ending: Ending, context: &mut Context) {
        if let Some(mut kept) = self.kept.take() {
            kept.bury(self.port, UDP, ending, context);
        }
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
        let mut sent = self.send(datagram, context.now, network);
        // A refusal of an earlier datagram is reported in place of sending this one.
        if is_refusal(&sent) {
            if self.refused(context, network) == Fate::Over {
                context.counters.udp_dropped += 1;
                return Fate::Over;
            }
            sent = self.send(datagram, context.now, network);
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

    /// To what listens at the address, and nothing that has come in its place.
    fn send(
        &mut self,
        datagram: &[u8],
        now: Instant,
        network: &impl Network<Udp = S>,
    ) -> io::Result<usize> {
        let watched = self.watched.as_mut();
        if watched.is_none_or(|watched| watched.is_there(now, network)) {
            self.sock.send(datagram)
        } else {
            Err(io::ErrorKind::ConnectionRefused.into())
        }
    }

    /// One turn as a source: at most one datagram. True if there may be more.
    pub fn pump(
        &mut self,
        context: &mut Context,
        network: &impl Network<Udp = S>,
    ) -> io::Result<(Fate, bool)> {
        if !self.readable || self.id == 0 {
            return Ok((Fate::Live, false));
        }
        match self.sock.receive(context.link.payload()) {
            Ok(length) => {
                self.search = None;
                self.untold = 0;
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

    /// Tells what was refused, or closes the stream if it has been idle, or without a link, for long enough.
    pub fn on_timer(&mut self, context: &mut Context) -> Fate {
        let key = self.key;
        if self
            .kept()
            .is_some_and(|kept| kept.is_forsaken(key, context))
        {
            return self.end(kind::CLOSE, "", context);
        }
        if self.tell_at.is_some_and(|due| due <= context.now) {
            self.tell_at = None;
            return match self.untold {
                0 => Fate::Live,
                _ => self.tell(context),
            };
        }
        if self.timer > context.now {
            return Fate::Live; // another one fired
        }
        if self.id == 0 {
            self.deadline = context.now + context.settings.udp_idle;
        }
        if self.deadline > context.now {
            self.timer = self.deadline;
            context.set_timer(self.timer, self.key);
            return Fate::Live;
        }
        self.end(kind::CLOSE, "", context)
    }

    /// Nothing takes datagrams at the address that was tried, or no longer: what is kept goes to the next one. When all
    /// have refused, the user's side is told, and the search begins anew: UDP services come and go.
    fn refused(&mut self, context: &mut Context, network: &impl Network<Udp = S>) -> Fate {
        let mut search = self.search.take().unwrap_or_else(|| {
            context.counters.udp_refused += 1;
            Box::default()
        });
        while let Ok(sock) = search.next(self.port, self.key, network, context.now) {
            (self.sock, self.watched) = (sock, search.watched.take());
            if !search
                .sent
                .iter()
                .any(|datagram| is_refusal(&self.sock.send(datagram)))
            {
                self.search = Some(search);
                return Fate::Live;
            }
        }
        let refused = search.sent.len() as u64;
        context.counters.udp_refused += refused;
        self.untold += refused;
        let due = context.refusal_due(self.port);
        if due <= context.now {
            return self.tell(context);
        }
        if self.tell_at.is_none() {
            self.tell_at = Some(due);
            context.set_timer(due, self.key);
        }
        let mut search = Box::<Search>::default();
        if let Ok(sock) = search.next(self.port, self.key, network, context.now) {
            (self.sock, self.watched) = (sock, search.watched.take());
        }
        self.search = Some(search);
        Fate::Live
    }

    /// Tells the user's end that nothing takes its datagrams; it opens another stream for the next one.
    fn tell(&mut self, context: &mut Context) -> Fate {
        context.refusal_told(self.port);
        let text = errors::nobody_takes_datagrams(self.port);
        self.end(kind::ERROR, &text, context)
    }
}

fn is_refusal(sent: &io::Result<usize>) -> bool {
    matches!(sent, Err(error) if error.kind() == io::ErrorKind::ConnectionRefused)
}

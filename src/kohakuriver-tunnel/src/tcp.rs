//! A TCP stream: one connection to a service in the container, and the state of both directions.

mod kept;

use std::io::{self, IoSlice};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use crate::context::{Context, Fate};
use crate::flow::ReceiveWindow;
use crate::net::{Network, Ready, TcpSocket};
use crate::offer;
use crate::protocol::{self, Header, Opening, TCP, TERMINAL, Violation, kind};
use crate::queue::Queue;
use crate::streams::Key;
use kept::KeptTcp;

const DIAL_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the last bytes of a closed stream wait for a service that doesn't read.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(60);
/// A v1 stream that holds more than this stops the reading of the whole link (§3 rule 6).
const V1_HOLD: usize = 1 << 20;

/// Which direction "in" and "out" are: *in* is towards the service, *out* is towards the user.
pub struct Tcp<S> {
    key: Key,
    /// 0 while no link has the stream.
    id: u32,
    port: u16,
    /// What it was opened as.
    proto: u8,
    sock: S,
    /// Until the service is connected.
    dial: Option<Box<Dialling>>,
    queue: Queue,
    /// Windows, or none under v1 rules.
    receiving: Option<ReceiveWindow>,
    /// Of a stream that outlives its link.
    kept: Option<Box<KeptTcp>>,
    /// Over the present link, or before it if it went on from there.
    sent: u64,
    limit: u64,
    readable: bool,
    writable: bool,
    /// The service's end-of-file or reset is behind what can be read, so read on after a short read.
    read_closed: bool,
    eof_in: bool,
    in_done: bool,
    out_done: bool,
    /// CLOSE has come: the id is no longer ours, only queued bytes are still delivered.
    closed: bool,
    /// Writing failed; what the service sent before is still read, then this is reported.
    failed: Option<io::Error>,
    /// Holds the link's reading up (v1).
    holding: bool,
    /// Counted among the streams whose service has not taken everything.
    waiting: bool,
    deadline: Option<Instant>,
}

/// The rules that a stream is opened under.
pub enum Rules {
    /// Version 1's.
    V1,
    /// Version 2's, with the opener's first limit.
    V2(u64),
    /// Version 2's, and the stream outlives its link.
    Kept(Opening),
}

/// The addresses where a service may listen, and how far they have been tried.
struct Dialling {
    port: u16,
    tried: usize,
    /// Behind 127.0.0.1 and ::1; looked up when neither took the connection.
    others: Vec<SocketAddr>,
    /// What was dialled, and what listens there as far as that matters.
    at: Option<(SocketAddr, u64)>,
    /// The first answer tells most: where there is no IPv6, others say only that. A refusal of ours tells more.
    first: Option<io::Error>,
}

impl Dialling {
    fn new(port: u16) -> Self {
        Self {
            port,
            tried: 0,
            others: Vec::new(),
            at: None,
            first: None,
        }
    }

    /// Begins to connect to the next address that can be dialled; an error when none is left.
    fn next<N: Network>(&mut self, key: Key, network: &N) -> io::Result<N::Tcp> {
        while let Some(address) = self.address(network) {
            self.tried += 1;
            let dialled = network.check(false, address).and_then(|listener| {
                self.at = Some((address, listener));
                network.dial(address, key)
            });
            match dialled {
                Ok(sock) => return Ok(sock),
                Err(error) => self.failed(error)?,
            }
        }
        Err(self
            .first
            .take()
            .unwrap_or_else(|| io::ErrorKind::ConnectionRefused.into()))
    }

    /// Goes on after an answer that says that nothing listens at an address.
    fn failed(&mut self, error: io::Error) -> io::Result<()> {
        let elsewhere = matches!(
            error.raw_os_error(),
            Some(
                libc::ECONNREFUSED
                    | libc::EADDRNOTAVAIL
                    | libc::ENETUNREACH
                    | libc::EHOSTUNREACH
                    | libc::EAFNOSUPPORT
            )
        );
        if offer::is_refusal(&error) {
            self.first = Some(error);
            return Ok(());
        }
        if !elsewhere {
            return Err(error);
        }
        self.first.get_or_insert(error);
        Ok(())
    }

    /// The connection is of what was to be dialled: another user's may have come in its place meanwhile.
    fn is_of_the_same(&self, network: &impl Network) -> io::Result<()> {
        match self.at {
            Some((address, listener)) if network.check(false, address)? != listener => {
                Err(io::Error::from_raw_os_error(libc::ECONNRESET))
            }
            _ => Ok(()),
        }
    }

    fn address(&mut self, network: &impl Network) -> Option<SocketAddr> {
        match self.tried {
            0 => Some((Ipv4Addr::LOCALHOST, self.port).into()),
            1 => Some((Ipv6Addr::LOCALHOST, self.port).into()),
            tried => {
                if tried == 2 {
                    self.others = network.listeners(false, self.port);
                }
                self.others.get(tried - 2).copied()
            }
        }
    }
}

impl<S: TcpSocket> Tcp<S> {
    /// Starts to connect to the port that `header` names.
    pub fn open(
        key: Key,
        header: Header,
        rules: &Rules,
        context: &mut Context,
        network: &impl Network<Tcp = S>,
    ) -> io::Result<Self> {
        let mut dial = Box::new(Dialling::new(header.port));
        let sock = dial.next(key, network)?;
        Ok(Self::with(sock, dial, key, header, rules, context))
    }

    /// Starts a terminal; `start` is what its CONNECT says.
    pub fn terminal(
        key: Key,
        header: Header,
        (opening, start): (Opening, &[u8]),
        context: &mut Context,
        network: &impl Network<Tcp = S>,
    ) -> io::Result<Self> {
        let sock = network.terminal(start, &opening.mark, key)?;
        let dial = Box::new(Dialling::new(header.port));
        let rules = Rules::Kept(opening);
        Ok(Self::with(sock, dial, key, header, &rules, context))
    }

    fn with(
        sock: S,
        dial: Box<Dialling>,
        key: Key,
        header: Header,
        rules: &Rules,
        context: &mut Context,
    ) -> Self {
        let (limit, opener, kept) = match rules {
            Rules::V1 => (None, None, None),
            Rules::V2(limit) => (Some(*limit), None, None),
            Rules::Kept(opening) => {
                let kept = KeptTcp::new(opening, key, context);
                (
                    Some(opening.limit),
                    opening.key.first_chunk(),
                    Some(Box::new(kept)),
                )
            }
        };
        let mut stream = Self {
            key,
            id: header.id,
            port: header.port,
            proto: header.proto,
            sock,
            dial: Some(dial),
            queue: Queue::default(),
            receiving: limit.map(|_| ReceiveWindow::new(&mut context.budget, opener)),
            kept,
            sent: 0,
            limit: limit.unwrap_or(u64::MAX),
            readable: false,
            writable: false,
            read_closed: false,
            eof_in: false,
            in_done: false,
            out_done: false,
            closed: false,
            failed: None,
            holding: false,
            waiting: false,
            deadline: None,
        };
        stream.arm(context, DIAL_TIMEOUT);
        stream
    }

    /// The stream's id, if it still has one.
    pub fn id(&self) -> Option<u32> {
        (!self.closed && self.id != 0).then_some(self.id)
    }

    /// Readiness of the service's socket.
    pub fn on_event(
        &mut self,
        ready: Ready,
        context: &mut Context,
        network: &impl Network<Tcp = S>,
    ) -> Fate {
        if self.dial.is_some() {
            match self.finish_dial(network) {
                Ok(false) => return Fate::Live,
                Ok(true) => self.connected(context),
                Err(error) => return self.dial_failed(&error, context),
            }
        }
        self.writable |= ready.writable;
        self.read_closed |= ready.closed;
        if ready.readable || self.read_closed {
            self.readable = true;
            context.schedule(self.key);
        }
        self.drain(context)
    }

    /// DATA from the user's side, in pieces.
    pub fn on_data(&mut self, pieces: &[IoSlice<'_>], context: &mut Context) -> Fate {
        let length = pieces.iter().map(|piece| piece.len()).sum();
        if self.eof_in {
            context.counters.ignored += 1;
            return Fate::Live;
        }
        if self.received(length, context).is_err() {
            // The link is all users': only the stream ends, and the runner sees to whose it was.
            return self.broken(&io::Error::from_raw_os_error(libc::EPROTO), context);
        }
        self.owe(context);
        if self.failed.is_some() {
            self.consumed(length, context);
            return Fate::Live;
        }
        let mut written = 0;
        if self.writable && self.queue.is_empty() {
            match self.sock.write_vectored(pieces) {
                Ok(n) => written = n,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return self.write_failed(error, length, context),
            }
            self.writable = written == length;
        }
        self.enqueue(pieces, written);
        self.count_waiting(context);
        self.consumed(written, context);
        self.ping(context);
        self.hold(context);
        Fate::Live
    }

    /// Tries to write what waits, though no event has said that it can be.
    pub fn retry(&mut self, context: &mut Context) -> Fate {
        if !self.waiting {
            return Fate::Live;
        }
        self.writable = true;
        self.drain(context)
    }

    /// WINDOW.
    pub fn on_window(&mut self, payload: &[u8], context: &mut Context) -> Fate {
        let limit = match (&self.kept, protocol::limit(payload)) {
            (Some(_), _) => return self.on_kept_window(payload, context),
            (None, Some(limit)) => limit,
            (None, None) => {
                // The runner passes on what a user made of it: that may not end all users' link.
                context.counters.ignored += 1;
                return Fate::Live;
            }
        };
        self.raise(limit, context);
        Fate::Live
    }

    fn raise(&mut self, limit: u64, context: &mut Context) {
        self.limit = self.limit.max(limit);
        if self.readable || self.is_behind() {
            context.schedule(self.key);
        }
    }

    /// PONG of the stream's own PING.
    pub fn on_pong(&mut self, context: &mut Context) {
        if let Some(receiving) = &mut self.receiving
            && let Some(limit) = receiving.pong(context.now, &mut context.budget)
        {
            self.grant(limit, kind::WINDOW, context);
        }
    }

    /// EOF: the user's side sends no more.
    pub fn on_eof(&mut self, payload: &[u8], context: &mut Context) -> Fate {
        if self.kept.is_some() {
            return self.on_kept_eof(payload, context);
        }
        // v1 has no such message.
        if self.receiving.is_none() {
            context.counters.ignored += 1;
            return Fate::Live;
        }
        self.eof_in = true;
        self.drain(context)
    }

    /// CLOSE: queued bytes are still delivered; the id is free at once.
    pub fn on_close(&mut self, context: &mut Context) -> Fate {
        if self.receiving.is_none() {
            context.send(Header::new(kind::CLOSE, TCP, self.id), &[]);
        }
        self.bury_well(context);
        self.closed = true;
        self.eof_in = true;
        if self.dial.is_none() {
            self.arm(context, DRAIN_TIMEOUT);
        }
        self.drain(context)
    }

    /// ERROR: the service's connection is reset. In v1 a CLOSE answers, as it answers CLOSE.
    pub fn on_error(&mut self, context: &mut Context) -> Fate {
        if self.receiving.is_none() {
            context.send(Header::new(kind::CLOSE, TCP, self.id), &[]);
        }
        self.bury_with("ECONNRESET: the user's end reset the connection", context);
        self.abort()
    }

    /// The service's connection is reset; also when the link is gone.
    pub fn abort(&mut self) -> Fate {
        self.sock.reset_on_close();
        Fate::Over
    }

    /// One turn as a source: reads once, sends at most one frame. True if there may be more.
    pub fn pump(&mut self, context: &mut Context) -> io::Result<(Fate, bool)> {
        if self.is_behind() {
            return self.resend(context);
        }
        let room = self.room(context);
        if !self.readable || room == 0 {
            return Ok((Fate::Live, false));
        }
        let most = context
            .chunk(self.key)
            .min(usize::try_from(room).unwrap_or(usize::MAX));
        let most = self.reserve(most, context);
        let read = self.read(most, context);
        self.keep(read.as_ref().map_or(0, |length| *length), context);
        let length = match read {
            Ok(0) => return Ok((self.service_ended(context), false)),
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                return Ok((Fate::Live, false));
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                return Ok((Fate::Live, true));
            }
            Err(error) => return Ok((self.broken(&error, context), false)),
        };
        self.readable = length == most || self.read_closed;
        self.send(length, context)?;
        Ok((Fate::Live, self.readable))
    }

    /// How much may be read from the service now.
    fn room(&self, context: &Context) -> u64 {
        if self.dial.is_some() || self.out_done || self.id().is_none() {
            return 0;
        }
        let room = self.limit.saturating_sub(self.sent);
        match &self.kept {
            Some(kept) => room.min(kept.retained.room(&context.keeping)),
            None => room,
        }
    }

    /// Counts what is sent now; under which header.
    fn count_sent(&mut self, length: usize, context: &mut Context) -> Header {
        self.sent += length as u64;
        context.counters.bytes_to_user += length as u64;
        context.counters.stalls += u64::from(self.sent == self.limit);
        Header::new(kind::DATA, TCP, self.id)
    }

    /// A timer of this stream has fired, perhaps early.
    pub fn on_timer(&mut self, context: &mut Context) -> Fate {
        if self.is_forsaken(context) {
            return self.forsaken(context);
        }
        let Some(deadline) = self.deadline else {
            return Fate::Live;
        };
        if deadline > context.now {
            context.set_timer(deadline, self.key);
            return Fate::Live;
        }
        self.deadline = None;
        if self.closed {
            return self.abort();
        }
        if self.dial.is_some() {
            return self.dial_failed(&io::Error::from_raw_os_error(libc::ETIMEDOUT), context);
        }
        context.send(Header::new(kind::CLOSE, TCP, self.id), &[]);
        Fate::Over
    }

    /// Gives back what the stream held of shared things.
    pub fn release(&mut self, context: &mut Context) {
        if let Some(receiving) = &mut self.receiving {
            receiving.close(&mut context.budget);
        }
        self.bury_with("ECONNRESET: the connection has ended", context);
        self.queue.clear();
        self.count_waiting(context);
        self.let_go(context);
    }

    /// Whether the service is connected now. Raises why it can't be.
    fn finish_dial(&mut self, network: &impl Network<Tcp = S>) -> io::Result<bool> {
        let Some(dial) = &mut self.dial else {
            return Ok(true);
        };
        let dialled = self.sock.dialled().and_then(|connected| {
            if connected {
                dial.is_of_the_same(network)?;
            }
            Ok(connected)
        });
        match dialled {
            Ok(connected) => {
                if connected {
                    self.dial = None;
                }
                Ok(connected)
            }
            // What is started for the stream is nowhere else.
            Err(error) if self.proto == TERMINAL => Err(error),
            Err(error) => {
                dial.failed(error)?;
                self.sock = dial.next(self.key, network)?;
                Ok(false)
            }
        }
    }

    fn connected(&mut self, context: &mut Context) {
        self.deadline = None;
        if self.closed {
            return self.arm(context, DRAIN_TIMEOUT);
        }
        match &self.receiving {
            Some(receiving) => self.grant(receiving.granted(), kind::CONNECTED, context),
            None => context.send(Header::new(kind::CONNECTED, TCP, self.id), &[]),
        }
    }

    /// CONNECTED or WINDOW of a v2 stream.
    fn grant(&mut self, limit: u64, kind: u8, context: &mut Context) {
        if self.kept.is_some() {
            let told = self.tell_received();
            self.tell(kind, &protocol::pack([limit, told]), context);
        } else {
            context.send(Header::new(kind, TCP, self.id), &limit.to_be_bytes());
        }
    }

    fn dial_failed(&mut self, error: &io::Error, context: &mut Context) -> Fate {
        if !self.closed {
            self.complain(error, context);
        }
        Fate::Over
    }

    /// Writes what is queued and ends the direction when that was all.
    fn drain(&mut self, context: &mut Context) -> Fate {
        if self.dial.is_some() {
            return Fate::Live;
        }
        if self.writable && !self.queue.is_empty() {
            match self.queue.write_to(&mut self.sock) {
                Ok(written) => {
                    self.writable = self.queue.is_empty();
                    self.count_waiting(context);
                    self.consumed(written, context);
                    if self.closed {
                        self.deadline = Some(context.now + DRAIN_TIMEOUT);
                    }
                }
                Err(error) => return self.write_failed(error, self.queue.len(), context),
            }
        }
        if self.queue.is_empty() && self.eof_in && !self.in_done {
            self.in_done = true;
            // A socket that is broken will say so when it is read.
            let _ = self.sock.finish_writing();
        }
        self.if_over(context)
    }

    /// Whether both directions have ended, as far as that is ours to know.
    fn if_over(&mut self, context: &mut Context) -> Fate {
        let ended = self.in_done && (self.out_done || self.closed);
        if ended && self.may_end(context) {
            Fate::Over
        } else {
            Fate::Live
        }
    }

    /// The service reads no more. What it wrote before that is still the user's.
    fn write_failed(&mut self, error: io::Error, lost: usize, context: &mut Context) -> Fate {
        self.queue.clear();
        self.count_waiting(context);
        if self.closed {
            return Fate::Over;
        }
        self.failed = Some(error);
        if self.out_done {
            return self.service_ended(context);
        }
        self.consumed(lost, context);
        (self.readable, self.read_closed) = (true, true);
        context.schedule(self.key);
        Fate::Live
    }

    /// The service's end-of-file, or the end of what could be read after a failed write.
    fn service_ended(&mut self, context: &mut Context) -> Fate {
        if let Some(error) = self.failed.take() {
            return self.broken(&error, context);
        }
        self.out_done = true;
        self.readable = false;
        if self.kept.is_some() {
            self.send_eof(context);
        } else if self.receiving.is_some() {
            context.send(Header::new(kind::EOF, TCP, self.id), &[]);
        } else {
            // v1 has no EOF: the user's side may still have something to say (§3 rule 4).
            self.arm(context, context.settings.linger);
        }
        self.if_over(context)
    }

    fn broken(&mut self, error: &io::Error, context: &mut Context) -> Fate {
        let failed = self.failed.take();
        self.complain(failed.as_ref().unwrap_or(error), context);
        self.abort()
    }

    fn complain(&mut self, error: &io::Error, context: &mut Context) {
        let text = context.complaint(self.id, self.port, error);
        self.tell(kind::ERROR, text.as_bytes(), context);
        self.bury_with(&text, context);
    }

    /// Sends a message without bulk, if there is somebody to send it to.
    fn tell(&self, kind: u8, payload: &[u8], context: &mut Context) {
        if let Some(id) = self.id() {
            context.send(Header::new(kind, TCP, id), payload);
        }
    }

    fn received(&mut self, length: usize, context: &mut Context) -> Result<(), Violation> {
        context.counters.bytes_to_container += length as u64;
        if let Some(receiving) = &mut self.receiving {
            receiving.receive(length)?;
        } else if self.out_done {
            self.deadline = Some(context.now + context.settings.linger);
        }
        Ok(())
    }

    fn consumed(&mut self, length: usize, context: &mut Context) {
        if self.holding && self.queue.len() <= V1_HOLD / 2 {
            self.let_go(context);
        }
        if let Some(receiving) = &mut self.receiving
            && let Some(limit) = receiving.consume(length, &context.budget)
            && !self.eof_in
        {
            self.grant(limit, kind::WINDOW, context);
        }
    }

    /// After the WINDOW for the same bytes: what comes before the PONG is then a whole window, if
    /// it is the window that holds the user's side back.
    fn ping(&mut self, context: &mut Context) {
        if let Some(receiving) = &mut self.receiving
            && receiving.wants_ping(context.now)
        {
            self.tell(kind::PING, &[], context);
        }
    }

    fn enqueue(&mut self, pieces: &[IoSlice<'_>], mut written: usize) {
        for piece in pieces {
            let skip = written.min(piece.len());
            written -= skip;
            if skip < piece.len() {
                self.queue.push(&piece[skip..]);
            }
        }
    }

    fn count_waiting(&mut self, context: &mut Context) {
        let waiting = !self.queue.is_empty();
        if waiting != self.waiting {
            self.waiting = waiting;
            context.waiting = if waiting {
                context.waiting + 1
            } else {
                context.waiting - 1
            };
        }
    }

    fn hold(&mut self, context: &mut Context) {
        if self.receiving.is_none() && !self.holding && self.queue.len() > V1_HOLD {
            self.holding = true;
            context.holding += 1;
        }
    }

    fn let_go(&mut self, context: &mut Context) {
        if std::mem::take(&mut self.holding) {
            context.holding -= 1;
        }
    }

    fn arm(&mut self, context: &mut Context, after: Duration) {
        let deadline = context.now + after;
        self.deadline = Some(deadline);
        context.set_timer(deadline, self.key);
    }
}

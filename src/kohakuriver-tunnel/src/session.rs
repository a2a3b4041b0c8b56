//! The streams and the link that carries them, without any waiting: what each message and each turn does. Links come and
//! go, the session stays.

mod kept;

use std::io::{self, IoSlice};
use std::time::{Duration, Instant};

use crate::context::{Context, Fate};
use crate::frame::{ControlPayload, opcode};
use crate::keepalive::{Due, Keepalive};
use crate::link::Link;
use crate::log;
use crate::message::{Item, Reader};
use crate::net::{Network, Ready, TcpSocket};
use crate::protocol::{
    self, END_TASK, HEADER, Header, MAX_SENT, NEW_TOKEN, Opening, TCP, TERMINAL, UDP, Violation,
    close, kind,
};
use crate::registry::Ending;
use crate::settings::Settings;
use crate::streams::Streams;
use crate::tcp::{Rules, Tcp};
use crate::udp::Udp;

const RECEIVE_BUFFER: usize = 1 << 20;
/// What the sources may send before the link is read again.
const PUMP_BYTES: usize = 1 << 20;
const PUMP_TURNS: usize = 64;
/// A peer that makes us answer faster than it reads our answers loses its PONGs, then the link.
const PONG_BACKLOG: usize = 1 << 20;
const MAX_BACKLOG: usize = 16 << 20;
const MAX_SLICES: usize = 16;

/// How long the last bytes of services that ended may take.
const GRACE: Duration = Duration::from_millis(300);
const REPORT_EVERY: Duration = Duration::from_secs(2);
/// What waits for a socket is tried again this often, event or not. Where the kernel has no memory
/// left for TCP (`tcp_mem`, tcp(7)) a write fails though nothing is on its way, and then no
/// acknowledgement comes that would bring an edge of readiness.
const RETRY_EVERY: Duration = Duration::from_secs(1);
/// How long to wait for events while there is neither a link nor a timer.
const WITHOUT_LINK: Duration = Duration::from_secs(3600);
/// Begins a PING that tells our counts (docs/protocol.md §3).
const COUNTS_MARK: &[u8] = b"cnt1";

/// How a link ended.
#[derive(Debug)]
pub enum End {
    /// The process is about to end.
    Stopped,
    /// The runner broke the protocol, and has been told so.
    Violated(&'static str),
    /// The runner closed it with this code, as a clause for the log.
    Closed(u16, String),
    /// Anything else, as a clause for the log.
    Lost(String),
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        Self::Lost(format!("the connection failed: {error}"))
    }
}

enum Stream<N: Network> {
    Tcp(Box<Tcp<N::Tcp>>),
    Udp(Box<Udp<N::Udp>>),
}

/// Pieces of one TCP stream that lie in the receive buffer, to be written with one call.
struct Run<'a> {
    id: u32,
    slices: [IoSlice<'a>; MAX_SLICES],
    used: usize,
}

/// The streams, and the link that there is or is not.
pub struct Session<N: Network> {
    network: N,
    context: Context,
    v2: bool,
    readable: bool,
    read_closed: bool,
    receive: Vec<u8>,
    reader: Reader,
    streams: Streams<Stream<N>>,
    keepalive: Keepalive,
    /// What the runner was told of our counts: datagrams dropped and stalls, and when next it may be told.
    reported: [u64; 2],
    next_report: Instant,
    next_retry: Instant,
    /// Asked to end, by this time at the latest.
    stopping: Option<Instant>,
    new_token: Box<dyn Fn()>,
    end_task: Box<dyn Fn()>,
    /// What the goodbye says.
    farewell: Option<i32>,
}

impl<N: Network> Session<N> {
    /// A session without a link and without streams.
    pub fn new(network: N, settings: &Settings) -> Self {
        let now = Instant::now();
        Self {
            network,
            context: Context::new(settings, now),
            v2: false,
            readable: false,
            read_closed: false,
            receive: vec![0; RECEIVE_BUFFER],
            reader: Reader::default(),
            streams: Streams::default(),
            keepalive: Keepalive::new(now),
            reported: [0; 2],
            next_report: now,
            next_retry: now,
            stopping: None,
            new_token: Box::new(|| {}),
            end_task: Box::new(|| {}),
            farewell: None,
        }
    }

    /// Has `take` called when the runner says that this container has a new token.
    pub fn on_new_token(&mut self, take: Box<dyn Fn()>) {
        self.new_token = take;
    }

    /// Has `end` called when the host says that this agent is to end.
    pub fn on_end_task(&mut self, end: Box<dyn Fn()>) {
        self.end_task = end;
    }

    /// Goes on over a link whose handshake is done.
    pub fn attach(&mut self, sock: Box<dyn TcpSocket>, v2: bool) {
        self.context.budget.begin();
        self.context.link.open(sock);
        (self.v2, self.readable, self.read_closed) = (v2, true, false);
        self.reader = Reader::default();
        self.keepalive = Keepalive::new(self.context.now);
    }

    /// Does what became possible at `now`; `quiet` if that was nothing. An error is why the link ends.
    pub fn turn(&mut self, quiet: bool) -> Result<(), End> {
        self.read_link()?;
        self.pump()?;
        self.fire_timers();
        self.retry();
        self.pay_acknowledgements();
        self.keep_alive()?;
        self.report();
        self.context.end_lateness();
        self.context.link.flush()?;
        self.streams.recycle();
        if quiet {
            self.context.keeping.rest();
        }
        self.stop_if_done(quiet)
    }

    /// Notes what time it is.
    pub fn set_now(&mut self, now: Instant) {
        self.context.now = now;
    }

    /// Asks the session to end when services' last words are on their way. A host is told how an agent's command has
    /// ended, where there is such a `farewell`.
    pub fn stop(&mut self, farewell: Option<i32>) {
        self.farewell = farewell;
        self.stopping = Some(self.context.now + GRACE);
    }

    /// Until when the loop may wait for events; `None` if there is something to do.
    pub fn wait_until(&self) -> Option<Instant> {
        let context = &self.context;
        // What services wrote before they ended is in our sockets already.
        let stopping = self.stopping.is_some() && context.link.is_idle();
        if stopping
            || (self.readable && context.holding == 0)
            || (context.has_sources() && context.link.is_idle())
        {
            return None;
        }
        let keepalive = if context.link.is_open() {
            self.keepalive.next()
        } else {
            context.now + WITHOUT_LINK
        };
        let report = self.unreported().map(|_| self.next_report);
        let retry = self.is_waiting().then_some(self.next_retry);
        let next = context
            .next_timer()
            .into_iter()
            .chain(report)
            .chain(retry)
            .chain(context.registry.pay_at())
            .chain(context.late_until())
            .fold(keepalive, Instant::min);
        Some(next)
    }

    /// Readiness of the link's socket.
    pub fn link_ready(&mut self, ready: Ready) {
        if ready.writable {
            self.context.link.now_writable();
        }
        self.read_closed |= ready.closed;
        self.readable |= ready.readable || self.read_closed;
    }

    /// Readiness of the socket of the stream in `slot`.
    pub fn stream_ready(&mut self, slot: usize, ready: Ready) {
        let fate = match self.streams.at(slot) {
            Some(Stream::Tcp(tcp)) => tcp.on_event(ready, &mut self.context, &self.network),
            Some(Stream::Udp(udp)) => {
                udp.on_event(&mut self.context);
                Fate::Live
            }
            None => Fate::Live,
        };
        self.settle(slot, fate);
    }

    /// A look at the ports may be over.
    pub fn looked(&mut self) {
        if let Some(answer) = self.network.looked()
            && self.v2
        {
            let header = Header::new(kind::PORTS, TCP, 0);
            self.context.send(header, &answer);
        }
    }

    // ---- from the link -------------------------------------------------------------------------

    /// Reads once. More is read in the loop's next turn, after the sources have had theirs.
    fn read_link(&mut self) -> Result<(), End> {
        if !self.readable || self.context.holding > 0 {
            return Ok(());
        }
        let mut buffer = std::mem::take(&mut self.receive);
        let result = match self.context.link.read(&mut buffer) {
            Ok(0) => Err(End::Lost("the runner ended the connection".into())),
            Ok(length) => {
                self.readable = length == buffer.len() || self.read_closed;
                self.keepalive.heard(self.context.now);
                self.process(&buffer[..length])
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                Ok(())
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(()),
            Err(error) => Err(error.into()),
        };
        self.receive = buffer;
        result
    }

    /// Takes bytes that came over the link.
    pub fn process(&mut self, input: &[u8]) -> Result<(), End> {
        let mut run = Run {
            id: 0,
            slices: [IoSlice::new(&[]); MAX_SLICES],
            used: 0,
        };
        let walked = self.walk(input, &mut run);
        let delivered = self
            .deliver(&mut run)
            .map_err(|violation| self.violated(violation));
        if self.context.link.backlog() > MAX_BACKLOG {
            return Err(End::Lost("the runner doesn't read its answers".into()));
        }
        walked.and(delivered)
    }

    fn walk<'a>(&mut self, mut input: &'a [u8], run: &mut Run<'a>) -> Result<(), End> {
        loop {
            let handled = match self.reader.next(&mut input) {
                Ok(None) => return Ok(()),
                Ok(Some(Item::Bytes { id, bytes })) => self.gather(id, bytes, run),
                Ok(Some(Item::Message { header, payload })) => self
                    .deliver(run)
                    .and_then(|()| self.message(header, &payload)),
                Ok(Some(Item::Control { opcode, payload })) => {
                    self.websocket(opcode, &payload)?;
                    Ok(())
                }
                Err(violation) => Err(violation),
            };
            handled.map_err(|violation| self.violated(violation))?;
        }
    }

    fn violated(&mut self, violation: Violation) -> End {
        self.close(violation.code, violation.reason);
        End::Violated(violation.reason)
    }

    /// The link, for what is left to do when the session has ended.
    pub fn link(&mut self) -> &mut Link {
        &mut self.context.link
    }

    /// Says goodbye as far as the socket takes it.
    fn close(&mut self, code: u16, reason: &str) {
        let payload = [&code.to_be_bytes(), reason.as_bytes()].concat();
        self.context.link.websocket(opcode::CLOSE, &payload);
        let _ = self.context.link.flush();
    }

    fn websocket(&mut self, opcode: u8, payload: &ControlPayload) -> Result<(), End> {
        let payload = payload.as_slice();
        match opcode {
            opcode::PING if self.context.link.backlog() < PONG_BACKLOG => {
                self.context.link.websocket(opcode::PONG, payload);
            }
            opcode::CLOSE => {
                let code = payload
                    .first_chunk()
                    .map_or(close::NORMAL, |code| u16::from_be_bytes(*code));
                self.close(code, "");
                let reason = String::from_utf8_lossy(payload.get(2..).unwrap_or_default());
                let said = format!("the runner closed the tunnel ({code} {reason:?})");
                return Err(End::Closed(code, said));
            }
            _ => {}
        }
        Ok(())
    }

    fn gather<'a>(&mut self, id: u32, bytes: &'a [u8], run: &mut Run<'a>) -> Result<(), Violation> {
        if id != run.id || run.used == MAX_SLICES {
            self.deliver(run)?;
        }
        run.id = id;
        run.slices[run.used] = IoSlice::new(bytes);
        run.used += 1;
        Ok(())
    }

    fn deliver(&mut self, run: &mut Run<'_>) -> Result<(), Violation> {
        let used = std::mem::take(&mut run.used);
        if used == 0 {
            return Ok(());
        }
        let Some(key) = self.streams.find(run.id) else {
            self.context.counters.ignored += 1;
            return Ok(());
        };
        self.context.receives(run.id);
        let slot = key.slot as usize;
        if let Some(Stream::Tcp(tcp)) = self.streams.at(slot) {
            let fate = tcp.on_data(&run.slices[..used], &mut self.context);
            self.settle(slot, fate);
        }
        Ok(())
    }

    /// Any message but a TCP stream's DATA.
    fn message(&mut self, header: Header, payload: &[u8]) -> Result<(), Violation> {
        match header.kind {
            kind::CONNECT => self.connect(header, payload),
            kind::PING => self.pong(header, payload),
            kind::WINDOW if self.v2 && header.id == 0 => {
                return Err(Violation::protocol("a WINDOW without a stream"));
            }
            kind::WINDOW if self.v2 => {
                self.with_tcp(header.id, |tcp, context| tcp.on_window(payload, context));
            }
            kind::EOF if self.v2 => {
                self.with_tcp(header.id, |tcp, context| tcp.on_eof(payload, context));
            }
            kind::ACK | kind::RESUME | kind::DETACH | kind::REVOKE if self.v2 => {
                self.of_kept(header, payload);
            }
            kind::PORTS if self.v2 && header.id == 0 => self.network.look(payload),
            kind::PONG => self.with_tcp(header.id, |tcp, context| {
                tcp.on_pong(context);
                Fate::Live
            }),
            kind::DATA => self.datagram(header, payload),
            kind::CLOSE => self.closed(header.id, Tcp::on_close),
            kind::ERROR => self.closed(header.id, Tcp::on_error),
            _ => self.context.counters.unknown_messages += 1,
        }
        Ok(())
    }

    fn connect(&mut self, header: Header, payload: &[u8]) {
        if header.id == 0 || self.streams.find(header.id).is_some() {
            self.context.counters.ignored += 1;
            return;
        }
        let (rules, start) = self.rules(header.proto, payload);
        if let Rules::Kept(opening) = &rules
            && self.context.registry.knows(&opening.key)
        {
            self.context.counters.ignored += 1;
            return;
        }
        let key = self.streams.vacancy();
        let (context, network) = (&mut self.context, &self.network);
        let opened = match (header.proto, &rules) {
            (TERMINAL, Rules::Kept(opening)) => {
                Tcp::terminal(key, header, (opening.clone(), start), context, network)
                    .map(|tcp| Stream::Tcp(Box::new(tcp)))
            }
            (TERMINAL, _) => Err(io::Error::from_raw_os_error(libc::EPROTONOSUPPORT)),
            (TCP, _) => Tcp::open(key, header, &rules, context, network)
                .map(|tcp| Stream::Tcp(Box::new(tcp))),
            (UDP, Rules::Kept(opening)) => Udp::open(key, header, Some(opening), context, network)
                .map(|udp| Stream::Udp(Box::new(udp))),
            (UDP, _) => {
                Udp::open(key, header, None, context, network).map(|udp| Stream::Udp(Box::new(udp)))
            }
            _ => Err(io::Error::from_raw_os_error(libc::EPROTONOSUPPORT)),
        };
        match opened {
            Ok(stream) => {
                self.context.counters.streams += 1;
                self.streams.put(key, header.id, stream);
            }
            Err(error) => {
                self.streams.give_back(key);
                let answer = Header::new(kind::ERROR, header.proto, header.id);
                let text = self.context.complaint(header.id, header.port, &error);
                self.context.send(answer, text.as_bytes());
            }
        }
    }

    /// What a CONNECT opens a stream under, and what it starts if that is a terminal.
    fn rules<'a>(&self, proto: u8, payload: &'a [u8]) -> (Rules, &'a [u8]) {
        if !self.v2 {
            return (Rules::V1, &[]);
        }
        if proto == TERMINAL {
            let starting = protocol::starting(payload);
            return starting.map_or((Rules::V1, &[]), |(opening, start)| {
                (Rules::Kept(opening), start)
            });
        }
        let kept = Opening::parse(payload).map(Rules::Kept);
        let rules = kept.or_else(|| protocol::limit(payload).map(Rules::V2));
        (rules.unwrap_or(Rules::V1), &[])
    }

    fn pong(&mut self, header: Header, payload: &[u8]) {
        if header.id == 0 && payload == NEW_TOKEN {
            (self.new_token)();
        }
        if header.id == 0 && payload == END_TASK {
            (self.end_task)();
        }
        if payload.len() <= MAX_SENT - HEADER && self.context.link.backlog() < PONG_BACKLOG {
            self.context.send(
                Header {
                    kind: kind::PONG,
                    ..header
                },
                payload,
            );
        } else {
            self.context.counters.ignored += 1;
        }
    }

    fn datagram(&mut self, header: Header, payload: &[u8]) {
        let key = self.streams.find(header.id);
        match key.and_then(|key| self.streams.get(key)) {
            Some(Stream::Udp(udp)) => {
                self.context.receives(header.id);
                let fate = udp.on_datagram(payload, &mut self.context, &self.network);
                if let Some(key) = key {
                    self.settle(key.slot as usize, fate);
                }
            }
            _ => self.context.counters.ignored += 1,
        }
    }

    /// CLOSE or ERROR: the id is free at once.
    fn closed(&mut self, id: u32, end: impl FnOnce(&mut Tcp<N::Tcp>, &mut Context) -> Fate) {
        let Some(key) = self.streams.forget(id) else {
            self.context.counters.ignored += 1;
            return;
        };
        let slot = key.slot as usize;
        let fate = match self.streams.at(slot) {
            Some(Stream::Tcp(tcp)) => end(tcp, &mut self.context),
            Some(Stream::Udp(udp)) => {
                udp.bury(Ending::WELL, &mut self.context);
                Fate::Over
            }
            None => Fate::Over,
        };
        self.settle(slot, fate);
    }

    fn with_tcp(&mut self, id: u32, act: impl FnOnce(&mut Tcp<N::Tcp>, &mut Context) -> Fate) {
        if let Some(key) = self.streams.find(id)
            && let Some(Stream::Tcp(tcp)) = self.streams.get(key)
        {
            let fate = act(tcp, &mut self.context);
            self.settle(key.slot as usize, fate);
        } else {
            self.context.counters.ignored += 1;
        }
    }

    // ---- to the link ---------------------------------------------------------------------------

    /// Gives the sources their turns, one frame each, while the link takes them.
    fn pump(&mut self) -> Result<(), End> {
        let start = self.context.counters.bytes_to_user;
        for _ in 0..PUMP_TURNS {
            if !self.context.link.is_idle()
                || self.context.counters.bytes_to_user - start >= PUMP_BYTES as u64
            {
                break;
            }
            let Some(key) = self.context.next_source() else {
                break;
            };
            let slot = key.slot as usize;
            let (fate, more) = match self.streams.at(slot) {
                Some(Stream::Tcp(tcp)) => tcp.pump(&mut self.context)?,
                Some(Stream::Udp(udp)) => udp.pump(&mut self.context, &self.network)?,
                None => (Fate::Live, false),
            };
            if more {
                self.context.schedule(key);
            }
            self.settle(slot, fate);
        }
        Ok(())
    }

    // ---- time ----------------------------------------------------------------------------------

    fn fire_timers(&mut self) {
        while let Some(key) = self.context.due_timer() {
            let slot = key.slot as usize;
            let fate = match self.streams.get(key) {
                Some(Stream::Tcp(tcp)) => tcp.on_timer(&mut self.context),
                Some(Stream::Udp(udp)) => udp.on_timer(&mut self.context),
                None => Fate::Live,
            };
            self.settle(slot, fate);
        }
    }

    fn is_waiting(&self) -> bool {
        self.context.waiting > 0 || self.context.link.is_waiting()
    }

    fn retry(&mut self) {
        if self.context.now < self.next_retry || !self.is_waiting() {
            return;
        }
        self.next_retry = self.context.now + RETRY_EVERY;
        self.context.link.now_writable();
        for slot in 0..self.streams.len() {
            if let Some(Stream::Tcp(tcp)) = self.streams.at(slot) {
                let fate = tcp.retry(&mut self.context);
                self.settle(slot, fate);
            }
        }
    }

    fn keep_alive(&mut self) -> Result<(), End> {
        if !self.context.link.is_open() {
            return Ok(());
        }
        self.keepalive
            .owes(self.context.keeping.is_owed(), self.context.now);
        // While a v1 stream holds up the reading, silence is our own doing.
        if self.context.holding > 0 {
            self.keepalive.heard(self.context.now);
        }
        match self.keepalive.tick(self.context.now) {
            Due::End => return Err(End::Lost("the runner doesn't answer".into())),
            Due::Ping => self.context.link.websocket(opcode::PING, &[]),
            Due::Nothing => {}
        }
        Ok(())
    }

    /// Our counts, if the runner speaks v2 and has not been told of them.
    fn unreported(&self) -> Option<[u64; 2]> {
        let counters = &self.context.counters;
        let counts = [counters.udp_dropped + counters.udp_refused, counters.stalls];
        let told = self.v2 && self.context.link.is_open();
        (told && counts != self.reported).then_some(counts)
    }

    /// Tells the runner what only an endpoint can count.
    fn report(&mut self) {
        if self.context.now < self.next_report {
            return;
        }
        if let Some(counts) = self.unreported() {
            let mut payload = COUNTS_MARK.to_vec();
            for (now, before) in counts.iter().zip(self.reported) {
                payload.extend((now - before).to_be_bytes());
            }
            self.context.send(Header::new(kind::PING, TCP, 0), &payload);
            self.reported = counts;
            self.next_report = self.context.now + REPORT_EVERY;
        }
    }

    // ---- the table of streams ------------------------------------------------------------------

    /// Closes a stream that is over.
    fn settle(&mut self, slot: usize, fate: Fate) {
        if fate == Fate::Live {
            return;
        }
        let Some(stream) = self.streams.take(slot) else {
            return;
        };
        let id = match stream {
            Stream::Tcp(mut tcp) => {
                tcp.release(&mut self.context);
                tcp.id()
            }
            Stream::Udp(udp) => udp.id(),
        };
        if let Some(id) = id {
            self.streams.forget_at(id, slot);
        }
        self.context.unschedule(slot);
    }

    /// The end of all: nobody's connection is left hanging.
    pub fn abandon(&mut self) {
        for stream in self.streams.drain() {
            if let Stream::Tcp(mut tcp) = stream {
                let _ = tcp.abort();
            }
        }
        log!(Debug, "{}", self.context.counters);
    }

    /// Ends the session once it was asked to end, and what services said last is on its way.
    fn stop_if_done(&mut self, quiet: bool) -> Result<(), End> {
        let link = &self.context.link;
        let idle = link.is_idle() && link.backlog() == 0 && !self.context.has_sources();
        let done = quiet && (idle || !link.is_open());
        match self.stopping {
            Some(deadline) if done || self.context.now >= deadline => {
                match self.farewell {
                    Some(code) => self.close(close::NORMAL, &format!("exit {code}")),
                    None => self.close(close::GOING_AWAY, "the tunnel client ends"),
                }
                Err(End::Stopped)
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;

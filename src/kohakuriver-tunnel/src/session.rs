//! One link's life: the event loop, the streams, and what each message does.

use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::time::{Duration, Instant};

use mio::event::Event;
use mio::net::TcpStream;
use mio::{Events, Interest, Poll, Token};

use crate::context::{Context, FIRST_STREAM, Fate, Key};
use crate::frame::{ControlPayload, opcode};
use crate::link::Link;
use crate::log;
use crate::message::{Item, Reader};
use crate::protocol::{self, HEADER, Header, MAX_SENT, TCP, UDP, Violation, close, kind};
use crate::settings::Settings;
use crate::tcp::Tcp;
use crate::udp::Udp;

const LINK: Token = Token(0);
/// Wakes the loop so that it ends in order.
pub const STOP: Token = Token(1);

const RECEIVE_BUFFER: usize = 1 << 20;
/// What the sources may send before the link is read again.
const PUMP_BYTES: usize = 1 << 20;
const PUMP_TURNS: usize = 64;
/// A peer that makes us answer faster than it reads our answers loses its PONGs, then the link.
const PONG_BACKLOG: usize = 1 << 20;
const MAX_BACKLOG: usize = 16 << 20;
const MAX_SLICES: usize = 16;

/// How long the runner has to take a close frame that tells it of its mistake.
const LINGER: Duration = Duration::from_secs(1);
/// How long the last bytes of services that ended may take.
const GRACE: Duration = Duration::from_millis(300);
const PING_AFTER: Duration = Duration::from_secs(15);
const LOST_AFTER: Duration = Duration::from_secs(20);
const REPORT_EVERY: Duration = Duration::from_secs(2);
/// What waits for a socket is tried again this often, event or not. Where the kernel has no memory
/// left for TCP (`tcp_mem`, tcp(7)) a write fails though nothing is on its way, and then no
/// acknowledgement comes that would bring an edge of readiness.
const RETRY_EVERY: Duration = Duration::from_secs(1);
/// Begins a PING that tells our counts (docs/protocol.md §3).
const COUNTS_MARK: &[u8] = b"cnt1";

/// How a session ended.
#[derive(Debug)]
pub enum End {
    /// Another tunnel client took this one's place.
    Replaced,
    /// The process is about to end.
    Stopped,
    /// Anything else, as a clause for the log.
    Lost(String),
}

impl From<Violation> for End {
    fn from(violation: Violation) -> Self {
        Self::Lost(format!(
            "the runner broke the protocol: {}",
            violation.reason
        ))
    }
}

impl From<io::Error> for End {
    fn from(error: io::Error) -> Self {
        Self::Lost(format!("the connection failed: {error}"))
    }
}

enum Stream {
    Tcp(Box<Tcp>),
    Udp(Udp),
}

#[derive(Default)]
struct Slot {
    generation: u32,
    stream: Option<Stream>,
}

/// Pieces of one TCP stream that lie in the receive buffer, to be written with one call.
struct Run<'a> {
    id: u32,
    slices: [IoSlice<'a>; MAX_SLICES],
    used: usize,
}

/// One link and its streams.
pub struct Session<'p> {
    poll: &'p mut Poll,
    context: Context,
    v2: bool,
    readable: bool,
    read_closed: bool,
    receive: Vec<u8>,
    reader: Reader,
    slots: Vec<Slot>,
    free: Vec<u32>,
    /// Slots to reuse after this turn: events for what they held may still be in the batch.
    freed: Vec<u32>,
    ids: HashMap<u32, Key>,
    last_received: Instant,
    pinged: Option<Instant>,
    /// What the runner was told of our counts: datagrams dropped and stalls, and when next it may be told.
    reported: [u64; 2],
    next_report: Instant,
    next_retry: Instant,
    /// Asked to end, by this time at the latest.
    stopping: Option<Instant>,
}

/// Serves one link until it ends. `early` is what followed the handshake.
pub fn run(poll: &mut Poll, sock: TcpStream, early: &[u8], v2: bool, settings: &Settings) -> End {
    let mut session = Session::new(poll, sock, v2, settings);
    let end = session.serve(early).unwrap_err();
    session.abandon();
    log!(Debug, "{}", session.context.counters);
    end
}

impl<'p> Session<'p> {
    fn new(poll: &'p mut Poll, sock: TcpStream, v2: bool, settings: &Settings) -> Self {
        let now = Instant::now();
        Self {
            poll,
            context: Context::new(Link::new(sock), settings, now),
            v2,
            readable: true,
            read_closed: false,
            receive: vec![0; RECEIVE_BUFFER],
            reader: Reader::default(),
            slots: Vec::new(),
            free: Vec::new(),
            freed: Vec::new(),
            ids: HashMap::new(),
            last_received: now,
            pinged: None,
            reported: [0; 2],
            next_report: now,
            next_retry: now,
            stopping: None,
        }
    }

    /// The event loop. It only ever returns why the session ended.
    fn serve(&mut self, early: &[u8]) -> Result<(), End> {
        let interest = Interest::READABLE | Interest::WRITABLE;
        self.poll
            .registry()
            .register(self.context.link.socket(), LINK, interest)?;
        self.process(early)?;
        let mut events = Events::with_capacity(256);
        loop {
            match self.poll.poll(&mut events, Some(self.patience())) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => {
                    return Err(error.into());
                }
                _ => self.context.now = Instant::now(),
            }
            for event in &events {
                match event.token() {
                    LINK => self.link_event(event),
                    STOP => self.stopping = Some(self.context.now + GRACE),
                    Token(token) => self.stream_event(token - FIRST_STREAM, event),
                }
            }
            self.read_link()?;
            self.pump()?;
            self.fire_timers();
            self.retry();
            self.keep_alive()?;
            self.report();
            self.context.link.flush()?;
            self.free.append(&mut self.freed);
            self.stop(events.is_empty())?;
        }
    }

    /// How long the loop may wait for events.
    fn patience(&self) -> Duration {
        let context = &self.context;
        // What services wrote before they ended is in our sockets already.
        let stopping = self.stopping.is_some() && context.link.is_idle();
        if stopping
            || (self.readable && context.holding == 0)
            || (context.has_sources() && context.link.is_idle())
        {
            return Duration::ZERO;
        }
        let keepalive = match self.pinged {
            Some(pinged) => pinged + LOST_AFTER,
            None => self.last_received + PING_AFTER,
        };
        let report = self.unreported().map(|_| self.next_report);
        let retry = self.is_waiting().then_some(self.next_retry);
        let next = context
            .next_timer()
            .into_iter()
            .chain(report)
            .chain(retry)
            .fold(keepalive, Instant::min);
        next.saturating_duration_since(Instant::now()) + Duration::from_millis(1)
    }

    fn link_event(&mut self, event: &Event) {
        self.context.link.writable |= event.is_writable();
        self.read_closed |= event.is_read_closed() || event.is_error();
        self.readable |= event.is_readable() || self.read_closed;
    }

    fn stream_event(&mut self, slot: usize, event: &Event) {
        let registry = self.poll.registry();
        let fate = match self
            .slots
            .get_mut(slot)
            .and_then(|slot| slot.stream.as_mut())
        {
            Some(Stream::Tcp(tcp)) => tcp.on_event(event, &mut self.context, registry),
            Some(Stream::Udp(udp)) => {
                udp.on_event(&mut self.context);
                Fate::Live
            }
            None => Fate::Live,
        };
        self.settle(slot, fate);
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
                self.last_received = self.context.now;
                self.pinged = None;
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

    fn process(&mut self, input: &[u8]) -> Result<(), End> {
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
        let _ = self.linger();
        violation.into()
    }

    /// Takes what the runner still sends: unread bytes would make our end a reset, and a reset
    /// overtakes the close frame.
    fn linger(&mut self) -> io::Result<()> {
        let deadline = Instant::now() + LINGER;
        let mut events = Events::with_capacity(64);
        let mut buffer = vec![0; 64 << 10];
        self.context.link.socket().shutdown(Shutdown::Write)?;
        while let Some(left) = deadline.checked_duration_since(Instant::now()) {
            match self.context.link.read(&mut buffer) {
                Ok(0) => break,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.poll.poll(&mut events, Some(left))?;
                }
                result => drop(result?),
            }
        }
        Ok(())
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
                if code == close::REPLACED {
                    return Err(End::Replaced);
                }
                let reason = String::from_utf8_lossy(payload.get(2..).unwrap_or_default());
                return Err(End::Lost(format!(
                    "the runner closed the tunnel ({code} {reason:?})"
                )));
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
        let Some(&key) = self.ids.get(&run.id) else {
            self.context.counters.ignored += 1;
            return Ok(());
        };
        self.context.receives(run.id);
        let slot = key.slot as usize;
        if let Some(Stream::Tcp(tcp)) = &mut self.slots[slot].stream {
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
            kind::WINDOW if self.v2 => return self.window(header, payload),
            kind::EOF if self.v2 => self.with_tcp(header.id, Tcp::on_eof),
            kind::PONG => self.with_tcp(header.id, |tcp, context| {
                tcp.on_pong(context);
                Fate::Live
            }),
            kind::DATA => self.datagram(header, payload),
            kind::CLOSE => self.closed(header.id, Tcp::on_close),
            kind::ERROR => self.closed(header.id, |tcp, _| tcp.abort()),
            _ => self.context.counters.unknown_messages += 1,
        }
        Ok(())
    }

    fn connect(&mut self, header: Header, payload: &[u8]) {
        if header.id == 0 || self.ids.contains_key(&header.id) {
            self.context.counters.ignored += 1;
            return;
        }
        let key = self.vacancy();
        let registry = self.poll.registry();
        let limit = if self.v2 {
            protocol::limit(payload)
        } else {
            None
        };
        let opened = match header.proto {
            TCP => Tcp::open(key, header, limit, &mut self.context, registry)
                .map(|tcp| Stream::Tcp(Box::new(tcp))),
            UDP => Udp::open(key, header, &mut self.context, registry).map(Stream::Udp),
            _ => Err(io::Error::from_raw_os_error(libc::EPROTONOSUPPORT)),
        };
        match opened {
            Ok(stream) => {
                self.context.counters.streams += 1;
                self.slots[key.slot as usize].stream = Some(stream);
                self.ids.insert(header.id, key);
            }
            Err(error) => {
                self.free.push(key.slot);
                let answer = Header::new(kind::ERROR, header.proto, header.id);
                self.context.refuse(answer, header.port, &error);
            }
        }
    }

    fn pong(&mut self, header: Header, payload: &[u8]) {
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

    fn window(&mut self, header: Header, payload: &[u8]) -> Result<(), Violation> {
        match protocol::limit(payload) {
            Some(limit) if header.id != 0 => {
                self.with_tcp(header.id, |tcp, context| {
                    tcp.on_window(limit, context);
                    Fate::Live
                });
                Ok(())
            }
            // The runner passes on what a user made of it: that may not end all users' link.
            _ if header.id != 0 => {
                self.context.counters.ignored += 1;
                Ok(())
            }
            _ => Err(Violation::protocol("a WINDOW without a stream")),
        }
    }

    fn datagram(&mut self, header: Header, payload: &[u8]) {
        let stream = self
            .ids
            .get(&header.id)
            .and_then(|key| self.slots[key.slot as usize].stream.as_mut());
        match stream {
            Some(Stream::Udp(udp)) => {
                self.context.receives(header.id);
                udp.on_datagram(payload, &mut self.context);
            }
            _ => self.context.counters.ignored += 1,
        }
    }

    /// CLOSE or ERROR: the id is free at once.
    fn closed(&mut self, id: u32, end: impl FnOnce(&mut Tcp, &mut Context) -> Fate) {
        let Some(key) = self.ids.remove(&id) else {
            self.context.counters.ignored += 1;
            return;
        };
        let slot = key.slot as usize;
        let fate = match &mut self.slots[slot].stream {
            Some(Stream::Tcp(tcp)) => end(tcp, &mut self.context),
            _ => Fate::Over,
        };
        self.settle(slot, fate);
    }

    fn with_tcp(&mut self, id: u32, act: impl FnOnce(&mut Tcp, &mut Context) -> Fate) {
        if let Some(&key) = self.ids.get(&id)
            && let Some(Stream::Tcp(tcp)) = &mut self.slots[key.slot as usize].stream
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
            let (fate, more) = match &mut self.slots[slot].stream {
                Some(Stream::Tcp(tcp)) => tcp.pump(&mut self.context)?,
                Some(Stream::Udp(udp)) => (Fate::Live, udp.pump(&mut self.context)?),
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
            if self.slots[slot].generation != key.generation {
                continue;
            }
            let fate = match &mut self.slots[slot].stream {
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
        self.context.link.writable = true;
        for slot in 0..self.slots.len() {
            if let Some(Stream::Tcp(tcp)) = &mut self.slots[slot].stream {
                let fate = tcp.retry(&mut self.context);
                self.settle(slot, fate);
            }
        }
    }

    fn keep_alive(&mut self) -> Result<(), End> {
        let now = self.context.now;
        // While a v1 stream holds up the reading, silence is our own doing.
        if self.context.holding > 0 {
            self.last_received = now;
            self.pinged = None;
        }
        match self.pinged {
            Some(pinged) if now >= pinged + LOST_AFTER => {
                Err(End::Lost("the runner doesn't answer".into()))
            }
            None if now >= self.last_received + PING_AFTER => {
                self.pinged = Some(now);
                self.context.link.websocket(opcode::PING, &[]);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// Our counts, if the runner speaks v2 and has not been told of them.
    fn unreported(&self) -> Option<[u64; 2]> {
        let counters = &self.context.counters;
        let counts = [counters.udp_dropped + counters.udp_refused, counters.stalls];
        (self.v2 && counts != self.reported).then_some(counts)
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

    fn vacancy(&mut self) -> Key {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            (self.slots.len() - 1) as u32
        });
        Key {
            slot,
            generation: self.slots[slot as usize].generation,
        }
    }

    /// Closes a stream that is over.
    fn settle(&mut self, slot: usize, fate: Fate) {
        if fate == Fate::Live {
            return;
        }
        let Some(stream) = self.slots[slot].stream.take() else {
            return;
        };
        let id = match stream {
            Stream::Tcp(mut tcp) => {
                tcp.release(&mut self.context);
                tcp.id()
            }
            Stream::Udp(udp) => Some(udp.id()),
        };
        if let Some(id) = id
            && self
                .ids
                .get(&id)
                .is_some_and(|key| key.slot as usize == slot)
        {
            self.ids.remove(&id);
        }
        self.slots[slot].generation = self.slots[slot].generation.wrapping_add(1);
        self.context.unschedule(slot);
        self.freed.push(slot as u32);
    }

    /// The link is gone: nobody's connection is left hanging.
    fn abandon(&mut self) {
        for slot in &mut self.slots {
            if let Some(Stream::Tcp(tcp)) = &mut slot.stream {
                let _ = tcp.abort();
            }
            slot.stream = None;
        }
    }

    /// Ends the session once it was asked to end, and what services said last is on its way.
    fn stop(&mut self, quiet: bool) -> Result<(), End> {
        let link = &self.context.link;
        let done = quiet && link.is_idle() && link.backlog() == 0 && !self.context.has_sources();
        match self.stopping {
            Some(deadline) if done || self.context.now >= deadline => {
                self.close(close::GOING_AWAY, "the tunnel client ends");
                Err(End::Stopped)
            }
            _ => Ok(()),
        }
    }
}

//! One link's life without its waiting: the streams, and what each message and each turn does.

use std::io::{self, IoSlice};
use std::time::{Duration, Instant};

use crate::context::{Context, Fate};
use crate::frame::{ControlPayload, opcode};
use crate::keepalive::{Due, Keepalive};
use crate::link::Link;
use crate::log;
use crate::message::{Item, Reader};
use crate::net::{Network, Ready};
use crate::protocol::{self, HEADER, Header, MAX_SENT, TCP, UDP, Violation, close, kind};
use crate::settings::Settings;
use crate::streams::Streams;
use crate::tcp::Tcp;
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
/// Begins a PING that tells our counts (docs/protocol.md §3).
const COUNTS_MARK: &[u8] = b"cnt1";

/// How a session ended.
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
    Udp(Udp<N::Udp>),
}

/// Pieces of one TCP stream that lie in the receive buffer, to be written with one call.
struct Run<'a> {
    id: u32,
    slices: [IoSlice<'a>; MAX_SLICES],
    used: usize,
}

/// One link and its streams.
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
}

impl<N: Network> Session<N> {
    /// A session on a link that is open.
    pub fn new(network: N, link: Link, v2: bool, settings: &Settings) -> Self {
        let now = Instant::now();
        Self {
            network,
            context: Context::new(link, settings, now),
            v2,
            readable: true,
            read_closed: false,
            receive: vec![0; RECEIVE_BUFFER],
            reader: Reader::default(),
            streams: Streams::default(),
            keepalive: Keepalive::new(now),
            reported: [0; 2],
            next_report: now,
            next_retry: now,
            stopping: None,
        }
    }

    /// Does what became possible at `now`; `quiet` if that was nothing. An error is why the session ends.
    pub fn turn(&mut self, quiet: bool) -> Result<(), End> {
        self.read_link()?;
        self.pump()?;
        self.fire_timers();
        self.retry();
        self.keep_alive()?;
        self.report();
        self.context.link.flush()?;
        self.streams.recycle();
        self.stop_if_done(quiet)
    }

    /// Notes what time it is.
    pub fn set_now(&mut self, now: Instant) {
        self.context.now = now;
    }

    /// Asks the session to end when services' last words are on their way.
    pub fn stop(&mut self) {
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
        let keepalive = self.keepalive.next();
        let report = self.unreported().map(|_| self.next_report);
        let retry = self.is_waiting().then_some(self.next_retry);
        let next = context
            .next_timer()
            .into_iter()
            .chain(report)
            .chain(retry)
            .fold(keepalive, Instant::min);
        Some(next)
    }

    /// Readiness of the link's socket.
    pub fn link_ready(&mut self, ready: Ready) {
        self.context.link.writable |= ready.writable;
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
            kind::WINDOW if self.v2 => return self.window(header, payload),
            kind::EOF if self.v2 => self.with_tcp(header.id, Tcp::on_eof),
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
        let key = self.streams.vacancy();
        let limit = if self.v2 {
            protocol::limit(payload)
        } else {
            None
        };
        let opened = match header.proto {
            TCP => Tcp::open(key, header, limit, &mut self.context, &self.network)
                .map(|tcp| Stream::Tcp(Box::new(tcp))),
            UDP => Udp::open(key, header, &mut self.context, &self.network).map(Stream::Udp),
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
            _ => Fate::Over,
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
        self.context.link.writable = true;
        for slot in 0..self.streams.len() {
            if let Some(Stream::Tcp(tcp)) = self.streams.at(slot) {
                let fate = tcp.retry(&mut self.context);
                self.settle(slot, fate);
            }
        }
    }

    fn keep_alive(&mut self) -> Result<(), End> {
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
            Stream::Udp(udp) => Some(udp.id()),
        };
        if let Some(id) = id {
            self.streams.forget_at(id, slot);
        }
        self.context.unschedule(slot);
    }

    /// The link is gone: nobody's connection is left hanging.
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

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::io::{Read, Write};
    use std::net::SocketAddr;
    use std::rc::Rc;

    use super::*;
    use crate::frame::mask;
    use crate::net::{TcpSocket, UdpSocket};
    use crate::streams::Key;

    /// A socket whose other end the test has: what can be read, what was written, how much is taken.
    #[derive(Default)]
    struct Far {
        readable: Vec<u8>,
        written: Vec<u8>,
        room: usize,
        connecting: bool,
        ended: bool,
        broken: Option<i32>,
        finished: bool,
        reset: bool,
    }

    #[derive(Clone, Default)]
    struct Socket(Rc<RefCell<Far>>);

    impl Read for Socket {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let mut end = self.0.borrow_mut();
            let length = end.readable.len().min(buffer.len());
            if let Some(errno) = end.broken {
                return Err(io::Error::from_raw_os_error(errno));
            }
            if length == 0 && !end.ended {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            buffer[..length].copy_from_slice(&end.readable[..length]);
            end.readable.drain(..length);
            Ok(length)
        }
    }

    impl Write for Socket {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let mut end = self.0.borrow_mut();
            if let Some(errno) = end.broken {
                return Err(io::Error::from_raw_os_error(errno));
            }
            let length = bytes.len().min(end.room);
            if length == 0 && !bytes.is_empty() {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            end.room -= length;
            end.written.extend_from_slice(&bytes[..length]);
            Ok(length)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl TcpSocket for Socket {
        fn dialled(&mut self) -> io::Result<bool> {
            let end = self.0.borrow();
            match end.broken {
                Some(errno) => Err(io::Error::from_raw_os_error(errno)),
                None => Ok(!end.connecting),
            }
        }
        fn finish_writing(&mut self) -> io::Result<()> {
            self.0.borrow_mut().finished = true;
            Ok(())
        }
        fn reset_on_close(&mut self) {
            self.0.borrow_mut().reset = true;
        }
    }

    impl UdpSocket for Socket {
        fn send(&mut self, datagram: &[u8]) -> io::Result<usize> {
            self.write(datagram)
        }
        fn receive(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.read(buffer)
        }
    }

    /// Every dial gives the same socket.
    impl Network for Socket {
        type Tcp = Socket;
        type Udp = Socket;
        fn dial(&self, _: SocketAddr, _: Key) -> io::Result<Socket> {
            Ok(self.clone())
        }
        fn open(&self, _: SocketAddr, _: Key) -> io::Result<Socket> {
            Ok(self.clone())
        }
        fn listeners(&self, _: bool, _: u16) -> Vec<SocketAddr> {
            Vec::new()
        }
    }

    const READY: Ready = Ready {
        readable: true,
        writable: true,
        closed: false,
    };

    /// A session with one stream, the runner's end of its link, and the service's socket.
    fn with_stream() -> (Session<Socket>, Socket, Socket) {
        let (session, runner, service) = opened(2, false);
        let granted = 262_144u64.to_be_bytes().to_vec();
        assert_eq!(messages(&runner), [(kind::CONNECTED, granted)]);
        (session, runner, service)
    }

    fn opened(version: u64, connecting: bool) -> (Session<Socket>, Socket, Socket) {
        let (runner, service) = (Socket::default(), Socket::default());
        runner.0.borrow_mut().room = 1 << 20;
        service.0.borrow_mut().connecting = connecting;
        let link = Link::new(Box::new(runner.clone()));
        let v2 = version == 2;
        let mut session = Session::new(service.clone(), link, v2, &Settings::default());
        let connect = Header {
            port: 80,
            ..Header::new(kind::CONNECT, TCP, 7)
        };
        let limit = u64::MAX.to_be_bytes();
        session
            .process(&frame(connect, if v2 { &limit } else { &[] }))
            .unwrap();
        session.stream_ready(0, READY);
        session.turn(false).unwrap();
        (session, runner, service)
    }

    /// The other end's, or the service's, part in what the vectors call by these names.
    fn happens(event: &str, session: &mut Session<Socket>, service: &Socket) {
        let from_user = |kind| frame(Header::new(kind, TCP, 7), &[]);
        match event {
            "established" => service.0.borrow_mut().connecting = false,
            "local_eof" => service.0.borrow_mut().ended = true,
            "local_error" => service.0.borrow_mut().broken = Some(libc::ECONNRESET),
            "remote_eof" => session.process(&from_user(kind::EOF)).unwrap(),
            "remote_close" => session.process(&from_user(kind::CLOSE)).unwrap(),
            "remote_error" => session.process(&from_user(kind::ERROR)).unwrap(),
            "linger_over" => session.set_now(Instant::now() + session.context.settings.linger * 2),
            "link_lost" => return session.abandon(),
            other => panic!("no such event: {other}"),
        }
        if event == "local_error" && session.streams.find(7).is_some() {
            // Once the service has sent its end-of-file nothing but a write shows it.
            let data = frame(Header::new(kind::DATA, TCP, 7), b"x");
            session.process(&data).unwrap();
        }
        session.stream_ready(0, READY);
        session.turn(false).unwrap();
    }

    fn in_state(version: u64, state: &str) -> (Session<Socket>, Socket, Socket) {
        let (mut session, runner, service) = opened(version, state.starts_with("opening"));
        match state {
            "opening" | "open" => {}
            "opening_remote_ended" | "remote_ended" => {
                happens("remote_eof", &mut session, &service)
            }
            "local_ended" => happens("local_eof", &mut session, &service),
            "delivering" => {
                session
                    .process(&frame(Header::new(kind::DATA, TCP, 7), b"rest"))
                    .unwrap();
                happens("remote_close", &mut session, &service);
            }
            other => panic!("no such state: {other}"),
        }
        service.0.borrow_mut().room = 100;
        messages(&runner);
        (session, runner, service)
    }

    #[test]
    fn a_stream_goes_through_the_states_of_the_vectors() {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../../tests/vectors/states.json"
        );
        let path = std::env::var("KOHAKURIVER_VECTORS")
            .map_or(path.into(), |folder| folder + "/states.json");
        let rows = std::fs::read_to_string(path).unwrap();
        let rows: Vec<serde_json::Value> = serde_json::from_str(&rows).unwrap();
        let mut seen = 0;
        for row in &rows {
            let field = |name: &str| row[name].as_str().unwrap();
            // That a service's connection is gone shows as its end-of-file or as an error.
            if field("role") != "acceptor" || field("event") == "local_closed" {
                continue;
            }
            let (state, event) = (field("state"), field("event"));
            let version = row["version"].as_u64().unwrap();
            if state == "opening" && event == "local_eof" {
                continue; // nothing is read from a service before it is connected
            }
            let (mut session, runner, service) = in_state(version, state);
            happens(event, &mut session, &service);
            let actions: Vec<_> = row["actions"]
                .as_array()
                .unwrap()
                .iter()
                .map(|a| a.as_str().unwrap())
                .collect();
            let due: Vec<u8> = actions
                .iter()
                .filter_map(|action| sent_for(action))
                .collect();
            let sent: Vec<u8> = messages(&runner)
                .into_iter()
                .map(|(kind, _)| kind)
                .collect();
            assert_eq!(sent, due, "{row}");
            let alive = Rc::strong_count(&service.0) == 3;
            assert_eq!(
                session.streams.find(7).is_some(),
                !matches!(field("to"), "over" | "delivering"),
                "{row}"
            );
            let early = state.starts_with("opening");
            if field("to") == "over" || (field("to") == "delivering" && !early) {
                assert!(!alive, "{row}");
            }
            if !early && state != "delivering" {
                assert_eq!(
                    service.0.borrow().reset,
                    actions.contains(&"reset_local"),
                    "{row}"
                );
            }
            if actions.contains(&"shut_local") && !early {
                assert!(service.0.borrow().finished, "{row}");
            }
            seen += 1;
        }
        assert!(seen > 40, "{seen}");
    }

    fn sent_for(action: &str) -> Option<u8> {
        match action {
            "send_connected" => Some(kind::CONNECTED),
            "send_eof" => Some(kind::EOF),
            "send_close" => Some(kind::CLOSE),
            "send_error" => Some(kind::ERROR),
            _ => None,
        }
    }

    fn frame(header: Header, payload: &[u8]) -> Vec<u8> {
        let start = [0x82, (HEADER + payload.len()) as u8];
        [&start[..], &header.pack(), payload].concat()
    }

    /// Type and payload of what the runner was sent since the last time; all frames here are short.
    fn messages(runner: &Socket) -> Vec<(u8, Vec<u8>)> {
        let sent = std::mem::take(&mut runner.0.borrow_mut().written);
        let (mut rest, mut found) = (&sent[..], Vec::new());
        while let [0x82, length, a, b, c, d, body @ ..] = rest {
            let length = usize::from(length & 0x7f);
            let mut message = body[..length].to_vec();
            mask(&mut message, [*a, *b, *c, *d]);
            found.push((message[0], message[HEADER..].to_vec()));
            rest = &body[length..];
        }
        assert!(rest.is_empty());
        found
    }

    #[test]
    fn what_a_service_does_not_take_waits_and_its_end_of_file_behind_it() {
        let (mut session, _, service) = with_stream();
        service.0.borrow_mut().room = 3;
        session
            .process(&frame(Header::new(kind::DATA, TCP, 7), b"abcdef"))
            .unwrap();
        session
            .process(&frame(Header::new(kind::EOF, TCP, 7), &[]))
            .unwrap();
        assert_eq!(service.0.borrow().written, b"abc");
        assert!(!service.0.borrow().finished);
        service.0.borrow_mut().room = 10;
        session.stream_ready(0, READY);
        assert_eq!(service.0.borrow().written, b"abcdef");
        assert!(service.0.borrow().finished);
    }

    #[test]
    fn a_socket_that_was_full_is_tried_again_though_no_event_says_so() {
        let (mut session, _, service) = with_stream();
        session
            .process(&frame(Header::new(kind::DATA, TCP, 7), b"late"))
            .unwrap();
        service.0.borrow_mut().room = 10;
        session.set_now(Instant::now() + RETRY_EVERY);
        session.turn(true).unwrap();
        assert_eq!(service.0.borrow().written, b"late");
    }

    #[test]
    fn a_source_waits_while_the_link_takes_nothing() {
        let (mut session, runner, service) = with_stream();
        runner.0.borrow_mut().room = 0;
        service.0.borrow_mut().readable = b"first".to_vec();
        session.stream_ready(0, READY);
        session.turn(false).unwrap();
        service.0.borrow_mut().readable = b"second".to_vec();
        session.stream_ready(0, READY);
        session.turn(false).unwrap();
        assert_eq!(service.0.borrow().readable, b"second");
        runner.0.borrow_mut().room = 100;
        session.link_ready(READY);
        session.turn(false).unwrap();
        session.turn(false).unwrap();
        let data = |bytes: &[u8]| (kind::DATA, bytes.to_vec());
        assert_eq!(messages(&runner), [data(b"first"), data(b"second")]);
    }

    #[test]
    fn an_error_resets_the_service_and_frees_the_id() {
        let (mut session, runner, service) = with_stream();
        session
            .process(&frame(
                Header::new(kind::ERROR, TCP, 7),
                b"ECONNRESET: gone",
            ))
            .unwrap();
        assert!(service.0.borrow().reset);
        session
            .process(&frame(Header::new(kind::PING, TCP, 7), b"there?"))
            .unwrap();
        session.turn(false).unwrap();
        assert_eq!(messages(&runner), [(kind::PONG, b"there?".to_vec())]);
        assert_eq!(session.streams.find(7), None);
    }
}

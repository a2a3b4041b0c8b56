//! One client: its socket, its channels, and everything that they lead to, in one thread that never waits for one of them.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::{Duration, Instant};

use crate::auth::{Answer, Attempts, USERAUTH_REQUEST};
use crate::channel::{Channel, Ending, MOST_OUTPUT, PACKET, Session, Source, WINDOW, number};
use crate::forward::{self, Listener};
use crate::keys::is_authorized;
use crate::log;
use crate::server::{Shared, Stranger};
use crate::session::{self, AgentSocket, Asked, End, Order};
use crate::sftp;
use crate::sys::{self, Bell, Size};
use crate::transport::{Fatal, Transport, protocol_error, reason};
use crate::wire::{Put, Reader};

/// Until the client's version line, and until it proved who it is.
const GREETING: Duration = Duration::from_secs(10);
const LOGIN: Duration = Duration::from_secs(30);
/// For what is left to say when the connection ends.
const FAREWELL: Duration = Duration::from_secs(2);
const MOST_CHANNELS: usize = 512;
const MOST_LISTENERS: usize = 128;
/// What is read from the client before others have their turn.
const READ_TURN: usize = 512 * 1024;

const SERVICE_REQUEST: u8 = 5;
const SERVICE_ACCEPT: u8 = 6;
const USERAUTH_FAILURE: u8 = 51;
const USERAUTH_SUCCESS: u8 = 52;
const USERAUTH_PK_OK: u8 = 60;

/// Reasons why a channel isn't opened (RFC 4254 §5.1).
mod refusal {
    pub const PROHIBITED: u32 = 1;
    pub const CONNECT_FAILED: u32 = 2;
    pub const UNKNOWN_TYPE: u32 = 3;
    pub const SHORTAGE: u32 = 4;
}

/// What helpers in other threads report.
enum Event {
    /// A session's program has ended.
    Ended(u32, End),
    /// A forwarded connection was made, or wasn't.
    Connected(u32, io::Result<OwnedFd>),
}

/// What a ready descriptor belongs to.
#[derive(Clone, Copy)]
enum Token {
    Client,
    Bell,
    Sink(u32),
    Source(u32, usize),
    Listener(usize),
    Agent,
}

/// How helpers reach the connection's thread.
#[derive(Clone)]
struct Reporter {
    events: Sender<Event>,
    bell: Arc<Bell>,
}

impl Reporter {
    fn report(&self, event: Event) {
        // The connection may be gone.
        if self.events.send(event).is_ok() {
            self.bell.ring();
        }
    }
}

/// One client's connection.
pub struct Connection {
    shared: Arc<Shared>,
    stream: TcpStream,
    peer: String,
    ends: [(String, u16); 2],
    transport: Transport,
    attempts: Attempts,
    /// The client asked for the service that logs in.
    may_log_in: bool,
    user: Option<String>,
    /// Until the login, what counts this client among strangers; from then on its place.
    stranger: Option<Stranger>,
    _place: Option<Arc<()>>,
    more_sessions: bool,
    channels: BTreeMap<u32, Channel>,
    next_channel: u32,
    listeners: Vec<Listener>,
    agent: Option<AgentSocket>,
    reporter: Reporter,
    events: Receiver<Event>,
    began: Instant,
    at_end: bool,
}

impl Connection {
    /// Takes a client's socket.
    pub fn new(stream: TcpStream, shared: Arc<Shared>, stranger: Stranger) -> io::Result<Self> {
        let ends = [stream.peer_addr()?, stream.local_addr()?];
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        let (sender, events) = channel();
        Ok(Self {
            transport: Transport::new(shared.host_key.clone(), shared.rekey_bytes),
            shared,
            stream,
            peer: ends[0].to_string(),
            ends: ends.map(|end| (end.ip().to_string(), end.port())),
            attempts: Attempts::default(),
            may_log_in: false,
            user: None,
            stranger: Some(stranger),
            _place: None,
            more_sessions: true,
            channels: BTreeMap::new(),
            next_channel: 0,
            listeners: Vec::new(),
            agent: None,
            reporter: Reporter {
                events: sender,
                bell: Arc::new(Bell::new()?),
            },
            events,
            began: Instant::now(),
            at_end: false,
        })
    }

    /// Serves the client until one side ends it.
    pub fn run(mut self) {
        let end = loop {
            match self.turn() {
                Ok(true) => {}
                Ok(false) => break None,
                Err(why) => break Some(why),
            }
        };
        self.channels.clear();
        if let Some(Fatal::Ours(_, sentence)) = &end {
            log!("{}: {sentence}", self.peer);
        }
        if let Some(why) = end {
            self.transport.disconnect(&why);
            let _ = self.say_farewell();
        }
    }

    /// Sends what is left, and waits for the client to close: before that, data that nobody reads would have the system
    /// throw away our last words.
    fn say_farewell(&mut self) -> io::Result<()> {
        let end = Instant::now() + FAREWELL;
        self.stream.set_nonblocking(false)?;
        while !self.transport.output().is_empty() {
            self.stream.set_write_timeout(Some(until(end)?))?;
            let count = self.stream.write(self.transport.output())?;
            self.transport.sent(count);
        }
        self.stream.shutdown(Shutdown::Write)?;
        loop {
            self.stream.set_read_timeout(Some(until(end)?))?;
            if self.stream.read(&mut [0; 16 * 1024])? == 0 {
                return Ok(());
            }
        }
    }

    /// Waits for something to do, and does it. False when the client is gone.
    fn turn(&mut self) -> Result<bool, Fatal> {
        self.settle();
        if self.send_output().is_err() {
            return Ok(false);
        }
        let (mut descriptors, tokens) = self.interests();
        let patience = self.patience()?;
        if sys::wait(&mut descriptors, patience).is_err() {
            return Ok(false);
        }
        for (descriptor, token) in descriptors.iter().zip(tokens) {
            if descriptor.revents != 0 && !self.ready(token, descriptor.revents)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// How long to wait at most; an error where the client took too long to come in.
    fn patience(&self) -> Result<Option<Duration>, Fatal> {
        if self.user.is_some() {
            return Ok(None);
        }
        let limit = if self.transport.is_greeted() {
            LOGIN
        } else {
            GREETING
        };
        match limit.checked_sub(self.began.elapsed()) {
            Some(left) => Ok(Some(left)),
            None => Err(protocol_error("the login takes too long")),
        }
    }

    /// Grants, ends and removes what is due on every channel.
    fn settle(&mut self) {
        let transport = &mut self.transport;
        for channel in self.channels.values_mut() {
            if channel.is_leaving() && channel.may_send() {
                (0..2).for_each(|index| channel.pump(index, transport));
            }
            channel.grant(transport);
            channel.conclude(transport);
        }
        self.channels.retain(|_, channel| !channel.is_over());
        transport.rekey_if_due();
    }

    fn send_output(&mut self) -> io::Result<()> {
        while !self.transport.output().is_empty() {
            match self.stream.write(self.transport.output()) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => self.transport.sent(count),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn interests(&self) -> (Vec<libc::pollfd>, Vec<Token>) {
        let waiting = self.transport.output().len();
        let mut client = 0;
        if waiting > 0 {
            client |= libc::POLLOUT;
        }
        // A client that reads none of our answers gets no more of them.
        if waiting < 2 * MOST_OUTPUT {
            client |= libc::POLLIN;
        }
        let mut list = vec![(self.stream.as_raw_fd(), client, Token::Client)];
        list.push((self.reporter.bell.fd(), libc::POLLIN, Token::Bell));
        let may_send = self.transport.is_open() && waiting <= MOST_OUTPUT;
        for (id, channel) in &self.channels {
            list.extend(
                channel
                    .blocked_sink()
                    .map(|fd| (fd, libc::POLLOUT, Token::Sink(*id))),
            );
            for (index, source) in channel.sources.iter().enumerate() {
                if let Some(source) = source.as_ref().filter(|_| may_send && channel.may_send()) {
                    list.push((
                        source.fd.as_raw_fd(),
                        libc::POLLIN,
                        Token::Source(*id, index),
                    ));
                }
            }
        }
        if self.channels.len() < MOST_CHANNELS {
            for (index, listener) in self.listeners.iter().enumerate() {
                list.push((listener.fd(), libc::POLLIN, Token::Listener(index)));
            }
            list.extend(
                self.agent
                    .as_ref()
                    .map(|agent| (agent.fd(), libc::POLLIN, Token::Agent)),
            );
        }
        list.into_iter()
            .map(|(fd, events, token): (RawFd, _, _)| (sys::interest(fd, events), token))
            .unzip()
    }

    fn ready(&mut self, token: Token, events: libc::c_short) -> Result<bool, Fatal> {
        match token {
            Token::Client if events & !libc::POLLOUT != 0 => self.read_client()?,
            Token::Client => {}
            Token::Bell => self.take_events(),
            Token::Sink(id) => {
                if let Some(channel) = self.channels.get_mut(&id) {
                    channel.flush();
                }
            }
            Token::Source(id, index) => {
                if let Some(channel) = self.channels.get_mut(&id) {
                    channel.pump(index, &mut self.transport);
                }
            }
            Token::Listener(index) => self.accept_forward(index),
            Token::Agent => self.accept_agent(),
        }
        Ok(!self.at_end)
    }

    fn read_client(&mut self) -> Result<(), Fatal> {
        let mut total = 0;
        while total < READ_TURN {
            match self.stream.read(self.transport.space()) {
                Ok(0) => {
                    self.at_end = true;
                    return Ok(());
                }
                Ok(count) => {
                    total += count;
                    self.transport.advance(count);
                    while let Some(range) = self.transport.next_message()? {
                        self.message(range)?;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.at_end = error.kind() != io::ErrorKind::WouldBlock;
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn message(&mut self, range: Range<usize>) -> Result<(), Fatal> {
        let payload = self.transport.payload(range.clone());
        if payload[0] == number::DATA && self.user.is_some() {
            // The one message that isn't copied.
            let mut reader = Reader::new(&payload[1..]);
            let (id, data) = (reader.u32()?, reader.string()?);
            let taken = self
                .channels
                .get_mut(&id)
                .is_some_and(|channel| channel.take(data));
            return if taken {
                Ok(())
            } else {
                Err(protocol_error(
                    "data for no channel, or more than its window",
                ))
            };
        }
        let payload = payload.to_vec();
        let mut reader = Reader::new(&payload[1..]);
        match (payload[0], self.user.is_some()) {
            (SERVICE_REQUEST, _) => self.service(reader.string()?),
            (USERAUTH_REQUEST, false) if self.may_log_in => self.authenticate(&payload),
            (USERAUTH_REQUEST, false) => Err(protocol_error("ask for the service first")),
            (USERAUTH_REQUEST, true) => Ok(()),
            (number::GLOBAL_REQUEST.., false) => Err(protocol_error("log in first")),
            (number::GLOBAL_REQUEST, true) => self.global_request(&mut reader),
            (number::OPEN, true) => self.open(&mut reader),
            (number::OPEN_CONFIRMATION..=number::FAILURE, true) => {
                self.channel_message(payload[0], &mut reader)
            }
            _ => {
                self.transport.unimplemented();
                Ok(())
            }
        }
    }

    fn service(&mut self, name: &[u8]) -> Result<(), Fatal> {
        if name != b"ssh-userauth" && (name != b"ssh-connection" || self.user.is_none()) {
            return Err(Fatal::Ours(
                reason::SERVICE_NOT_AVAILABLE,
                "there is no such service".into(),
            ));
        }
        self.may_log_in = true;
        self.transport
            .send(SERVICE_ACCEPT, |message| message.put_string(name));
        Ok(())
    }

    fn authenticate(&mut self, payload: &[u8]) -> Result<(), Fatal> {
        let session = self
            .transport
            .session()
            .expect("keys were exchanged")
            .to_vec();
        let shared = self.shared.clone();
        let may_enter = |user: &str, blob: &[u8]| {
            // Read each time: a key that was added or removed counts at once.
            let keys = std::fs::read_to_string(&shared.authorized_keys).unwrap_or_default();
            shared.is_login(user) && is_authorized(&keys, blob)
        };
        match self.attempts.judge(payload, &session, may_enter)? {
            Answer::Success(user) => {
                let Some(place) = self.shared.connections.take(self.shared.most) else {
                    let sentence =
                        "too many connections to this task are open; close one and try again";
                    return Err(Fatal::Ours(reason::TOO_MANY_CONNECTIONS, sentence.into()));
                };
                self._place = Some(place);
                self.stranger = None;
                log!("{}: {user} was let in", self.peer);
                self.user = Some(user);
                self.transport.send(USERAUTH_SUCCESS, |_| {});
            }
            Answer::Failure => self.transport.send(USERAUTH_FAILURE, |message| {
                message.put_string(b"publickey");
                message.put_bool(false);
            }),
            Answer::Sign(algorithm, blob) => self.transport.send(USERAUTH_PK_OK, |message| {
                message.put_string(algorithm.as_bytes());
                message.put_string(&blob);
            }),
            Answer::Enough => {
                let sentence = "none of the keys that were tried is an authorized one";
                return Err(Fatal::Ours(reason::NO_MORE_AUTH_METHODS, sentence.into()));
            }
        }
        Ok(())
    }

    fn global_request(&mut self, reader: &mut Reader<'_>) -> Result<(), Fatal> {
        let (name, wants_reply) = (reader.string()?, reader.bool()?);
        // What a success carries; None is a failure.
        let mut answer: Option<Vec<u8>> = None;
        match name {
            b"tcpip-forward" => {
                let (host, port) = (reader.text()?, reader.u32()?);
                answer = self.listen(|| Listener::tcp(host, port)).map(|listener| {
                    let mut message = Vec::new();
                    if port == 0 {
                        message.put_u32(listener.port());
                    }
                    message
                });
            }
            b"streamlocal-forward@openssh.com" => {
                let path = OsString::from_vec(reader.string()?.to_vec());
                answer = self
                    .listen(|| Listener::unix(path.into()))
                    .map(|_| Vec::new());
            }
            b"cancel-tcpip-forward" => {
                let (host, port) = (reader.text()?, reader.u32()?);
                answer = self.unlisten(|listener| listener.is_tcp(host, port));
            }
            b"cancel-streamlocal-forward@openssh.com" => {
                let path = reader.string()?;
                answer = self.unlisten(|listener| listener.is_unix(path));
            }
            b"no-more-sessions@openssh.com" => {
                self.more_sessions = false;
                answer = Some(Vec::new());
            }
            // Above all keepalive@openssh.com, to which any answer is a sign of life.
            _ => {}
        }
        if wants_reply {
            match answer {
                Some(content) => self
                    .transport
                    .send(number::REQUEST_SUCCESS, |message| message.put_raw(&content)),
                None => self.transport.send(number::REQUEST_FAILURE, |_| {}),
            }
        }
        Ok(())
    }

    fn listen(&mut self, make: impl FnOnce() -> io::Result<Listener>) -> Option<&Listener> {
        if self.listeners.len() >= MOST_LISTENERS {
            return None;
        }
        match make() {
            Ok(listener) => self.listeners.push(listener),
            Err(error) => {
                log!("{}: can't listen for the client: {error}", self.peer);
                return None;
            }
        }
        self.listeners.last()
    }

    fn unlisten(&mut self, is_it: impl Fn(&Listener) -> bool) -> Option<Vec<u8>> {
        let place = self.listeners.iter().position(is_it)?;
        self.listeners.swap_remove(place);
        Some(Vec::new())
    }

    fn new_id(&mut self) -> u32 {
        let id = self.next_channel;
        // Numbers aren't used again, so what is reported late can't reach another channel.
        self.next_channel = self.next_channel.wrapping_add(1);
        id
    }

    fn open(&mut self, reader: &mut Reader<'_>) -> Result<(), Fatal> {
        let kind = reader.string()?;
        let (peer, window, packet) = (reader.u32()?, reader.u32()?, reader.u32()?);
        let channel = Channel::asked_by_peer(peer, window, packet);
        if self.channels.len() >= MOST_CHANNELS {
            self.refuse_channel(peer, refusal::SHORTAGE, "too many channels are open");
            return Ok(());
        }
        match kind {
            b"session" => self.open_session(channel),
            b"direct-tcpip" => {
                let (host, port) = (reader.text()?.to_owned(), reader.u32()?);
                self.connect(channel, move || forward::connect_tcp(&host, port));
            }
            b"direct-streamlocal@openssh.com" => {
                let path = OsString::from_vec(reader.string()?.to_vec());
                self.connect(channel, move || forward::connect_unix(path.as_ref()));
            }
            _ => self.refuse_channel(
                peer,
                refusal::UNKNOWN_TYPE,
                "there is no such kind of channel",
            ),
        }
        Ok(())
    }

    fn refuse_channel(&mut self, peer: u32, code: u32, sentence: &str) {
        self.transport.send(number::OPEN_FAILURE, |message| {
            message.put_u32(peer);
            message.put_u32(code);
            message.put_string(sentence.as_bytes());
            message.put_string(b"");
        });
    }

    fn open_session(&mut self, mut channel: Channel) {
        if !self.more_sessions {
            return self.refuse_channel(
                channel.peer(),
                refusal::PROHIBITED,
                "the client asked for no more sessions",
            );
        }
        let Some(place) = self.shared.take_place() else {
            return self.refuse_channel(
                channel.peer(),
                refusal::SHORTAGE,
                "too many sessions are open",
            );
        };
        channel.session = Some(Box::new(Session::holding(place)));
        let id = self.new_id();
        channel.accept(id, &mut self.transport);
        self.channels.insert(id, channel);
    }

    /// Makes a connection in a thread of its own: names and distant hosts take their time.
    fn connect(
        &mut self,
        channel: Channel,
        make: impl FnOnce() -> io::Result<OwnedFd> + Send + 'static,
    ) {
        let (id, peer) = (self.new_id(), channel.peer());
        let reporter = self.reporter.clone();
        let helper = move || reporter.report(Event::Connected(id, make()));
        match thread::Builder::new()
            .name("connect".into())
            .stack_size(256 * 1024)
            .spawn(helper)
        {
            Ok(_) => drop(self.channels.insert(id, channel)),
            Err(error) => self.refuse_channel(peer, refusal::SHORTAGE, &error.to_string()),
        }
    }

    fn take_events(&mut self) {
        self.reporter.bell.silence();
        while let Ok(event) = self.events.try_recv() {
            match event {
                Event::Ended(id, end) => {
                    if let Some(channel) = self.channels.get_mut(&id) {
                        channel.end_session(&end, &mut self.transport);
                    }
                }
                Event::Connected(id, result) => self.connected(id, result),
            }
        }
    }

    fn connected(&mut self, id: u32, result: io::Result<OwnedFd>) {
        match result {
            Ok(socket) => {
                if let Some(channel) = self.channels.get_mut(&id) {
                    channel.relay(socket);
                    channel.accept(id, &mut self.transport);
                }
            }
            Err(error) => {
                if let Some(channel) = self.channels.remove(&id) {
                    self.refuse_channel(
                        channel.peer(),
                        refusal::CONNECT_FAILED,
                        &error.to_string(),
                    );
                }
            }
        }
    }

    fn accept_forward(&mut self, index: usize) {
        match self.listeners.get(index).map(Listener::accept) {
            Some(Ok((socket, accepted))) => {
                self.ask_for_channel(socket, accepted.kind, &accepted.details);
            }
            Some(Err(error)) => pause_after(&error),
            None => {}
        }
    }

    fn accept_agent(&mut self) {
        let Some(agent) = &self.agent else { return };
        match agent.accept() {
            Ok(socket) => self.ask_for_channel(socket, "auth-agent@openssh.com", &[]),
            Err(error) => pause_after(&error),
        }
    }

    fn ask_for_channel(&mut self, socket: OwnedFd, kind: &str, details: &[u8]) {
        let id = self.new_id();
        self.channels.insert(id, Channel::asked_by_us(socket));
        self.transport.send(number::OPEN, |message| {
            message.put_string(kind.as_bytes());
            for value in [id, WINDOW, PACKET] {
                message.put_u32(value);
            }
            message.put_raw(details);
        });
    }

    fn channel_message(&mut self, kind: u8, reader: &mut Reader<'_>) -> Result<(), Fatal> {
        let id = reader.u32()?;
        let Some(channel) = self.channels.get_mut(&id) else {
            return Err(protocol_error("a message for a channel that doesn't exist"));
        };
        match kind {
            number::OPEN_CONFIRMATION | number::OPEN_FAILURE if !channel.is_ours() => {
                return Err(protocol_error("nobody asked for that channel"));
            }
            number::OPEN_CONFIRMATION if !channel.is_open() => {
                channel.confirm(reader.u32()?, reader.u32()?, reader.u32()?);
            }
            number::OPEN_FAILURE if !channel.is_open() => drop(self.channels.remove(&id)),
            number::SUCCESS | number::FAILURE => {}
            _ if !channel.is_open() => return Err(protocol_error("that channel isn't open")),
            number::WINDOW_ADJUST => {
                if !channel.widen(reader.u32()?) {
                    return Err(protocol_error("a window is too large"));
                }
            }
            // Nothing here takes a second kind of input; it counts against the window all the same.
            number::EXTENDED_DATA => {
                return Err(protocol_error("only a server has a standard error"));
            }
            number::EOF => channel.end_of_input(),
            number::CLOSE => channel.end_by_peer(&mut self.transport),
            number::REQUEST => return self.request(id, reader),
            _ => return Err(protocol_error("a channel can't be confirmed twice")),
        }
        Ok(())
    }

    fn request(&mut self, id: u32, reader: &mut Reader<'_>) -> Result<(), Fatal> {
        let (name, wants_reply) = (reader.string()?, reader.bool()?);
        let channel = self.channels.get_mut(&id).expect("the caller looked");
        let (peer, closed) = (channel.peer(), channel.is_closed());
        let done = channel.session.is_some()
            && match name {
                b"shell" => self.reply_then_start(id, wants_reply, None),
                b"exec" => self.reply_then_start(id, wants_reply, Some(reader.string()?)),
                _ => self.session_request(id, name, reader)?,
            };
        // What was started has had its answer.
        if wants_reply && !closed && !(done && matches!(name, b"shell" | b"exec")) {
            let answer = if done {
                number::SUCCESS
            } else {
                number::FAILURE
            };
            self.transport.send(answer, |message| message.put_u32(peer));
        }
        Ok(())
    }

    /// Requests that are answered afterwards. True where it was done.
    fn session_request(
        &mut self,
        id: u32,
        name: &[u8],
        reader: &mut Reader<'_>,
    ) -> Result<bool, Fatal> {
        let channel = self.channels.get_mut(&id).expect("the caller looked");
        let session = channel.session.as_mut().expect("the caller looked");
        Ok(match name {
            b"pty-req" if !session.started => {
                let kind = reader.text()?;
                let size = read_size(reader)?;
                match Asked::open(kind, size, reader.string()?) {
                    Ok(asked) => session.asked = Some(asked),
                    Err(error) => log!("{}: can't open a terminal: {error}", self.peer),
                }
                session.asked.is_some()
            }
            b"env" if !session.started => {
                let (variable, value) = (reader.text()?, reader.string()?);
                let allowed =
                    session::is_allowed_variable(variable) && session.variables.len() < 64;
                if allowed {
                    session
                        .variables
                        .insert(variable.into(), OsString::from_vec(value.to_vec()));
                }
                allowed
            }
            b"window-change" => {
                let size = read_size(reader)?;
                if let Some(master) = &session.master {
                    sys::resize(master.as_raw_fd(), size);
                }
                true
            }
            b"signal" => match (session::signal_number(reader.text()?), session.leader) {
                (Some(signal), Some(leader)) => {
                    sys::signal_group(leader, signal);
                    true
                }
                _ => false,
            },
            b"auth-agent-req@openssh.com" if !session.started => self.offer_agent(id),
            b"subsystem" if !session.started => reader.string()? == b"sftp" && self.start_sftp(id),
            _ => false,
        })
    }

    fn offer_agent(&mut self, id: u32) -> bool {
        if self.agent.is_none() {
            self.agent = AgentSocket::new(&self.shared.user.home)
                .inspect_err(|error| {
                    log!("{}: can't make a socket for the agent: {error}", self.peer)
                })
                .ok();
        }
        let session = self
            .channels
            .get_mut(&id)
            .and_then(|channel| channel.session.as_mut());
        let (Some(agent), Some(session)) = (&self.agent, session) else {
            return false;
        };
        session
            .variables
            .insert("SSH_AUTH_SOCK".into(), agent.path().into());
        true
    }

    fn start_sftp(&mut self, id: u32) -> bool {
        let channel = self.channels.get_mut(&id).expect("the caller looked");
        let reporter = self.reporter.clone();
        let home = self.shared.user.home.clone();
        let started = sftp::start(home, move || {
            reporter.report(Event::Ended(id, End::Exit(0)))
        });
        match started {
            Ok(socket) => {
                channel.session.as_mut().expect("the caller looked").started = true;
                channel.relay(socket);
                channel.flush();
                true
            }
            Err(error) => {
                log!("{}: can't serve files: {error}", self.peer);
                false
            }
        }
    }

    /// A program that can't be started is told as one that failed: that reaches the user.
    fn reply_then_start(&mut self, id: u32, wants_reply: bool, command: Option<&[u8]>) -> bool {
        const NOT_FOUND: u32 = 127;
        let channel = self.channels.get_mut(&id).expect("the caller looked");
        let session = channel.session.as_mut().expect("the caller looked");
        if std::mem::replace(&mut session.started, true) {
            return false;
        }
        let peer = channel.peer();
        if wants_reply {
            self.transport
                .send(number::SUCCESS, |message| message.put_u32(peer));
        }
        if let Err(sentence) = self.start(id, command) {
            let line = format!("tunnel-sshd: {sentence}\r\n");
            self.transport.send(number::EXTENDED_DATA, |message| {
                message.put_u32(peer);
                message.put_u32(1);
                message.put_string(line.as_bytes());
            });
            let channel = self.channels.get_mut(&id).expect("it is still there");
            channel.end_session(&End::Exit(NOT_FOUND), &mut self.transport);
        }
        true
    }

    fn start(&mut self, id: u32, command: Option<&[u8]>) -> Result<(), String> {
        let [(peer, peer_port), (own, own_port)] = &self.ends;
        let channel = self.channels.get_mut(&id).expect("the caller looked");
        let session = channel.session.as_mut().expect("the caller looked");
        let mut variables = std::mem::take(&mut session.variables);
        variables.insert(
            "SSH_CONNECTION".into(),
            format!("{peer} {peer_port} {own} {own_port}").into(),
        );
        variables.insert(
            "SSH_CLIENT".into(),
            format!("{peer} {peer_port} {own_port}").into(),
        );
        let asked = session.asked.take();
        let started = session::start(&Order {
            user: &self.shared.user,
            command,
            variables: &variables,
            asked: asked.as_ref(),
            files: self.shared.files,
        })?;
        session.leader = Some(started.child.id());
        if let Some(asked) = asked {
            let master = Arc::new(asked.terminal.master);
            session.master = Some(master.clone());
            channel.set_sink(master.clone(), Ending::Nothing);
            channel.sources[0] = Some(Source {
                fd: master,
                is_error: false,
            });
        }
        if let Some(stdin) = started.stdin {
            channel.set_sink(Arc::new(stdin), Ending::Close);
        }
        for (index, output) in started.outputs.into_iter().enumerate() {
            channel.sources[index] = Some(Source {
                fd: Arc::new(output),
                is_error: index == 1,
            });
        }
        channel.flush();
        self.watch(id, started.child)
    }

    fn watch(&self, id: u32, mut child: std::process::Child) -> Result<(), String> {
        let reporter = self.reporter.clone();
        let helper = move || {
            if let Ok(status) = child.wait() {
                reporter.report(Event::Ended(id, status.into()));
            }
        };
        let spawned = thread::Builder::new()
            .name("wait".into())
            .stack_size(64 * 1024)
            .spawn(helper);
        spawned
            .map(drop)
            .map_err(|error| format!("can't watch the program: {error}"))
    }
}

/// Where the system gives no more descriptors, a listener stays ready: that must not be a busy loop.
fn pause_after(error: &io::Error) {
    const PAUSE: Duration = Duration::from_millis(5);
    if error.kind() != io::ErrorKind::WouldBlock {
        thread::sleep(PAUSE);
    }
}

/// What is left of the time until `end`; an error where nothing is.
fn until(end: Instant) -> io::Result<Duration> {
    let left = end.checked_duration_since(Instant::now());
    left.filter(|left| !left.is_zero())
        .ok_or_else(|| io::ErrorKind::TimedOut.into())
}

fn read_size(reader: &mut Reader<'_>) -> Result<Size, Fatal> {
    let characters = (reader.u32()?, reader.u32()?);
    Ok(Size {
        characters,
        pixels: (reader.u32()?, reader.u32()?),
    })
}

/// Counts what holds a place, by who still has one.
#[derive(Default)]
pub struct Places(std::sync::Mutex<Vec<Weak<()>>>);

impl Places {
    /// A place, unless `most` are taken. It is free again when what this gives is dropped.
    pub fn take(&self, most: usize) -> Option<Arc<()>> {
        let mut places = self
            .0
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        places.retain(|place| place.strong_count() > 0);
        (places.len() < most).then(|| {
            let place = Arc::new(());
            places.push(Arc::downgrade(&place));
            place
        })
    }
}

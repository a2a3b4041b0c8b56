//! One client: its socket, its channels, and everything that they lead to, in one thread that never waits for one of them.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use crate::auth::{Login, USERAUTH_REQUEST};
use crate::channel::{Channel, MOST_OUTPUT, number};
use crate::forward::Forwards;
use crate::log;
use crate::session::End;
use crate::shared::{Shared, Stranger};
use crate::sys::{self, Bell};
use crate::transport::{Fatal, Transport, protocol_error};
use crate::wire::Reader;

mod channels;
mod requests;

/// For what is left to say when the connection ends.
const FAREWELL: Duration = Duration::from_secs(2);
const MOST_CHANNELS: usize = 512;
/// What is read from the client before others have their turn.
const READ_TURN: usize = 512 * 1024;

const SERVICE_REQUEST: u8 = 5;

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
    Forward(usize),
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
    login: Login,
    more_sessions: bool,
    channels: BTreeMap<u32, Channel>,
    next_channel: u32,
    forwards: Forwards,
    reporter: Reporter,
    events: Receiver<Event>,
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
            transport: Transport::new(
                shared.host_keys.clone(),
                shared.algorithms,
                shared.rekey_bytes,
            ),
            shared,
            stream,
            peer: ends[0].to_string(),
            ends: ends.map(|end| (end.ip().to_string(), end.port())),
            login: Login::of(stranger),
            more_sessions: true,
            channels: BTreeMap::new(),
            next_channel: 0,
            forwards: Forwards::default(),
            reporter: Reporter {
                events: sender,
                bell: Arc::new(Bell::new()?),
            },
            events,
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
        let patience = self.login.patience(self.transport.is_greeted())?;
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
            let forwards = self.forwards.descriptors();
            list.extend(forwards.map(|(fd, place)| (fd, libc::POLLIN, Token::Forward(place))));
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
            Token::Forward(place) => self.accept_forward(self.forwards.accept(place)),
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
        if payload[0] == number::DATA && self.login.is_done() {
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
        match (payload[0], self.login.is_done()) {
            (SERVICE_REQUEST, _) => self.login.service(reader.string()?, &mut self.transport),
            (USERAUTH_REQUEST, _) => {
                let (shared, transport) = (&self.shared, &mut self.transport);
                self.login.request(&payload, &self.peer, shared, transport)
            }
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
}

/// What is left of the time until `end`; an error where nothing is.
fn until(end: Instant) -> io::Result<Duration> {
    let left = end.checked_duration_since(Instant::now());
    left.filter(|left| !left.is_zero())
        .ok_or_else(|| io::ErrorKind::TimedOut.into())
}

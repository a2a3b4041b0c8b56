//! One channel of the connection protocol: descriptors here, windows towards the client (RFC 4254 §5).

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::process::Child;
use std::sync::Arc;

use crate::session::{Session, Started};
use crate::sys;
use crate::terminal::Asked;
use crate::transport::Transport;
use crate::wire::Put;

mod end;
mod sink;

pub use sink::Ending;
use sink::Sink;

/// What a client may send before it is told that it was taken. A sink that stalls holds so much in memory, no more.
pub const WINDOW: u32 = 4 * 1024 * 1024;
/// What is taken before the client is told.
const GRANT: u32 = WINDOW / 8;
/// The most data in one message.
pub const PACKET: u32 = 32 * 1024;
/// What may wait for the client's socket before descriptors aren't read any more.
pub const MOST_OUTPUT: usize = 512 * 1024;
/// What one descriptor may send before the next has its turn.
const TURN: usize = 4;

/// Message numbers of RFC 4254.
pub mod number {
    #![allow(missing_docs)]
    pub const GLOBAL_REQUEST: u8 = 80;
    pub const REQUEST_SUCCESS: u8 = 81;
    pub const REQUEST_FAILURE: u8 = 82;
    pub const OPEN: u8 = 90;
    pub const OPEN_CONFIRMATION: u8 = 91;
    pub const OPEN_FAILURE: u8 = 92;
    pub const WINDOW_ADJUST: u8 = 93;
    pub const DATA: u8 = 94;
    pub const EXTENDED_DATA: u8 = 95;
    pub const EOF: u8 = 96;
    pub const CLOSE: u8 = 97;
    pub const REQUEST: u8 = 98;
    pub const SUCCESS: u8 = 99;
    pub const FAILURE: u8 = 100;
}

/// Where data for the client comes from.
pub struct Source {
    /// What is read.
    pub fd: Arc<OwnedFd>,
    /// Is it the program's standard error?
    pub is_error: bool,
}

/// One channel.
pub struct Channel {
    peer: u32,
    window: u32,
    packet: u32,
    granted: u32,
    taken: u32,
    sink: Sink,
    /// At most standard output and standard error.
    pub sources: [Option<Source>; 2],
    /// None for forwarded connections.
    pub session: Option<Box<Session>>,
    ours: bool,
    open: bool,
    eof_received: bool,
    eof_sent: bool,
    close_sent: bool,
    close_received: bool,
}

impl Channel {
    /// A channel that the client asked for; it isn't open yet.
    pub fn asked_by_peer(peer: u32, window: u32, packet: u32) -> Self {
        Self {
            peer,
            window,
            packet: packet.min(PACKET),
            granted: WINDOW,
            taken: 0,
            sink: Sink::default(),
            sources: [None, None],
            session: None,
            ours: false,
            open: false,
            eof_received: false,
            eof_sent: false,
            close_sent: false,
            close_received: false,
        }
    }

    /// A channel that we ask the client for, for the connection `socket`.
    pub fn asked_by_us(socket: OwnedFd) -> Self {
        let mut channel = Self::asked_by_peer(0, 0, 0);
        channel.ours = true;
        channel.relay(socket);
        channel
    }

    /// The client agreed to what we asked for.
    pub fn confirm(&mut self, peer: u32, window: u32, packet: u32) {
        (self.peer, self.window, self.packet) = (peer, window, packet.min(PACKET));
        self.open = true;
    }

    /// Agrees to what the client asked for; the channel is `id` here.
    pub fn accept(&mut self, id: u32, transport: &mut Transport) {
        self.open = true;
        let peer = self.peer;
        transport.send(number::OPEN_CONFIRMATION, |message| {
            for value in [peer, id, WINDOW, PACKET] {
                message.put_u32(value);
            }
        });
    }

    /// Was it us who asked for it?
    pub fn is_ours(&self) -> bool {
        self.ours
    }

    /// Is it open, from both sides' point of view?
    pub fn is_open(&self) -> bool {
        self.open
    }

    /// Has our side said that it is over?
    pub fn is_closed(&self) -> bool {
        self.close_sent
    }

    /// The client's number for it.
    pub fn peer(&self) -> u32 {
        self.peer
    }

    /// Both directions over one socket.
    pub fn relay(&mut self, socket: OwnedFd) {
        let fd = Arc::new(socket);
        self.set_sink(fd.clone(), Ending::ShutDown);
        self.sources[0] = Some(Source {
            fd,
            is_error: false,
        });
    }

    /// Relays a session's program, by the terminal that it runs in or by its pipes; gives the program back.
    pub fn attach(&mut self, asked: Option<Asked>, started: Started) -> Child {
        if let Some(session) = &mut self.session {
            session.leader = Some(started.child.id());
        }
        if let Some(asked) = asked {
            let master = Arc::new(asked.terminal.master);
            if let Some(session) = &mut self.session {
                session.master = Some(master.clone());
            }
            self.set_sink(master.clone(), Ending::Nothing);
            self.sources[0] = Some(Source {
                fd: master,
                is_error: false,
            });
        }
        if let Some(stdin) = started.stdin {
            self.set_sink(Arc::new(stdin), Ending::Close);
        }
        for (index, output) in started.outputs.into_iter().enumerate() {
            self.sources[index] = Some(Source {
                fd: Arc::new(output),
                is_error: index == 1,
            });
        }
        self.flush();
        started.child
    }

    /// Where data goes from now on.
    pub fn set_sink(&mut self, fd: Arc<OwnedFd>, ending: Ending) {
        self.sink.set(fd, ending);
    }

    /// The client may send `more` bytes.
    pub fn widen(&mut self, more: u32) -> bool {
        let window = self.window.checked_add(more);
        self.window = window.unwrap_or(self.window);
        window.is_some()
    }

    /// Takes data of the client. False where it sent more than it may.
    pub fn take(&mut self, data: &[u8]) -> bool {
        let length = data.len() as u32;
        if self.close_sent || self.close_received {
            return true;
        }
        if length > self.granted || self.eof_received {
            return false;
        }
        self.granted -= length;
        let keeps = self.is_idle_session();
        self.taken += self.sink.take(data, keeps);
        true
    }

    /// The sink is writable: gives it what waits, and then the end if the client sent that.
    pub fn flush(&mut self) {
        let keeps = self.is_idle_session();
        self.taken += self.sink.flush(keeps, self.eof_received);
    }

    /// The client sends no more data.
    pub fn end_of_input(&mut self) {
        self.eof_received = true;
        self.flush();
    }

    /// Tells the client what was taken, so that it may send as much again.
    pub fn grant(&mut self, transport: &mut Transport) {
        if self.taken >= GRANT && !self.eof_received && !self.close_sent && self.open {
            let (peer, taken) = (self.peer, std::mem::take(&mut self.taken));
            self.granted += taken;
            transport.send(number::WINDOW_ADJUST, |message| {
                message.put_u32(peer);
                message.put_u32(taken);
            });
        }
    }

    /// The sink, where something waits for it.
    pub fn blocked_sink(&self) -> Option<RawFd> {
        self.sink.blocked()
    }

    /// May data be sent to the client now?
    pub fn may_send(&self) -> bool {
        self.open && self.window > 0 && !self.close_sent
    }

    /// Reads one source while it has something and the client may get it.
    pub fn pump(&mut self, index: usize, transport: &mut Transport) {
        let Some(source) = &self.sources[index] else {
            return;
        };
        let fd = source.fd.as_raw_fd();
        let mut head = vec![if source.is_error {
            number::EXTENDED_DATA
        } else {
            number::DATA
        }];
        head.put_u32(self.peer);
        if source.is_error {
            head.put_u32(1);
        }
        for _ in 0..TURN {
            transport.rekey_if_due();
            let room = self.window.min(self.packet) as usize;
            if room == 0 || !transport.is_open() || transport.output().len() > MOST_OUTPUT {
                return;
            }
            match transport.send_string(&head, room, |space| sys::read(fd, space)) {
                Ok(count) if count > 0 => self.window -= count as u32,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // What a program that is gone left running doesn't keep its terminal.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock && !self.is_leaving() => {
                    return;
                }
                // A terminal's end is an error (EIO).
                _ => {
                    self.sources[index] = None;
                    return;
                }
            }
        }
    }

    /// Has the program in a terminal ended? What it wrote last is still to be read.
    pub fn is_leaving(&self) -> bool {
        self.session
            .as_ref()
            .is_some_and(|session| session.ended && session.master.is_some())
    }

    /// A session that no program was started for.
    fn is_idle_session(&self) -> bool {
        let session = self.session.as_ref();
        session.is_some_and(|session| !session.started)
    }
}

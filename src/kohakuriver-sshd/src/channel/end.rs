//! How a channel ends: each direction by itself, then both sides say that it is over (RFC 4254 §5.3, §6.10).

use super::{Channel, Sink, number};
use crate::session::{End, Session};
use crate::transport::Transport;
use crate::wire::Put;

impl Channel {
    /// The session's program has ended.
    pub fn end_session(&mut self, end: &End, transport: &mut Transport) {
        let Some(session) = &mut self.session else {
            return;
        };
        session.ended = true;
        session.leader = None;
        if self.close_sent {
            return;
        }
        let peer = self.peer;
        transport.send(number::REQUEST, |message| put_end(message, peer, end));
    }

    /// Sends the end of data, and the end of the channel, where it is time for them.
    pub fn conclude(&mut self, transport: &mut Transport) {
        let busy = self.sources.iter().any(Option::is_some);
        if !self.open || self.close_sent || busy || self.is_idle_session() {
            return;
        }
        if !self.eof_sent && !self.close_received {
            self.eof_sent = true;
            let peer = self.peer;
            transport.send(number::EOF, |message| message.put_u32(peer));
        }
        let over = match &self.session {
            Some(session) => session.ended,
            // A socket that can't be written any more, or was ended.
            None => !self.sink.is_there(),
        };
        if over {
            self.close(transport);
        }
    }

    /// The client ended the channel. How the program ends is told all the same: clients close as soon as both directions
    /// of data have ended, and that may be before.
    pub fn end_by_peer(&mut self, transport: &mut Transport) {
        self.close_received = true;
        let running = |session: &Session| session.started && !session.ended;
        if self.session.as_deref().is_some_and(running) {
            self.let_go();
            // A program that loses its terminal is told so by the kernel.
            if let Some(session) = &mut self.session {
                session.master = None;
            }
        } else {
            self.close(transport);
        }
    }

    /// Have both sides said that it is over?
    pub fn is_over(&self) -> bool {
        self.close_sent && self.close_received
    }

    /// Ends the channel from our side; it is gone once the client agrees.
    fn close(&mut self, transport: &mut Transport) {
        if !self.close_sent {
            self.close_sent = true;
            let peer = self.peer;
            transport.send(number::CLOSE, |message| message.put_u32(peer));
        }
        self.let_go();
        self.session = None;
    }

    fn let_go(&mut self) {
        self.sink = Sink::default();
        self.sources = [None, None];
    }
}

/// RFC 4254 §6.10.
fn put_end(message: &mut Vec<u8>, peer: u32, end: &End) {
    message.put_u32(peer);
    match end {
        End::Exit(code) => {
            message.put_string(b"exit-status");
            message.put_bool(false);
            message.put_u32(*code);
        }
        End::Signal(name, core) => {
            message.put_string(b"exit-signal");
            message.put_bool(false);
            message.put_string(name.as_bytes());
            message.put_bool(*core);
            message.put_string(b"");
            message.put_string(b"");
        }
    }
}

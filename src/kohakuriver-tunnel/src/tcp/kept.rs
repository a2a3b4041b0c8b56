//! A TCP stream that outlives its link: what it keeps, what it tells of, and how it goes on (docs/protocol.md §3,
//! "Streams that outlive links").

use std::io;

use super::Tcp;
use crate::context::{Context, Fate};
use crate::kept::Kept;
use crate::net::TcpSocket;
use crate::protocol::{self, Header, Opening, Resuming, TCP, UNKNOWN_TOTAL, kind};
use crate::registry::Ending;
use crate::retained::Retained;
use crate::streams::Key;

/// A read of so many bytes is worth to be kept where it was read.
const BULK: usize = 16 << 10;
const NEVER_SENT: &str = "EPROTO: more was acknowledged than was sent, or less than before";
const WRONG_TOTAL: &str = "EPROTO: the end-of-file is not behind the last byte";
const FORSAKEN: &str = "ETIMEDOUT: nobody came back to the connection for as long as it is held";

/// What such a stream has beside the rest.
pub(super) struct KeptTcp {
    base: Kept,
    /// What the user's end has not acknowledged; behind it is what was not read yet.
    pub(super) retained: Retained,
    /// What it was told last that we received.
    told: u64,
    /// It is in the list of those that are owed an ACK.
    listed: bool,
    eof_acked: bool,
    /// The last read was a large one, and so may be the next.
    bulk: bool,
}

impl KeptTcp {
    pub(super) fn new(opening: &Opening, key: Key, context: &mut Context) -> Self {
        Self {
            base: Kept::new(opening, key, context),
            retained: Retained::new(context.keeping.account(&opening.mark)),
            told: 0,
            listed: false,
            eof_acked: false,
            bulk: false,
        }
    }
}

impl<S: TcpSocket> Tcp<S> {
    /// What the stream has if it outlives its link, and has not ended.
    pub fn kept(&mut self) -> Option<&mut Kept> {
        self.kept.as_mut().map(|kept| &mut kept.base)
    }

    /// The port that it was opened with.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// What it was opened as.
    pub fn proto(&self) -> u8 {
        self.proto
    }

    // ---- what arrives --------------------------------------------------------------------------

    /// ACK.
    pub fn on_ack(&mut self, payload: &[u8], context: &mut Context) -> Fate {
        match protocol::limit(payload) {
            Some(received) if self.kept.is_some() => {
                self.acknowledged_in_passing(received, context)
            }
            _ => {
                context.counters.ignored += 1;
                Fate::Live
            }
        }
    }

    pub(super) fn on_kept_window(&mut self, payload: &[u8], context: &mut Context) -> Fate {
        let Some([limit, received]) = protocol::pair(payload) else {
            context.counters.ignored += 1;
            return Fate::Live;
        };
        self.raise(limit, context);
        self.acknowledged_in_passing(received, context)
    }

    pub(super) fn on_kept_eof(&mut self, payload: &[u8], context: &mut Context) -> Fate {
        let Some([total, received]) = protocol::pair(payload) else {
            context.counters.ignored += 1;
            return Fate::Live;
        };
        if total != self.bytes_received() {
            return self.end_with(WRONG_TOTAL, context);
        }
        if !self.acknowledge(received, context) {
            return self.end_with(NEVER_SENT, context);
        }
        self.eof_in = true;
        self.owe(context);
        self.drain(context)
    }

    fn acknowledged_in_passing(&mut self, received: u64, context: &mut Context) -> Fate {
        if !self.acknowledge(received, context) {
            return self.end_with(NEVER_SENT, context);
        }
        if self.readable {
            context.schedule(self.key);
        }
        self.if_over(context)
    }

    /// The user's end has so much of what we sent; false if we never sent that.
    fn acknowledge(&mut self, received: u64, context: &mut Context) -> bool {
        let Some(kept) = &mut self.kept else {
            return true;
        };
        let end = kept.retained.end();
        if received > end + u64::from(self.out_done) {
            return false;
        }
        kept.retained.release(received, &mut context.keeping);
        kept.eof_acked |= received > end;
        true
    }

    // ---- what is told --------------------------------------------------------------------------

    fn bytes_received(&self) -> u64 {
        self.receiving
            .as_ref()
            .map_or(0, |window| window.received())
    }

    /// What a message tells that we have received; it need not be told again.
    pub(super) fn tell_received(&mut self) -> u64 {
        let received = self.bytes_received() + u64::from(self.eof_in);
        if let Some(kept) = &mut self.kept {
            kept.told = received;
        }
        received
    }

    /// Notes that something came that has to be told of within a second.
    pub(super) fn owe(&mut self, context: &mut Context) {
        if let Some(kept) = &mut self.kept
            && !kept.listed
        {
            kept.listed = true;
            context.registry.owe(self.key, context.now);
        }
    }

    /// The time has come to tell what was received, if nothing else has by now.
    pub fn pay(&mut self, context: &mut Context) {
        let Some(kept) = &mut self.kept else { return };
        kept.listed = false;
        let before = kept.told;
        // RESUMED tells those that no link has.
        if self.id != 0
            && let received = self.tell_received()
            && received > before
        {
            self.tell(kind::ACK, &protocol::pack([received]), context);
        }
    }

    pub(super) fn send_eof(&mut self, context: &mut Context) {
        let Some(kept) = &self.kept else { return };
        let total = kept.retained.end();
        let received = self.tell_received();
        self.tell(kind::EOF, &protocol::pack([total, received]), context);
    }

    // ---- what is sent --------------------------------------------------------------------------

    /// How much to read from the service: bulk that is to be kept goes where it can stay.
    pub(super) fn reserve(&mut self, most: usize, context: &mut Context) -> usize {
        let Some(kept) = self.kept.as_mut().filter(|kept| kept.bulk) else {
            return most;
        };
        match kept.retained.reserve(&mut context.keeping) {
            0 => {
                kept.bulk = false;
                kept.retained.fill(0, &mut context.keeping);
                most
            }
            room => room.min(most),
        }
    }

    pub(super) fn read(&mut self, most: usize, context: &mut Context) -> io::Result<usize> {
        match &mut self.kept {
            Some(kept) if kept.bulk => self.sock.read(&mut kept.retained.spare()[..most]),
            _ => self.sock.read(&mut context.link.payload()[..most]),
        }
    }

    /// Keeps what was read, which may be nothing.
    pub(super) fn keep(&mut self, length: usize, context: &mut Context) {
        let Some(kept) = &mut self.kept else { return };
        if kept.bulk {
            kept.retained.fill(length, &mut context.keeping);
        } else if length > 0 {
            // Here it is in the cache, and not yet masked.
            let bytes = &context.link.payload()[..length];
            kept.retained.push(bytes, &mut context.keeping);
        }
    }

    /// Sends what was read.
    pub(super) fn send(&mut self, length: usize, context: &mut Context) -> io::Result<()> {
        let header = self.count_sent(length, context);
        let Some(kept) = &mut self.kept else {
            return context.link.send_payload(header, length);
        };
        if std::mem::replace(&mut kept.bulk, length >= BULK) {
            context.link.send_copy(header, kept.retained.last(length))
        } else {
            context.link.send_payload(header, length)
        }
    }

    // ---- going on ------------------------------------------------------------------------------

    /// Whether something that was sent over an earlier link has to be sent again.
    pub(super) fn is_behind(&self) -> bool {
        self.id != 0
            && self
                .kept
                .as_ref()
                .is_some_and(|kept| self.sent < kept.retained.end())
    }

    /// One turn as a source of what is kept.
    pub(super) fn resend(&mut self, context: &mut Context) -> io::Result<(Fate, bool)> {
        let most = context.chunk(self.key);
        let room = usize::try_from(self.limit.saturating_sub(self.sent)).unwrap_or(usize::MAX);
        let Some(kept) = self.kept.as_ref().filter(|_| room > 0) else {
            return Ok((Fate::Live, false));
        };
        let piece = kept.retained.piece(self.sent);
        let piece = &piece[..piece.len().min(most).min(room)];
        let header = Header::new(kind::DATA, TCP, self.id);
        context.link.send_copy(header, piece)?;
        self.sent += piece.len() as u64;
        if self.is_behind() {
            return Ok((Fate::Live, true));
        }
        if self.out_done {
            self.send_eof(context);
        }
        Ok((Fate::Live, self.readable))
    }

    /// RESUME: under `id` from now on. The epoch is higher than the last.
    pub fn resume(&mut self, id: u32, resuming: &Resuming, context: &mut Context) -> Fate {
        self.id = id;
        self.sock.attend(true);
        let Some(kept) = &mut self.kept else {
            return Fate::Live;
        };
        kept.base.resume(resuming.epoch, context);
        let lost = resuming.received < kept.retained.start();
        if lost || !self.acknowledge(resuming.received, context) {
            return self.end_with(NEVER_SENT, context);
        }
        let received = self.bytes_received();
        if resuming.total < received || (self.eof_in && resuming.total != received) {
            return self.end_with(WRONG_TOTAL, context);
        }
        self.limit = self.limit.max(resuming.limit);
        if let Some(receiving) = &mut self.receiving {
            receiving.attach(&mut context.budget);
        }
        let kept_to = self.kept.as_ref().map_or(0, |kept| kept.retained.end());
        self.sent = resuming.received.min(kept_to);
        self.resumed(context);
        self.drain(context)
    }

    /// RESUMED, and what has to be sent again.
    fn resumed(&mut self, context: &mut Context) {
        let received = self.tell_received();
        let granted = self.receiving.as_ref().map_or(0, |window| window.granted());
        let Some(kept) = &self.kept else { return };
        let (end, eof_acked) = (kept.retained.end(), kept.eof_acked);
        let total = if self.out_done { end } else { UNKNOWN_TOTAL };
        self.tell(
            kind::RESUMED,
            &protocol::pack([received, granted, total]),
            context,
        );
        if self.out_done && !eof_acked && !self.is_behind() {
            self.send_eof(context);
        }
        if self.readable || self.is_behind() {
            context.schedule(self.key);
        }
    }

    /// No link has the stream any more; it is held for as many seconds, and as it was opened for, at most.
    pub fn detach(&mut self, hold: u32, context: &mut Context) {
        self.id = 0;
        self.sock.attend(false);
        if let Some(receiving) = &mut self.receiving {
            receiving.close(&mut context.budget);
        }
        let queued = self.queue.len() as u64;
        if let Some(kept) = &mut self.kept {
            let for_user = kept.retained.memory();
            kept.base
                .detach(self.key, hold, queued + for_user, for_user, context);
        }
    }

    // ---- the end -------------------------------------------------------------------------------

    /// Whether nothing is left to do for a stream whose directions have both ended: of one that outlives its link the
    /// user's end has to know, and is then told.
    pub(super) fn may_end(&mut self, context: &mut Context) -> bool {
        match &self.kept {
            Some(kept) if !kept.eof_acked => return false,
            Some(_) => {
                if let Some(id) = self.id() {
                    context.send_late(Header::new(kind::CLOSE, TCP, id));
                }
            }
            None => {}
        }
        self.bury_well(context);
        true
    }

    /// Ends the stream with an ERROR that says `text`.
    pub fn end_with(&mut self, text: &str, context: &mut Context) -> Fate {
        self.tell(kind::ERROR, text.as_bytes(), context);
        self.bury_with(text, context);
        self.abort()
    }

    pub(super) fn is_forsaken(&mut self, context: &mut Context) -> bool {
        let key = self.key;
        self.kept()
            .is_some_and(|kept| kept.is_forsaken(key, context))
    }

    pub(super) fn forsaken(&mut self, context: &mut Context) -> Fate {
        self.end_with(FORSAKEN, context)
    }

    pub(super) fn bury_well(&mut self, context: &mut Context) {
        let received = self.tell_received();
        let total = self.kept.as_ref().map_or(0, |kept| kept.retained.end());
        self.bury(Ending::Well { received, total }, context);
    }

    pub(super) fn bury_with(&mut self, text: &str, context: &mut Context) {
        if self.kept.is_some() {
            self.bury(Ending::error(text), context);
        }
    }

    fn bury(&mut self, ending: Ending, context: &mut Context) {
        if let Some(mut kept) = self.kept.take() {
            kept.retained.release(u64::MAX, &mut context.keeping);
            kept.base.bury(self.port, self.proto, ending, context);
        }
    }
}

//! The session's part in streams that outlive their link: whose they are, which link has them, and when they end
//! (docs/protocol.md §3, "Streams that outlive links").

use super::{Session, Stream};
use crate::context::Fate;
use crate::kept::Kept;
use crate::log;
use crate::net::Network;
use crate::protocol::{self, Header, Mark, Resuming, UDP, kind};
use crate::registry::{Ending, Owner};
use crate::streams::Key;
use crate::tcp::Tcp;

const UNKNOWN: &str = "ESTALE: the container's end does not have that connection";
const NOT_NEWER: &str = "ESTALE: the connection has been taken up again since";
const FORGOTTEN: &str = "ECONNRESET: the user's end does not have that connection any more";
const TOO_MANY: &str = "ENOBUFS: too many connections wait for their users to come back";

impl<N: Network> Stream<N> {
    fn kept(&mut self) -> Option<&mut Kept> {
        match self {
            Self::Tcp(tcp) => tcp.kept(),
            Self::Udp(udp) => udp.kept(),
        }
    }

    fn id(&self) -> Option<u32> {
        match self {
            Self::Tcp(tcp) => tcp.id(),
            Self::Udp(udp) => udp.id(),
        }
    }

    fn owner(&mut self) -> Option<Owner> {
        let (port, proto) = match self {
            Self::Tcp(tcp) => (tcp.port(), tcp.proto()),
            Self::Udp(udp) => (udp.port(), UDP),
        };
        let mark = *self.kept()?.mark();
        Some(Owner { mark, port, proto })
    }
}

impl<N: Network> Session<N> {
    /// A message that only such streams have.
    pub(super) fn of_kept(&mut self, header: Header, payload: &[u8]) {
        match (header.kind, header.id) {
            (kind::RESUME, 0) => self.call_roll(payload),
            (kind::RESUME, _) => self.resume(header, payload),
            (kind::DETACH, 1..) => self.detached(header.id, payload),
            (kind::REVOKE, 0) => self.revoke(payload),
            (kind::ACK, 1..) => {
                self.with_tcp(header.id, |tcp, context| tcp.on_ack(payload, context))
            }
            _ => self.context.counters.ignored += 1,
        }
    }

    // ---- attaching -----------------------------------------------------------------------------

    fn resume(&mut self, header: Header, payload: &[u8]) {
        let free = self.streams.find(header.id).is_none();
        let Some(resuming) = Resuming::parse(payload).filter(|_| free) else {
            self.context.counters.ignored += 1;
            return;
        };
        let owner = Owner {
            mark: resuming.mark,
            port: header.port,
            proto: header.proto,
        };
        match self.owned(&resuming, owner) {
            Some((_, last)) if resuming.epoch <= last => self.refuse(header, NOT_NEWER),
            Some((key, _)) => self.take_up(key, header.id, &resuming),
            None => self.too_late(header, &resuming, owner),
        }
    }

    /// The stream that is meant, and its last epoch; to anybody but its owner it does not exist.
    fn owned(&mut self, resuming: &Resuming, owner: Owner) -> Option<(Key, u32)> {
        let key = self.context.registry.find(&resuming.key)?;
        let stream = self.streams.get(key)?;
        if stream.owner()? != owner {
            return None;
        }
        Some((key, stream.kept()?.epoch()))
    }

    fn take_up(&mut self, key: Key, id: u32, resuming: &Resuming) {
        let slot = key.slot as usize;
        let Some(stream) = self.streams.at(slot) else {
            return;
        };
        let old = stream.id();
        let fate = match stream {
            Stream::Tcp(tcp) => tcp.resume(id, resuming, &mut self.context),
            Stream::Udp(udp) => {
                udp.resume(id, resuming, &mut self.context);
                Fate::Live
            }
        };
        if let Some(old) = old {
            self.streams.forget_at(old, slot);
        }
        self.streams.name(id, key);
        self.settle(slot, fate);
    }

    /// Answers for a stream that has ended, or that there never was.
    fn too_late(&mut self, header: Header, resuming: &Resuming, owner: Owner) {
        match self.context.registry.ending(&resuming.key, owner) {
            None => self.refuse(header, UNKNOWN),
            Some(Ending::Error(text)) => self.refuse(header, &text),
            Some(Ending::Well { received, total }) => {
                let answer = |kind| Header::new(kind, header.proto, header.id);
                let numbers = protocol::pack([received, received, total]);
                self.context.send(answer(kind::RESUMED), &numbers);
                self.context.send(answer(kind::CLOSE), &[]);
            }
        }
    }

    fn refuse(&mut self, header: Header, text: &str) {
        let answer = Header::new(kind::ERROR, header.proto, header.id);
        self.context.send(answer, text.as_bytes());
    }

    // ---- detaching -----------------------------------------------------------------------------

    /// DETACH: a user's link went. A stream that is not to be kept ends, as with CLOSE.
    fn detached(&mut self, id: u32, payload: &[u8]) {
        let Ok(hold) = payload.try_into().map(u32::from_be_bytes) else {
            self.context.counters.ignored += 1;
            return;
        };
        let Some(key) = self.streams.find(id) else {
            self.context.counters.ignored += 1;
            return;
        };
        let slot = key.slot as usize;
        let Some(stream) = self.streams.at(slot) else {
            return;
        };
        if stream.kept().is_none() {
            return self.closed(id, Tcp::on_close);
        }
        self.streams.forget(id);
        self.hold(slot, hold);
        self.end_forgotten();
    }

    fn hold(&mut self, slot: usize, hold: u32) {
        match self.streams.at(slot) {
            Some(Stream::Tcp(tcp)) => tcp.detach(hold, &mut self.context),
            Some(Stream::Udp(udp)) => udp.detach(hold, &mut self.context),
            None => {}
        }
    }

    /// The link is gone. Streams that outlive it are held, what was delivered last goes on, the others end.
    pub fn unlink(&mut self) {
        self.context.link.close();
        (self.readable, self.read_closed) = (false, false);
        self.streams.forget_ids();
        for slot in 0..self.streams.len() {
            let Some(stream) = self.streams.at(slot) else {
                continue;
            };
            let named = stream.id().is_some();
            if stream.kept().is_some() {
                // Those that were detached before have their time already.
                if named {
                    self.hold(slot, u32::MAX);
                }
            } else if named {
                let fate = match stream {
                    Stream::Tcp(tcp) => tcp.abort(),
                    Stream::Udp(_) => Fate::Over,
                };
                self.settle(slot, fate);
            }
        }
        self.end_forgotten();
        let (count, bytes) = self.context.registry.detached();
        log!(
            Debug,
            "{}; {count} streams wait with {bytes} bytes",
            self.context.counters
        );
    }

    /// Of more detached streams than may be, those end that are detached for longest.
    fn end_forgotten(&mut self) {
        while let Some(key) = self.context.registry.too_many() {
            self.end(key, TOO_MANY);
        }
    }

    // ---- ending --------------------------------------------------------------------------------

    /// RESUME of the session: the opener has no streams but those that it has resumed over this link.
    fn call_roll(&mut self, payload: &[u8]) {
        let Some((opener, epoch, mark)) = protocol::roll(payload) else {
            self.context.counters.ignored += 1;
            return;
        };
        if !self.context.registry.call_roll(mark, opener, epoch) {
            return;
        }
        for key in self.context.registry.of(&opener) {
            let kept = self.streams.get(key).and_then(Stream::kept);
            if kept.is_some_and(|kept| *kept.mark() == mark && kept.epoch() < epoch) {
                self.end(key, FORGOTTEN);
            }
        }
    }

    /// REVOKE: whoever has this mark may be here no longer.
    fn revoke(&mut self, payload: &[u8]) {
        let Some((mark, reason)) = payload.split_first_chunk::<16>() else {
            self.context.counters.ignored += 1;
            return;
        };
        self.network.revoke(mark);
        let text = format!("EACCES: {}", String::from_utf8_lossy(reason));
        for key in self.with_mark(mark) {
            self.end(key, &text);
        }
    }

    fn with_mark(&mut self, mark: &Mark) -> Vec<Key> {
        let keys = self.context.registry.all();
        let has = |key: &Key| {
            let kept = self.streams.get(*key).and_then(Stream::kept);
            kept.is_some_and(|kept| kept.mark() == mark)
        };
        keys.into_iter().filter(has).collect()
    }

    /// Ends a stream with an ERROR, whether there is somebody to be told or not.
    fn end(&mut self, key: Key, text: &str) {
        let slot = key.slot as usize;
        let Some(stream) = self.streams.get(key) else {
            return;
        };
        let id = stream.id();
        let fate = match stream {
            Stream::Tcp(tcp) => tcp.end_with(text, &mut self.context),
            Stream::Udp(udp) => udp.end(kind::ERROR, text, &mut self.context),
        };
        if let Some(id) = id {
            self.streams.forget_at(id, slot);
        }
        self.settle(slot, fate);
    }

    // ---- acknowledging -------------------------------------------------------------------------

    /// Tells in one go of what came in the last second and has not been told of.
    pub(super) fn pay_acknowledgements(&mut self) {
        for key in self.context.registry.debts(self.context.now) {
            if let Some(Stream::Tcp(tcp)) = self.streams.get(key) {
                tcp.pay(&mut self.context);
            }
        }
    }
}

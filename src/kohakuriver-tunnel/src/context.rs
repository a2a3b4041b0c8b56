//! What all streams share, and what they tell the event loop.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, VecDeque};
use std::fmt;
use std::io;
use std::sync::Once;
use std::time::{Duration, Instant};

use crate::errors;
use crate::flow::Budget;
use crate::link::{Link, MAX_PAYLOAD};
use crate::log;
use crate::protocol::Header;
use crate::registry::Registry;
use crate::retained::Keeping;
use crate::settings::Settings;
use crate::streams::Key;

/// Frames are cut to this while several streams move bytes, so that none waits long for another.
const SHARED_CHUNK: usize = 256 << 10;
const SHARED_FOR: Duration = Duration::from_secs(1);
/// How often the streams that receive change in that time while several do.
const SHARED_TURNS: u32 = 8;

/// A user's end is told no more often than this that nothing takes datagrams on a port: it opens a stream for the next
/// one.
const REFUSALS_APART: Duration = Duration::from_secs(5);
/// How long a message that nobody waits for may wait for others.
const LATE: Duration = Duration::from_millis(50);
/// Said once: it would be said for every stream.
static OUT_OF_FILES: Once = Once::new();

/// Whether a stream goes on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[must_use]
pub enum Fate {
    /// It does.
    Live,
    /// It does not: its socket is to be closed and its id forgotten.
    Over,
}

/// What has happened, for the log.
#[derive(Default)]
#[allow(missing_docs)]
pub struct Counters {
    pub bytes_to_container: u64,
    pub bytes_to_user: u64,
    pub streams: u64,
    pub unknown_messages: u64,
    pub ignored: u64,
    pub udp_dropped: u64,
    pub udp_refused: u64,
    pub stalls: u64,
}

impl fmt::Display for Counters {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            out,
            "{} streams, {} bytes to the container, {} bytes to users, {} unknown and {} idle \
             messages, {} datagrams dropped, {} refused",
            self.streams,
            self.bytes_to_container,
            self.bytes_to_user,
            self.unknown_messages,
            self.ignored,
            self.udp_dropped,
            self.udp_refused
        )
    }
}

/// What streams share.
pub struct Context {
    /// The way out.
    pub link: Link,
    /// What windows are taken from.
    pub budget: Budget,
    /// What is kept until it is acknowledged.
    pub keeping: Keeping,
    /// The streams that outlive their link.
    pub registry: Registry,
    /// How long streams wait.
    pub settings: Settings,
    /// The time as of this turn of the loop.
    pub now: Instant,
    /// Counted for the log.
    pub counters: Counters,
    /// How many v1 streams hold up the reading of the link.
    pub holding: usize,
    /// How many streams' services have not taken everything.
    pub waiting: usize,
    ready: VecDeque<Key>,
    /// By slot: which stream of it is in `ready`.
    scheduled: Vec<Option<u32>>,
    timers: BinaryHeap<Reverse<(Instant, Key)>>,
    last_source: Key,
    shared_until: Instant,
    last_receiver: u32,
    turns: u32,
    turns_until: Instant,
    receivers_until: Instant,
    /// Until when the messages wait that nobody waits for, if there are any.
    late_until: Instant,
    /// By port: when it was told last that nothing takes datagrams there.
    refusals: HashMap<u16, Instant>,
}

impl Context {
    /// What streams share before there is a link.
    pub fn new(settings: &Settings, now: Instant) -> Self {
        Self {
            link: Link::default(),
            budget: Budget::new(settings),
            keeping: Keeping::new(settings),
            registry: Registry::new(settings),
            settings: settings.clone(),
            now,
            counters: Counters::default(),
            holding: 0,
            waiting: 0,
            ready: VecDeque::new(),
            scheduled: Vec::new(),
            timers: BinaryHeap::new(),
            last_source: Key {
                slot: 0,
                generation: 0,
            },
            shared_until: now,
            last_receiver: 0,
            turns: 0,
            turns_until: now,
            receivers_until: now,
            late_until: now,
            refusals: HashMap::new(),
        }
    }

    /// Queues a message without bulk.
    pub fn send(&mut self, header: Header, payload: &[u8]) {
        self.link.control(header, payload);
    }

    /// Queues a message without payload that nobody waits for. It goes with others that are sent soon: where connections
    /// follow each other it would be one more by itself for each of them, at every hop.
    pub fn send_late(&mut self, header: Header) {
        if !self.link.is_late() {
            self.late_until = self.now + LATE;
        }
        self.link.late(header);
    }

    /// Until when such messages wait.
    pub fn late_until(&self) -> Option<Instant> {
        self.link.is_late().then_some(self.late_until)
    }

    /// Sends them if they have waited for long enough.
    pub fn end_lateness(&mut self) {
        if self.late_until().is_some_and(|until| until <= self.now) {
            self.link.send_late();
        }
    }

    /// What an ERROR says of `error`, which begins with its symbolic code.
    pub fn complaint(&self, id: u32, port: u16, error: &io::Error) -> String {
        if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) {
            OUT_OF_FILES.call_once(|| {
                log!(
                    Warn,
                    "streams are refused: {error}; raise the limit of open files"
                );
            });
        }
        let text = errors::text(error, port);
        log!(Debug, "stream {id}: {text}");
        text
    }

    /// When it may be told that nothing takes datagrams on `port`.
    pub fn refusal_due(&mut self, port: u16) -> Instant {
        let now = self.now;
        self.refusals.retain(|_, told| now < *told + REFUSALS_APART);
        self.refusals
            .get(&port)
            .map_or(now, |told| *told + REFUSALS_APART)
    }

    /// Notes that it is told now.
    pub fn refusal_told(&mut self, port: u16) {
        self.refusals.insert(port, self.now);
    }

    /// Puts a source in the queue for the link.
    pub fn schedule(&mut self, key: Key) {
        let slot = key.slot as usize;
        if self.scheduled.len() <= slot {
            self.scheduled.resize(slot + 1, None);
        }
        if self.scheduled[slot].replace(key.generation) != Some(key.generation) {
            self.ready.push_back(key);
        }
    }

    /// Forgets that the stream of `slot` is in the queue.
    pub fn unschedule(&mut self, slot: usize) {
        if let Some(scheduled) = self.scheduled.get_mut(slot) {
            *scheduled = None;
        }
    }

    /// Whether a source waits for the link.
    pub fn has_sources(&self) -> bool {
        !self.ready.is_empty()
    }

    /// The source whose turn it is.
    pub fn next_source(&mut self) -> Option<Key> {
        loop {
            let key = self.ready.pop_front()?;
            let scheduled = &mut self.scheduled[key.slot as usize];
            // A stream that ended is still in the queue, but no longer scheduled.
            if *scheduled == Some(key.generation) {
                *scheduled = None;
                return Some(key);
            }
        }
    }

    /// Wakes a stream at `deadline`.
    pub fn set_timer(&mut self, deadline: Instant, key: Key) {
        self.timers.push(Reverse((deadline, key)));
    }

    /// When the next timer is due.
    pub fn next_timer(&self) -> Option<Instant> {
        self.timers.peek().map(|Reverse((at, _))| *at)
    }

    /// Takes a timer that is due.
    pub fn due_timer(&mut self) -> Option<Key> {
        let due = self.next_timer().is_some_and(|at| at <= self.now);
        if due {
            self.timers.pop().map(|Reverse((_, key))| key)
        } else {
            None
        }
    }

    /// Notes the id of the stream that receives.
    pub fn receives(&mut self, id: u32) {
        if id != self.last_receiver {
            self.last_receiver = id;
            if self.now >= self.turns_until {
                self.turns = 0;
                self.turns_until = self.now + SHARED_FOR;
            }
            self.turns += 1;
            if self.turns >= SHARED_TURNS {
                self.receivers_until = self.now + SHARED_FOR;
            }
        }
        self.budget.shared = self.now < self.receivers_until;
    }

    /// How much a source may send in one frame.
    pub fn chunk(&mut self, key: Key) -> usize {
        if key != self.last_source {
            self.last_source = key;
            self.shared_until = self.now + SHARED_FOR;
        }
        if self.now < self.shared_until {
            SHARED_CHUNK
        } else {
            MAX_PAYLOAD
        }
    }
}

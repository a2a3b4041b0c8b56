//! Which kept streams there are, which have ended, which are detached, and whom an acknowledgement is owed, without any
//! I/O (docs/protocol.md §3, "Streams that outlive links").

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::Hash;
use std::time::{Duration, Instant};

use crate::protocol::{Mark, Opener, StreamKey};
use crate::settings::Settings;
use crate::streams::Key;

/// How many streams that have ended are remembered, and how many keys that nobody knew.
const REMEMBERED: usize = 4096;
/// An acknowledgement waits no longer than this for others, and for a message that says the same.
const ACK_AFTER: Duration = Duration::from_millis(900);
/// Of the reason why a stream ended so much is remembered.
const LONGEST_REASON: usize = 256;

/// Who may resume a stream: both have to be what it was opened with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[allow(missing_docs)]
pub struct Owner {
    pub mark: Mark,
    pub port: u16,
    pub proto: u8,
}

/// How a kept stream ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Ending {
    /// With CLOSE, when so much had been received and this was its total.
    #[allow(missing_docs)]
    Well { received: u64, total: u64 },
    /// With this ERROR.
    Error(Box<str>),
}

impl Ending {
    /// Of a stream without offsets.
    pub const WELL: Self = Self::Well {
        received: 0,
        total: 0,
    };

    /// With an ERROR, of which no more is kept than a sentence needs.
    pub fn error(text: &str) -> Self {
        let end = text.floor_char_boundary(LONGEST_REASON);
        Self::Error(text[..end].into())
    }
}

/// The newest so many of what was put in; where there are more, the user with most of them loses the oldest.
struct Memory<K, T> {
    entries: HashMap<K, T>,
    order: HashMap<Mark, VecDeque<K>>,
}

impl<K: Copy + Eq + Hash, T> Memory<K, T> {
    fn put(&mut self, mark: Mark, key: K, entry: T) {
        if self.entries.insert(key, entry).is_none() {
            self.order.entry(mark).or_default().push_back(key);
        }
        if self.entries.len() > REMEMBERED
            && let Some(most) = self.order.values_mut().max_by_key(|order| order.len())
            && let Some(oldest) = most.pop_front()
        {
            self.entries.remove(&oldest);
        }
    }
}

impl<K, T> Default for Memory<K, T> {
    fn default() -> Self {
        Self {
            entries: HashMap::new(),
            order: HashMap::new(),
        }
    }
}

/// The detached streams of one user, by age, each with what it holds.
#[derive(Default)]
struct Detached {
    streams: BTreeMap<u64, (Key, u64)>,
    bytes: u64,
}

/// All that is known of kept streams beside the streams themselves.
pub struct Registry {
    keys: BTreeMap<StreamKey, Key>,
    ended: Memory<StreamKey, (Owner, Ending)>,
    /// A flood of these makes nobody forget how streams ended.
    unknown: Memory<StreamKey, ()>,
    /// The last epoch that an opener has called the roll of.
    rolls: Memory<(Mark, Opener), u32>,
    detached: HashMap<Mark, Detached>,
    detached_streams: usize,
    detachments: u64,
    detached_bytes: u64,
    most_detached: usize,
    most_bytes: u64,
    owed: Vec<Key>,
    pay_at: Option<Instant>,
}

impl Registry {
    /// Without any stream.
    pub fn new(settings: &Settings) -> Self {
        Self {
            keys: BTreeMap::new(),
            ended: Memory::default(),
            unknown: Memory::default(),
            rolls: Memory::default(),
            detached: HashMap::new(),
            detached_streams: 0,
            detachments: 0,
            detached_bytes: 0,
            most_detached: settings.detached,
            most_bytes: settings.detached_bytes,
            owed: Vec::new(),
            pay_at: None,
        }
    }

    // ---- which there are -----------------------------------------------------------------------

    /// Notes a new stream.
    pub fn add(&mut self, name: StreamKey, key: Key) {
        self.keys.insert(name, key);
    }

    /// Where the stream is that has this key.
    pub fn find(&self, name: &StreamKey) -> Option<Key> {
        self.keys.get(name).copied()
    }

    /// Whether a stream has or had this key, or somebody wanted to resume one that did not exist.
    pub fn knows(&self, name: &StreamKey) -> bool {
        self.keys.contains_key(name)
            || self.ended.entries.contains_key(name)
            || self.unknown.entries.contains_key(name)
    }

    /// All streams.
    pub fn all(&self) -> Vec<Key> {
        self.keys.values().copied().collect()
    }

    /// An opener has no streams but those of this epoch; false if that is old news, which a dead link brought late.
    pub fn call_roll(&mut self, mark: Mark, opener: Opener, epoch: u32) -> bool {
        let last = self.rolls.entries.get(&(mark, opener)).copied();
        let newer = epoch > last.unwrap_or(0);
        if newer {
            self.rolls.put(mark, (mark, opener), epoch);
        }
        newer
    }

    /// The streams of one opener.
    pub fn of(&self, opener: &Opener) -> Vec<Key> {
        let bound = |end| {
            let mut key = [end; 16];
            key[..opener.len()].copy_from_slice(opener);
            key
        };
        self.keys
            .range(bound(0)..=bound(0xff))
            .map(|(_, key)| *key)
            .collect()
    }

    /// Notes how a stream ended.
    pub fn bury(&mut self, name: StreamKey, owner: Owner, ending: Ending) {
        self.keys.remove(&name);
        self.ended.put(owner.mark, name, (owner, ending));
    }

    /// How the stream of this key and owner ended. A key that is nobody's is remembered as one that has ended.
    pub fn ending(&mut self, name: &StreamKey, owner: Owner) -> Option<Ending> {
        match self.ended.entries.get(name) {
            Some((its, ending)) if *its == owner => Some(ending.clone()),
            _ => {
                self.unknown.put(owner.mark, *name, ());
                None
            }
        }
    }

    // ---- which are detached --------------------------------------------------------------------

    /// Notes a detached stream of a user that holds so many bytes; its number among them.
    pub fn detach(&mut self, mark: Mark, key: Key, bytes: u64) -> u64 {
        self.detachments += 1;
        let of_user = self.detached.entry(mark).or_default();
        of_user.streams.insert(self.detachments, (key, bytes));
        of_user.bytes += bytes;
        self.detached_streams += 1;
        self.detached_bytes += bytes;
        self.detachments
    }

    /// Notes that it is attached again, or has ended.
    pub fn attach(&mut self, mark: &Mark, number: u64) {
        let Some(of_user) = self.detached.get_mut(mark) else {
            return;
        };
        if let Some((_, bytes)) = of_user.streams.remove(&number) {
            of_user.bytes -= bytes;
            self.detached_bytes -= bytes;
            self.detached_streams -= 1;
        }
        if of_user.streams.is_empty() {
            self.detached.remove(mark);
        }
    }

    /// How many streams are detached, and what they hold together.
    pub fn detached(&self) -> (usize, u64) {
        (self.detached_streams, self.detached_bytes)
    }

    /// The stream that has to go, if one does: the one that is detached for longest of the user who has most.
    pub fn too_many(&self) -> Option<Key> {
        let users = self.detached.values();
        let most = if self.detached_streams > self.most_detached {
            users.max_by_key(|user| user.streams.len())
        } else if self.detached_bytes > self.most_bytes {
            users.max_by_key(|user| user.bytes)
        } else {
            None
        };
        let (_, (key, _)) = most?.streams.first_key_value()?;
        Some(*key)
    }

    // ---- what is owed --------------------------------------------------------------------------

    /// A stream has received something that the other end doesn't know of yet.
    pub fn owe(&mut self, key: Key, now: Instant) {
        self.owed.push(key);
        self.pay_at.get_or_insert(now + ACK_AFTER);
    }

    /// When acknowledgements are due.
    pub fn pay_at(&self) -> Option<Instant> {
        self.pay_at
    }

    /// Whom they are due to, if they are by now.
    pub fn debts(&mut self, now: Instant) -> Vec<Key> {
        if self.pay_at.is_none_or(|at| now < at) {
            return Vec::new();
        }
        self.pay_at = None;
        std::mem::take(&mut self.owed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWNER: Owner = Owner {
        mark: [1; 16],
        port: 80,
        proto: 0,
    };
    const OTHER: Owner = Owner {
        mark: [2; 16],
        port: 80,
        proto: 0,
    };

    fn name(number: usize) -> StreamKey {
        let mut name = [7; 16];
        name[12..].copy_from_slice(&(number as u32).to_be_bytes());
        name
    }

    #[test]
    fn how_a_stream_ended_is_told_to_its_owner_alone() {
        let mut registry = Registry::new(&Settings::default());
        registry.bury(name(1), OWNER, Ending::error("EPIPE: gone"));
        assert_eq!(registry.ending(&name(1), OTHER), None);
        let ending = registry.ending(&name(1), OWNER);
        assert_eq!(ending, Some(Ending::error("EPIPE: gone")));
    }

    #[test]
    fn a_flood_of_unknown_keys_is_bounded_and_makes_nobody_forget_an_ending() {
        let mut registry = Registry::new(&Settings::default());
        registry.bury(name(0), OWNER, Ending::error("EPIPE: gone"));
        for number in 1..20_000 {
            assert_eq!(registry.ending(&name(number), OTHER), None);
        }
        assert!(registry.ending(&name(0), OWNER).is_some());
        assert_eq!(registry.unknown.entries.len(), REMEMBERED);
        assert_eq!(registry.unknown.order[&OTHER.mark].len(), REMEMBERED);
        assert!(registry.knows(&name(19_999)) && !registry.knows(&name(1)));
    }

    #[test]
    fn the_newest_endings_are_remembered_and_reasons_are_cut_between_characters() {
        let mut registry = Registry::new(&Settings::default());
        let long = Ending::error(&"ü".repeat(1000));
        let Ending::Error(text) = &long else { panic!() };
        assert_eq!(text.len(), LONGEST_REASON);
        for number in 0..2 * REMEMBERED {
            registry.bury(name(number), OWNER, long.clone());
        }
        assert!(registry.knows(&name(2 * REMEMBERED - 1024)) && !registry.knows(&name(0)));
    }

    #[test]
    fn who_ends_streams_without_end_makes_nobody_forget_how_another_ended() {
        let mut registry = Registry::new(&Settings::default());
        registry.bury(name(0), OWNER, Ending::WELL);
        for number in 1..2 * REMEMBERED {
            registry.bury(name(number), OTHER, Ending::WELL);
            registry.call_roll(OTHER.mark, [number as u8; 12], number as u32);
        }
        assert_eq!(registry.ending(&name(0), OWNER), Some(Ending::WELL));
        assert_eq!(registry.ending(&name(1), OTHER), None);
    }

    #[test]
    fn who_leaves_too_much_behind_loses_the_oldest_of_it_and_nobody_else_any() {
        let at = |slot| Key {
            slot,
            generation: 0,
        };
        for (detached, detached_bytes) in [(3, 1000), (100, 30)] {
            let settings = Settings {
                detached,
                detached_bytes,
                ..Settings::default()
            };
            let mut registry = Registry::new(&settings);
            registry.detach(OWNER.mark, at(0), 10);
            let first = registry.detach(OTHER.mark, at(1), 10);
            registry.detach(OTHER.mark, at(2), 10);
            assert_eq!(registry.too_many(), None);
            registry.detach(OTHER.mark, at(3), 10);
            assert_eq!(registry.too_many(), Some(at(1)));
            registry.attach(&OTHER.mark, first);
            registry.attach(&OTHER.mark, first);
            assert_eq!(registry.too_many(), None);
            assert_eq!(registry.detached(), (3, 30));
        }
    }

    #[test]
    fn the_streams_of_an_opener_are_found_and_no_other() {
        let mut registry = Registry::new(&Settings::default());
        let at = |slot| Key {
            slot,
            generation: 0,
        };
        registry.add(name(0), at(0));
        registry.add(name(u32::MAX as usize), at(1));
        registry.add([8; 16], at(2));
        registry.add([6; 16], at(3));
        assert_eq!(registry.of(&[7; 12]), [at(0), at(1)]);
    }
}

//! What a sender keeps of a stream until the other end has told that it arrived (docs/protocol.md §3, "Streams that
//! outlive links", rule 2), without any I/O.

use std::cell::Cell;
use std::collections::{HashMap, VecDeque};
use std::rc::{Rc, Weak};

use crate::protocol::Mark;
use crate::settings::{MIN_WINDOW, Settings};

/// Bulk is kept in pieces of this size, which are used again: fresh memory of that size costs the kernel's zeroing.
pub const CHUNK: usize = 256 << 10;
/// How many of them are at hand.
const AT_HAND: usize = 16;
/// With less room than this in the last one, bulk goes into the next.
const LEAST_ROOM: usize = 64 << 10;
/// Small messages begin with this much.
const SMALL: usize = 512;

/// What all streams keep together, counted by the memory that it takes.
pub struct Keeping {
    total: u64,
    cap: u64,
    used: u64,
    /// The part of it that streams without a link keep.
    detached: u64,
    free: Vec<Chunk>,
    accounts: HashMap<Mark, Weak<Cell<u64>>>,
}

/// What the streams of one user keep together, in bytes of memory.
pub type Account = Rc<Cell<u64>>;

/// Memory that is filled from its start on.
struct Chunk {
    data: Box<[u8]>,
    filled: usize,
}

impl Keeping {
    /// Nothing is kept yet.
    pub fn new(settings: &Settings) -> Self {
        Self {
            total: settings.keep,
            cap: settings.max_window,
            used: 0,
            detached: 0,
            free: Vec::new(),
            accounts: HashMap::new(),
        }
    }

    /// The account of the user with this mark, which is there for as long as a stream has it.
    pub fn account(&mut self, mark: &Mark) -> Account {
        if let Some(account) = self.accounts.get(mark).and_then(Weak::upgrade) {
            return account;
        }
        self.accounts
            .retain(|_, account| account.strong_count() > 0);
        let account = Account::default();
        self.accounts.insert(*mark, Rc::downgrade(&account));
        account
    }

    /// Whether an acknowledgement is due to come over the link.
    pub fn is_owed(&self) -> bool {
        self.used > self.detached
    }

    /// How many bytes more a stream of this user may keep. A user has no more than is left, so that whoever comes next
    /// finds as much as the greediest took, and a stream its window at most.
    fn room(&self, account: &Account, length: u64) -> u64 {
        let left = self.total.saturating_sub(self.used);
        let most = self.cap.saturating_sub(length);
        most.min(left.saturating_sub(account.get()))
            .max(MIN_WINDOW.saturating_sub(length))
    }

    /// Gives back the memory that is at hand, if nothing is kept.
    pub fn rest(&mut self) {
        if self.used == 0 && self.free.capacity() > 0 {
            self.free = Vec::new();
        }
    }

    /// Notes that so much is kept without a link from now on, or no longer is.
    pub fn detached(&mut self, bytes: u64, now: bool) {
        self.detached = if now {
            self.detached + bytes
        } else {
            self.detached.saturating_sub(bytes)
        };
    }

    fn take(&mut self, size: usize, account: &Account) -> Chunk {
        self.used += size as u64;
        account.set(account.get() + size as u64);
        let again = if size == CHUNK { self.free.pop() } else { None };
        again.unwrap_or_else(|| Chunk {
            data: vec![0; size].into(),
            filled: 0,
        })
    }

    fn give_back(&mut self, mut chunk: Chunk, account: &Account) {
        self.used -= chunk.data.len() as u64;
        account.set(account.get() - chunk.data.len() as u64);
        if chunk.data.len() == CHUNK && self.free.len() < AT_HAND {
            chunk.filled = 0;
            self.free.push(chunk);
        }
    }
}

impl Chunk {
    fn spare(&mut self) -> &mut [u8] {
        &mut self.data[self.filled..]
    }
}

/// The bytes of one direction from the last acknowledged one on. It owns no memory while there are none.
pub struct Retained {
    account: Account,
    start: u64,
    held: Option<Box<Held>>,
}

#[derive(Default)]
struct Held {
    chunks: VecDeque<Chunk>,
    /// What has been acknowledged of the first chunk.
    taken: usize,
    length: u64,
    memory: u64,
}

impl Held {
    fn add(&mut self, size: usize, keeping: &mut Keeping, account: &Account) {
        self.memory += size as u64;
        self.chunks.push_back(keeping.take(size, account));
    }
}

impl Retained {
    /// Nothing yet, of a user's stream.
    pub fn new(account: Account) -> Self {
        Self {
            account,
            start: 0,
            held: None,
        }
    }

    /// The offset of the first byte that is kept.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// The offset behind the last one.
    pub fn end(&self) -> u64 {
        self.start + self.len()
    }

    /// How many there are.
    pub fn len(&self) -> u64 {
        self.held.as_ref().map_or(0, |held| held.length)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The memory that they take.
    pub fn memory(&self) -> u64 {
        self.held.as_ref().map_or(0, |held| held.memory)
    }

    /// How many more may be kept.
    pub fn room(&self, keeping: &Keeping) -> u64 {
        keeping.room(&self.account, self.len())
    }

    /// Makes room for bulk; how much there is, or 0 if there is not enough left for all. [`Retained::fill`] has to follow.
    pub fn reserve(&mut self, keeping: &mut Keeping) -> usize {
        let room = self.room(keeping);
        let held = self.held.get_or_insert_default();
        let has_room = |chunk: &Chunk| chunk.data.len() - chunk.filled >= LEAST_ROOM;
        if !held.chunks.back().is_some_and(has_room) && room >= CHUNK as u64 {
            held.add(CHUNK, keeping, &self.account);
        }
        self.spare().len()
    }

    /// Where bulk goes that is to be kept.
    pub fn spare(&mut self) -> &mut [u8] {
        let last = self.held.as_mut().and_then(|held| held.chunks.back_mut());
        last.map(Chunk::spare).unwrap_or_default()
    }

    /// So many bytes have come there.
    pub fn fill(&mut self, length: usize, keeping: &mut Keeping) {
        let Some(held) = &mut self.held else { return };
        held.length += length as u64;
        if let Some(last) = held.chunks.back_mut() {
            last.filled += length;
        }
        if held.chunks.back().is_some_and(|last| last.filled == 0)
            && let Some(empty) = held.chunks.pop_back()
        {
            held.memory -= empty.data.len() as u64;
            keeping.give_back(empty, &self.account);
        }
        self.forget_if_empty();
    }

    /// Keeps a copy of the next bytes.
    pub fn push(&mut self, mut bytes: &[u8], keeping: &mut Keeping) {
        let held = self.held.get_or_insert_default();
        held.length += bytes.len() as u64;
        while !bytes.is_empty() {
            let mut size = SMALL;
            if let Some(last) = held.chunks.back_mut() {
                size = 2 * last.data.len();
                let part = bytes.len().min(last.spare().len());
                last.spare()[..part].copy_from_slice(&bytes[..part]);
                last.filled += part;
                bytes = &bytes[part..];
            }
            if !bytes.is_empty() {
                held.add(size.max(bytes.len()).min(CHUNK), keeping, &self.account);
            }
        }
    }

    /// All before `upto` has arrived.
    pub fn release(&mut self, upto: u64, keeping: &mut Keeping) {
        let Some(held) = &mut self.held else { return };
        let gone = upto.saturating_sub(self.start).min(held.length);
        self.start += gone;
        held.length -= gone;
        held.taken += gone as usize;
        while let Some(first) = held.chunks.front()
            && first.filled <= held.taken
        {
            held.taken -= first.filled;
            held.memory -= first.data.len() as u64;
            if let Some(chunk) = held.chunks.pop_front() {
                keeping.give_back(chunk, &self.account);
            }
        }
        self.forget_if_empty();
    }

    /// The last so many bytes, which came with one [`Retained::fill`].
    pub fn last(&self, length: usize) -> &[u8] {
        let last = self.held.as_ref().and_then(|held| held.chunks.back());
        last.map_or(&[], |chunk| {
            &chunk.data[chunk.filled - length..chunk.filled]
        })
    }

    /// What is kept from `offset` on, as far as it lies together.
    pub fn piece(&self, offset: u64) -> &[u8] {
        let Some(held) = &self.held else { return &[] };
        let mut skip = held.taken + offset.saturating_sub(self.start) as usize;
        for chunk in &held.chunks {
            if skip < chunk.filled {
                return &chunk.data[skip..chunk.filled];
            }
            skip -= chunk.filled;
        }
        &[]
    }

    fn forget_if_empty(&mut self) {
        if self
            .held
            .as_ref()
            .is_some_and(|held| held.chunks.is_empty())
        {
            self.held = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn keeping(keep: u64) -> Keeping {
        Keeping::new(&Settings {
            keep,
            ..Settings::default()
        })
    }

    fn of(user: u8, keeping: &mut Keeping) -> Retained {
        Retained::new(keeping.account(&[user; 16]))
    }

    fn one(keep: u64) -> (Keeping, Retained) {
        let mut keeping = keeping(keep);
        let kept = of(0, &mut keeping);
        (keeping, kept)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        #[test]
        fn what_is_not_acknowledged_can_be_sent_again_from_any_offset(
            steps in prop::collection::vec((0usize..400_000, any::<bool>(), 0.0..1.0f64, 0.0..1.0f64), 1..6),
        ) {
            let ((mut keeping, mut kept), mut all) = (one(64 << 20), Vec::new());
            for (size, bulk, acked, from) in steps {
                let bytes: Vec<u8> = (all.len()..all.len() + size).map(|n| (n * 31 % 251) as u8).collect();
                let mut rest = &bytes[..];
                while !rest.is_empty() {
                    let part = if bulk { kept.reserve(&mut keeping) } else { 30_000 };
                    let (piece, behind) = rest.split_at(part.min(rest.len()));
                    if bulk {
                        kept.spare()[..piece.len()].copy_from_slice(piece);
                        kept.fill(piece.len(), &mut keeping);
                    } else {
                        kept.push(piece, &mut keeping);
                    }
                    rest = behind;
                }
                all.extend(bytes);
                let upto = kept.start() + (kept.len() as f64 * acked) as u64;
                kept.release(upto, &mut keeping);
                prop_assert_eq!((kept.start(), kept.end()), (upto, all.len() as u64));
                prop_assert_eq!(keeping.used, kept.memory());
                let mut offset = upto + (kept.len() as f64 * from) as u64;
                while offset < kept.end() {
                    let piece = kept.piece(offset);
                    prop_assert!(!piece.is_empty());
                    prop_assert_eq!(piece, &all[offset as usize..][..piece.len()]);
                    offset += piece.len() as u64;
                }
            }
            kept.release(u64::MAX, &mut keeping);
            prop_assert!(kept.is_empty() && kept.held.is_none() && keeping.used == 0);
            keeping.rest();
            prop_assert_eq!(keeping.free.capacity(), 0);
        }
    }

    #[test]
    fn small_messages_share_memory_and_none_stays_when_they_have_arrived() {
        let (mut keeping, mut kept) = one(64 << 20);
        for _ in 0..1000 {
            kept.push(b"tiny", &mut keeping);
        }
        assert!(kept.memory() < 10_000, "{}", kept.memory());
        kept.release(4000, &mut keeping);
        assert!(kept.held.is_none() && keeping.free.is_empty());
    }

    #[test]
    fn room_that_was_not_used_is_given_back() {
        let (mut keeping, mut kept) = one(64 << 20);
        assert_eq!(kept.reserve(&mut keeping), CHUNK);
        kept.fill(0, &mut keeping);
        assert!(kept.held.is_none() && keeping.used == 0);
        kept.push(b"tiny", &mut keeping);
        kept.reserve(&mut keeping);
        kept.fill(0, &mut keeping);
        assert_eq!((kept.piece(0), kept.memory()), (&b"tiny"[..], SMALL as u64));
    }

    #[test]
    fn whoever_acknowledges_nothing_leaves_room_for_others() {
        let (mut keeping, mut first) = one(8 << 20);
        first.push(&vec![0; 4 << 20], &mut keeping);
        assert_eq!(first.room(&keeping), 0);
        let mut second = of(1, &mut keeping);
        assert_eq!(second.room(&keeping), 4 << 20);
        second.push(&vec![0; 4 << 20], &mut keeping);
        assert_eq!(of(2, &mut keeping).room(&keeping), MIN_WINDOW);
    }

    #[test]
    fn a_user_gets_no_more_by_opening_many_connections() {
        let (mut keeping, mut first) = one(8 << 20);
        first.push(&vec![0; 4 << 20], &mut keeping);
        let mut more = of(0, &mut keeping);
        assert_eq!(more.room(&keeping), MIN_WINDOW);
        assert_eq!(more.reserve(&mut keeping), 0);
        more.fill(0, &mut keeping);
        first.release(1 << 20, &mut keeping);
        assert_eq!(more.room(&keeping), 2 << 20);
        assert_eq!(of(1, &mut keeping).room(&keeping), 5 << 20);
    }

    #[test]
    fn an_account_is_there_for_as_long_as_a_stream_has_it() {
        let (mut keeping, kept) = one(8 << 20);
        drop(kept);
        let _other = of(1, &mut keeping);
        assert_eq!(keeping.accounts.len(), 1);
    }
}

//! The table of a link's streams, without any I/O: slots that are used again, and the ids that lead to them.

use std::collections::HashMap;

/// A place in the table of streams, as of one use of it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Key {
    /// Index in the table.
    pub slot: u32,
    /// Which of the streams that had this slot.
    pub generation: u32,
}

struct Slot<T> {
    generation: u32,
    stream: Option<T>,
}

/// Streams by slot and by id.
pub struct Streams<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
    /// Slots to use again after this turn: events for what they held may still be in the batch.
    freed: Vec<u32>,
    ids: HashMap<u32, Key>,
}

impl<T> Default for Streams<T> {
    fn default() -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            freed: Vec::new(),
            ids: HashMap::new(),
        }
    }
}

impl<T> Streams<T> {
    /// How many slots there are, in use or not.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// Whether there is no slot.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// A place for a new stream: to be filled with [`Streams::put`] or given back.
    pub fn vacancy(&mut self) -> Key {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot {
                generation: 0,
                stream: None,
            });
            (self.slots.len() - 1) as u32
        });
        Key {
            slot,
            generation: self.slots[slot as usize].generation,
        }
    }

    /// Gives an unused vacancy back.
    pub fn give_back(&mut self, key: Key) {
        self.free.push(key.slot);
    }

    /// Fills a vacancy with the stream `id`.
    pub fn put(&mut self, key: Key, id: u32, stream: T) {
        self.slots[key.slot as usize].stream = Some(stream);
        self.ids.insert(id, key);
    }

    /// Lets `id` lead to a stream that is there.
    pub fn name(&mut self, id: u32, key: Key) {
        self.ids.insert(id, key);
    }

    /// Forgets all ids: they belonged to a link that is gone.
    pub fn forget_ids(&mut self) {
        self.ids.clear();
    }

    /// Where the stream `id` is.
    pub fn find(&self, id: u32) -> Option<Key> {
        self.ids.get(&id).copied()
    }

    /// The stream in `slot`.
    pub fn at(&mut self, slot: usize) -> Option<&mut T> {
        self.slots.get_mut(slot)?.stream.as_mut()
    }

    /// The stream of `key`, unless its place is another's by now.
    pub fn get(&mut self, key: Key) -> Option<&mut T> {
        let slot = self.slots.get_mut(key.slot as usize)?;
        slot.stream
            .as_mut()
            .filter(|_| slot.generation == key.generation)
    }

    /// Frees the id at once; its stream may have something left to do.
    pub fn forget(&mut self, id: u32) -> Option<Key> {
        self.ids.remove(&id)
    }

    /// Takes the stream out of `slot`, which is free after [`Streams::recycle`].
    pub fn take(&mut self, slot: usize) -> Option<T> {
        let entry = &mut self.slots[slot];
        let stream = entry.stream.take()?;
        entry.generation = entry.generation.wrapping_add(1);
        self.freed.push(slot as u32);
        Some(stream)
    }

    /// Frees `id` if it still leads to `slot`.
    pub fn forget_at(&mut self, id: u32, slot: usize) {
        if self
            .ids
            .get(&id)
            .is_some_and(|key| key.slot as usize == slot)
        {
            self.ids.remove(&id);
        }
    }

    /// Makes the slots of streams that were taken out free.
    pub fn recycle(&mut self) {
        self.free.append(&mut self.freed);
    }

    /// All streams that are left.
    pub fn drain(&mut self) -> impl Iterator<Item = T> {
        self.ids.clear();
        self.slots.iter_mut().filter_map(|slot| slot.stream.take())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_not_used_again_within_the_turn_that_freed_it() {
        let mut streams = Streams::default();
        let first = streams.vacancy();
        streams.put(first, 7, "first");
        assert_eq!(streams.take(first.slot as usize), Some("first"));
        assert_ne!(streams.vacancy().slot, first.slot);
        streams.recycle();
        assert_eq!(streams.vacancy().slot, first.slot);
    }

    #[test]
    fn a_key_of_an_ended_stream_leads_to_nobody_elses() {
        let mut streams = Streams::default();
        let old = streams.vacancy();
        streams.put(old, 7, "old");
        streams.take(old.slot as usize);
        streams.forget_at(7, old.slot as usize);
        streams.recycle();
        let new = streams.vacancy();
        streams.put(new, 7, "new");
        assert_eq!((old.slot, streams.get(old)), (new.slot, None));
        assert_eq!(streams.get(new), Some(&mut "new"));
    }

    #[test]
    fn the_end_of_a_stream_frees_no_id_that_another_has_by_now() {
        let mut streams = Streams::default();
        let closed = streams.vacancy();
        streams.put(closed, 7, "closed, with bytes to deliver");
        assert_eq!(streams.forget(7), Some(closed));
        let next = streams.vacancy();
        streams.put(next, 7, "next");
        streams.take(closed.slot as usize);
        streams.forget_at(7, closed.slot as usize);
        assert_eq!(streams.find(7), Some(next));
    }
}

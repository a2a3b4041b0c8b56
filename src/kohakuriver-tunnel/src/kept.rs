//! What streams of both kinds have that outlive their link (docs/protocol.md §3, "Streams that outlive links").

use std::time::{Duration, Instant};

use crate::context::Context;
use crate::protocol::{Mark, Opening, StreamKey};
use crate::registry::{Ending, Owner};
use crate::streams::Key;

/// The lasting identity of a stream, and since when nobody has it.
pub struct Kept {
    name: StreamKey,
    mark: Mark,
    hold: u32,
    /// Which attachment this is.
    epoch: u32,
    /// From the first time on that it was detached.
    held: Option<Box<Held>>,
}

/// Of a stream that is or was detached.
#[derive(Default)]
struct Held {
    /// While it is: its number, what it holds for the user, and until when.
    now: Option<(u64, u64, Instant)>,
    /// When its earliest timer fires: one at a time, however often it is detached.
    timer: Option<Instant>,
}

impl Kept {
    /// Of the stream in `key` that `opening` opens.
    pub fn new(opening: &Opening, key: Key, context: &mut Context) -> Self {
        context.registry.add(opening.key, key);
        Self {
            name: opening.key,
            mark: opening.mark,
            hold: opening.hold,
            epoch: 0,
            held: None,
        }
    }

    /// Who opened it.
    pub fn mark(&self) -> &Mark {
        &self.mark
    }

    /// Which attachment it has, or had last.
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// No link has it any more. It holds `bytes`, of which so many are kept for the user.
    pub fn detach(&mut self, key: Key, hold: u32, bytes: u64, kept: u64, context: &mut Context) {
        self.attach(context);
        let until = context.now + Duration::from_secs(self.hold.min(hold).into());
        let number = context.registry.detach(self.mark, key, bytes);
        context.keeping.detached(kept, true);
        let held = self.held.get_or_insert_default();
        held.now = Some((number, kept, until));
        if held.timer.is_none_or(|timer| timer > until) {
            held.timer = Some(until);
            context.set_timer(until, key);
        }
    }

    /// The opener has it again, under a higher epoch.
    pub fn resume(&mut self, epoch: u32, context: &mut Context) {
        self.attach(context);
        self.epoch = epoch;
    }

    /// Whether it was detached for too long by now. To be asked when a timer of the stream fires.
    pub fn is_forsaken(&mut self, key: Key, context: &mut Context) -> bool {
        let Some(held) = &mut self.held else {
            return false;
        };
        if held.timer.is_some_and(|timer| timer <= context.now) {
            held.timer = None;
        }
        match held.now {
            Some((_, _, until)) if until <= context.now => true,
            Some((_, _, until)) if held.timer.is_none() => {
                held.timer = Some(until);
                context.set_timer(until, key);
                false
            }
            _ => false,
        }
    }

    /// Notes how the stream ended.
    pub fn bury(&mut self, port: u16, proto: u8, ending: Ending, context: &mut Context) {
        self.attach(context);
        let owner = Owner {
            mark: self.mark,
            port,
            proto,
        };
        context.registry.bury(self.name, owner, ending);
    }

    fn attach(&mut self, context: &mut Context) {
        let held = self.held.as_mut().and_then(|held| held.now.take());
        if let Some((number, kept, _)) = held {
            context.registry.attach(&self.mark, number);
            context.keeping.detached(kept, false);
        }
    }
}

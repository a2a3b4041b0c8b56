//! Whether a silent link still stands (docs/protocol.md §3 rule 11), without any I/O.

use std::time::{Duration, Instant};

const PING_AFTER: Duration = Duration::from_secs(15);
const LOST_AFTER: Duration = Duration::from_secs(20);

/// What is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due {
    /// Nothing yet.
    Nothing,
    /// A WebSocket ping.
    Ping,
    /// The link's end: nothing came after the ping.
    End,
}

/// When something was heard last, and when it was asked for.
pub struct Keepalive {
    received: Instant,
    pinged: Option<Instant>,
}

impl Keepalive {
    /// Of a link that is up since `now`.
    pub fn new(now: Instant) -> Self {
        Self {
            received: now,
            pinged: None,
        }
    }

    /// Something came, or the silence is our own doing.
    pub fn heard(&mut self, now: Instant) {
        (self.received, self.pinged) = (now, None);
    }

    /// When something is due next.
    pub fn next(&self) -> Instant {
        match self.pinged {
            Some(pinged) => pinged + LOST_AFTER,
            None => self.received + PING_AFTER,
        }
    }

    /// What is due now; a ping is due once.
    pub fn tick(&mut self, now: Instant) -> Due {
        match (now >= self.next(), self.pinged) {
            (false, _) => Due::Nothing,
            (true, Some(_)) => Due::End,
            (true, None) => {
                self.pinged = Some(now);
                Due::Ping
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_link_is_asked_once_and_then_lost() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut keepalive = Keepalive::new(start);
        assert_eq!(keepalive.tick(after(14)), Due::Nothing);
        assert_eq!(keepalive.tick(after(15)), Due::Ping);
        assert_eq!(keepalive.tick(after(34)), Due::Nothing);
        assert_eq!(keepalive.tick(after(35)), Due::End);
    }

    #[test]
    fn whatever_comes_after_the_ping_keeps_the_link() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut keepalive = Keepalive::new(start);
        assert_eq!(keepalive.tick(after(15)), Due::Ping);
        keepalive.heard(after(30));
        assert_eq!(keepalive.tick(after(44)), Due::Nothing);
        assert_eq!(keepalive.tick(after(45)), Due::Ping);
    }
}

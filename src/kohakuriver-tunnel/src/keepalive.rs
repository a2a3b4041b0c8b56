//! Whether a silent link still stands (docs/protocol.md §3 rule 11), without any I/O.

use std::time::{Duration, Instant};

const PING_AFTER: Duration = Duration::from_secs(15);
const LOST_AFTER: Duration = Duration::from_secs(20);
/// The same while an acknowledgement is due, which never takes long (rule 13 of "Streams that outlive links").
const DOUBT_AFTER: Duration = Duration::from_secs(3);
const DEAD_AFTER: Duration = Duration::from_secs(2);

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
    /// Since when an acknowledgement is due.
    owed: Option<Instant>,
}

impl Keepalive {
    /// Of a link that is up since `now`.
    pub fn new(now: Instant) -> Self {
        Self {
            received: now,
            pinged: None,
            owed: None,
        }
    }

    /// Something came, or the silence is our own doing.
    pub fn heard(&mut self, now: Instant) {
        (self.received, self.pinged) = (now, None);
        self.owed = self.owed.map(|_| now);
    }

    /// Whether the other end owes us acknowledgements.
    pub fn owes(&mut self, owes: bool, now: Instant) {
        self.owed = owes.then(|| self.owed.unwrap_or(now));
    }

    /// When something is due next.
    pub fn next(&self) -> Instant {
        let doubt = self.owed.map(|owed| owed + DOUBT_AFTER);
        let (usual, sooner) = match self.pinged {
            Some(pinged) => (
                pinged + LOST_AFTER,
                doubt.map(|doubt| doubt.max(pinged) + DEAD_AFTER),
            ),
            None => (self.received + PING_AFTER, doubt),
        };
        sooner.map_or(usual, |sooner| sooner.min(usual))
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

    #[test]
    fn a_link_that_owes_an_acknowledgement_is_lost_after_5_s_without_a_byte() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut keepalive = Keepalive::new(start);
        keepalive.owes(true, after(1));
        keepalive.owes(true, after(2));
        assert_eq!(keepalive.tick(after(3)), Due::Nothing);
        assert_eq!(keepalive.tick(after(4)), Due::Ping);
        keepalive.heard(after(5));
        assert_eq!(keepalive.tick(after(7)), Due::Nothing);
        assert_eq!(keepalive.tick(after(8)), Due::Ping);
        assert_eq!(keepalive.tick(after(9)), Due::Nothing);
        assert_eq!(keepalive.tick(after(10)), Due::End);
    }

    #[test]
    fn what_is_sent_after_a_ping_has_its_own_time() {
        let start = Instant::now();
        let after = |seconds| start + Duration::from_secs(seconds);
        let mut keepalive = Keepalive::new(start);
        assert_eq!(keepalive.tick(after(15)), Due::Ping);
        keepalive.owes(true, after(25));
        assert_eq!(keepalive.tick(after(29)), Due::Nothing);
        assert_eq!(keepalive.tick(after(30)), Due::End);
        keepalive.owes(false, after(30));
        assert_eq!(keepalive.tick(after(34)), Due::Nothing);
    }
}

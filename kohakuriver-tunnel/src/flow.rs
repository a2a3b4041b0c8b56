//! Flow control of a v2 TCP stream (docs/protocol.md §3 rule 5), without any I/O.

use std::time::Instant;

use crate::protocol::{EARLY_DATA, Violation};

const FIRST_WINDOW: u64 = 256 << 10;
const LEAST_WINDOW: u64 = 4 << 10;
const MAX_WINDOW: u64 = 16 << 20;
const BUDGET: u64 = 64 << 20;
/// A wider window has to have brought this much for the next step.
const GAIN: f64 = 1.1;
/// One lucky measurement doesn't hold a window down for good.
const DECAY: f64 = 0.99;

/// What all streams' windows may come to together, in bytes.
pub struct Budget {
    left: u64,
}

impl Default for Budget {
    fn default() -> Self {
        Self { left: BUDGET }
    }
}

impl Budget {
    fn take(&mut self, wanted: u64) -> u64 {
        let got = wanted.min(self.left);
        self.left -= got;
        got
    }
}

/// The receiving side of one stream: what the peer may send, and how far that is raised.
///
/// Offsets count the stream's bytes from 0.
pub struct Inbound {
    window: u64,
    /// The part of the window that came out of the budget; the minimum is given to anyone.
    budgeted: u64,
    granted: u64,
    received: u64,
    consumed: u64,
    probe: Probe,
}

/// Measures the rate over one round trip, to see whether the window is what holds the peer back.
#[derive(Default)]
struct Probe {
    outstanding: Option<(Instant, u64)>,
    ended_at: u64,
    best_rate: f64,
}

impl Inbound {
    /// A stream's first window, from what the others left of the budget.
    pub fn new(budget: &mut Budget) -> Self {
        let budgeted = budget.take(FIRST_WINDOW);
        let window = budgeted.max(LEAST_WINDOW);
        Self {
            window,
            budgeted,
            granted: window,
            received: 0,
            consumed: 0,
            probe: Probe::default(),
        }
    }

    /// The limit that the peer has been given.
    pub fn granted(&self) -> u64 {
        self.granted
    }

    /// Counts `n` bytes from the peer.
    pub fn receive(&mut self, n: usize) -> Result<(), Violation> {
        self.received = self.received.saturating_add(n as u64);
        if self.received > self.granted.max(EARLY_DATA) {
            return Err(Violation::protocol("a stream's data passed its limit"));
        }
        Ok(())
    }

    /// Counts `n` bytes that the local socket took; the new limit when it is worth a message.
    pub fn consume(&mut self, n: usize) -> Option<u64> {
        self.consumed += n as u64;
        self.raise(self.window / 4)
    }

    /// Whether to send a PING on the stream now, to measure its rate.
    pub fn wants_probe(&mut self, now: Instant) -> bool {
        let due = self.probe.outstanding.is_none()
            && self.window < MAX_WINDOW
            && self.received - self.probe.ended_at >= self.window / 4;
        if due {
            self.probe.outstanding = Some((now, self.received));
        }
        due
    }

    /// Takes the PONG of the probe and widens the window where that is what limits the rate; the
    /// new limit if so.
    pub fn probe_ended(&mut self, now: Instant, budget: &mut Budget) -> Option<u64> {
        let (began, before) = self.probe.outstanding.take()?;
        self.probe.ended_at = self.received;
        let sample = self.received - before;
        if sample < self.window / 3 * 2 {
            return None;
        }
        let rate = sample as f64 / now.duration_since(began).as_secs_f64().max(1e-6);
        if rate <= GAIN * self.probe.best_rate {
            self.probe.best_rate *= DECAY;
            return None;
        }
        self.probe.best_rate = rate;
        let growth = budget.take(self.window.min(MAX_WINDOW - self.window));
        self.budgeted += growth;
        self.window += growth;
        self.raise(1)
    }

    /// Gives the window back at the stream's end.
    pub fn release(&mut self, budget: &mut Budget) {
        budget.left += std::mem::take(&mut self.budgeted);
    }

    fn raise(&mut self, least: u64) -> Option<u64> {
        let limit = self.consumed + self.window;
        // Early data may have been consumed past a small first limit, so the limit can trail.
        if limit < self.granted.saturating_add(least) {
            return None;
        }
        self.granted = limit;
        Some(limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_limit_rises_by_a_quarter_of_the_window_at_the_least() {
        let mut inbound = Inbound::new(&mut Budget::default());
        inbound.receive(100_000).unwrap();
        assert_eq!(inbound.consume(65_535), None);
        assert_eq!(inbound.consume(1), Some(FIRST_WINDOW + 65_536));
    }

    #[test]
    fn bytes_past_the_limit_are_a_violation() {
        let mut inbound = Inbound::new(&mut Budget::default());
        inbound.receive(FIRST_WINDOW as usize).unwrap();
        assert_eq!(inbound.receive(1).unwrap_err().code, 1002);
    }

    #[test]
    fn early_data_is_allowed_whatever_the_budget_left() {
        let mut budget = Budget { left: 0 };
        let mut inbound = Inbound::new(&mut budget);
        assert_eq!(inbound.granted(), LEAST_WINDOW);
        inbound.receive(EARLY_DATA as usize).unwrap();
        assert!(inbound.receive(1).is_err());
        inbound.release(&mut budget);
        assert_eq!(budget.left, 0);
    }

    #[test]
    fn a_window_doubles_while_a_round_trip_fills_it_and_the_budget_lasts() {
        let mut budget = Budget {
            left: FIRST_WINDOW + (1 << 20),
        };
        let mut inbound = Inbound::new(&mut budget);
        let (mut now, mut windows) = (Instant::now(), vec![inbound.window]);
        for round in 1..5u32 {
            let burst = inbound.window as usize / 4;
            inbound.receive(burst).unwrap();
            inbound.consume(burst);
            assert!(inbound.wants_probe(now));
            let fill = inbound.window as usize;
            inbound.receive(fill).unwrap();
            inbound.consume(fill);
            now += Duration::from_millis(10) / round;
            inbound.probe_ended(now, &mut budget);
            windows.push(inbound.window);
        }
        assert_eq!(
            windows.iter().map(|w| w >> 10).collect::<Vec<_>>(),
            [256, 512, 1024, 1280, 1280]
        );
        inbound.release(&mut budget);
        assert_eq!(budget.left, FIRST_WINDOW + (1 << 20));
    }

    #[test]
    fn a_window_that_a_round_trip_does_not_fill_stays() {
        let mut budget = Budget::default();
        let mut inbound = Inbound::new(&mut budget);
        let now = Instant::now();
        inbound.receive(100_000).unwrap();
        assert!(inbound.wants_probe(now));
        assert!(!inbound.wants_probe(now), "one probe at a time");
        inbound.receive(100_000).unwrap();
        assert_eq!(
            inbound.probe_ended(now + Duration::from_millis(1), &mut budget),
            None
        );
        assert_eq!(inbound.window, FIRST_WINDOW);
    }
}

//! Flow control of a v2 TCP stream (docs/protocol.md §3 rule 5), without any I/O.

use std::cell::Cell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Instant;

use crate::protocol::{EARLY_DATA, Violation};
use crate::settings::{MIN_WINDOW, Settings};

/// A wider window has to have brought this much for the next step.
const WORTHWHILE: f64 = 1.1;
/// While it does not, PINGs get rarer, to one in this many bytes: each costs every hop two frames.
const RAREST_PING: u64 = 64 << 20;
/// On a full link each stream gets what part it has of all bytes in flight, so streams that share
/// one need equal windows. While several receive, each of an opener's has so many times what its
/// fastest has in flight in a round trip.
const SHARED_PART: f64 = 1.5;
/// On a short link that is all that is in force: small messages of the others wait behind what is
/// more. A long link takes its time anyway, and there the window needs room to grow.
const LONG_PART: f64 = 4.0;
/// There and back, in seconds.
const SHORT_LINK: f64 = 0.002;
/// Bytes in which what was the fastest stream's rate is forgotten.
const FASTEST_OF: f64 = (64 << 20) as f64;

/// How many openers' ways are remembered while they have no stream.
const OPENERS: usize = 64;

/// What the keys of one opener's streams begin with.
pub type Opener = [u8; 12];

/// What was measured between the two ends of some streams: all of those that one process has opened.
/// Users near and far share a container's link.
struct Way {
    /// Seconds of the shortest round trip.
    shortest: Cell<f64>,
    /// Bytes a second of the stream that gets most.
    fastest: Cell<f64>,
}

impl Way {
    fn new() -> Self {
        Self {
            shortest: Cell::new(f64::INFINITY),
            fastest: Cell::new(0.0),
        }
    }

    /// It is another one.
    fn begin(&self) {
        self.shortest.set(f64::INFINITY);
        self.fastest.set(0.0);
    }

    /// A PONG was there `took` seconds after its PING; since the stream's last one, where there was
    /// one, so many bytes came in so many seconds.
    fn measured(&self, took: f64, since_last: Option<(f64, f64)>) {
        self.shortest.set(self.shortest.get().min(took));
        if let Some((came, seconds)) = since_last {
            let (rate, fastest) = (came / seconds, self.fastest.get());
            let part = if rate > fastest {
                1.0
            } else {
                (came / FASTEST_OF).min(1.0)
            };
            self.fastest.set(fastest + (rate - fastest) * part);
        }
    }
}

/// What all streams' windows may come to together, in bytes.
pub struct Budget {
    left: u64,
    first: u64,
    cap: u64,
    /// Whether several streams receive by turns.
    pub shared: bool,
    ways: VecDeque<(Opener, Rc<Way>)>,
}

impl Budget {
    /// The budget of a link's streams.
    pub fn new(settings: &Settings) -> Self {
        Self {
            left: settings.budget,
            first: settings.first_window,
            cap: settings.max_window,
            shared: false,
            ways: VecDeque::new(),
        }
    }

    /// The way of the streams that one process has opened; where that is not known, a new one.
    fn way(&mut self, opener: Option<&Opener>) -> Rc<Way> {
        let known = |opener| self.ways.iter().find(|(name, _)| name == opener);
        if let Some((_, way)) = opener.and_then(known) {
            return way.clone();
        }
        let way = Rc::new(Way::new());
        if let Some(opener) = opener {
            self.ways.push_back((*opener, way.clone()));
            if self.ways.len() > OPENERS {
                // One that no stream has; the newest is about to be somebody's, which holds it here, too.
                let idle = |(_, way): &(Opener, Rc<Way>)| Rc::strong_count(way) == 1;
                if let Some(at) = self.ways.iter().position(idle) {
                    self.ways.remove(at);
                }
            }
        }
        way
    }

    /// Another link carries the streams: what was measured of the last one says nothing of it.
    pub fn begin(&mut self) {
        self.ways.iter().for_each(|(_, way)| way.begin());
    }

    /// What each stream of a way may have under way now.
    fn share(&self, way: &Way) -> u64 {
        if !self.shared || way.fastest.get() == 0.0 {
            return self.cap;
        }
        let short = way.shortest.get() <= SHORT_LINK;
        self.parts(way, if short { SHARED_PART } else { LONG_PART })
    }

    /// The window that each stream should have now, since another has; 0 while one has the link to
    /// itself.
    fn fair(&self, way: &Way) -> u64 {
        if self.shared {
            self.parts(way, SHARED_PART)
        } else {
            0
        }
    }

    fn parts(&self, way: &Way, part: f64) -> u64 {
        if way.fastest.get() == 0.0 {
            return 0;
        }
        let needed = (part * way.fastest.get() * way.shortest.get()) as u64;
        needed.max(self.first).min(self.cap)
    }

    /// What is left of it.
    pub fn left(&self) -> u64 {
        self.left
    }

    fn take(&mut self, wanted: u64) -> u64 {
        let got = wanted.min(self.left);
        self.left -= got;
        got
    }
}

/// The receiving side of one stream: what the peer may send, and how far that is raised.
///
/// Offsets count the stream's bytes from 0.
pub struct ReceiveWindow {
    size: u64,
    /// The part of the window that came out of the budget; the minimum is given to anyone.
    paid: u64,
    granted: u64,
    received: u64,
    consumed: u64,
    cap: u64,
    way: Rc<Way>,
    /// The size of what came last.
    newest: u64,
    /// From the first PING on: most streams never need one.
    ping: Option<Box<Ping>>,
}

/// Measures the rate over one round trip, to see whether the window is what holds the peer back.
///
/// Over a long link a whole window comes as one burst a round trip, and PONGs come ahead of bulk:
/// right before a burst. So what makes a PING due is part of its sample, and PINGs become due a
/// quarter of a window into a burst: one sent at its end would see nothing come until its PONG.
struct Ping {
    pinged: Option<(Instant, u64)>,
    ping_from: u64,
    best: f64,
    ponged_at: Option<Instant>,
    /// Bytes between the end of one PING and the next.
    pause: u64,
    /// Bytes of the pause that are whole windows, for which no PING is worth its while.
    skipped: u64,
}

impl Ping {
    fn new(pause: u64) -> Self {
        Self {
            pinged: None,
            ping_from: 0,
            best: 0.0,
            ponged_at: None,
            pause,
            skipped: 0,
        }
    }

    /// Takes the PONG: the bytes of the sample, and whether it came at a rate that pays.
    fn sample(&mut self, received: u64, now: Instant, way: &Way) -> Option<(u64, bool)> {
        let (ping_at, ping_from) = self.pinged.take()?;
        let seconds = |since: Instant| now.duration_since(since).as_secs_f64().max(1e-6);
        let took = seconds(ping_at);
        // What comes in one round trip may have waited for it: a steady rate is one between two PONGs.
        let came = (received - self.ping_from) as f64;
        let since_last = self
            .ponged_at
            .replace(now)
            .map(|last| (came, seconds(last)));
        way.measured(took, since_last);
        self.ping_from = received;
        let sample = received - ping_from;
        let rate = sample as f64 / took;
        let pays = rate > WORTHWHILE * self.best;
        self.best = rate.max(self.best);
        Some((sample, pays))
    }
}

impl ReceiveWindow {
    /// A stream's first window, from what the others left of the budget.
    pub fn new(budget: &mut Budget, opener: Option<&Opener>) -> Self {
        let paid = budget.take(budget.first);
        let size = paid.max(MIN_WINDOW);
        Self {
            size,
            paid,
            granted: size,
            received: 0,
            consumed: 0,
            cap: budget.cap,
            way: budget.way(opener),
            newest: 0,
            ping: None,
        }
    }

    /// The limit that the peer has been given.
    pub fn granted(&self) -> u64 {
        self.granted
    }

    /// How many bytes have come.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// The link is gone that would have brought the PONG.
    fn forget_ping(&mut self) {
        if let Some(ping) = &mut self.ping {
            (ping.pinged, ping.ponged_at) = (None, None);
            ping.ping_from = self.received;
        }
    }

    /// Counts `n` bytes from the peer.
    pub fn receive(&mut self, n: usize) -> Result<(), Violation> {
        self.newest = n as u64;
        self.received = self.received.saturating_add(self.newest);
        if self.received > self.granted.max(EARLY_DATA) {
            return Err(Violation::protocol("a stream's data passed its limit"));
        }
        Ok(())
    }

    /// Counts `n` bytes that the local socket took; the new limit when it is worth a message.
    pub fn consume(&mut self, n: usize, budget: &Budget) -> Option<u64> {
        self.consumed += n as u64;
        let size = self.in_force(budget);
        self.grant(size, size / 4)
    }

    /// The part of the window that the peer may have under way now.
    fn in_force(&self, budget: &Budget) -> u64 {
        self.size.min(budget.share(&self.way))
    }

    /// Whether to send a PING on the stream now, to measure its rate.
    pub fn wants_ping(&mut self, now: Instant) -> bool {
        let (from, pause) = match &self.ping {
            Some(ping) if ping.pinged.is_some() => return false,
            Some(ping) => (ping.ping_from, ping.pause),
            None => (0, self.size / 4),
        };
        let due = self.size < self.cap && self.received - from >= pause;
        if due {
            let ping = self.ping.get_or_insert_with(|| Box::new(Ping::new(pause)));
            ping.pinged = Some((now, self.received - self.newest));
        }
        due
    }

    /// Takes the PONG of the PING and widens the window where that is what limits the rate; the
    /// new limit if so.
    pub fn pong(&mut self, now: Instant, budget: &mut Budget) -> Option<u64> {
        let ping = self.ping.as_mut()?;
        let (sample, pays) = ping.sample(self.received, now, &self.way)?;
        let share = budget.share(&self.way);
        let pays = pays || self.size < budget.fair(&self.way);
        let in_flight = self.size.min(share);
        if !pays || sample * 3 < in_flight * 2 {
            ping.skipped = (2 * ping.skipped).max(self.size).min(RAREST_PING);
            ping.pause = ping.skipped + self.size / 4;
            return None;
        }
        if self.size < share {
            let extra = budget.take(self.size.min(self.cap - self.size));
            self.paid += extra;
            self.size += extra;
        }
        ping.skipped = 0;
        // What comes first was sent for the smaller window.
        ping.pause = in_flight + self.size / 4;
        self.grant(self.in_force(budget), 1)
    }

    /// There is a link again: takes a window as large as before, or what is left. The limit is another one.
    pub fn attach(&mut self, budget: &mut Budget) {
        self.close(budget);
        self.way.begin();
        self.paid = budget.take(self.size.max(budget.first));
        self.size = self.paid.max(MIN_WINDOW);
        self.granted = self.received.max(self.consumed + self.size);
        self.forget_ping();
    }

    /// Gives the window back at the stream's end, and for as long as it has no link: nothing can come then.
    pub fn close(&mut self, budget: &mut Budget) {
        budget.left += std::mem::take(&mut self.paid);
    }

    fn grant(&mut self, size: u64, least: u64) -> Option<u64> {
        let limit = self.consumed + size;
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

    const FIRST_WINDOW: u64 = 256 << 10;

    fn budget(total: u64) -> Budget {
        Budget::new(&Settings {
            budget: total,
            ..Settings::default()
        })
    }

    #[test]
    fn a_limit_rises_by_a_quarter_of_the_window_at_the_least() {
        let mut budget = budget(64 << 20);
        let mut receiving = ReceiveWindow::new(&mut budget, None);
        receiving.receive(100_000).unwrap();
        assert_eq!(receiving.consume(65_535, &budget), None);
        assert_eq!(receiving.consume(1, &budget), Some(FIRST_WINDOW + 65_536));
    }

    #[test]
    fn bytes_past_the_limit_are_a_violation() {
        let mut receiving = ReceiveWindow::new(&mut budget(64 << 20), None);
        receiving.receive(FIRST_WINDOW as usize).unwrap();
        assert_eq!(receiving.receive(1).unwrap_err().code, 1002);
    }

    #[test]
    fn early_data_is_allowed_whatever_the_budget_left() {
        let mut budget = budget(0);
        let mut receiving = ReceiveWindow::new(&mut budget, None);
        assert_eq!(receiving.granted(), MIN_WINDOW);
        receiving.receive(EARLY_DATA as usize).unwrap();
        assert!(receiving.receive(1).is_err());
        receiving.close(&mut budget);
        assert_eq!(budget.left, 0);
    }

    #[test]
    fn a_window_doubles_while_a_round_trip_fills_it_and_the_budget_lasts() {
        let mut budget = budget(FIRST_WINDOW + (1 << 20));
        let mut receiving = ReceiveWindow::new(&mut budget, None);
        let (mut now, mut windows) = (Instant::now(), vec![receiving.size]);
        for round in 1..5u32 {
            while !receiving.wants_ping(now) {
                receiving.receive(4096).unwrap();
                receiving.consume(4096, &budget);
            }
            for _ in 0..receiving.size / 4096 {
                receiving.receive(4096).unwrap();
                receiving.consume(4096, &budget);
            }
            now += Duration::from_millis(10) / round;
            receiving.pong(now, &mut budget);
            windows.push(receiving.size);
        }
        assert_eq!(
            windows.iter().map(|w| w >> 10).collect::<Vec<_>>(),
            [256, 512, 1024, 1280, 1280]
        );
        receiving.close(&mut budget);
        assert_eq!(budget.left, FIRST_WINDOW + (1 << 20));
    }

    /// How a window grows where each round trip of 100 ms brings one burst, in reads of `read`
    /// bytes, that the link takes `rate` bytes a second of; PONGs come right before a burst.
    fn window_after(round_trips: u32, read: u64, rate: u64) -> u64 {
        let mut budget = budget(64 << 20);
        let mut receiving = ReceiveWindow::new(&mut budget, None);
        let (mut now, mut limit, mut due) = (Instant::now(), receiving.granted(), None);
        for _ in 0..round_trips {
            now += Duration::from_millis(100);
            let mut burst = (limit - receiving.received).min(rate / 10);
            limit = receiving.granted();
            if due.take().is_some_and(|at| at <= now)
                && let Some(raised) = receiving.pong(now, &mut budget)
            {
                limit = raised;
            }
            while burst > 0 {
                let part = burst.min(read);
                receiving.receive(part as usize).unwrap();
                limit = receiving.consume(part as usize, &budget).unwrap_or(limit);
                if receiving.wants_ping(now) {
                    due = Some(now + Duration::from_millis(100));
                }
                burst -= part;
            }
        }
        receiving.size
    }

    #[test]
    fn a_window_grows_over_a_long_link_whatever_the_size_of_reads() {
        for read in [1 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20] {
            let window = window_after(40, read, 125_000_000);
            assert_eq!(window, 16 << 20, "in reads of {read} bytes");
        }
    }

    #[test]
    fn a_window_stops_growing_where_the_link_is_full() {
        let window = window_after(400, 64 << 10, 10_000_000);
        assert!((1_000_000..=4 << 20).contains(&window), "{window}");
    }

    #[test]
    fn while_others_receive_too_no_more_is_under_way_than_fills_a_round_trip() {
        let mut budget = budget(64 << 20);
        let mut receiving = ReceiveWindow::new(&mut budget, None);
        (receiving.size, receiving.granted) = (4 << 20, 4 << 20);
        receiving.way.measured(4e-4, Some((1e9, 1.0)));
        budget.shared = true;
        let needed = 600_000;
        receiving.receive(4 << 20).unwrap();
        assert_eq!(receiving.consume((4 << 20) - needed, &budget), None);
        assert_eq!(
            receiving.consume(needed / 4, &budget),
            Some((4 << 20) + 150_000)
        );
        budget.shared = false;
        assert_eq!(
            receiving.consume(1, &budget),
            Some((8 << 20) - 3 * needed as u64 / 4 + 1)
        );
    }

    #[test]
    fn a_window_that_a_round_trip_does_not_fill_stays() {
        let mut budget = budget(64 << 20);
        let mut receiving = ReceiveWindow::new(&mut budget, None);
        let now = Instant::now();
        receiving.receive(100_000).unwrap();
        assert!(receiving.wants_ping(now));
        assert!(!receiving.wants_ping(now), "one PING at a time");
        receiving.receive(70_000).unwrap();
        assert_eq!(
            receiving.pong(now + Duration::from_millis(1), &mut budget),
            None
        );
        assert_eq!(receiving.size, FIRST_WINDOW);
    }
}

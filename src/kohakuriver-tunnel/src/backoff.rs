//! When a tunnel that ended is tried again, without any I/O (`tests/vectors/reconnect.json`).

use std::time::Duration;

use crate::protocol::close;

/// The first pause is at most this; it doubles with each failure.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// The pause where trying again soon helps nobody: refused credentials, another client in place.
const LONG_PAUSE: [Duration; 2] = [Duration::from_secs(15), Duration::from_secs(30)];
/// A tunnel that lasted this long was none of the failures, and is tried again at once.
const GOOD: Duration = Duration::from_secs(1);
/// A runner that answers nothing is tried so often within half a second each: its streams wait for it.
const EAGER: u32 = 240;
const EAGER_LONGEST: Duration = Duration::from_millis(500);

/// What to do about a tunnel that is gone.
#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    /// Wait for a random time in these bounds.
    Pause([Duration; 2]),
    /// Nothing: another tunnel client serves the container now.
    Replaced,
    /// Nothing: so many failures in a row were allowed.
    GaveUp,
}

/// Failures in a row, and what they lead to.
pub struct Backoff {
    /// How many there were.
    pub failures: u32,
    /// The longest ordinary pause.
    pub longest: Duration,
    /// So many failures are the end.
    pub most: Option<u32>,
    /// Whether to come back after another client took the place, as a container's first process does.
    pub returns: bool,
}

impl Backoff {
    /// After a tunnel that was up for `lived` and ended with a close code, or (`None`) an attempt that was answered
    /// with an HTTP status, if it was answered.
    pub fn next(&mut self, lived: Option<Duration>, code: Option<u16>) -> Next {
        let replaced = code == Some(close::REPLACED);
        if replaced && !self.returns {
            return Next::Replaced;
        }
        let good = lived.is_some_and(|lived| lived >= GOOD);
        self.failures = if good {
            0
        } else {
            self.failures.saturating_add(1)
        };
        if self.most.is_some_and(|most| self.failures >= most) {
            return Next::GaveUp;
        }
        if replaced || matches!(code, Some(401 | 403)) {
            return Next::Pause(LONG_PAUSE);
        }
        let refused = lived.is_none() && code.is_some();
        Next::Pause([Duration::ZERO, self.ceiling(refused)])
    }

    fn ceiling(&self, refused: bool) -> Duration {
        let doubled = |pause: Duration, times: u32| pause.saturating_mul(1 << times.min(16));
        let Some(doublings) = self.failures.checked_sub(1) else {
            return Duration::ZERO;
        };
        let pause = match self.failures.checked_sub(EAGER) {
            _ if refused => doubled(FIRST_PAUSE, doublings),
            Some(beyond @ 1..) => doubled(EAGER_LONGEST, beyond),
            _ => doubled(FIRST_PAUSE, doublings).min(EAGER_LONGEST),
        };
        pause.min(self.longest)
    }
}

//! Keeps one link up: connect, serve, and again.

use std::fs;
use std::time::{Duration, Instant};

use crate::args::Options;
use crate::event_loop::EventLoop;
use crate::handshake::{self, Opened, Refusal};
use crate::log;
use crate::session::End;
use crate::sys;

/// The first pause is at most this; it doubles with each failure.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// The pause where trying again soon helps nobody: refused credentials, another client in place.
const LONG_PAUSE: Duration = Duration::from_secs(30);
/// A link that lasted this long was none of the failures.
const LIVED: Duration = Duration::from_secs(5);
/// Unsent bytes in the kernel that a small message may have to wait for.
const UNSENT: u32 = 256 << 10;

/// Why no link is tried any more.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was asked to end.
    Stopped,
    /// Another tunnel client serves this container now.
    Replaced,
    /// `--max-reconnect` failures in a row.
    GaveUp,
}

/// Keeps the tunnel up until there is a reason not to. Stopping `events` ends it.
pub fn run(options: &Options, events: &mut EventLoop) -> Outcome {
    let mut failures = 0;
    loop {
        let began = Instant::now();
        let mut pause = None;
        match attempt(options, events) {
            Ok(End::Stopped) => return Outcome::Stopped,
            Ok(End::Replaced) if options.run.is_none() => return Outcome::Replaced,
            Ok(End::Replaced) => {
                log!(Warn, "another tunnel client took over this container");
                pause = Some(LONG_PAUSE);
            }
            Ok(End::Violated(reason)) => {
                log!(
                    Warn,
                    "the tunnel is down: the runner broke the protocol: {reason}"
                );
            }
            Ok(End::Lost(reason)) => log!(Warn, "the tunnel is down: {reason}"),
            Err(refusal) => {
                log!(Warn, "no tunnel: {refusal}");
                pause = matches!(refusal, Refusal::NotAllowed(_)).then_some(LONG_PAUSE);
            }
        }
        failures = if began.elapsed() >= LIVED {
            0
        } else {
            failures + 1
        };
        if options.max_reconnect.is_some_and(|most| failures >= most) {
            return Outcome::GaveUp;
        }
        let most = pause.unwrap_or_else(|| ceiling(failures, options.reconnect_delay));
        if !events.sleep(jitter(most)) {
            return Outcome::Stopped;
        }
    }
}

fn attempt(options: &Options, events: &mut EventLoop) -> Result<End, Refusal> {
    let token = read_token(options)?;
    let opened = handshake::open(&options.url, &options.container, token.as_deref())?;
    let Opened { sock, early, v2 } = opened;
    sys::limit_unsent(&sock, UNSENT)?;
    log!(
        Info,
        "the tunnel of {} is up (v{})",
        options.container,
        1 + u8::from(v2)
    );
    Ok(events.serve(sock, &early, v2, &options.settings)?)
}

fn read_token(options: &Options) -> Result<Option<String>, Refusal> {
    let Some(path) = &options.token_file else {
        return Ok(None);
    };
    let unreadable = |reason: String| Refusal::Unreachable(format!("{}: {reason}", path.display()));
    let token = fs::read_to_string(path).map_err(|error| unreadable(error.to_string()))?;
    let token = token.trim();
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(unreadable("holds no token".into()));
    }
    Ok(Some(token.to_owned()))
}

/// The longest pause after so many failures in a row.
fn ceiling(failures: u32, most: Duration) -> Duration {
    FIRST_PAUSE
        .saturating_mul(1 << failures.saturating_sub(1).min(16))
        .min(most)
}

/// A random part of `most`, so that the clients of a restarted runner don't come all at once.
fn jitter(most: Duration) -> Duration {
    let mut random = [0; 4];
    sys::random(&mut random);
    most.mul_f64(f64::from(u32::from_ne_bytes(random)) / f64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_the_longest() {
        let most = Duration::from_secs(5);
        let pauses: Vec<_> = [0, 1, 2, 3, 6, 7, 99]
            .map(|n| ceiling(n, most).as_millis())
            .into();
        assert_eq!(pauses, [100, 100, 200, 400, 3200, 5000, 5000]);
    }
}

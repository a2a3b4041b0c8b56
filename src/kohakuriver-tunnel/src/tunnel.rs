//! Keeps one link up: connect, serve, and again.

use std::fs;
use std::time::{Duration, Instant};

use crate::args::Options;
use crate::backoff::{Backoff, Next};
use crate::event_loop::EventLoop;
use crate::handshake::{Handshake, Refusal};
use crate::log;
use crate::protocol::close;
use crate::session::End;
use crate::sys;

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
pub fn run(options: &Options, events: &EventLoop) -> Outcome {
    let mut backoff = Backoff {
        failures: 0,
        longest: options.reconnect_delay,
        most: options.max_reconnect,
        returns: options.run.is_some(),
    };
    let mut replaced = false;
    loop {
        let began = Instant::now();
        let (lived, code) = match attempt(options, events) {
            Ok(End::Stopped) => return Outcome::Stopped,
            Ok(end) => {
                let code = explain(&end, &mut replaced);
                (Some(began.elapsed()), code)
            }
            Err(refusal) => {
                log!(Warn, "no tunnel: {refusal}");
                (None, refusal.status())
            }
        };
        match backoff.next(lived, code) {
            Next::Replaced => return Outcome::Replaced,
            Next::GaveUp => return Outcome::GaveUp,
            Next::Pause(bounds) if !events.sleep(random_in(bounds)) => return Outcome::Stopped,
            Next::Pause(_) => {}
        }
    }
}

/// Says why a tunnel ended; its close code. Two clients that replace one another would go on for ever: that is said once.
fn explain(end: &End, replaced: &mut bool) -> Option<u16> {
    match end {
        End::Stopped => None,
        End::Closed(close::REPLACED, _) => {
            if !std::mem::replace(replaced, true) {
                log!(
                    Warn,
                    "another tunnel client took over this container; this one tries to come back \
                     every now and then: end one of them"
                );
            }
            Some(close::REPLACED)
        }
        End::Closed(code, reason) => {
            log!(Warn, "the tunnel is down: {reason}");
            Some(*code)
        }
        End::Violated(reason) => {
            log!(
                Warn,
                "the tunnel is down: the runner broke the protocol: {reason}"
            );
            None
        }
        End::Lost(reason) => {
            log!(Warn, "the tunnel is down: {reason}");
            None
        }
    }
}

fn attempt(options: &Options, events: &EventLoop) -> Result<End, Refusal> {
    let token = read_token(options)?;
    let handshake = Handshake::new(&options.url, &options.container, token.as_deref())?;
    let Some(opened) = events.open(&options.url, handshake)? else {
        return Ok(End::Stopped);
    };
    log!(
        Info,
        "the tunnel of {} is up (v{})",
        options.container,
        1 + u8::from(opened.granted.v2)
    );
    Ok(events.serve(opened, &options.settings)?)
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

/// A random time, so that the clients of a restarted runner don't come all at once.
fn random_in([least, most]: [Duration; 2]) -> Duration {
    let mut random = [0; 4];
    sys::random(&mut random);
    let part = f64::from(u32::from_ne_bytes(random)) / f64::from(u32::MAX);
    least + (most - least).mul_f64(part)
}

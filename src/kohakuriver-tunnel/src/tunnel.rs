//! Keeps a link up: connect, serve, and again. The streams live beside it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::agent::Agent;
use crate::args::Options;
use crate::backoff::{Backoff, Next};
use crate::event_loop::{Endpoint, EventLoop};
use crate::handshake::{Handshake, Refusal};
use crate::log;
use crate::protocol::close;
use crate::session::End;
use crate::sys;
use crate::token::Token;

/// How soon a token that a runner lays down is seen by a client that has no good one.
const LOOK_FOR_TOKEN: Duration = Duration::from_millis(200);

/// Why no link is tried any more.
#[derive(Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was asked to end.
    Stopped,
    /// Another tunnel client serves this container now.
    Replaced,
    /// `--max-reconnect` failures in a row.
    GaveUp,
    /// The host took this agent in at no time, and says why.
    Refused,
    /// The agent's task was stopped or removed while it was away.
    Over,
}

/// What a host calls an agent whose task was stopped or removed, and one whose task is another agent's.
const AGENT_OVER: &str = "agent_over";
const AGENT_REPLACED: &str = "agent_replaced";
/// Of a host that has too much to do: it may answer another time.
const BUSY: u16 = 429;
const OVER_LIMIT: &str = "over_limit";

/// Keeps the tunnel up until there is a reason not to. Stopping `events` ends it. `tried` is called after each attempt.
pub fn run(options: &Options, token: &Arc<Token>, events: &EventLoop, tried: impl Fn()) -> Outcome {
    let mut backoff = Backoff {
        failures: 0,
        longest: options.reconnect_delay,
        most: options.max_reconnect,
        returns: options.run.is_some(),
    };
    let mut replaced = false;
    // Without one there is nothing to do; the caller begins anew.
    let mut endpoint = events.endpoint(&options.settings).expect("an epoll(7)");
    loop {
        let began = Instant::now();
        let (lived, code) = match attempt(options, token, events, &mut endpoint, &tried) {
            Ok(End::Stopped) => return Outcome::Stopped,
            Ok(end) => {
                let code = explain(&end, &mut replaced);
                (Some(began.elapsed()), code)
            }
            Err(refusal) => {
                if let Some(outcome) = options
                    .agent
                    .as_ref()
                    .and_then(|agent| judge(agent, &refusal))
                {
                    return outcome;
                }
                log!(Warn, "no tunnel: {refusal}");
                tried();
                (None, refusal.status())
            }
        };
        match backoff.next(lived, code) {
            Next::Replaced => return Outcome::Replaced,
            Next::GaveUp => return Outcome::GaveUp,
            Next::Pause(bounds) if !pause(bounds, token, events, &mut endpoint) => {
                return Outcome::Stopped;
            }
            Next::Pause(_) => {}
        }
    }
}

/// What it means for an agent that a host refused it, if it is the end.
fn judge(agent: &Agent, refusal: &Refusal) -> Option<Outcome> {
    // Without a code it is no answer of a host: a proxy before it says this, or whatever has its address now.
    let Some(said) = refusal.said().filter(|said| !said.code.is_empty()) else {
        agent.failed();
        return None;
    };
    match said.code.as_str() {
        AGENT_OVER => {
            agent.is_over();
            Some(Outcome::Over)
        }
        AGENT_REPLACED => {
            agent.is_over();
            log!(Warn, "{}", said.sentence);
            Some(Outcome::Replaced)
        }
        _ if said.status >= 500 || (said.status == BUSY && said.code != OVER_LIMIT) => {
            agent.failed();
            None
        }
        _ if agent.was_taken_in() => None,
        _ => {
            agent.was_refused(said.clone());
            Some(Outcome::Refused)
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

fn attempt(
    options: &Options,
    token: &Arc<Token>,
    events: &EventLoop,
    endpoint: &mut Endpoint,
    tried: &impl Fn(),
) -> Result<End, Refusal> {
    let shown = token.now().map_err(Refusal::Unreachable)?;
    let agent = options.agent.as_ref();
    let (url, target) = match agent {
        Some(agent) => (agent.host(), agent.target()),
        None => (&options.url, format!("/ws/tunnel/{}", options.container)),
    };
    let handshake = Handshake::new(url, &target, &token.client, shown.as_deref())?;
    let outwards = agent.map_or(options.over_tls.as_ref(), |agent| Some(&agent.outwards));
    let Some(opened) = events.open(endpoint, url, outwards, handshake)? else {
        return Ok(End::Stopped);
    };
    log!(
        Info,
        "the tunnel of {} is up (v{})",
        options.container,
        1 + u8::from(opened.granted.v2)
    );
    let ender = agent.map(|agent| {
        agent.is_task(opened.granted.task.as_deref());
        agent.is_linked(true);
        Arc::clone(&agent.ender)
    });
    tried();
    let newer = Arc::clone(token);
    let end_task = move || ender.iter().for_each(|ender| ender.end());
    let served = events.serve(endpoint, opened, move || newer.take(), end_task);
    agent.iter().for_each(|agent| agent.is_linked(false));
    Ok(served?)
}

/// Waits, but no longer than until there is a new token; false if it was told to stop.
fn pause(
    bounds: [Duration; 2],
    token: &Token,
    events: &EventLoop,
    endpoint: &mut Endpoint,
) -> bool {
    let until = Instant::now() + random_in(bounds);
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() || token.is_there() {
            return true;
        }
        if !events.sleep(endpoint, left.min(LOOK_FOR_TOKEN)) {
            return false;
        }
    }
}

/// A random time, so that the clients of a restarted runner don't come all at once.
fn random_in([least, most]: [Duration; 2]) -> Duration {
    let mut random = [0; 4];
    sys::random(&mut random);
    let part = f64::from(u32::from_ne_bytes(random)) / f64::from(u32::MAX);
    least + (most - least).mul_f64(part)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::SshServer;
    use crate::handshake::{RunnerUrl, Said};
    use crate::outwards::Outwards;

    fn agent() -> Agent {
        let hosts = ["a", "b"].map(|host| RunnerUrl::of_host(host).unwrap());
        Agent::new(
            hosts.into(),
            None,
            SshServer::default(),
            Outwards::default(),
        )
    }

    fn said(status: u16, code: &str) -> Said {
        Said {
            status,
            code: code.into(),
            sentence: String::new(),
        }
    }

    #[test]
    fn an_answer_that_is_not_a_hosts_own_has_the_next_host_asked() {
        for status in [301, 401, 403, 404, 409, 410, 502] {
            let agent = agent();
            let first = agent.host().clone();
            let answer = said(status, "");
            let refusal = match status {
                401 | 403 => Refusal::NotAllowed(answer),
                _ => Refusal::Refused(answer),
            };
            assert_eq!(judge(&agent, &refusal), None, "{status}");
            assert_ne!(agent.host(), &first, "{status}");
        }
    }

    #[test]
    fn a_hosts_own_refusal_is_the_end_of_an_agent_that_no_host_has_taken_in() {
        let refusal = Refusal::NotAllowed(said(403, "token_used"));
        assert_eq!(judge(&agent(), &refusal), Some(Outcome::Refused));
    }
}

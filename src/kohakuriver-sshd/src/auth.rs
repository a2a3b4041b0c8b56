//! Who may come in (RFC 4252): the owners of authorized keys, nobody else.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::keys::{cannot_read, is_authorized, is_supported, verify};
use crate::log;
use crate::shared::{Shared, Stranger};
use crate::sys;
use crate::transport::{Fatal, Transport, protocol_error, reason};
use crate::wire::{Malformed, Put, Reader};

/// Until the client's version line, and until it proved who it is.
const GREETING: Duration = Duration::from_secs(10);
const LOGIN: Duration = Duration::from_secs(30);

const SERVICE_ACCEPT: u8 = 6;
const USERAUTH_FAILURE: u8 = 51;
const USERAUTH_SUCCESS: u8 = 52;
const USERAUTH_PK_OK: u8 = 60;

/// The request's message number.
pub const USERAUTH_REQUEST: u8 = 50;
/// An agent may hold many keys, and each is one attempt.
const MOST_ATTEMPTS: u32 = 30;
/// With the questions whether a key would do, which are no attempts.
const MOST_REQUESTS: u32 = 2 * MOST_ATTEMPTS;

/// What to tell the client.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// Come in, under this login name (as it is logged).
    Success(String),
    /// Try another key.
    Failure,
    /// This key would do: sign with it. Algorithm and public key.
    Sign(String, Vec<u8>),
    /// Too many attempts.
    Enough,
}

/// The attempts of one connection.
#[derive(Default)]
pub struct Attempts {
    failed: u32,
    requests: u32,
}

impl Attempts {
    /// Judges one request, the whole message. `may_enter` is asked about a login name and a public key.
    pub fn judge(
        &mut self,
        message: &[u8],
        session: &[u8],
        may_enter: impl Fn(&[u8], &[u8]) -> bool,
    ) -> Result<Answer, Malformed> {
        let answer = judge(message, session, may_enter)?;
        self.requests += 1;
        self.failed += u32::from(answer == Answer::Failure);
        let enough = self.failed > MOST_ATTEMPTS || self.requests > MOST_REQUESTS;
        Ok(match answer {
            Answer::Success(_) => answer,
            _ if enough => Answer::Enough,
            _ => answer,
        })
    }
}

fn judge(
    message: &[u8],
    session: &[u8],
    may_enter: impl Fn(&[u8], &[u8]) -> bool,
) -> Result<Answer, Malformed> {
    let mut reader = Reader::new(message);
    reader.u8()?;
    let (user, service, method) = (reader.string()?, reader.string()?, reader.string()?);
    if method != b"publickey" || service != b"ssh-connection" {
        return Ok(Answer::Failure);
    }
    let signed = reader.bool()?;
    let (algorithm, blob) = (reader.text()?, reader.string()?);
    let covered = message.len() - reader.rest().len();
    let signature = if signed { reader.string()? } else { b"" };
    reader.end()?;
    if !is_supported(blob, algorithm) || !may_enter(user, blob) {
        return Ok(Answer::Failure);
    }
    if !signed {
        return Ok(Answer::Sign(algorithm.into(), blob.into()));
    }
    let mut proven = Vec::new();
    proven.put_string(session);
    proven.put_raw(&message[..covered]);
    Ok(if verify(algorithm, blob, signature, &proven) {
        Answer::Success(String::from_utf8_lossy(user).into_owned())
    } else {
        Answer::Failure
    })
}

/// How far one client has come with its login.
pub struct Login {
    attempts: Attempts,
    /// The client asked for the service that logs in.
    may_log_in: bool,
    /// Until the login, what counts this client among strangers; from then on its place.
    stranger: Option<Stranger>,
    place: Option<Arc<()>>,
    began: Instant,
}

impl Login {
    /// A client that has just connected.
    pub fn of(stranger: Stranger) -> Self {
        Self {
            attempts: Attempts::default(),
            may_log_in: false,
            stranger: Some(stranger),
            place: None,
            began: Instant::now(),
        }
    }

    /// Was the client let in?
    pub fn is_done(&self) -> bool {
        self.place.is_some()
    }

    /// How long the client may still take, None once it is in; an error where it took too long.
    pub fn patience(&self, is_greeted: bool) -> Result<Option<Duration>, Fatal> {
        if self.is_done() {
            return Ok(None);
        }
        let limit = if is_greeted { LOGIN } else { GREETING };
        match limit.checked_sub(self.began.elapsed()) {
            Some(left) => Ok(Some(left)),
            None => Err(protocol_error("the login takes too long")),
        }
    }

    /// The client asks for a service (RFC 4253 §10).
    pub fn service(&mut self, name: &[u8], transport: &mut Transport) -> Result<(), Fatal> {
        if name != b"ssh-userauth" && (name != b"ssh-connection" || !self.is_done()) {
            return Err(Fatal::Ours(
                reason::SERVICE_NOT_AVAILABLE,
                "there is no such service".into(),
            ));
        }
        self.may_log_in = true;
        transport.send(SERVICE_ACCEPT, |message| message.put_string(name));
        Ok(())
    }

    /// The client asks to be let in: `payload` is the whole message, `peer` is for the log.
    pub fn request(
        &mut self,
        payload: &[u8],
        peer: &str,
        shared: &Shared,
        transport: &mut Transport,
    ) -> Result<(), Fatal> {
        if self.is_done() {
            return Ok(());
        }
        if !self.may_log_in {
            return Err(protocol_error("ask for the service first"));
        }
        let session = transport.session().expect("keys were exchanged").to_vec();
        let may_enter = |user: &[u8], blob: &[u8]| {
            // Read each time: a key that was added or removed counts at once.
            let keys = sys::read_file(&shared.authorized_keys).unwrap_or_else(|error| {
                let why = cannot_read(&shared.authorized_keys, &error);
                log!("{peer}: nobody is let in: {why}");
                Vec::new()
            });
            shared.is_login(user) && is_authorized(&keys, blob)
        };
        match self.attempts.judge(payload, &session, may_enter)? {
            Answer::Success(user) => {
                self.let_in(shared)?;
                log!("{peer}: {user} was let in");
                transport.send(USERAUTH_SUCCESS, |_| {});
            }
            Answer::Failure => transport.send(USERAUTH_FAILURE, |message| {
                message.put_string(b"publickey");
                message.put_bool(false);
            }),
            Answer::Sign(algorithm, blob) => transport.send(USERAUTH_PK_OK, |message| {
                message.put_string(algorithm.as_bytes());
                message.put_string(&blob);
            }),
            Answer::Enough => {
                let sentence = "none of the keys that were tried is an authorized one";
                return Err(Fatal::Ours(reason::NO_MORE_AUTH_METHODS, sentence.into()));
            }
        }
        Ok(())
    }

    fn let_in(&mut self, shared: &Shared) -> Result<(), Fatal> {
        self.place = shared.connections.take(shared.most);
        if self.place.is_none() {
            let sentence = "too many connections to this task are open; close one and try again";
            return Err(Fatal::Ours(reason::TOO_MANY_CONNECTIONS, sentence.into()));
        }
        self.stranger = None;
        Ok(())
    }
}

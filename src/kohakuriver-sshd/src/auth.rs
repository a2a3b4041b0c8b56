//! Who may come in (RFC 4252): the owners of authorized keys, nobody else.

use crate::keys::{is_supported, verify};
use crate::wire::{Malformed, Put, Reader};

/// The request's message number.
pub const USERAUTH_REQUEST: u8 = 50;
/// An agent may hold many keys, and each is one attempt.
const MOST_ATTEMPTS: u32 = 30;
/// With the questions whether a key would do, which are no attempts.
const MOST_REQUESTS: u32 = 2 * MOST_ATTEMPTS;

/// What to tell the client.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// Come in, under this login name.
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
        may_enter: impl Fn(&str, &[u8]) -> bool,
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
    may_enter: impl Fn(&str, &[u8]) -> bool,
) -> Result<Answer, Malformed> {
    let mut reader = Reader::new(message);
    reader.u8()?;
    let (user, service, method) = (reader.text()?, reader.string()?, reader.string()?);
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
        Answer::Success(user.into())
    } else {
        Answer::Failure
    })
}

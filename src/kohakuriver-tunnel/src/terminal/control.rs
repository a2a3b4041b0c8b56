//! What the other threads tell a terminal's thread.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::beyond::{Outcome, STANDS};
use super::frames::tag;
use super::output::Output;
use crate::children::Watcher;
use crate::errors::Told;
use crate::sys::{self, Change};

/// Wakes the thread of one terminal, and says why.
pub struct Control {
    bell: File,
    exit: Mutex<Option<Change>>,
    next: Mutex<Option<Attachment>>,
    revoked: AtomicBool,
}

/// The thread's end of a line, and whether the stream at the other end has a link.
pub struct Attachment {
    pub(super) line: UnixStream,
    pub(super) attended: Arc<AtomicBool>,
    pub(super) rows: u16,
    pub(super) cols: u16,
}

impl Attachment {
    /// Whether the stream has a link.
    pub fn attended(&self) -> bool {
        self.attended.load(Ordering::SeqCst)
    }

    /// Says one more thing to whoever has the terminal no longer; not if that would have to wait.
    pub fn part(&self, output: &Output, tag: u8, text: &[u8]) {
        let _ = (&self.line).write(&output.parting(tag, text));
    }
}

impl Control {
    /// Of a terminal that has no line yet.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            bell: sys::bell()?,
            exit: Mutex::default(),
            next: Mutex::default(),
            revoked: AtomicBool::default(),
        })
    }

    /// Has the terminal go on over another line. One that it was to go on with before is told that it is not.
    pub fn offer(&self, attachment: Attachment) {
        if let Some(before) = lock(&self.next).replace(attachment) {
            before.part(&Output::default(), tag::TAKEN, b"");
        }
        self.ring();
    }

    /// Whether there is another line to go on with.
    pub fn is_offered(&self) -> bool {
        lock(&self.next).is_some()
    }

    /// The line to go on with, if there is another.
    pub fn next(&self) -> Option<Attachment> {
        lock(&self.next).take()
    }

    /// Its user may be here no longer.
    pub fn revoke(&self) {
        self.revoked.store(true, Ordering::SeqCst);
        self.ring();
    }

    /// Whether its user may be here no longer.
    pub fn revoked(&self) -> bool {
        self.revoked.load(Ordering::SeqCst)
    }

    /// How the command ended, if it has.
    pub fn exit(&self) -> Option<Change> {
        *lock(&self.exit)
    }

    /// What is readable once something has changed.
    pub fn bell(&self) -> RawFd {
        self.bell.as_raw_fd()
    }

    /// Makes it unreadable.
    pub fn hush(&self) {
        let _ = (&self.bell).read(&mut [0; 8]);
    }

    fn ring(&self) {
        // Where it can't be written it rings already.
        let _ = (&self.bell).write(&1u64.to_ne_bytes());
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Watcher for Control {
    fn ended(&self, change: Change) {
        *lock(&self.exit) = Some(change);
        self.ring();
    }
}

/// The stream's end of a terminal.
pub struct Line {
    sock: UnixStream,
    /// None where the other end need not know whether there is a link.
    terminal: Option<(Arc<AtomicBool>, Arc<Control>)>,
    /// Of a connection that leads beyond the task.
    beyond: Option<Arc<Outcome>>,
}

/// Of the reason why such a connection does not stand.
const LONGEST_REASON: usize = 1 << 10;

impl Line {
    pub(super) fn new(sock: UnixStream, attended: Arc<AtomicBool>, control: Arc<Control>) -> Self {
        Self {
            sock,
            terminal: Some((attended, control)),
            beyond: None,
        }
    }

    /// A connection that leads beyond the task. It says first whether it stands.
    pub(super) fn beyond(
        sock: UnixStream,
        attended: Arc<AtomicBool>,
        control: Arc<Control>,
        outcome: Arc<Outcome>,
    ) -> Self {
        Self {
            sock,
            terminal: Some((attended, control)),
            beyond: Some(outcome),
        }
    }

    /// Whether what it leads to is there. Raises why it is not.
    pub fn dialled(&mut self) -> io::Result<bool> {
        if self.beyond.is_none() {
            return Ok(true);
        }
        let mut first = [0];
        match self.sock.read(&mut first) {
            Ok(0) => Err(io::ErrorKind::ConnectionAborted.into()),
            Ok(_) if first == [STANDS] => Ok(true),
            Ok(_) => {
                let mut reason = vec![0; LONGEST_REASON];
                let length = self.sock.read(&mut reason)?;
                let reason = String::from_utf8_lossy(&reason[..length]).into_owned();
                Err(io::Error::other(Told(reason)))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Reads what comes from the other end. Raises what broke the connection behind it.
    pub fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.sock.read(buffer)?;
        match &self.beyond {
            Some(outcome) if length == 0 => outcome.broken().map(|()| 0),
            _ => Ok(length),
        }
    }

    /// The end that is coming is to be told as a break.
    pub fn reset_on_close(&self) {
        if let Some(outcome) = &self.beyond {
            outcome.reset();
        }
    }

    /// A line at whose other end nobody is any more, or somebody who waits until it can be written.
    pub(super) fn plain(sock: UnixStream) -> Self {
        Self {
            sock,
            terminal: None,
            beyond: None,
        }
    }

    /// What the terminal's bytes go through.
    pub fn sock(&mut self) -> &mut UnixStream {
        &mut self.sock
    }

    /// The stream has a link from now on, or has none.
    pub fn attend(&self, yes: bool) {
        if let Some((attended, control)) = &self.terminal {
            attended.store(yes, Ordering::SeqCst);
            control.ring();
        }
    }
}

impl AsRawFd for Line {
    fn as_raw_fd(&self) -> RawFd {
        self.sock.as_raw_fd()
    }
}

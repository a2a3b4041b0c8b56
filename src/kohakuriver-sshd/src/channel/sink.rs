//! Where the client's data goes: a descriptor that may not take it now, or may be gone.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use crate::sys;

/// How the end of the client's data reaches the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// A pipe is closed.
    Close,
    /// A socket is shut down in this direction.
    ShutDown,
    /// A terminal stays as it is.
    Nothing,
}

/// A descriptor, and what waits for it. Its methods give how many bytes are out of the way: written, or nobody's any more.
#[derive(Default)]
pub(super) struct Sink {
    to: Option<(Arc<OwnedFd>, Ending)>,
    pending: VecDeque<u8>,
}

impl Sink {
    /// Where data goes from now on.
    pub(super) fn set(&mut self, fd: Arc<OwnedFd>, ending: Ending) {
        self.to = Some((fd, ending));
    }

    /// Can anything still be written?
    pub(super) fn is_there(&self) -> bool {
        self.to.is_some()
    }

    /// The descriptor, where something waits for it.
    pub(super) fn blocked(&self) -> Option<RawFd> {
        let (fd, _) = self.to.as_ref()?;
        (!self.pending.is_empty()).then(|| fd.as_raw_fd())
    }

    /// Takes data. Where there is no descriptor it is kept for one that comes, if it `keeps` that.
    pub(super) fn take(&mut self, data: &[u8], keeps: bool) -> u32 {
        let mut written = 0;
        if self.pending.is_empty() {
            written = self.write(data);
        }
        if self.is_there() || keeps {
            self.pending.extend(&data[written..]);
            written as u32
        } else {
            data.len() as u32
        }
    }

    /// Writes what waits, then the end where the client is `at_end`.
    pub(super) fn flush(&mut self, keeps: bool, at_end: bool) -> u32 {
        let mut taken = 0;
        while !self.pending.is_empty() && self.is_there() {
            let mut pending = std::mem::take(&mut self.pending);
            let front = pending.as_slices().0;
            let (whole, written) = (front.len(), self.write(front));
            pending.drain(..written);
            self.pending = pending;
            taken += written;
            if written < whole {
                break;
            }
        }
        if !self.is_there() && !keeps {
            taken += std::mem::take(&mut self.pending).len();
        }
        if at_end && self.pending.is_empty() {
            self.end();
        }
        taken as u32
    }

    /// Writes what the descriptor takes now. One that is broken is given up.
    fn write(&mut self, data: &[u8]) -> usize {
        let Some((fd, _)) = &self.to else { return 0 };
        let mut written = 0;
        while written < data.len() {
            match sys::write(fd.as_raw_fd(), &data[written..]) {
                Ok(count) => written += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(_) => {
                    self.to = None;
                    break;
                }
            }
        }
        written
    }

    fn end(&mut self) {
        match self.to.take() {
            Some((fd, Ending::ShutDown)) => sys::shut_down_writing(fd.as_raw_fd()),
            Some((fd, Ending::Nothing)) => self.to = Some((fd, Ending::Nothing)),
            Some((_, Ending::Close)) | None => {}
        }
    }
}

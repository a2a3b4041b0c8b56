//! Terminals: commands that run in the container, each on a pseudo-terminal or on three pipes, as the far end of a
//! stream (docs/protocol.md §6, "Terminals that outlive links").
//!
//! A terminal has a thread of its own, which talks to its stream over a pair of sockets: to the stream it is a service
//! like any other, so windows, acknowledgements and resumption are those of every stream.

mod beyond;
mod control;
mod door;
mod frames;
mod named;
mod output;
mod run;
mod spawn;
mod start;
mod users;

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use socket2::SockRef;

use crate::offer::Offer;
use crate::protocol::Mark;
use crate::{files, log};
use beyond::{Asked, Beyond};
use control::Attachment;
pub use control::{Control, Line};
use frames::tag;
use named::Named;
use output::Output;
pub use start::Start;

/// What a thread needs: it has no deep calls.
const STACK: usize = 256 << 10;
/// How much a terminal says ahead of its stream, about.
const ON_ITS_WAY: usize = 32 << 10;
/// A user's terminals with names are this part of all terminals at most: they stay when nobody looks at them.
const NAMED_PART: usize = 4;

/// For each terminal that there may be, so many connections may lead beyond the task: they start nothing.
const BEYOND_FOR_EACH: usize = 4;

/// All terminals of this client.
pub struct Terminals {
    places: Places,
    named: Named,
    beyond: Beyond,
}

/// How many there may be at the same time.
struct Places {
    most: usize,
    taken: Arc<AtomicUsize>,
}

impl Places {
    fn new(most: usize) -> Self {
        let taken = Arc::default();
        Self { most, taken }
    }

    /// One more; the error is `EAGAIN`.
    fn take(&self) -> io::Result<Place> {
        let place = Place(Arc::clone(&self.taken));
        if self.taken.fetch_add(1, Ordering::SeqCst) < self.most {
            Ok(place)
        } else {
            Err(io::Error::from_raw_os_error(libc::EAGAIN))
        }
    }
}

/// One more, until it is dropped.
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Terminals {
    /// None yet, and no more than `most`.
    pub fn new(most: usize, offer: &Offer) -> Self {
        Self {
            places: Places::new(most),
            named: Named::default(),
            beyond: Beyond::new(most * BEYOND_FOR_EACH, offer),
        }
    }

    /// Starts what `start` says (see [`Start`]) for the user of this mark, or takes the session of that name up. What
    /// goes wrong from here on is said over the line; an error is `EAGAIN` where there are too many, `EDQUOT` where this
    /// user has too many sessions, `EPROTO` where `start` makes no sense, or the system's.
    pub fn open(&self, start: &[u8], mark: &Mark) -> io::Result<Line> {
        let nonsense = || io::Error::from_raw_os_error(libc::EPROTO);
        let start = Start::parse(start).ok_or_else(nonsense)?;
        if start.list {
            return self.list(mark);
        }
        if start.files {
            return self.files(start);
        }
        if start.beyond {
            let asked = Asked::parse(&start.command).ok_or_else(nonsense)?;
            return self.beyond.open(asked, mark);
        }
        if !start.session.is_empty() && !start.on_terminal {
            return Err(nonsense());
        }
        let (near, at) = attachment(&start)?;
        let attended = Arc::clone(&at.attended);
        let control = if start.session.is_empty() {
            self.begin(start, at, mark)?
        } else {
            match self.named.attach(mark, &start.session, at) {
                Ok(control) => control,
                Err(at) => self.begin(start, at, mark)?,
            }
        };
        Ok(Line::new(near, attended, control))
    }

    fn begin(&self, start: Start, at: Attachment, mark: &Mark) -> io::Result<Arc<Control>> {
        let place = self.places.take()?;
        let control = Arc::new(Control::new()?);
        let registered = if start.session.is_empty() {
            None
        } else {
            let most = (self.places.most / NAMED_PART).max(1);
            let registered = self
                .named
                .register(mark, &start.session, &at, &control, most);
            Some(registered.ok_or(io::Error::from_raw_os_error(libc::EDQUOT))?)
        };
        control.offer(at);
        let its = Arc::clone(&control);
        thread::Builder::new()
            .name("terminal".into())
            .stack_size(STACK)
            .spawn(move || {
                let _place = place;
                run::run(&start, its, registered);
            })?;
        Ok(control)
    }

    /// Says which sessions the user of this mark has; what came of it ends as a command does.
    fn list(&self, mark: &Mark) -> io::Result<Line> {
        let (near, far) = line()?;
        let mut output = Output::default();
        output.frame(tag::STARTED, &[]);
        output.frame(tag::OUTPUT, self.named.listed(mark).as_bytes());
        output.frame(tag::EXIT, &0u32.to_be_bytes());
        output.write_to(&far)?;
        Ok(Line::plain(near))
    }

    /// Files are read or written for whoever has the stream, by a thread that ends with it.
    fn files(&self, start: Start) -> io::Result<Line> {
        let place = self.places.take()?;
        let (near, far) = line()?;
        far.set_nonblocking(false)?;
        thread::Builder::new()
            .name("files".into())
            .stack_size(STACK)
            .spawn(move || {
                let _place = place;
                if let Err(error) = files::serve(&start.command, &start.workdir, &far) {
                    log!(Debug, "a stream of files ended: {error}");
                }
            })?;
        Ok(Line::plain(near))
    }

    /// The sessions of this user end.
    pub fn revoke(&self, mark: &Mark) {
        self.named.revoke(mark);
    }
}

/// Two sockets, the stream's and the terminal's.
fn line() -> io::Result<(UnixStream, UnixStream)> {
    let (near, far) = UnixStream::pair()?;
    near.set_nonblocking(true)?;
    far.set_nonblocking(true)?;
    Ok((near, far))
}

/// The two ends of a new line of a terminal.
fn attachment(start: &Start) -> io::Result<(UnixStream, Attachment)> {
    let (near, far) = line()?;
    if start.on_terminal {
        // Whoever presses Ctrl-C waits for all that is on its way.
        SockRef::from(&far).set_send_buffer_size(ON_ITS_WAY)?;
    }
    let at = Attachment {
        line: far,
        attended: Arc::new(AtomicBool::new(true)),
        rows: start.rows,
        cols: start.cols,
    };
    Ok((near, at))
}

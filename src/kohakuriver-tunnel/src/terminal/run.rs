//! The thread of one terminal: bytes between its stream and its command, until one of them ends.
//!
//! While the stream has a link nothing is read from the command that the stream does not take: whoever is slow slows its
//! own command down. While it has none, a terminal is read on, so that no command waits for a person who has gone; pipes
//! are not: what goes through them is data.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::control::{Attachment, Control};
use super::frames::{Asked, Reader, tag};
use super::named::Registered;
use super::output::Output;
use super::spawn::{self, Ends, Failure};
use super::start::Start;
use crate::sys::{self, Change, Wish};
use crate::{children, log};

const PIECE: usize = 64 << 10;
/// So often what the command says is read before it is looked what else there is.
const TURNS: usize = 16;
/// For so long a terminal has another size, so that its programs see one.
const SEEN: Duration = Duration::from_millis(20);
/// End of input, as a person types it.
const CTRL_D: u8 = 4;

/// From the command's start to its end, or that of the stream; a terminal that is `registered` outlives its streams.
pub fn run(start: &Start, control: Arc<Control>, registered: Option<Registered>) {
    let Some(first) = control.next() else { return };
    match spawn::start(start, &control) {
        Ok((pid, ends)) => {
            let mut terminal = Terminal::new(pid, ends, first, control, registered);
            if let Err(error) = terminal.serve() {
                log!(Debug, "a terminal ended: {error}");
                terminal.hang_up();
            }
        }
        Err(failure) => {
            drop(registered);
            let _ = say(start, &failure, first);
        }
    }
}

/// Tells the user why nothing runs.
fn say(start: &Start, failure: &Failure, mut at: Attachment) -> io::Result<()> {
    let mut output = Output::default();
    match failure {
        Failure::Refused(text) => output.frame(tag::FAILED, text.as_bytes()),
        Failure::Command(code, text) => {
            output.frame(tag::STARTED, &[]);
            let (tag, end) = if start.on_terminal {
                (tag::OUTPUT, "\r\n")
            } else {
                (tag::ERRORS, "\n")
            };
            output.frame(tag, format!("{text}{end}").as_bytes());
            output.frame(tag::EXIT, &(*code as u32).to_be_bytes());
        }
    }
    at.line.set_nonblocking(false)?;
    output.write_to(&mut at.line)?;
    last_word(&at)
}

/// Nothing more comes; waits until the stream has let go.
fn last_word(at: &Attachment) -> io::Result<()> {
    let line = &at.line;
    line.shutdown(std::net::Shutdown::Write)?;
    line.set_nonblocking(false)?;
    io::copy(&mut &*line, &mut io::sink()).map(drop)
}

struct Terminal {
    pid: libc::pid_t,
    ends: Ends,
    /// None while nobody has this terminal, which has a name then.
    line: Option<Attachment>,
    control: Arc<Control>,
    registered: Option<Registered>,
    reader: Reader,
    asked: VecDeque<Asked>,
    output: Output,
    buffer: Vec<u8>,
    attended: bool,
    /// How the command ended, and then whether all that it said before has been read.
    exit: Option<Change>,
    through: bool,
    /// The user's end was told, or will be: it is the last frame.
    told: bool,
}

/// What is waited for; -1 is nothing.
type Waits = [(RawFd, Wish); 6];

impl Terminal {
    fn new(
        pid: libc::pid_t,
        ends: Ends,
        first: Attachment,
        control: Arc<Control>,
        registered: Option<Registered>,
    ) -> Self {
        let mut output = match registered {
            Some(_) => Output::with_history(),
            None => Output::default(),
        };
        output.frame(tag::STARTED, &[]);
        Self {
            pid,
            ends,
            line: Some(first),
            control,
            registered,
            reader: Reader::default(),
            asked: VecDeque::new(),
            output,
            buffer: vec![0; PIECE],
            attended: true,
            exit: None,
            through: false,
            told: false,
        }
    }

    /// An error means that the stream has gone, or the right to it.
    fn serve(&mut self) -> io::Result<()> {
        loop {
            if self.control.revoked() {
                return Err(io::ErrorKind::PermissionDenied.into());
            }
            if let Some(next) = self.control.next() {
                self.go_on_over(next);
            }
            match self.turn() {
                Ok(true) => {}
                Ok(false) if self.retire() => return self.line.as_ref().map_or(Ok(()), last_word),
                Ok(false) => {} // somebody has come at the last moment
                Err(error) if self.registered.is_none() => return Err(error),
                Err(_) => self.leave(),
            }
        }
    }

    /// One round; whether there is another.
    fn turn(&mut self) -> io::Result<bool> {
        self.attended = self.line.as_ref().is_some_and(Attachment::attended);
        self.exit = self.exit.or(self.control.exit());
        self.take_input()?;
        self.read_output()?;
        self.send()?;
        if self.through && (self.output.is_empty() || self.line.is_none()) {
            if self.told || self.line.is_none() {
                return Ok(false);
            }
            self.tell_exit();
            return Ok(true);
        }
        if self.exit.is_some() && self.reads() && matches!(self.ends, Ends::Terminal { .. }) {
            // What it said last is there, or nothing: no event would tell.
            return Ok(true);
        }
        sys::wait(&self.waits())?;
        self.control.hush();
        Ok(true)
    }

    fn send(&mut self) -> io::Result<()> {
        match &self.line {
            Some(at) if self.attended => self.output.write_to(&at.line),
            _ => Ok(()),
        }
    }

    // ---- whose it is ---------------------------------------------------------------------------

    /// The stream has gone, and the terminal stays.
    fn leave(&mut self) {
        self.line = None;
        self.asked.clear();
    }

    fn go_on_over(&mut self, next: Attachment) {
        if let Some(last) = self.line.take() {
            last.part(&self.output, tag::TAKEN, b"");
        }
        (self.reader, self.told) = (Reader::default(), false);
        self.asked.clear();
        self.output.again();
        self.output.frame(tag::STARTED, &[]);
        if let Ends::Terminal { ours, .. } = &self.ends {
            // Programs paint their screens anew when the size changes, and only then.
            let _ = sys::set_size(ours, next.rows.saturating_add(1), next.cols);
            thread::sleep(SEEN);
            let _ = sys::set_size(ours, next.rows, next.cols);
        }
        self.line = Some(next);
    }

    /// No stream can come to this terminal any more; false if one has come before.
    fn retire(&mut self) -> bool {
        match &self.registered {
            Some(registered) if !registered.retire() => false,
            _ => {
                self.registered = None;
                true
            }
        }
    }

    /// Where there is a terminal the kernel does it when that is closed; twice would hit what tidies up.
    fn hang_up(&self) {
        if let Ends::Pipes { .. } = self.ends {
            children::signal(self.pid, libc::SIGHUP);
        }
    }

    fn tell_exit(&mut self) {
        self.told = true;
        let code = match self.exit {
            Some(Change::Exited(code)) => code,
            Some(Change::Killed(signal)) => 128 + signal,
            None => return,
        };
        self.output.frame(tag::EXIT, &(code as u32).to_be_bytes());
    }

    // ---- what is waited for --------------------------------------------------------------------

    fn waits(&self) -> Waits {
        let wish = |wanted: bool, fd: RawFd, wish| (if wanted { fd } else { -1 }, wish);
        let typed = !self.asked.is_empty();
        let sends = self.attended && !self.output.is_empty();
        let line = self.line.as_ref().map_or(-1, |at| at.line.as_raw_fd());
        let [first, second, third] = match &self.ends {
            Ends::Terminal { ours, .. } => [
                wish(self.reads(), ours.as_raw_fd(), Wish::Read),
                wish(typed, ours.as_raw_fd(), Wish::Write),
                (-1, Wish::Read),
            ],
            Ends::Pipes {
                input,
                output,
                errors,
            } => {
                let fd = |end: &Option<File>| end.as_ref().map_or(-1, AsRawFd::as_raw_fd);
                [
                    wish(self.reads(), fd(output), Wish::Read),
                    wish(self.reads(), fd(errors), Wish::Read),
                    wish(typed, fd(input), Wish::Write),
                ]
            }
        };
        [
            (self.control.bell(), Wish::Read),
            // Its end is told whatever is wished.
            (line, if typed { Wish::End } else { Wish::Read }),
            wish(sends, line, Wish::Write),
            first,
            second,
            third,
        ]
    }

    /// Whether to read what the command says.
    fn reads(&self) -> bool {
        match self.ends {
            _ if self.through => false,
            Ends::Terminal { .. } => !self.attended || self.output.is_empty(),
            Ends::Pipes { .. } => self.output.is_empty(),
        }
    }

    // ---- to the command ------------------------------------------------------------------------

    fn take_input(&mut self) -> io::Result<()> {
        for _ in 0..TURNS {
            while let Some(asked) = self.asked.pop_front() {
                if let Some(rest) = self.answer(asked) {
                    self.asked.push_front(rest);
                    // That the stream has gone is noticed all the same.
                    return match &self.line {
                        Some(at) if sys::has_ended(&at.line) => {
                            Err(io::ErrorKind::UnexpectedEof.into())
                        }
                        _ => Ok(()),
                    };
                }
            }
            let Some(at) = &mut self.line else {
                return Ok(());
            };
            match at.line.read(&mut self.buffer) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(length) => {
                    if !self.reader.take(&self.buffer[..length], &mut self.asked) {
                        return Err(io::ErrorKind::InvalidData.into());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Does what is asked for; what is left of it where that has to wait.
    fn answer(&mut self, asked: Asked) -> Option<Asked> {
        match asked {
            Asked::Input(bytes) => self.type_in(bytes),
            Asked::End => match &mut self.ends {
                Ends::Terminal { .. } => self.type_in(vec![CTRL_D]),
                Ends::Pipes { input, .. } => {
                    *input = None;
                    None
                }
            },
            Asked::Resize(rows, cols) => {
                if let Ends::Terminal { ours, .. } = &self.ends {
                    let _ = sys::set_size(ours, rows, cols);
                }
                None
            }
            Asked::Signal(number) => {
                children::signal(self.pid, number.into());
                None
            }
        }
    }

    /// What nobody reads any more is thrown away.
    fn type_in(&mut self, mut bytes: Vec<u8>) -> Option<Asked> {
        let input = match &mut self.ends {
            Ends::Terminal { ours, .. } => Some(ours),
            Ends::Pipes { input, .. } => input.as_mut(),
        }?;
        if self.exit.is_some() && self.through {
            return None;
        }
        while !bytes.is_empty() {
            match input.write(&bytes) {
                Ok(written) => drop(bytes.drain(..written)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Some(Asked::Input(bytes));
                }
                Err(_) => return None,
            }
        }
        None
    }

    // ---- from the command ----------------------------------------------------------------------

    fn read_output(&mut self) -> io::Result<()> {
        let attended = self.attended;
        let line = self.line.as_ref().map(|at| &at.line);
        match &mut self.ends {
            Ends::Terminal { ours, .. } => {
                // All that it said is in the kernel by the time that its end is known.
                let ended = self.exit.is_some();
                for _ in 0..TURNS {
                    if self.through || (attended && !self.output.is_empty()) {
                        break;
                    }
                    match ours.read(&mut self.buffer) {
                        Ok(length @ 1..) => self.output.keep(&self.buffer[..length]),
                        Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                            self.through = ended;
                            break;
                        }
                        _ => self.through = ended,
                    }
                    if let Some(line) = line.filter(|_| attended) {
                        self.output.write_to(line)?;
                    }
                }
            }
            Ends::Pipes { output, errors, .. } => {
                for (end, tag) in [(output, tag::OUTPUT), (errors, tag::ERRORS)] {
                    for _ in 0..TURNS {
                        let read = self.output.is_empty()
                            && read_pipe(end, &mut self.buffer, tag, &mut self.output);
                        if !read {
                            break;
                        }
                        if let Some(line) = line.filter(|_| attended) {
                            self.output.write_to(line)?;
                        }
                    }
                }
                if let Ends::Pipes {
                    output: None,
                    errors: None,
                    ..
                } = self.ends
                {
                    self.through = self.exit.is_some();
                }
            }
        }
        Ok(())
    }
}

/// Reads once; whether something came. The pipe is closed at its end.
fn read_pipe(end: &mut Option<File>, buffer: &mut [u8], tag: u8, output: &mut Output) -> bool {
    let Some(pipe) = end else { return false };
    match pipe.read(buffer) {
        Ok(length @ 1..) => {
            output.frame(tag, &buffer[..length]);
            true
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
        Err(error) if error.kind() == io::ErrorKind::Interrupted => false,
        _ => {
            *end = None;
            false
        }
    }
}

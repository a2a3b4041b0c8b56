//! The main thread: signals, children, and the exit code. The tunnel runs beside it.

use std::ffi::OsString;
use std::io;
use std::mem;
use std::os::unix::process::CommandExt;
use std::process::{self, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crate::children;
use crate::sys::{self, Change, SignalSet};

/// The exit code that shells give for a program that can't be run.
pub const NOT_EXECUTABLE: i32 = 126;
/// The one for a program that isn't there.
pub const NOT_FOUND: i32 = 127;

/// How long the command of an agent has to end by itself before it is killed.
const GRACE: Duration = Duration::from_secs(10);

/// Signals that the command gets as well as we.
const FORWARDED: [libc::c_int; 7] = [
    libc::SIGTERM,
    libc::SIGINT,
    libc::SIGHUP,
    libc::SIGQUIT,
    libc::SIGUSR1,
    libc::SIGUSR2,
    libc::SIGWINCH,
];
const ENDING: [libc::c_int; 3] = [libc::SIGTERM, libc::SIGINT, libc::SIGQUIT];

/// What we can't do without, and what whoever started us may ignore: an ignored signal is not even waited for.
const NEEDED: [libc::c_int; 2] = [libc::SIGCHLD, libc::SIGTERM];

/// Takes the signals that we need, also where they are ignored; those that were.
pub fn take_signals() -> Vec<libc::c_int> {
    let ignored = |signal: &libc::c_int| sys::stop_ignoring(*signal);
    NEEDED.into_iter().filter(ignored).collect()
}

/// Signals that are waited for rather than suffered. To be made before any other thread, so that
/// none of them takes one.
pub fn block_signals() -> io::Result<SignalSet> {
    SignalSet::block(FORWARDED.iter().copied().chain([libc::SIGCHLD]))
}

/// The signal that ends what has not begun yet, once one has come. A terminal that hung up is one of those; what is
/// ignored is not, as SIGHUP by `nohup`.
pub fn told_to_end() -> Option<libc::c_int> {
    let ending = ENDING.into_iter().chain([libc::SIGHUP]);
    let counting: Vec<_> = ending.filter(|signal| !sys::is_ignored(*signal)).collect();
    SignalSet::take(&counting)
}

/// Starts `command`, with our own input or, with `open_stdin`, one that stays open and empty, with the limit of open files and the ignored signals that we were given ourselves; its process id.
/// An error is the exit code that a shell would give, and a sentence.
pub fn start(
    command: &[OsString],
    open_stdin: bool,
    files: libc::rlimit,
    ignored: &[libc::c_int],
) -> Result<libc::pid_t, (i32, String)> {
    let mut process = Command::new(&command[0]);
    process.args(&command[1..]);
    if open_stdin {
        process.stdin(Stdio::piped());
    }
    let ignored = ignored.to_vec();
    // SAFETY: only calls system calls, which are safe between fork and exec.
    unsafe {
        process.pre_exec(move || {
            sys::set_file_limit(&files)?;
            sys::die_with_parent()?;
            ignored.iter().for_each(|signal| sys::ignore(*signal));
            sys::unblock_signals()
        })
    };
    match process.spawn() {
        // It is reaped by `supervise` along with every orphan, not through `Child`.
        Ok(mut child) => {
            mem::forget(child.stdin.take()); // our end is never closed
            Ok(child.id() as libc::pid_t)
        }
        Err(error) => {
            let code = if error.kind() == io::ErrorKind::NotFound {
                NOT_FOUND
            } else {
                NOT_EXECUTABLE
            };
            Err((
                code,
                format!("can't start {}: {error}", command[0].to_string_lossy()),
            ))
        }
    }
}

/// Has a program started without our blocked signals.
pub fn unblock(process: &mut Command) {
    // SAFETY: only makes a system call, which is safe between fork and exec.
    unsafe { process.pre_exec(sys::unblock_signals) };
}

/// Ends an agent: its command, with which it ends, or itself where it has none. By another thread than [`supervise`]'s.
#[derive(Debug, Default)]
pub struct Ender(Mutex<(Option<libc::pid_t>, bool)>);

impl Ender {
    /// What is to be ended from now on; at once, if that was asked for before.
    pub fn is_for(&self, pid: libc::pid_t) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        state.0 = Some(pid);
        if state.1 {
            end(pid);
        }
    }

    /// Ends it; not again if it was told to.
    pub fn end(&self) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !mem::replace(&mut state.1, true)
            && let Some(pid) = state.0
        {
            end(pid);
        }
    }
}

fn end(pid: libc::pid_t) {
    sys::send_signal(pid, libc::SIGTERM);
    // With it this process ends, and this thread.
    let _ = thread::Builder::new().spawn(move || {
        thread::sleep(GRACE);
        sys::send_signal(pid, libc::SIGKILL);
    });
}

/// Serves signals and reaps children until `command` ends, or, without one, until told to stop.
/// The exit code.
pub fn supervise(signals: &SignalSet, command: Option<libc::pid_t>) -> i32 {
    loop {
        let signal = signals.wait();
        match command {
            _ if signal.number == libc::SIGCHLD => {
                if let Some(code) = reap(command) {
                    return code;
                }
            }
            // What the terminal sends, it sends to the command too.
            Some(pid) if !signal.from_kernel => sys::send_signal(pid, signal.number),
            None if ENDING.contains(&signal.number) => return 0,
            _ => {}
        }
    }
}

/// Collects all children that have ended; the exit code if `command` is among them.
fn reap(command: Option<libc::pid_t>) -> Option<i32> {
    let mut code = None;
    while let Some((pid, change)) = children::reap_one() {
        if Some(pid) == command {
            code = Some(match change {
                Change::Exited(code) => code,
                Change::Killed(signal) => 128 + signal,
            });
        }
    }
    code
}

/// Makes this process the one that orphans below it come to, as process 1 is anyway.
pub fn adopt_orphans() -> io::Result<()> {
    if process::id() == 1 {
        Ok(())
    } else {
        sys::become_subreaper()
    }
}

//! The few system calls that no library of ours offers.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::OnceLock;
use std::time::Duration;

/// The limit of open files that this process was given.
static FILES: OnceLock<libc::rlimit> = OnceLock::new();

fn check(result: libc::c_int) -> io::Result<()> {
    number(result).map(drop)
}

fn number(result: libc::c_int) -> io::Result<libc::c_int> {
    if result == -1 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// A descriptor that whoever started this process left open for it, from 3 up; of nobody else, and to be taken before
/// this process opens any itself.
pub fn inherited(descriptor: RawFd) -> io::Result<File> {
    // SAFETY: takes no pointers.
    check(unsafe { libc::fcntl(descriptor, libc::F_GETFD) })?;
    // SAFETY: it is open, and nothing here has opened it or knows of it.
    Ok(unsafe { File::from_raw_fd(descriptor) })
}

/// What this process is called in lists of processes, in 15 bytes.
pub fn set_name(name: &CStr) {
    // SAFETY: the kernel reads a string that ends with 0.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
}

/// Takes a variable from the environment, and its bytes from where the kernel shows what this process was started with:
/// who may look there (/proc/PID/environ) is who may run programs beside it.
///
/// # Safety
/// There is no other thread yet, nothing holds a pointer into the environment, and no variable was set since the start.
pub unsafe fn forget_variable(name: &str) {
    let begin = format!("{name}=");
    let mut found = Vec::new();
    // SAFETY: the environment is null or ends with a null pointer, and each string in it with 0. They lie where the
    // kernel has put them, also when no variable has them any more, and are nobody else's.
    unsafe {
        let mut entry = environ;
        while !entry.is_null() && !(*entry).is_null() {
            let bytes = CStr::from_ptr(*entry).to_bytes();
            if bytes.starts_with(begin.as_bytes()) {
                found.push((*entry, bytes.len()));
            }
            entry = entry.add(1);
        }
        std::env::remove_var(name);
        for (at, length) in found {
            at.write_bytes(0, length);
        }
    }
}

unsafe extern "C" {
    /// What this process was started with (environ(7)).
    static environ: *mut *mut libc::c_char;
}

/// Many sockets that are waited for as if they were one, which is readable while one of them has an event (epoll(7)).
pub struct Epoll(OwnedFd);

impl Epoll {
    /// Without any socket.
    pub fn new() -> io::Result<Self> {
        // SAFETY: takes no pointers, and what it returns is nobody else's.
        let fd = unsafe { number(libc::epoll_create1(libc::EPOLL_CLOEXEC))? };
        // SAFETY: as above.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Tells of each change of `socket` to a state of `interest` under `token`, until it is closed.
    pub fn add(&self, socket: &impl AsRawFd, token: u64, interest: libc::c_int) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_ADD, socket.as_raw_fd(), token, interest)
    }

    /// Tells of another interest in a socket that was added, from now on; of a state that it is in already, at once.
    pub fn change(&self, socket: RawFd, token: u64, interest: libc::c_int) -> io::Result<()> {
        self.control(libc::EPOLL_CTL_MOD, socket, token, interest)
    }

    fn control(
        &self,
        what: libc::c_int,
        socket: RawFd,
        token: u64,
        interest: libc::c_int,
    ) -> io::Result<()> {
        let mut event = libc::epoll_event {
            events: (interest | libc::EPOLLRDHUP | libc::EPOLLET) as u32,
            u64: token,
        };
        // SAFETY: the kernel reads one `epoll_event` from a valid place.
        check(unsafe { libc::epoll_ctl(self.0.as_raw_fd(), what, socket, &mut event) })
    }

    /// What has changed by now, or does within `wait` (whole milliseconds), as much of it as there is room for.
    pub fn events<'a>(
        &self,
        room: &'a mut [libc::epoll_event],
        wait: Duration,
    ) -> io::Result<&'a [libc::epoll_event]> {
        let wait = wait.as_millis() as libc::c_int;
        let most = libc::c_int::try_from(room.len()).unwrap_or(libc::c_int::MAX);
        // SAFETY: the kernel writes at most `most` events to a valid place.
        let length = unsafe { libc::epoll_wait(self.0.as_raw_fd(), room.as_mut_ptr(), most, wait) };
        match number(length) {
            Ok(length) => Ok(&room[..length as usize]),
            // A process that was stopped goes on (signal(7)).
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(&[]),
            Err(error) => Err(error),
        }
    }
}

impl AsRawFd for Epoll {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

fn set_option<T>(fd: RawFd, level: libc::c_int, name: libc::c_int, value: &T) -> io::Result<()> {
    let length = mem::size_of::<T>() as libc::socklen_t;
    // SAFETY: `value` is valid for `length` bytes, and the kernel only reads it.
    check(unsafe { libc::setsockopt(fd, level, name, (&raw const *value).cast(), length) })
}

/// Makes the coming `close` of a TCP socket a reset, so that its peer knows that bytes were lost.
pub fn reset_on_close(socket: &impl AsRawFd) {
    let abort = libc::linger {
        l_onoff: 1,
        l_linger: 0,
    };
    // It fails only for a socket that is gone already, which is what is asked for.
    let _ = set_option(
        socket.as_raw_fd(),
        libc::SOL_SOCKET,
        libc::SO_LINGER,
        &abort,
    );
}

/// A Unix socket that is bound after this is for its own user alone: it gets the mode of the socket (unix(7)).
pub fn for_its_user_alone(socket: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: takes no pointers.
    check(unsafe { libc::fchmod(socket.as_raw_fd(), 0o600) })
}

/// The user who listens at the other end of a Unix socket (unix(7), SO_PEERCRED).
pub fn peer_of(socket: &impl AsRawFd) -> io::Result<u32> {
    let mut peer = libc::ucred {
        pid: 0,
        uid: u32::MAX,
        gid: u32::MAX,
    };
    let mut size = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: the kernel writes one `ucred`, and its size, in valid places.
    check(unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut size,
        )
    })?;
    Ok(peer.uid)
}

/// Keeps at most about `bytes` unsent in the kernel, so that a small message overtakes bulk early.
pub fn limit_unsent(socket: &impl AsRawFd, bytes: u32) -> io::Result<()> {
    set_option(
        socket.as_raw_fd(),
        libc::IPPROTO_TCP,
        libc::TCP_NOTSENT_LOWAT,
        &bytes,
    )
}

/// Raises the soft limit of open files to the hard one; the limit as it was.
pub fn raise_file_limit() -> io::Result<libc::rlimit> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the kernel writes one `rlimit` to a valid place.
    check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) })?;
    set_file_limit(&libc::rlimit {
        rlim_cur: limit.rlim_max,
        ..limit
    })?;
    let _ = FILES.set(limit);
    Ok(limit)
}

/// The limit of open files as it was before it was raised.
pub fn file_limit_before() -> Option<libc::rlimit> {
    FILES.get().copied()
}

/// Has reads and writes fail that would wait.
pub fn dont_wait(fd: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: takes no pointers.
    let flags = unsafe { number(libc::fcntl(fd.as_raw_fd(), libc::F_GETFL))? };
    // SAFETY: takes no pointers.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) })
}

/// What one thread rings and another waits for (eventfd(2)): written to it is readable, until it was read.
pub fn bell() -> io::Result<File> {
    let flags = libc::EFD_CLOEXEC | libc::EFD_NONBLOCK;
    // SAFETY: takes no pointers, and what it returns is nobody else's.
    let fd = unsafe { number(libc::eventfd(0, flags))? };
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) }.into())
}

/// What is waited for at a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Wish {
    Read,
    Write,
    /// Only that it has ended.
    End,
    /// Only that it has ended in both directions.
    Gone,
}

/// Waits until one of these descriptors is as wished, or has ended; -1 stands for none.
pub fn wait<const N: usize>(wishes: &[(RawFd, Wish); N]) -> io::Result<()> {
    let mut entries = wishes.map(|(fd, wish)| libc::pollfd {
        fd,
        events: match wish {
            Wish::Read => libc::POLLIN,
            Wish::Write => libc::POLLOUT,
            Wish::End => libc::POLLRDHUP,
            Wish::Gone => 0,
        },
        revents: 0,
    });
    // SAFETY: the kernel reads and writes `N` entries in a valid place.
    let ready = unsafe { libc::poll(entries.as_mut_ptr(), N as libc::nfds_t, -1) };
    match number(ready) {
        Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
        _ => Ok(()),
    }
}

/// Whether the other end of a socket sends no more.
pub fn has_ended(socket: &impl AsRawFd) -> bool {
    tells(socket, libc::POLLRDHUP)
}

/// Whether a socket has ended in both directions.
pub fn has_gone(socket: &impl AsRawFd) -> bool {
    tells(socket, 0)
}

fn tells(socket: &impl AsRawFd, events: libc::c_short) -> bool {
    let mut entry = libc::pollfd {
        fd: socket.as_raw_fd(),
        events,
        revents: 0,
    };
    // SAFETY: the kernel reads and writes one `pollfd` in a valid place.
    unsafe { libc::poll(&mut entry, 1, 0) > 0 }
}

/// A pseudo-terminal: our end, and the one for programs (pty(7)). Needs no `/dev/pts`, only `/dev/ptmx`.
pub fn open_terminal() -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: takes no pointers, and what it returns is nobody else's.
    let ours = unsafe { OwnedFd::from_raw_fd(number(libc::posix_openpt(flags))?) };
    let locked: libc::c_int = 0;
    // SAFETY: the kernel reads one int from a valid place.
    check(unsafe { libc::ioctl(ours.as_raw_fd(), libc::TIOCSPTLCK as _, &locked) })?;
    // SAFETY: takes no pointers, and what it returns is nobody else's.
    let theirs = unsafe { number(libc::ioctl(ours.as_raw_fd(), libc::TIOCGPTPEER as _, flags))? };
    // SAFETY: as above.
    Ok((ours, unsafe { OwnedFd::from_raw_fd(theirs) }))
}

/// Sets a terminal's size in characters; its programs are told when it is another.
pub fn set_size(terminal: &impl AsRawFd, rows: u16, cols: u16) -> io::Result<()> {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the kernel reads one `winsize` from a valid place.
    check(unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ as _, &size) })
}

/// Makes this process the leader of a new session, with its stdin as the session's terminal if it is one. Safe between
/// `fork` and `exec`.
pub fn lead_a_session(on_terminal: bool) -> io::Result<()> {
    // SAFETY: takes no pointers.
    check(unsafe { libc::setsid() })?;
    if !on_terminal {
        return Ok(());
    }
    // SAFETY: takes no pointers.
    check(unsafe { libc::ioctl(libc::STDIN_FILENO, libc::TIOCSCTTY as _, 0) })
}

/// Whose this process is.
pub fn user() -> u32 {
    rustix::process::geteuid().as_raw()
}

/// Makes this process another user's. Safe between `fork` and `exec`.
pub fn become_user(uid: u32, gid: u32, groups: &[u32]) -> io::Result<()> {
    // SAFETY: the kernel reads as many numbers as there are; the other calls take none.
    unsafe {
        check(libc::setgroups(groups.len(), groups.as_ptr()))?;
        check(libc::setgid(gid))?;
        check(libc::setuid(uid))
    }
}

/// Whether a write to `fd` would not wait now.
pub fn is_writable(fd: RawFd) -> bool {
    let mut entry = libc::pollfd {
        fd,
        events: libc::POLLOUT,
        revents: 0,
    };
    // SAFETY: the kernel reads and writes one `pollfd` in a valid place.
    let ready = unsafe { libc::poll(&mut entry, 1, 0) };
    ready == 1 && entry.revents & libc::POLLOUT != 0
}

/// Gives a signal its default disposition; whether it was ignored before.
pub fn stop_ignoring(signal: libc::c_int) -> bool {
    // SAFETY: installs no handler.
    unsafe { libc::signal(signal, libc::SIG_DFL) == libc::SIG_IGN }
}

/// Whether a signal is ignored. One that is blocked as well waits to be taken all the same.
pub fn is_ignored(signal: libc::c_int) -> bool {
    // SAFETY: a disposition is plain data.
    let mut there: libc::sigaction = unsafe { mem::zeroed() };
    // SAFETY: `there` is a valid place; nothing is installed.
    let known = unsafe { libc::sigaction(signal, std::ptr::null(), &mut there) } == 0;
    known && there.sa_sigaction == libc::SIG_IGN
}

/// Ignores a signal. Safe to call between `fork` and `exec`.
pub fn ignore(signal: libc::c_int) {
    // SAFETY: installs no handler.
    unsafe { libc::signal(signal, libc::SIG_IGN) };
}

/// Sets the limit of open files. Safe to call between `fork` and `exec`.
pub fn set_file_limit(limit: &libc::rlimit) -> io::Result<()> {
    // SAFETY: the kernel reads one `rlimit` from a valid place.
    check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, limit) })
}

/// Makes orphaned descendants children of this process.
pub fn become_subreaper() -> io::Result<()> {
    // SAFETY: takes no pointers.
    check(unsafe { libc::prctl(libc::PR_SET_CHILD_SUBREAPER, 1) })
}

/// Kills this process when the thread that started it ends. Safe between `fork` and `exec`.
pub fn die_with_parent() -> io::Result<()> {
    // SAFETY: takes no pointers.
    check(unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) })
}

/// Sends a signal to a child that has not been reaped.
pub fn send_signal(pid: libc::pid_t, signal: libc::c_int) {
    // SAFETY: takes no pointers. It can only fail for a child that has ended already.
    unsafe { libc::kill(pid, signal) };
}

/// What this machine calls itself.
pub fn machine() -> Option<String> {
    let name = rustix::system::uname();
    let name = name.nodename().to_str().ok()?;
    (!name.is_empty()).then(|| name.to_owned())
}

/// How a child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// With this code.
    Exited(i32),
    /// By this signal.
    Killed(i32),
}

/// Collects one child that has ended, if there is one.
pub fn reap_one() -> Option<(libc::pid_t, Change)> {
    let mut status = 0;
    // SAFETY: the kernel writes one int to a valid place.
    let pid = unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) };
    let change = if libc::WIFSIGNALED(status) {
        Change::Killed(libc::WTERMSIG(status))
    } else {
        Change::Exited(libc::WEXITSTATUS(status))
    };
    (pid > 0).then_some((pid, change))
}

/// Signals that are blocked and waited for.
pub struct SignalSet(libc::sigset_t);

/// A signal that came.
pub struct Signal {
    /// Which.
    pub number: libc::c_int,
    /// Sent by the kernel (a terminal, a child's end), not by a process.
    pub from_kernel: bool,
}

/// Lets every signal through again: what a command expects to start with.
pub fn unblock_signals() -> io::Result<()> {
    // SAFETY: a signal set is plain data; `sigemptyset` makes it valid.
    let mut none = unsafe { mem::zeroed() };
    // SAFETY: `none` is a valid place for both calls.
    unsafe {
        libc::sigemptyset(&mut none);
        check(libc::sigprocmask(
            libc::SIG_SETMASK,
            &none,
            std::ptr::null_mut(),
        ))
    }
}

impl SignalSet {
    /// Blocks these signals in this thread and in those that it starts.
    pub fn block(signals: impl IntoIterator<Item = libc::c_int>) -> io::Result<Self> {
        // SAFETY: a signal set is plain data; `sigemptyset` makes it valid.
        let mut set = unsafe { mem::zeroed() };
        // SAFETY: `set` is a valid place for all these calls.
        unsafe {
            libc::sigemptyset(&mut set);
            for signal in signals {
                libc::sigaddset(&mut set, signal);
            }
            check(libc::sigprocmask(
                libc::SIG_BLOCK,
                &set,
                std::ptr::null_mut(),
            ))?;
        }
        Ok(Self(set))
    }

    /// Whether one of `signals`, which are among them, has come: it is taken. The others stay for [`Self::wait`].
    pub fn take(signals: &[libc::c_int]) -> Option<libc::c_int> {
        // SAFETY: a signal set and a time are plain data; `sigemptyset` makes the set valid, and 0 is a time.
        let (mut set, at_once): (libc::sigset_t, libc::timespec) = unsafe { mem::zeroed() };
        // SAFETY: all places are valid for the calls; no information is wanted.
        let number = unsafe {
            libc::sigemptyset(&mut set);
            for signal in signals {
                libc::sigaddset(&mut set, *signal);
            }
            libc::sigtimedwait(&set, std::ptr::null_mut(), &at_once)
        };
        (number > 0).then_some(number)
    }

    /// Waits for one of them.
    pub fn wait(&self) -> Signal {
        loop {
            // SAFETY: `siginfo_t` is plain data.
            let mut info: libc::siginfo_t = unsafe { mem::zeroed() };
            // SAFETY: both are valid for the call.
            let number = unsafe { libc::sigwaitinfo(&self.0, &mut info) };
            if number > 0 {
                return Signal {
                    number,
                    from_kernel: info.si_code > 0,
                };
            }
        }
    }
}

/// Fills `bytes` with what nobody can predict. Asks the kernel itself: an image may have no `/dev`.
pub fn random(mut bytes: &mut [u8]) {
    while !bytes.is_empty() {
        // SAFETY: the kernel writes at most `bytes.len()` bytes to a valid place.
        let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
        match usize::try_from(got) {
            Ok(got) => bytes = &mut bytes[got..],
            Err(_) => {
                let error = io::Error::last_os_error();
                // Only a kernel older than 3.17 has no such call.
                assert!(
                    error.kind() == io::ErrorKind::Interrupted,
                    "getrandom: {error}"
                );
            }
        }
    }
}

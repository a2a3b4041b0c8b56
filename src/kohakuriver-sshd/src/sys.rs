//! The few system calls that the standard library has no words for.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use libc::{c_int, c_short};

fn checked(result: c_int) -> io::Result<c_int> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Reads and writes of `fd` fail instead of waiting.
pub fn set_nonblocking(fd: RawFd) -> io::Result<()> {
    // SAFETY: fcntl on a descriptor number touches no memory of ours.
    let flags = checked(unsafe { libc::fcntl(fd, libc::F_GETFL) })?;
    // SAFETY: as above.
    checked(unsafe { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) }).map(drop)
}

/// The content of a small file: no pipe holds this up, and no device fills the memory.
pub fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    use io::Read;
    const LONGEST: u64 = 4 << 20;
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    let mut content = Vec::new();
    if file.take(LONGEST + 1).read_to_end(&mut content)? as u64 > LONGEST {
        return Err(io::Error::other("it is longer than 4 MB"));
    }
    Ok(content)
}

/// One descriptor that [`wait`] looks at.
pub fn interest(fd: RawFd, events: c_short) -> libc::pollfd {
    libc::pollfd {
        fd,
        events,
        revents: 0,
    }
}

/// Waits until one of the descriptors is ready, or for `patience`.
pub fn wait(descriptors: &mut [libc::pollfd], patience: Option<Duration>) -> io::Result<()> {
    // Rounded up: waking a moment too soon would only mean to wait again.
    let milliseconds = patience.map_or(-1, |time| {
        c_int::try_from(time.as_millis().saturating_add(1)).unwrap_or(c_int::MAX)
    });
    let count = descriptors.len() as libc::nfds_t;
    // SAFETY: the pointer and the count are those of one slice.
    match checked(unsafe { libc::poll(descriptors.as_mut_ptr(), count, milliseconds) }) {
        Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
        _ => Ok(()),
    }
}

/// Wakes a thread out of [`wait`].
pub struct Bell(File);

impl Bell {
    /// A bell that is silent.
    pub fn new() -> io::Result<Self> {
        // SAFETY: eventfd touches no memory of ours, and gives a descriptor that nobody else owns.
        let fd = checked(unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) })?;
        // SAFETY: as above.
        Ok(Self(unsafe { File::from_raw_fd(fd) }))
    }

    /// The descriptor that is readable once the bell was rung.
    pub fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// Rings it.
    pub fn ring(&self) {
        use io::Write;
        // Full means rung already.
        let _ = (&self.0).write(&1u64.to_ne_bytes());
    }

    /// Silences it.
    pub fn silence(&self) {
        use io::Read;
        let _ = (&self.0).read(&mut [0; 8]);
    }
}

/// Both ends of a new terminal.
pub struct Terminal {
    /// Our end, which doesn't block.
    pub master: OwnedFd,
    /// The program's end.
    pub slave: OwnedFd,
    /// The name of the program's end.
    pub name: String,
}

/// Opens a terminal. Works without `/dev/pts` where the kernel opens the other end by itself (Linux 4.13).
pub fn open_terminal() -> io::Result<Terminal> {
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: posix_openpt gives a descriptor that nobody else owns.
    let master = unsafe { OwnedFd::from_raw_fd(checked(libc::posix_openpt(flags))?) };
    let fd = master.as_raw_fd();
    let (mut number, unlock): (c_int, c_int) = (0, 0);
    // SAFETY: both calls read or write one int.
    unsafe {
        checked(libc::ioctl(fd, libc::TIOCSPTLCK, &unlock))?;
        checked(libc::ioctl(fd, libc::TIOCGPTN, &mut number))?;
    }
    let name = format!("/dev/pts/{number}");
    // SAFETY: TIOCGPTPEER takes flags by value, and gives a descriptor that nobody else owns.
    let slave = match checked(unsafe { libc::ioctl(fd, libc::TIOCGPTPEER, flags) }) {
        // SAFETY: as above.
        Ok(slave) => unsafe { OwnedFd::from_raw_fd(slave) },
        Err(_) => File::options().read(true).write(true).open(&name)?.into(),
    };
    // Whatever the mount's options say, no other user may write what this terminal then shows. Where it can't be done,
    // as on a mount of somebody else's, the terminal is what the mount made it.
    // SAFETY: fchmod touches no memory.
    let _ = unsafe { libc::fchmod(slave.as_raw_fd(), 0o600) };
    set_nonblocking(fd)?;
    Ok(Terminal {
        master,
        slave,
        name,
    })
}

/// A terminal's size in characters and in pixels.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Size {
    /// Columns and rows.
    pub characters: (u32, u32),
    /// Width and height.
    pub pixels: (u32, u32),
}

/// Gives a terminal its size; the program in it is told.
pub fn resize(master: RawFd, size: Size) {
    let narrow = |value: u32| u16::try_from(value).unwrap_or(u16::MAX);
    let size = libc::winsize {
        ws_row: narrow(size.characters.1),
        ws_col: narrow(size.characters.0),
        ws_xpixel: narrow(size.pixels.0),
        ws_ypixel: narrow(size.pixels.1),
    };
    // SAFETY: the call reads one winsize. A terminal whose program is gone needs no size.
    unsafe { libc::ioctl(master, libc::TIOCSWINSZ, &size) };
}

/// Changes a terminal's settings.
pub fn change_settings(fd: RawFd, change: impl FnOnce(&mut libc::termios)) -> io::Result<()> {
    // SAFETY: termios is plain numbers, for which zeros are values.
    let mut settings = unsafe { std::mem::zeroed::<libc::termios>() };
    // SAFETY: the calls write and read one termios.
    unsafe {
        checked(libc::tcgetattr(fd, &mut settings))?;
        change(&mut settings);
        checked(libc::tcsetattr(fd, libc::TCSANOW, &settings))?;
    }
    Ok(())
}

/// Makes the calling process leader of a session, with its standard input as terminal if `terminal`. For a new child.
pub fn lead_session(terminal: bool) -> io::Result<()> {
    // SAFETY: neither call touches memory.
    unsafe {
        checked(libc::setsid())?;
        if terminal {
            checked(libc::ioctl(0, libc::TIOCSCTTY, 0))?;
        }
    }
    Ok(())
}

/// Gives signals their usual meaning again, which whoever started us, `nohup` for one, may have taken away. For a new child.
pub fn reset_signals() {
    const LAST: c_int = 64;
    for signal in 1..=LAST {
        // SAFETY: no handler of ours is installed, and the call touches no memory. Signals that can't be set stay.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// Has the system keep how children ended until they are asked for; whoever started us may have ignored that.
pub fn keep_ends_of_children() {
    // SAFETY: no handler of ours is installed, and the call touches no memory.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
}

/// Sends a signal to a process and all of its group.
pub fn signal_group(leader: u32, signal: c_int) {
    if let Ok(leader) = libc::pid_t::try_from(leader) {
        // SAFETY: kill touches no memory. A group that is gone needs no signal.
        unsafe { libc::kill(-leader, signal) };
    }
}

/// The user that this process runs as.
pub fn user_id() -> u32 {
    // SAFETY: geteuid touches no memory.
    unsafe { libc::geteuid() }
}

/// Lets this process open as many files as the system allows; gives what it was allowed before.
pub fn raise_file_limit() -> io::Result<libc::rlimit> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the call writes one rlimit.
    checked(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) })?;
    set_file_limit(libc::rlimit {
        rlim_cur: limit.rlim_max,
        ..limit
    })?;
    Ok(limit)
}

/// Sets how many files this process may open.
pub fn set_file_limit(limit: libc::rlimit) -> io::Result<()> {
    // SAFETY: the call reads one rlimit.
    checked(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) }).map(drop)
}

/// Ends the sending direction of a socket.
pub fn shut_down_writing(fd: RawFd) {
    // SAFETY: shutdown touches no memory; a socket that is gone has ended already.
    unsafe { libc::shutdown(fd, libc::SHUT_WR) };
}

/// Reads what is there into `space`; 0 is the end.
pub fn read(fd: RawFd, space: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the pointer and the length are those of one slice.
    let count = unsafe { libc::read(fd, space.as_mut_ptr().cast(), space.len()) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Writes what fits of `bytes`.
pub fn write(fd: RawFd, bytes: &[u8]) -> io::Result<usize> {
    // SAFETY: the pointer and the length are those of one slice.
    let count = unsafe { libc::write(fd, bytes.as_ptr().cast(), bytes.len()) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

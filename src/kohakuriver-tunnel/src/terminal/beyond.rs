//! Connections that go on from the container to another address or to a Unix socket in it, and those that its programs
//! make to a port or a Unix socket that a user has taken there (docs/protocol.md §6, "Beyond the task").
//!
//! Each has a thread, and while bytes pass a second one: they copy between the connection and the line of its stream.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};

use super::control::{Control, Line};
use super::door::Door;
use super::{Places, STACK, door, line};
use crate::errors::{Told, told_of};
use crate::log;
use crate::offer::Offer;
use crate::protocol::Mark;
use crate::sys::{self, Wish};

/// For all addresses of a name together: less than a stream waits for its connection.
const PATIENCE: Duration = Duration::from_secs(9);
/// Until a Unix socket whose queue is full is tried again.
const AGAIN: Duration = Duration::from_millis(20);
const BUFFER: usize = 64 << 10;
/// What a line begins with: it stands, or a text follows that says why it does not.
pub(super) const STANDS: u8 = 0;
/// The first bytes of a stream that waits for somebody in the container: it does, and then, they have come.
const LISTENS: u8 = 0;
const CAME: u8 = 1;

/// What a stream and its threads tell each other beside the bytes.
#[derive(Default)]
pub struct Outcome {
    /// The system's number of what broke the connection, 0 where nothing did.
    broke: AtomicI32,
    /// The stream ended by an error: the connection is to, too.
    reset: AtomicBool,
}

impl Outcome {
    /// What broke the connection.
    pub fn broken(&self) -> io::Result<()> {
        match self.broke.load(Ordering::SeqCst) {
            0 => Ok(()),
            number => Err(io::Error::from_raw_os_error(number)),
        }
    }

    /// The connection is to end by a reset.
    pub fn reset(&self) {
        self.reset.store(true, Ordering::SeqCst);
    }

    fn breaks(&self, error: &io::Error) {
        let number = error.raw_os_error().unwrap_or(libc::EIO);
        self.broke.store(number, Ordering::SeqCst);
    }
}

/// What a start asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Asked {
    /// A connection to this port of a host.
    To(String, u16),
    /// A connection to this Unix socket of the container.
    At(PathBuf),
    /// The next connection that is made to this place in the container.
    On(Spot),
}

/// What programs of the container connect to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Spot {
    /// A port of the loopback.
    Port(u16),
    /// A Unix socket.
    Path(PathBuf),
}

impl Asked {
    /// What stands in the place of a command: `to`, a host and a port; `at` and the path of a Unix socket; or `on` and a
    /// port or such a path.
    pub fn parse(command: &[OsString]) -> Option<Self> {
        let port = |word: &OsString| word.to_str()?.parse().ok().filter(|port: &u16| *port > 0);
        let path = |word: &OsString| Some(PathBuf::from(word)).filter(|path| path.is_absolute());
        let (kind, words) = command.split_first()?;
        match (kind.to_str()?, words) {
            ("to", [host, number]) if !host.is_empty() => {
                Some(Self::To(host.to_str()?.to_owned(), port(number)?))
            }
            ("at", [socket]) => Some(Self::At(path(socket)?)),
            ("on", [spot]) => {
                let other = || path(spot).map(Spot::Path);
                Some(Self::On(port(spot).map(Spot::Port).or_else(other)?))
            }
            _ => None,
        }
    }
}

/// All of a client, and which places are taken for whom.
pub struct Beyond {
    places: Places,
    taken: Mutex<HashMap<(Mark, Spot), Weak<Door>>>,
    offer: Offer,
}

impl Beyond {
    /// None yet, and no more than `most`; this machine's own ports only as they are offered.
    pub fn new(most: usize, offer: &Offer) -> Self {
        Self {
            places: Places::new(most),
            taken: Mutex::default(),
            offer: offer.clone(),
        }
    }

    /// Begins what is asked for by the user of this mark. What goes wrong from here on is the first that the line says.
    pub fn open(&self, asked: Asked, mark: &Mark) -> io::Result<Line> {
        let place = self.places.take().map_err(|_| {
            told("EAGAIN: as many connections lead beyond the task as its tunnel client allows")
        })?;
        let (near, far) = line()?;
        far.set_nonblocking(false)?;
        let outcome = Arc::new(Outcome::default());
        let attended = Arc::new(AtomicBool::new(true));
        let control = Arc::new(Control::new()?);
        let line = Line::beyond(
            near,
            Arc::clone(&attended),
            Arc::clone(&control),
            Arc::clone(&outcome),
        );
        let work: Box<dyn FnOnce() -> io::Result<()> + Send> = match asked {
            Asked::To(host, port) => {
                let offer = self.offer.clone();
                Box::new(move || go_on(connect(&host, port, &offer), &far, &outcome))
            }
            Asked::At(path) => {
                let offer = self.offer.clone();
                Box::new(move || go_on(reach(&path, &offer), &far, &outcome))
            }
            Asked::On(spot) => {
                let door = self.door(mark, spot)?;
                Box::new(move || {
                    let came = until_somebody_comes(&door, &far, &attended, &control)?;
                    came.map_or(Ok(()), |sock| carry(&far, &sock, &outcome))
                })
            }
        };
        thread::Builder::new()
            .name("beyond".into())
            .stack_size(STACK)
            .spawn(move || {
                let _place = place;
                if let Err(error) = work() {
                    log!(Debug, "a connection beyond the task ended: {error}");
                }
            })?;
        Ok(line)
    }

    /// The one door of this place for this user: it is there for as long as a stream waits at it, or is used.
    fn door(&self, mark: &Mark, spot: Spot) -> io::Result<Arc<Door>> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.retain(|_, door| door.strong_count() > 0);
        let key = (*mark, spot);
        if let Some(door) = taken.get(&key).and_then(Weak::upgrade) {
            return Ok(door);
        }
        let door = match &key.1 {
            Spot::Port(port) => Door::at_port(*port),
            Spot::Path(path) => Door::at_path(path),
        };
        let door = Arc::new(door.map_err(|text| told(&text))?);
        taken.insert(key, Arc::downgrade(&door));
        Ok(door)
    }
}

fn told(text: &str) -> io::Error {
    io::Error::other(Told(text.to_owned()))
}

/// Waits for the next connection at a door, for as long as the stream is there. While that has no link, whoever
/// connects waits in the door's queue, which another stream may have a look at.
fn until_somebody_comes(
    door: &Door,
    mut far: &UnixStream,
    attended: &AtomicBool,
    control: &Control,
) -> io::Result<Option<Socket>> {
    far.write_all(&[STANDS, LISTENS])?;
    loop {
        let listens = attended.load(Ordering::SeqCst);
        let knocks = if listens { door.as_raw_fd() } else { -1 };
        let bell = (control.bell(), Wish::Read);
        let end = (far.as_raw_fd(), Wish::End);
        sys::wait(&[bell, end, (knocks, Wish::Read)])?;
        control.hush();
        if sys::has_ended(far) {
            return Ok(None);
        }
        if !listens || !attended.load(Ordering::SeqCst) {
            continue;
        }
        match door.accept() {
            Ok(sock) => {
                far.write_all(&[CAME])?;
                return Ok(Some(sock));
            }
            // Another stream's thread was faster, or whoever came has gone.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => return Err(error),
        }
    }
}

fn go_on(
    reached: Result<Socket, String>,
    mut far: &UnixStream,
    outcome: &Outcome,
) -> io::Result<()> {
    match reached {
        Ok(sock) => {
            far.write_all(&[STANDS])?;
            carry(far, &sock, outcome)
        }
        Err(text) => far.write_all(&[&[!STANDS], text.as_bytes()].concat()),
    }
}

/// The first address of a host that takes a connection. The error is the text of an ERROR.
fn connect(host: &str, port: u16, offer: &Offer) -> Result<Socket, String> {
    let until = Instant::now() + PATIENCE;
    let known = (host, port)
        .to_socket_addrs()
        .map_err(|_| format!("ENOENT: the task finds no address for {host}"))?;
    let mut why = format!("EACCES: {host} is no address that a forward may go on to");
    for address in known.filter(|address| may_be_reached(address.ip())) {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        match connected(address, left, offer) {
            Ok(sock) => return Ok(sock),
            Err(error) => why = not_reached(&error, host, port),
        }
    }
    Err(why)
}

fn connected(address: SocketAddr, within: Duration, offer: &Offer) -> io::Result<Socket> {
    offer.check_if_here(address)?;
    let sock = TcpStream::connect_timeout(&address, within)?;
    sock.set_nodelay(true)?;
    Ok(sock.into())
}

fn not_reached(error: &io::Error, host: &str, port: u16) -> String {
    if let Some(Told(text)) = told_of(error) {
        return text.clone();
    }
    match (error.kind(), error.raw_os_error()) {
        (io::ErrorKind::TimedOut, _) => {
            format!("ETIMEDOUT: {host} did not answer the task on port {port}")
        }
        (_, Some(libc::ECONNREFUSED)) => {
            format!("ECONNREFUSED: nothing listens on port {port} of {host}")
        }
        (_, Some(libc::EHOSTUNREACH)) => {
            format!("EHOSTUNREACH: the task has no route to {host}")
        }
        (_, Some(libc::ENETUNREACH)) => {
            format!("ENETUNREACH: the task has no network that leads to {host}")
        }
        _ => format!("EIO: the task can't reach {host}: {error}"),
    }
}

/// A connection to a Unix socket. The error is the text of an ERROR.
fn reach(path: &Path, offer: &Offer) -> Result<Socket, String> {
    let until = Instant::now() + PATIENCE;
    let at = door::address(path)?;
    let opened = || -> io::Result<Socket> {
        let sock = Socket::new(Domain::UNIX, Type::STREAM, None)?;
        sock.set_nonblocking(true)?;
        // A full queue can't be waited for: the kernel only says that it is full.
        while let Err(error) = sock.connect(&at) {
            if error.kind() != io::ErrorKind::WouldBlock || Instant::now() >= until {
                return Err(error);
            }
            thread::sleep(AGAIN);
        }
        sock.set_nonblocking(false)?;
        offer.check_owner(sys::peer_of(&sock)?, path)?;
        Ok(sock)
    };
    opened().map_err(|error| not_there(&error, path))
}

fn not_there(error: &io::Error, path: &Path) -> String {
    if let Some(Told(text)) = told_of(error) {
        return text.clone();
    }
    let path = path.display();
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => format!("ENOENT: the task has no {path}"),
        Some(libc::ECONNREFUSED) => {
            format!("ECONNREFUSED: nothing listens on {path} in the task")
        }
        Some(libc::EACCES) => {
            format!("EACCES: the task's tunnel client may not use {path}")
        }
        Some(libc::EPROTOTYPE) => {
            format!("EPROTOTYPE: {path} of the task is no socket of a stream")
        }
        Some(libc::EAGAIN) => {
            format!("ETIMEDOUT: what listens on {path} in the task takes no connections")
        }
        _ => format!("EIO: the task can't reach {path}: {error}"),
    }
}

/// Not the container itself, whose ports have forwards of their own; nor what is on its link alone, where clouds keep a
/// machine's identity; nor many at once.
fn may_be_reached(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            !(ip.is_loopback()
                || ip.is_link_local()
                || ip.is_unspecified()
                || ip.is_multicast()
                || ip.is_broadcast())
        }
        IpAddr::V6(ip) => match ip.to_ipv4_mapped() {
            Some(mapped) => may_be_reached(mapped.into()),
            None => {
                !(ip.is_loopback()
                    || ip.is_unspecified()
                    || ip.is_multicast()
                    || ip.is_unicast_link_local())
            }
        },
    }
}

/// Copies both ways until both have ended, or one of the two has gone.
fn carry(far: &UnixStream, sock: &Socket, outcome: &Outcome) -> io::Result<()> {
    thread::scope(|scope| {
        let down = || {
            if let Err(error) = copy(sock, far) {
                outcome.breaks(&error);
                let _ = far.shutdown(Shutdown::Both);
            } else {
                let _ = far.shutdown(Shutdown::Write);
            }
        };
        let builder = thread::Builder::new().name("beyond".into());
        builder.stack_size(STACK).spawn_scoped(scope, down)?;
        if let Err(error) = copy(far, sock) {
            outcome.breaks(&error);
            let _ = far.shutdown(Shutdown::Both);
        } else if !sys::has_gone(far) {
            let _ = sock.shutdown(Shutdown::Write);
            sys::wait(&[(far.as_raw_fd(), Wish::Gone)])?;
        }
        // Whoever still reads from the connection is to stop, and where it is reset, to send nothing before that.
        if outcome.reset.load(Ordering::SeqCst) {
            sys::reset_on_close(sock);
            let _ = sock.shutdown(Shutdown::Read);
        } else {
            let _ = sock.shutdown(Shutdown::Both);
        }
        Ok(())
    })
}

/// Copies until the end of `from`. The error is of `sock`'s side alone: that the line has gone is its end.
fn copy(mut from: impl Read, mut to: impl Write) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(length) => to.write_all(&buffer[..length])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_host_with_a_port_a_port_or_an_absolute_path_is_asked_for() {
        let parsed = |words: &[&str]| {
            let words: Vec<OsString> = words.iter().map(OsString::from).collect();
            Asked::parse(&words)
        };
        let there = Asked::To("db".into(), 5432);
        assert_eq!(parsed(&["to", "db", "5432"]), Some(there));
        assert_eq!(parsed(&["on", "9000"]), Some(Asked::On(Spot::Port(9000))));
        let socket = PathBuf::from("/run/a b.sock");
        assert_eq!(
            parsed(&["at", "/run/a b.sock"]),
            Some(Asked::At(socket.clone()))
        );
        assert_eq!(
            parsed(&["on", "/run/a b.sock"]),
            Some(Asked::On(Spot::Path(socket)))
        );
        for wrong in [
            &["to", "db"][..],
            &["to", "", "1"],
            &["to", "db", "0"],
            &["to", "db", "65536"],
            &["on", "x"],
            &["on", "0"],
            &["on"],
            &["at", "run/x.sock"],
            &["at", ""],
            &["at", "/a", "/b"],
            &["from", "db", "1"],
            &[],
        ] {
            assert_eq!(parsed(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn what_is_the_containers_own_or_on_its_link_is_not_reached() {
        for own in [
            "127.0.0.1",
            "127.9.9.9",
            "::1",
            "0.0.0.0",
            "::",
            "169.254.169.254",
            "fe80::1",
            "224.0.0.1",
            "ff02::1",
            "255.255.255.255",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
        ] {
            assert!(!may_be_reached(own.parse().unwrap()), "{own}");
        }
        for other in ["10.0.0.1", "192.0.2.7", "2001:db8::1", "fd00::1"] {
            assert!(may_be_reached(other.parse().unwrap()), "{other}");
        }
    }
}

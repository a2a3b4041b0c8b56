//! Connections made for the client, and listeners whose connections go to it (RFC 4254 §7).

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::agent::AgentSocket;
use crate::names;
use crate::wire::Put;

const CONNECT: Duration = Duration::from_secs(20);
const MOST_LISTENERS: usize = 128;

/// What listens for a client: what it asked for, and the socket that leads to its agent.
#[derive(Default)]
pub struct Forwards {
    listeners: Vec<Listener>,
    agent: Option<AgentSocket>,
}

impl Forwards {
    /// Takes in one more listener. The error is for the log.
    pub fn listen(&mut self, make: impl FnOnce() -> io::Result<Listener>) -> io::Result<&Listener> {
        if self.listeners.len() >= MOST_LISTENERS {
            return Err(io::Error::other("the client has too many listeners"));
        }
        self.listeners.push(make()?);
        Ok(&self.listeners[self.listeners.len() - 1])
    }

    /// Ends a listener. False where there is none like that.
    pub fn unlisten(&mut self, is_it: impl Fn(&Listener) -> bool) -> bool {
        let place = self.listeners.iter().position(is_it);
        place
            .map(|place| self.listeners.swap_remove(place))
            .is_some()
    }

    /// The path of the socket that leads to the agent, which is made for the first session that wants one.
    pub fn agent(&mut self, home: &Path) -> io::Result<PathBuf> {
        let agent = match self.agent.take() {
            Some(agent) => agent,
            None => AgentSocket::new(home)?,
        };
        Ok(self.agent.insert(agent).path())
    }

    /// What to wait for, and the place of each for [`Forwards::accept`].
    pub fn descriptors(&self) -> impl Iterator<Item = (RawFd, usize)> {
        let agent = self.agent.as_ref().map(AgentSocket::fd);
        let listeners = self.listeners.iter().map(Listener::fd);
        listeners
            .enumerate()
            .map(|(place, fd)| (fd, place))
            .chain(agent.map(|fd| (fd, AGENT)))
    }

    /// The next connection of what is in this place; None where that is gone.
    pub fn accept(&self, place: usize) -> Option<io::Result<Accepted>> {
        if place == AGENT {
            return self.agent.as_ref().map(|agent| {
                Ok(Accepted {
                    socket: agent.accept()?,
                    kind: "auth-agent@openssh.com",
                    details: Vec::new(),
                })
            });
        }
        self.listeners.get(place).map(Listener::accept)
    }
}

/// The place of the agent's socket.
const AGENT: usize = usize::MAX;

fn port_number(port: u32) -> io::Result<u16> {
    u16::try_from(port)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "there is no such port"))
}

/// Connects to the first address of `host` that answers. Waits.
pub fn connect_tcp(host: &str, port: u32) -> io::Result<OwnedFd> {
    let port = port_number(port)?;
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for address in names::resolve(host)? {
        let dialled = TcpStream::connect_timeout(&SocketAddr::new(address, port), CONNECT);
        match dialled.and_then(not_itself) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                stream.set_nonblocking(true)?;
                return Ok(stream.into());
            }
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// A connection that did not reach itself: where nothing listens the kernel may dial from the very port that it dials
/// (RFC 9293 §3.5).
fn not_itself(stream: TcpStream) -> io::Result<TcpStream> {
    match stream.peer_addr()? == stream.local_addr()? {
        true => Err(io::ErrorKind::ConnectionRefused.into()),
        false => Ok(stream),
    }
}

/// Connects to a Unix socket.
pub fn connect_unix(path: &OsStr) -> io::Result<OwnedFd> {
    let stream = UnixStream::connect(path)?;
    stream.set_nonblocking(true)?;
    Ok(stream.into())
}

/// A listener that the client asked for.
pub struct Listener {
    socket: Socket,
    /// What the client asked for.
    asked: Vec<u8>,
    port: u32,
}

enum Socket {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

/// An accepted connection, and what the client is told of it.
pub struct Accepted {
    /// The connection.
    pub socket: OwnedFd,
    /// The kind of channel.
    pub kind: &'static str,
    /// What follows the common part of the message that opens it.
    pub details: Vec<u8>,
}

impl Listener {
    /// Listens on `port`, or any free one for 0, of the address that `host` means (RFC 4254 §7.1).
    pub fn tcp(host: &str, port: u32) -> io::Result<Self> {
        let number = port_number(port)?;
        let addresses: Vec<IpAddr> = match host {
            "" | "*" => vec![Ipv6Addr::UNSPECIFIED.into(), Ipv4Addr::UNSPECIFIED.into()],
            // Names of one machine: what is not known here isn't worth waiting for.
            _ => match host.parse() {
                Ok(address) => vec![address],
                Err(_) => names::local(host).unwrap_or_default(),
            },
        };
        let mut last = io::Error::new(
            io::ErrorKind::AddrNotAvailable,
            format!("{host} is no address of this machine"),
        );
        for address in addresses {
            match TcpListener::bind((address, number)) {
                Ok(listener) => {
                    listener.set_nonblocking(true)?;
                    let port = listener.local_addr()?.port().into();
                    return Ok(Self {
                        socket: Socket::Tcp(listener),
                        asked: host.into(),
                        port,
                    });
                }
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Listens on a Unix socket, which is removed in the end.
    pub fn unix(path: PathBuf) -> io::Result<Self> {
        let listener = UnixListener::bind(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        let asked = path.as_os_str().as_bytes().to_vec();
        Ok(Self {
            socket: Socket::Unix(listener, path),
            asked,
            port: 0,
        })
    }

    /// The port that it listens on.
    pub fn port(&self) -> u32 {
        self.port
    }

    /// Is it the one that was asked for by these words? A client may name the port that it was given.
    pub fn is_tcp(&self, host: &str, port: u32) -> bool {
        matches!(self.socket, Socket::Tcp(_)) && self.asked == host.as_bytes() && self.port == port
    }

    /// Is it the one with this path?
    pub fn is_unix(&self, path: &[u8]) -> bool {
        matches!(self.socket, Socket::Unix(..)) && self.asked == path
    }

    /// What to wait for.
    pub fn fd(&self) -> RawFd {
        match &self.socket {
            Socket::Tcp(listener) => listener.as_raw_fd(),
            Socket::Unix(listener, _) => listener.as_raw_fd(),
        }
    }

    /// The next connection.
    pub fn accept(&self) -> io::Result<Accepted> {
        let mut details = Vec::new();
        details.put_string(&self.asked);
        match &self.socket {
            Socket::Tcp(listener) => {
                let (stream, from) = listener.accept()?;
                stream.set_nodelay(true)?;
                stream.set_nonblocking(true)?;
                details.put_u32(self.port);
                details.put_string(from.ip().to_string().as_bytes());
                details.put_u32(from.port().into());
                Ok(Accepted {
                    socket: stream.into(),
                    kind: "forwarded-tcpip",
                    details,
                })
            }
            Socket::Unix(listener, _) => {
                let (stream, _) = listener.accept()?;
                stream.set_nonblocking(true)?;
                details.put_string(b"");
                Ok(Accepted {
                    socket: stream.into(),
                    kind: "forwarded-streamlocal@openssh.com",
                    details,
                })
            }
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Socket::Unix(_, path) = &self.socket {
            let _ = fs::remove_file(path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_reached_where_nothing_listens_not_even_oneself() {
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        // Sooner or later the kernel would choose this very port to dial from.
        for _ in 0..60_000 {
            let error = connect_tcp("127.0.0.1", port.into()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        }
    }
}

//! All waiting for sockets: the one file that knows of mio.

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use mio::event::Event;
use mio::net::{TcpStream, UdpSocket};
use mio::{Events, Interest, Poll, Registry, Token, Waker};

use crate::link::Link;
use crate::listeners;
use crate::net::{self, Network, Ready};
use crate::session::{End, Session};
use crate::settings::Settings;
use crate::streams::Key;
use crate::sys;

const LINK: Token = Token(0);
const STOP: Token = Token(1);
/// Tokens below this are not streams'.
const FIRST_STREAM: usize = 2;
/// How long the runner has to take a close frame that tells it of its mistake.
const LINGER: Duration = Duration::from_secs(1);

/// Waits for sockets, for time, and for being told to stop.
pub struct EventLoop {
    poll: Poll,
}

/// Ends what an [`EventLoop`] does, from another thread.
pub struct Stop(Waker);

impl Stop {
    /// Asks for the end.
    pub fn now(&self) -> io::Result<()> {
        self.0.wake()
    }
}

impl EventLoop {
    /// A loop, and what stops it.
    pub fn new() -> io::Result<(Self, Stop)> {
        let poll = Poll::new()?;
        let waker = Waker::new(poll.registry(), STOP)?;
        Ok((Self { poll }, Stop(waker)))
    }

    /// Serves one link until it ends. `early` is what followed the handshake.
    pub fn serve(
        &mut self,
        sock: std::net::TcpStream,
        early: &[u8],
        v2: bool,
        settings: &Settings,
    ) -> Result<End, io::Error> {
        sock.set_nonblocking(true)?;
        let mut sock = TcpStream::from_std(sock);
        let registry = self.poll.registry().try_clone()?;
        registry.register(&mut sock, LINK, Interest::READABLE | Interest::WRITABLE)?;
        let link = Link::new(Box::new(Tcp(sock)));
        let mut session = Session::new(Services(registry), link, v2, settings);
        let end = self.turns(&mut session, early).unwrap_or_else(|end| end);
        if matches!(end, End::Violated(_)) {
            let _ = self.linger(session.link());
        }
        session.abandon();
        Ok(end)
    }

    fn turns(&mut self, session: &mut Session<Services>, early: &[u8]) -> Result<End, End> {
        session.process(early)?;
        let mut events = Events::with_capacity(256);
        loop {
            self.wait(&mut events, session.patience())?;
            session.set_now(Instant::now());
            for event in &events {
                match event.token() {
                    LINK => session.link_ready(ready(event)),
                    STOP => session.stop(),
                    Token(token) => session.stream_ready(token - FIRST_STREAM, ready(event)),
                }
            }
            session.turn(events.is_empty())?;
        }
    }

    fn wait(&mut self, events: &mut Events, most: Duration) -> io::Result<()> {
        match self.poll.poll(events, Some(most)) {
            Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
            _ => Ok(()),
        }
    }

    /// Takes what the runner still sends: unread bytes would make our end a reset, and a reset
    /// overtakes the close frame.
    fn linger(&mut self, link: &mut Link) -> io::Result<()> {
        let deadline = Instant::now() + LINGER;
        let mut events = Events::with_capacity(64);
        let mut buffer = vec![0; 64 << 10];
        link.finish_writing()?;
        while let Some(left) = deadline.checked_duration_since(Instant::now()) {
            match link.read(&mut buffer) {
                Ok(0) => break,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wait(&mut events, left)?;
                }
                result => drop(result?),
            }
        }
        Ok(())
    }

    /// Sleeps; false if it was told to stop instead.
    pub fn sleep(&mut self, pause: Duration) -> bool {
        let until = Instant::now() + pause;
        let mut events = Events::with_capacity(4);
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            if self.wait(&mut events, left).is_err()
                || events.iter().any(|event| event.token() == STOP)
            {
                return false;
            }
        }
    }
}

fn ready(event: &Event) -> Ready {
    Ready {
        readable: event.is_readable(),
        writable: event.is_writable(),
        closed: event.is_read_closed() || event.is_error(),
    }
}

/// The container's services over the system's sockets.
struct Services(Registry);

impl Network for Services {
    type Tcp = Tcp;
    type Udp = Udp;

    fn dial(&self, to: SocketAddr, key: Key) -> io::Result<Tcp> {
        let mut sock = TcpStream::connect(to)?;
        let interest = Interest::READABLE | Interest::WRITABLE;
        self.0.register(&mut sock, token(key), interest)?;
        Ok(Tcp(sock))
    }

    fn open(&self, to: SocketAddr, key: Key) -> io::Result<Udp> {
        // From the same address, which is the container's own: so nobody else's datagrams get in.
        let mut from = to;
        from.set_port(0);
        if to.ip().is_loopback() && to.is_ipv4() {
            from.set_ip(Ipv4Addr::LOCALHOST.into());
        }
        let mut sock = UdpSocket::bind(from)?;
        if sock.local_addr()? == to {
            // It would talk to itself. While it has the port, another is given.
            sock = UdpSocket::bind(from)?;
        }
        sock.connect(to)?;
        self.0.register(&mut sock, token(key), Interest::READABLE)?;
        Ok(Udp(sock))
    }

    fn listeners(&self, udp: bool, port: u16) -> Vec<SocketAddr> {
        listeners::on(udp, port)
    }
}

fn token(key: Key) -> Token {
    Token(key.slot as usize + FIRST_STREAM)
}

struct Tcp(TcpStream);

impl Read for Tcp {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Tcp {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn write_vectored(&mut self, pieces: &[io::IoSlice<'_>]) -> io::Result<usize> {
        self.0.write_vectored(pieces)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl net::TcpSocket for Tcp {
    fn dialled(&mut self) -> io::Result<bool> {
        if let Some(error) = self.0.take_error()? {
            return Err(error);
        }
        match self.0.peer_addr() {
            // Where nothing listens the kernel may dial from the very port that it dials (RFC 9293 §3.5).
            Ok(peer) if peer == self.0.local_addr()? => {
                Err(io::Error::from_raw_os_error(libc::ECONNREFUSED))
            }
            Ok(_) => self.0.set_nodelay(true).map(|()| true),
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn finish_writing(&mut self) -> io::Result<()> {
        self.0.shutdown(std::net::Shutdown::Write)
    }

    fn reset_on_close(&mut self) {
        sys::reset_on_close(&self.0);
    }
}

struct Udp(UdpSocket);

impl net::UdpSocket for Udp {
    fn send(&mut self, datagram: &[u8]) -> io::Result<usize> {
        self.0.send(datagram)
    }

    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.recv(buffer)
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use net::TcpSocket;
    use socket2::{Domain, Socket, Type};

    use super::*;

    #[test]
    fn a_dial_that_reached_itself_is_refused() {
        for (domain, ip) in [
            (Domain::IPV4, Ipv4Addr::LOCALHOST.into()),
            (Domain::IPV6, Ipv6Addr::LOCALHOST.into()),
        ] {
            let sock = Socket::new(domain, Type::STREAM, None).unwrap();
            sock.bind(&SocketAddr::new(ip, 0).into()).unwrap();
            sock.connect(&sock.local_addr().unwrap()).unwrap();
            let error = Tcp(TcpStream::from_std(sock.into())).dialled().unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED));
        }
    }
}

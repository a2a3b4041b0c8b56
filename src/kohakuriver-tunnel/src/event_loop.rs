//! All I/O of the tunnel, and all waiting: the one file that knows of Tokio.
//!
//! Tokio waits for time, for the end, for the runner while there is no link, and for one file descriptor: the
//! [`Epoll`] that all sockets of a link are in. Each of them registered with Tokio itself would cost as much memory
//! again as an idle stream does (docs/architecture.md, Decisions).

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::io::{self, IoSlice, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Notify;
use tokio::time::{self, Sleep};

use crate::handshake::{Granted, Handshake, Refusal, RunnerUrl, wrong};
use crate::link::Link;
use crate::listeners;
use crate::net::{self, Network, Ready};
use crate::session::{End, Session};
use crate::settings::Settings;
use crate::streams::Key;
use crate::sys::{self, Epoll};

/// For the runner to be found, to answer, and to upgrade.
const OPENING: Duration = Duration::from_secs(10);
/// Unsent bytes in the kernel that a small message may have to wait for.
const UNSENT: u32 = 256 << 10;
/// Streams have their slots as tokens.
const LINK: u64 = u64::MAX;
/// How many events are taken at once.
const EVENTS: usize = 256;
const NO_EVENT: libc::epoll_event = libc::epoll_event { events: 0, u64: 0 };
/// How long the runner has to take a close frame that tells it of its mistake.
const LINGER: Duration = Duration::from_secs(1);

/// Waits for sockets, for time, and for being told to stop.
pub struct EventLoop {
    runtime: Runtime,
    stop: Arc<Notify>,
}

/// Ends what an [`EventLoop`] does, from another thread.
pub struct Stop(Arc<Notify>);

impl Stop {
    /// Asks for the end.
    pub fn now(&self) {
        self.0.notify_one();
    }
}

/// A WebSocket that is open.
pub struct Opened {
    sock: TcpStream,
    /// On which terms.
    pub granted: Granted,
}

impl EventLoop {
    /// A loop, and what stops it.
    pub fn new() -> io::Result<(Self, Stop)> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let stop = Arc::new(Notify::new());
        let events = Self {
            runtime,
            stop: Arc::clone(&stop),
        };
        Ok((events, Stop(stop)))
    }

    /// Opens the WebSocket to the runner; `None` if it was told to stop instead.
    pub fn open(&self, url: &RunnerUrl, handshake: Handshake) -> Result<Option<Opened>, Refusal> {
        let opening = async { time::timeout(OPENING, open(url, handshake)).await };
        match self.unless_stopped(opening) {
            None => Ok(None),
            Some(Ok(opened)) => opened.map(Some),
            Some(Err(_)) => Err(io::Error::from(io::ErrorKind::TimedOut).into()),
        }
    }

    /// Sleeps; false if it was told to stop instead.
    pub fn sleep(&self, pause: Duration) -> bool {
        self.unless_stopped(async { time::sleep(pause).await })
            .is_some()
    }

    fn unless_stopped<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        self.runtime.block_on(async {
            let (mut stop, mut work) = (pin!(self.stop.notified()), pin!(work));
            poll_fn(|context| match stop.as_mut().poll(context) {
                Poll::Ready(()) => Poll::Ready(None),
                Poll::Pending => work.as_mut().poll(context).map(Some),
            })
            .await
        })
    }

    /// Serves one link until it ends.
    pub fn serve(&self, opened: Opened, settings: &Settings) -> io::Result<End> {
        let Opened { sock, granted } = opened;
        self.runtime.block_on(async {
            let mut sockets = Sockets::new()?;
            let services = Services(Rc::clone(sockets.ready.get_ref()));
            services
                .0
                .add(&sock, LINK, libc::EPOLLIN | libc::EPOLLOUT)?;
            let link = Link::new(Box::new(Tcp(sock)));
            let mut session = Session::new(services, link, granted.v2, settings);
            let turns = turns(&mut session, &mut sockets, &self.stop, &granted.early);
            let Err(end) = turns.await;
            if matches!(end, End::Violated(_)) {
                let _ = linger(session.link(), &mut sockets).await;
            }
            session.abandon();
            Ok(end)
        })
    }
}

async fn open(url: &RunnerUrl, mut handshake: Handshake) -> Result<Opened, Refusal> {
    let mut sock = dial(url.place()).await?;
    sock.set_nodelay(true)?;
    sys::limit_unsent(&sock, UNSENT)?;
    sock.write_all(&handshake.request).await?;
    let mut piece = [0; 4096];
    loop {
        let length = sock.read(&mut piece).await?;
        if let Some(granted) = handshake.receive(&piece[..length])? {
            let sock = sock.into_std()?;
            return Ok(Opened { sock, granted });
        }
    }
}

/// Connects to the first of the runner's addresses that answers; none of them has all the time.
async fn dial(place: (&str, u16)) -> Result<tokio::net::TcpStream, Refusal> {
    let unknown = |error| wrong(format!("{}: {error}", place.0));
    let addresses: Vec<_> = tokio::net::lookup_host(place)
        .await
        .map_err(unknown)?
        .collect();
    let mut last = wrong(format!("{} has no address", place.0));
    for address in &addresses {
        let share = OPENING / addresses.len() as u32;
        last = match time::timeout(share, tokio::net::TcpStream::connect(address)).await {
            Ok(Ok(sock)) => return Ok(sock),
            Ok(Err(error)) => wrong(format!("{address}: {error}")),
            Err(_) => wrong(format!("{address}: it didn't answer in time")),
        };
    }
    Err(last)
}

async fn turns(
    session: &mut Session<Services>,
    sockets: &mut Sockets,
    stop: &Notify,
    early: &[u8],
) -> Result<Infallible, End> {
    session.process(early)?;
    let mut stopped = pin!(stop.notified());
    loop {
        let until = session.wait_until();
        let stopping = poll_fn(|context| {
            let stopping = stopped.as_mut().poll(context).is_ready();
            match sockets.poll(context, until) {
                Poll::Pending if !stopping => Poll::Pending,
                Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
                _ => Poll::Ready(Ok(stopping)),
            }
        });
        let stopping = stopping.await?;
        session.set_now(Instant::now());
        for event in sockets.events() {
            match event.u64 {
                LINK => session.link_ready(ready(event)),
                slot => session.stream_ready(slot as usize, ready(event)),
            }
        }
        if stopping {
            session.stop();
            stopped.set(stop.notified());
        }
        session.turn(sockets.events().is_empty())?;
    }
}

/// Takes what the runner still sends: unread bytes would make our end a reset, and a reset
/// overtakes the close frame.
async fn linger(link: &mut Link, sockets: &mut Sockets) -> io::Result<()> {
    let until = Instant::now() + LINGER;
    let mut buffer = vec![0; 64 << 10];
    link.finish_writing()?;
    while Instant::now() < until {
        match link.read(&mut buffer) {
            Ok(0) => break,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                poll_fn(|context| sockets.poll(context, Some(until))).await?;
            }
            result => drop(result?),
        }
    }
    Ok(())
}

/// The sockets of a link, and what has happened to them.
struct Sockets {
    ready: AsyncFd<Rc<Epoll>>,
    timer: Pin<Box<Sleep>>,
    events: [libc::epoll_event; EVENTS],
    count: usize,
}

impl Sockets {
    fn new() -> io::Result<Self> {
        let epoll = Rc::new(Epoll::new()?);
        // SAFETY: the descriptor is the same, and open, for as long as the `AsyncFd` has its share of `epoll`.
        let ready = unsafe { AsyncFd::register_with_interest(epoll, Interest::READABLE) };
        Ok(Self {
            ready: ready?,
            timer: Box::pin(time::sleep(Duration::ZERO)),
            events: [NO_EVENT; EVENTS],
            count: 0,
        })
    }

    /// Waits for events, until then at the latest. While they come the sockets are asked first: Tokio costs more.
    fn poll(&mut self, context: &mut Context<'_>, until: Option<Instant>) -> Poll<io::Result<()>> {
        if self.count > 0 || until.is_none() {
            self.count = self.ready.get_ref().events(&mut self.events)?.len();
        }
        let Some(until) = until.filter(|_| self.count == 0) else {
            return Poll::Ready(Ok(()));
        };
        while let Poll::Ready(guard) = self.ready.poll_read_ready(context) {
            let mut guard = guard?;
            self.count = guard.get_inner().events(&mut self.events)?.len();
            if self.count < EVENTS {
                guard.clear_ready();
            }
            if self.count > 0 {
                return Poll::Ready(Ok(()));
            }
        }
        self.poll_timer(context, until.into()).map(Ok)
    }

    /// To set the timer costs more than to wake up once too often: if it is due earlier it stays as it is.
    fn poll_timer(&mut self, context: &mut Context<'_>, until: time::Instant) -> Poll<()> {
        if self.timer.deadline() > until {
            self.timer.as_mut().reset(until);
        }
        while self.timer.as_mut().poll(context).is_ready() {
            if self.timer.deadline() >= until {
                return Poll::Ready(());
            }
            self.timer.as_mut().reset(until);
        }
        Poll::Pending
    }

    fn events(&self) -> &[libc::epoll_event] {
        &self.events[..self.count]
    }
}

fn ready(event: &libc::epoll_event) -> Ready {
    let has = |flags: libc::c_int| event.events & flags as u32 != 0;
    Ready {
        readable: has(libc::EPOLLIN),
        writable: has(libc::EPOLLOUT),
        closed: has(libc::EPOLLRDHUP | libc::EPOLLHUP | libc::EPOLLERR),
    }
}

/// The container's services over the system's sockets.
struct Services(Rc<Epoll>);

impl Network for Services {
    type Tcp = Tcp;
    type Udp = Udp;

    fn dial(&self, to: SocketAddr, key: Key) -> io::Result<Tcp> {
        let sock = Socket::new(Domain::for_address(to), Type::STREAM.nonblocking(), None)?;
        match sock.connect(&to.into()) {
            Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => return Err(error),
            _ => {}
        }
        self.0
            .add(&sock, key.slot.into(), libc::EPOLLIN | libc::EPOLLOUT)?;
        Ok(Tcp(sock.into()))
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
        sock.set_nonblocking(true)?;
        self.0.add(&sock, key.slot.into(), libc::EPOLLIN)?;
        Ok(Udp(sock))
    }

    fn listeners(&self, udp: bool, port: u16) -> Vec<SocketAddr> {
        listeners::on(udp, port)
    }
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

    fn write_vectored(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
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
        self.0.shutdown(Shutdown::Write)
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
            let error = Tcp(sock.into()).dialled().unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED));
        }
    }
}

//! All I/O of the tunnel, and all waiting: the one file that knows of Tokio.
//!
//! Tokio waits for time, for the end, for the runner while there is no link, and for one file descriptor: the
//! [`Epoll`] that all sockets are in. Each of them registered with Tokio itself would cost as much memory
//! again as an idle stream does (docs/architecture.md, Decisions).

use std::convert::Infallible;
use std::fs::{File, OpenOptions};
use std::future::{Future, poll_fn};
use std::io::{self, IoSlice, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use socket2::{Domain, SockRef, Socket, Type};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Notify;
use tokio::time::{self, Sleep};

use crate::handshake::{Granted, Handshake, Place, Refusal, RunnerUrl, wrong};
use crate::listeners;
use crate::log;
use crate::net::{self, Network, Ready};
use crate::offer::Offer;
use crate::ports::Looker;
use crate::protocol::Mark;
use crate::session::{End, Session};
use crate::settings::Settings;
use crate::streams::Key;
use crate::sys::{self, Epoll};
use crate::terminal::{Line, Terminals};

/// For the runner to be found, to answer, and to upgrade.
const OPENING: Duration = Duration::from_secs(10);
/// What is not answered for so long is asked again. A node drops what comes while its runner is away, and the kernel by
/// itself asks again after 1 s, 3 s, 7 s.
const KNOCK: Duration = Duration::from_millis(300);
/// How often a socket on which nobody listens is asked within one attempt: its runner is away, and may be back at once.
const KNOCKS: u32 = 30;
/// Paths that are longer have no room in a socket's address (unix(7)).
const LONGEST_PATH: usize = 100;
/// Unsent bytes in the kernel that a small message may have to wait for.
const UNSENT: u32 = 256 << 10;
/// What a Unix socket may hold, which the kernel doubles for its own use and never tunes.
const UNIX_BUFFER: usize = 512 << 10;
/// Streams have their slots as tokens.
const LINK: u64 = u64::MAX;
const LOOKED: u64 = u64::MAX - 1;
/// How many turns are taken while a link is opened before that goes on.
const TURNS_WITHOUT_LINK: usize = 64;
/// How many events are taken at once.
const EVENTS: usize = 256;
/// How long the sockets of a busy link are waited for without Tokio, which keeps being told to stop waiting.
/// A shorter one costs more: a timer due before the kernel's tick is set anew for each wait.
const MOMENT: Duration = Duration::from_millis(100);
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
    sock: Tcp,
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

    /// What lives as long as the process, so that streams outlive their link.
    pub fn endpoint(&self, settings: &Settings) -> io::Result<Endpoint> {
        let _inside = self.runtime.enter();
        let sockets = Sockets::new()?;
        let services = Services {
            epoll: Rc::clone(sockets.ready.get_ref()),
            terminals: Terminals::new(settings.terminals, &settings.offer),
            looker: Looker::new(&settings.offer)?,
            offer: settings.offer.clone(),
        };
        let bell = services.looker.bell();
        services.epoll.add(bell, LOOKED, libc::EPOLLIN)?;
        let session = Session::new(services, settings);
        Ok(Endpoint { session, sockets })
    }

    /// Opens the WebSocket to the runner; `None` if it was told to stop instead.
    pub fn open(
        &self,
        endpoint: &mut Endpoint,
        url: &RunnerUrl,
        handshake: Handshake,
    ) -> Result<Option<Opened>, Refusal> {
        let opening = async { time::timeout(OPENING, open(url, handshake)).await };
        match self.unless_stopped(endpoint, opening) {
            None => Ok(None),
            Some(Ok(opened)) => opened.map(Some),
            Some(Err(_)) => Err(io::Error::from(io::ErrorKind::TimedOut).into()),
        }
    }

    /// Sleeps; false if it was told to stop instead.
    pub fn sleep(&self, endpoint: &mut Endpoint, pause: Duration) -> bool {
        self.unless_stopped(endpoint, async { time::sleep(pause).await })
            .is_some()
    }

    /// Serves the services while `work` is under way.
    fn unless_stopped<T>(
        &self,
        endpoint: &mut Endpoint,
        work: impl Future<Output = T>,
    ) -> Option<T> {
        self.runtime.block_on(async {
            let (mut stop, mut work) = (pin!(self.stop.notified()), pin!(work));
            poll_fn(|context| {
                if stop.as_mut().poll(context).is_ready() {
                    return Poll::Ready(None);
                }
                if let Poll::Ready(done) = work.as_mut().poll(context) {
                    return Poll::Ready(Some(done));
                }
                endpoint.go_on(context);
                Poll::Pending
            })
            .await
        })
    }

    /// Serves one link until it ends; calls `new_token` when the runner says that there is one.
    pub fn serve(
        &self,
        endpoint: &mut Endpoint,
        opened: Opened,
        new_token: impl Fn() + 'static,
    ) -> io::Result<End> {
        let Opened { sock, granted } = opened;
        self.runtime.block_on(async {
            let interest = libc::EPOLLIN | libc::EPOLLOUT;
            endpoint
                .sockets
                .ready
                .get_ref()
                .add(&sock, LINK, interest)?;
            endpoint.session.set_now(Instant::now());
            endpoint.session.attach(Box::new(sock), granted.v2);
            endpoint.session.on_new_token(Box::new(new_token));
            let Err(end) = endpoint.turns(&self.stop, &granted.early).await;
            if matches!(end, End::Violated(_)) {
                let _ = endpoint.linger().await;
            }
            endpoint.session.unlink();
            Ok(end)
        })
    }
}

/// The streams and their sockets.
pub struct Endpoint {
    session: Session<Services>,
    sockets: Sockets,
}

impl Drop for Endpoint {
    /// Services are to see that this was no orderly end of their connections.
    fn drop(&mut self) {
        self.session.abandon();
    }
}

impl Endpoint {
    /// Turns until the link ends.
    async fn turns(&mut self, stop: &Notify, early: &[u8]) -> Result<Infallible, End> {
        self.session.process(early)?;
        let mut stopped = pin!(stop.notified());
        loop {
            let until = self.session.wait_until();
            let stopping = poll_fn(|context| {
                let stopping = stopped.as_mut().poll(context).is_ready();
                match self.sockets.poll(context, until, MOMENT) {
                    Poll::Pending if !stopping => Poll::Pending,
                    Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
                    _ => Poll::Ready(Ok(stopping)),
                }
            });
            let stopping = stopping.await?;
            self.take_events();
            if stopping {
                self.session.stop();
                stopped.set(stop.notified());
            }
            self.session.turn(self.sockets.events().is_empty())?;
        }
    }

    /// Notes what has happened to the sockets, and what time it is.
    fn take_events(&mut self) {
        self.session.set_now(Instant::now());
        for event in self.sockets.events() {
            match event.u64 {
                LINK => self.session.link_ready(ready(event)),
                LOOKED => self.session.looked(),
                slot => self.session.stream_ready(slot as usize, ready(event)),
            }
        }
    }

    /// Does what there is to do without a link.
    fn go_on(&mut self, context: &mut Context<'_>) {
        for _ in 0..TURNS_WITHOUT_LINK {
            match self
                .sockets
                .poll(context, self.session.wait_until(), Duration::ZERO)
            {
                Poll::Pending => return,
                Poll::Ready(Err(error)) => {
                    log!(Error, "services can't be served: {error}");
                    return;
                }
                Poll::Ready(Ok(())) => self.take_events(),
            }
            // Without a link none can end.
            let _ = self.session.turn(self.sockets.events().is_empty());
        }
        context.waker().wake_by_ref();
    }

    /// Takes what the runner still sends: unread bytes would make our end a reset, and a reset
    /// overtakes the close frame.
    async fn linger(&mut self) -> io::Result<()> {
        let until = Instant::now() + LINGER;
        let mut buffer = vec![0; 64 << 10];
        self.session.link().finish_writing()?;
        while Instant::now() < until {
            match self.session.link().read(&mut buffer) {
                Ok(0) => break,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    poll_fn(|context| self.sockets.poll(context, Some(until), MOMENT)).await?;
                    self.take_events();
                }
                result => drop(result?),
            }
        }
        Ok(())
    }
}

async fn open(url: &RunnerUrl, handshake: Handshake) -> Result<Opened, Refusal> {
    match url.place() {
        Place::Network(host, port) => {
            let mut sock = dial((host, port)).await?;
            sock.set_nodelay(true)?;
            sys::limit_unsent(&sock, UNSENT)?;
            let granted = shake_hands(&mut sock, handshake).await?;
            let sock = Tcp::Service(sock.into_std()?);
            Ok(Opened { sock, granted })
        }
        Place::Socket(path) => {
            let mut sock = dial_socket(path).await?;
            SockRef::from(&sock).set_send_buffer_size(UNIX_BUFFER)?;
            let granted = shake_hands(&mut sock, handshake).await?;
            let sock = Tcp::Runner(sock.into_std()?);
            Ok(Opened { sock, granted })
        }
    }
}

async fn shake_hands(
    sock: &mut (impl AsyncRead + AsyncWrite + Unpin),
    mut handshake: Handshake,
) -> Result<Granted, Refusal> {
    sock.write_all(&handshake.request).await?;
    let mut piece = [0; 4096];
    loop {
        let length = sock.read(&mut piece).await?;
        if let Some(granted) = handshake.receive(&piece[..length])? {
            return Ok(granted);
        }
    }
}

/// Connects to a socket of this machine. While its runner is away nobody listens there, and that is said at once.
async fn dial_socket(path: &Path) -> Result<tokio::net::UnixStream, Refusal> {
    let failed = |error| wrong(format!("{}: {error}", path.display()));
    let mut last = failed(io::ErrorKind::NotFound.into());
    for _ in 0..KNOCKS {
        let (name, _directory) = address_of(path).map_err(failed)?;
        last = match tokio::net::UnixStream::connect(name).await {
            Ok(sock) => return Ok(sock),
            Err(error) if is_away(&error) => failed(error),
            Err(error) => return Err(failed(error)),
        };
        time::sleep(KNOCK).await;
    }
    Err(last)
}

/// Whether it is for a while only that a socket can't be connected to.
fn is_away(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionRefused, NotFound, WouldBlock};
    matches!(error.kind(), ConnectionRefused | NotFound | WouldBlock)
}

/// What a socket is called where it is connected to; by its directory, which is open until then, where its path is long.
fn address_of(path: &Path) -> io::Result<(PathBuf, Option<File>)> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    if path.as_os_str().len() <= LONGEST_PATH {
        return Ok((path.to_owned(), None));
    }
    let flags = libc::O_PATH | libc::O_DIRECTORY;
    let folder = OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(folder)?;
    let known = PathBuf::from(format!("/proc/self/fd/{}", folder.as_raw_fd()));
    Ok((known.join(name), Some(folder)))
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
        last = match time::timeout(share, connect(*address)).await {
            Ok(Ok(sock)) => return Ok(sock),
            Ok(Err(error)) => wrong(format!("{address}: {error}")),
            Err(_) => wrong(format!("{address}: it didn't answer in time")),
        };
    }
    Err(last)
}

/// Connects. Where no answer comes soon, it asks again beside that: an answer may only be slow.
async fn connect(address: SocketAddr) -> io::Result<tokio::net::TcpStream> {
    let ask = || Box::pin(tokio::net::TcpStream::connect(address));
    let mut asked = vec![ask()];
    loop {
        let first = poll_fn(|context| {
            let mut answers = asked.iter_mut().map(|one| one.as_mut().poll(context));
            answers.find(Poll::is_ready).unwrap_or(Poll::Pending)
        });
        match time::timeout(KNOCK, first).await {
            Ok(answer) => return answer,
            Err(_) => asked.push(ask()),
        }
    }
}

/// All sockets, and what has happened to them.
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

    /// Waits for events, until then at the latest. While they come the sockets alone are waited for first, for a
    /// `moment`: Tokio costs more.
    fn poll(
        &mut self,
        context: &mut Context<'_>,
        until: Option<Instant>,
        moment: Duration,
    ) -> Poll<io::Result<()>> {
        if self.count > 0 || until.is_none() {
            let long = until.is_some_and(|until| until > Instant::now() + moment);
            let wait = if long { moment } else { Duration::ZERO };
            let events = self.ready.get_ref().events(&mut self.events, wait);
            self.count = events?.len();
        }
        let Some(until) = until.filter(|_| self.count == 0) else {
            return Poll::Ready(Ok(()));
        };
        while let Poll::Ready(guard) = self.ready.poll_read_ready(context) {
            let mut guard = guard?;
            let events = guard.get_inner().events(&mut self.events, Duration::ZERO);
            self.count = events?.len();
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
struct Services {
    epoll: Rc<Epoll>,
    terminals: Terminals,
    looker: Looker,
    offer: Offer,
}

impl Network for Services {
    type Tcp = Tcp;
    type Udp = Udp;

    fn check(&self, udp: bool, to: SocketAddr) -> io::Result<u64> {
        self.offer.check(udp, to)
    }

    fn dial(&self, to: SocketAddr, key: Key) -> io::Result<Tcp> {
        let sock = Socket::new(Domain::for_address(to), Type::STREAM.nonblocking(), None)?;
        match sock.connect(&to.into()) {
            Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => return Err(error),
            _ => {}
        }
        self.epoll
            .add(&sock, key.slot.into(), libc::EPOLLIN | libc::EPOLLOUT)?;
        Ok(Tcp::Service(sock.into()))
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
        self.epoll.add(&sock, key.slot.into(), libc::EPOLLIN)?;
        Ok(Udp(sock))
    }

    fn terminal(&self, start: &[u8], mark: &Mark, key: Key) -> io::Result<Tcp> {
        let line = self.terminals.open(start, mark)?;
        self.epoll
            .add(&line, key.slot.into(), libc::EPOLLIN | libc::EPOLLOUT)?;
        Ok(Tcp::Terminal(line))
    }

    fn revoke(&self, mark: &Mark) {
        self.terminals.revoke(mark);
    }

    fn look(&self, question: &[u8]) {
        self.looker.begin(question);
    }

    fn looked(&self) -> Option<Vec<u8>> {
        self.looker.answer()
    }

    fn listeners(&self, udp: bool, port: u16) -> Vec<SocketAddr> {
        listeners::on(udp, port)
    }
}

enum Tcp {
    Service(TcpStream),
    /// The link, where it is no TCP connection.
    Runner(UnixStream),
    Terminal(Line),
}

impl AsRawFd for Tcp {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Self::Service(sock) => sock.as_raw_fd(),
            Self::Runner(sock) => sock.as_raw_fd(),
            Self::Terminal(line) => line.as_raw_fd(),
        }
    }
}

impl Read for Tcp {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Service(sock) => sock.read(buffer),
            Self::Runner(sock) => sock.read(buffer),
            Self::Terminal(line) => line.read(buffer),
        }
    }
}

impl Write for Tcp {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Service(sock) => sock.write(bytes),
            Self::Runner(sock) => sock.write(bytes),
            Self::Terminal(line) => line.sock().write(bytes),
        }
    }

    fn write_vectored(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Service(sock) => sock.write_vectored(pieces),
            Self::Runner(sock) => sock.write_vectored(pieces),
            Self::Terminal(line) => line.sock().write_vectored(pieces),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl net::TcpSocket for Tcp {
    fn dialled(&mut self) -> io::Result<bool> {
        match self {
            Self::Service(sock) => dialled(sock),
            Self::Terminal(line) => line.dialled(),
            Self::Runner(_) => Ok(true),
        }
    }

    fn finish_writing(&mut self) -> io::Result<()> {
        match self {
            Self::Service(sock) => sock.shutdown(Shutdown::Write),
            Self::Runner(sock) => sock.shutdown(Shutdown::Write),
            Self::Terminal(line) => line.sock().shutdown(Shutdown::Write),
        }
    }

    fn reset_on_close(&mut self) {
        match self {
            Self::Service(sock) => sys::reset_on_close(sock),
            Self::Terminal(line) => line.reset_on_close(),
            Self::Runner(_) => {}
        }
    }

    fn attend(&mut self, yes: bool) {
        if let Self::Terminal(line) = self {
            line.attend(yes);
        }
    }
}

fn dialled(sock: &TcpStream) -> io::Result<bool> {
    if let Some(error) = sock.take_error()? {
        return Err(error);
    }
    match sock.peer_addr() {
        // Where nothing listens the kernel may dial from the very port that it dials (RFC 9293 §3.5).
        Ok(peer) if peer == sock.local_addr()? => {
            Err(io::Error::from_raw_os_error(libc::ECONNREFUSED))
        }
        Ok(_) => sock.set_nodelay(true).map(|()| true),
        Err(error) if error.kind() == io::ErrorKind::NotConnected => Ok(false),
        Err(error) => Err(error),
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

    /// How many sockets of this machine ask for a connection to a port, and have no answer.
    fn asking(port: u16) -> usize {
        let there = format!("0100007F:{port:04X}");
        let table = std::fs::read_to_string("/proc/net/tcp").unwrap();
        let lines = table.lines().map(|line| line.split_whitespace());
        lines
            .filter(|line| {
                let words: Vec<_> = line.clone().collect();
                words[2] == there && words[3] == "02"
            })
            .count()
    }

    #[test]
    fn a_runner_that_does_not_answer_is_asked_again_before_the_kernel_does() {
        let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        listener
            .bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into())
            .unwrap();
        listener.listen(0).unwrap();
        let at = listener.local_addr().unwrap().as_socket().unwrap();
        // Its queue is full with this one: it drops what comes, as a node does whose runner is away.
        let _first = TcpStream::connect(at).unwrap();
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut dialled = pin!(dial(("127.0.0.1", at.port())));
            while asking(at.port()) < 2 {
                let moment = time::timeout(Duration::from_millis(10), &mut dialled);
                assert!(moment.await.is_err(), "nobody has answered");
            }
            listener.accept().unwrap();
            assert!(dialled.await.is_ok());
        });
    }

    #[test]
    fn a_socket_is_connected_to_as_soon_as_somebody_listens_there() {
        let folder = std::env::temp_dir().join(format!("knock-{}", std::process::id()));
        let deep = folder.join("a".repeat(60)).join("b".repeat(60));
        std::fs::create_dir_all(&deep).unwrap();
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        for path in [folder.join("s"), deep.join("s")] {
            runtime.block_on(async {
                let mut dialled = pin!(dial_socket(&path));
                let early = time::timeout(Duration::ZERO, &mut dialled).await;
                assert!(early.is_err(), "there is no such socket");
                let listener = Socket::new(Domain::UNIX, Type::STREAM, None).unwrap();
                let (name, _folder) = address_of(&path).unwrap();
                listener
                    .bind(&socket2::SockAddr::unix(name).unwrap())
                    .unwrap();
                listener.listen(1).unwrap();
                assert!(dialled.await.is_ok());
            });
        }
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn a_dial_that_reached_itself_is_refused() {
        for (domain, ip) in [
            (Domain::IPV4, Ipv4Addr::LOCALHOST.into()),
            (Domain::IPV6, Ipv6Addr::LOCALHOST.into()),
        ] {
            let sock = Socket::new(domain, Type::STREAM, None).unwrap();
            sock.bind(&SocketAddr::new(ip, 0).into()).unwrap();
            sock.connect(&sock.local_addr().unwrap()).unwrap();
            let error = Tcp::Service(sock.into()).dialled().unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::ECONNREFUSED));
        }
    }
}

//! A runner in the test's own process, and services behind the tunnel client. Real sockets, ports
//! that the system chooses, and a time limit on every wait, so that a broken promise fails.

#![allow(dead_code, missing_docs)]

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use kohakuriver_tunnel::frame::mask;
use kohakuriver_tunnel::protocol::{HEADER, Header, SUBPROTOCOL_V2, TCP, UDP, kind};
use kohakuriver_tunnel::sys;
use socket2::{Domain, SockRef, Socket, Type};
use tungstenite::handshake::derive_accept_key;

pub const PATIENCE: Duration = Duration::from_secs(30);

/// Where a tunnel client dials in.
pub struct Runner {
    listener: TcpListener,
}

/// One message, as received.
#[derive(Debug, PartialEq, Eq, Clone)]
pub struct Message {
    pub kind: u8,
    pub proto: u8,
    pub id: u32,
    pub payload: Vec<u8>,
}

/// A tunnel as its runner sees it.
pub struct Wire {
    reader: BufReader<TcpStream>,
    pub head: Vec<String>,
    /// By stream: up to where the tunnel client takes bytes.
    pub limits: HashMap<u32, u64>,
}

impl Runner {
    pub fn new() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        // Also of `accept` (socket(7)).
        SockRef::from(&listener)
            .set_read_timeout(Some(PATIENCE))
            .unwrap();
        Self { listener }
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.listener.local_addr().unwrap())
    }

    /// Takes the next dial and grants version 2.
    pub fn accept(&self) -> Wire {
        self.accept_as(true)
    }

    /// Takes the next dial and knows no subprotocol.
    pub fn accept_v1(&self) -> Wire {
        self.accept_as(false)
    }

    fn accept_as(&self, v2: bool) -> Wire {
        let mut wire = self.accept_request();
        let mut answer = wire.switching();
        if v2 {
            answer += &format!("Sec-WebSocket-Protocol: {SUBPROTOCOL_V2}\r\n");
        }
        wire.write(format!("{answer}\r\n").as_bytes());
        wire
    }

    /// Takes the next dial and reads its request; the test answers.
    pub fn accept_request(&self) -> Wire {
        let (sock, _) = self.listener.accept().unwrap();
        sock.set_nodelay(true).unwrap();
        sock.set_read_timeout(Some(PATIENCE)).unwrap();
        sock.set_write_timeout(Some(PATIENCE)).unwrap();
        let mut reader = BufReader::with_capacity(1 << 20, sock);
        let mut head = Vec::new();
        loop {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            match line.trim_end() {
                "" => break,
                line => head.push(line.to_owned()),
            }
        }
        Wire {
            reader,
            head,
            limits: HashMap::new(),
        }
    }
}

impl Wire {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head
            .iter()
            .filter_map(|line| line.split_once(": "))
            .find(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value)
    }

    /// The answer's head without its last line.
    pub fn switching(&self) -> String {
        let key = self.header("Sec-WebSocket-Key").unwrap();
        let accept = derive_accept_key(key.as_bytes());
        format!(
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {accept}\r\n"
        )
    }

    pub fn socket(&self) -> &TcpStream {
        self.reader.get_ref()
    }

    pub fn write(&mut self, bytes: &[u8]) {
        self.reader.get_mut().write_all(bytes).unwrap();
    }

    pub fn send(&mut self, header: Header, payload: &[u8]) {
        self.write(&message(header, payload));
    }

    pub fn connect(&mut self, id: u32, port: u16, limit: u64) {
        self.send(
            Header {
                kind: kind::CONNECT,
                proto: TCP,
                id,
                port,
            },
            &limit.to_be_bytes(),
        );
    }

    pub fn connect_v1(&mut self, id: u32, port: u16) {
        self.send(
            Header {
                kind: kind::CONNECT,
                proto: TCP,
                id,
                port,
            },
            &[],
        );
    }

    pub fn connect_udp(&mut self, id: u32, port: u16) {
        self.send(
            Header {
                kind: kind::CONNECT,
                proto: UDP,
                id,
                port,
            },
            &[],
        );
        assert_eq!(
            self.message(),
            Message {
                kind: kind::CONNECTED,
                proto: UDP,
                id,
                payload: vec![]
            }
        );
    }

    /// Opens a stream and waits until it is.
    pub fn open(&mut self, id: u32, port: u16, limit: u64) {
        self.connect(id, port, limit);
        let connected = self.message();
        assert_eq!(
            (connected.kind, connected.id),
            (kind::CONNECTED, id),
            "{}",
            connected.text()
        );
        self.limits.insert(id, connected.limit());
    }

    pub fn data(&mut self, id: u32, payload: &[u8]) {
        self.send(Header::new(kind::DATA, TCP, id), payload);
    }

    pub fn datagram(&mut self, id: u32, payload: &[u8]) {
        self.send(Header::new(kind::DATA, UDP, id), payload);
    }

    pub fn window(&mut self, id: u32, limit: u64) {
        self.send(Header::new(kind::WINDOW, TCP, id), &limit.to_be_bytes());
    }

    pub fn signal(&mut self, kind: u8, id: u32) {
        self.send(Header::new(kind, TCP, id), &[]);
    }

    /// The next frame: opcode and payload. `None` at the end of the connection.
    pub fn frame(&mut self) -> Option<(u8, Vec<u8>)> {
        let mut start = [0; 2];
        if self.reader.read_exact(&mut start).is_err() {
            return None;
        }
        assert_eq!(start[0] & 0xf0, 0x80, "not fragmented, no reserved bits");
        assert_eq!(start[1] & 0x80, 0x80, "a client masks");
        let length = match start[1] & 0x7f {
            126 => u64::from(u16::from_be_bytes(self.exactly())),
            127 => u64::from_be_bytes(self.exactly()),
            short => u64::from(short),
        };
        assert!(length <= 1 << 20, "at most 1 MiB");
        let key: [u8; 4] = self.exactly();
        let mut payload = vec![0; length as usize];
        self.reader.read_exact(&mut payload).unwrap();
        mask(&mut payload, key);
        Some((start[0] & 0x0f, payload))
    }

    fn exactly<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        self.reader.read_exact(&mut bytes).unwrap();
        bytes
    }

    /// The next message, of any kind. WebSocket pings before it are answered, for a bounded time: they come for ever.
    pub fn any(&mut self) -> Message {
        let deadline = Instant::now() + PATIENCE;
        let payload = loop {
            match self.frame().expect("the tunnel is up") {
                (2, payload) => break payload,
                (9, payload) => {
                    assert!(Instant::now() < deadline, "no message but pings came");
                    self.write(&frame(10, &payload));
                }
                (opcode, payload) => panic!("opcode {opcode}: {payload:?}"),
            }
        };
        let header = Header::unpack(payload[..HEADER].try_into().unwrap());
        Message {
            kind: header.kind,
            proto: header.proto,
            id: header.id,
            payload: payload[HEADER..].to_vec(),
        }
    }

    /// The next message that is not part of flow control, which is served here.
    pub fn message(&mut self) -> Message {
        loop {
            let message = self.any();
            match message.kind {
                kind::WINDOW => {
                    let limit = message.limit();
                    let before = self.limits.insert(message.id, limit).unwrap_or(0);
                    assert!(limit >= before, "a limit never shrinks");
                }
                kind::PING => self.send(Header::new(kind::PONG, TCP, message.id), &message.payload),
                _ => return message,
            }
        }
    }

    pub fn expect(&mut self, kind: u8, id: u32) -> Message {
        let message = self.message();
        assert_eq!((message.kind, message.id), (kind, id), "{}", message.text());
        message
    }

    /// The bytes of one stream, which alone is talking, until there are `length`.
    pub fn bytes(&mut self, id: u32, length: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() < length {
            bytes.extend(self.expect(kind::DATA, id).payload);
        }
        bytes
    }

    /// The WebSocket close code that the tunnel ends with.
    pub fn close_code(&mut self) -> u16 {
        loop {
            let (opcode, payload) = self.frame().expect("a close frame first");
            if opcode == 8 {
                return u16::from_be_bytes(payload[..2].try_into().unwrap());
            }
        }
    }
}

impl Message {
    pub fn limit(&self) -> u64 {
        u64::from_be_bytes(self.payload[..].try_into().expect("8 bytes"))
    }

    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.payload).into_owned()
    }
}

/// A server's frame around one message.
pub fn message(header: Header, payload: &[u8]) -> Vec<u8> {
    frame(2, &[&header.pack()[..], payload].concat())
}

pub fn frame(opcode: u8, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![0x80 | opcode];
    match payload.len() {
        short @ 0..=125 => frame.push(short as u8),
        medium @ 126..=0xffff => {
            frame.push(126);
            frame.extend((medium as u16).to_be_bytes());
        }
        long => {
            frame.push(127);
            frame.extend((long as u64).to_be_bytes());
        }
    }
    frame.extend(payload);
    frame
}

/// The real binary. It is killed at the end of the test.
pub struct Client {
    pub child: Child,
    pub errors: Receiver<String>,
}

impl Client {
    pub fn start(runner: &Runner) -> Self {
        Self::with(runner, &["--reconnect-delay", "0.02"])
    }

    pub fn with<S: AsRef<OsStr>>(runner: &Runner, args: &[S]) -> Self {
        let mut command = client_command(&runner.url());
        command.args(args);
        Self::spawn(command)
    }

    pub fn spawn(mut command: Command) -> Self {
        // Whoever runs the tests in the background has them ignore these, and a shell can't trap what it ignores.
        // SAFETY: signal(2) may be called between fork and exec.
        unsafe {
            command.pre_exec(|| {
                for signal in [libc::SIGINT, libc::SIGQUIT, libc::SIGHUP] {
                    libc::signal(signal, libc::SIG_DFL);
                }
                Ok(())
            });
        }
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let (send, errors) = mpsc::channel();
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let _ = send.send(line);
            }
        });
        Self { child, errors }
    }

    /// Waits for a line on standard error with `word` in it.
    pub fn line_with(&self, word: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let line = self
                .errors
                .recv_timeout(deadline - Instant::now())
                .expect(word);
            if line.contains(word) {
                return line;
            }
        }
    }

    pub fn signal(&self, signal: libc::c_int) {
        sys::send_signal(self.child.id() as libc::pid_t, signal);
    }

    pub fn wait(&mut self) -> ExitStatus {
        self.child.wait().unwrap()
    }

    /// Counted page by page: what `status` says lags behind by some pages for each processor (proc_pid_status(5)).
    pub fn resident_kib(&self) -> u64 {
        let rollup = format!("/proc/{}/smaps_rollup", self.child.id());
        let text = std::fs::read_to_string(rollup).unwrap();
        let line = text.lines().find(|line| line.starts_with("Rss:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn client_command(url: &str) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tunnel-client"));
    command
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap_or_default());
    command.args([
        "--runner-url",
        url,
        "--container-id",
        "vm-1",
        "--log-level",
        "debug",
    ]);
    command
}

/// A service that hands each connection to `serve`, on a thread of its own; its port.
pub fn service(serve: impl Fn(TcpStream) + Send + Sync + Copy + 'static) -> u16 {
    let (listener, port) = listener();
    thread::spawn(move || {
        for sock in listener.incoming().map_while(Result::ok) {
            thread::spawn(move || serve(sock));
        }
    });
    port
}

/// A service whose connections the test holds in its own hands.
pub fn listener() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

pub fn take(listener: &TcpListener) -> TcpStream {
    SockRef::from(listener)
        .set_read_timeout(Some(PATIENCE))
        .unwrap();
    let (sock, _) = listener.accept().unwrap();
    sock.set_read_timeout(Some(PATIENCE)).unwrap();
    sock
}

pub fn echo() -> u16 {
    service(|mut sock| {
        let mut buffer = vec![0; 256 << 10];
        while let Ok(length @ 1..) = sock.read(&mut buffer) {
            if sock.write_all(&buffer[..length]).is_err() {
                break;
            }
        }
    })
}

/// Keeps a port of some addresses from everybody else, who would get it from the system: nothing listens there.
pub struct Reserved {
    pub port: u16,
    _sockets: Vec<Socket>,
}

impl Reserved {
    /// `None` if somebody has the port already.
    fn new(kind: Type, port: u16, addresses: impl IntoIterator<Item = IpAddr>) -> Option<Self> {
        let mut reserved = Self {
            port,
            _sockets: Vec::new(),
        };
        for ip in addresses {
            let sock = Socket::new(Domain::for_address((ip, port).into()), kind, None).unwrap();
            match sock.bind(&SocketAddr::from((ip, reserved.port)).into()) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::AddrInUse => return None,
                Err(error) if error.kind() == ErrorKind::AddrNotAvailable => continue, // no IPv6
                Err(error) => panic!("{ip}: {error}"),
            }
            let at = sock.local_addr().unwrap().as_socket().unwrap();
            reserved.port = at.port();
            if kind == Type::DGRAM {
                // With a peer it takes nobody else's datagrams.
                sock.connect(&SocketAddr::new(ip, 1).into()).unwrap();
            }
            reserved._sockets.push(sock);
        }
        Some(reserved)
    }

    fn alone(kind: Type, at: SocketAddr) -> Option<Self> {
        let addresses: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
        let others = addresses.into_iter().filter(|ip| *ip != at.ip());
        Self::new(kind, at.port(), others)
    }
}

/// A port where nothing listens and nobody comes to listen.
pub fn closed_port() -> Reserved {
    closed(Type::STREAM)
}

/// The same for datagrams.
pub fn closed_udp_port() -> Reserved {
    closed(Type::DGRAM)
}

fn closed(kind: Type) -> Reserved {
    let addresses: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
    loop {
        if let Some(reserved) = Reserved::new(kind, 0, addresses) {
            return reserved;
        }
    }
}

/// A listener on `ip`, whose port is nobody's on 127.0.0.1 and ::1, where a service is looked for first.
pub fn listener_on(ip: &str) -> (TcpListener, Reserved) {
    loop {
        let listener = TcpListener::bind((ip, 0)).unwrap();
        let at = listener.local_addr().unwrap();
        if let Some(reserved) = Reserved::alone(Type::STREAM, at) {
            return (listener, reserved);
        }
    }
}

/// The same for datagrams.
pub fn udp_on(ip: &str) -> (UdpSocket, Reserved) {
    loop {
        let service = UdpSocket::bind((ip, 0)).unwrap();
        let at = service.local_addr().unwrap();
        if let Some(reserved) = Reserved::alone(Type::DGRAM, at) {
            return (service, reserved);
        }
    }
}

/// A folder of this test's own; the test removes it.
pub fn tempdir(name: &str) -> std::path::PathBuf {
    let path = std::env::temp_dir().join(format!("tunnel-client-{name}-{}", std::process::id()));
    std::fs::create_dir_all(&path).unwrap();
    path
}

/// Bytes that show where they belong.
pub fn pattern(length: usize) -> Vec<u8> {
    pattern_at(0, length)
}

pub fn pattern_at(start: usize, length: usize) -> Vec<u8> {
    (start as u32..(start + length) as u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect()
}

/// Waits for what is to come true soon.
pub fn until(mut what: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !what() {
        assert!(Instant::now() < deadline);
        thread::sleep(Duration::from_millis(5));
    }
}

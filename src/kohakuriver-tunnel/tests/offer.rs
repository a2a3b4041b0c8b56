//! A client that offers only some ports: the real binary, and real listeners of two users in one network. A listener is of
//! the user that its thread was when it was made (setfsuid(2)), which only root can be somebody else for.

#[path = "support/opener.rs"]
mod opener;
mod support;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};

use kohakuriver_tunnel::protocol::{Header, TCP, TERMINAL, UDP, kind};
use kohakuriver_tunnel::sys;
use socket2::{Domain, Socket, Type};
use support::*;

const SOMEBODY_ELSE: u32 = 54_321;

/// Another user's; none where this process can't be another user's.
fn of_somebody_else<T>(make: impl FnOnce() -> T) -> Option<T> {
    if sys::user() != 0 {
        eprintln!("not root: there is no other user to be");
        return None;
    }
    // SAFETY: takes a number; it changes the calling thread alone, and is taken back below.
    unsafe { libc::setfsuid(SOMEBODY_ELSE) };
    let made = make();
    // SAFETY: as above.
    unsafe { libc::setfsuid(0) };
    Some(made)
}

fn offering(runner: &Runner, what: &str) -> Client {
    Client::with(runner, &["--offer", what])
}

fn told(wire: &mut Wire) -> Vec<(u8, u16)> {
    wire.send(Header::new(kind::PORTS, TCP, 0), &[0; 5]);
    let answer = wire.expect(kind::PORTS, 0).payload;
    let (mut rest, mut found) = (&answer[5..], Vec::new());
    while let [proto, high, low, tail @ ..] = rest {
        found.push((*proto, u16::from_be_bytes([*high, *low])));
        let address = 1 + usize::from(tail[0]);
        rest = &tail[address + 1 + usize::from(tail[address])..];
    }
    found
}

#[test]
fn another_users_port_is_neither_told_nor_dialled_and_ones_own_is() {
    let runner = Runner::new();
    let _client = offering(&runner, "own");
    let mut wire = runner.accept();
    let mine = echo();
    wire.open(1, mine, u64::MAX);
    wire.data(1, b"mine");
    assert_eq!(wire.bytes(1, 4), b"mine");
    let Some(theirs) = of_somebody_else(|| TcpListener::bind("127.0.0.1:0").unwrap()) else {
        return;
    };
    let port = theirs.local_addr().unwrap().port();
    wire.connect(3, port, u64::MAX);
    assert_eq!(
        wire.expect(kind::ERROR, 3).text(),
        format!(
            "EACCES: what listens on port {port} is another user's on this shared node, so it is not offered"
        )
    );
    theirs.set_nonblocking(true).unwrap();
    assert!(theirs.accept().is_err(), "it was dialled");
    let told = told(&mut wire);
    assert!(told.contains(&(TCP, mine)) && !told.contains(&(TCP, port)));
}

#[test]
fn another_users_port_that_is_named_is_told_and_dialled() {
    let runner = Runner::new();
    let Some(theirs) = of_somebody_else(|| TcpListener::bind("127.0.0.1:0").unwrap()) else {
        return;
    };
    let port = theirs.local_addr().unwrap().port();
    let _client = offering(&runner, &format!("own,{port}"));
    let mut wire = runner.accept();
    wire.open(1, port, u64::MAX);
    let _taken = take(&theirs);
    assert!(told(&mut wire).contains(&(TCP, port)));
}

#[test]
fn a_service_on_another_address_than_somebody_elses_with_the_same_port_is_reached() {
    let runner = Runner::new();
    let _client = offering(&runner, "own");
    let mut wire = runner.accept();
    let (mine, reserved) = listener_on("::1");
    let port = reserved.port;
    drop(reserved);
    let Some(_theirs) = of_somebody_else(|| TcpListener::bind(("127.0.0.1", port)).unwrap()) else {
        return;
    };
    wire.open(1, port, u64::MAX);
    take(&mine);
}

#[test]
fn a_service_on_all_addresses_of_ipv6_is_reached_by_ipv6() {
    let runner = Runner::new();
    let _client = offering(&runner, "own");
    let mut wire = runner.accept();
    let both = TcpListener::bind("[::]:0").unwrap();
    wire.open(1, both.local_addr().unwrap().port(), u64::MAX);
    assert!(take(&both).peer_addr().unwrap().ip() == Ipv6Addr::LOCALHOST);
}

#[test]
fn where_nothing_listens_that_is_what_is_said() {
    let runner = Runner::new();
    let _client = offering(&runner, "own");
    let mut wire = runner.accept();
    let closed = closed_port();
    wire.connect(1, closed.port, u64::MAX);
    let text = wire.expect(kind::ERROR, 1).text();
    assert!(text.starts_with("ECONNREFUSED: "), "{text}");
}

#[test]
fn datagrams_go_to_ones_own_service_and_none_to_another_users() {
    let runner = Runner::new();
    let _client = offering(&runner, "own");
    let mut wire = runner.accept();
    let mine = UdpSocket::bind("127.0.0.1:0").unwrap();
    mine.set_read_timeout(Some(PATIENCE)).unwrap();
    let port = mine.local_addr().unwrap().port();
    wire.connect_udp(1, port);
    wire.datagram(1, b"mine");
    let mut buffer = [0; 9];
    assert_eq!(mine.recv(&mut buffer).unwrap(), 4);
    drop(mine);
    // A process that another test has just forked has the socket until it is another program.
    let bind = || loop {
        match UdpSocket::bind(("127.0.0.1", port)) {
            Ok(sock) => break sock,
            Err(_) => std::thread::yield_now(),
        }
    };
    let Some(theirs) = of_somebody_else(bind) else {
        return;
    };
    theirs.set_nonblocking(true).unwrap();
    let header = Header {
        port,
        ..Header::new(kind::CONNECT, UDP, 3)
    };
    wire.send(header, &[]);
    let text = wire.expect(kind::ERROR, 3).text();
    assert!(text.starts_with("EACCES: "), "{text}");
    assert!(!told(&mut wire).contains(&(UDP, port)));
    assert!(theirs.recv(&mut buffer).is_err());
}

#[test]
fn datagrams_for_ones_own_service_go_to_nobody_who_has_connected_from_its_place() {
    let runner = Runner::new();
    let _client = offering(&runner, "own");
    let mut wire = runner.accept();
    let mine = shared_udp(0);
    let port = mine.local_addr().unwrap().port();
    wire.connect_udp(1, port);
    wire.datagram(1, b"mine");
    mine.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut buffer = [0; 9];
    let (_, from) = mine.recv_from(&mut buffer).unwrap();
    // The kernel gives it all that comes from there from now on.
    let theirs = of_somebody_else(|| {
        let sock = shared_udp(port);
        sock.connect(from).unwrap();
        sock
    });
    let Some(theirs) = theirs else { return };
    let header = Header {
        port,
        ..Header::new(kind::CONNECT, UDP, 3)
    };
    wire.send(header, &[]);
    let text = wire.expect(kind::ERROR, 3).text();
    assert!(text.starts_with("EACCES: "), "{text}");
    drop(theirs);
}

/// A socket on 127.0.0.1 beside others with the same port.
fn shared_udp(port: u16) -> UdpSocket {
    let sock = Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap();
    sock.set_reuse_address(true).unwrap();
    let at = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    sock.bind(&at.into()).unwrap();
    sock.into()
}

#[test]
fn a_stream_goes_on_from_the_task_to_no_port_of_its_own_machine_that_is_not_offered() {
    let Some(here) = own_address() else { return };
    let Some(theirs) = of_somebody_else(|| TcpListener::bind((here, 0)).unwrap()) else {
        return;
    };
    let port = theirs.local_addr().unwrap().port();
    let runner = Runner::new();
    let _client = offering(&runner, "own");
    let mut wire = runner.accept();
    let mut stream = opener::Opener::new(0, 0);
    stream.proto = TERMINAL;
    stream.start = beyond(&["to", &here.to_string(), &port.to_string()]);
    stream.connect_with(&mut wire, opener::HOLD);
    let text = wire.expect(kind::ERROR, stream.id).text();
    let refused = format!("EACCES: what listens on port {port} ");
    assert!(text.starts_with(&refused), "{text}");
    theirs.set_nonblocking(true).unwrap();
    assert!(theirs.accept().is_err(), "it was dialled");
}

/// The start of a stream that leads beyond the task (docs/protocol.md §6).
fn beyond(words: &[&str]) -> Vec<u8> {
    let mut start = vec![16, 0, 0, 0, 0];
    start.extend([0; 8]); // no user, no directory
    start.extend((words.len() as u32).to_be_bytes());
    for word in words {
        start.extend((word.len() as u32).to_be_bytes());
        start.extend(word.as_bytes());
    }
    start.extend([0; 4]); // no environment
    start
}

/// An address of this machine that is not loopback.
fn own_address() -> Option<IpAddr> {
    let sock = UdpSocket::bind("0.0.0.0:0").ok()?;
    sock.connect("192.0.2.1:9").ok()?;
    Some(sock.local_addr().ok()?.ip())
}

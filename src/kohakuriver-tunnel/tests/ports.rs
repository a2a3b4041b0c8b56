//! Which ports listen: the real binary looks at real sockets of real processes.

mod support;

use std::net::UdpSocket;
use std::os::unix::process::CommandExt;
use std::sync::{PoisonError, RwLock, RwLockReadGuard};
use std::thread;

use kohakuriver_tunnel::protocol::{Header, TCP, UDP, kind};
use kohakuriver_tunnel::sys;
use support::*;

const NETWORK: &[u8] = &[0];
const SEEN: &[u8] = &[1];
const LISTENERS: usize = 1200;

/// The tests of this file are threads of one process: of its ports none may be cut while another test looks.
static FEW_PORTS: RwLock<()> = RwLock::new(());

fn few_ports() -> RwLockReadGuard<'static, ()> {
    FEW_PORTS.read().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug, PartialEq, Eq, Clone)]
struct Port {
    proto: u8,
    port: u16,
    address: Vec<u8>,
    program: Vec<u8>,
}

/// A client in a session of its own, as that of a process task is.
fn in_its_own_session(runner: &Runner) -> Client {
    let mut command = client_command(&runner.url());
    // SAFETY: one system call, which may be made between fork and exec.
    unsafe { command.pre_exec(|| sys::lead_a_session(false)) };
    Client::spawn(command)
}

fn asked(wire: &mut Wire, number: u32, scope: &[u8]) -> (u8, Vec<Port>) {
    let question = [&number.to_be_bytes()[..], scope].concat();
    wire.send(Header::new(kind::PORTS, TCP, 0), &question);
    let answer = wire.expect(kind::PORTS, 0).payload;
    assert_eq!(answer[..4], number.to_be_bytes());
    (answer[4], ports(&answer[5..]))
}

fn ports(mut rest: &[u8]) -> Vec<Port> {
    let mut found = Vec::new();
    let short = |rest: &mut &[u8]| {
        let (head, tail) = rest[1..].split_at(rest[0].into());
        *rest = tail;
        head.to_vec()
    };
    while let [proto, high, low, tail @ ..] = rest {
        rest = tail;
        found.push(Port {
            proto: *proto,
            port: u16::from_be_bytes([*high, *low]),
            address: short(&mut rest),
            program: short(&mut rest),
        });
    }
    assert!(rest.is_empty());
    found
}

fn of(ports: &[Port], proto: u8, port: u16) -> Vec<Port> {
    let mine = |each: &&Port| (each.proto, each.port) == (proto, port);
    ports.iter().filter(mine).cloned().collect()
}

/// What the kernel calls this test, whose threads have other names.
fn own_name() -> Vec<u8> {
    let name = std::fs::read("/proc/self/comm").unwrap();
    name.trim_ascii_end().to_vec()
}

#[test]
fn what_listens_is_told_with_its_address_and_program_and_what_has_gone_is_not() {
    let _few = few_ports();
    let runner = Runner::new();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    let (tcp, port) = listener();
    let (six, kept) = listener_on("::1");
    let udp = UdpSocket::bind("127.0.0.9:0").unwrap();
    let udp_port = udp.local_addr().unwrap().port();
    for scope in [NETWORK, SEEN] {
        let (_, ports) = asked(&mut wire, 7, scope);
        let expected = |proto, port, address: &[u8]| {
            let (address, program) = (address.to_vec(), own_name());
            vec![Port {
                proto,
                port,
                address,
                program,
            }]
        };
        assert_eq!(of(&ports, TCP, port), expected(TCP, port, &[127, 0, 0, 1]));
        let loopback = std::net::Ipv6Addr::LOCALHOST.octets();
        assert_eq!(
            of(&ports, TCP, kept.port),
            expected(TCP, kept.port, &loopback)
        );
        assert_eq!(
            of(&ports, UDP, udp_port),
            expected(UDP, udp_port, &[127, 0, 0, 9])
        );
    }
    drop((tcp, six, udp));
    let (_, ports) = asked(&mut wire, 8, NETWORK);
    assert_eq!(of(&ports, TCP, port), []);
    assert_eq!(of(&ports, UDP, udp_port), []);
}

#[test]
fn of_own_processes_alone_are_told_those_with_the_mark_and_nobody_elses() {
    let _few = few_ports();
    let runner = Runner::new();
    let _client = in_its_own_session(&runner);
    let mut wire = runner.accept();
    let (_tcp, port) = listener();
    let others = asked(&mut wire, 1, b"\x02MARK=not-of-this-process").1;
    assert_eq!(others, []);
    let environment = std::fs::read("/proc/self/environ").unwrap();
    let mark = environment.split(|byte| *byte == 0).next().unwrap();
    assert!(!mark.is_empty(), "cargo gives its tests an environment");
    let marked = asked(&mut wire, 2, &[&[2], mark].concat()).1;
    assert_eq!(of(&marked, TCP, port).len(), 1);
    let part = asked(&mut wire, 3, &[&[2], &mark[..mark.len() - 1]].concat()).1;
    assert_eq!(of(&part, TCP, port), []);
}

#[test]
fn more_ports_than_a_thousand_are_cut_and_said_to_be() {
    let runner = Runner::new();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    sys::raise_file_limit().unwrap();
    let _many = FEW_PORTS.write().unwrap_or_else(PoisonError::into_inner);
    let all: Vec<_> = (0..LISTENERS).map(|_| listener()).collect();
    let (flags, ports) = asked(&mut wire, 1, NETWORK);
    assert_eq!((flags, ports.len()), (1, 1000));
    drop(all);
}

#[test]
fn a_question_that_makes_no_sense_is_ignored_and_streams_go_on_beside_a_look() {
    let _few = few_ports();
    let runner = Runner::new();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    let port = echo();
    wire.open(1, port, u64::MAX);
    for wrong in [&b""[..], &[0; 4], &[0, 0, 0, 1, 9], &[0, 0, 0, 1, 0, 1]] {
        wire.send(Header::new(kind::PORTS, TCP, 0), wrong);
    }
    wire.send(Header::new(kind::PORTS, TCP, 1), &[0; 5]);
    wire.data(1, b"hello");
    assert_eq!(wire.bytes(1, 5), b"hello");
    assert_eq!(of(&asked(&mut wire, 2, NETWORK).1, TCP, port).len(), 1);
}

#[test]
fn a_runner_of_version_1_is_told_nothing() {
    let runner = Runner::new();
    let _client = Client::start(&runner);
    let mut wire = runner.accept_v1();
    wire.send(Header::new(kind::PORTS, TCP, 0), &[0; 5]);
    let port = echo();
    wire.connect_v1(1, port);
    wire.expect(kind::CONNECTED, 1);
    wire.data(1, b"x");
    assert_eq!(wire.bytes(1, 1), b"x");
}

#[test]
fn a_look_leaves_neither_a_thread_nor_a_process_behind() {
    let runner = Runner::new();
    let client = Client::start(&runner);
    let mut wire = runner.accept();
    let tasks = format!("/proc/{}/task", client.child.id());
    let before = std::fs::read_dir(&tasks).unwrap().count();
    for number in 0..20 {
        asked(&mut wire, number, NETWORK);
    }
    until(|| {
        thread::yield_now();
        std::fs::read_dir(&tasks).unwrap().count() == before
    });
    let children = std::fs::read_to_string(format!("{tasks}/{}/children", client.child.id()));
    assert_eq!(children.unwrap_or_default(), "");
}

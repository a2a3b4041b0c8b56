//! The session against sockets whose other ends the test has.

use std::cell::RefCell;
use std::io::{Read, Write};
use std::net::SocketAddr;
use std::rc::Rc;

use super::*;
use crate::frame::mask;
use crate::net::{TcpSocket, UdpSocket};
use crate::protocol::Mark;
use crate::streams::Key;

/// A socket whose other end the test has: what can be read, what was written, how much is taken.
#[derive(Default)]
struct Far {
    readable: Vec<u8>,
    written: Vec<u8>,
    room: usize,
    connecting: bool,
    ended: bool,
    broken: Option<i32>,
    finished: bool,
    reset: bool,
    found: Option<Vec<u8>>,
    /// What listens where it is dialled, the last first; always the same if nothing is said.
    listening: Vec<io::Result<u64>>,
}

#[derive(Clone, Default)]
struct Socket(Rc<RefCell<Far>>);

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut end = self.0.borrow_mut();
        let length = end.readable.len().min(buffer.len());
        if let Some(errno) = end.broken {
            return Err(io::Error::from_raw_os_error(errno));
        }
        if length == 0 && !end.ended {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        buffer[..length].copy_from_slice(&end.readable[..length]);
        end.readable.drain(..length);
        Ok(length)
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut end = self.0.borrow_mut();
        if let Some(errno) = end.broken {
            return Err(io::Error::from_raw_os_error(errno));
        }
        let length = bytes.len().min(end.room);
        if length == 0 && !bytes.is_empty() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        end.room -= length;
        end.written.extend_from_slice(&bytes[..length]);
        Ok(length)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl TcpSocket for Socket {
    fn dialled(&mut self) -> io::Result<bool> {
        let end = self.0.borrow();
        match end.broken {
            Some(errno) => Err(io::Error::from_raw_os_error(errno)),
            None => Ok(!end.connecting),
        }
    }
    fn finish_writing(&mut self) -> io::Result<()> {
        self.0.borrow_mut().finished = true;
        Ok(())
    }
    fn reset_on_close(&mut self) {
        self.0.borrow_mut().reset = true;
    }
    fn attend(&mut self, _: bool) {}
}

impl UdpSocket for Socket {
    fn send(&mut self, datagram: &[u8]) -> io::Result<usize> {
        self.write(datagram)
    }
    fn receive(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.read(buffer)
    }
}

/// Every dial gives the same socket.
impl Network for Socket {
    type Tcp = Socket;
    type Udp = Socket;
    fn check(&self, _: bool, _: SocketAddr) -> io::Result<u64> {
        self.0.borrow_mut().listening.pop().unwrap_or(Ok(0))
    }
    fn dial(&self, _: SocketAddr, _: Key) -> io::Result<Socket> {
        Ok(self.clone())
    }
    fn open(&self, _: SocketAddr, _: Key) -> io::Result<Socket> {
        Ok(self.clone())
    }
    fn terminal(&self, _: &[u8], _: &Mark, _: Key) -> io::Result<Socket> {
        Ok(self.clone())
    }
    fn revoke(&self, _: &Mark) {}
    /// A look ends at once, and finds what was asked.
    fn look(&self, question: &[u8]) {
        self.0.borrow_mut().found = Some(question.to_vec());
    }
    fn looked(&self) -> Option<Vec<u8>> {
        self.0.borrow_mut().found.take()
    }

    fn listeners(&self, _: bool, _: u16) -> Vec<SocketAddr> {
        Vec::new()
    }
}

const READY: Ready = Ready {
    readable: true,
    writable: true,
    closed: false,
};

/// A session with one stream, the runner's end of its link, and the service's socket.
fn with_stream() -> (Session<Socket>, Socket, Socket) {
    let (session, runner, service) = opened(2, false);
    let granted = 262_144u64.to_be_bytes().to_vec();
    assert_eq!(messages(&runner), [(kind::CONNECTED, granted)]);
    (session, runner, service)
}

fn opened(version: u64, connecting: bool) -> (Session<Socket>, Socket, Socket) {
    let (runner, service) = (Socket::default(), Socket::default());
    runner.0.borrow_mut().room = 1 << 20;
    service.0.borrow_mut().connecting = connecting;
    let v2 = version == 2;
    let mut session = Session::new(service.clone(), &Settings::default());
    session.attach(Box::new(runner.clone()), v2);
    let connect = Header {
        port: 80,
        ..Header::new(kind::CONNECT, TCP, 7)
    };
    let limit = u64::MAX.to_be_bytes();
    session
        .process(&frame(connect, if v2 { &limit } else { &[] }))
        .unwrap();
    session.stream_ready(0, READY);
    session.turn(false).unwrap();
    (session, runner, service)
}

/// The other end's, or the service's, part in what the vectors call by these names.
fn happens(event: &str, session: &mut Session<Socket>, service: &Socket) {
    let from_user = |kind| frame(Header::new(kind, TCP, 7), &[]);
    match event {
        "established" => service.0.borrow_mut().connecting = false,
        "local_eof" => service.0.borrow_mut().ended = true,
        "local_error" => service.0.borrow_mut().broken = Some(libc::ECONNRESET),
        "remote_eof" => session.process(&from_user(kind::EOF)).unwrap(),
        "remote_close" => session.process(&from_user(kind::CLOSE)).unwrap(),
        "remote_error" => session.process(&from_user(kind::ERROR)).unwrap(),
        "linger_over" => session.set_now(Instant::now() + session.context.settings.linger * 2),
        "link_lost" => return session.unlink(),
        other => panic!("no such event: {other}"),
    }
    if event == "local_error" && session.streams.find(7).is_some() {
        // Once the service has sent its end-of-file nothing but a write shows it.
        let data = frame(Header::new(kind::DATA, TCP, 7), b"x");
        session.process(&data).unwrap();
    }
    session.stream_ready(0, READY);
    session.turn(false).unwrap();
}

fn in_state(version: u64, state: &str) -> (Session<Socket>, Socket, Socket) {
    let (mut session, runner, service) = opened(version, state.starts_with("opening"));
    match state {
        "opening" | "open" => {}
        "opening_remote_ended" | "remote_ended" => happens("remote_eof", &mut session, &service),
        "local_ended" => happens("local_eof", &mut session, &service),
        "delivering" => {
            session
                .process(&frame(Header::new(kind::DATA, TCP, 7), b"rest"))
                .unwrap();
            happens("remote_close", &mut session, &service);
        }
        other => panic!("no such state: {other}"),
    }
    service.0.borrow_mut().room = 100;
    messages(&runner);
    (session, runner, service)
}

fn vectors(name: &str) -> Vec<serde_json::Value> {
    let here = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/vectors");
    let folder = std::env::var("KOHAKURIVER_VECTORS").unwrap_or(here.into());
    let vectors = std::fs::read_to_string(format!("{folder}/{name}")).unwrap();
    serde_json::from_str(&vectors).unwrap()
}

#[test]
fn a_stream_goes_through_the_states_of_the_vectors() {
    let mut seen = 0;
    for row in &vectors("states.json") {
        let field = |name: &str| row[name].as_str().unwrap();
        // That a service's connection is gone shows as its end-of-file or as an error.
        if field("role") != "acceptor" || field("event") == "local_closed" {
            continue;
        }
        let (state, event) = (field("state"), field("event"));
        let version = row["version"].as_u64().unwrap();
        if state == "opening" && event == "local_eof" {
            continue; // nothing is read from a service before it is connected
        }
        let (mut session, runner, service) = in_state(version, state);
        happens(event, &mut session, &service);
        let actions: Vec<_> = row["actions"]
            .as_array()
            .unwrap()
            .iter()
            .map(|a| a.as_str().unwrap())
            .collect();
        let due: Vec<u8> = actions
            .iter()
            .filter_map(|action| sent_for(action))
            .collect();
        let sent: Vec<u8> = messages(&runner)
            .into_iter()
            .map(|(kind, _)| kind)
            .collect();
        assert_eq!(sent, due, "{row}");
        let alive = Rc::strong_count(&service.0) == 3;
        assert_eq!(
            session.streams.find(7).is_some(),
            !matches!(field("to"), "over" | "delivering"),
            "{row}"
        );
        let early = state.starts_with("opening");
        if field("to") == "over" || (field("to") == "delivering" && !early) {
            assert!(!alive, "{row}");
        }
        if !early && state != "delivering" {
            assert_eq!(
                service.0.borrow().reset,
                actions.contains(&"reset_local"),
                "{row}"
            );
        }
        if actions.contains(&"shut_local") && !early {
            assert!(service.0.borrow().finished, "{row}");
        }
        seen += 1;
    }
    assert!(seen > 40, "{seen}");
}

fn sent_for(action: &str) -> Option<u8> {
    match action {
        "send_connected" => Some(kind::CONNECTED),
        "send_eof" => Some(kind::EOF),
        "send_close" => Some(kind::CLOSE),
        "send_error" => Some(kind::ERROR),
        _ => None,
    }
}

fn frame(header: Header, payload: &[u8]) -> Vec<u8> {
    let start = [0x82, (HEADER + payload.len()) as u8];
    [&start[..], &header.pack(), payload].concat()
}

/// Type and payload of what the runner was sent since the last time.
fn messages(runner: &Socket) -> Vec<(u8, Vec<u8>)> {
    let messages = messages_with_ids(runner).into_iter();
    messages.map(|(kind, _, payload)| (kind, payload)).collect()
}

/// All frames here are short.
fn messages_with_ids(runner: &Socket) -> Vec<(u8, u32, Vec<u8>)> {
    let sent = std::mem::take(&mut runner.0.borrow_mut().written);
    let (mut rest, mut found) = (&sent[..], Vec::new());
    while let [0x82, length, a, b, c, d, body @ ..] = rest {
        let length = usize::from(length & 0x7f);
        let mut message = body[..length].to_vec();
        mask(&mut message, [*a, *b, *c, *d]);
        let id = u32::from_be_bytes(message[2..6].try_into().unwrap());
        found.push((message[0], id, message[HEADER..].to_vec()));
        rest = &body[length..];
    }
    assert!(rest.is_empty());
    found
}

/// RESUME of the stream that [`opened_to_stay`] opened.
fn resume(id: u32, epoch: u32, received: u64) -> Vec<u8> {
    let header = Header {
        port: 80,
        ..Header::new(kind::RESUME, TCP, id)
    };
    let numbers = protocol::pack([received, 1 << 30, protocol::UNKNOWN_TOTAL]);
    frame(
        header,
        &[&[5; 16], &epoch.to_be_bytes()[..], &numbers].concat(),
    )
}

/// A session with one stream that outlives its link, the runner's end of that, and the service's socket.
fn opened_to_stay(connecting: bool, settings: &Settings) -> (Session<Socket>, Socket, Socket) {
    let (runner, service) = (Socket::default(), Socket::default());
    runner.0.borrow_mut().room = 1 << 20;
    service.0.borrow_mut().connecting = connecting;
    let mut session = Session::new(service.clone(), settings);
    session.attach(Box::new(runner.clone()), true);
    let connect = Header {
        port: 80,
        ..Header::new(kind::CONNECT, TCP, 7)
    };
    let opening = [&protocol::pack([1 << 30])[..], &[5; 16], &[0, 0, 0, 60, 0]].concat();
    session.process(&frame(connect, &opening)).unwrap();
    session.stream_ready(0, READY);
    session.turn(false).unwrap();
    (session, runner, service)
}

/// The session's next link.
fn relinked(session: &mut Session<Socket>) -> Socket {
    session.unlink();
    let runner = Socket::default();
    runner.0.borrow_mut().room = 1 << 20;
    session.attach(Box::new(runner.clone()), true);
    runner
}

/// What the runner is told when its end takes all that there is.
fn told(session: &mut Session<Socket>, runner: &Socket) -> Vec<(u8, Vec<u8>)> {
    for _ in 0..8 {
        session.link_ready(READY);
        session.turn(false).unwrap();
    }
    messages(runner)
}

fn kinds(runner: &Socket) -> Vec<u8> {
    messages(runner).into_iter().map(|(kind, _)| kind).collect()
}

#[test]
fn a_resume_is_answered_while_the_service_is_dialled_and_connected_comes_under_the_new_id() {
    let (mut session, _, service) = opened_to_stay(true, &Settings::default());
    let runner = relinked(&mut session);
    session.process(&resume(9, 1, 0)).unwrap();
    session.turn(false).unwrap();
    assert_eq!(kinds(&runner), [kind::RESUMED]);
    service.0.borrow_mut().connecting = false;
    session.stream_ready(0, READY);
    session.turn(false).unwrap();
    assert_eq!(kinds(&runner), [kind::CONNECTED]);
    assert_eq!(
        (session.streams.find(7), session.streams.find(9).is_some()),
        (None, true)
    );
}

#[test]
fn a_dial_that_failed_without_a_link_answers_the_resume() {
    let (mut session, _, service) = opened_to_stay(true, &Settings::default());
    session.unlink();
    service.0.borrow_mut().broken = Some(libc::EACCES);
    session.stream_ready(0, READY);
    session.turn(false).unwrap();
    let runner = relinked(&mut session);
    session.process(&resume(9, 1, 0)).unwrap();
    let told = told(&mut session, &runner);
    assert_eq!(told[0].0, kind::ERROR);
    assert!(String::from_utf8_lossy(&told[0].1).starts_with("EIO: port 80"));
}

#[test]
fn without_a_link_a_service_is_written_but_not_read() {
    let (mut session, _, service) = opened_to_stay(false, &Settings::default());
    session
        .process(&frame(Header::new(kind::DATA, TCP, 7), b"for the service"))
        .unwrap();
    session.unlink();
    service.0.borrow_mut().room = 100;
    service.0.borrow_mut().readable = b"for the user".to_vec();
    session.stream_ready(0, READY);
    session.turn(false).unwrap();
    assert_eq!(service.0.borrow().written, b"for the service");
    assert_eq!(service.0.borrow().readable, b"for the user");
    let runner = relinked(&mut session);
    session.process(&resume(9, 1, 0)).unwrap();
    let told = told(&mut session, &runner);
    assert_eq!(told[0].0, kind::RESUMED);
    assert_eq!(told[0].1[..8], 15u64.to_be_bytes());
    assert_eq!(told[1], (kind::DATA, b"for the user".to_vec()));
}

#[test]
fn bytes_whose_link_was_lost_come_again_from_where_they_had_arrived() {
    let (mut session, runner, service) = opened_to_stay(false, &Settings::default());
    let mut sent = Vec::new();
    for piece in [b"first", b"secon", b"third"] {
        service.0.borrow_mut().readable = piece.to_vec();
        session.stream_ready(0, READY);
        sent.extend(told(&mut session, &runner));
    }
    assert_eq!(sent.last(), Some(&(kind::DATA, b"third".to_vec())));
    let ack = Header::new(kind::ACK, TCP, 7);
    session.process(&frame(ack, &protocol::pack([3]))).unwrap();
    for (epoch, received, rest) in [(1, 3, "stseconthird"), (2, 8, "onthird"), (3, 15, "")] {
        let runner = relinked(&mut session);
        session.process(&resume(9, epoch, received)).unwrap();
        let told = told(&mut session, &runner);
        let data = told.iter().filter(|(kind, _)| *kind == kind::DATA);
        let data: Vec<u8> = data.flat_map(|(_, payload)| payload.clone()).collect();
        assert_eq!(data, rest.as_bytes(), "from {received}");
    }
    let runner = relinked(&mut session);
    session.process(&resume(9, 4, 8)).unwrap();
    let told = told(&mut session, &runner);
    assert!(
        told[0].1.starts_with(b"EPROTO: "),
        "what was acknowledged is no longer there"
    );
}

#[test]
fn a_stream_is_held_for_its_time_and_each_link_begins_it_anew() {
    let (mut session, _, service) = opened_to_stay(false, &Settings::default());
    let start = Instant::now();
    for (epoch, after) in [(1, 50), (2, 100), (3, 150)] {
        session.unlink();
        session.set_now(start + Duration::from_secs(after));
        session.turn(true).unwrap();
        let runner = relinked(&mut session);
        session.process(&resume(9, epoch, 0)).unwrap();
        session.turn(false).unwrap();
        assert_eq!(kinds(&runner), [kind::RESUMED], "after {after} s");
    }
    session.unlink();
    session.set_now(start + Duration::from_secs(215));
    session.turn(true).unwrap();
    assert!(service.0.borrow().reset);
}

#[test]
fn what_detached_streams_hold_is_bounded_in_bytes() {
    let settings = Settings {
        detached_bytes: 4096,
        ..Settings::default()
    };
    let (mut session, _, service) = opened_to_stay(false, &settings);
    let data = frame(Header::new(kind::DATA, TCP, 7), &[1; 100]);
    for _ in 0..41 {
        session.process(&data).unwrap();
    }
    let runner = relinked(&mut session);
    assert!(service.0.borrow().reset);
    session.process(&resume(9, 1, 0)).unwrap();
    let told = told(&mut session, &runner);
    assert!(told[0].1.starts_with(b"ENOBUFS: "));
}

#[test]
fn what_a_service_does_not_take_waits_and_its_end_of_file_behind_it() {
    let (mut session, _, service) = with_stream();
    service.0.borrow_mut().room = 3;
    session
        .process(&frame(Header::new(kind::DATA, TCP, 7), b"abcdef"))
        .unwrap();
    session
        .process(&frame(Header::new(kind::EOF, TCP, 7), &[]))
        .unwrap();
    assert_eq!(service.0.borrow().written, b"abc");
    assert!(!service.0.borrow().finished);
    service.0.borrow_mut().room = 10;
    session.stream_ready(0, READY);
    assert_eq!(service.0.borrow().written, b"abcdef");
    assert!(service.0.borrow().finished);
}

#[test]
fn a_socket_that_was_full_is_tried_again_though_no_event_says_so() {
    let (mut session, _, service) = with_stream();
    session
        .process(&frame(Header::new(kind::DATA, TCP, 7), b"late"))
        .unwrap();
    service.0.borrow_mut().room = 10;
    session.set_now(Instant::now() + RETRY_EVERY);
    session.turn(true).unwrap();
    assert_eq!(service.0.borrow().written, b"late");
}

#[test]
fn a_source_waits_while_the_link_takes_nothing() {
    let (mut session, runner, service) = with_stream();
    runner.0.borrow_mut().room = 0;
    service.0.borrow_mut().readable = b"first".to_vec();
    session.stream_ready(0, READY);
    session.turn(false).unwrap();
    service.0.borrow_mut().readable = b"second".to_vec();
    session.stream_ready(0, READY);
    session.turn(false).unwrap();
    assert_eq!(service.0.borrow().readable, b"second");
    runner.0.borrow_mut().room = 100;
    session.link_ready(READY);
    session.turn(false).unwrap();
    session.turn(false).unwrap();
    let data = |bytes: &[u8]| (kind::DATA, bytes.to_vec());
    assert_eq!(messages(&runner), [data(b"first"), data(b"second")]);
}

#[test]
fn an_error_resets_the_service_and_frees_the_id() {
    let (mut session, runner, service) = with_stream();
    session
        .process(&frame(
            Header::new(kind::ERROR, TCP, 7),
            b"ECONNRESET: gone",
        ))
        .unwrap();
    assert!(service.0.borrow().reset);
    session
        .process(&frame(Header::new(kind::PING, TCP, 7), b"there?"))
        .unwrap();
    session.turn(false).unwrap();
    assert_eq!(messages(&runner), [(kind::PONG, b"there?".to_vec())]);
    assert_eq!(session.streams.find(7), None);
}

/// What one event of a trace does.
fn trace_event(
    event: &serde_json::Value,
    session: &mut Session<Socket>,
    runner: &mut Socket,
    service: &Socket,
) {
    let number = |name: &str| event[name].as_u64().unwrap();
    match event["do"].as_str().unwrap() {
        "link" => *runner = relinked(session),
        "lost" => session.unlink(),
        "say" => {
            let header = Header {
                port: number("port") as u16,
                ..Header::new(
                    number("type") as u8,
                    number("proto") as u8,
                    number("id") as u32,
                )
            };
            session
                .process(&frame(header, &hex(&event["payload"])))
                .unwrap();
        }
        "dialled" => service.0.borrow_mut().connecting = false,
        "refuses" => service.0.borrow_mut().broken = Some(libc::ECONNREFUSED),
        "service_says" => service.0.borrow_mut().readable.extend(hex(&event["bytes"])),
        "service_ends" => service.0.borrow_mut().ended = true,
        other => panic!("no such event: {other}"),
    }
    for _ in 0..4 {
        session.stream_ready(0, READY);
        session.link_ready(READY);
        session.turn(false).unwrap();
    }
    if let Some(until) = session.context.late_until() {
        session.set_now(until);
        session.turn(false).unwrap();
    }
}

fn hex(value: &serde_json::Value) -> Vec<u8> {
    let digits = value.as_str().unwrap();
    (0..digits.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap())
        .collect()
}

/// What the runner was told, as traces have it: bytes of one stream together, errors by their codes, nothing whose time
/// is an end's own business.
fn answers(runner: &Socket) -> Vec<serde_json::Value> {
    let mut told: Vec<(u8, u32, Vec<u8>)> = Vec::new();
    for (kind, id, payload) in messages_with_ids(runner) {
        match told.last_mut() {
            _ if [kind::WINDOW, kind::ACK, kind::PING].contains(&kind) => {}
            Some((kind::DATA, of, before)) if (kind, *of) == (kind::DATA, id) => {
                before.extend(payload)
            }
            _ => told.push((kind, id, payload)),
        }
    }
    told.into_iter()
        .map(|(kind, id, payload)| {
            if kind == kind::ERROR {
                let code = String::from_utf8(payload).unwrap();
                let code = code.split(':').next();
                return serde_json::json!({"type": kind, "id": id, "error": code});
            }
            let payload: String = payload.iter().map(|byte| format!("{byte:02x}")).collect();
            serde_json::json!({"type": kind, "id": id, "payload": payload})
        })
        .collect()
}

#[test]
fn a_trace_is_answered_as_the_vectors_say() {
    for trace in vectors("traces.json") {
        let (mut runner, service) = (Socket::default(), Socket::default());
        *service.0.borrow_mut() = Far {
            room: 1 << 20,
            connecting: true,
            ..Far::default()
        };
        let mut session = Session::new(service.clone(), &Settings::default());
        for event in trace["events"].as_array().unwrap() {
            trace_event(event, &mut session, &mut runner, &service);
            let at = format!("{}: {event}", trace["name"]);
            assert_eq!(
                answers(&runner),
                *event["answers"].as_array().unwrap(),
                "{at}"
            );
            let service = service.0.borrow();
            assert_eq!(service.written, hex(&event["service"]), "{at}");
            assert_eq!(service.reset, event["reset"].as_bool().unwrap(), "{at}");
        }
    }
}

#[test]
fn which_ports_listen_is_told_to_a_runner_of_version_2_that_asks_for_the_session() {
    for (version, id, answers) in [(2, 0, true), (2, 7, false), (1, 0, false)] {
        let (mut session, runner, _) = opened(version, false);
        messages(&runner);
        session
            .process(&frame(Header::new(kind::PORTS, TCP, id), b"which?"))
            .unwrap();
        session.looked();
        session.turn(false).unwrap();
        let expected = if answers {
            vec![(kind::PORTS, b"which?".to_vec())]
        } else {
            vec![]
        };
        assert_eq!(messages(&runner), expected, "v{version}, id {id}");
    }
}

#[test]
fn what_a_look_found_for_a_link_that_has_gone_is_not_told_to_a_runner_of_version_1() {
    let (mut session, runner, _) = opened(2, false);
    messages(&runner);
    let question = frame(Header::new(kind::PORTS, TCP, 0), b"which?");
    session.process(&question).unwrap();
    session.unlink();
    let next = Socket::default();
    next.0.borrow_mut().room = 1 << 20;
    session.attach(Box::new(next.clone()), false);
    session.looked();
    session.turn(false).unwrap();
    assert_eq!(messages(&next), []);
}

/// A stream whose both directions have ended, and whose user is known to have everything.
fn ended_at_both_sides() -> (Session<Socket>, Socket) {
    let (mut session, runner, service) = opened_to_stay(false, &Settings::default());
    let message = |kind, numbers: &[u8]| frame(Header::new(kind, TCP, 7), numbers);
    session
        .process(&message(kind::EOF, &protocol::pack([0, 0])))
        .unwrap();
    service.0.borrow_mut().ended = true;
    session.stream_ready(0, READY);
    assert_eq!(told(&mut session, &runner).pop().unwrap().0, kind::EOF);
    session
        .process(&message(kind::ACK, &protocol::pack([1])))
        .unwrap();
    session.turn(false).unwrap();
    assert!(kinds(&runner).is_empty());
    (session, runner)
}

#[test]
fn a_close_that_nobody_waits_for_goes_with_what_is_sent_next() {
    let (mut session, runner) = ended_at_both_sides();
    session
        .process(&frame(Header::new(kind::PING, TCP, 0), b"?"))
        .unwrap();
    session.turn(false).unwrap();
    assert_eq!(kinds(&runner), [kind::CLOSE, kind::PONG]);
    assert!(session.wait_until().unwrap() > session.context.now + Duration::from_millis(500));
}

#[test]
fn a_close_that_nobody_waits_for_goes_soon_by_itself() {
    let (mut session, runner) = ended_at_both_sides();
    let until = session.wait_until().unwrap();
    assert!(until <= session.context.now + Duration::from_millis(50));
    session.set_now(until);
    session.turn(true).unwrap();
    assert_eq!(kinds(&runner), [kind::CLOSE]);
}

#[test]
fn a_close_that_waits_goes_with_its_link() {
    let (mut session, _) = ended_at_both_sides();
    let runner = relinked(&mut session);
    session.set_now(session.context.now + Duration::from_secs(1));
    session.turn(true).unwrap();
    assert!(kinds(&runner).is_empty());
}

#[test]
fn a_connection_that_another_listener_took_than_the_one_that_was_dialled_is_given_up() {
    let (mut session, runner, service) = opened(2, true);
    service.0.borrow_mut().listening = vec![Ok(8)];
    service.0.borrow_mut().connecting = false;
    session.stream_ready(0, READY);
    session.turn(false).unwrap();
    let told = messages(&runner);
    assert_eq!(told[0].0, kind::ERROR);
    assert!(told[0].1.starts_with(b"ECONNRESET: "));
}

#[test]
fn datagrams_go_no_further_when_another_listener_has_come_in_place_of_theirs() {
    let (runner, service) = (Socket::default(), Socket::default());
    runner.0.borrow_mut().room = 1 << 20;
    service.0.borrow_mut().room = 100;
    let gone = io::Error::from_raw_os_error(libc::ECONNREFUSED);
    // What is found the last first: when the stream is opened, a while later, and where else it may listen.
    service.0.borrow_mut().listening = vec![Err(gone), Ok(8), Ok(9)];
    let mut session = Session::new(service.clone(), &Settings::default());
    session.attach(Box::new(runner.clone()), true);
    let datagram = |text| frame(Header::new(kind::DATA, UDP, 5), text);
    let connect = Header {
        port: 53,
        ..Header::new(kind::CONNECT, UDP, 5)
    };
    session.process(&frame(connect, &[])).unwrap();
    session.process(&datagram(b"mine")).unwrap();
    assert_eq!(service.0.borrow().written, b"mine");
    session.set_now(Instant::now() + Duration::from_secs(2));
    session.process(&datagram(b"also")).unwrap();
    session.turn(false).unwrap();
    assert_eq!(service.0.borrow().written, b"mine");
    let told = messages(&runner);
    let error = told.iter().find(|(kind, _)| *kind == kind::ERROR).unwrap();
    assert!(error.1.starts_with(b"ECONNREFUSED: "));
}

//! The link itself: handshake, violations, reconnecting, keeping up under a blocked runner.

mod support;

use std::io::{ErrorKind, Read, Write};
use std::process::Command;

use kohakuriver_tunnel::protocol::{Header, TCP, kind};
use support::*;

const WIDE: u64 = u64::MAX;

#[test]
fn the_handshake_offers_version_2_and_presents_the_token() {
    let runner = Runner::new();
    let folder = tempdir("token");
    let file = folder.join("token");
    std::fs::write(&file, "s3cret\n").unwrap();
    let _client = Client::with(&runner, &["--token-file".as_ref(), file.as_os_str()]);
    let wire = runner.accept();
    assert_eq!(wire.head[0], "GET /ws/tunnel/vm-1 HTTP/1.1");
    assert_eq!(wire.header("Authorization"), Some("Bearer s3cret"));
    assert_eq!(
        wire.header("Sec-WebSocket-Protocol"),
        Some("kohakuriver.tunnel.v2")
    );
    assert_eq!(wire.header("Sec-WebSocket-Extensions"), None);
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn without_a_token_none_is_presented() {
    let runner = Runner::new();
    let _client = Client::start(&runner);
    assert_eq!(runner.accept().header("Authorization"), None);
}

#[test]
fn refused_credentials_are_said_in_one_line_and_attempts_go_on() {
    for status in [401, 403] {
        let runner = Runner::new();
        let mut client = Client::start(&runner);
        runner
            .accept_request()
            .write(format!("HTTP/1.1 {status} No\r\n\r\n").as_bytes());
        let line = client.line_with("warn");
        assert!(
            line.contains("refused this token") && line.contains(&status.to_string()),
            "{line}"
        );
        assert!(client.child.try_wait().unwrap().is_none());
    }
}

#[test]
fn garbage_closes_with_its_code_and_the_tunnel_comes_back() {
    let runner = Runner::new();
    let _client = Client::start(&runner);
    let cases: [(&[u8], u16); 6] = [
        (b"\x82\x88maskmessage.", 1002),
        (b"\x82\x07\x03\0\0\0\0\x01\0", 1002),
        (b"\x81\x02hi", 1003),
        (b"\xc2\x08\x06\0\0\0\0\0\0\0", 1002),
        (b"\x82\x7f\xff\xff\xff\xff\xff\xff\xff\xff", 1002),
        (b"\x82\x7f\0\0\0\0\x01\0\0\x01", 1009),
    ];
    for (bytes, code) in cases {
        let mut wire = runner.accept();
        wire.write(bytes);
        assert_eq!(wire.close_code(), code, "{bytes:?}");
    }
    runner.accept();
}

#[test]
fn a_window_for_the_session_itself_closes_with_1002() {
    let runner = Runner::new();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    wire.window(0, 1);
    assert_eq!(wire.close_code(), 1002);
}

#[test]
fn when_the_link_goes_every_service_sees_a_reset_and_a_new_link_works() {
    let runner = Runner::new();
    let (listener, port) = listener();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    wire.open(1, port, WIDE);
    let mut sock = take(&listener);
    drop(wire);
    assert_eq!(
        sock.read(&mut [0; 1]).unwrap_err().kind(),
        ErrorKind::ConnectionReset
    );
    let mut wire = runner.accept();
    wire.open(1, port, WIDE);
    let mut sock = take(&listener);
    sock.write_all(b"anew").unwrap();
    assert_eq!(wire.bytes(1, 4), b"anew");
}

#[test]
fn a_runner_that_comes_back_is_found_again() {
    let runner = Runner::new();
    let client = Client::with(&runner, &["--reconnect-delay", "0.05"]);
    drop(runner.accept_request());
    client.line_with("no tunnel");
    drop(runner.accept_request());
    client.line_with("no tunnel");
    runner.accept();
    client.line_with("is up");
}

#[test]
fn it_gives_up_after_as_many_failures_as_it_was_told() {
    let closed = closed_port();
    let url = format!("http://127.0.0.1:{}", closed.port);
    let mut command = client_command(&url);
    command.args(["--max-reconnect", "3", "--reconnect-delay", "0.01"]);
    let mut client = Client::spawn(command);
    assert_eq!(client.wait().code(), Some(1));
    for _ in 0..3 {
        client.line_with("no tunnel");
    }
    client.line_with("no attempts are left");
}

#[test]
fn a_tunnel_client_that_is_replaced_leaves() {
    let runner = Runner::new();
    let mut client = Client::start(&runner);
    let mut wire = runner.accept();
    wire.write(&frame(8, &4000u16.to_be_bytes()));
    assert_eq!(wire.close_code(), 4000);
    assert_eq!(client.wait().code(), Some(0));
}

#[test]
fn a_signal_ends_the_tunnel_with_a_goodbye() {
    let runner = Runner::new();
    let mut client = Client::start(&runner);
    let mut wire = runner.accept();
    client.line_with("is up");
    client.signal(libc::SIGTERM);
    assert_eq!(wire.close_code(), 1001);
    assert_eq!(client.wait().code(), Some(0));
}

#[test]
fn pings_are_answered_while_the_runner_reads_nothing() {
    let runner = Runner::new();
    let (listener, port) = listener();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    wire.open(1, port, WIDE);
    let mut sock = take(&listener);
    // More than all kernel buffers on the way hold: the link is blocked in the middle of a frame.
    let flood = std::thread::spawn(move || {
        let _ = sock.write_all(&pattern(64 << 20));
    });
    let echo = echo();
    wire.connect(2, echo, WIDE);
    wire.data(2, b"small");
    wire.write(&frame(9, b"alive?"));
    let (mut pong, mut small, mut bulk) = (false, false, 0);
    while bulk < 64 << 20 {
        match wire.frame().unwrap() {
            (10, payload) => pong = payload == b"alive?",
            (2, payload) if payload[0] == kind::DATA && payload[5] == 1 => {
                assert_eq!(payload[8..], pattern_at(bulk, payload.len() - 8));
                bulk += payload.len() - 8;
                assert!(
                    bulk < 32 << 20 || (pong && small),
                    "small messages overtake bulk"
                );
            }
            (2, payload) if payload[0] == kind::DATA => small = payload[8..] == *b"small",
            _ => {}
        }
    }
    flood.join().unwrap();
}

#[test]
fn too_many_open_files_refuse_a_stream_and_harm_no_other() {
    let runner = Runner::new();
    let mut command = Command::new("sh");
    command
        .env_clear()
        .args(["-c", "ulimit -n 40; exec \"$@\"", "sh"]);
    let inner = client_command(&runner.url());
    command.arg(inner.get_program()).args(inner.get_args());
    let client = Client::spawn(command);
    let mut wire = runner.accept();
    let port = echo();
    let (mut open, mut refused) = (Vec::new(), 0);
    for id in 1..=50 {
        wire.connect(id, port, WIDE);
        let message = wire.message();
        match message.kind {
            kind::CONNECTED => open.push(id),
            _ => {
                assert!(message.text().starts_with("EMFILE: "), "{}", message.text());
                refused += 1;
            }
        }
    }
    assert!(refused > 0 && open.len() > 10);
    wire.data(open[0], b"unharmed");
    assert_eq!(wire.bytes(open[0], 8), b"unharmed");
    wire.send(Header::new(kind::CLOSE, TCP, open[0]), &[]);
    wire.open(99, port, WIDE);
    client.line_with("raise the limit of open files");
    let again = client
        .errors
        .try_iter()
        .filter(|line| line.contains("raise the limit"))
        .count();
    assert_eq!(again, 0, "said once");
}

/// Numbers that look random and are the same each time.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }
}

#[test]
fn no_order_of_messages_harms_the_tunnel_client() {
    let runner = Runner::new();
    let closed = closed_port();
    let ports = [echo(), closed.port, 0];
    let client = Client::start(&runner);
    for seed in 0..20 {
        let mut dice = Dice(seed);
        let wire = runner.accept();
        let mut sock = wire.socket().try_clone().unwrap();
        let reading = std::thread::spawn(move || {
            let mut wire = wire;
            while wire.frame().is_some() {}
        });
        for _ in 0..2000 {
            // WINDOW for stream 0 is a violation, which other tests see to.
            let header = Header {
                kind: 1 + dice.roll(10) as u8,
                proto: dice.roll(8).saturating_sub(5) as u8,
                id: 1 + dice.roll(6) as u32,
                port: ports[dice.roll(3) as usize],
            };
            let limit = [0, 1, 70_000, WIDE][dice.roll(4) as usize];
            let payload = match header.kind {
                kind::CONNECT if dice.roll(2) == 0 => vec![],
                kind::DATA => pattern(dice.roll(3000) as usize),
                _ => limit.to_be_bytes().to_vec(),
            };
            if sock.write_all(&message(header, &payload)).is_err() {
                break;
            }
        }
        let _ = sock.shutdown(std::net::Shutdown::Both);
        reading.join().unwrap();
    }
    let mut wire = runner.accept();
    wire.open(1, ports[0], WIDE);
    wire.data(1, b"well");
    assert_eq!(wire.bytes(1, 4), b"well");
    let said: Vec<_> = client.errors.try_iter().collect();
    assert!(
        !said.iter().any(|line| line.contains("panicked")),
        "{said:?}"
    );
}

#[test]
fn a_token_is_taken_before_the_command_starts_and_renewed_when_the_runner_says_so() {
    let runner = Runner::new();
    let folder = tempdir("taken");
    let file = folder.join("token");
    std::fs::write(&file, "first").unwrap();
    let looked = folder.join("looked");
    let script = format!(
        "test ! -e {} && : > {} && exec sleep 1000",
        file.display(),
        looked.display()
    );
    let mut client = Client::with(
        &runner,
        &[
            "--take-token".as_ref(),
            file.as_os_str(),
            "run".as_ref(),
            "--".as_ref(),
            "sh".as_ref(),
            "-c".as_ref(),
            script.as_ref(),
        ],
    );
    let mut wire = runner.accept();
    let id = wire.header("KohakuRiver-Client").unwrap().to_owned();
    assert_eq!(wire.header("Authorization"), Some("Bearer first"));
    until(|| looked.exists());
    std::fs::write(&file, "second").unwrap();
    wire.send(Header::new(kind::PING, TCP, 0), b"tok1");
    wire.expect(kind::PONG, 0);
    assert!(!file.exists());
    drop(wire);
    let wire = runner.accept();
    assert_eq!(wire.header("Authorization"), Some("Bearer second"));
    assert_eq!(wire.header("KohakuRiver-Client"), Some(id.as_str()));
    assert!(client.child.try_wait().unwrap().is_none());
    std::fs::remove_dir_all(folder).unwrap();
}

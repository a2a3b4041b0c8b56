//! Random and mutated bytes for every parser that a client, or whoever poses as one, can reach: nothing panics, memory is
//! bounded, and nobody gets in.

mod common;

use std::fs;
use std::sync::{Arc, LazyLock};

use common::client::{Client, STRICT, message};
use common::{Directory, Server};
use kohakuriver_sshd::algorithms::ALL;
use kohakuriver_sshd::auth::{Answer, Attempts};
use kohakuriver_sshd::keys::{HostKey, HostKeys, is_authorized, verify};
use kohakuriver_sshd::transport::Transport;
use kohakuriver_sshd::wire::{Put, Reader};
use proptest::collection::vec;
use proptest::prelude::*;

/// Far more than a connection needs, far less than what its messages can claim.
const MOST_MEMORY: usize = 4 << 20;

static KEY: LazyLock<Arc<HostKeys>> = LazyLock::new(|| {
    let directory = Directory::new();
    Arc::new(HostKeys::load_or_make(&[directory.file("key")]).unwrap())
});

/// Changes to a sequence of bytes: flipped, inserted, removed, doubled.
#[derive(Debug, Clone)]
enum Change {
    Set(usize, u8),
    Insert(usize, Vec<u8>),
    Cut(usize, usize),
    Number(usize, u32),
}

fn changes(most: usize) -> impl Strategy<Value = Vec<Change>> {
    let place = 0..4096usize;
    let number = prop_oneof![
        Just(0),
        Just(1),
        Just(u32::MAX),
        Just(1 << 31),
        any::<u32>()
    ];
    vec(
        prop_oneof![
            (place.clone(), any::<u8>()).prop_map(|(at, byte)| Change::Set(at, byte)),
            (place.clone(), vec(any::<u8>(), 1..9)).prop_map(|(at, more)| Change::Insert(at, more)),
            (place.clone(), 1..64usize).prop_map(|(at, count)| Change::Cut(at, count)),
            (place, number).prop_map(|(at, number)| Change::Number(at, number)),
        ],
        0..most,
    )
}

fn changed(bytes: &[u8], changes: &[Change]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    for change in changes {
        let length = bytes.len();
        if length == 0 {
            break;
        }
        match change {
            Change::Set(at, byte) => bytes[at % length] = *byte,
            Change::Insert(at, more) => drop(bytes.splice(at % length..at % length, more.clone())),
            Change::Cut(at, count) => {
                let start = at % length;
                bytes.drain(start..(start + count).min(length));
            }
            Change::Number(at, number) => {
                let start = at % length;
                let end = (start + 4).min(length);
                bytes[start..end].copy_from_slice(&number.to_be_bytes()[..end - start]);
            }
        }
    }
    bytes
}

/// Gives a transport all of the bytes, in pieces; stops where it ends the connection.
fn give(transport: &mut Transport, mut bytes: &[u8], piece: usize) {
    while !bytes.is_empty() {
        let space = transport.space();
        assert!(space.len() <= MOST_MEMORY);
        let count = piece.min(space.len()).min(bytes.len());
        space[..count].copy_from_slice(&bytes[..count]);
        transport.advance(count);
        bytes = &bytes[count..];
        loop {
            match transport.next_message() {
                Ok(Some(range)) => assert!(!transport.payload(range).is_empty()),
                Ok(None) => break,
                Err(_) => return,
            }
        }
        assert!(transport.output().len() <= MOST_MEMORY);
    }
}

fn clear_packet(payload: &[u8]) -> Vec<u8> {
    let padding = 8 - (5 + payload.len()) % 8 + 8;
    let mut packet = Vec::new();
    packet.put_u32((1 + payload.len() + padding) as u32);
    packet.put_u8(padding as u8);
    packet.put_raw(payload);
    packet.resize(packet.len() + padding, 0);
    packet
}

/// What an honest client says first.
fn beginning() -> Vec<u8> {
    let mut share = message(30);
    share.put_string(&[9; 32]);
    [
        b"SSH-2.0-fuzz\r\n".to_vec(),
        clear_packet(&Client::kexinit(STRICT, true)),
        clear_packet(&share),
        clear_packet(&[21]),
        vec![0x5a; 64],
    ]
    .concat()
}

/// One message of every kind that a client sends after its login, and the numbers of its channel.
fn conversation() -> Vec<Vec<u8>> {
    let text = |number: u8, strings: &[&[u8]]| {
        let mut made = message(number);
        for string in strings {
            made.put_string(string);
        }
        made
    };
    let request = |name: &str, details: &[u8]| {
        let mut made = message(98);
        made.put_u32(0);
        made.put_string(name.as_bytes());
        made.put_bool(true);
        made.put_raw(details);
        made
    };
    let string = |bytes: &[u8]| {
        let mut made = Vec::new();
        made.put_string(bytes);
        made
    };
    let mut open = text(90, &[b"session"]);
    let mut forward = text(90, &[b"direct-tcpip"]);
    for made in [&mut open, &mut forward] {
        for value in [0, 1 << 20, 1 << 15] {
            made.put_u32(value);
        }
    }
    forward.put_string(b"127.0.0.1");
    forward.put_u32(9);
    forward.put_string(b"127.0.0.1");
    forward.put_u32(9);
    let mut terminal = string(b"xterm");
    for value in [80, 24, 0, 0] {
        terminal.put_u32(value);
    }
    terminal.put_string(&[1, 0, 0, 0, 3, 53, 0, 0, 0, 0, 0]);
    let mut listen = text(80, &[b"tcpip-forward"]);
    listen.put_bool(true);
    listen.put_string(b"127.0.0.1");
    listen.put_u32(0);
    let mut data = message(94);
    data.put_u32(0);
    data.put_string(b"some bytes");
    let mut widen = message(93);
    widen.put_u32(0);
    widen.put_u32(1000);
    vec![
        open,
        request("pty-req", &terminal),
        request("env", &[string(b"LANG"), string(b"C")].concat()),
        request("auth-agent-req@openssh.com", &[]),
        request("exec", &string(b"nothing")),
        request("window-change", &[0; 16]),
        request("signal", &string(b"WINCH")),
        data,
        widen,
        forward,
        listen,
        text(80, &[b"keepalive@openssh.com", b""]),
        vec![96, 0, 0, 0, 0],
        vec![97, 0, 0, 0, 0],
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_before_the_keys_are_survived(bytes in vec(any::<u8>(), 0..2000), piece in 1..500usize) {
        let mut transport = Transport::new(KEY.clone(), &ALL, 1 << 30);
        give(&mut transport, &bytes, piece);
        let mut greeted = Transport::new(KEY.clone(), &ALL, 1 << 30);
        give(&mut greeted, &[b"SSH-2.0-x\r\n", &bytes[..]].concat(), piece);
    }

    #[test]
    fn a_damaged_exchange_of_keys_is_survived(damage in changes(6), piece in 1..500usize) {
        let mut transport = Transport::new(KEY.clone(), &ALL, 1 << 30);
        give(&mut transport, &changed(&beginning(), &damage), piece);
    }

    #[test]
    fn a_request_to_log_in_that_was_changed_lets_nobody_in(damage in changes(5)) {
        let session = [3; 32];
        let mut request = Client::request("root", "ssh-ed25519", KEY.first().public(), true);
        let mut covered = Vec::new();
        covered.put_string(&session);
        covered.put_raw(&request);
        request.put_string(&KEY.first().sign(&covered));
        let asked = |user: &[u8], blob: &[u8]| user == b"root" && blob == KEY.first().public();
        let whole = Attempts::default().judge(&request, &session, asked);
        prop_assert_eq!(whole, Ok(Answer::Success("root".into())));
        let damaged = changed(&request, &damage);
        let answer = Attempts::default().judge(&damaged, &session, asked);
        // The first byte is the message's number, which the caller has looked at.
        prop_assert!(damaged[..] == request[..] || damaged.get(1..) == request.get(1..)
            || !matches!(answer, Ok(Answer::Success(_))), "{:?}", answer);
        let other = Attempts::default().judge(&request, &[4; 32], asked);
        prop_assert_eq!(other, Ok(Answer::Failure));
    }

    #[test]
    fn keys_files_and_signatures_of_any_content_are_survived(
        file in "\\PC{0,200}",
        algorithm in prop_oneof![
            Just("ssh-ed25519"), Just("rsa-sha2-256"), Just("ecdsa-sha2-nistp256"), Just("ecdsa-sha2-nistp384"),
            Just("sk-ssh-ed25519@openssh.com"), Just("sk-ecdsa-sha2-nistp256@openssh.com"),
        ],
        parts in vec(vec(any::<u8>(), 0..80), 0..5),
        signature in vec(any::<u8>(), 0..120),
    ) {
        let kind = if algorithm.starts_with("rsa") { "ssh-rsa" } else { algorithm };
        let mut blob = Vec::new();
        blob.put_string(kind.as_bytes());
        parts.iter().for_each(|part| blob.put_string(part));
        let mut encoded = Vec::new();
        encoded.put_string(algorithm.as_bytes());
        encoded.put_string(&signature);
        encoded.put_raw(&[1, 0, 0, 0, 1]);
        prop_assert!(!verify(algorithm, &blob, &encoded, b"message"));
        prop_assert!(!is_authorized(file.as_bytes(), &blob));
    }

    #[test]
    fn a_reader_never_gives_more_than_there_is(bytes in vec(any::<u8>(), 0..64), calls in vec(0..7u8, 0..20)) {
        let mut reader = Reader::new(&bytes);
        for call in calls {
            let before = reader.rest().len();
            let given = match call {
                0 => reader.string().map_or(0, <[u8]>::len),
                1 => reader.text().map_or(0, str::len),
                2 => reader.mpint().map_or(0, <[u8]>::len),
                3 => reader.u64().map_or(0, |_| 8),
                4 => reader.u32().map_or(0, |_| 4),
                5 => reader.take(5).map_or(0, <[u8]>::len),
                _ => reader.bool().map_or(0, |_| 1),
            };
            prop_assert!(given <= before && reader.rest().len() <= before - given);
        }
    }
}

/// The most memory that a process ever had, in KiB.
fn high_water(process: u32) -> usize {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM:"))
        .unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn a_server_survives_clients_that_garble_everything_behind_their_login() {
    const MOST_KIB: usize = 256 * 1024;
    // What a garbled command would run does nothing.
    let server = Server::start(&["--shell", "/bin/true"]);
    let key = HostKey::load_or_make(&server.directory.file("id")).unwrap();
    let base = conversation();
    let strategy = vec((0..base.len(), changes(3)), 1..40);
    let config = ProptestConfig {
        cases: 100,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let mut runner = proptest::test_runner::TestRunner::new(config);
    let outcome = runner.run(&strategy, |script| {
        let mut client = Client::logged_in(server.address, &key);
        client.send(&base[0]);
        for (kind, damage) in script {
            let damaged = changed(&base[kind], &damage);
            // Not this, though: a listener or a connection anywhere else but here.
            if !damaged.is_empty() && (kind < 9 || damage.is_empty()) {
                client.send(&damaged);
            }
        }
        // It ends the connection, or it still answers; a server that hangs fails by the client's patience.
        client.is_alive();
        Ok(())
    });
    outcome.unwrap();
    assert!(Client::logged_in(server.address, &key).is_alive());
    let log = server.log();
    assert!(!log.contains("panicked"), "{log}");
    let most = high_water(server.process.0.id());
    assert!(most < MOST_KIB, "{most} KiB");
}

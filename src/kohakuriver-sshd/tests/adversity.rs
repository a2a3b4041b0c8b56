//! Peers that don't speak SSH, or break it.

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use common::{Server, noise, text};

/// What the server says until it closes.
fn all(mut stream: TcpStream) -> Vec<u8> {
    let mut said = Vec::new();
    let mut space = [0; 4096];
    while let Ok(count @ 1..) = stream.read(&mut space) {
        said.extend_from_slice(&space[..count]);
    }
    said
}

#[test]
fn garbage_is_answered_by_the_end_of_the_connection_and_nothing_else_suffers() {
    let server = Server::start(&[]);
    let version = b"SSH-2.0-test\r\n".to_vec();
    let huge = [&version[..], &[0x7f, 0xff, 0xff, 0xff, 4]].concat();
    let empty = [&version[..], &[0, 0, 0, 2, 4, 20]].concat();
    for garbage in [
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![b'x'; 100_000],
        [&version[..], &noise(100_000)].concat(),
        huge,
        empty,
        [
            &version[..],
            &[0, 0, 0, 12, 4, 30, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0],
        ]
        .concat(),
        [
            &version[..],
            &[0, 0, 0, 12, 10, 21, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        ]
        .concat(),
    ] {
        let mut stream = TcpStream::connect(server.address).unwrap();
        let _ = stream.write_all(&garbage);
        assert!(all(stream).starts_with(b"SSH-2.0-KohakuRiver"));
    }
    assert!(server.run("true").status.success());
}

#[test]
fn who_says_nothing_for_ten_seconds_has_to_go() {
    let server = Server::start(&[]);
    let began = Instant::now();
    all(TcpStream::connect(server.address).unwrap());
    let waited = began.elapsed();
    assert!(
        (Duration::from_secs(9)..Duration::from_secs(20)).contains(&waited),
        "{waited:?}"
    );
}

/// Relays to the server, with one byte of the client's flipped at `place`.
fn flip(server: &Server, place: usize) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (port, target) = (listener.local_addr().unwrap().port(), server.address);
    thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        let mut server = TcpStream::connect(target).unwrap();
        let (mut back, mut from) = (client.try_clone().unwrap(), server.try_clone().unwrap());
        thread::spawn(move || {
            let _ = std::io::copy(&mut from, &mut back);
            let _ = back.shutdown(Shutdown::Both);
        });
        let (mut space, mut passed) = ([0; 4096], 0);
        while let Ok(count @ 1..) = client.read(&mut space) {
            if (passed..passed + count).contains(&place) {
                space[place - passed] ^= 0x10;
            }
            passed += count;
            if server.write_all(&space[..count]).is_err() {
                break;
            }
        }
        let _ = server.shutdown(Shutdown::Both);
    });
    port
}

#[test]
fn a_byte_that_is_changed_on_the_way_ends_the_connection() {
    let server = Server::start(&[]);
    for cipher in ["aes128-gcm@openssh.com", "chacha20-poly1305@openssh.com"] {
        // Behind the exchange of keys, in the middle of the session's data.
        let port = flip(&server, 200_000).to_string();
        let options = [
            "-p",
            &port,
            "-o",
            "HostKeyAlias=[127.0.0.1]:0",
            "-o",
            "StrictHostKeyChecking=no",
            "-c",
            cipher,
        ];
        let mut command = server.ssh(&options);
        let zero = std::fs::File::open("/dev/zero").unwrap();
        let output = command.arg("cat > /dev/null").stdin(zero).output().unwrap();
        assert_eq!(output.status.code(), Some(255), "{}", text(&output.stderr));
        // The client may be gone before it reads why; the server logs it.
        server.log_with(&["was damaged", "is impossible"]);
    }
    assert!(server.run("true").status.success());
}

#[test]
fn a_connection_in_pieces_of_one_byte_works_all_the_same() {
    let server = Server::start(&[]);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (port, target) = (
        listener.local_addr().unwrap().port().to_string(),
        server.address,
    );
    let relay = |mut from: TcpStream, mut to: TcpStream| {
        thread::spawn(move || {
            let mut byte = [0];
            while let Ok(1) = from.read(&mut byte) {
                if to.write_all(&byte).is_err() {
                    break;
                }
            }
            let _ = to.shutdown(Shutdown::Write);
        })
    };
    thread::spawn(move || {
        let (client, _) = listener.accept().unwrap();
        let server = TcpStream::connect(target).unwrap();
        client.set_nodelay(true).unwrap();
        server.set_nodelay(true).unwrap();
        relay(client.try_clone().unwrap(), server.try_clone().unwrap());
        relay(server, client);
    });
    let options = ["-p", &port, "-o", "StrictHostKeyChecking=no"];
    let output = server
        .ssh(&options)
        .arg("echo through; exit 6")
        .output()
        .unwrap();
    assert_eq!(
        (text(&output.stdout), output.status.code()),
        ("through\n".into(), Some(6)),
        "{}",
        text(&output.stderr)
    );
}

#[test]
fn what_a_message_claims_is_never_believed_before_a_login() {
    let server = Server::start(&[]);
    // Well-formed packets of the wrong kind at the wrong time: a request, data, and a second set of new keys.
    for number in [5u8, 50, 80, 90, 94, 98, 21] {
        let mut stream = TcpStream::connect(server.address).unwrap();
        let packet = [0, 0, 0, 12, 10, number, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let _ = stream.write_all(b"SSH-2.0-test\r\n");
        let _ = stream.write_all(&packet);
        let said = text(&all(stream));
        assert!(said.contains("keys"), "{number}: {said:?}");
    }
}

#[test]
fn a_log_that_nobody_reads_stops_nobody_and_says_later_what_it_left_out() {
    let mut server = Server::start_prepared(|command| {
        command.stderr(Stdio::piped());
    });
    let log = server.process.0.stderr.take().unwrap();
    // SAFETY: the call touches no memory.
    assert!(unsafe { libc::fcntl(log.as_raw_fd(), libc::F_SETPIPE_SZ, 4096) } >= 4096);
    // Each makes a line. More than what fits the pipe and what may wait beside it.
    for _ in 0..500 {
        let mut stream = TcpStream::connect(server.address).unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        assert!(all(stream).starts_with(b"SSH-2.0-KohakuRiver"));
    }
    let output = server.run("echo in");
    assert_eq!(text(&output.stdout), "in\n", "{}", text(&output.stderr));
    let mut lines = BufReader::new(log).lines().map(Result::unwrap);
    assert!(lines.any(|line| line.ends_with(" lines were dropped, as nobody took them in time")));
}

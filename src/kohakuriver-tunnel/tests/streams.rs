//! Streams through the real binary: the test is the runner on one side and the service on the other.

mod support;

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, UdpSocket};
use std::thread;

use kohakuriver_tunnel::protocol::{Header, TCP, UDP, kind};
use kohakuriver_tunnel::sys;
use support::*;

const WIDE: u64 = u64::MAX;
const WINDOW: u64 = 256 << 10;

#[test]
fn bytes_come_back_from_a_service_and_both_ends_of_file_end_the_stream() {
    let (runner, port) = (Runner::new(), echo());
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    wire.open(7, port, WIDE);
    assert_eq!(wire.limits[&7], WINDOW);
    wire.data(7, b"hello");
    assert_eq!(wire.bytes(7, 5), b"hello");
    wire.signal(kind::EOF, 7);
    wire.expect(kind::EOF, 7);
    wire.open(7, port, WIDE);
}

#[test]
fn a_reply_after_the_users_end_of_file_arrives_whole() {
    let runner = Runner::new();
    let port = service(|mut sock| {
        let mut question = Vec::new();
        sock.read_to_end(&mut question).unwrap();
        question.reverse();
        sock.write_all(&question).unwrap();
    });
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    wire.open(1, port, WIDE);
    let question = pattern(200_000);
    wire.data(1, &question);
    wire.signal(kind::EOF, 1);
    let mut reply = wire.bytes(1, question.len());
    reply.reverse();
    assert!(reply == question);
    wire.expect(kind::EOF, 1);
}

#[test]
fn the_user_may_go_on_after_the_services_end_of_file() {
    let runner = Runner::new();
    let (listener, port) = listener();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    wire.open(1, port, WIDE);
    let mut sock = take(&listener);
    sock.shutdown(Shutdown::Write).unwrap();
    wire.expect(kind::EOF, 1);
    wire.data(1, b"still here");
    wire.signal(kind::EOF, 1);
    let mut got = Vec::new();
    sock.read_to_end(&mut got).unwrap();
    assert_eq!(got, b"still here");
}

#[test]
fn a_port_where_nothing_listens_is_named_in_the_error() {
    let runner = Runner::new();
    let closed = closed_port();
    let port = closed.port;
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    wire.connect(1, port, WIDE);
    let text = wire.expect(kind::ERROR, 1).text();
    assert_eq!(
        text,
        format!("ECONNREFUSED: nothing listens on port {port} in the task")
    );
}

#[test]
fn a_service_on_ipv6_alone_is_reached() {
    let runner = Runner::new();
    let (listener, reserved) = listener_on("::1");
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    wire.open(1, reserved.port, WIDE);
    take(&listener).write_all(b"six").unwrap();
    assert_eq!(wire.bytes(1, 3), b"six");
}

#[test]
fn a_service_on_another_address_of_the_container_is_reached() {
    let runner = Runner::new();
    let (listener, reserved) = listener_on("127.0.0.77");
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    wire.open(1, reserved.port, WIDE);
    take(&listener).write_all(b"77").unwrap();
    assert_eq!(wire.bytes(1, 2), b"77");
}

#[test]
fn early_data_is_held_until_the_service_is_connected() {
    let (runner, port) = (Runner::new(), echo());
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    let early = pattern(60_000);
    let mut burst = message(
        Header {
            kind: kind::CONNECT,
            proto: TCP,
            id: 3,
            port,
        },
        &WIDE.to_be_bytes(),
    );
    burst.extend(message(Header::new(kind::DATA, TCP, 3), &early));
    burst.extend(message(Header::new(kind::EOF, TCP, 3), &[]));
    wire.write(&burst);
    wire.expect(kind::CONNECTED, 3);
    assert!(wire.bytes(3, early.len()) == early);
    wire.expect(kind::EOF, 3);
}

#[test]
fn what_follows_the_handshake_in_the_same_segment_is_not_lost() {
    let (runner, port) = (Runner::new(), echo());
    let _client = Client::start(&runner);
    let mut wire = runner.accept_request();
    let mut answer = format!(
        "{}Sec-WebSocket-Protocol: kohakuriver.tunnel.v2\r\n\r\n",
        wire.switching()
    )
    .into_bytes();
    answer.extend(message(
        Header {
            kind: kind::CONNECT,
            proto: TCP,
            id: 3,
            port,
        },
        &WIDE.to_be_bytes(),
    ));
    answer.extend(message(Header::new(kind::DATA, TCP, 3), b"eager"));
    wire.write(&answer);
    wire.expect(kind::CONNECTED, 3);
    assert_eq!(wire.bytes(3, 5), b"eager");
}

#[test]
fn a_window_of_one_byte_lets_one_byte_through() {
    let runner = Runner::new();
    let port = service(|mut sock| sock.write_all(b"slowly").unwrap());
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    wire.open(1, port, 1);
    for (taken, byte) in (1u64..).zip(b"slowly") {
        assert_eq!(wire.expect(kind::DATA, 1).payload, [*byte]);
        wire.window(1, taken + 1);
    }
    wire.expect(kind::EOF, 1);
}

#[test]
fn a_limit_that_is_repeated_or_lower_changes_nothing() {
    let runner = Runner::new();
    let port = service(|mut sock| sock.write_all(b"abcdef").unwrap());
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    wire.open(1, port, 2);
    assert_eq!(wire.bytes(1, 2), b"ab");
    wire.window(1, 1);
    wire.window(1, 2);
    wire.window(1, 4);
    assert_eq!(wire.bytes(1, 2), b"cd");
    wire.window(1, WIDE);
    assert_eq!(wire.bytes(1, 2), b"ef");
}

#[test]
fn a_service_that_reads_nothing_stalls_no_other_stream() {
    let (runner, port) = (Runner::new(), echo());
    let (listener, stalled) = listener();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    wire.open(1, stalled, WIDE);
    let mut sock = take(&listener);
    let mut sent = 0;
    // Fill the service's socket until its limit rises no more, with an echo to tell when that is.
    wire.open(2, port, WIDE);
    loop {
        let room = (wire.limits[&1] - sent) as usize;
        if room == 0 {
            break;
        }
        wire.data(1, &vec![b'x'; room.min(1 << 19)]);
        sent += room.min(1 << 19) as u64;
        wire.data(2, b"ping");
        assert_eq!(wire.bytes(2, 4), b"ping");
    }
    wire.data(2, b"still alive");
    assert_eq!(wire.bytes(2, 11), b"still alive");
    // As soon as the service reads, all of it arrives and the limit rises.
    wire.signal(kind::EOF, 1);
    let mut got = Vec::new();
    sock.read_to_end(&mut got).unwrap();
    assert_eq!(got.len() as u64, sent);
}

#[test]
fn a_byte_past_the_limit_ends_its_stream_and_no_other() {
    let runner = Runner::new();
    let (_listener, port) = listener();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    wire.open(1, port, WIDE);
    // More than a window and all that the kernel holds for a service that doesn't read.
    wire.data(1, &vec![0; 15 << 20]);
    let text = wire.expect(kind::ERROR, 1).text();
    assert!(text.starts_with("EPROTO: "), "{text}");
    wire.open(2, port, WIDE);
}

#[test]
fn bulk_arrives_unharmed_in_both_directions_at_once() {
    let (runner, port) = (Runner::new(), echo());
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    wire.open(1, port, WIDE);
    let bytes = pattern(24 << 20);
    let (mut sent, mut got) = (0, Vec::new());
    while got.len() < bytes.len() {
        let room = (wire.limits[&1] as usize).min(bytes.len()) - sent;
        if room > 0 && sent - got.len() < 4 << 20 {
            let length = room.min(30_001);
            wire.data(1, &bytes[sent..sent + length]);
            sent += length;
        } else {
            let message = wire.any();
            match message.kind {
                kind::WINDOW => {
                    wire.limits.insert(1, message.limit());
                }
                kind::PING => wire.send(Header::new(kind::PONG, TCP, 1), &message.payload),
                _ => got.extend(message.payload),
            }
        }
    }
    assert!(got == bytes);
    assert!(
        wire.limits[&1] - bytes.len() as u64 > WINDOW,
        "the window has grown"
    );
}

#[test]
fn a_frame_of_16_mib_passes_through_as_it_arrives() {
    let runner = Runner::new();
    let (listener, port) = listener();
    let _client = Client::start(&runner);
    let mut wire = runner.accept_v1();
    wire.connect_v1(1, port);
    wire.expect(kind::CONNECTED, 1);
    let mut sock = take(&listener);
    let frame = message(Header::new(kind::DATA, TCP, 1), &pattern((16 << 20) - 8));
    let (first, rest) = frame.split_at(frame.len() - 1000);
    let mut writer = wire.socket().try_clone().unwrap();
    let mut got = vec![0; first.len() - 18];
    thread::scope(|scope| {
        scope.spawn(|| writer.write_all(first).unwrap());
        sock.read_exact(&mut got).unwrap();
    });
    wire.write(rest);
    let mut last = vec![0; 1000];
    sock.read_exact(&mut last).unwrap();
    got.extend(last);
    assert!(got == pattern((16 << 20) - 8));
}

#[test]
fn a_thousand_streams_keep_to_themselves() {
    sys::raise_file_limit().unwrap();
    let (runner, port) = (Runner::new(), echo());
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    let ids = 1..=1000u32;
    for id in ids.clone() {
        wire.connect(id, port, WIDE);
        wire.data(id, format!("stream {id}").as_bytes());
    }
    let mut echoed = std::collections::HashMap::<u32, Vec<u8>>::new();
    while echoed.len() < 1000
        || echoed
            .iter()
            .any(|(id, text)| text.len() < format!("stream {id}").len())
    {
        let message = wire.message();
        match message.kind {
            kind::CONNECTED => {}
            kind::DATA => echoed
                .entry(message.id)
                .or_default()
                .extend(message.payload),
            _ => panic!("{message:?}"),
        }
    }
    for id in ids {
        assert_eq!(echoed[&id], format!("stream {id}").as_bytes());
    }
}

#[test]
fn an_idle_stream_costs_less_than_4_kib() {
    sys::raise_file_limit().unwrap();
    let runner = Runner::new();
    let (listener, port) = listener();
    let client = Client::start(&runner);
    let mut wire = runner.accept();
    let mut open = |ids: std::ops::Range<u32>| -> Vec<_> {
        ids.map(|id| {
            wire.open(id, port, WIDE);
            let mut sock = take(&listener);
            wire.data(id, b"used once");
            sock.read_exact(&mut [0; 9]).unwrap();
            sock
        })
        .collect()
    };
    let few = open(1..100);
    let before = client.resident_kib();
    let many = open(100..1100);
    let each = (client.resident_kib() - before) as f64 / many.len() as f64;
    assert!(each < 4.0, "{each} KiB");
    drop(few);
}

#[test]
fn frames_may_arrive_one_byte_at_a_time() {
    let (runner, port) = (Runner::new(), echo());
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    let mut burst = message(
        Header {
            kind: kind::CONNECT,
            proto: TCP,
            id: 3,
            port,
        },
        &WIDE.to_be_bytes(),
    );
    burst.extend(frame(9, b"are you there"));
    burst.extend(message(Header::new(kind::DATA, TCP, 3), &[b'z'; 300]));
    burst.extend(message(Header::new(kind::EOF, TCP, 3), &[]));
    for byte in burst {
        wire.write(&[byte]);
    }
    let (mut pong, mut got) = (None, Vec::new());
    while got.len() < 300 {
        match wire.frame().unwrap() {
            (10, payload) => pong = Some(payload),
            (2, payload) if payload[0] == kind::DATA => got.extend_from_slice(&payload[8..]),
            _ => {}
        }
    }
    assert_eq!(pong.as_deref(), Some(&b"are you there"[..]));
    assert_eq!(got, [b'z'; 300]);
}

#[test]
fn a_close_delivers_what_was_queued_and_frees_the_id_at_once() {
    let runner = Runner::new();
    let (listener, port) = listener();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    wire.open(1, port, WIDE);
    let mut sock = take(&listener);
    wire.data(1, &pattern(WINDOW as usize));
    wire.signal(kind::CLOSE, 1);
    wire.open(1, port, WIDE);
    let mut again = take(&listener);
    wire.data(1, b"second");
    let mut got = Vec::new();
    sock.read_to_end(&mut got).unwrap();
    assert!(got == pattern(WINDOW as usize));
    let mut second = [0; 6];
    again.read_exact(&mut second).unwrap();
    assert_eq!(&second, b"second");
}

#[test]
fn an_error_resets_the_services_connection() {
    let runner = Runner::new();
    let (listener, port) = listener();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    wire.open(1, port, WIDE);
    let mut sock = take(&listener);
    wire.signal(kind::ERROR, 1);
    assert_eq!(
        sock.read(&mut [0; 1]).unwrap_err().kind(),
        ErrorKind::ConnectionReset
    );
}

#[test]
fn a_reset_by_the_service_is_an_error_for_the_user() {
    let runner = Runner::new();
    let (listener, port) = listener();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    wire.open(1, port, WIDE);
    let sock = take(&listener);
    sys::reset_on_close(&sock);
    drop(sock);
    assert!(
        wire.expect(kind::ERROR, 1)
            .text()
            .starts_with("ECONNRESET: ")
    );
}

#[test]
fn a_connect_for_an_id_in_use_is_ignored() {
    let (runner, port) = (Runner::new(), echo());
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    wire.open(1, port, WIDE);
    wire.connect(1, port, WIDE);
    wire.data(1, b"the first");
    assert_eq!(wire.bytes(1, 9), b"the first");
}

#[test]
fn messages_of_unknown_types_and_for_unknown_ids_are_ignored() {
    let (runner, port) = (Runner::new(), echo());
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    for kind in [0, 2, 3, 4, 5, 7, 8, 9, 10, 15, 255] {
        wire.send(Header::new(kind, TCP, 99), &7u64.to_be_bytes());
        wire.send(Header::new(kind.max(10), UDP, 99), &[]);
    }
    wire.open(1, port, WIDE);
}

#[test]
fn a_ping_is_echoed_with_its_id_and_payload() {
    let runner = Runner::new();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    for id in [0, 42] {
        wire.send(Header::new(kind::PING, TCP, id), b"opaque");
        assert_eq!(
            wire.any(),
            Message {
                kind: kind::PONG,
                proto: TCP,
                id,
                payload: b"opaque".to_vec()
            }
        );
    }
}

#[test]
fn datagrams_keep_their_borders_in_both_directions() {
    let runner = Runner::new();
    let service = UdpSocket::bind("127.0.0.1:0").unwrap();
    service.set_read_timeout(Some(PATIENCE)).unwrap();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    wire.connect_udp(5, service.local_addr().unwrap().port());
    let mut buffer = vec![0; 70_000];
    for length in [0, 1, 1472, 65_507] {
        wire.datagram(5, &pattern(length));
        let (got, from) = service.recv_from(&mut buffer).unwrap();
        assert!(buffer[..got] == pattern(length));
        service.send_to(&buffer[..got], from).unwrap();
        let back = wire.expect(kind::DATA, 5);
        assert!(back.proto == UDP && back.payload == pattern(length));
    }
    // One that no socket takes is dropped, and nothing else is.
    wire.datagram(5, &pattern(65_508));
    wire.datagram(5, b"next");
    assert_eq!(service.recv(&mut buffer).unwrap(), 4);
    wire.send(Header::new(kind::CLOSE, UDP, 5), &[]);
    wire.connect_udp(5, service.local_addr().unwrap().port());
}

#[test]
fn a_udp_service_that_comes_later_is_reached_by_the_same_stream() {
    let runner = Runner::new();
    let closed = closed_udp_port();
    let port = closed.port;
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    wire.connect_udp(5, port);
    wire.datagram(5, b"nobody");
    wire.expect(kind::ERROR, 5);
    // That is told once; the streams that follow stay.
    wire.connect_udp(5, port);
    wire.datagram(5, b"nobody");
    // One address after the other refuses it, each in a turn of its own.
    for _ in 0..4 {
        wire.send(Header::new(kind::PING, TCP, 0), &[]);
        wire.expect(kind::PONG, 0);
    }
    drop(closed);
    let service = UdpSocket::bind(("127.0.0.1", port)).unwrap();
    service.set_read_timeout(Some(PATIENCE)).unwrap();
    wire.datagram(5, b"somebody");
    let mut buffer = [0; 20];
    assert_eq!(service.recv(&mut buffer).unwrap(), 8);
}

#[test]
fn a_udp_service_on_any_address_gets_also_the_datagrams_that_others_refused() {
    let runner = Runner::new();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    for (id, address) in [(5, "::1"), (6, "127.0.0.78")] {
        let (service, reserved) = udp_on(address);
        service.set_read_timeout(Some(PATIENCE)).unwrap();
        wire.connect_udp(id, reserved.port);
        let mut buffer = [0; 20];
        for text in ["first", "second", "third"] {
            wire.datagram(id, text.as_bytes());
            let (length, from) = service.recv_from(&mut buffer).unwrap();
            assert_eq!(&buffer[..length], text.as_bytes());
            service.send_to(text.as_bytes(), from).unwrap();
            assert_eq!(wire.expect(kind::DATA, id).payload, text.as_bytes());
        }
    }
}

#[test]
fn datagrams_that_nobody_takes_are_told_to_the_user_and_counted() {
    let runner = Runner::new();
    let closed = closed_udp_port();
    let port = closed.port;
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    wire.connect_udp(5, port);
    wire.datagram(5, b"anybody?");
    let counts = loop {
        let message = wire.any();
        match message.kind {
            kind::ERROR => assert_eq!(
                message.text(),
                format!("ECONNREFUSED: nothing listens on port {port} (udp) in the task")
            ),
            kind::PING => break message.payload,
            other => panic!("{other}"),
        }
    };
    assert_eq!(counts[..12], *b"cnt1\0\0\0\0\0\0\0\x01");
}

#[test]
fn v1_needs_no_windows_and_a_close_is_answered_with_a_close() {
    let (runner, port) = (Runner::new(), echo());
    let _client = Client::start(&runner);
    let mut wire = runner.accept_v1();
    wire.connect_v1(1, port);
    assert_eq!(wire.expect(kind::CONNECTED, 1).payload, []);
    wire.data(1, &pattern(900_000));
    let mut got = Vec::new();
    while got.len() < 900_000 {
        let message = wire.any();
        assert_eq!(message.kind, kind::DATA, "nothing that v1 doesn't know");
        got.extend(message.payload);
    }
    assert!(got == pattern(900_000));
    wire.signal(kind::CLOSE, 1);
    wire.expect(kind::CLOSE, 1);
    wire.connect_v1(1, port);
    wire.expect(kind::CONNECTED, 1);
}

#[test]
fn a_v1_stream_on_a_v2_tunnel_stays_v1() {
    let runner = Runner::new();
    let port = service(|mut sock| sock.write_all(b"bye").unwrap());
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    wire.connect_v1(1, port);
    assert_eq!(wire.expect(kind::CONNECTED, 1).payload, []);
    assert_eq!(wire.bytes(1, 3), b"bye");
    let ended = std::time::Instant::now();
    // After the linger, not at once: the user may still be sending.
    assert_eq!(wire.any().kind, kind::CLOSE);
    assert!(
        ended.elapsed() < std::time::Duration::from_secs(1),
        "but soon"
    );
}

#[test]
fn v1_reading_pauses_for_a_service_that_reads_nothing_and_then_goes_on() {
    let runner = Runner::new();
    let (listener, port) = listener();
    let _client = Client::start(&runner);
    let mut wire = runner.accept_v1();
    wire.connect_v1(1, port);
    wire.expect(kind::CONNECTED, 1);
    let mut sock = take(&listener);
    let total = 64 << 20;
    let mut writer = wire.socket().try_clone().unwrap();
    let reader = thread::spawn(move || {
        let mut got = vec![0; total];
        sock.read_exact(&mut got).unwrap();
        got
    });
    let sent = pattern(total);
    for piece in sent.chunks(1 << 20) {
        writer
            .write_all(&message(Header::new(kind::DATA, TCP, 1), piece))
            .unwrap();
    }
    assert!(reader.join().unwrap() == sent);
}

#[test]
fn a_v1_service_that_reads_nothing_makes_the_tunnel_client_stop_reading() {
    let runner = Runner::new();
    let (_listener, port) = listener();
    let client = Client::start(&runner);
    let mut wire = runner.accept_v1();
    wire.connect_v1(1, port);
    wire.expect(kind::CONNECTED, 1);
    wire.socket().set_nonblocking(true).unwrap();
    let frame = message(Header::new(kind::DATA, TCP, 1), &vec![0; 1 << 20]);
    let mut sock = wire.socket().try_clone().unwrap();
    let mut refused = 0;
    let mut at = 0;
    // The kernel's buffers take some; that the same bytes are refused for long shows the pause.
    while refused < 200 {
        match sock.write(&frame[at..]) {
            Ok(n) => (at, refused) = ((at + n) % frame.len(), 0),
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                refused += 1;
                thread::sleep(std::time::Duration::from_millis(1));
            }
        }
    }
    assert!(
        client.resident_kib() < 16 << 10,
        "{} KiB",
        client.resident_kib()
    );
}

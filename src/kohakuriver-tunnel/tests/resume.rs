//! Streams that outlive their link: the real binary over real sockets, with links that are cut.

#[path = "support/opener.rs"]
mod opener;
mod support;

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;

use kohakuriver_tunnel::protocol::{Header, UDP, kind};
use opener::*;
use support::*;

/// Numbers that look random and are the same each time.
fn dice(state: &mut u64, sides: u64) -> u64 {
    *state = state
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1_442_695_040_888_963_407);
    (*state >> 33) % sides
}

/// Ends the connection in the middle of a frame that says something else than what comes after it.
fn cut(wire: Wire, state: &mut u64) {
    let torn = frame(2, &[3; 3000]);
    let length = dice(state, torn.len() as u64) as usize;
    let _ = wire.socket().write_all(&torn[..length]);
    match dice(state, 3) {
        0 => drop(wire),
        1 => wire.socket().shutdown(Shutdown::Both).unwrap(),
        _ => socket2::SockRef::from(wire.socket())
            .set_linger(Some(std::time::Duration::ZERO))
            .unwrap(),
    }
}

#[test]
fn bulk_goes_on_in_both_directions_wherever_links_are_cut() {
    const BULK: u64 = 24 << 20;
    let runner = Runner::new();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    let mut stream = Opener::new(0, echo());
    stream.open(&mut wire);
    let (mut state, mut cuts, mut next) = (1, 0, 1 << 20);
    while stream.received < BULK {
        if stream.received > next {
            (cuts, next) = (cuts + 1, stream.received + dice(&mut state, 2 << 20));
            cut(wire, &mut state);
            wire = stream.resume_anew(&runner);
        }
        let most = (BULK - stream.sent).min(stream.limit - stream.sent);
        let size = dice(&mut state, 100_000).min(most) as usize;
        if size > 0 && stream.sent < stream.received + 200_000 {
            stream.send(&mut wire, size);
        } else {
            stream.take(&mut wire);
        }
    }
    assert!(cuts > 15, "{cuts}");
    cut(wire, &mut state);
    wire = stream.resume_anew(&runner);
    stream.eof(&mut wire);
    cut(wire, &mut state);
    wire = stream.resume_anew(&runner);
    stream.until(&mut wire, kind::CLOSE);
    assert_eq!(stream.received, BULK + 1);
}

#[test]
fn a_service_sees_nothing_of_a_lost_link_and_an_unkept_stream_is_reset() {
    let runner = Runner::new();
    let (listener, port) = listener();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    let mut stream = Opener::new(0, port);
    stream.open(&mut wire);
    let mut kept = take(&listener);
    wire.open(7, port, u64::MAX);
    let mut unkept = take(&listener);
    stream.send(&mut wire, 100);
    let mut bytes = [0; 100];
    kept.read_exact(&mut bytes).unwrap();
    drop(wire);
    let error = unkept.read(&mut bytes).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    kept.write_all(&pattern(50)).unwrap();
    let mut wire = stream.resume_anew(&runner);
    assert_eq!(stream.acked, 100);
    while stream.received < 50 {
        stream.take(&mut wire);
    }
}

#[test]
fn an_attachment_that_is_not_newer_changes_nothing() {
    let runner = Runner::new();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    let mut stream = Opener::new(0, echo());
    stream.open(&mut wire);
    stream.resume(&mut wire);
    let (epoch, id) = (stream.epoch, stream.id);
    for stale in [0, epoch] {
        (stream.epoch, stream.id) = (stale, 5);
        let answer = stream.repeat(&mut wire);
        assert!(answer.text().starts_with("ESTALE: "), "{}", answer.text());
    }
    (stream.epoch, stream.id) = (epoch, id);
    stream.send(&mut wire, 1000);
    while stream.received < 1000 {
        stream.take(&mut wire);
    }
}

#[test]
fn what_still_comes_under_an_old_id_is_dropped() {
    let runner = Runner::new();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    let mut stream = Opener::new(0, echo());
    stream.open(&mut wire);
    let old = stream.id;
    stream.resume(&mut wire);
    wire.data(old, b"late");
    wire.signal(kind::CLOSE, old);
    wire.signal(kind::ERROR, old);
    stream.send(&mut wire, 1000);
    while stream.received < 1000 {
        stream.take(&mut wire);
    }
}

#[test]
fn a_stream_is_resumed_for_whom_and_where_it_was_opened_alone() {
    let runner = Runner::new();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    let mut stream = Opener::new(0, echo());
    stream.open(&mut wire);
    let (mark, port) = (stream.mark, stream.port);
    for (other_mark, other_port) in [([9; 16], port), (mark, port ^ 1), ([0; 16], port)] {
        (stream.mark, stream.port) = (other_mark, other_port);
        let answer = stream.ask(&mut wire);
        assert!(answer.text().starts_with("ESTALE: "), "{}", answer.text());
    }
    (stream.mark, stream.port) = (mark, port);
    stream.resume(&mut wire);
}

#[test]
fn a_detached_stream_is_held_for_as_long_as_was_said_and_no_longer() {
    let runner = Runner::new();
    let (listener, port) = listener();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    let mut stays = Opener::new(0, port);
    stays.open(&mut wire);
    let mut kept = take(&listener);
    let mut goes = Opener::new(1, port);
    goes.open(&mut wire);
    let mut lost = take(&listener);
    stays.detach(&mut wire, u32::MAX);
    goes.detach(&mut wire, 0);
    let error = lost.read(&mut [0]).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    let answer = goes.ask(&mut wire);
    assert!(
        answer.text().starts_with("ETIMEDOUT: "),
        "{}",
        answer.text()
    );
    stays.resume(&mut wire);
    kept.write_all(&pattern(10)).unwrap();
    while stays.received < 10 {
        stays.take(&mut wire);
    }
}

#[test]
fn a_stream_that_ended_well_is_resumed_and_closed() {
    let runner = Runner::new();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    let mut stream = Opener::new(0, echo());
    stream.open(&mut wire);
    stream.send(&mut wire, 1000);
    stream.eof(&mut wire);
    stream.until(&mut wire, kind::CLOSE);
    let answer = stream.ask(&mut wire);
    assert_eq!(
        (answer.kind, numbers(&answer)),
        (kind::RESUMED, [1001, 1001, 1000])
    );
    assert_eq!(wire.any().kind, kind::CLOSE);
}

#[test]
fn an_error_that_was_lost_answers_the_resume() {
    let runner = Runner::new();
    let (listener, port) = listener();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    let mut stream = Opener::new(0, port);
    stream.open(&mut wire);
    let service = take(&listener);
    socket2::SockRef::from(&service)
        .set_linger(Some(std::time::Duration::ZERO))
        .unwrap();
    drop(service);
    wire.expect(kind::ERROR, stream.id);
    drop(wire);
    let mut wire = runner.accept();
    let answer = stream.ask(&mut wire);
    assert!(
        answer.text().starts_with("ECONNRESET: "),
        "{}",
        answer.text()
    );
}

fn call_roll(wire: &mut Wire, stream: &Opener, epoch: u32) {
    let header = Header {
        id: 0,
        ..stream.header(kind::RESUME)
    };
    let all = [&stream.name[..12], &epoch.to_be_bytes(), &stream.mark].concat();
    wire.send(header, &all);
}

#[test]
fn what_the_opener_does_not_resume_ends_when_it_says_so() {
    let runner = Runner::new();
    let (listener, port) = listener();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    let mut streams: Vec<_> = (0..3).map(|number| Opener::new(number, port)).collect();
    let mut services = Vec::new();
    for stream in &mut streams {
        stream.open(&mut wire);
        services.push(take(&listener));
    }
    let mut other = Opener::new(9, port);
    other.name[0] ^= 1;
    other.open(&mut wire);
    let mut others = take(&listener);
    drop(wire);
    let mut wire = streams[1].resume_anew(&runner);
    call_roll(&mut wire, &streams[1], streams[1].epoch);
    for (number, service) in services.iter_mut().enumerate() {
        if number != 1 {
            let error = service.read(&mut [0]).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::ConnectionReset);
        }
    }
    services[1].write_all(&pattern(10)).unwrap();
    while streams[1].received < 10 {
        streams[1].take(&mut wire);
    }
    others.write_all(&pattern(10)).unwrap();
    other.resume(&mut wire);
    while other.received < 10 {
        other.take(&mut wire);
    }
}

#[test]
fn a_roll_that_comes_late_or_from_somebody_else_ends_nothing() {
    let runner = Runner::new();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    let mut stream = Opener::new(0, echo());
    call_roll(&mut wire, &stream, 7);
    stream.open(&mut wire);
    call_roll(&mut wire, &stream, 7);
    call_roll(&mut wire, &stream, 3);
    let mut stranger = Opener::new(0, 0);
    stranger.mark = [1; 16];
    call_roll(&mut wire, &stranger, 8);
    stream.send(&mut wire, 100);
    while stream.received < 100 {
        stream.take(&mut wire);
    }
}

#[test]
fn a_right_that_ended_ends_attached_and_detached_streams_of_that_mark() {
    let runner = Runner::new();
    let (listener, port) = listener();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    let mut streams: Vec<_> = (0..3).map(|number| Opener::new(number, port)).collect();
    let mut services = Vec::new();
    streams[2].mark = [8; 16];
    for stream in &mut streams {
        stream.open(&mut wire);
        services.push(take(&listener));
    }
    streams[1].detach(&mut wire, 60);
    wire.send(
        Header::new(kind::REVOKE, 0, 0),
        &[&MARK[..], b"not yours"].concat(),
    );
    let told = wire.expect(kind::ERROR, streams[0].id);
    assert_eq!(told.text(), "EACCES: not yours");
    for service in &mut services[..2] {
        assert!(service.read(&mut [0]).is_err());
    }
    assert_eq!(streams[1].ask(&mut wire).text(), "EACCES: not yours");
    streams[2].resume(&mut wire);
}

#[test]
fn a_connect_that_comes_twice_dials_once() {
    let runner = Runner::new();
    let (listener, port) = listener();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    let mut stream = Opener::new(0, port);
    stream.open(&mut wire);
    let _service = take(&listener);
    stream.id = 77;
    stream.connect_with(&mut wire, HOLD);
    let mut second = Opener::new(1, port);
    second.open(&mut wire);
    let _other = take(&listener);
    listener.set_nonblocking(true).unwrap();
    assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
}

#[test]
fn nobody_resumes_what_was_never_opened_and_a_late_connect_of_it_is_ignored() {
    let runner = Runner::new();
    let (listener, port) = listener();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    let mut stream = Opener::new(0, port);
    let answer = stream.ask(&mut wire);
    assert!(answer.text().starts_with("ESTALE: "), "{}", answer.text());
    stream.connect_with(&mut wire, HOLD);
    let mut again = Opener::new(1, port);
    again.open(&mut wire);
    let _service = take(&listener);
    listener.set_nonblocking(true).unwrap();
    assert_eq!(listener.accept().unwrap_err().kind(), ErrorKind::WouldBlock);
}

#[test]
fn whoever_acknowledges_what_was_never_sent_loses_that_stream_alone() {
    let runner = Runner::new();
    let (listener, port) = listener();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    let mut liar = Opener::new(0, port);
    liar.open(&mut wire);
    let mut service = take(&listener);
    let mut honest = Opener::new(1, echo());
    honest.open(&mut wire);
    liar.received = 1;
    liar.ack(&mut wire);
    let told = wire.expect(kind::ERROR, liar.id);
    assert!(told.text().starts_with("EPROTO: "), "{}", told.text());
    assert!(service.read(&mut [0]).is_err());
    honest.send(&mut wire, 1000);
    while honest.received < 1000 {
        honest.take(&mut wire);
    }
}

#[test]
fn thousands_of_detached_streams_and_a_flood_of_resumes_are_bounded() {
    let runner = Runner::new();
    let mut command = client_command(&runner.url());
    command.env("KOHAKURIVER_DETACHED_STREAMS", "100");
    let client = Client::spawn(command);
    let mut wire = runner.accept();
    let port = echo();
    let mut streams: Vec<_> = (0..300).map(|number| Opener::new(number, port)).collect();
    for stream in &mut streams {
        stream.open(&mut wire);
        stream.detach(&mut wire, u32::MAX);
    }
    let answer = streams[0].ask(&mut wire);
    assert!(answer.text().starts_with("ENOBUFS: "), "{}", answer.text());
    let before = client.resident_kib();
    for number in 0..50_000 {
        let mut stranger = Opener::new(number, port);
        stranger.name[0] = 0;
        let answer = stranger.ask(&mut wire);
        assert!(answer.text().starts_with("ESTALE: "));
    }
    let more = client.resident_kib() - before;
    assert!(more < 4096, "{more} KiB");
    for stream in &mut streams[200..] {
        stream.resume(&mut wire);
    }
}

#[test]
fn a_service_keeps_its_udp_peer_over_a_new_link() {
    let runner = Runner::new();
    let service = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    service.set_read_timeout(Some(PATIENCE)).unwrap();
    let port = service.local_addr().unwrap().port();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    let mut stream = Opener::new(0, port);
    stream.proto = UDP;
    stream.connect_with(&mut wire, HOLD);
    assert_eq!(wire.any().kind, kind::CONNECTED);
    wire.datagram(stream.id, b"one");
    let (_, peer) = service.recv_from(&mut [0; 9]).unwrap();
    drop(wire);
    let mut wire = runner.accept();
    let answer = stream.ask(&mut wire);
    assert_eq!((answer.kind, numbers(&answer)), (kind::RESUMED, [0, 0, 0]));
    wire.datagram(stream.id, b"two");
    assert_eq!(service.recv_from(&mut [0; 9]).unwrap(), (3, peer));
    service.send_to(b"back", peer).unwrap();
    assert_eq!(wire.any().payload, b"back");
}

#[test]
fn an_end_of_file_that_was_lost_comes_again_and_its_stream_ends_when_it_has_arrived() {
    let runner = Runner::new();
    let (listener, port) = listener();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    let mut stream = Opener::new(0, port);
    stream.open(&mut wire);
    let mut service = take(&listener);
    service.write_all(&pattern(100)).unwrap();
    service.shutdown(Shutdown::Write).unwrap();
    while wire.any().kind != kind::EOF {}
    drop(wire);
    let mut wire = stream.resume_anew(&runner);
    while stream.take(&mut wire) != kind::DATA {}
    assert_eq!(stream.received, 100);
    drop(wire);
    let mut wire = stream.resume_anew(&runner);
    assert_eq!(stream.take(&mut wire), kind::EOF);
    stream.send(&mut wire, 10);
    stream.eof(&mut wire);
    stream.until(&mut wire, kind::CLOSE);
    assert_eq!(service.read(&mut [0; 20]).unwrap(), 10);
    assert_eq!(service.read(&mut [0; 20]).unwrap(), 0);
}

#[test]
fn what_came_is_acknowledged_by_itself() {
    let runner = Runner::new();
    let (_listener, port) = listener();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    let mut streams: Vec<_> = (0..50).map(|number| Opener::new(number, port)).collect();
    for stream in &mut streams {
        stream.open(&mut wire);
        stream.send(&mut wire, 10);
    }
    for _ in &streams {
        let ack = wire.any();
        assert_eq!((ack.kind, numbers(&ack)), (kind::ACK, [10]));
    }
}

#[test]
fn a_user_who_acknowledges_nothing_is_kept_for_within_the_budget_and_stalls_no_other() {
    let runner = Runner::new();
    let (listener, port) = listener();
    let mut command = client_command(&runner.url());
    command.env("KOHAKURIVER_KEEP_BUDGET", "1048576");
    let _client = Client::spawn(command);
    let mut wire = runner.accept();
    let mut silent = Opener::new(0, port);
    silent.received = u64::MAX >> 1; // a limit that nothing reaches
    silent.open(&mut wire);
    silent.received = 0;
    let mut service = take(&listener);
    let pouring = std::thread::spawn(move || service.write_all(&pattern(4 << 20)));
    let mut other = Opener::new(1, echo());
    other.open(&mut wire);
    let mut got = 0;
    // How much of the budget it gets is told by the memory that it takes, which is not filled to the last byte.
    while got < 256 << 10 {
        got += wire.expect(kind::DATA, silent.id).payload.len();
    }
    for round in 1..=100 {
        other.send(&mut wire, 1000);
        while other.received < 1000 * round {
            let message = wire.any();
            match (message.kind, message.id == silent.id) {
                (kind::DATA, true) => got += message.payload.len(),
                (kind::DATA, false) => other.received += message.payload.len() as u64,
                _ => {}
            }
        }
        other.ack(&mut wire);
    }
    assert!(got <= (1 << 20) + 4096, "{got}");
    let before = got;
    silent.received = got as u64;
    silent.ack(&mut wire);
    while got == before {
        let message = wire.any();
        if message.id == silent.id && message.kind == kind::DATA {
            got += message.payload.len();
        }
    }
    wire.signal(kind::ERROR, silent.id);
    let _ = pouring.join();
}

#[test]
fn a_stream_that_is_not_kept_ends_when_it_is_detached() {
    let runner = Runner::new();
    let (listener, port) = listener();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    wire.open(7, port, u64::MAX);
    let mut service = take(&listener);
    wire.send(Header::new(kind::DETACH, 0, 7), &[0xff; 4]);
    assert_eq!(service.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_stream_is_resumed_while_its_service_is_written_what_it_did_not_take() {
    let runner = Runner::new();
    let (listener, port) = listener();
    let _client = Client::start(&runner);
    let mut wire = runner.accept();
    let mut stream = Opener::new(0, port);
    stream.open(&mut wire);
    let mut service = take(&listener);
    // More than its socket takes: the rest waits in the client, which has no link then.
    while stream.sent + 60_000 <= stream.limit {
        stream.send(&mut wire, 60_000);
    }
    while stream.acked < stream.sent {
        stream.take(&mut wire);
    }
    let bytes = stream.sent;
    drop(wire);
    let refused = runner.accept_request();
    let mut all = vec![0; bytes as usize];
    service.read_exact(&mut all).unwrap();
    assert!(all == pattern(bytes as usize));
    drop(refused);
    stream.resume_anew(&runner);
}

#[test]
fn a_link_that_acknowledges_nothing_and_answers_no_ping_is_replaced() {
    let runner = Runner::new();
    let (listener, port) = listener();
    let _client = Client::start(&runner);
    let mut dead = runner.accept();
    let mut stream = Opener::new(0, port);
    stream.open(&mut dead);
    let mut service = take(&listener);
    service.write_all(&pattern(10)).unwrap();
    assert_eq!(dead.any().kind, kind::DATA);
    assert_eq!(dead.frame(), Some((9, vec![])));
    let mut wire = stream.resume_anew(&runner);
    stream.until(&mut wire, kind::DATA);
}

#[test]
fn an_idle_kept_stream_costs_less_than_a_kib() {
    kohakuriver_tunnel::sys::raise_file_limit().unwrap();
    let runner = Runner::new();
    let (listener, port) = listener();
    let client = Client::start(&runner);
    let mut wire = runner.accept();
    let mut open = |numbers: std::ops::Range<u32>| -> Vec<_> {
        numbers
            .map(|number| {
                let mut stream = Opener::new(number, port);
                stream.open(&mut wire);
                let mut service = take(&listener);
                stream.send(&mut wire, 9);
                service.read_exact(&mut [0; 9]).unwrap();
                service.write_all(&pattern(9)).unwrap();
                while stream.received < 9 {
                    let message = wire.any();
                    if message.kind == kind::DATA {
                        stream.received += 9;
                    }
                }
                stream.ack(&mut wire);
                service
            })
            .collect()
    };
    let few = open(0..500);
    let before = client.resident_kib();
    let many = open(500..4500);
    let each = (client.resident_kib() - before) as f64 / many.len() as f64;
    println!("{each} KiB");
    assert!(each < 1.0, "{each} KiB"); // half of it here; a kernel may give memory out in larger pages
    drop(few);
}

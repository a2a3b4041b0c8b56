//! Clients that know the protocol well and break it on purpose.

mod common;

use std::fs;

use common::client::{CURVE, Client, ECDH_INIT, KEXINIT, NEWKEYS, STRICT, message};
use common::{Server, make_key};
use kohakuriver_sshd::keys::HostKey;
use kohakuriver_sshd::wire::{Put, Reader};

const SUCCESS: &[u8] = &[52];
const FAILURE: u8 = 51;
const WOULD_DO: u8 = 60;
const UNIMPLEMENTED: u8 = 3;

fn key(server: &Server) -> HostKey {
    HostKey::load_or_make(&server.directory.file("id")).unwrap()
}

/// A packet in the clear, with a length and a padding of one's own choice.
fn packet(length: u32, padding: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = Vec::new();
    packet.put_u32(length);
    packet.put_u8(padding);
    packet.put_raw(payload);
    packet
}

#[test]
fn nothing_but_the_exchange_passes_before_the_first_keys() {
    let server = Server::start(&[]);
    // Ignored, debug, unimplemented, ping, extension: each would shift a sequence number that nobody checks.
    for (extra, exchanges) in [2u8, 3, 4, 7, 192]
        .into_iter()
        .flat_map(|extra| [(extra, STRICT), (extra, CURVE)])
    {
        let mut filler = message(extra);
        filler.put_u32(0);
        let mut before = Client::connect(server.address);
        before.send(&filler);
        before.send(&Client::kexinit(exchanges, false));
        assert!(before.farewell().contains("keys"), "{extra} in front");
        let mut between = Client::connect(server.address);
        between.send(&Client::kexinit(exchanges, false));
        between.send(&filler);
        assert!(between.farewell().contains("keys"), "{extra} in between");
    }
}

#[test]
fn sequence_numbers_begin_anew_with_every_key_where_both_sides_are_strict_and_only_there() {
    let server = Server::start(&[]);
    for exchanges in [STRICT, CURVE] {
        let mut client = Client::connect(server.address);
        for _ in 0..3 {
            client.exchange(exchanges);
            assert!(client.is_alive(), "{exchanges}");
        }
        // As if one packet had been dropped or put in on the way.
        client.sealed += 1;
        client.ask_for_service("ssh-userauth");
        let why = client.farewell();
        assert!(
            why.contains("damaged") || why.contains("impossible"),
            "{why}"
        );
    }
}

#[test]
fn an_exchange_of_keys_can_be_neither_repeated_nor_skipped_nor_filled_with_other_messages() {
    let server = Server::start(&[]);
    let init = || Client::kexinit(STRICT, false);
    let mut twice = Client::connect(server.address);
    twice.send(&init());
    twice.send(&init());
    assert!(twice.farewell().contains("already"));
    for number in [NEWKEYS, ECDH_INIT] {
        let mut early = Client::connect(server.address);
        early.send(&[number, 0, 0, 0, 0]);
        assert!(!early.farewell().is_empty());
        let mut late = Client::connect(server.address);
        late.exchange(STRICT);
        late.send(&[number, 0, 0, 0, 0]);
        assert!(!late.farewell().is_empty());
    }
    let mut client = Client::logged_in(server.address, &key(&server));
    client.send(&init());
    client.open("session", 0, &[]);
    assert!(client.farewell().contains("while keys are exchanged"));
}

#[test]
fn what_was_sent_for_a_method_that_was_not_agreed_on_is_dropped_whatever_it_is() {
    let server = Server::start(&[]);
    for number in [ECDH_INIT, 34, 49] {
        let mut client = Client::connect(server.address);
        let init = Client::kexinit(&format!("some-other-method,{STRICT}"), true);
        client.send(&init);
        client.send(&[number, 1, 2, 3]);
        client.finish_exchange(init, true);
        assert!(client.is_alive());
        let mut second = Client::connect(server.address);
        second.send(&Client::kexinit(
            &format!("some-other-method,{STRICT}"),
            true,
        ));
        for _ in 0..2 {
            second.send(&[number, 1, 2, 3]);
        }
        assert!(!second.farewell().is_empty(), "only one of them");
    }
}

#[test]
fn a_key_share_that_gives_the_secret_away_or_has_the_wrong_length_is_refused() {
    let server = Server::start(&[]);
    let hybrid = "mlkem768x25519-sha256";
    let order_eight = {
        let mut point = [0; 32];
        point[0] = 1;
        point.to_vec()
    };
    let shares = [
        (CURVE, vec![0; 32]),
        (CURVE, order_eight),
        (CURVE, vec![9; 31]),
        (CURVE, vec![9; 33]),
        (CURVE, Vec::new()),
        (hybrid, vec![9; 32]),
        (hybrid, vec![0; 1184 + 32]),
        (hybrid, vec![0xff; 1184 + 32]),
        (hybrid, vec![1; 1184 + 33]),
    ];
    for (exchange, share) in shares {
        let mut client = Client::connect(server.address);
        client.send(&Client::kexinit(exchange, false));
        let mut init = message(ECDH_INIT);
        init.put_string(&share);
        client.send(&init);
        assert_eq!(client.farewell(), "the key share is not valid");
    }
}

#[test]
fn without_an_algorithm_in_common_the_server_says_what_it_has() {
    let server = Server::start(&[]);
    for exchanges in [
        "diffie-hellman-group14-sha1",
        "",
        "kex-strict-s-v00@openssh.com",
    ] {
        let mut client = Client::connect(server.address);
        client.send(&Client::kexinit(exchanges, false));
        let why = client.farewell();
        assert!(why.contains("no key exchange in common"), "{why}");
    }
}

#[test]
fn a_packet_whose_length_or_padding_is_impossible_ends_the_connection() {
    let server = Server::start(&[]);
    let good = Client::kexinit(STRICT, false);
    for (length, padding, why) in [
        (0, 0, "length"),
        (4, 1, "length"),
        (13, 4, "length"),
        (u32::MAX, 4, "length"),
        (35_004, 4, "length"),
        (12, 3, "padding"),
        (12, 11, "padding"),
        (12, 255, "padding"),
    ] {
        let mut client = Client::connect(server.address);
        client.send_raw(&packet(length, padding, &good));
        let said = client.farewell();
        assert!(said.contains(why), "{length} {padding}: {said}");
    }
}

#[test]
fn a_login_is_needed_before_anything_else_and_its_service_before_that() {
    let server = Server::start(&[]);
    let mut hasty = Client::connect(server.address);
    hasty.exchange(STRICT);
    hasty.send(&hasty.signed_request(&key(&server), &hasty.session.clone()));
    assert_eq!(hasty.farewell(), "ask for the service first");
    for number in 80..=100u8 {
        let mut client = Client::connect(server.address);
        client.exchange(STRICT);
        client.ask_for_service("ssh-userauth");
        let mut request = message(number);
        request.put_string(b"session");
        request.put_raw(&[0; 64]);
        client.send(&request);
        assert_eq!(client.farewell(), "log in first", "{number}");
    }
    for service in ["ssh-connection", "", "nonsense"] {
        let mut client = Client::connect(server.address);
        client.exchange(STRICT);
        client.ask_for_service(service);
        assert_eq!(client.farewell(), "there is no such service");
    }
}

#[test]
fn a_signature_counts_for_its_own_connection_key_user_and_algorithm_only() {
    let server = Server::start(&[]);
    let key = key(&server);
    let mut client = Client::connect(server.address);
    client.exchange(STRICT);
    client.ask_for_service("ssh-userauth");
    let own = client.session.clone();
    let valid = client.signed_request(&key, &own);
    let tail = valid.len() - 1;
    let mut forged: Vec<Vec<u8>> = vec![
        // Of another connection; and of this one with a byte changed: in the user's name, in the signature.
        client.signed_request(&key, &[0; 32]),
        valid
            .iter()
            .enumerate()
            .map(|(at, byte)| byte ^ u8::from(at == 7))
            .collect(),
        valid
            .iter()
            .enumerate()
            .map(|(at, byte)| byte ^ u8::from(at == tail))
            .collect(),
    ];
    // The right signature, said to be by other algorithms.
    for algorithm in ["ssh-rsa", "rsa-sha2-256", "ecdsa-sha2-nistp256", "none", ""] {
        let mut request = Client::request("root", algorithm, key.public(), true);
        request.put_string(&key.sign(&request));
        forged.push(request);
    }
    for request in forged {
        client.send(&request);
        assert_eq!(
            client.receive_one_of(&[FAILURE, 52, 1]).unwrap()[0],
            FAILURE
        );
    }
    client.send(&valid);
    assert_eq!(client.receive().as_deref(), Some(SUCCESS));
    // After that, requests to log in are ignored (RFC 4252 §5.1), good ones and bad ones.
    client.send(&valid);
    assert!(client.is_alive());
}

#[test]
fn an_rsa_key_signs_with_sha_2_and_never_with_sha_1() {
    let server = Server::start(&[]);
    let path = server.directory.file("rsa");
    make_key(&path, &["-t", "rsa", "-b", "2048"]);
    fs::copy(
        path.with_extension("pub"),
        server.directory.file("authorized"),
    )
    .unwrap();
    let identity = format!("IdentityFile={}", path.display());
    for (algorithm, code) in [("ssh-rsa", 255), ("rsa-sha2-256", 0), ("rsa-sha2-512", 0)] {
        let algorithms = format!("PubkeyAcceptedAlgorithms={algorithm}");
        let output = server
            .ssh(&["-o", &identity, "-o", &algorithms])
            .arg("true")
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(code), "{algorithm}");
    }
}

#[test]
fn a_request_with_something_behind_its_end_is_malformed() {
    let server = Server::start(&[]);
    let mut client = Client::connect(server.address);
    client.exchange(STRICT);
    client.ask_for_service("ssh-userauth");
    let mut request = client.signed_request(&key(&server), &client.session.clone());
    request.push(0);
    client.send(&request);
    assert_eq!(client.farewell(), "a message is malformed");
}

#[test]
fn attempts_to_log_in_and_questions_about_keys_are_counted() {
    let server = Server::start(&[]);
    let known = key(&server);
    for (blob, most) in [(b"no key".as_slice(), 30), (known.public(), 60)] {
        let mut client = Client::connect(server.address);
        client.exchange(STRICT);
        client.ask_for_service("ssh-userauth");
        let mut answers = 0;
        while let Some(answer) = {
            client.send(&Client::request("root", "ssh-ed25519", blob, false));
            client.receive_one_of(&[FAILURE, WOULD_DO, 1])
        } {
            if answer[0] == 1 {
                break;
            }
            answers += 1;
        }
        assert_eq!(answers, most);
    }
}

#[test]
fn strangers_take_no_places_of_users_and_the_oldest_goes_when_there_are_too_many() {
    let server = Server::start(&[]);
    let key = key(&server);
    let mut user = Client::logged_in(server.address, &key);
    let mut strangers: Vec<Client> = (0..64).map(|_| Client::connect(server.address)).collect();
    assert!(server.run("true").status.success());
    assert!(user.is_alive());
    // The login was one too many for a moment.
    assert_eq!(strangers[0].receive_one_of(&[1]), None);
    strangers[1].exchange(STRICT);
    strangers[1].log_in(&key);
    assert!(strangers[1].is_alive());
}

#[test]
fn a_channel_can_only_be_confirmed_or_refused_by_who_was_asked_for_it() {
    let server = Server::start(&[]);
    let key = key(&server);
    for number in [91u8, 92] {
        let mut client = Client::logged_in(server.address, &key);
        let mut details = Vec::new();
        // An address that never answers: the channel is being opened for a while.
        details.put_string(b"192.0.2.1");
        details.put_u32(9);
        details.put_string(b"127.0.0.1");
        details.put_u32(1);
        client.open("direct-tcpip", 5, &details);
        let mut answer = message(number);
        for value in [0u32, 5, 1 << 20, 1 << 15] {
            answer.put_u32(value);
        }
        client.send(&answer);
        let why = client.farewell();
        // Where there is no route the channel was refused before that.
        assert!(
            why.contains("nobody asked") || why.contains("doesn't exist"),
            "{why}"
        );
    }
}

#[test]
fn more_data_than_the_window_and_channels_that_are_not_there_end_the_connection() {
    let server = Server::start(&[]);
    let key = key(&server);
    let mut flood = Client::logged_in(server.address, &key);
    flood.open("session", 0, &[]);
    assert_eq!(flood.receive_one_of(&[91, 92]).unwrap()[0], 91);
    let mut data = message(94);
    data.put_u32(0);
    data.put_string(&vec![0; 32 * 1024]);
    // Nothing was started that could take it.
    for _ in 0..129 {
        flood.send(&data);
    }
    assert!(flood.farewell().contains("window"));
    for number in 93..=98u8 {
        let mut client = Client::logged_in(server.address, &key);
        let mut stray = message(number);
        stray.put_u32(77);
        stray.put_string(b"");
        client.send(&stray);
        assert!(!client.farewell().is_empty(), "{number}");
    }
}

#[test]
fn unknown_messages_are_answered_as_such_and_unknown_requests_fail() {
    let server = Server::start(&[]);
    let mut client = Client::logged_in(server.address, &key(&server));
    client.send(&[99, 0, 0, 0, 0]);
    assert!(!client.farewell().is_empty());
    let mut client = Client::logged_in(server.address, &key(&server));
    for number in [60u8, 79, 150, 255] {
        client.send(&[number]);
        assert_eq!(
            client.receive_one_of(&[UNIMPLEMENTED, 1]).unwrap()[0],
            UNIMPLEMENTED
        );
    }
    for name in ["nonsense", "hostkeys-prove-00@openssh.com"] {
        let mut request = message(80);
        request.put_string(name.as_bytes());
        request.put_bool(true);
        client.send(&request);
        assert_eq!(client.receive(), Some(vec![82]));
    }
}

#[test]
fn new_keys_are_asked_for_once_the_present_ones_were_used_enough() {
    let server = Server::start(&["--rekey-bytes", "65536"]);
    let mut client = Client::logged_in(server.address, &key(&server));
    let mut ping = message(192);
    ping.put_string(&[0; 4096]);
    let mut pongs = 0;
    loop {
        client.send(&ping);
        if client.receive_one_of(&[193, KEXINIT]).unwrap()[0] == KEXINIT {
            break;
        }
        pongs += 1;
        assert!(pongs < 16, "new keys are overdue");
    }
}

#[test]
fn what_clients_send_never_begins_a_line_of_the_log() {
    let server = Server::start(&[]);
    let mut client = Client::logged_in(server.address, &key(&server));
    let mut request = message(80);
    request.put_string(b"tcpip-forward");
    request.put_bool(true);
    request.put_string("evil\ntunnel-sshd: forged\x1b[2J".as_bytes());
    request.put_u32(0);
    client.send(&request);
    assert_eq!(client.receive(), Some(vec![82]));
    let log = server.log_with(&["forged"]);
    assert!(!log.contains('\x1b'));
    assert!(
        log.lines()
            .all(|line| !line.starts_with("tunnel-sshd: forged")),
        "{log}"
    );
}

#[test]
fn a_socket_of_a_remote_forward_is_for_this_user_alone() {
    use std::os::unix::fs::PermissionsExt;
    let server = Server::start(&[]);
    let mut client = Client::logged_in(server.address, &key(&server));
    let path = server.directory.text("forwarded");
    let mut request = message(80);
    request.put_string(b"streamlocal-forward@openssh.com");
    request.put_bool(true);
    request.put_string(path.as_bytes());
    client.send(&request);
    assert_eq!(client.receive(), Some(vec![81]));
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn extensions_are_told_once_and_name_no_weak_signature() {
    let server = Server::start(&[]);
    let mut client = Client::connect(server.address);
    let offered = format!("{STRICT},ext-info-c");
    client.exchange(&offered);
    let told = client.receive().unwrap();
    assert_eq!(told[0], 7);
    let mut reader = Reader::new(&told[5..]);
    assert_eq!(reader.text(), Ok("server-sig-algs"));
    let algorithms = reader.text().unwrap();
    assert!(
        algorithms
            .split(',')
            .all(|name| name != "ssh-rsa" && name != "ssh-dss")
    );
    client.exchange(&offered);
    client.ask_for_service("ssh-userauth");
    assert_eq!(client.receive().unwrap()[0], 6);
}

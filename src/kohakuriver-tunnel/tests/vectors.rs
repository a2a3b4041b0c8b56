//! The shared golden vectors, and the reader on bytes that are cut anywhere.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use kohakuriver_tunnel::backoff::{Backoff, Next};
use kohakuriver_tunnel::errors;
use kohakuriver_tunnel::flow::{Budget, ReceiveWindow};
use kohakuriver_tunnel::frame::{ClientHeader, mask, opcode};
use kohakuriver_tunnel::message::{Item, Reader};
use kohakuriver_tunnel::protocol::{HEADER, Header, MAX_RECEIVED, MAX_SENT, Violation, limit};
use kohakuriver_tunnel::settings::Settings;
use proptest::prelude::*;
use serde_json::Value;

/// How the vectors mark a WebSocket control frame among messages.
const CONTROL: u64 = 0x100;

fn vectors(name: &str) -> Vec<Value> {
    let folder = std::env::var_os("KOHAKURIVER_VECTORS").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../tests/vectors"),
        PathBuf::from,
    );
    let path = folder.join(name);
    let text = std::fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let vectors: Vec<Value> = serde_json::from_str(&text).expect("a list of vectors");
    assert!(!vectors.is_empty());
    vectors
}

fn bytes(value: &Value) -> Vec<u8> {
    let hex = value.as_str().expect("hex digits");
    (0..hex.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap())
        .collect()
}

fn number(value: &Value) -> u64 {
    value.as_u64().expect("a number")
}

fn repeated(value: &Value) -> Vec<u8> {
    if value.is_null() {
        Vec::new()
    } else {
        bytes(&value["hex"]).repeat(number(&value["count"]) as usize)
    }
}

fn key(vector: &Value) -> [u8; 4] {
    bytes(&vector["key"]).try_into().unwrap()
}

/// A message as the vectors write it: type, proto, id, port, payload.
type Plain = (u64, u8, u32, u16, Vec<u8>);

/// What a reader makes of pieces of bytes. Runs of a stream's bytes are joined, as where they are
/// cut is not part of any promise.
#[derive(Default)]
struct Collected {
    messages: Vec<Plain>,
    violation: Option<Violation>,
}

fn collect<'a>(longest: u64, pieces: impl IntoIterator<Item = &'a [u8]>) -> Collected {
    let mut reader = Reader::new(longest);
    let mut all = Collected::default();
    for mut piece in pieces {
        loop {
            match reader.next(&mut piece) {
                Ok(None) => break,
                Ok(Some(item)) => add(&mut all.messages, item),
                Err(violation) => {
                    all.violation = Some(violation);
                    return all;
                }
            }
        }
        assert!(piece.is_empty());
    }
    all
}

fn add(messages: &mut Vec<Plain>, item: Item<'_>) {
    match item {
        Item::Message { header, payload } => {
            messages.push((
                header.kind.into(),
                header.proto,
                header.id,
                header.port,
                payload.into_owned(),
            ));
        }
        Item::Control { opcode, payload } => {
            messages.push((
                CONTROL | u64::from(opcode),
                0,
                0,
                0,
                payload.as_slice().to_vec(),
            ));
        }
        Item::Bytes { id, bytes } => {
            let same = |message: &&mut Plain| message.0 == 3 && message.1 == 0 && message.2 == id;
            match messages.iter_mut().rev().find(same) {
                Some(message) => message.4.extend_from_slice(bytes),
                None => messages.push((3, 0, id, 0, bytes.to_vec())),
            }
        }
    }
}

/// A message's order among others is when it ends; a stream's bytes go out when they come.
fn sorted(mut messages: Vec<Plain>) -> Vec<Plain> {
    messages.sort();
    messages
}

#[test]
fn headers_are_packed_and_unpacked_as_the_vectors_say() {
    for vector in vectors("header.json") {
        let header = Header {
            kind: number(&vector["type"]) as u8,
            proto: number(&vector["proto"]) as u8,
            id: number(&vector["client_id"]) as u32,
            port: number(&vector["port"]) as u16,
        };
        let packed: [u8; HEADER] = bytes(&vector["hex"]).try_into().unwrap();
        assert_eq!(header.pack(), packed, "{}", vector["name"]);
        assert_eq!(Header::unpack(packed), header, "{}", vector["name"]);
    }
}

#[test]
fn a_client_builds_the_masked_frames_of_the_vectors() {
    let mut built = 0;
    for vector in vectors("frames.json")
        .iter()
        .filter(|vector| vector["masked"] == true)
    {
        let mut payload = bytes(&vector["payload_hex"]);
        payload.extend(repeated(&vector["payload_repeat"]));
        let mut expected = bytes(&vector["hex"]);
        expected.extend(repeated(&vector["then_repeat"]));
        let opcode = number(&vector["opcode"]) as u8;
        let mut frame = ClientHeader::new(opcode, payload.len(), key(vector))
            .as_slice()
            .to_vec();
        mask(&mut payload, key(vector));
        frame.extend(payload);
        assert!(frame == expected, "{}", vector["name"]);
        built += 1;
    }
    assert!(built > 0);
}

#[test]
fn a_client_builds_and_reads_the_messages_of_the_vectors() {
    for vector in vectors("messages.json") {
        let [kind, proto, id, port] =
            ["type", "proto", "client_id", "port"].map(|field| number(&vector[field]));
        let header = Header {
            kind: kind as u8,
            proto: proto as u8,
            id: id as u32,
            port: port as u16,
        };
        let payload = bytes(&vector["payload_hex"]);
        let mut body = [&header.pack()[..], &payload].concat();
        let head = ClientHeader::new(opcode::BINARY, body.len(), key(&vector));
        mask(&mut body, key(&vector));
        assert_eq!(
            [head.as_slice(), &body].concat(),
            bytes(&vector["masked_hex"]),
            "{}",
            vector["name"]
        );

        let read = collect(MAX_RECEIVED, [&bytes(&vector["hex"])[..]]);
        assert_eq!(read.violation, None);
        if kind != 3 || proto != 0 {
            assert_eq!(
                read.messages,
                [(kind, proto as u8, id as u32, port as u16, payload)],
                "{}",
                vector["name"]
            );
        }
    }
}

#[test]
fn sequences_come_out_the_same_however_they_are_cut() {
    for vector in vectors("sequences.json")
        .iter()
        .filter(|vector| vector["masked"] == false)
    {
        let expected: Vec<Plain> = vector["messages"]
            .as_array()
            .unwrap()
            .iter()
            .map(plain)
            .collect();
        let input = bytes(&vector["hex"]);
        for size in 1..=input.len() {
            let read = collect(MAX_RECEIVED, input.chunks(size));
            assert_eq!(read.violation, None, "{} by {size}", vector["name"]);
            assert_eq!(
                sorted(read.messages),
                sorted(expected.clone()),
                "{} by {size}",
                vector["name"]
            );
        }
    }
}

fn plain(message: &Value) -> Plain {
    let [kind, proto, id, port] =
        ["type", "proto", "client_id", "port"].map(|field| number(&message[field]));
    (
        kind,
        proto as u8,
        id as u32,
        port as u16,
        bytes(&message["payload_hex"]),
    )
}

#[test]
fn violations_close_with_the_code_that_they_are_owed() {
    for vector in vectors("violations.json")
        .iter()
        .filter(|vector| vector["masked"] == false && vector["allow_text"] == false)
    {
        let input = bytes(&vector["hex"]);
        for size in [1, 2, 3, input.len()] {
            let read = collect(number(&vector["max_message"]), input.chunks(size));
            let code = read.violation.map(|violation| u64::from(violation.code));
            assert_eq!(
                code,
                Some(number(&vector["code"])),
                "{} by {size}",
                vector["name"]
            );
        }
    }
}

fn server_frame(opcode: u8, fin: bool, payload: &[u8]) -> Vec<u8> {
    let mut frame = vec![u8::from(fin) << 7 | opcode];
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

proptest! {
    #[test]
    fn a_message_survives_any_fragments_and_any_cuts(
        payload in prop::collection::vec(any::<u8>(), 0..2000),
        kind in any::<u8>(),
        proto in any::<u8>(),
        id in any::<u32>(),
        fragment in 1usize..700,
        cut in 1usize..900,
    ) {
        let header = Header { kind, proto, id, port: 80 };
        let message = [&header.pack()[..], &payload].concat();
        let count = message.chunks(fragment).len();
        let mut input = Vec::new();
        for (index, piece) in message.chunks(fragment).enumerate() {
            let opcode = if index == 0 { opcode::BINARY } else { opcode::CONTINUATION };
            input.extend(server_frame(opcode, index + 1 == count, piece));
            input.extend(server_frame(opcode::PONG, true, b"between"));
        }
        let read = collect(MAX_RECEIVED, input.chunks(cut));
        prop_assert_eq!(read.violation, None);
        let messages: Vec<_> = read.messages.into_iter().filter(|message| message.0 < CONTROL).collect();
        if kind == 3 && proto == 0 {
            let got: Vec<u8> = messages.into_iter().flat_map(|message| message.4).collect();
            prop_assert_eq!(got, payload);
        } else {
            prop_assert_eq!(messages, vec![(kind.into(), proto, id, 80, payload)]);
        }
    }

    #[test]
    fn garbage_ends_in_a_documented_code_wherever_it_is_cut(
        input in prop::collection::vec(any::<u8>(), 0..600),
        cut in 1usize..50,
    ) {
        let whole = collect(MAX_RECEIVED, [&input[..]]);
        let pieces = collect(MAX_RECEIVED, input.chunks(cut));
        prop_assert_eq!(whole.violation, pieces.violation);
        prop_assert_eq!(sorted(whole.messages), sorted(pieces.messages));
        if let Some(violation) = whole.violation {
            prop_assert!([1002, 1003, 1009].contains(&violation.code));
        }
    }

    #[test]
    fn broken_streams_end_in_a_documented_code_wherever_they_are_cut(
        messages in prop::collection::vec((any::<[u8; 8]>(), 0usize..300, 1usize..200, 0u8..16), 1..8),
        wrong in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0u8..3), 0..4),
        cut in 1usize..400,
        longest in prop::sample::select(vec![64, 1000, MAX_RECEIVED]),
    ) {
        let mut input = Vec::new();
        for (head, length, fragment, control) in messages {
            let message = [&head[..], &vec![head[2]; length]].concat();
            let count = message.chunks(fragment).len();
            for (index, piece) in message.chunks(fragment).enumerate() {
                let opcode = if index == 0 { opcode::BINARY } else { opcode::CONTINUATION };
                input.extend(server_frame(opcode, index + 1 == count, piece));
                if control >= 8 {
                    input.extend(server_frame(control.min(opcode::PONG), true, b"ab"));
                }
            }
        }
        for (at, byte, how) in wrong {
            let at = at.index(input.len());
            match how {
                0 => input[at] = byte,
                1 => input.insert(at, byte),
                _ if input.len() > 1 => drop(input.remove(at)),
                _ => {}
            }
        }
        let whole = collect(longest, [&input[..]]);
        let pieces = collect(longest, input.chunks(cut));
        prop_assert_eq!(whole.violation, pieces.violation);
        prop_assert_eq!(sorted(whole.messages), sorted(pieces.messages));
        if let Some(violation) = whole.violation {
            prop_assert!([1002, 1003, 1009].contains(&violation.code));
            prop_assert!(!violation.reason.is_empty());
        }
    }

    #[test]
    fn a_message_of_any_kind_holds_no_more_than_may_be_sent(
        kind in any::<u8>(),
        proto in any::<u8>(),
        length in prop::sample::select(vec![MAX_SENT - 8, MAX_SENT, MAX_SENT + 1, 3 * MAX_SENT]),
        cut in 1000usize..300_000,
    ) {
        let header = Header { kind, proto, id: 7, port: 0 };
        let frame = server_frame(opcode::BINARY, true, &[&header.pack()[..], &vec![1; length]].concat());
        let mut reader = Reader::default();
        let mut bytes = 0;
        for mut piece in frame.chunks(cut) {
            while let Some(item) = reader.next(&mut piece).unwrap() {
                match item {
                    Item::Bytes { bytes: some, .. } => bytes += some.len(),
                    Item::Message { payload, .. } => {
                        prop_assert!(payload.len() <= MAX_SENT);
                        bytes += payload.len();
                    }
                    Item::Control { .. } => prop_assert!(false, "there is no control frame in it"),
                }
            }
        }
        prop_assert_eq!(bytes, if kind == 3 && proto == 0 { length } else { length.min(MAX_SENT) });
    }

    #[test]
    fn a_header_is_what_was_packed(bytes in any::<[u8; 8]>(), kind in any::<u8>(), id in any::<u32>(), port in any::<u16>()) {
        prop_assert_eq!(Header::unpack(bytes).pack(), bytes);
        let header = Header { kind, proto: bytes[0], id, port };
        prop_assert_eq!(Header::unpack(header.pack()), header);
    }

    #[test]
    fn a_limit_is_a_u64_and_nothing_else(bytes in prop::collection::vec(any::<u8>(), 0..12), number in any::<u64>()) {
        prop_assert_eq!(limit(&number.to_be_bytes()), Some(number));
        prop_assert_eq!(limit(&bytes).is_some(), bytes.len() == 8);
    }

    #[test]
    fn masking_twice_changes_nothing(bytes in prop::collection::vec(any::<u8>(), 0..200), key in any::<[u8; 4]>()) {
        let mut masked = bytes.clone();
        mask(&mut masked, key);
        for (at, byte) in masked.iter().enumerate() {
            prop_assert_eq!(*byte, bytes[at] ^ key[at % 4]);
        }
        mask(&mut masked, key);
        prop_assert_eq!(masked, bytes);
    }
}

#[test]
fn windows_are_granted_as_the_vectors_say() {
    for vector in vectors("windows.json") {
        let mut budget = Budget::new(&Settings {
            budget: number(&vector["total"]),
            first_window: number(&vector["first"]),
            max_window: number(&vector["cap"]),
            ..Settings::default()
        });
        let (mut streams, start) = (HashMap::new(), Instant::now());
        for (index, event) in vector["events"].as_array().unwrap().iter().enumerate() {
            let what = format!("{}, event {index}: {event}", vector["name"]);
            play(event, &mut budget, &mut streams, start, &what);
            assert_eq!(budget.left(), number(&event["left"]), "{what}");
        }
    }
}

fn play(
    event: &Value,
    budget: &mut Budget,
    streams: &mut HashMap<u64, ReceiveWindow>,
    start: Instant,
    what: &str,
) {
    let size = || number(&event["size"]) as usize;
    let at = || start + Duration::from_micros(number(&event["at"]));
    let kind = event["do"].as_str().unwrap();
    if kind == "shared" {
        budget.shared = event["value"].as_bool().unwrap();
        return;
    }
    let id = number(&event["stream"]);
    if kind == "open" {
        let mut opener = [0; 12];
        opener[..8].copy_from_slice(&number(&event["opener"]).to_be_bytes());
        let inbound = ReceiveWindow::new(budget, Some(&opener));
        assert_eq!(inbound.granted(), number(&event["limit"]), "{what}");
        streams.insert(id, inbound);
        return;
    }
    let inbound = streams.get_mut(&id).unwrap();
    match kind {
        "recv" => {
            let ok = inbound.receive(size()).is_ok();
            assert_eq!(Value::from(ok), event["ok"], "{what}");
            assert_eq!(
                Value::from(ok && inbound.wants_ping(at())),
                event["ping"],
                "{what}"
            );
        }
        "consume" => assert_eq!(
            Value::from(inbound.consume(size(), budget)),
            event["limit"],
            "{what}"
        ),
        "pong" => assert_eq!(
            Value::from(inbound.pong(at(), budget)),
            event["limit"],
            "{what}"
        ),
        "close" | "detach" => inbound.close(budget),
        "attach" => {
            inbound.attach(budget);
            assert_eq!(Value::from(inbound.granted()), event["limit"], "{what}");
        }
        other => panic!("no such event: {other}"),
    }
}

#[test]
fn a_tunnel_is_tried_again_as_the_vectors_say() {
    for vector in vectors("reconnect.json") {
        let most = number(&vector["max"]) as u32;
        let mut backoff = Backoff {
            failures: number(&vector["failures"]) as u32,
            longest: Duration::from_secs_f64(vector["delay"].as_f64().unwrap()),
            most: (most > 0).then_some(most),
            returns: vector["mode"] == "run",
        };
        let lived = vector["lived"].as_f64().map(Duration::from_secs_f64);
        let next = backoff.next(lived, vector["code"].as_u64().map(|code| code as u16));
        let then = &vector["then"];
        match next {
            Next::Pause(bounds) => {
                let seconds = bounds.map(|bound| bound.as_secs_f64());
                assert_eq!(Value::from(&seconds[..]), then["pause"], "{vector}");
                assert_eq!(Value::from(backoff.failures), then["failures"], "{vector}");
            }
            Next::Replaced => assert_eq!(then["end"], "replaced", "{vector}"),
            Next::GaveUp => assert_eq!(then["end"], "gave_up", "{vector}"),
        }
    }
}

#[test]
fn errors_have_the_texts_of_the_vectors() {
    let errnos = HashMap::from([
        ("ECONNREFUSED", libc::ECONNREFUSED),
        ("ETIMEDOUT", libc::ETIMEDOUT),
        ("ECONNRESET", libc::ECONNRESET),
        ("EPIPE", libc::EPIPE),
        ("EMFILE", libc::EMFILE),
        ("ENFILE", libc::ENFILE),
        ("EHOSTUNREACH", libc::EHOSTUNREACH),
        ("ENETUNREACH", libc::ENETUNREACH),
        ("EADDRNOTAVAIL", libc::EADDRNOTAVAIL),
        ("EPROTO", libc::EPROTO),
        ("EPROTONOSUPPORT", libc::EPROTONOSUPPORT),
        ("ENOBUFS", libc::ENOBUFS),
        ("ENOMEM", libc::ENOMEM),
        ("EACCES", libc::EACCES),
        ("ENOTDIR", libc::ENOTDIR),
    ]);
    for vector in vectors("errors.json") {
        let errno = errnos[vector["errno"].as_str().unwrap()];
        let error = std::io::Error::from_raw_os_error(errno);
        assert_eq!(
            errors::text(&error, number(&vector["port"]) as u16),
            vector["text"]
        );
    }
}

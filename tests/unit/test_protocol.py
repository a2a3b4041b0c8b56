"""Builders and parsers of the tunnel's messages, beside the golden vectors."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kohakuriver._frame import FrameViolation, build_frame
from kohakuriver.tunnel import protocol
from tests.vectors import generate

VECTORS = json.loads((generate.HERE / "messages.json").read_text(encoding="utf-8"))
PORTS = json.loads((generate.HERE / "ports.json").read_text(encoding="utf-8"))
ports_by_name = pytest.mark.parametrize("vector", PORTS, ids=[vector["name"] for vector in PORTS])
by_name = pytest.mark.parametrize("vector", VECTORS, ids=[vector["name"] for vector in VECTORS])


def payload_of(fields: dict[str, Any]) -> bytes:
    """What production puts into a message of these fields."""
    if "message" in fields:
        return protocol.ErrorText(fields["code"], fields["message"]).pack()
    if fields.get("limit") is not None:
        return protocol.pack_limit(fields["limit"])
    return bytes.fromhex(fields.get("data_hex", "")) or fields.get("reason", "").encode()


@by_name
def test_a_message_has_the_golden_bytes(vector: dict[str, Any]) -> None:
    about = vector["type"], vector["proto"], vector["client_id"], vector["port"]
    payload = payload_of(vector["fields"])
    assert payload.hex() == vector["payload_hex"]
    assert build_frame(*about, payload).hex() == vector["hex"]
    assert build_frame(*about, payload, int(vector["key"], 16)).hex() == vector["masked_hex"]


@by_name
def test_a_golden_payload_is_read(vector: dict[str, Any]) -> None:
    payload, fields = bytes.fromhex(vector["payload_hex"]), vector["fields"]
    if "limit" in fields:
        assert protocol.parse_limit(payload) == fields["limit"]
    if "message" in fields:
        assert protocol.ErrorText.parse(payload) == (fields["code"], fields["message"])


@pytest.mark.parametrize("name", generate.TYPES)
def test_type_numbers_are_the_vectors(name: str) -> None:
    assert getattr(protocol, name) == generate.TYPES[name]


@given(
    limit=st.integers(0, 2**64 - 1),
    hold=st.integers(0, 2**32 - 1),
    before=st.sampled_from([b"", b"m" * protocol.MARK]),
    start=st.binary(max_size=20),
)
def test_a_runner_puts_its_mark_into_a_connect_and_changes_nothing_else(
    limit: int, hold: int, before: bytes, start: bytes
) -> None:
    mark, key = b"M" * protocol.MARK, b"k" * protocol.KEY
    opening = protocol.Opening(limit, key, hold, 3, before)
    assert protocol.mark_opening(opening.pack(), mark) == (opening._replace(mark=mark).pack(), b"")
    terminal = protocol.Opening(limit, key, hold, 3, b"m" * protocol.MARK, start)
    marked = terminal._replace(mark=mark).pack()
    assert protocol.mark_opening(terminal.pack(), mark, protocol.PROTO_TERMINAL) == (marked, start)


@pytest.mark.parametrize("proto", [protocol.PROTO_TCP, protocol.PROTO_TERMINAL])
def test_a_connect_of_another_length_gets_no_mark_and_is_not_read(proto: int) -> None:
    full = protocol.Opening(1, bytes(protocol.KEY), 2, 0, bytes(protocol.MARK)).pack()
    for size in range(len(full) + 2):
        payload = full[:size] + bytes(max(0, size - len(full)))
        marked = protocol.mark_opening(payload, bytes(protocol.MARK), proto)
        assert (marked is None) == (protocol.Opening.parse(payload, proto) is None)
        assert proto == protocol.PROTO_TCP or (marked is None) == (size < len(full))
    assert protocol.mark_opening(full[: -protocol.MARK], bytes(protocol.MARK), proto) == (
        (full, b"") if proto == protocol.PROTO_TCP else None
    )


@given(offset=st.integers(0, 2**64 - 1), received=st.integers(0, 2**64 - 1))
def test_two_numbers_survive_and_no_other_length_is_read(offset: int, received: int) -> None:
    payload = protocol.pack_pair(offset, received)
    assert protocol.parse_pair(memoryview(payload)) == (offset, received)
    assert protocol.parse_pair(payload[:-1]) is None
    assert protocol.parse_pair(payload + b"x") is None


@given(limit=st.integers(0, 2**64 - 1))
def test_every_limit_survives(limit: int) -> None:
    assert protocol.parse_limit(memoryview(protocol.pack_limit(limit))) == limit


@pytest.mark.parametrize("limit", [-1, 2**64])
def test_a_limit_that_is_no_u64_is_refused(limit: int) -> None:
    with pytest.raises(struct.error):
        protocol.pack_limit(limit)


@pytest.mark.parametrize("size", [0, 7, 9])
def test_a_payload_of_another_size_holds_no_limit(size: int) -> None:
    assert protocol.parse_limit(bytes(size)) is None


@given(dropped=st.integers(0, 2**32), stalls=st.integers(0, 2**32))
def test_counts_survive_and_no_more_than_can_be_true_is_believed(dropped: int, stalls: int) -> None:
    counts = protocol.Counts(dropped, stalls)
    assert protocol.Counts.parse(counts.pack()) == counts
    assert protocol.Counts.parse(protocol.Counts(2**64 - 1, 0).pack()) == (2**32, 0)


@pytest.mark.parametrize("payload", [b"", b"cnt1", b"cnt2" + bytes(16), b"cnt1" + bytes(17)])
def test_any_other_ping_tells_no_counts(payload: bytes) -> None:
    assert protocol.Counts.parse(payload) is None


@ports_by_name
def test_a_question_for_ports_and_its_answer_are_read_as_the_vectors_say(vector: dict[str, Any]) -> None:
    payload, fields = bytes.fromhex(vector["hex"]), vector["fields"]
    question, read = protocol.PortsQuestion.parse(payload), protocol.PortsAnswer.parse(payload)
    if fields is None:
        assert (question if vector["what"] == "question" else read) is None
    elif vector["what"] == "question":
        assert question is not None
        assert tuple(question) == (fields["number"], fields["scope"], fields["mark"].encode())
        assert question.pack() == payload
    else:
        assert read is not None
        assert (read.number, read.more) == (fields["number"], fields["more"])
        told = [
            {"proto": p.proto, "port": p.port, "address": str(p.address), "program": p.program.decode()}
            for p in read.ports
        ]
        assert told == fields["ports"]
        assert read.pack() == payload


@given(payload=st.binary(max_size=200))
def test_any_bytes_are_an_answer_or_none_and_an_answer_is_what_it_was_read_from(payload: bytes) -> None:
    read = protocol.PortsAnswer.parse(payload)
    assert read is None or read.pack() == payload


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (b"", ("", "")),
        (b"ECONNREFUSED: nothing there", ("ECONNREFUSED", "nothing there")),
        (b"E: no code", ("", "E: no code")),
        (b"Error: old words", ("", "Error: old words")),
        (b"EPIPE:no space", ("", "EPIPE:no space")),
        (b"EIO: \xff", ("EIO", "\ufffd")),
    ],
)
def test_an_error_text_of_any_peer_is_read(payload: bytes, expected: tuple[str, str]) -> None:
    assert protocol.ErrorText.parse(payload) == expected


def close_payload(frame: bytes) -> bytes:
    assert frame[0] == 0x88
    assert frame[1] == len(frame) - 2
    return frame[2:]


@given(code=st.sampled_from([1000, 1001, 1002, 1008, 1011, 3000, 4000, 4999]), reason=st.text(max_size=200))
def test_a_close_frame_keeps_its_code_and_as_much_of_its_reason_as_fits(code: int, reason: str) -> None:
    payload = close_payload(protocol.ws_close(code, reason))
    got = protocol.parse_ws_close(payload)
    wanted = reason.encode("utf-8", "replace").decode()
    assert got.code == code
    assert wanted.startswith(got.reason)
    assert got.reason == wanted or len(payload) > 125 - 4


def test_a_close_frame_without_a_code_is_empty() -> None:
    assert close_payload(protocol.ws_close(protocol.CloseCode.NO_CODE)) == b""
    assert protocol.parse_ws_close(b"") == (protocol.CloseCode.NO_CODE, "")


@pytest.mark.parametrize("code", [0, 999, 1004, 1005, 1006, 1015, 2999, 5000, 65535])
def test_a_close_code_that_may_not_be_sent_owes_1002(code: int) -> None:
    with pytest.raises(FrameViolation) as raised:
        protocol.parse_ws_close(code.to_bytes(2, "big"))
    assert raised.value.code == 1002


def test_half_a_close_code_owes_1002() -> None:
    with pytest.raises(FrameViolation) as raised:
        protocol.parse_ws_close(b"\x03")
    assert raised.value.code == 1002


def test_a_close_reason_that_is_not_utf8_owes_1007() -> None:
    with pytest.raises(FrameViolation) as raised:
        protocol.parse_ws_close(b"\x03\xe8\xff")
    assert raised.value.code == 1007


def test_text_and_pings_are_whole_frames() -> None:
    assert protocol.ws_text("CONNECTED") == b"\x81\x09CONNECTED"
    assert protocol.ws_ping(b"x", 0x01020304) == b"\x89\x81\x01\x02\x03\x04" + bytes([ord("x") ^ 1])
    assert protocol.ws_pong(b"x") == b"\x8a\x01x"

"""Builders and parsers of the tunnel's messages, beside the golden vectors."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kohakuriver.tunnel import protocol
from tests.vectors import generate

VECTORS = json.loads((generate.HERE / "messages.json").read_text(encoding="utf-8"))

BUILDERS: dict[str, Callable[[dict[str, Any], dict[str, Any], int], bytes]] = {
    "CONNECT": lambda v, f, key: protocol.connect(v["client_id"], v["proto"], v["port"], f["limit"], key),
    "CONNECTED": lambda v, f, key: protocol.connected(v["client_id"], v["proto"], f["limit"], key),
    "DATA": lambda v, f, key: protocol.data(v["client_id"], v["proto"], bytes.fromhex(f["data_hex"]), key),
    "CLOSE": lambda v, f, key: protocol.close(v["client_id"], v["proto"], f["reason"], key),
    "ERROR": lambda v, f, key: protocol.error(v["client_id"], v["proto"], f["message"], f["code"], key),
    "PING": lambda v, f, key: protocol.ping(bytes.fromhex(f["data_hex"]), key),
    "PONG": lambda v, f, key: protocol.pong(bytes.fromhex(f["data_hex"]), key),
    "WINDOW": lambda v, f, key: protocol.window(v["client_id"], f["limit"], key),
    "EOF": lambda v, f, key: protocol.eof(v["client_id"], key),
}


@pytest.mark.parametrize("vector", VECTORS, ids=[vector["name"] for vector in VECTORS])
def test_builder_writes_the_golden_bytes(vector: dict[str, Any]) -> None:
    build = BUILDERS[vector["message"]]
    assert build(vector, vector["fields"], -1).hex() == vector["hex"]
    assert build(vector, vector["fields"], int(vector["key"], 16)).hex() == vector["masked_hex"]


@pytest.mark.parametrize("vector", VECTORS, ids=[vector["name"] for vector in VECTORS])
def test_parser_reads_the_golden_payload(vector: dict[str, Any]) -> None:
    payload, fields = bytes.fromhex(vector["payload_hex"]), vector["fields"]
    if fields.get("limit") is not None:
        assert protocol.parse_limit(payload) == fields["limit"]
    if "message" in fields:
        assert protocol.parse_error(payload) == (fields["code"], fields["message"])
    if "reason" in fields:
        assert protocol.parse_reason(payload) == fields["reason"]


@pytest.mark.parametrize("name", generate.TYPES)
def test_type_numbers_are_the_vectors(name: str) -> None:
    assert getattr(protocol, name) == generate.TYPES[name]


@given(limit=st.integers(0, 2**64 - 1))
def test_every_limit_survives(limit: int) -> None:
    frame = protocol.window(1, limit)
    assert protocol.parse_limit(memoryview(frame)[-8:]) == limit


@pytest.mark.parametrize("limit", [-1, 2**64])
def test_a_limit_that_is_no_u64_is_an_overflow(limit: int) -> None:
    with pytest.raises(OverflowError):
        protocol.window(1, limit)


def test_the_session_itself_has_no_window() -> None:
    with pytest.raises(ValueError):
        protocol.window(protocol.SESSION_ID, 1)


@pytest.mark.parametrize("size", [0, 7, 9])
def test_a_limit_of_another_size_owes_1002(size: int) -> None:
    with pytest.raises(protocol.FrameViolation) as raised:
        protocol.parse_limit(bytes(size))
    assert raised.value.code == 1002


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
    assert protocol.parse_error(payload) == expected


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
    with pytest.raises(protocol.FrameViolation) as raised:
        protocol.parse_ws_close(code.to_bytes(2, "big"))
    assert raised.value.code == 1002


def test_half_a_close_code_owes_1002() -> None:
    with pytest.raises(protocol.FrameViolation) as raised:
        protocol.parse_ws_close(b"\x03")
    assert raised.value.code == 1002


def test_a_close_reason_that_is_not_utf8_owes_1007() -> None:
    with pytest.raises(protocol.FrameViolation) as raised:
        protocol.parse_ws_close(b"\x03\xe8\xff")
    assert raised.value.code == 1007


def test_text_and_pings_are_whole_frames() -> None:
    assert protocol.ws_text("CONNECTED") == b"\x81\x09CONNECTED"
    assert protocol.ws_ping(b"x", 0x01020304) == b"\x89\x81\x01\x02\x03\x04" + bytes([ord("x") ^ 1])
    assert protocol.ws_pong(b"x") == b"\x8a\x01x"

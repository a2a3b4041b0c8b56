"""The golden vectors, against the extension and its plain twin."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.conformance.feeding import cut, walk_all
from tests.vectors import generate

Vector = dict[str, Any]


def vectors(name: str) -> pytest.MarkDecorator:
    loaded = json.loads((generate.HERE / name).read_text(encoding="utf-8"))
    return pytest.mark.parametrize("vector", loaded, ids=[vector["name"] for vector in loaded])


def payload_of(vector: Vector) -> bytes:
    repeat = vector.get("payload_repeat", {"hex": "", "count": 0})
    return bytes.fromhex(vector["payload_hex"]) + bytes.fromhex(repeat["hex"]) * int(repeat["count"])


def frame_of(vector: Vector) -> bytes:
    repeat = vector.get("then_repeat", {"hex": "", "count": 0})
    return bytes.fromhex(vector["hex"]) + bytes.fromhex(repeat["hex"]) * int(repeat["count"])


def splits(data: bytes) -> dict[str, list[int]]:
    return {"at once": [], "a byte at a time": [1] * len(data), "in threes": [3] * (len(data) // 3)}


@pytest.mark.parametrize("name", generate.FILES)
def test_committed_vectors_are_what_the_generator_writes(name: str) -> None:
    assert (generate.HERE / name).read_text(encoding="utf-8") == generate.text_of(name)


@vectors("header.json")
def test_header_vector_packs_and_unpacks(frame: Any, vector: Vector) -> None:
    fields = (vector["type"], vector["proto"], vector["client_id"], vector["port"])
    assert frame.pack_header(*fields).hex() == vector["hex"]
    assert frame.unpack_header(b"\xff" + bytes.fromhex(vector["hex"]) + b"\xff", 1) == fields


@vectors("frames.json")
def test_frame_vector_is_built(frame: Any, vector: Vector) -> None:
    key = int(vector["key"], 16) if vector["masked"] else -1
    assert frame.build_ws(vector["opcode"], payload_of(vector), key) == frame_of(vector)


@vectors("frames.json")
def test_frame_vector_is_walked(frame: Any, vector: Vector) -> None:
    joined, code = walk_all(frame, [frame_of(vector)], masked=vector["masked"], allow_text=True)
    assert code is None
    payload = payload_of(vector)
    if vector["opcode"] == 2:
        assert joined.whole == [(*frame.unpack_header(payload), payload[8:])]
    else:
        assert joined.whole == [(0x100 + vector["opcode"], 0, 0, 0, payload)]


@vectors("messages.json")
def test_message_vector_is_built_and_walked(frame: Any, vector: Vector) -> None:
    head = (vector["type"], vector["proto"], vector["client_id"], vector["port"])
    payload = bytes.fromhex(vector["payload_hex"])
    key = int(vector["key"], 16)
    assert frame.build_frame(*head, payload).hex() == vector["hex"]
    assert frame.build_frame(*head, payload, key).hex() == vector["masked_hex"]
    for masked, data in ((False, vector["hex"]), (True, vector["masked_hex"])):
        joined, code = walk_all(frame, [bytes.fromhex(data)], masked=masked)
        assert (joined.whole, code) == ([(*head, payload)], None)


@vectors("messages.json")
def test_message_vector_is_framed_in_place(frame: Any, vector: Vector) -> None:
    payload = bytes.fromhex(vector["payload_hex"])
    for key, expected in ((-1, vector["hex"]), (int(vector["key"], 16), vector["masked_hex"])):
        buf = bytearray(b"\xee" * 40) + payload + b"\xee" * 4
        head = (vector["type"], vector["proto"], vector["client_id"], vector["port"])
        start = frame.frame_in_place(buf, 40, 40 + len(payload), *head, key)
        assert buf == b"\xee" * start + bytes.fromhex(expected) + b"\xee" * 4


@vectors("sequences.json")
def test_sequence_vector_is_accepted_however_it_is_split(frame: Any, vector: Vector) -> None:
    expected = [
        (m["type"], m["proto"], m["client_id"], m["port"], bytes.fromhex(m["payload_hex"])) for m in vector["messages"]
    ]
    data = bytes.fromhex(vector["hex"])
    for how, sizes in splits(data).items():
        joined, code = walk_all(frame, cut(data, sizes), masked=vector["masked"])
        assert (joined.whole, code) == (expected, None), how


@vectors("violations.json")
def test_violation_vector_owes_its_close_code_however_it_is_split(frame: Any, vector: Vector) -> None:
    options = {name: vector[name] for name in ("masked", "allow_text", "max_message")}
    data = bytes.fromhex(vector["hex"])
    for how, sizes in splits(data).items():
        joined, code = walk_all(frame, cut(data, sizes), **options)
        assert (len(joined.whole), code) == (vector["messages"], vector["code"]), how

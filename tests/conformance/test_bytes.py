"""Headers, masks and single frames: limits, errors, and every alignment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kohakuriver import _frame
from tests.reference import frame as twin

U8, U16, U32 = st.integers(0, 0xFF), st.integers(0, 0xFFFF), st.integers(0, 0xFFFFFFFF)


@given(kind=U8, proto=U8, client_id=U32, port=U16, before=st.binary(max_size=9))
def test_any_header_survives_packing_and_is_the_same_in_both(
    kind: int, proto: int, client_id: int, port: int, before: bytes
) -> None:
    packed = _frame.pack_header(kind, proto, client_id, port)
    assert packed == twin.pack_header(kind, proto, client_id, port)
    assert _frame.unpack_header(before + packed, len(before)) == (kind, proto, client_id, port)


@pytest.mark.parametrize(
    "fields", [(256, 0, 0, 0), (0, 256, 0, 0), (0, 0, 1 << 32, 0), (0, 0, 0, 1 << 16), (-1, 0, 0, 0)]
)
def test_a_field_that_does_not_fit_is_an_overflow(frame: Any, fields: tuple[int, int, int, int]) -> None:
    for call in (frame.pack_header, frame.build_frame, lambda *f: frame.frame_in_place(bytearray(64), 40, 64, *f)):
        with pytest.raises(OverflowError):
            call(*fields)


@pytest.mark.parametrize(("size", "offset"), [(0, 0), (7, 0), (8, 1), (8, -1), (8, 1 << 62), (16, 9)])
def test_a_header_that_is_cut_short_is_a_value_error(frame: Any, size: int, offset: int) -> None:
    with pytest.raises(ValueError):
        frame.unpack_header(bytes(size), offset)


@given(data=st.binary(max_size=70), start=st.integers(0, 9), stop=st.integers(0, 9), key=U32, phase=st.integers(0, 9))
def test_mask_is_the_same_in_both_for_every_range_and_phase(
    data: bytes, start: int, stop: int, key: int, phase: int
) -> None:
    start, stop = min(start, len(data)), max(min(start, len(data)), len(data) - stop)
    ours, theirs = bytearray(data), bytearray(data)
    _frame.mask(ours, start, stop, key, phase)
    twin.mask(theirs, start, stop, key, phase)
    assert ours == theirs
    _frame.mask(ours, start, stop, key, phase)
    assert ours == data


@given(
    size=st.sampled_from([0, 1, 117, 118, 119, 65_527, 65_528]),
    start=st.integers(32, 50),
    key=st.one_of(st.just(-1), U32),
)
def test_a_frame_in_place_is_the_frame_that_is_built(size: int, start: int, key: int) -> None:
    payload = bytes(range(256)) * (size // 256) + bytes(range(size % 256))
    expected = twin.build_frame(3, 1, 0xDEADBEEF, 99, payload, key)
    assert _frame.build_frame(3, 1, 0xDEADBEEF, 99, payload, key) == expected
    buf = bytearray(b"\xee" * start + payload + b"\xee" * 9)
    at = _frame.frame_in_place(buf, start, start + size, 3, 1, 0xDEADBEEF, 99, key)
    assert buf == b"\xee" * at + expected + b"\xee" * 9


def test_a_payload_without_head_room_is_refused(frame: Any) -> None:
    with pytest.raises(ValueError):
        frame.frame_in_place(bytearray(64), frame.HEADROOM - 1, 64, 3, 0, 1, 0)


def test_a_message_over_the_limit_is_refused_and_one_at_the_limit_is_not(frame: Any) -> None:
    room = frame.MAX_SEND - frame.HEADER_SIZE
    assert len(frame.build_frame(3, 0, 1, 0, bytes(room))) == frame.MAX_SEND + 10
    buf = bytearray(frame.HEADROOM + room + 1)
    calls: list[Callable[[], object]] = [
        lambda: frame.build_frame(3, 0, 1, 0, bytes(room + 1)),
        lambda: frame.build_ws(1, bytes(frame.MAX_SEND + 1)),
        lambda: frame.frame_in_place(buf, frame.HEADROOM, len(buf), 3, 0, 1, 0),
    ]
    for call in calls:
        with pytest.raises(ValueError):
            call()


@pytest.mark.parametrize("key", [-2, 1 << 32])
def test_a_key_that_is_no_key_is_refused(frame: Any, key: int) -> None:
    with pytest.raises(ValueError):
        frame.build_frame(3, 0, 1, 0, b"", key)


@pytest.mark.parametrize("opcode", [0, 3, 7, 0xB, 0xF, 0x10, -1])
def test_an_opcode_that_begins_no_frame_is_refused(frame: Any, opcode: int) -> None:
    with pytest.raises(ValueError):
        frame.build_ws(opcode)


@pytest.mark.parametrize("opcode", [8, 9, 10])
def test_a_control_frame_over_125_bytes_is_refused(frame: Any, opcode: int) -> None:
    assert len(frame.build_ws(opcode, bytes(125))) == 127
    with pytest.raises(ValueError):
        frame.build_ws(opcode, bytes(126))


def test_mask_keys_fit_32_bits_and_do_not_repeat(frame: Any) -> None:
    keys = frame.MaskKeys()
    drawn = [keys.next() for _ in range(3000)]
    assert all(0 <= key <= 0xFFFFFFFF for key in drawn)
    assert len(set(drawn)) > 2990

"""What is peculiar to the extension: its constants, its stubs' names, and how it treats buffers and memory."""

from __future__ import annotations

import pickle
import tracemalloc

import pytest

from kohakuriver import _frame
from tests.reference import chunks as twin_chunks
from tests.reference import frame as twin
from tests.reference import unacked as twin_unacked

CONSTANTS = [name for name in {**vars(twin_unacked), **vars(twin)} if name.isupper() and hasattr(_frame, name)]


@pytest.mark.parametrize("name", CONSTANTS)
def test_constant_is_the_twins(name: str) -> None:
    assert getattr(_frame, name) == getattr(twin if hasattr(twin, name) else twin_unacked, name)


def test_every_public_name_has_a_twin() -> None:
    public = {name for name in vars(_frame) if not name.startswith("_") and name != "os"}
    assert public <= {*vars(twin), *vars(twin_unacked), *vars(twin_chunks)}


def test_a_huge_claim_allocates_nothing() -> None:
    walker = _frame.FrameWalker(masked=False, max_message=(1 << 64) - 1)
    buf = bytearray(b"\x82\x7f\x7f\xff\xff\xff\xff\xff\xff\xff") + _frame.pack_header(5, 0, 1, 0) + bytes(100)
    tracemalloc.start()
    try:
        messages, consumed = walker.walk(buf, 0, len(buf))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert consumed == len(buf)
    assert messages == [(5, 0, 1, 0, 18, 118, _frame.FIRST)]
    assert peak < 64 * 1024


def test_the_buffer_is_let_go_after_every_call() -> None:
    buf = bytearray(_frame.build_frame(3, 0, 1, 0, b"abc"))
    walker = _frame.FrameWalker(masked=False)
    walker.walk(buf, 0, len(buf))
    buf.append(0x80)  # BufferError if a view were out
    with pytest.raises(_frame.FrameViolation):
        walker.walk(buf, 1, len(buf))
    with pytest.raises(ValueError):
        _frame.mask(buf, 5, 4, 0)
    with pytest.raises(ValueError):
        _frame.frame_in_place(buf, 0, 4, 3, 0, 1, 0)
    with pytest.raises(ValueError):
        _frame.unpack_header(buf, 99)
    with pytest.raises(ValueError):
        _frame.build_ws(9, bytearray(126))
    buf.append(0)


def test_a_memoryview_with_an_offset_is_walked_in_place() -> None:
    store = bytearray(b"\xee" * 10 + _frame.build_frame(3, 0, 1, 0, b"abc", 0xFFFFFFFF) + b"\xee" * 10)
    view = memoryview(store)[10:-10]
    messages, consumed = _frame.FrameWalker(masked=True).walk(view, 0, len(view))
    assert (messages, consumed) == ([(3, 0, 1, 0, 14, 17, 3)], 17)
    assert store[24:27] == b"abc"


def test_a_buffer_that_is_not_contiguous_is_refused() -> None:
    with pytest.raises(BufferError):
        _frame.FrameWalker(masked=True).walk(memoryview(bytearray(20))[::2], 0, 10)


def test_a_violation_survives_pickling_and_reads_as_its_reason() -> None:
    violation = pickle.loads(pickle.dumps(_frame.FrameViolation(1009, "too large")))
    assert (violation.code, str(violation)) == (1009, "too large")

"""Hop 2 in one call: splice() passes binary frames on as they are and keeps the rest for its caller."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kohakuriver import _frame
from tests.conformance.feeding import Joined, Reader, cut, walk_all
from tests.conformance.strategies import SPLITS, Stream, broken_streams, streams
from tests.reference import frame as twin


class Spliced:
    """All that came out of a SpliceWalker."""

    def __init__(self, frame: Any, stream: Stream, sizes: list[int], *, text: bool = True) -> None:
        self.walker = frame.SpliceWalker(masked=stream.masked, allow_text=text)
        self.passed = bytearray()
        self.events = Joined()
        self.answers: list[Any] = []
        reader = Reader(self.step)
        try:
            for data in cut(stream.data, sizes):
                reader.feed(data)
        except frame.FrameViolation as violation:
            self.answers.append((violation.code, str(violation)))

    def step(self, buf: bytearray, start: int, stop: int) -> int:
        before = bytes(buf[start:stop])
        end, event, consumed = self.walker.splice(buf, start, stop)
        assert start <= end <= consumed <= stop
        assert event is not None or end == consumed
        assert buf[start:end] == before[: end - start], "what is passed on is passed on as it came"
        self.passed += buf[start:end]
        if event is not None:
            assert end < event[4] <= event[5] == consumed
            self.events.take(event, buf)
        self.answers.append((end, event, consumed, bytes(buf), self.walker.at_boundary))
        return int(consumed)


@given(stream=streams(), sizes=SPLITS)
def test_binary_frames_pass_verbatim_and_control_frames_are_taken_out(stream: Stream, sizes: list[int]) -> None:
    for frame in (_frame, twin):
        spliced = Spliced(frame, stream, sizes)
        joined, code = walk_all(frame, [bytes(spliced.passed)], masked=stream.masked)
        binary = [sent.joined() for sent in stream.sent if sent.kind < 0x100]
        assert (joined.whole, code) == (binary, None)
        assert spliced.events.whole == [sent.joined() for sent in stream.sent if sent.kind >= 0x100]
        assert spliced.walker.at_boundary
        assert spliced.walker.messages == len(binary)
        assert spliced.walker.bytes_passed == sum(8 + len(payload) for *_, payload in binary)


@given(stream=st.one_of(streams(text=True), broken_streams(text=True)), sizes=SPLITS, text=st.booleans())
def test_extension_and_twin_splice_alike(stream: Stream, sizes: list[int], text: bool) -> None:
    ours, theirs = (Spliced(frame, stream, sizes, text=text) for frame in (_frame, twin))
    assert ours.answers == theirs.answers
    assert ours.walker.bytes_passed == theirs.walker.bytes_passed
    assert ours.walker.messages == theirs.walker.messages


@given(stream=broken_streams(), sizes=SPLITS)
def test_splice_refuses_what_a_walker_refuses(stream: Stream, sizes: list[int]) -> None:
    _, code = walk_all(_frame, cut(stream.data, sizes), masked=stream.masked)
    spliced = Spliced(_frame, stream, sizes, text=False).answers[-1]
    assert (spliced[0] if len(spliced) == 2 else None) == code


def test_a_frame_passes_as_it_arrives_and_the_boundary_is_told(frame: Any) -> None:
    buf = bytearray(twin.build_frame(3, 0, 7, 0, b"abc", 0x01020304))
    walker = frame.SpliceWalker(masked=True)
    assert walker.at_boundary
    assert walker.splice(buf, 0, 5) == (0, None, 0)
    assert walker.splice(buf, 0, 6) == (6, None, 6)
    assert not walker.at_boundary
    assert walker.splice(buf, 6, 16) == (16, None, 16)
    assert not walker.at_boundary
    assert walker.splice(buf, 16, 17) == (17, None, 17)
    assert walker.at_boundary
    assert (walker.messages, walker.bytes_passed) == (1, 11)


@pytest.mark.parametrize(
    "data",
    [twin.ws_header(1, twin.WHOLE + 1, -1), b"\x01\x01x"],
    ids=["longer than WHOLE", "in fragments"],
)
def test_text_that_does_not_come_in_one_small_frame_is_refused(frame: Any, data: bytes) -> None:
    walker = frame.SpliceWalker(masked=False, allow_text=True)
    with pytest.raises(frame.FrameViolation) as raised:
        walker.splice(bytearray(data), 0, len(data))
    assert raised.value.code == 1009

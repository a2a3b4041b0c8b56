"""The frame walker: against what was sent, against its twin, and against the parser of the `websockets` library."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode
from websockets.protocol import Protocol, Side

from kohakuriver import _frame
from tests.conformance.feeding import Reader, cut, walk_all
from tests.conformance.strategies import SPLITS, Stream, broken_streams, streams
from tests.reference import frame as twin

HEADER = twin.pack_header(3, 0, 7, 0)


@given(stream=streams(text=True), sizes=SPLITS, limit=st.sampled_from([1, 3, 256]))
def test_what_was_sent_comes_out_however_it_is_split(stream: Stream, sizes: list[int], limit: int) -> None:
    for frame in (_frame, twin):
        joined, code = walk_all(frame, cut(stream.data, sizes), limit, masked=stream.masked, allow_text=True)
        assert code is None
        assert joined.whole == [sent.joined() for sent in stream.sent]
        assert joined.open is None


def every_answer(frame: Any, reads: Iterable[bytes], limit: int, **options: Any) -> list[Any]:
    """All that a walker shows: what each call returned, what it left in the buffer, and what it raised at last."""
    walker = frame.FrameWalker(**options)
    answers: list[Any] = []

    def step(buf: bytearray, start: int, stop: int) -> int:
        messages, consumed = walker.walk(buf, start, stop, limit)
        answers.append((messages, consumed, bytes(buf)))
        return int(consumed)

    reader = Reader(step)
    try:
        for data in reads:
            reader.feed(data)
    except frame.FrameViolation as violation:
        answers.append((violation.code, str(violation)))
    return answers


@given(
    stream=st.one_of(streams(text=True), broken_streams(text=True)),
    sizes=SPLITS,
    limit=st.sampled_from([1, 3, 256]),
    text=st.booleans(),
    most=st.sampled_from([8, 130, 1000, 16 << 20]),
)
def test_extension_and_twin_answer_alike_to_right_and_broken_bytes(
    stream: Stream, sizes: list[int], limit: int, text: bool, most: int
) -> None:
    options = {"masked": stream.masked, "allow_text": text, "max_message": most}
    reads = list(cut(stream.data, sizes))
    assert every_answer(_frame, reads, limit, **options) == every_answer(twin, reads, limit, **options)


@given(data=st.binary(max_size=200), sizes=SPLITS, masked=st.booleans())
def test_extension_and_twin_answer_alike_to_random_bytes(data: bytes, sizes: list[int], masked: bool) -> None:
    options = {"masked": masked, "allow_text": True}
    reads = list(cut(data, sizes))
    assert every_answer(_frame, reads, 256, **options) == every_answer(twin, reads, 256, **options)


def library_messages(frames: Iterable[Frame]) -> list[tuple[int, bytes]]:
    """Join the library's frames into (opcode, payload), in the order in which messages end."""
    out: list[tuple[int, bytes]] = []
    opcode, parts = 0, b""
    for frame in frames:
        if frame.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
            if frame.opcode is not Opcode.CONT:
                opcode, parts = int(frame.opcode), b""
            parts += bytes(frame.data)
            if frame.fin:
                out.append((opcode, parts))
        else:
            out.append((int(frame.opcode), bytes(frame.data)))
    return out


def our_messages(joined: list[tuple[int, int, int, int, bytes]]) -> list[tuple[int, bytes]]:
    return [
        (kind & 0xFF, payload) if kind >= 0x100 else (2, twin.pack_header(kind, proto, client_id, port) + payload)
        for kind, proto, client_id, port, payload in joined
    ]


MOST = 100_000
# What the library takes, or refuses later or as too large: a length that is not in its shortest form above all.
STRICTER = ("shorter than its header", "shortest form", "longer than 125", "2^63")
# What the library looks at only once it has found a frame's length within its limit: it may say 1009 where we say 1002.
LATER = (
    "a reserved bit is set",
    "continues nothing",
    "inside a fragmented message",
    "a control frame is",
    "half a close code",
)


def random_streams() -> st.SearchStrategy[Stream]:
    """Bytes that are frames only by chance; most of them begin like one."""
    first = st.sampled_from([0x00, 0x01, 0x02, 0x80, 0x81, 0x82, 0x88, 0x89, 0x8A, 0x8B, 0xC2, 0x83])
    second = st.sampled_from([0x00, 0x01, 0x05, 0x7D, 0x7E, 0x7F])
    starts = st.tuples(first, second, st.booleans()).map(lambda t: bytes([t[0], t[1] | (0x80 if t[2] else 0)]))
    data = st.lists(st.one_of(starts, st.binary(max_size=12)), max_size=12).map(b"".join)
    return st.builds(Stream, data, st.booleans(), st.just([]))


def library_sees(stream: Stream, sizes: list[int], *, to_the_end: bool) -> tuple[list[tuple[int, bytes]], int | None]:
    """The messages that the library's parser finds, and the code that it refuses the rest with.

    `to_the_end`: then feed it more until any frame that had begun is whole, as it judges some frames only then.
    """
    library = Protocol(Side.SERVER if stream.masked else Side.CLIENT, max_size=MOST)
    for data in cut(stream.data, sizes):
        library.receive_data(data)
    events = library.events_received()
    if to_the_end and library.parser_exc is None:
        library.receive_data(b"\x01" * (MOST + 14))
    code = None if library.parser_exc is None or library.close_sent is None else int(library.close_sent.code)
    return library_messages(event for event in events if isinstance(event, Frame)), code


@settings(max_examples=400)
@given(stream=st.one_of(streams(text=True), broken_streams(text=True), random_streams()), sizes=SPLITS)
def test_walker_and_the_websockets_parser_see_the_same_messages_and_refuse_the_same(
    stream: Stream, sizes: list[int]
) -> None:
    options = {"masked": stream.masked, "allow_text": True, "max_message": MOST}
    joined, code = walk_all(_frame, cut(stream.data, sizes), **options)
    reason = every_answer(_frame, cut(stream.data, sizes), 256, **options)[-1][1] if code else ""
    ours = our_messages(joined.whole)
    theirs, their_code = library_sees(stream, sizes, to_the_end=code is not None)

    # Behind a close frame the library reads no more, and it looks into it, which a walker leaves to its caller.
    closes = [i for i, (opcode, _) in enumerate(ours) if opcode == Opcode.CLOSE]
    if closes:
        assert theirs[: closes[0]] == ours[: closes[0]]
        assert len(theirs) <= closes[0] + 1
    elif any(words in reason for words in STRICTER):
        assert theirs[: len(ours)] == ours
    else:
        assert theirs == ours
        if not (their_code == 1009 and any(words in reason for words in LATER)):
            assert code == their_code


@pytest.mark.parametrize("over", [0, 1])
def test_messages_up_to_whole_are_held_back_and_larger_ones_come_in_pieces(frame: Any, over: int) -> None:
    payload = bytes(twin.WHOLE - 8 + over)
    data = twin.build_frame(5, 0, 7, 0, payload)
    walker = frame.FrameWalker(masked=False)
    buf = bytearray(data)
    messages, consumed = walker.walk(buf, 0, len(buf) - 1)
    assert (len(messages), consumed) == ((1, len(buf) - 1) if over else (0, 0))
    messages, consumed = walker.walk(buf, consumed, len(buf))
    assert consumed == len(buf)
    assert messages[-1][6] == (twin.LAST if over else twin.FIRST | twin.LAST)


def test_data_of_a_tcp_stream_comes_as_it_arrives(frame: Any) -> None:
    buf = bytearray(twin.build_frame(3, 0, 7, 0, b"abc", 0x01020304))
    walker = frame.FrameWalker(masked=True)
    assert walker.walk(buf, 0, 13) == ([], 0)
    assert walker.walk(buf, 0, 14) == ([], 14)
    assert walker.walk(buf, 14, 15) == ([(3, 0, 7, 0, 14, 15, twin.FIRST)], 15)
    assert walker.walk(buf, 15, 16) == ([(3, 0, 7, 0, 15, 16, 0)], 16)
    assert walker.walk(buf, 16, 17) == ([(3, 0, 7, 0, 16, 17, twin.LAST)], 17)
    assert buf[14:] == b"abc"


def test_a_datagram_comes_whole(frame: Any) -> None:
    buf = bytearray(twin.build_frame(3, 1, 7, 0, b"abc", 0x01020304))
    walker = frame.FrameWalker(masked=True)
    assert walker.walk(buf, 0, 16) == ([], 0)
    assert walker.walk(buf, 0, 17) == ([(3, 1, 7, 0, 14, 17, twin.FIRST | twin.LAST)], 17)
    assert buf[14:] == b"abc"


def test_a_violation_comes_after_what_was_right_before_it_and_stays(frame: Any) -> None:
    buf = bytearray(twin.build_frame(3, 0, 7, 0, b"abc") + b"\xf2\x00")
    walker = frame.FrameWalker(masked=False)
    messages, consumed = walker.walk(buf, 0, len(buf))
    assert (len(messages), consumed) == (1, len(buf) - 2)
    for _ in range(2):
        with pytest.raises(frame.FrameViolation) as raised:
            walker.walk(buf, consumed, len(buf))
        assert raised.value.code == 1002
    with pytest.raises(frame.FrameViolation):
        walker.walk(bytearray(twin.build_frame(3, 0, 7, 0)), 0, 10)


def test_text_may_be_allowed_between_calls(frame: Any) -> None:
    buf = bytearray(twin.build_ws(1, b"CONNECTED") * 2)
    walker = frame.FrameWalker(masked=False, allow_text=True)
    assert walker.walk(buf, 0, len(buf), 1) == ([(twin.WS_TEXT, 0, 0, 0, 2, 11, 3)], 11)
    walker.allow_text = False
    with pytest.raises(frame.FrameViolation) as raised:
        walker.walk(buf, 11, len(buf))
    assert raised.value.code == 1003


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (2, 1), (0, 11), (11, 11), (1 << 62, 1 << 62)])
def test_ranges_outside_the_buffer_are_refused_by_every_call(frame: Any, start: int, stop: int) -> None:
    buf = bytearray(10)
    calls: list[Callable[[], object]] = [
        lambda: frame.FrameWalker(masked=True).walk(buf, start, stop),
        lambda: frame.RelayWalker(masked=True).relay(buf, start, stop, frame.RoutingTable()),
        lambda: frame.SpliceWalker(masked=True).splice(buf, start, stop),
        lambda: frame.mask(buf, start, stop, 1),
        lambda: frame.frame_in_place(buf, start, stop, 3, 0, 1, 0),
    ]
    for call in calls:
        with pytest.raises(ValueError):
            call()
    assert buf == bytearray(10)


def test_a_read_only_buffer_is_refused(frame: Any) -> None:
    with pytest.raises(BufferError):
        frame.FrameWalker(masked=False).walk(memoryview(HEADER), 0, 8)


def test_limit_must_let_one_message_through(frame: Any) -> None:
    with pytest.raises(ValueError):
        frame.FrameWalker(masked=False).walk(bytearray(8), 0, 8, 0)

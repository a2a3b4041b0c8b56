"""The order in which a link's bytes go out, against a sink that takes a few at a time."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kohakuriver.tunnel.protocol import Bytes
from kohakuriver.tunnel.send_queue import GATHERED, SendQueue


class ByteSink:
    """A kernel's buffer of `room` bytes, and a transport's behind it: it blocks its queue while that keeps bytes."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.got = bytearray()
        self.rest = bytearray()
        self.writes = 0
        self.queue = SendQueue(self._overrun)
        self.overruns: list[str] = []
        self.queue.begin(self)

    def write(self, data: Bytes) -> int:
        assert not self.queue.blocked, "written past what the transport keeps"
        self.writes += 1
        size = min(len(data), self.room)
        self.got += data[:size]
        self.room -= size
        return size

    def writev(self, views: Sequence[memoryview]) -> int:
        return self.write(b"".join(views))

    def keep(self, rest: bytes) -> None:
        self.rest += rest
        self.queue.block()

    def kept(self) -> int:
        return len(self.rest)

    def drain(self, size: int) -> None:
        """The peer reads `size` bytes."""
        self.room += size
        size = min(self.room, len(self.rest))
        self.got += self.rest[:size]
        del self.rest[:size]
        self.room -= size
        if self.queue.blocked and not self.rest and self.queue.resume():
            self.queue.wake()

    def _overrun(self) -> None:
        self.overruns.append("urgent" if self.queue.urgent else "bulk")


class Waiter:
    told = 0

    def link_writable(self) -> None:
        self.told += 1


def test_urgent_frames_wait_for_the_end_of_a_frame_and_of_no_other() -> None:
    sink = ByteSink(3)
    sink.queue.send(b"half", inside=True)  # blocked, and inside a frame
    sink.queue.send(b"-frame")
    sink.queue.send(b"next")
    sink.queue.post(b"!")
    sink.queue.post(b"?")
    sink.drain(100)
    assert bytes(sink.got) == b"half-frame!?next"


def test_an_urgent_frame_does_not_go_where_half_a_queue_was_sent() -> None:
    sink = ByteSink(1)
    sink.queue.send(b"ab")
    for piece, inside in ((b"half", True), (b"-frame", False)):
        sink.queue.send(piece, inside)
    sink.drain(3)  # the queue begins at a border, and blocks again inside the frame
    sink.queue.post(b"!")
    sink.drain(100)
    assert bytes(sink.got) == b"abhalf-frame!"


def test_urgent_frames_that_waited_go_with_one_write() -> None:
    sink = ByteSink(1)
    sink.queue.send(b"ab")
    for _ in range(1000):
        sink.queue.post(b"!")
    writes = sink.writes
    sink.drain(10_000)
    assert (sink.writes - writes, bytes(sink.got)) == (1, b"ab" + b"!" * 1000)


def test_ranges_go_with_one_write_and_in_order_whatever_the_sink_takes() -> None:
    views = [memoryview(bytes([i]) * 3) for i in range(5)]
    for room in range(16):
        sink = ByteSink(room)
        sink.queue.send_many(views)
        assert sink.writes == 1 or room < 15
        sink.drain(100)
        assert bytes(sink.got) == b"".join(views)
        assert sink.queue.taken() == 15


def test_small_frames_that_are_gathered_go_with_one_write_and_in_order() -> None:
    sink = ByteSink(100_000)
    large = b"L" * (GATHERED + 1)
    assert sink.queue.gather()
    assert not sink.queue.gather(), "somebody else scatters them"
    sink.queue.send(b"a")
    sink.queue.post(b"b")
    sink.queue.send_many([memoryview(b"c"), memoryview(b"d")])
    assert sink.writes == 0
    sink.queue.send(large)
    assert sink.writes == 2, "a large one is not copied"
    sink.queue.send(b"e")
    sink.queue.send(b"f")
    sink.queue.scatter()
    assert (sink.writes, bytes(sink.got)) == (3, b"abcd" + large + b"ef")
    sink.queue.send(b"g")
    assert sink.writes == 4


@pytest.mark.parametrize("lane", ["bulk", "urgent"])
def test_a_peer_that_reads_nothing_is_noticed_at_the_limit(lane: str) -> None:
    sink = ByteSink(0)
    sink.queue.max_queued = sink.queue.max_urgent = 100
    sink.queue.send(b"x")
    add = sink.queue.send if lane == "bulk" else sink.queue.post
    for _ in range(10):
        add(b"0123456789")
    assert sink.overruns == []
    add(b"!")
    assert sink.overruns == [lane]


def test_nothing_is_kept_of_what_waits_when_the_sink_is_gone_and_who_waits_is_told() -> None:
    sink, before, after = ByteSink(0), Waiter(), Waiter()
    sink.queue.send(b"x")
    sink.queue.send(b"bulk")
    sink.queue.post(b"!")
    sink.queue.wait_drained(before)
    sink.queue.end()
    sink.queue.wake()
    sink.queue.wait_drained(after)
    assert (before.told, after.told) == (1, 1)
    assert (sink.queue.blocked, sink.queue.queued, sink.queue.urgent) == (False, 0, [])


class AnyOrder(RuleBasedStateMachine):
    """Whatever is sent and read when: each byte once, bulk in its order, urgent frames in theirs and never inside.

    Bulk frames are `[aaa]`, of any length and sent in any pieces; urgent ones are `<n>`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sink = ByteSink(5)
        self.queue = self.sink.queue
        self.bulk = b""
        self.posted = 0
        self.open = False
        self.waiter, self.waits = Waiter(), 0

    @rule(size=st.integers(0, 12), end=st.booleans())
    def piece(self, size: int, end: bool) -> None:
        """The next piece of a frame that passes through."""
        data = (b"" if self.open else b"[") + b"a" * size + (b"]" if end else b"")
        self.open = not end
        self.bulk += data
        self.queue.send(data, not end)

    @precondition(lambda self: not self.open)
    @rule(sizes=st.lists(st.integers(0, 12), min_size=1, max_size=5))
    def whole(self, sizes: list[int]) -> None:
        frames = [b"[" + b"a" * size + b"]" for size in sizes]
        self.bulk += b"".join(frames)
        self.queue.send_many([memoryview(frame) for frame in frames])

    @precondition(lambda self: not self.open)
    @rule(steps=st.lists(st.integers(-1, 12), max_size=5))
    def gathered(self, steps: list[int]) -> None:
        """Frames, or urgent ones at -1, that are sent while one read is worked off."""
        self.queue.gather()
        for size in steps:
            if size < 0:
                self.urgent()
            else:
                self.whole([size])
        self.queue.scatter()

    @rule()
    def urgent(self) -> None:
        self.queue.post(b"<%d>" % self.posted)
        self.posted += 1

    @rule(size=st.integers(0, 40))
    def read(self, size: int) -> None:
        self.sink.drain(size)

    @precondition(lambda self: self.queue.blocked and self.waits == self.waiter.told)
    @rule()
    def wait(self) -> None:
        self.queue.wait_drained(self.waiter)
        self.waits += 1

    @invariant()
    def what_went_is_in_order(self) -> None:
        bulk, urgent, inside = bytearray(), [], False
        words = bytes(self.sink.got + self.sink.rest)
        at = 0
        while at < len(words):
            if words[at : at + 1] == b"<":
                assert not inside, "an urgent frame inside another"
                end = words.index(b">", at)
                urgent.append(int(words[at + 1 : end]))
                at = end + 1
                continue
            inside = words[at : at + 1] != b"]"
            bulk += words[at : at + 1]
            at += 1
        assert self.bulk.startswith(bulk)
        assert urgent == list(range(len(urgent)))
        self.went = len(bulk), len(urgent)

    @invariant()
    def what_waits_is_counted(self) -> None:
        self.what_went_is_in_order()
        assert self.queue.queued == len(self.bulk) - self.went[0]
        assert len(self.queue.urgent) == self.posted - self.went[1]
        assert self.queue.inside == self.open
        assert self.queue.taken() == len(self.sink.got)
        assert self.queue.blocked == bool(self.sink.rest)
        if not self.queue.blocked:
            assert self.waiter.told == self.waits
            assert not self.queue.queued

    def teardown(self) -> None:
        self.sink.drain(1 << 20)
        self.what_waits_is_counted()
        assert self.went[0] == len(self.bulk)
        assert self.open or self.went[1] == self.posted


TestAnyOrder = AnyOrder.TestCase

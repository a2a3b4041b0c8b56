"""What a link does not consume at once: it is kept in order, and thrown away once nobody heeds it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kohakuriver._frame import HEADROOM
from kohakuriver.tunnel.intake import Intake
from kohakuriver.tunnel.peer_watch import PeerWatch
from kohakuriver.tunnel.turns import TURN
from tests.support.peers.fake_transport import FakeTransport

Run = Callable[[Coroutine[Any, Any, None]], None]


class Reader:
    """Takes `appetites` bytes of each range that it is shown, and none of what it is not asked about."""

    def __init__(self, appetites: list[int]) -> None:
        self.appetites = appetites
        self.got = b""
        self.turn_after = 0
        nothing: Any = lambda *args: 0  # noqa: E731
        watch = PeerWatch(60, 60, ping=nothing, written=nothing, drop=nothing)
        self.intake = Intake(self.deliver, watch)
        self.transport = FakeTransport()

    def deliver(self, start: int, stop: int) -> int:
        size = min(self.appetites.pop(0) if self.appetites else stop, stop - start)
        self.got += self.intake.buffer.view[start : start + size]
        if self.turn_after:
            self.intake.turn_over(self.turn_after)
        return start + size

    def feed(self, data: bytes) -> None:
        view = self.intake.space()
        view[: len(data)] = data
        self.intake.took(len(data))


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=20), st.lists(st.integers(0, 80), max_size=40))
def test_each_byte_is_delivered_once_and_in_order_however_little_is_consumed(
    pieces: list[bytes], appetites: list[int]
) -> None:
    async def main() -> None:
        reader = Reader(appetites)
        reader.intake.limit_reads(64)  # so that what is left outgrows the buffer
        for piece in pieces:
            for at in range(0, len(piece), len(reader.intake.space())):
                reader.feed(piece[at : at + len(reader.intake.space())])
            assert b"".join(pieces).startswith(reader.got)
        appetites.clear()
        reader.feed(b".")
        assert reader.got == b"".join(pieces) + b"."

    asyncio.run(main())


def test_what_came_early_is_delivered_before_what_is_read(run: Run) -> None:
    async def main() -> None:
        reader = Reader([2])
        reader.intake.begin(reader.transport, b"early")
        await asyncio.sleep(0)
        assert reader.got == b"ea"
        reader.feed(b"-late")
        assert reader.got == b"early-late"

    run(main())


def test_a_turn_that_is_over_stops_reading_and_the_rest_follows_by_itself(run: Run) -> None:
    async def main() -> None:
        reader = Reader([1, 1])
        reader.intake.begin(reader.transport, b"")
        reader.turn_after = TURN
        reader.feed(b"abc")
        assert (reader.got, reader.transport.reading) == (b"a", False)
        await asyncio.sleep(0)
        assert (reader.got, reader.transport.reading) == (b"ab", False)
        reader.turn_after = 1
        await asyncio.sleep(0)
        assert (reader.got, reader.transport.reading) == (b"abc", True)

    run(main())


def test_what_is_held_is_delivered_from_where_it_was_left_once_it_is_released(run: Run) -> None:
    async def main() -> None:
        reader = Reader([1])
        reader.intake.begin(reader.transport, b"")
        reader.feed(b"abc")
        reader.intake.hold()
        assert reader.intake.turn_over(1)
        reader.feed(b"def")  # TLS may have read on
        await asyncio.sleep(0)
        assert (reader.got, reader.transport.reading) == (b"a", False)
        reader.intake.release()
        assert (reader.got, reader.transport.reading) == (b"a", False)
        await asyncio.sleep(0)
        assert (reader.got, reader.transport.reading) == (b"abcdef", True)
        reader.intake.release()  # of what is not held nothing becomes
        assert reader.transport.reading
        assert not reader.intake.turn_over(1)

    run(main())


def test_a_link_that_fills_its_buffer_again_leaves_others_their_turn(run: Run) -> None:
    async def main() -> None:
        reader = Reader([])
        reader.intake.begin(reader.transport, b"")
        reader.intake.limit_reads(64)
        reader.intake._now = lambda: 1.0  # as uvloop's clock in one look at a socket
        full = bytes(len(reader.intake.space()))
        for size in (len(full), len(full) - 1, 1):
            reader.feed(full[:size])
            assert reader.transport.reading
        reader.feed(full)
        assert (len(reader.got), reader.transport.reading) == (3 * len(full), False)
        await asyncio.sleep(0)
        assert reader.transport.reading

    run(main())


def test_nothing_is_delivered_once_nobody_heeds_it(run: Run) -> None:
    async def main() -> None:
        reader = Reader([1])
        reader.intake.begin(reader.transport, b"")
        reader.feed(b"ab")
        reader.intake.discard()
        reader.feed(b"cd")
        assert reader.got == b"a"
        assert len(reader.intake.space()) == len(reader.intake.buffer.data) - HEADROOM

    run(main())


def test_a_pause_of_the_handler_before_ends_when_another_takes_over(run: Run) -> None:
    async def main() -> None:
        reader = Reader([0])
        reader.intake.begin(reader.transport, b"")
        reader.intake.pause("the greeting")
        reader.feed(b"left")
        assert not reader.transport.reading
        reader.intake.hand_over()
        await asyncio.sleep(0)
        assert (reader.got, reader.transport.reading) == (b"left", True)

    run(main())

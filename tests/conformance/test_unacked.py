"""What a sender of a kept stream keeps: any of it can be sent again until it has arrived, and then nothing is left."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kohakuriver import _frame
from kohakuriver._frame import BLOCK, BULK, HEADROOM, MAX_SEND
from kohakuriver.tunnel.windows import Pool
from tests.reference import frame as twin_frame
from tests.reference import unacked as twin

KEY = 0xA1B2C3D4
PATTERN = random.Random(5).randbytes(1 << 20)
SMALL = 64 * 1024 + BULK  # what a stream may keep beside its budget is less
LARGEST = BLOCK - HEADROOM
SIZES = st.one_of(
    st.integers(1, 100), st.integers(BULK - 1, BULK + 1), st.integers(1, 300_000), st.integers(LARGEST - 70, LARGEST)
)
PARTS = st.one_of(st.just(0.0), st.just(1.0), st.floats(0, 1))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("read"), SIZES),
        st.tuples(st.just("write"), SIZES),
        st.tuples(st.just("ack"), PARTS),
        st.tuples(st.just("again"), st.tuples(PARTS, PARTS)),
        st.tuples(st.just("waits"), SIZES),
        st.tuples(st.just("nothing"), SIZES),
    ),
    max_size=40,
)


@dataclass
class Sender:
    """What one stream sends, and what is kept of it. Each step returns what the caller gets to see."""

    kept: Any
    all: bytearray = field(default_factory=bytearray)
    buffer: bytearray = field(default_factory=lambda: bytearray(BLOCK))

    def new(self, size: int) -> bytes:
        at = len(self.all) * 7919 % len(PATTERN)
        return (PATTERN[at:] + PATTERN)[:size]

    def fill(self, size: int) -> int:
        """As a transport does it: read into the space, or where else there is room."""
        space = self.kept.space(size)
        if space is None:
            space = memoryview(self.buffer)[HEADROOM : HEADROOM + size]
        space[:] = self.new(len(space))
        return len(space)

    def read(self, size: int, key: int = KEY) -> bytes:
        size = self.fill(size)
        self.all += self.new(size)
        return bytes(self.kept.frame(memoryview(self.buffer), size, 7, key))

    def waits(self, size: int) -> bytes:
        """It was read, and can't be sent: it is copied like what is written."""
        came = bytes(self.kept.came(memoryview(self.buffer), self.fill(size)))
        self.all += came
        self.kept.add(came)
        return came

    def write(self, size: int) -> None:
        data = self.new(size)
        self.all += data
        self.kept.add(memoryview(data))

    def ack(self, part: float) -> None:
        self.kept.ack(self.kept.start + round(part * len(self.kept)))

    def again(self, parts: tuple[float, float]) -> bytes:
        offset = self.kept.start + round(parts[0] * len(self.kept))
        size = round(parts[1] * (self.kept.end - offset))
        found = bytes(self.kept.read(offset, size))
        assert found == self.all[offset : offset + size]
        return found

    def nothing(self, size: int) -> int:
        """A space was asked for, and nothing was there to be read."""
        return self.fill(size)


def state(sender: Sender) -> tuple[int, ...]:
    kept = sender.kept
    return kept.start, kept.end, kept.bulk, len(kept), kept.memory


@given(
    steps=st.lists(st.tuples(st.integers(0, 2), STEPS), max_size=8),
    total=st.sampled_from([0, BLOCK, 3 * BLOCK, 64 << 20]),
)
def test_what_has_not_arrived_can_be_sent_again_from_any_byte_on(
    steps: list[tuple[int, list[tuple[str, Any]]]], total: int
) -> None:
    both = [module.Blocks(Pool(total)) for module in (_frame, twin)]
    ours, theirs = (
        [Sender(module.Unacked(blocks)) for _ in range(3)] for module, blocks in zip((_frame, twin), both, strict=True)
    )
    for which, some in steps:
        for step, how in some:
            results = [getattr(senders[which], step)(how) for senders in (ours, theirs)]
            assert results[0] == results[1], step
            assert [state(sender) for sender in ours] == [state(sender) for sender in theirs]
            assert both[0].used == both[1].used == total - both[0].pool.left
            for sender in ours:
                kept = sender.kept
                assert kept.end == len(sender.all)
                assert kept.read(kept.start, len(kept)) == sender.all[kept.start :]
                assert kept.memory >= len(kept)
            memory = sum(sender.kept.memory for sender in ours)
            assert both[0].used <= memory <= both[0].used + len(ours) * SMALL
    for sender in ours:
        sender.kept.clear()
        assert not sender.kept.memory
    assert both[0].used == 0


@pytest.fixture(params=[_frame, twin], ids=["c", "py"])
def kept(request: pytest.FixtureRequest) -> Any:
    """The module under test."""
    return request.param


def bulk(blocks: Any, kept: Any) -> Sender:
    """A stream that is expected to send bulk."""
    sender = Sender(kept.Unacked(blocks))
    sender.write(BULK)
    sender.kept.ack(BULK)
    return sender


def test_a_frame_is_the_one_that_is_built_and_lies_where_it_was_read(kept: Any) -> None:
    sender = bulk(kept.Blocks(Pool()), kept)
    for size in (1, 125, 126, BULK, 65_536, 300_000):
        for key in (-1, 0, KEY):
            before = len(sender.all)
            frame = sender.read(size, key)
            sent = sender.all[before:]
            assert frame == twin_frame.build_frame(_frame.TYPE_DATA, 0, 7, 0, bytes(sent), key)
    assert sender.kept.read(BULK, len(sender.kept)) == sender.all[BULK:]


def test_bulk_stays_where_it_was_read() -> None:
    sender = bulk(_frame.Blocks(Pool()), _frame)
    space = sender.kept.space(100_000)
    space[:] = sender.new(100_000)
    frame = sender.kept.frame(memoryview(b""), 100_000, 7, KEY)
    assert sender.kept.memory == BLOCK
    assert bytes(space) == bytes(frame[-100_000:]) != sender.new(100_000), "it is masked there"


def test_behind_a_block_that_is_full_to_its_end_the_next_one_begins(kept: Any) -> None:
    for left in range(70):
        blocks = kept.Blocks(Pool())
        sender = bulk(blocks, kept)
        sender.read(LARGEST - left)
        sender.read(BULK)
        assert blocks.used == 2 * BLOCK
        sender.again((0.0, 1.0))


def test_small_reads_hold_no_blocks(kept: Any) -> None:
    blocks = kept.Blocks(Pool())
    sender = bulk(blocks, kept)
    for _ in range(100):
        sender.read(64)
    assert blocks.used == 0
    assert sender.kept.memory == 6400
    assert sender.kept.space(64) is None


def test_a_block_whose_bytes_have_arrived_is_the_next_streams() -> None:
    blocks = _frame.Blocks(Pool())
    first, second = bulk(blocks, _frame), bulk(blocks, _frame)
    mine = first.kept.space(BLOCK)
    first.kept.frame(memoryview(b""), len(mine), 7)
    first.ack(1.0)
    theirs = second.kept.space(BLOCK)
    mine[0] = 77
    assert theirs[0] == 77


def test_where_the_budget_is_used_up_no_stream_gets_a_block(kept: Any) -> None:
    blocks = kept.Blocks(Pool(2 * BLOCK))
    senders = [bulk(blocks, kept) for _ in range(10)]
    for sender in senders:
        sender.read(BULK)
    assert [sender.kept.memory for sender in senders] == 2 * [BLOCK] + 8 * [BULK]
    assert blocks.pool.left == 0


def test_nothing_is_kept_of_what_is_empty(kept: Any) -> None:
    sender = Sender(kept.Unacked(kept.Blocks(Pool())))
    sender.write(0)
    assert state(sender) == (0, 0, 0, 0, 0)
    assert sender.kept.read(0, 0) == b""


@pytest.mark.parametrize(("offset", "size"), [(9, 1), (10, 91), (101, 0), (100, 1), (10, 1 << 63)])
def test_what_is_not_kept_can_not_be_read(kept: Any, offset: int, size: int) -> None:
    sender = Sender(kept.Unacked(kept.Blocks(Pool())))
    sender.write(100)
    sender.kept.ack(10)
    with pytest.raises(ValueError):
        sender.kept.read(offset, size)


@pytest.mark.parametrize("offset", [9, 101])
def test_what_was_not_sent_can_not_have_arrived(kept: Any, offset: int) -> None:
    sender = Sender(kept.Unacked(kept.Blocks(Pool())))
    sender.write(100)
    sender.kept.ack(10)
    with pytest.raises(ValueError):
        sender.kept.ack(offset)


def test_no_more_was_read_than_there_was_room_for(kept: Any) -> None:
    sender = bulk(kept.Blocks(Pool()), kept)
    view = memoryview(bytearray(HEADROOM + BULK))
    sender.kept.space(100)
    with pytest.raises(ValueError):
        sender.kept.frame(view, 101, 7)
    sender.kept.space(100)
    with pytest.raises(ValueError):
        sender.kept.came(view, 101)


def test_bytes_that_do_not_lie_in_the_buffer_are_no_frame(kept: Any) -> None:
    sender = Sender(kept.Unacked(kept.Blocks(Pool())))
    with pytest.raises(ValueError):
        sender.kept.frame(memoryview(bytearray(HEADROOM + 10)), 11, 7)
    with pytest.raises(ValueError):
        sender.kept.frame(memoryview(bytearray(HEADROOM + MAX_SEND)), MAX_SEND, 7)
    assert state(sender) == (0, 0, 0, 0, 0)


def test_a_space_that_has_become_another_streams_is_not_framed() -> None:
    blocks = _frame.Blocks(Pool())
    first, second = bulk(blocks, _frame), bulk(blocks, _frame)
    first.kept.space(BULK)
    second.read(BULK)
    with pytest.raises(ValueError):
        first.kept.frame(memoryview(b""), BULK, 7)

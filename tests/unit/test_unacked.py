"""What a sender of a kept stream keeps: any of it can be sent again until it has arrived, and then nothing is left."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from kohakuriver._frame import HEADROOM, frame_in_place, mask
from kohakuriver.tunnel.buffers import receive_buffer
from kohakuriver.tunnel.protocol import DATA, PROTO_TCP
from kohakuriver.tunnel.unacked import BLOCK, BULK, Store, Unacked
from kohakuriver.tunnel.windows import EARLY_DATA

PATTERN = random.Random(5).randbytes(1 << 20)
SIZES = st.one_of(st.integers(1, 100), st.integers(BULK - 1, BULK + 1), st.integers(1, 300_000))
PARTS = st.one_of(st.just(0.0), st.just(1.0), st.floats(0, 1))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("read"), SIZES),
        st.tuples(st.just("write"), SIZES),
        st.tuples(st.just("ack"), PARTS),
        st.tuples(st.just("again"), st.tuples(PARTS, PARTS)),
        st.tuples(st.just("nothing was there"), SIZES),
    ),
    max_size=40,
)


@dataclass
class Sender:
    """What one stream sends, and what is kept of it."""

    kept: Unacked
    all: bytearray = field(default_factory=bytearray)

    def new(self, size: int) -> bytes:
        at = len(self.all) * 7919 % len(PATTERN)
        data = (PATTERN[at:] + PATTERN)[:size]
        self.all += data
        return data

    def write(self, size: int) -> None:
        self.kept.add(memoryview(self.new(size)))

    def read(self, size: int, key: int) -> None:
        """As a transport and a stream do it: what was read is framed and masked where it lies."""
        kept = self.kept
        if not kept.bulk:
            self.write(size)
            return
        space = kept.space(size)
        data = self.new(len(space))
        space[:] = data
        buffer, at = kept.buffer, kept.at
        kept.keep(len(data), key)
        start = frame_in_place(buffer.data, at, at + len(data), DATA, PROTO_TCP, 7, 0, key)
        sent = bytearray(buffer.view[at : at + len(data)])
        if key >= 0:
            mask(sent, 0, len(sent), key)
        assert sent == data
        assert start < at

    def ack(self, part: float) -> None:
        self.kept.ack(self.kept.start + round(part * len(self.kept)))

    def again(self, begin: float, rest: float) -> None:
        offset = self.kept.start + round(begin * len(self.kept))
        size = round(rest * (self.kept.end - offset))
        assert self.kept.read(offset, size) == self.all[offset : offset + size]

    def nothing(self, size: int) -> None:
        if self.kept.bulk:
            self.kept.space(size)[:] = bytes(len(self.kept.space(size)))


def do(sender: Sender, step: str, how: Any, key: int) -> None:
    if step == "again":
        sender.again(*how)
    elif step == "read":
        sender.read(how, key)
    else:
        {"write": sender.write, "ack": sender.ack, "nothing was there": sender.nothing}[step](how)


@given(
    steps=st.lists(st.tuples(st.integers(0, 2), STEPS), max_size=8),
    total=st.sampled_from([0, BLOCK, 3 * BLOCK, 64 << 20]),
    key=st.sampled_from([-1, 0, 0xA1B2C3D4]),
)
def test_what_has_not_arrived_can_be_sent_again_from_any_byte_on(
    steps: list[tuple[int, list[tuple[str, Any]]]], total: int, key: int
) -> None:
    store = Store(total)
    senders = [Sender(Unacked(store)) for _ in range(3)]
    for which, some in steps:
        for step, how in some:
            do(senders[which], step, how, key)
            for sender in senders:
                kept = sender.kept
                assert kept.end == len(sender.all)
                assert kept.read(kept.start, len(kept)) == sender.all[kept.start :]
                assert kept.memory >= len(kept)
            memory = sum(sender.kept.memory for sender in senders)
            assert store.used <= memory <= store.used + len(senders) * (EARLY_DATA + BULK)
    for sender in senders:
        sender.kept.clear()
        assert not sender.kept.memory
    assert store.used == 0


def bulk(store: Store) -> Sender:
    sender = Sender(Unacked(store))
    sender.write(BULK)
    sender.kept.ack(BULK)
    return sender


def test_bulk_stays_where_it_was_read() -> None:
    sender = bulk(Store())
    sender.read(100_000, 1)
    sender.read(50_000, 2)
    block = sender.kept.buffer
    assert block is not receive_buffer()
    assert sender.kept.memory == BLOCK
    assert block.view[HEADROOM : HEADROOM + 8].tobytes() != bytes(sender.all[BULK : BULK + 8]), "it is masked there"
    sender.again(0.0, 1.0)


def test_small_reads_hold_no_blocks() -> None:
    store = Store()
    sender = bulk(store)
    for _ in range(100):
        sender.read(64, 1)
    assert store.used == 0
    assert sender.kept.memory == 6400


def test_a_block_whose_bytes_have_arrived_is_the_next_streams() -> None:
    store = Store()
    first, second = bulk(store), bulk(store)
    first.read(BLOCK, 1)
    block = first.kept.buffer
    first.ack(1.0)
    assert first.kept.buffer is receive_buffer(), "it does not hold on to what it gave back"
    second.read(BLOCK, 1)
    assert second.kept.buffer is block


def test_where_the_budget_is_used_up_no_stream_gets_a_block() -> None:
    store = Store(2 * BLOCK)
    senders = [bulk(store) for _ in range(10)]
    for sender in senders:
        sender.read(BULK, 1)
    assert [sender.kept.memory for sender in senders] == 2 * [BLOCK] + 8 * [BULK]
    assert store.share == EARLY_DATA

"""Hop 3 in one call: what relay() may do with bytes, whoever sent them. Nobody gets another stream's bytes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kohakuriver import _frame
from tests.conformance.feeding import HEADROOM, Joined, Reader, cut, walk_all
from tests.conformance.strategies import SPLITS, Sent, Stream, broken_streams, streams
from tests.reference import frame as twin

ROUTED = (twin.TYPE_DATA, twin.TYPE_WINDOW, twin.TYPE_CONNECTED)
# Client id -> (target, id there). Two ids lead to one target, others nowhere.
ROUTES = {0: ("anna", 70), 1: ("bert", 71), 2: ("anna", 0xFFFFFFFF), 3: ("cleo", 0)}


def table_of(frame: Any, routes: dict[int, tuple[str, int]]) -> Any:
    table = frame.RoutingTable()
    for client_id, (target, new_id) in routes.items():
        table.add(client_id, target, new_id)
    return table


@dataclass
class Relayed:
    """All that came out of a RelayWalker, call by call."""

    frame: Any
    table: Any
    walker: Any
    between: Callable[[Relayed], None] = lambda relayed: None
    answers: list[Any] = field(default_factory=list)
    out: dict[object, bytearray] = field(default_factory=lambda: defaultdict(bytearray))
    events: Joined = field(default_factory=Joined)
    code: int | None = None

    def step(self, buf: bytearray, start: int, stop: int) -> int:
        before = bytes(buf[: start - HEADROOM])
        runs, event, consumed = self.walker.relay(buf, start, stop, self.table)
        assert buf[: start - HEADROOM] == before
        edge = start - HEADROOM
        for target, run_start, run_stop in runs:
            assert edge <= run_start < run_stop <= consumed, "runs lie in order, and clear of what is not consumed"
            edge = run_stop
            self.out[target] += buf[run_start:run_stop]
        if event is not None:
            assert edge <= event[4] <= event[5] <= consumed
            self.events.take(event, buf)
        self.answers.append(([(t, bytes(buf[a:b]), a) for t, a, b in runs], event, consumed, bytes(buf[consumed:])))
        self.between(self)
        return int(consumed)

    def feed(self, stream: Stream, sizes: list[int]) -> Relayed:
        reader = Reader(self.step)
        try:
            for data in cut(stream.data, sizes):
                reader.feed(data)
        except self.frame.FrameViolation as violation:
            self.code = violation.code
        return self

    def got(self, target: object) -> list[tuple[int, int, int, int, bytes]]:
        """What the target's peer makes of it. Its messages are whole and legal frames, ended where the bytes end."""
        joined, code = walk_all(self.frame, [bytes(self.out[target])], masked=False)
        assert code is None
        assert joined.open is None
        splice = self.frame.SpliceWalker(masked=False)
        assert splice.splice(bytearray(self.out[target]), 0, len(self.out[target]))[1] is None
        assert splice.at_boundary
        return joined.whole


def relay_all(frame: Any, stream: Stream, sizes: list[int], routes: dict[int, tuple[str, int]]) -> Relayed:
    walker = frame.RelayWalker(masked=stream.masked, allow_text=True)
    return Relayed(frame, table_of(frame, routes), walker).feed(stream, sizes)


def stream_bytes(messages: list[tuple[int, int, int, int, bytes]]) -> list[tuple[int, int, int, bytes]]:
    """TCP DATA joined as a byte stream per id, for relays cut it anew; other messages as they are, in order per id."""
    out: list[tuple[int, int, int, bytes]] = []
    for kind, proto, client_id, _, payload in messages:
        if out and (kind, proto) == (3, 0) and out[-1][:3] == (3, 0, client_id):
            out[-1] = (3, 0, client_id, out[-1][3] + payload)
        else:
            out.append((kind, proto, client_id, payload))
    return out


def is_data(sent: Sent) -> bool:
    return (sent.kind, sent.proto) == (twin.TYPE_DATA, twin.PROTO_TCP)


@given(stream=streams(text=True), sizes=SPLITS)
def test_each_target_gets_its_streams_bytes_in_order_and_nothing_else(stream: Stream, sizes: list[int]) -> None:
    for frame in (_frame, twin):
        relayed = relay_all(frame, stream, sizes, ROUTES)
        assert relayed.code is None
        for target in ("anna", "bert", "cleo"):
            ids = {old: new for old, (name, new) in ROUTES.items() if name == target}
            got = stream_bytes([m for m in relayed.got(target) if m[:2] == (3, 0)])
            expected = [
                (3, 0, ids[s.client_id], 0, s.payload) for s in stream.sent if is_data(s) and s.client_id in ids
            ]
            assert got == stream_bytes(expected)
        delivered = sum(len(m[4]) for target in relayed.out for m in relayed.got(target))
        assert relayed.walker.bytes_routed == delivered


@given(stream=streams(), sizes=SPLITS)
def test_nothing_is_lost_between_runs_events_and_the_count_of_the_unrouted(stream: Stream, sizes: list[int]) -> None:
    for frame in (_frame, twin):
        relayed = relay_all(frame, stream, sizes, ROUTES)
        others = [s for s in stream.sent if not is_data(s)]
        routed = [(m[0], m[1], m[2], m[4]) for t in relayed.out for m in relayed.got(t) if m[:2] != (3, 0)]
        events = [(m[0], m[1], m[2], m[4]) for m in relayed.events.whole]
        # Small routed messages in fragments come as events: the caller sees them, and nothing is guessed.
        nowhere = [s for s in stream.sent if s.kind in ROUTED and s.client_id not in ROUTES]
        dropped_others = relayed.walker.unrouted - sum(map(is_data, nowhere))
        assert len(routed) + len(events) + dropped_others == len(others)
        for kind, _, client_id, _ in routed:
            assert kind in ROUTED
            assert client_id in {new for _, new in ROUTES.values()}


@given(
    stream=st.one_of(streams(text=True), broken_streams(text=True)),
    sizes=SPLITS,
    routes=st.dictionaries(st.integers(0, 5), st.tuples(st.sampled_from("ab"), st.integers(0, 99)), max_size=6),
)
def test_extension_and_twin_relay_alike(stream: Stream, sizes: list[int], routes: dict[int, tuple[str, int]]) -> None:
    ours, theirs = (relay_all(frame, stream, sizes, routes) for frame in (_frame, twin))
    assert ours.answers == theirs.answers
    assert ours.code == theirs.code
    assert (ours.walker.unrouted, ours.walker.bytes_routed) == (theirs.walker.unrouted, theirs.walker.bytes_routed)


@given(
    stream=streams(masked=True, client_ids=3),
    sizes=SPLITS,
    changes=st.lists(st.tuples(st.integers(0, 2), st.sampled_from("ab")), min_size=1, max_size=30),
)
def test_no_message_is_ever_split_between_two_owners_of_an_id(
    stream: Stream, sizes: list[int], changes: list[tuple[int, str]]
) -> None:
    """Ids are freed and given to another session at any moment, also in the middle of a message."""
    for frame in (_frame, twin):
        todo = list(changes)
        owners = 0

        def change(relayed: Relayed, todo: list[tuple[int, str]] = todo) -> None:
            nonlocal owners
            if todo:
                client_id, name = todo.pop(0)
                relayed.table.remove(client_id)
                owners += 1
                relayed.table.add(client_id, f"{name}{owners}", client_id)

        walker = frame.RelayWalker(masked=True)
        relayed = Relayed(frame, frame.RoutingTable(), walker, between=change).feed(stream, sizes)
        assert relayed.code is None
        # A message's payload is its number, repeated.
        owners_of: dict[int, set[object]] = defaultdict(set)
        sent = {s.payload[0]: s for s in stream.sent if s.payload and s.kind < 0x100}
        for target in list(relayed.out):
            for kind, proto, client_id, _, payload in relayed.got(target):
                for number in set(payload):
                    owners_of[number].add(target)
                    message = sent[number]
                    assert (kind, proto, client_id) == (message.kind, message.proto, message.client_id)
        assert all(len(targets) == 1 for targets in owners_of.values())


def loaded(*frames: bytes) -> tuple[bytearray, int, int]:
    buf = bytearray(HEADROOM) + b"".join(frames)
    return buf, HEADROOM, len(buf)


def data(client_id: int, payload: bytes, key: int = 0x01020304) -> bytes:
    return twin.build_frame(3, 0, client_id, 0, payload, key)


def test_small_frames_of_one_target_become_one_run(frame: Any) -> None:
    table = table_of(frame, {1: ("anna", 70), 2: ("anna", 71), 3: ("bert", 72)})
    walker = frame.RelayWalker(masked=True)
    buf, start, stop = loaded(data(1, b"one"), data(2, b"two"), data(3, b"three"), data(1, b"four"), data(1, b"five"))
    runs, event, consumed = walker.relay(buf, start, stop, table)
    assert (event, consumed) == (None, stop)
    plain = [twin.build_frame(3, 0, new, 0, text) for new, text in ((70, b"one"), (71, b"two"), (72, b"three"))]
    four, five = (twin.build_frame(3, 0, 70, 0, text) for text in (b"four", b"five"))
    assert [(target, bytes(buf[a:b])) for target, a, b in runs] == [
        ("anna", plain[0] + plain[1]),
        ("bert", plain[2]),
        ("anna", four + five),
    ]


def test_a_large_frame_stays_where_it_is(frame: Any) -> None:
    payload = bytes(40_000)
    table = table_of(frame, {1: ("anna", 70)})
    buf, start, stop = loaded(data(1, payload), data(1, payload))
    runs, _, consumed = frame.RelayWalker(masked=True).relay(buf, start, stop, table)
    assert consumed == stop
    assert [b - a for _, a, b in runs] == [40_012, 40_012]
    assert [b for _, _, b in runs] == [start + 40_016, stop]


def test_a_piece_of_data_goes_on_at_once_as_a_frame_of_its_own(frame: Any) -> None:
    table = table_of(frame, {1: ("anna", 70)})
    walker = frame.RelayWalker(masked=True)
    buf, start, stop = loaded(data(1, b"abcdef"))
    runs, event, consumed = walker.relay(buf, start, stop - 2, table)
    assert [bytes(buf[a:b]) for _, a, b in runs] == [twin.build_frame(3, 0, 70, 0, b"abcd")]
    assert (event, consumed) == (None, stop - 2)
    runs, event, consumed = walker.relay(buf, consumed, stop, table)
    assert [bytes(buf[a:b]) for _, a, b in runs] == [twin.build_frame(3, 0, 70, 0, b"ef")]
    assert (event, consumed, walker.bytes_routed) == (None, stop, 6)


def test_the_rest_of_a_message_is_dropped_when_its_route_goes_and_counted_once(frame: Any) -> None:
    table = table_of(frame, {1: ("anna", 70)})
    walker = frame.RelayWalker(masked=True)
    buf, start, stop = loaded(data(1, b"abcdef"), data(1, b"next"))
    end = start + 20
    _, _, consumed = walker.relay(buf, start, end - 4, table)
    table.remove(1)
    runs, _, consumed = walker.relay(buf, consumed, end - 3, table)
    assert (runs, walker.unrouted) == ([], 1)
    table.add(1, "bert", 70)
    runs, _, consumed = walker.relay(buf, consumed, stop, table)
    assert [(t, bytes(buf[a:b])) for t, a, b in runs] == [("bert", twin.build_frame(3, 0, 70, 0, b"next"))]
    assert (consumed, walker.unrouted) == (stop, 1)


def test_the_rest_of_a_message_is_dropped_when_its_id_has_a_new_owner_at_once(frame: Any) -> None:
    table = table_of(frame, {1: ("anna", 70)})
    walker = frame.RelayWalker(masked=True)
    buf, start, stop = loaded(data(1, b"abcdef"))
    _, _, consumed = walker.relay(buf, start, stop - 3, table)
    table.remove(1)
    table.add(1, "anna", 70)
    runs, _, _ = walker.relay(buf, consumed, stop, table)
    assert (runs, walker.unrouted) == ([], 1)


def test_every_other_message_is_an_event_and_the_table_may_change_before_what_follows(frame: Any) -> None:
    table = frame.RoutingTable()
    walker = frame.RelayWalker(masked=True)
    connect = twin.build_frame(1, 0, 9, 80, b"12345678", 5)
    buf, start, stop = loaded(connect, data(9, b"early"))
    runs, event, consumed = walker.relay(buf, start, stop, table)
    assert (runs, event[:4], bytes(buf[event[4] : event[5]])) == ([], (1, 0, 9, 80), b"12345678")
    table.add(9, "tunnel", 1)
    runs, event, consumed = walker.relay(buf, consumed, stop, table)
    assert [(t, bytes(buf[a:b])) for t, a, b in runs] == [("tunnel", twin.build_frame(3, 0, 1, 0, b"early"))]
    assert (event, consumed, walker.unrouted) == (None, stop, 0)


@pytest.mark.parametrize("size", [(1 << 20) - 19, (1 << 20) - 18, (1 << 20) - 17, (1 << 20) + 9, 3 << 20])
def test_no_frame_over_one_mebibyte_leaves_whatever_arrives(size: int) -> None:
    payload = bytes(range(251)) * (size // 251) + bytes(size % 251)
    head = twin.ws_header(2, size + 8, 0) + twin.pack_header(3, 0, 1, 0)  # the key 0 masks nothing
    buf, start, stop = loaded(head, payload)
    walker, table = _frame.RelayWalker(masked=True), table_of(_frame, {1: ("anna", 70)})
    got, calls = b"", 0
    while start < stop:
        runs, event, consumed = walker.relay(buf, start, stop, table)
        assert event is None
        assert all(b - a <= 1 << 20 for _, a, b in runs)
        out = b"".join(bytes(buf[a:b]) for _, a, b in runs)
        got += b"".join(m[4] for m in walk_all(_frame, [out], masked=False)[0].whole)
        start, calls = consumed, calls + 1
        assert calls < 10
    assert got == payload


def test_fragments_of_one_byte_grow_and_still_never_overwrite_what_is_not_read(frame: Any) -> None:
    body = twin.pack_header(3, 0, 1, 0) + bytes(range(100))
    frames = [twin.build_ws(2, body[i : i + 1], -1) for i in range(len(body))]
    raw = b"".join(
        bytes([(0x80 if i == len(frames) - 1 else 0) | (0 if i else 2)]) + part[1:] for i, part in enumerate(frames)
    )
    relayed = relay_all(frame, Stream(raw, False, []), [], {1: ("anna", 70)})
    assert stream_bytes(relayed.got("anna")) == [(3, 0, 70, bytes(range(100)))]


def test_one_call_hands_out_a_bounded_number_of_runs(frame: Any) -> None:
    table = table_of(frame, {1: ("anna", 1), 2: ("bert", 1)})
    buf, start, stop = loaded(*(data(1 + i % 2, b"x") for i in range(3000)))
    walker = frame.RelayWalker(masked=True)
    total = 0
    while start < stop:
        runs, _, start = walker.relay(buf, start, stop, table)
        assert 0 < len(runs) <= 1024
        total += len(runs)
    assert total == 3000


def test_relay_needs_head_room(frame: Any) -> None:
    with pytest.raises(ValueError):
        frame.RelayWalker(masked=True).relay(bytearray(64), HEADROOM - 1, 64, frame.RoutingTable())


def test_an_event_comes_after_the_runs_before_it_and_before_what_is_behind_it(frame: Any) -> None:
    table = table_of(frame, {1: ("anna", 70)})
    walker = frame.RelayWalker(masked=True)
    close = twin.build_frame(4, 0, 1, 0, b"", 5)
    buf, start, stop = loaded(data(1, b"before"), close, data(1, b"behind"))
    runs, event, consumed = walker.relay(buf, start, stop, table)
    assert [bytes(buf[a:b]) for _, a, b in runs] == [twin.build_frame(3, 0, 70, 0, b"before")]
    assert (event[:3], consumed) == ((4, 0, 1), start + 20 + len(close))
    table.remove(1)
    assert walker.relay(buf, consumed, stop, table) == ([], None, stop)
    assert walker.unrouted == 1


def test_a_last_fragment_of_no_bytes_makes_no_frame_and_an_empty_message_does(frame: Any) -> None:
    table = table_of(frame, {1: ("anna", 70)})
    head = twin.pack_header(3, 0, 1, 0)
    fragments = b"\x02\x09" + head + b"x" + b"\x80\x00"
    buf, start, stop = loaded(fragments)
    walker = frame.RelayWalker(masked=False)
    runs, _, consumed = walker.relay(buf, start, stop, table)
    assert ([bytes(buf[a:b]) for _, a, b in runs], consumed) == ([twin.build_frame(3, 0, 70, 0, b"x")], stop)
    buf, start, stop = loaded(b"\x82\x08" + head)
    runs, _, consumed = walker.relay(buf, start, stop, table)
    assert ([bytes(buf[a:b]) for _, a, b in runs], consumed) == ([twin.build_frame(3, 0, 70, 0)], stop)


@pytest.mark.parametrize(("size", "runs"), [((16 << 10) - 12, 1), ((16 << 10) - 11, 2)])
def test_frames_of_up_to_16_kib_are_moved_together(frame: Any, size: int, runs: int) -> None:
    buf, start, stop = loaded(data(1, b"first"), data(1, bytes(size), 0))
    found, _, consumed = frame.RelayWalker(masked=True).relay(buf, start, stop, table_of(frame, {1: ("anna", 70)}))
    assert (len(found), consumed) == (runs, stop)
    out = b"".join(bytes(buf[a:b]) for _, a, b in found)
    assert out == twin.build_frame(3, 0, 70, 0, b"first") + twin.build_frame(3, 0, 70, 0, bytes(size))

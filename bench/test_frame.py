"""Micro benchmarks of the hot path, each beside its plain twin (ids: c, py). Times are per call, or as the name says.

The twin is Python written to be read, so the ratio says what the extension is for, not how good it is; for that there
are the absolute goals in the names' docstrings, and `bench/chain.py` for the whole chain.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from kohakuriver import _frame
from tests.reference import frame as twin

KEY = 0xA1B2C3D4
HEADROOM = 32


@pytest.fixture(params=[_frame, twin], ids=["c", "py"])
def frame(request: pytest.FixtureRequest) -> Any:
    return request.param


def data(client_id: int, size: int, key: int = KEY) -> bytes:
    return _frame.build_frame(3, 0, client_id, 0, bytes(size), key)


def loaded(*frames: bytes) -> tuple[bytearray, int, int]:
    buf = bytearray(HEADROOM) + b"".join(frames)
    return buf, HEADROOM, len(buf)


def often(benchmark: BenchmarkFixture, call: Callable[..., Any], *args: object) -> Any:
    """Time calls that are shorter than what the clock can tell, a thousand at a time."""
    return benchmark.pedantic(call, args, iterations=1000, rounds=200, warmup_rounds=2)  # type: ignore[no-untyped-call]


HEADERS = pytest.mark.parametrize("fields", [(3, 0, 7, 0), (1, 0, 0xDEADBEEF, 443)], ids=["DATA", "CONNECT"])


@pytest.mark.benchmark(group="header pack")
@HEADERS
def test_pack_header(benchmark: BenchmarkFixture, frame: Any, fields: tuple[int, int, int, int]) -> None:
    """Goal: at least ten times the twin."""
    assert often(benchmark, frame.pack_header, *fields) == twin.pack_header(*fields)


@pytest.mark.benchmark(group="header unpack")
@HEADERS
def test_unpack_header(benchmark: BenchmarkFixture, frame: Any, fields: tuple[int, int, int, int]) -> None:
    """Goal: at least ten times the twin."""
    assert often(benchmark, frame.unpack_header, twin.pack_header(*fields)) == fields


@pytest.mark.benchmark(group="mask 64 KiB")
def test_mask(benchmark: BenchmarkFixture, frame: Any) -> None:
    """Goal: at least 10 GB/s, which is 6.5 µs."""
    buf = bytearray(64 * 1024)
    benchmark(frame.mask, buf, 0, len(buf), KEY)


@pytest.mark.benchmark(group="mask 1 MiB")
def test_mask_of_a_read_as_large_as_they_come(benchmark: BenchmarkFixture) -> None:
    """Goal: at least 10 GB/s, which is 105 µs."""
    buf = bytearray(1 << 20)
    benchmark(_frame.mask, buf, 0, len(buf), KEY)


@pytest.mark.benchmark(group="frame in place, 64 bytes")
def test_frame_in_place(benchmark: BenchmarkFixture, frame: Any) -> None:
    buf = bytearray(HEADROOM + 64)
    assert benchmark(frame.frame_in_place, buf, HEADROOM, len(buf), 3, 0, 7, 0, KEY) == HEADROOM - 14


@pytest.mark.benchmark(group="build a WINDOW frame")
def test_build_frame(benchmark: BenchmarkFixture, frame: Any) -> None:
    payload = bytes(8)
    assert len(often(benchmark, frame.build_frame, 8, 0, 7, 0, payload, KEY)) == 22


@pytest.mark.benchmark(group="walk 100 frames of 64 bytes")
def test_walk_small_frames(benchmark: BenchmarkFixture, frame: Any) -> None:
    frames, start, stop = loaded(data(7, 64) * 100)
    walker = frame.FrameWalker(masked=True)

    def walk() -> Any:
        return walker.walk(bytearray(frames), start, stop)

    messages, consumed = benchmark(walk)
    assert (len(messages), consumed) == (100, stop)


@pytest.mark.benchmark(group="walk a frame of 64 KiB")
def test_walk_a_large_frame(benchmark: BenchmarkFixture, frame: Any) -> None:
    buf, start, stop = loaded(data(7, 64 * 1024, 0))
    walker = frame.FrameWalker(masked=True)
    messages, consumed = benchmark(walker.walk, buf, start, stop)
    assert (len(messages), consumed) == (1, stop)


def table_of(frame: Any, size: int) -> Any:
    table = frame.RoutingTable()
    for client_id in range(size):
        table.add(client_id, "target", client_id + 1)
    return table


@pytest.mark.benchmark(group="relay 100 frames of 64 bytes")
def test_relay_small_frames(benchmark: BenchmarkFixture, frame: Any) -> None:
    """Header rewrite, unmask and look-up: the whole work of hop 3 on request and reply."""
    frames, start, stop = loaded(*(data(i, 64) for i in range(100)))
    walker, table = frame.RelayWalker(masked=True), table_of(frame, 100)

    def relay() -> Any:
        return walker.relay(bytearray(frames), start, stop, table)

    runs, event, consumed = benchmark(relay)
    assert (len(runs), event, consumed) == (1, None, stop)


@pytest.mark.benchmark(group="relay a frame of 64 KiB")
def test_relay_a_large_frame(benchmark: BenchmarkFixture, frame: Any) -> None:
    original, start, stop = loaded(data(7, 64 * 1024, 0))
    walker, table = frame.RelayWalker(masked=True), table_of(frame, 100)
    head = bytes(original[: HEADROOM + 32])
    buf = bytearray(original)

    def relay() -> Any:
        buf[: len(head)] = head
        return walker.relay(buf, start, stop, table)

    runs, _, consumed = benchmark(relay)
    assert (len(runs), consumed) == (1, stop)


@pytest.mark.benchmark(group="splice 100 frames of 64 bytes")
def test_splice_small_frames(benchmark: BenchmarkFixture, frame: Any) -> None:
    buf, start, stop = loaded(data(7, 64) * 100)
    walker = frame.SpliceWalker(masked=True)
    assert benchmark(walker.splice, buf, start, stop) == (stop, None, stop)


@pytest.mark.benchmark(group="routing look-up among 2000")
def test_look_up_a_route(benchmark: BenchmarkFixture, frame: Any) -> None:
    """Called from Python, so most of the time is the call; see the next for the look-up itself."""
    assert often(benchmark, table_of(frame, 2000).get, 1234) == ("target", 1235)


@pytest.mark.benchmark(group="routing look-up from C, 10000 at a time")
@pytest.mark.parametrize("routes", [1, 2000])
def test_look_up_many_routes_from_c(benchmark: BenchmarkFixture, routes: int) -> None:
    """Goal: at most 50 ns a look-up. The messages lead nowhere, so each costs its header, its look-up, and no more."""
    buf, start, stop = loaded(*(data(10_000 + i * 7919 % 4096, 0, 0) for i in range(10_000)))
    walker, table = _frame.RelayWalker(masked=True), table_of(_frame, routes)
    runs, _, consumed = benchmark(walker.relay, buf, start, stop, table)
    assert (runs, consumed) == ([], stop)


@pytest.mark.benchmark(group="routing add and remove")
def test_add_and_remove_a_route(benchmark: BenchmarkFixture, frame: Any) -> None:
    table = table_of(frame, 2000)

    def add_and_remove() -> Any:
        table.add(5000, "target", 1)
        return table.remove(5000)

    assert often(benchmark, add_and_remove) == ("target", 1)


@pytest.mark.benchmark(group="a mask key")
def test_mask_key(benchmark: BenchmarkFixture, frame: Any) -> None:
    assert 0 <= often(benchmark, frame.MaskKeys().next) <= 0xFFFFFFFF

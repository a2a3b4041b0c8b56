"""What one user leaves behind in a container costs no other user anything."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from typing import Any, cast

import pytest

from kohakuriver.tunnel import keeper as keepers
from kohakuriver.tunnel.keeper import Keeper
from kohakuriver.tunnel.kept import Identity
from kohakuriver.tunnel.protocol import MARK
from kohakuriver.tunnel.udp import UdpStream

ANN, BOB = bytes([1]) * MARK, bytes([2]) * MARK
HOUR = 3600


def on_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    @functools.wraps(test)
    def run(*arguments: Any, **more: Any) -> None:
        asyncio.run(test(*arguments, **more))

    return run


class Owner:
    """What streams tell their end, and that tells its keeper."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper

    def stream_over(self, stream: UdpStream) -> None:
        self._keeper.over(stream)

    def stream_detached(self, stream: UdpStream) -> None:
        self._keeper.detached(stream, HOUR)


def key(number: int) -> bytes:
    return bytes(12) + number.to_bytes(4, "big")


def opened(keeper: Keeper, mark: bytes, number: int, hold: int = HOUR) -> UdpStream:
    identity = Identity(key(number), hold, mark, 80)
    stream = UdpStream(cast(Any, Owner(keeper)), 80, identity)
    keeper.enter(identity, stream)
    return stream


@on_a_loop
async def test_who_leaves_too_many_streams_behind_loses_the_oldest_of_them_and_nobody_else_any() -> None:
    keeper = Keeper(most_held=10)
    first = opened(keeper, ANN, 0)
    first.detach()
    many = [opened(keeper, BOB, number) for number in range(30)]
    for stream in many:
        stream.detach()
    assert keeper.held == 10
    assert not first.gone
    assert [stream.gone for stream in many] == [True] * 21 + [False] * 9
    keeper.attached(first)
    assert keeper.held == 9


@on_a_loop
async def test_who_ends_streams_without_end_makes_nobody_forget_how_another_ended() -> None:
    keeper = Keeper()
    ended = opened(keeper, ANN, 0)
    ended.over()
    for number in range(2 * keepers.MOST_ENDED):
        opened(keeper, BOB, number).over()
        keeper.never_was(BOB + key(1 << 31 | number))
    assert keeper.tombstone(ANN + key(0)) is not None
    assert keeper.tombstone(BOB + key(0)) is None
    assert keeper.tombstone(BOB + key(2 * keepers.MOST_ENDED - 1)) is not None
    assert keeper.knows(BOB + key(1 << 31 | 2 * keepers.MOST_ENDED - 1))
    assert not keeper.knows(BOB + key(1 << 31))


@pytest.mark.parametrize("holds", ["the same", "ever shorter"])
@on_a_loop
async def test_a_link_that_goes_with_thousands_of_streams_costs_each_of_them_the_same(holds: str) -> None:
    looks = 0

    class Counted(dict[Any, Any]):
        def values(self) -> Any:
            nonlocal looks
            looks += len(self)
            return super().values()

        def items(self) -> Any:
            nonlocal looks
            looks += len(self)
            return super().items()

    keeper = Keeper()
    streams = [
        opened(keeper, ANN, number, HOUR if holds == "the same" else HOUR - number // 4) for number in range(2000)
    ]
    streams[0].detach()
    waiting = next(iter(keeper._waiting.values()))
    waiting.holds = cast(Any, Counted(waiting.holds))
    for stream in streams[1:]:
        stream.detach()
    assert keeper.held == 2000
    assert looks == 0
    keeper.close(keepers.UNKNOWN)


@on_a_loop
async def test_a_stream_that_is_held_for_less_than_one_before_it_ends_first() -> None:
    keeper = Keeper()
    longer, shorter = opened(keeper, ANN, 0), opened(keeper, ANN, 1, hold=0)
    longer.detach()
    shorter.detach()
    over = asyncio.Event()
    shorter.shut = over.set
    await asyncio.wait_for(over.wait(), 10)
    assert not longer.gone
    keeper.close(keepers.UNKNOWN)
    assert longer.gone

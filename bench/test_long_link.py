"""A link of 50 ms each way: one stream fills what it allows at a gigabit, beside a plain stream in the same run."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest

from kohakuriver import runtime as loops
from tests.support.hops import CLIENTS, chain
from tests.support.network.long_link import long_link

clients = pytest.mark.parametrize("kind", CLIENTS)

GIGABIT = 125e6
DELAY = 0.05
# Windows have grown after the first part; the rate is that of the rest.
GROWING = 300_000_000
MEASURED = 250_000_000
# How often the measurement may be taken again, as somebody else may need the machine; each beside a plain stream.
ATTEMPTS = 4


def source(connection: socket.socket) -> None:
    """Send until the other side has had enough."""
    block = bytes(1 << 18)
    with contextlib.suppress(OSError):
        while True:
            connection.sendall(block)


def sink(connection: socket.socket) -> float:
    """Read, and say at which rate the second part came, in bytes a second."""
    buffer = bytearray(1 << 18)
    got, began = 0, 0.0
    while got < GROWING + MEASURED:
        if got < GROWING:
            before, began = got, time.monotonic()
        got += connection.recv_into(buffer)
    return (got - before) / (time.monotonic() - began)


@contextlib.contextmanager
def accepting(serve: Callable[[socket.socket], float | None]) -> Iterator[tuple[int, Future[float | None]]]:
    """Serve one connection on a thread: the port, and what ``serve`` comes to."""
    result: Future[float | None] = Future()

    def work() -> None:
        try:
            with listener.accept()[0] as connection:
                result.set_result(serve(connection))
        except OSError as error:
            result.set_exception(error)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=work, daemon=True).start()
        yield listener.getsockname()[1], result


def plain() -> float:
    """The rate of one TCP stream through a long link."""
    with accepting(sink) as (port, rate), long_link(port, delay=DELAY, rate=GIGABIT) as near:
        with socket.create_connection(("127.0.0.1", near)) as connection:
            source(connection)
        return rate.result() or 0.0


async def through_the_tunnel(kind: str, *, up: bool) -> float:
    """The rate of one stream through all four hops, with the long link between command line and host."""
    loop = asyncio.get_running_loop()
    async with chain() as hops:
        await hops.tunnel(kind)
        with long_link(hops.host_port, delay=DELAY, rate=GIGABIT) as near:
            hops.host_seen_by_user = lambda: near
            user = await hops.user()
            with accepting(sink if up else source) as (port, served):
                local = (await user.listen_tcp("127.0.0.1", 0, port)).port
                dial = socket.create_connection
                with await loop.run_in_executor(None, dial, ("127.0.0.1", local)) as connection:
                    if up:
                        threading.Thread(target=source, args=(connection,), daemon=True).start()
                        return await asyncio.wrap_future(served) or 0.0
                    return await loop.run_in_executor(None, sink, connection)


@clients
@pytest.mark.parametrize("up", [True, False], ids=["up", "down"])
def test_one_stream_fills_four_fifths_of_a_gigabit_over_50_ms_each_way(kind: str, up: bool) -> None:
    seen = []

    async def measure() -> None:
        loop = asyncio.get_running_loop()
        allowed = await loop.run_in_executor(None, plain)
        seen.append(await through_the_tunnel(kind, up=up) / allowed)

    for _ in range(ATTEMPTS):
        loops.run(measure())
        if seen[-1] >= 0.8:
            return
    raise AssertionError(f"of what a plain stream gets: {seen}")

"""Who waits, and who has to go for another."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from kohakuriver.web.waiting_room import WaitingRoom
from tests.support.hops import until

Run = Callable[[Coroutine[Any, Any, None]], None]


def test_a_source_that_fills_its_places_evicts_its_own_and_nobody_else() -> None:
    gone: list[str] = []
    room = WaitingRoom(100, 3)
    room.enter("first", partial(gone.append, "first"), "quiet")
    for number in range(10):
        room.enter(number, partial(gone.append, str(number)), "loud")
    assert gone == [str(number) for number in range(7)]
    assert len(room) == 4


def test_of_many_sources_the_one_that_has_waited_for_longest_goes(run: Run) -> None:
    async def check() -> None:
        gone: list[int] = []
        room = WaitingRoom(16, 3)
        for number in range(20):
            room.enter(number, partial(gone.append, number), str(number))
        await until(lambda: len(room) == 16)
        assert gone == [0, 1, 2, 3]
        room.leave(4)
        room.enter(20, partial(gone.append, 20), "20")
        assert gone == [0, 1, 2, 3]

    run(check())


def test_who_comes_with_many_others_and_has_sent_something_is_heard_before_anybody_has_to_go(run: Run) -> None:
    async def check() -> None:
        room, heard = WaitingRoom(16), asyncio.Event()
        server = socket.create_server(("127.0.0.1", 0), backlog=100)
        server.setblocking(False)
        loop = asyncio.get_running_loop()
        gone: list[int] = []

        def hear(number: int) -> None:
            room.leave(number)
            heard.set()

        peers = [socket.create_connection(server.getsockname()) for _ in range(30)]
        peers[0].sendall(b"x")  # the one that came first, and would be the first to go
        for number in range(len(peers)):
            accepted, _ = await loop.sock_accept(server)
            accepted.setblocking(False)
            room.enter(number, partial(gone.append, number))
            loop.add_reader(accepted, hear, number)
            peers.append(accepted)
        await until(lambda: len(room) == 16)
        assert heard.is_set()
        assert 0 not in gone
        for sock in (*peers, server):
            loop.remove_reader(sock)
            sock.close()

    run(check())


def test_there_are_never_more_than_twice_as_many_as_there_may_be(run: Run) -> None:
    async def check() -> None:
        room = WaitingRoom(16)
        for number in range(1000):
            room.enter(number, lambda: None)
            assert len(room) <= 32

    run(check())

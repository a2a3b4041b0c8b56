"""WebSockets of whole messages, on real sockets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
from fastapi import FastAPI

from kohakuriver.errors import NotFoundError
from kohakuriver.tunnel import message_link as messages
from kohakuriver.tunnel.accept import TunnelRoute, UpgradeRequest, serve_ws
from kohakuriver.tunnel.dial import Server, open_messages
from kohakuriver.tunnel.message_link import MessageLink, size_of
from kohakuriver.tunnel.protocol import TERMINAL_V2
from tests.support.serving import serving

Run = Callable[[Coroutine[Any, Any, None]], None]


class Accepting:
    """A path on which every WebSocket is accepted, and waits to be taken."""

    def __init__(self) -> None:
        self.accepted: asyncio.Queue[MessageLink] = asyncio.Queue()

    def routes(self) -> list[TunnelRoute]:
        return [TunnelRoute(path, self.open) for path in ("/", "/{any}")]

    async def open(self, request: UpgradeRequest, *_parts: str) -> None:
        if request.path == "/nothing":
            raise NotFoundError("There is nothing.")
        self.accepted.put_nowait(request.accept_messages(TERMINAL_V2))


@contextlib.asynccontextmanager
async def a_pair(*subprotocols: str) -> AsyncIterator[tuple[MessageLink, MessageLink]]:
    """(dialled, accepted)"""
    route = Accepting()
    async with serving(FastAPI(), serve_ws(route.routes())) as url:
        dialled = await open_messages(Server(url.replace("http", "ws")), subprotocols=subprotocols)
        accepted = await route.accepted.get()
        yield dialled, accepted
        dialled.begin_close()
        await accepted.wait_closed()
        await dialled.wait_closed()


def test_messages_pass_whole_both_ways_as_the_kind_that_they_are(run: Run) -> None:
    async def main() -> None:
        async with a_pair(TERMINAL_V2) as (dialled, accepted):
            assert dialled.subprotocol == accepted.subprotocol == TERMINAL_V2
            sent: list[str | bytes] = ["text €", b"\xff\x00bytes", b"", "", b"x" * 1_000_000]
            for source, target in ((dialled, accepted), (accepted, dialled)):
                sending = asyncio.ensure_future(_send_all(source, sent))
                assert [await target.receive() for _ in sent] == sent
                await sending

    run(main())


async def _send_all(link: MessageLink, sent: list[str | bytes]) -> None:
    for message in sent:
        await link.send(message)


def test_a_subprotocol_is_only_answered_where_it_is_offered(run: Run) -> None:
    async def main() -> None:
        async with a_pair() as (dialled, accepted):
            assert (dialled.subprotocol, accepted.subprotocol) == (None, None)

    run(main())


def test_a_refusal_is_the_error_that_its_status_stands_for(run: Run) -> None:
    async def main() -> None:
        async with serving(FastAPI(), serve_ws(Accepting().routes())) as url:
            with pytest.raises(NotFoundError):
                await open_messages(
                    Server(f"{url.replace('http', 'ws')}/nothing"), subprotocols=("kohakuriver.tunnel.v2",)
                )

    run(main())


def test_whoever_does_not_receive_holds_the_sender_up_and_nothing_is_lost(run: Run) -> None:
    async def main() -> None:
        async with a_pair() as (dialled, accepted):
            piece, count = b"p" * 65536, 1000

            async def send() -> None:
                for _ in range(count):
                    await accepted.send(piece)

            sending = asyncio.ensure_future(send())
            # Reading stops long before so much is there: only then can the other end be held up.
            while not dialled._paused:
                await asyncio.wait({sending}, timeout=0.001)
            assert dialled._waiting < 2 * messages.MAX_WAITING + len(piece)
            assert not sending.done()
            for _ in range(count):
                assert await dialled.receive() == piece
            await sending

    run(main())


def test_the_close_code_and_its_reason_arrive_behind_the_last_message(run: Run) -> None:
    async def main() -> None:
        async with a_pair() as (dialled, accepted):
            await accepted.send(b"last")
            accepted.begin_close(4001, "enough")
            assert [await dialled.receive(), await dialled.receive()] == [b"last", None]
            assert (dialled.close_code, dialled.close_reason) == (4001, "enough")
            with pytest.raises(ConnectionError):
                await dialled.send(b"too late")

    run(main())


def test_a_peer_that_vanishes_is_an_end_without_a_close_code(run: Run) -> None:
    async def main() -> None:
        async with a_pair() as (dialled, accepted):
            accepted.abort()
            assert await dialled.receive() is None
            assert dialled.close_code == 1006

    run(main())


def test_a_silent_peer_is_dropped_and_an_idle_one_that_answers_is_not(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MessageLink, "idle_ping", 0.02)
    monkeypatch.setattr(MessageLink, "pong_wait", 0.2)

    async def main() -> None:
        async with a_pair() as (dialled, accepted):
            accepted.watch.stop()  # only one of the two asks
            frames: Any = accepted._frames
            heed, pinged = frames.receive_data, asyncio.Queue[None]()

            def receive(data: bytes) -> None:
                pinged.put_nowait(None)
                heed(data)

            frames.receive_data = receive
            for _ in range(5):
                await pinged.get()
            assert not dialled._lost.is_set()
            frames.receive_data = lambda data: None
            assert await dialled.receive() is None
            assert "no answer to a ping" in dialled.close_reason

    run(main())


def test_a_broken_frame_closes_with_the_code_that_the_sender_is_owed(run: Run) -> None:
    async def main() -> None:
        async with a_pair() as (dialled, accepted):
            dialled._transport.write(b"\xff\xff\xff\xff")
            assert await accepted.receive() is None
            assert accepted.close_code == 1002
            assert await dialled.receive() is None
            assert dialled.close_code == 1002

    run(main())


def test_the_size_of_a_message_is_that_of_its_bytes() -> None:
    assert (size_of("grüße"), size_of("grüße".encode()), size_of("")) == (7, 7, 0)


def test_who_sends_many_messages_at_once_keeps_nobody_waiting_for_all_of_them(run: Run) -> None:
    async def main() -> None:
        async with a_pair() as (dialled, accepted):
            sending = asyncio.ensure_future(_send_all(dialled, ["x"] * 4000))
            turns, others, taken = 0, asyncio.Event(), 0

            async def another() -> None:
                nonlocal turns
                while not others.is_set():
                    turns += 1
                    await asyncio.sleep(0)

            beside = asyncio.ensure_future(another())
            while taken < 4000:
                assert await accepted.receive() == "x"
                taken += 1
            others.set()
            await beside
            await sending
            assert turns >= 4000 // messages.TAKEN_AT_ONCE

    run(main())

"""Whose TLS handshake begins, and when."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from kohakuriver.cli.pki import Authority
from kohakuriver.tls import ServerCertificate
from kohakuriver.web import listener
from kohakuriver.web.app import new_app
from kohakuriver.web.handshakes import BURST, HandshakeQueue
from tests.support.serving import a_server

Run = Callable[[Coroutine[Any, Any, None]], None]


def test_a_source_that_asks_for_more_than_its_turns_waits_for_itself_alone(run: Run) -> None:
    began = list[str]()

    class Told(HandshakeQueue):
        def _take(self, turn: tuple[str, asyncio.Future[None]]) -> None:
            began.append(turn[0])
            super()._take(turn)

    async def main() -> None:
        queue = Told(rate=500)

        async def before(source: str) -> int:
            """How many of the rush begin while this one waits."""
            asked = len(began)
            await queue.turn(source)
            return began[asked : began.index(source)].count("a")

        rush = [asyncio.ensure_future(queue.turn("a")) for _ in range(BURST + 100)]
        await asyncio.wait(rush, return_when=asyncio.FIRST_COMPLETED)
        assert max(await asyncio.gather(before("b"), before("c"))) <= 1
        for waiting in rush:
            waiting.cancel()

    run(main())


def test_who_gave_up_takes_no_turn(run: Run) -> None:
    async def main() -> None:
        queue = HandshakeQueue(rate=500)
        rush = [asyncio.ensure_future(queue.turn("a")) for _ in range(BURST + 1000)]
        await asyncio.sleep(0)
        for waiting in rush:
            waiting.cancel()
        await asyncio.wait_for(queue.turn("a"), 1)  # the thousand would have taken two seconds

    run(main())


def test_who_connects_under_tls_and_says_nothing_has_no_handshake(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Authority(tmp_path).issue(["localhost"], 1)
    begun = list[str]()

    class Counted(HandshakeQueue):
        async def turn(self, source: str) -> None:
            begun.append(source)
            await super().turn(source)

    monkeypatch.setattr(listener, "HandshakeQueue", Counted)

    def shake_hands(address: tuple[str, int]) -> None:
        trusted = ssl.create_default_context(cafile=tmp_path / "ca.pem")
        with trusted.wrap_socket(socket.create_connection(address, 30), server_hostname="localhost") as connection:
            connection.sendall(b"GET /none HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(100).startswith(b"HTTP/1.1 404")

    async def main() -> None:
        certificate = ServerCertificate(made.cert, made.key)
        async with a_server(new_app("t", "1"), certificate=certificate) as (_, sock):
            with contextlib.ExitStack() as stack:
                for _ in range(100):
                    stack.enter_context(socket.create_connection(sock.getsockname(), 30))
                await asyncio.to_thread(shake_hands, sock.getsockname())
                assert begun == ["127.0.0.1"]

    run(main())

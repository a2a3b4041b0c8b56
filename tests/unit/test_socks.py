"""What programs may say to a SOCKS port, and what becomes of those that say something else."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from kohakuriver.client import socks
from kohakuriver.client.socks import SocksServer
from kohakuriver.tunnel import local_listeners
from kohakuriver.tunnel.local_listeners import listen_for
from kohakuriver.tunnel.settings import EndpointConfig
from kohakuriver.tunnel.user_endpoint import UserEndpoint

Run = Callable[[Coroutine[Any, Any, None]], None]

GREETING = b"\x05\x01\x00"
LOCALHOST = b"\x05\x01\x00\x03\x09localhost\x00\x50"


class Server:
    """A SOCKS port of a forward that has no session, so that what is connected fails at once."""

    def __init__(self, port: int, refused: list[tuple[int, str]]) -> None:
        self.port = port
        self.refused = refused

    async def said(self, *words: bytes) -> bytes:
        """All that is answered until the end, whichever kind of end that is."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        answer = b""
        with contextlib.suppress(ConnectionError):
            for each in words:
                writer.write(each)
                await writer.drain()
                await asyncio.sleep(0)
            while more := await reader.read(100):
                answer += more
        writer.close()
        return answer


@contextlib.asynccontextmanager
async def serving() -> AsyncIterator[Server]:
    endpoint = UserEndpoint(config=EndpointConfig(reattach_wait=0.0, outage=0.0))
    refused: list[tuple[int, str]] = []
    server = SocksServer(endpoint, "Lab", lambda port, why: refused.append((port, why)))
    listening = await listen_for("127.0.0.1", 0, "socks5", server.serve)
    try:
        yield Server(listening.port, refused)
    finally:
        listening.close()
        await endpoint.close()


def reply(code: int) -> bytes:
    return b"\x05\x00" + bytes((5, code, 0, 1)) + bytes(6)


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (b"\x05\x01\x00\x03\x0bexample.com\x00\x50", 2),
        (b"\x05\x01\x00\x03\x00\x00\x50", 2),
        (b"\x05\x01\x00\x03\x0alocalhost\xff\x00\x50", 2),
        (b"\x05\x01\x00\x01\x7f\x00\x00\x02\x00\x50", 2),
        (b"\x05\x01\x00\x01\x0a\x00\x00\x01\x00\x50", 2),
        (b"\x05\x01\x00\x04" + bytes(16) + b"\x00\x50", 2),
        (b"\x05\x01\x00\x01\x7f\x00\x00\x01\x00\x00", 1),
        (b"\x05\x02\x00\x01\x7f\x00\x00\x01\x00\x50", 7),
        (b"\x05\x03\x00\x01\x7f\x00\x00\x01\x00\x50", 7),
        (b"\x05\x01\x00\x02", 8),
        (LOCALHOST, 1),
        (b"\x05\x01\x00\x01\x7f\x00\x00\x01\x00\x50", 1),
        (b"\x05\x01\x00\x04" + bytes(15) + b"\x01\x00\x50", 1),
        (b"\x05\x01\x00\x03\x03lAB\x00\x50", 1),
        (b"\x05\x01\x00\x03\x04lab.\x00\x50", 1),
    ],
    ids=[
        *("name", "no name", "odd name", "127.0.0.2", "10.0.0.1", "::"),
        *("port 0", "bind", "udp", "kind", "localhost", "127.0.0.1", "::1", "task", "task."),
    ],
)
def test_what_is_not_the_task_is_refused_and_what_is_is_tried(run: Run, request_: bytes, code: int) -> None:
    async def ask() -> None:
        async with serving() as server:
            assert await server.said(GREETING + request_) == reply(code)  # 1: there is no session to be had here
            assert len(server.refused) == (code == 2)

    run(ask())


def test_a_destination_beyond_the_task_is_told_in_one_line_whatever_it_is(run: Run) -> None:
    async def ask() -> None:
        async with serving() as server:
            await server.said(GREETING + b"\x05\x01\x00\x03\x08a\nb\x1b[2Jc\x01\xbb")
            ((port, why),) = server.refused
            assert port == 443
            assert why == "a b\\x1b[2Jc is not to be had by SOCKS, which leads to localhost in Lab alone"

    run(ask())


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ([b"\x04\x01\x00\x50\x7f\x00\x00\x01\x00"], b""),
        ([b"GET / HTTP/1.1\r\n\r\n"], b""),
        ([b"\x05\x01\x02"], b"\x05\xff"),
        ([b"\x05\x00"], b"\x05\xff"),
        ([GREETING, b"\x04\x01\x00\x01\x7f\x00\x00\x01\x00\x50"], b"\x05\x00"),
    ],
    ids=["socks 4", "http", "password alone", "no method", "another version"],
)
def test_what_is_no_socks_5_is_let_go(run: Run, words: list[bytes], answer: bytes) -> None:
    async def ask() -> None:
        async with serving() as server:
            assert await server.said(*words) == answer

    run(ask())


def test_a_head_that_comes_byte_by_byte_is_understood(run: Run) -> None:
    async def ask() -> None:
        async with serving() as server:
            assert await server.said(*(bytes((each,)) for each in GREETING + LOCALHOST)) == reply(1)

    run(ask())


@pytest.mark.parametrize("head", [b"", b"\x05", GREETING, GREETING + LOCALHOST[:-1]], ids=len)
def test_a_program_that_does_not_go_on_is_let_go_and_lets_others_come(
    run: Run, head: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socks, "HEAD_SECONDS", 0.1)
    monkeypatch.setattr(local_listeners, "MOST_SERVED", 2)

    async def ask() -> None:
        async with serving() as server:
            silent = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(5)]
            for _, writer in silent:
                writer.write(head)
            assert await server.said(GREETING + LOCALHOST) == reply(1)
            for reader, writer in silent:
                with contextlib.suppress(ConnectionError):
                    while await reader.read(100):
                        pass
                writer.close()

    run(ask())


def test_what_is_about_to_be_served_ends_with_the_port(run: Run) -> None:
    async def ask() -> None:
        async with serving() as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(GREETING)
            assert await reader.readexactly(2) == b"\x05\x00"
        assert await reader.read(1) == b""
        writer.close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", server.port)).close()

    run(ask())

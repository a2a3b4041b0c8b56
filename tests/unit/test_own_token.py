"""The Python tunnel client's credentials."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from kohakuriver.errors import UsageError
from kohakuriver.tunnel.client import TunnelClient
from kohakuriver.tunnel.own_token import OwnToken
from kohakuriver.tunnel.protocol import CLIENT_HEADER, NEW_TOKEN, PING, TUNNEL_V2
from tests.support.hops import until

Run = Callable[[Coroutine[Any, Any, None]], None]


def test_a_token_that_is_taken_is_held_and_its_file_is_gone_until_there_is_a_newer_one(tmp_path: Path) -> None:
    file = tmp_path / "token"
    token = OwnToken(file, take=True)
    with pytest.raises(UsageError, match="can't be read"):
        token.now()
    file.write_text("one\n")
    assert token.is_there
    token.new_one_is_there()
    assert not file.exists()
    assert (token.now(), token.is_there) == ("one", False)
    file.write_text("two")
    assert token.now() == "two"
    assert not file.exists()


def test_a_token_in_a_file_that_stays_is_left_there_and_read_anew(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("one")
    token = OwnToken(file)
    token.new_one_is_there()
    assert (token.now(), file.exists(), token.is_there) == ("one", True, False)
    file.write_text("two")
    assert token.now() == "two"


def test_each_client_has_an_id_of_its_own() -> None:
    assert len({OwnToken(None).client for _ in range(10)}) == 10
    assert OwnToken(None).now() is None


def test_the_python_client_takes_a_new_token_when_its_runner_says_so_and_stays_the_same_client(
    run: Run, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    file.write_text("first")

    async def check() -> None:
        shown: list[tuple[str, str]] = []

        async def runner(client: ServerConnection) -> None:
            assert client.request is not None
            headers = client.request.headers
            shown.append((headers["Authorization"], headers[CLIENT_HEADER]))
            if len(shown) == 1:
                file.write_text("second")
                await client.send(bytes([PING, 0, 0, 0, 0, 0, 0, 0]) + NEW_TOKEN)
                await client.recv()  # its answer
                assert not file.exists()
                return
            with contextlib.suppress(ConnectionClosed):
                await client.recv()

        async with serve(runner, "127.0.0.1", 0, subprotocols=[Subprotocol(TUNNEL_V2)]) as server:
            port = server.sockets[0].getsockname()[1]
            client = TunnelClient(f"http://127.0.0.1:{port}", "vm-1", token=OwnToken(file, take=True))
            serving = asyncio.ensure_future(client.serve())
            await until(lambda: len(shown) == 2)
            serving.cancel()
        assert [authorization for authorization, _ in shown] == ["Bearer first", "Bearer second"]
        assert shown[0][1] == shown[1][1]

    run(check())

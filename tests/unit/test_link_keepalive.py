"""Keepalive of links (docs/protocol.md §3 rule 11), with a peer that never pings by itself, as browsers are."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from fastapi import FastAPI

from kohakuriver._frame import WS_PING, FrameWalker, Message
from kohakuriver.tunnel.accept import Ignore, TunnelRoute, UpgradeRequest, serve_ws
from kohakuriver.tunnel.dial import Server, open_link
from kohakuriver.tunnel.link import Link
from tests.support.serving import serving

Run = Callable[[Coroutine[Any, Any, None]], None]


class Quiet:
    """A path whose links only answer; counts the pings that they get."""

    def __init__(self) -> None:
        self.pinged: asyncio.Queue[None] = asyncio.Queue()

    async def open(self, request: UpgradeRequest) -> None:
        link = request.accept(FrameWalker(masked=True), Ignore())
        link.watch.stop()
        answer = link.control

        def control(message: Message) -> None:
            if message[0] == WS_PING:
                self.pinged.put_nowait(None)
            answer(message)

        link.control = control  # type: ignore[method-assign]


def test_an_idle_peer_that_answers_every_ping_is_never_dropped(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Link, "idle_ping", 0.02)
    monkeypatch.setattr(Link, "pong_wait", 0.05)

    async def main() -> None:
        quiet = Quiet()
        async with serving(FastAPI(), serve_ws([TunnelRoute("/", quiet.open)])) as url:
            link = await open_link(Server(url.replace("http", "ws")), FrameWalker(masked=False), Ignore())
            for _ in range(20):
                await asyncio.wait_for(quiet.pinged.get(), 10)
            assert not link.closing.state
            link.close()

    run(main())

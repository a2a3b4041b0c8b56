"""A service in a task, and somebody's browser that is logged in to the host: what tests of apps begin with."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import pytest
from aiohttp import web as server

from tests.support.apps import Stage, Surfer, apps

__all__ = ["SIZE", "App", "Check", "Scene", "code_for", "come_by", "enter", "scene"]

Run = Callable[[Coroutine[Any, Any, None]], None]
SIZE = 64 << 20
"""Bytes of a large answer."""


class App:
    """A service in a task."""

    def __init__(self) -> None:
        self.asked: list[server.Request] = []
        self.port = 0

    async def told(self, request: server.Request) -> server.Response:
        """What the service was told."""
        self.asked.append(request)
        body = await request.text()
        return server.json_response({"path": request.path_qs, "fields": list(request.headers.items()), "body": body})

    async def socket(self, request: server.Request) -> server.WebSocketResponse:
        answer = server.WebSocketResponse()
        await answer.prepare(request)
        async for message in answer:
            if message.type is aiohttp.WSMsgType.TEXT:
                await answer.send_str(message.data)
        return answer

    async def cookie(self, request: server.Request) -> server.Response:
        answer = server.Response(text="set")
        answer.set_cookie("theirs", "1", domain="localhost")
        for name in ("kohakuriver-host-1", "__Host-kohakuriver-host-1", "__Host-kohakuriver-app", "kohakuriver-app-1"):
            answer.set_cookie(name, "1")
        return answer

    async def refreshing(self, request: server.Request) -> server.Response:
        fields = {"Refresh": "0; url=/landed?x", "Link": f"<http://localhost:{self.port}/next>; rel=next"}
        return server.Response(text="later", headers=fields)

    async def large(self, request: server.Request) -> server.StreamResponse:
        answer = server.StreamResponse()
        answer.content_length = SIZE
        await answer.prepare(request)
        for _ in range(SIZE >> 20):
            await answer.write(bytes(1 << 20))
        return answer


@contextlib.asynccontextmanager
async def serving(app: App) -> AsyncIterator[int]:
    made = server.Application()
    made.router.add_get("/socket", app.socket)
    made.router.add_get("/cookie", app.cookie)
    made.router.add_get("/refreshing", app.refreshing)
    made.router.add_get("/large", app.large)
    made.router.add_route("*", "/{path:.*}", app.told)
    runner = server.AppRunner(made, shutdown_timeout=0.1, access_log=None, handler_cancellation=True)
    await runner.setup()
    try:
        await server.TCPSite(runner, "127.0.0.1", 0).start()
        app.port = runner.addresses[0][1]
        yield app.port
    finally:
        await runner.cleanup()


@dataclass
class Scene:
    """A service in the task `lab`, and somebody's browser that is logged in to the host."""

    stage: Stage
    app: App
    task: dict[str, Any]
    surfer: Surfer

    @property
    def origin(self) -> str:
        """That of the service's address."""
        return self.stage.app(self.task, self.app.port)

    @property
    def link(self) -> str:
        """What the host's page links to."""
        return f"{self.surfer.main}/open/lab/{self.app.port}"

    async def get(self, path: str = "/", **how: Any) -> Any:
        return await self.surfer.ask(f"{self.origin}{path}", **how)

    async def told(self, path: str, host: str) -> None:
        """Return once the service is told that path and that Host of a request; the test's own time-out ends it."""
        while True:
            told = (await self.get()).json()
            if (told["path"], dict(told["fields"])["Host"]) == (path, host):
                return
            await asyncio.sleep(0.01)

    async def raw(self, *requests: str) -> str:
        """All that is answered to requests that are sent at once, on one connection."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.stage.port)
        writer.write("".join(requests).replace("\n", "\r\n").encode("latin-1"))
        if "Connection: close" not in requests[-1]:
            writer.write_eof()
        answer = await reader.read()
        writer.close()
        return answer.decode("latin-1")

    @property
    def cookie(self) -> str:
        """What the browser sends to the service's address."""
        return "; ".join(f"{name}={value}" for name, value in self.surfer.cookies(self.origin).items())

    @property
    def host(self) -> str:
        return urlsplit(self.origin).netloc

    def events(self) -> list[dict[str, Any]]:
        path = self.stage.host.audit.path
        return [json.loads(line) for line in path.read_text().splitlines()]


Check = Callable[[Scene], Coroutine[Any, Any, None]]


@pytest.fixture
def scene(run: Run, tmp_path: Path) -> Callable[..., None]:
    """Run a check with a scene; the browser has opened the app where it is to be `there`."""

    def go(check: Check, *, there: bool = True, **how: Any) -> None:
        async def main() -> None:
            app = App()
            async with apps(tmp_path, **how) as stage, serving(app):
                task = await stage.host.create(name="lab", command=["true"])
                made = Scene(stage, app, task, await stage.surfer())
                if there:
                    assert (await made.surfer.go(made.link, site="same-origin")).json()["path"] == "/"
                await check(made)

        run(main())

    return go


async def code_for(made: Scene, surfer: Surfer | None = None) -> str:
    """A code that has not been used, for the browser whose state the app's address has set."""
    page = await (surfer or made.surfer).go(made.link, site="same-origin", until="/.kohakuriver/enter")
    found = re.search(r'name="code" value="([^"]*)"', page.text)
    assert found, page.text
    return found[1]


async def enter(made: Scene, surfer: Surfer, code: str, origin: str = "") -> Any:
    """Bring a code to an address."""
    url = f"{origin or made.origin}/.kohakuriver/enter"
    return await surfer.ask(url, "POST", site="same-origin", data={"code": code})


async def come_by(surfer: Surfer, url: str) -> Any:
    """Open a link: its page sends what is behind the # itself. The answer to that."""
    page, _, secret = url.partition("#")
    shown = await surfer.ask(page)
    assert shown.status_code == 200
    assert secret not in shown.text
    return await surfer.ask(page, "POST", site="same-origin", data={"code": secret})

"""A terminal's way through the host: from the user's WebSocket to the runner's and back (docs/protocol.md §6)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from kohakuriver.errors import KohakuRiverError
from kohakuriver.tunnel import terminal
from kohakuriver.tunnel.handshake import open_messages
from kohakuriver.tunnel.messages import MessageLink, may_close_with
from kohakuriver.tunnel.protocol import TERMINAL_V2, CloseCode
from kohakuriver.tunnel.server import TunnelRoute, UpgradeRequest

__all__ = ["TerminalProxy", "TerminalTarget"]

RUNNER_TIMEOUT = 10.0

log = structlog.get_logger("kohakuriver.proxy")


@dataclass(frozen=True)
class TerminalTarget:
    """Where a terminal is opened: the runner's `ws://` address, the task's id, and the ticket to show."""

    runner_ws_url: str
    task_id: int
    ticket: str


class TerminalProxy:
    """All terminals that go through a host.

    Args:
        authorize: (bearer token or None, task's id or name) → where it goes. Raises KohakuRiverError.
    """

    def __init__(self, *, authorize: Callable[[str | None, str], Awaitable[TerminalTarget]]) -> None:
        self._authorize = authorize
        self._terminals: dict[asyncio.Task[None], MessageLink] = {}

    def routes(self) -> list[TunnelRoute]:
        """The WebSocket paths that this proxy answers."""
        return [self]

    def match(self, path: str) -> bool:
        return terminal.PATH.match(path) is not None

    async def open(self, request: UpgradeRequest) -> None:
        """Open the terminal at the runner first: its answer decides ours, the version included."""
        found = terminal.PATH.match(request.path)
        assert found is not None
        try:
            runner = await self._open_runner(request, await self._authorize(request.token, found[1]))
        except KohakuRiverError as error:
            log.info("terminal refused", task=found[1], peer=request.peer, reason=error.message)
            await terminal.refuse(request, error)
            return
        try:
            user = request.accept_messages(runner.subprotocol)
        except KohakuRiverError:  # the user has hung up
            runner.begin_close(CloseCode.GOING_AWAY)
            raise
        running = asyncio.get_running_loop().create_task(_relay(user, runner))
        self._terminals[running] = user
        running.add_done_callback(self._terminals.pop)

    async def _open_runner(self, request: UpgradeRequest, target: TerminalTarget) -> MessageLink:
        start = "?start=1" if request.query.get("start") == "1" else ""
        runner = await open_messages(
            f"{target.runner_ws_url}/ws/task/{target.task_id}/terminal{start}",
            token=target.ticket,
            subprotocols=(TERMINAL_V2,) if TERMINAL_V2 in request.subprotocols else (),
            timeout=RUNNER_TIMEOUT,
        )
        if request.query.get("tty") != "0":
            runner.limit_window()
        return runner

    async def close(self) -> None:
        """Close every terminal."""
        for user in self._terminals.values():
            user.begin_close(CloseCode.GOING_AWAY, "the host is shutting down")
        await asyncio.gather(*self._terminals, return_exceptions=True)


async def _relay(user: MessageLink, runner: MessageLink) -> None:
    """Pass messages on until one side ends, and end the other side like it."""
    await asyncio.gather(_pass(user, runner), _pass(runner, user))


async def _pass(source: MessageLink, target: MessageLink) -> None:
    with contextlib.suppress(ConnectionError):
        while (message := await source.receive()) is not None:
            await target.send(message)
    reason = source.close_reason or "the other side of the terminal went"
    await target.close(may_close_with(source.close_code), reason)

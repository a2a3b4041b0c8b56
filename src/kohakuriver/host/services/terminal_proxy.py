"""A terminal's way through the host: from the user's WebSocket to the runner's and back (docs/protocol.md §6)."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import structlog

from kohakuriver.errors import KohakuRiverError, NotAllowedError, UnavailableError
from kohakuriver.limits import Limits
from kohakuriver.runtime import cancel_all
from kohakuriver.session.carried import Carrier, Passed, Route, at_runner
from kohakuriver.session.pace import PacedMessages
from kohakuriver.tunnel import terminal
from kohakuriver.tunnel.accept import TunnelRoute, UpgradeRequest
from kohakuriver.tunnel.dial import open_messages
from kohakuriver.tunnel.message_link import MessageLink, may_close_with, size_of
from kohakuriver.tunnel.protocol import TERMINAL_V2, CloseCode

__all__ = ["TerminalProxy"]

FAREWELL_SECONDS = 1.0

log = structlog.get_logger("kohakuriver.proxy")


class TerminalProxy:
    """All terminals that go through a host.

    Args:
        authorize: (bearer token or None, task's id or name) → where it goes. Raises KohakuRiverError.
        trusted: how runners that serve TLS are checked; None for the system's authorities.
        limits: what a terminal may take.
        credential: what an opening handshake shows: `authorize` is asked with that. Raises NotAllowedError.
    """

    def __init__(
        self,
        *,
        authorize: Callable[[str | None, str], Awaitable[Route]],
        credential: Callable[[UpgradeRequest], str | None] = lambda request: request.token,
        trusted: ssl.SSLContext | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._authorize = authorize
        self._credential = credential
        self._trusted = trusted
        self._limits = limits or Limits()
        self._carrier: Carrier[_Relay] = Carrier(self._limits)
        self._running: set[asyncio.Task[None]] = set()

    def routes(self) -> list[TunnelRoute]:
        """The WebSocket paths that this proxy answers."""
        return [TunnelRoute("/ws/task/{task_id}/terminal", self._open)]

    async def _open(self, request: UpgradeRequest, task: str) -> KohakuRiverError | None:
        """Open the terminal at the runner first: its answer decides ours, the version included.

        An error is told on the WebSocket, and returned.
        """
        try:
            route = await self._authorize(self._credential(request), task)
        except KohakuRiverError as error:
            await self._refuse(request, task, error)
            return error
        relay = _Relay(self._carrier, route)
        with relay.carried:
            try:
                runner = await self._open_runner(request, route)
            except KohakuRiverError as error:
                relay.carried.over()
                await self._refuse(request, task, error)
                return error
            await self._begin(relay, request, runner)
        return None

    @staticmethod
    async def _refuse(request: UpgradeRequest, task: str, error: KohakuRiverError) -> None:
        log.info("terminal refused", task=task, peer=request.peer, reason=error.message)
        await terminal.refuse(request, error)

    async def _begin(self, relay: _Relay, request: UpgradeRequest, runner: MessageLink) -> None:
        try:
            user = request.accept_messages(runner.subprotocol)
        except KohakuRiverError:  # the user has hung up
            runner.begin_close(CloseCode.GOING_AWAY)
            raise
        if user.subprotocol is None and request.query.get("start") != "1":
            with contextlib.suppress(ConnectionError):
                # Version 1's command line takes the first message for a greeting and throws it away.
                await user.send(terminal.control("output", data=""))
        relay.begin(user, runner, self._limits.max_rate)
        relay.carried.begin(request.peer, proto="terminal", version=2 if user.subprotocol else 1)
        running = asyncio.get_running_loop().create_task(relay.run())
        self._running.add(running)
        running.add_done_callback(self._running.discard)

    async def _open_runner(self, request: UpgradeRequest, route: Route) -> MessageLink:
        start = "?start=1" if request.query.get("start") == "1" else ""
        with at_runner(route):
            runner = await open_messages(
                route.runner(f"/ws/task/{route.task_id}/terminal{start}", self._trusted),
                subprotocols=(TERMINAL_V2,) if TERMINAL_V2 in request.subprotocols else (),
                max_message=self._limits.max_message,
            )
        if request.query.get("tty") != "0":
            runner.limit_window()
        return runner

    def snapshot(self) -> dict[str, int]:
        """Terminals now, and bytes of their messages passed since the start."""
        return self._carrier.snapshot()

    async def close(self) -> None:
        """Close every terminal."""
        self._carrier.cut_all("the host is shutting down")
        await asyncio.gather(*self._running, return_exceptions=True)


# Why this host ends a terminal: what the user is told, and how the WebSockets are closed.
_Cut: TypeAlias = tuple[KohakuRiverError, int, str]


class _Relay:
    """One terminal's messages, passed on until one side ends or this host wants it to. The other side ends likewise."""

    def __init__(self, carrier: Carrier[_Relay], route: Route) -> None:
        self.carried = carrier.carry(self, route)
        self._to_container = self._to_user = 0
        self._cut_off: asyncio.Future[_Cut] = asyncio.get_running_loop().create_future()
        self._user: MessageLink
        self._runner: MessageLink
        self._from_user: MessageLink | PacedMessages
        self._from_runner: MessageLink | PacedMessages

    def begin(self, user: MessageLink, runner: MessageLink, rate: int) -> None:
        """Both sides are there; `rate` is in bytes a second, each way, 0 for any."""
        self._user, self._runner = user, runner
        self._from_user = PacedMessages(user, rate) if rate else user
        self._from_runner = PacedMessages(runner, rate) if rate else runner

    def passed(self) -> Passed:
        """Bytes so far."""
        return self._to_container, self._to_user

    async def run(self) -> None:
        """From the first message to the end of both sides."""
        passing = asyncio.get_running_loop().create_task(self._pass_on())
        self.carried.hang_on_right()
        try:
            ends: list[asyncio.Future[Any]] = [passing, self._cut_off]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if self._cut_off.done():
                await cancel_all([passing])
                await self._end(*self._cut_off.result())
        finally:
            self.carried.over()

    def cut(self, code: int, reason: str) -> None:
        """End both sides, with a word to the user where it is about this terminal."""
        error: KohakuRiverError
        if code == CloseCode.IDLE:
            error = UnavailableError(f"The host has ended this terminal: {reason}.", code="idle")
        elif code == CloseCode.POLICY:
            error = NotAllowedError(f"This terminal was ended: {reason}.")
        else:
            self._user.begin_close(code, reason)
            return
        if not self._cut_off.done():
            self._cut_off.set_result((error, code, reason))

    async def _pass_on(self) -> None:
        await asyncio.gather(self._pass_to_runner(), self._pass_to_user())

    async def _pass_to_runner(self) -> None:
        first = True
        with contextlib.suppress(ConnectionError):
            while (message := await self._from_user.receive()) is not None:
                if first and (command := terminal.asked_for(message)):
                    self.carried.ran(command)
                first = False
                self._to_container += size_of(message)
                await self._runner.send(message)
        await self._ended("user", self._user, self._runner)

    async def _pass_to_user(self) -> None:
        with contextlib.suppress(ConnectionError):
            while (message := await self._from_runner.receive()) is not None:
                self._to_user += size_of(message)
                await self._user.send(message)
        await self._ended("node", self._runner, self._user)

    async def _ended(self, side: str, source: MessageLink, target: MessageLink) -> None:
        self.carried.end(side, source.close_code, source.close_reason)
        await target.close(
            may_close_with(source.close_code), source.close_reason or "the other side of the terminal went"
        )

    async def _end(self, error: KohakuRiverError, code: int, reason: str) -> None:
        self._runner.begin_close(code, reason)
        with contextlib.suppress(ConnectionError, asyncio.TimeoutError):
            await asyncio.wait_for(self._user.send(terminal.failed(error)), FAREWELL_SECONDS)
        await self._user.close(code, reason)

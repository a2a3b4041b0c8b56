"""A terminal's way through the host: from the user's WebSocket to the runner's and back (docs/protocol.md §6)."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import structlog

from kohakuriver.errors import HostUnreachableError, KohakuRiverError, NotAllowedError, UnavailableError
from kohakuriver.limits import Limits
from kohakuriver.runtime import cancel_all
from kohakuriver.session.grant import NO_GRANT, Grant
from kohakuriver.session.idle import IdleWatch
from kohakuriver.session.pace import PacedMessages
from kohakuriver.tunnel import terminal
from kohakuriver.tunnel.accept import TunnelRoute, UpgradeRequest
from kohakuriver.tunnel.dial import open_messages
from kohakuriver.tunnel.message_link import MessageLink, may_close_with, size_of
from kohakuriver.tunnel.protocol import TERMINAL_V2, CloseCode

__all__ = ["TerminalProxy", "TerminalTarget"]

RUNNER_TIMEOUT = 10.0
FAREWELL_SECONDS = 1.0

log = structlog.get_logger("kohakuriver.proxy")


@dataclass(frozen=True)
class TerminalTarget:
    """Where a terminal is opened: the runner's `ws://` address, the task's id, and the ticket to show.

    `grant` is the terminal's right to go on.
    """

    runner_ws_url: str
    task_id: int
    ticket: str
    grant: Grant = NO_GRANT


class TerminalProxy:
    """All terminals that go through a host.

    Args:
        authorize: (bearer token or None, task's id or name) → where it goes. Raises KohakuRiverError.
        trusted: how runners that serve TLS are checked; None for the system's authorities.
        limits: what a terminal may take.
    """

    path = "/ws/task/{task_id}/terminal"

    def __init__(
        self,
        *,
        authorize: Callable[[str | None, str], Awaitable[TerminalTarget]],
        trusted: ssl.SSLContext | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._authorize = authorize
        self._trusted = trusted
        self._limits = limits or Limits()
        self._idle = IdleWatch(self._limits.idle_timeout)
        self._terminals: dict[asyncio.Task[None], _Relay] = {}

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
            target = await self._authorize(request.token, found[1])
            runner = await self._open_runner(request, target)
        except KohakuRiverError as error:
            log.info("terminal refused", task=found[1], peer=request.peer, reason=error.message)
            await terminal.refuse(request, error)
            return
        try:
            user = request.accept_messages(runner.subprotocol)
        except KohakuRiverError:  # the user has hung up
            runner.begin_close(CloseCode.GOING_AWAY)
            target.grant.release()
            raise
        if user.subprotocol is None and request.query.get("start") != "1":
            with contextlib.suppress(ConnectionError):
                # Version 1's command line takes the first message for a greeting and throws it away.
                await user.send(terminal.control("output", data=""))
        target.grant.opened(**{"from": request.peer}, proto="terminal", version=2 if user.subprotocol else 1)
        self._begin(_Relay(user, runner, target.grant, self._limits.max_rate))

    def _begin(self, relay: _Relay) -> None:
        running = asyncio.get_running_loop().create_task(relay.run())
        self._terminals[running] = relay
        self._idle.add(relay, lambda: relay.passed, relay.idle)

        def ended(task: asyncio.Task[None]) -> None:
            del self._terminals[task]
            self._idle.discard(relay)

        running.add_done_callback(ended)

    async def _open_runner(self, request: UpgradeRequest, target: TerminalTarget) -> MessageLink:
        start = "?start=1" if request.query.get("start") == "1" else ""
        try:
            runner = await open_messages(
                f"{target.runner_ws_url}/ws/task/{target.task_id}/terminal{start}",
                token=target.ticket,
                subprotocols=(TERMINAL_V2,) if TERMINAL_V2 in request.subprotocols else (),
                ssl=self._trusted,
                timeout=RUNNER_TIMEOUT,
                peer="runner",
                max_message=self._limits.max_message,
            )
        except NotAllowedError as error:  # of the host, not of the user: whose credentials are good
            target.grant.release()
            raise HostUnreachableError(f"The task's node did not take the host's ticket: {error}") from error
        except BaseException:
            target.grant.release()
            raise
        if request.query.get("tty") != "0":
            runner.limit_window()
        return runner

    async def close(self) -> None:
        """Close every terminal."""
        for relay in self._terminals.values():
            relay.close(CloseCode.GOING_AWAY, "the host is shutting down")
        await asyncio.gather(*self._terminals, return_exceptions=True)


# Why this host ends a terminal: what the user is told, and how the WebSockets are closed.
_Cut: TypeAlias = tuple[KohakuRiverError, CloseCode, str]


class _Relay:
    """One terminal's messages, passed on until one side ends, or this host wants it to; the other side ends likewise.

    `rate` is in bytes a second, each way; 0 for any.
    """

    def __init__(self, user: MessageLink, runner: MessageLink, grant: Grant, rate: int = 0) -> None:
        self._user = user
        self._runner = runner
        self._from_user = PacedMessages(user, rate) if rate else user
        self._from_runner = PacedMessages(runner, rate) if rate else runner
        self._grant = grant
        self._to_container = self._to_user = 0
        self._ending: tuple[str, int, str] | None = None
        self._cut_off: asyncio.Future[_Cut] = asyncio.get_running_loop().create_future()

    @property
    def passed(self) -> int:
        """Bytes so far, both ways."""
        return self._to_container + self._to_user

    async def run(self) -> None:
        """From the first message to the end of both sides."""
        passing = asyncio.get_running_loop().create_task(self._pass_on())
        self._grant.attach(self._withdraw)
        try:
            ends: list[asyncio.Future[Any]] = [passing, self._cut_off]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if self._cut_off.done():
                await cancel_all([passing])
                await self._end(*self._cut_off.result())
        finally:
            by, code, reason = self._ending or ("host", CloseCode.GOING_AWAY, "")
            self._grant.closed(
                bytes_to_container=self._to_container,
                bytes_to_user=self._to_user,
                ended_by=by,
                code=code,
                reason=reason,
            )

    def close(self, code: int, reason: str) -> None:
        """End both sides, because this host wants it."""
        self._ending = self._ending or ("host", code, reason)
        self._user.begin_close(code, reason)

    async def _pass_on(self) -> None:
        await asyncio.gather(self._pass_to_runner(), self._pass_to_user())

    async def _pass_to_runner(self) -> None:
        with contextlib.suppress(ConnectionError):
            while (message := await self._from_user.receive()) is not None:
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
        self._ending = self._ending or (side, source.close_code, source.close_reason)
        await target.close(
            may_close_with(source.close_code), source.close_reason or "the other side of the terminal went"
        )

    def idle(self, reason: str) -> None:
        """Nothing has passed for long enough."""
        error = UnavailableError(f"The host has ended this terminal: {reason}.", code="idle")
        self._cut_off_with(error, CloseCode.IDLE, reason)

    def _withdraw(self, reason: str) -> None:
        self._cut_off_with(NotAllowedError(f"This terminal was ended: {reason}."), CloseCode.POLICY, reason)

    def _cut_off_with(self, error: KohakuRiverError, code: CloseCode, reason: str) -> None:
        if not self._cut_off.done():
            self._ending = self._ending or ("host", code, reason)
            self._cut_off.set_result((error, code, reason))

    async def _end(self, error: KohakuRiverError, code: CloseCode, reason: str) -> None:
        self._runner.begin_close(code, reason)
        with contextlib.suppress(ConnectionError, asyncio.TimeoutError):
            await asyncio.wait_for(self._user.send(terminal.failed(error)), FAREWELL_SECONDS)
        await self._user.close(code, reason)

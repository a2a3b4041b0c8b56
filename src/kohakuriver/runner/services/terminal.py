"""Terminals: one WebSocket, one command inside a task (docs/protocol.md §6).

Nothing is read from a command that can't be sent, and nothing from a user that the command does not take: whoever is
slow holds up its own terminal and no other.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import structlog

from kohakuriver.asking import Asker, asking
from kohakuriver.errors import KohakuRiverError, NotAllowedError, UnauthenticatedError, UnavailableError, UsageError
from kohakuriver.limits import Limits
from kohakuriver.relay.terminal_room import TerminalRoom
from kohakuriver.runner.backends.base import STDERR, STDOUT, ExecRequest, ExecSession
from kohakuriver.runtime import cancel_all
from kohakuriver.session.ticket import Ticket
from kohakuriver.tunnel import terminal
from kohakuriver.tunnel.accept import TunnelRoute, UpgradeRequest
from kohakuriver.tunnel.message_link import MessageLink
from kohakuriver.tunnel.protocol import TERMINAL_V2, CloseCode

__all__ = ["TerminalServer"]

START_SECONDS = 10.0
# How long a command that was killed waits for word that its whole task has ended.
REASON_SECONDS = 1.0
# Exit codes of a command that HUP, KILL or TERM ended.
ENDED_FROM_OUTSIDE = (129, 137, 143)
PIECE = 64 * 1024

log = structlog.get_logger("kohakuriver.terminal")

Exec = Callable[[int, ExecRequest], Awaitable[tuple[str, ExecSession]]]
Start = Callable[[ExecRequest], Awaitable[tuple[str, ExecSession]]]


class TerminalServer:
    """All terminals of a runner.

    Args:
        exec_in: (task id, what to run) → the task's container and the session; raises KohakuRiverError.
        check_ticket: the ticket's claims; raises UnauthenticatedError or NotAllowedError.
        room: how many there may be.
        on_entered, on_left: called with a task id when a terminal is opened there, and when it has ended.
    """

    def __init__(
        self,
        *,
        allow_anonymous: bool,
        check_ticket: Callable[[str], Ticket],
        exec_in: Exec,
        room: TerminalRoom | None = None,
        on_entered: Callable[[int], None] = lambda task_id: None,
        on_left: Callable[[int], None] = lambda task_id: None,
    ) -> None:
        self._allow_anonymous = allow_anonymous
        self._check_ticket = check_ticket
        self._exec_in = exec_in
        self._room = room or TerminalRoom(Limits())
        self._on_entered, self._on_left = on_entered, on_left
        self._terminals: dict[Terminal, asyncio.Task[None]] = {}

    def routes(self) -> list[TunnelRoute]:
        """The WebSocket paths that this server answers."""
        return [TunnelRoute("/ws/task/{id}/terminal", self._open)]

    async def _open(self, request: UpgradeRequest, task: str) -> None:
        try:
            task_id, user = self._check(request, task)
            leave = self._room.enter(task_id, user)
        except KohakuRiverError as error:
            await terminal.refuse(request, error)
            return
        try:
            link = request.accept_messages(TERMINAL_V2)
        except BaseException:
            leave()
            raise
        start: Start = lambda wanted: self._exec_in(task_id, wanted)  # noqa: E731
        opened = Terminal(link, request.query.get("start") == "1", start)
        with asking(Asker(request.peer, known={"user": user})):
            running = asyncio.get_running_loop().create_task(opened.run())
        self._terminals[opened] = running
        self._on_entered(task_id)

        def ended(_: object) -> None:
            self._ended(opened, leave)
            self._on_left(task_id)

        running.add_done_callback(ended)
        log.info("terminal opened", task=task_id, peer=request.peer)

    def _ended(self, opened: Terminal, leave: Callable[[], None]) -> None:
        self._terminals.pop(opened, None)
        leave()

    def _check(self, request: UpgradeRequest, named: str) -> tuple[int, str]:
        """The task, and who wants a terminal there: "" is nobody in particular."""
        if not (named.isascii() and named.isdigit()):
            raise UsageError(f"{named!r} is not a task's id")
        if request.token is None and self._allow_anonymous:
            return int(named), ""
        if request.token is None:
            raise UnauthenticatedError("this runner opens terminals only with its host's ticket")
        ticket = self._check_ticket(request.token)
        if ticket.task != int(named):
            raise NotAllowedError(f"the ticket is not for task {named}")
        return int(named), ticket.user or ""

    def drop(self, container: str, reason: str) -> None:
        """The task has ended: so do its terminals."""
        for opened in list(self._terminals):
            if opened.container == container:
                opened.task_ended(reason)

    async def close(self) -> None:
        """End every terminal."""
        for opened in list(self._terminals):
            opened.task_ended("the runner is shutting down")
        await asyncio.gather(*self._terminals.values(), return_exceptions=True)


class Terminal:
    """One user's terminal. `has_start` means that a start message comes first; otherwise it is a shell at once."""

    def __init__(self, link: MessageLink, has_start: bool, start: Start) -> None:
        self.container: str | None = None
        self._link = link
        self._has_start = has_start
        self._start = start
        self._binary = link.subprotocol == TERMINAL_V2
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stream = STDOUT
        self._reason: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def task_ended(self, reason: str) -> None:
        """Say why to the user, and end."""
        if not self._reason.done():
            self._reason.set_result(reason)

    async def run(self) -> None:
        """From the start message to the close of the link."""
        try:
            await self._serve()
        except KohakuRiverError as error:
            with contextlib.suppress(ConnectionError):
                await self._link.send(terminal.failed(error))
            await self._link.close(terminal.close_code(error), error.message)
        except ConnectionError:
            pass  # the user has gone
        except Exception:
            log.exception("a terminal failed")
            await self._link.close(CloseCode.INTERNAL_ERROR, "the runner failed; its log says why")
        finally:
            self._link.begin_close(CloseCode.GOING_AWAY, "the terminal has ended")

    async def _serve(self) -> None:
        request = await self._request()
        if request is None:
            return
        self.container, session = await self._start(request)
        try:
            code = await self._relay(session)
        finally:
            await session.close()
        if code is not None:
            await self._link.send(terminal.exited(code))
            await self._link.close(CloseCode.NORMAL)

    async def _request(self) -> ExecRequest | None:
        """What to run; None when the user went before saying so."""
        if not self._has_start:
            return _request(terminal.Start())
        try:
            first = await asyncio.wait_for(self._link.receive(), START_SECONDS)
        except asyncio.TimeoutError as error:
            raise UsageError(f"no start message came within {START_SECONDS:g} s") from error
        if first is None:
            return None
        message = terminal.read_control(first) if isinstance(first, str) else {}
        if message.get("type") != "start":
            raise UsageError("the first message of this terminal must be a start")
        return _request(terminal.Start.from_message(message))

    async def _relay(self, session: ExecSession) -> int | None:
        """Both directions until the command ends; its exit code, None when the user has gone."""
        loop = asyncio.get_running_loop()
        output = loop.create_task(self._pass_output(session))
        inputs = loop.create_task(self._pass_input(session))
        gone = loop.create_task(self._link.wait_closed())
        try:
            ends: list[asyncio.Future[Any]] = [output, inputs, gone, self._reason]
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if output.done():
                return await self._ended(output.result())
            if self._reason.done():
                raise _task_ended(self._reason.result())
            if inputs.done():
                inputs.result()  # the user is gone, or sent an invalid message
            return None
        finally:
            await cancel_all([output, inputs, gone])

    async def _ended(self, code: int) -> int:
        """The command's exit code. Raises UnavailableError when its whole task has ended."""
        if code in ENDED_FROM_OUTSIDE:
            await asyncio.wait({self._reason}, timeout=REASON_SECONDS)
        if self._reason.done():
            raise _task_ended(self._reason.result())
        return code

    # -- to the user -------------------------------------------------------------------------------------------

    async def _pass_output(self, session: ExecSession) -> int:
        while (piece := await session.read()) is not None:
            await self._send(*piece)
        rest = "" if self._binary else self._decoder.decode(b"", final=True)
        if rest:
            await self._link.send(terminal.control("output", data=rest))
        return await session.wait()

    async def _send(self, stream: int, data: bytes) -> None:
        if not self._binary:
            if text := self._decoder.decode(data):
                await self._link.send(terminal.control("output", data=text))
            return
        if stream != self._stream:
            self._stream = stream
            await self._link.send(terminal.stream("stderr" if stream == STDERR else "stdout"))
        await self._link.send(data)

    # -- to the command ----------------------------------------------------------------------------------------

    async def _pass_input(self, session: ExecSession) -> None:
        while (message := await self._link.receive()) is not None:
            if isinstance(message, bytes):
                await _write(session, message)
            else:
                await self._control(session, terminal.read_control(message))

    async def _control(self, session: ExecSession, message: dict[str, Any]) -> None:
        kind, data = message["type"], message.get("data")
        if kind == "input" and isinstance(data, str):
            await _write(session, data.encode("utf-8", "replace"))
        elif kind == "resize":
            await session.resize(*terminal.size_of(message))
        elif kind == "eof":
            await session.write_eof()


async def _write(session: ExecSession, data: bytes) -> None:
    for start in range(0, len(data), PIECE):
        await session.write(data[start : start + PIECE])


def _request(start: terminal.Start) -> ExecRequest:
    env = {"TERM": "xterm-256color", **start.env} if start.tty else start.env
    return ExecRequest(tuple(start.command), start.tty, start.rows, start.cols, env, start.user, start.workdir)


def _task_ended(reason: str) -> UnavailableError:
    return UnavailableError(f"{reason[:1].upper()}{reason[1:]}.", code="task_not_running")

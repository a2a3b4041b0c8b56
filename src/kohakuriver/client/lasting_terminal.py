"""A terminal in a task that outlives the links between (docs/protocol.md §6, "Terminals that outlive links").

To its user it is what a `MessageLink` is: messages of a terminal go in and come out. Behind that is a kept stream,
whose local end is one of a pair of sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass

from kohakuriver.client.forward import Event
from kohakuriver.client.pipe import Pipe, PipeStream
from kohakuriver.config import Settings
from kohakuriver.errors import KohakuRiverError, NotAllowedError, UnavailableError
from kohakuriver.runtime import cancel_all
from kohakuriver.tunnel.protocol import PROTO_TERMINAL, CloseCode
from kohakuriver.tunnel.terminal import LIST_SESSIONS, SESSION_NAME, Start, control, exited, read_control

__all__ = ["NO_LASTING", "Carrier", "LastingTerminal", "NamedSession", "named_sessions"]

NO_LASTING = "no_lasting_terminal"
"""The code of the error that says that only another kind of terminal can be had."""

LONGEST_LIST = 64 << 10
_LISTED = re.compile(rf"({SESSION_NAME.pattern}) (attached|detached) (\d{{1,12}})")

INPUT, END, RESIZE = 0x01, 0x02, 0x03
STARTED, OUTPUT, ERRORS, EXIT, LOST, FAILED, TAKEN = 0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16

_HEAD = struct.Struct(">BI")
_SIZE = struct.Struct(">HH")
_CODE = struct.Struct(">I")
_LOST = struct.Struct(">Q")
# Whoever presses Ctrl-C waits for all that is on its way to the screen (bytes).
SCREEN = 128 << 10
NEAR = 32 << 10


@dataclass(frozen=True)
class NamedSession:
    """A terminal of this user that stays when it is left.

    It has been there for `seconds`, and is `attached` while somebody has it.
    """

    name: str
    attached: bool
    seconds: int


async def named_sessions(task: str, settings: Settings) -> list[NamedSession]:
    """Those of this user in a task, by name. Raises KohakuRiverError where none can be asked for."""
    terminal = LastingTerminal(task, settings, LIST_SESSIONS)
    try:
        await terminal.open()
        listed = b""
        while len(listed) < LONGEST_LIST and isinstance(message := await terminal.receive(), bytes):
            listed += message
    except struct.error as error:
        raise UnavailableError("What came is no list of sessions.", code="bad_answer") from error
    finally:
        terminal.begin_close()
        await terminal.wait_closed()
    # Whoever is in the container may say anything.
    found = filter(None, map(_LISTED.fullmatch, listed.decode("ascii", "replace").splitlines()))
    return [NamedSession(each[1], each[2] == "attached", int(each[3])) for each in found]


class _Stream(PipeStream):
    __slots__ = ("start",)

    proto = PROTO_TERMINAL


class Carrier(Pipe):
    """The stream of one terminal, and the session that it is in. `start` says what is at its other end."""

    place = "terminal"

    def __init__(
        self, task: str, settings: Settings, sock: socket.socket, start: Start | bytes, told: Callable[[Event], object]
    ) -> None:
        super().__init__(task, settings, sock)
        self._start = start if isinstance(start, bytes) else start.to_bytes()
        self._told = told
        if _on_terminal(start):
            self._endpoint.budget.first = self._endpoint.budget.cap = SCREEN

    def happened(self, event: Event) -> None:
        super().happened(event)
        self._told(event)

    def stream(self) -> PipeStream:
        stream = _Stream(self._endpoint)
        stream.port = 0
        stream.start = self._start
        return stream

    async def start(self) -> None:
        await super().start()
        if self._link is not None and self._link.version < 2:
            raise UnavailableError("The host speaks version 1 alone.", code=NO_LASTING)

    async def _carry(self, stream: PipeStream) -> None:
        try:
            await super()._carry(stream)
        except KohakuRiverError:
            self._explain()
            raise
        self._explain()

    def _explain(self) -> None:
        """Raise why the host has ended it, where it has."""
        ends = [None if each is None else each.closing for each in (self._link, self._straight)]
        for closing in filter(None, ends):  # of two links either may tell first
            if closing.code == CloseCode.POLICY:
                raise NotAllowedError(f"This terminal was ended: {closing.reason}.")
            if closing.code == CloseCode.IDLE:
                raise UnavailableError(f"The host has ended this terminal: {closing.reason}.", code="idle")

    def broken(self, why: str) -> UnavailableError:
        code, _, sentence = why.partition(": ")
        if code == "ECONNRESET" and sentence.endswith("."):  # the host's own words
            return UnavailableError(sentence, code="terminal_lost")
        if ended := re.search(r"\(task (.*)\)$", sentence):  # the runner's
            return UnavailableError(f"Task {ended[1]}.", code="terminal_lost")
        return UnavailableError(f"The terminal of task {self.task} was lost: {why}.", code="terminal_lost")


class LastingTerminal:
    """One terminal of `task`. `told` is called with what happens to its link.

    `start` may be bytes, as `LIST_SESSIONS` is.
    """

    close_code = int(CloseCode.ABNORMAL)
    close_reason = ""

    def __init__(
        self, task: str, settings: Settings, start: Start | bytes, told: Callable[[Event], object] = lambda _: None
    ) -> None:
        self._near, far = socket.socketpair()
        if _on_terminal(start):
            far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, NEAR)
        self._started = False
        self._stderr = False
        self._later: list[str | bytes] = []
        self._carrier = asyncio.ensure_future(Carrier(task, settings, far, start, told).run())
        self._carrier.add_done_callback(lambda _: far.close())  # also where it was never used
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    async def open(self) -> None:
        """Wait until it runs.

        Raises UnavailableError with the code NO_LASTING where it can't be had in this way, and what `Pipe.run` raises.
        """
        self._reader, self._writer = await asyncio.open_unix_connection(sock=self._near)
        try:
            tag, payload = await self._frame()
        except BaseException as error:
            await self._end()
            if isinstance(error, UnavailableError) and error.code == "terminal_lost":
                raise UnavailableError(error.message, code=NO_LASTING) from error
            raise
        if tag == TAKEN:
            await self._end()
            raise _taken()
        if tag != STARTED:
            await self._end()
            raise UnavailableError(payload.decode("utf-8", "replace"), code=NO_LASTING)

    async def send(self, message: str | bytes) -> None:
        """Input, or a message of the terminal. Raises ConnectionError once it has ended."""
        if isinstance(message, bytes):
            self._put(INPUT, message)
        else:
            asked = read_control(message)
            if asked["type"] == "resize":
                self._put(RESIZE, _SIZE.pack(asked["rows"], asked["cols"]))
            elif asked["type"] == "eof":
                self._put(END)
        await self._writer.drain()

    def _put(self, tag: int, payload: bytes = b"") -> None:
        self._writer.write(_HEAD.pack(tag, len(payload)) + payload)

    async def receive(self) -> str | bytes | None:
        """Output, or a message of the terminal. Raises KohakuRiverError where it was lost."""
        while not self._later:
            tag, payload = await self._frame()
            if tag in (OUTPUT, ERRORS):
                if self._stderr != (tag == ERRORS):
                    self._stderr = tag == ERRORS
                    self._later.append(control("stream", name="stderr" if self._stderr else "stdout"))
                self._later.append(payload)
            elif tag == EXIT:
                self._later.append(exited(_CODE.unpack(payload)[0]))
            elif tag == TAKEN:
                raise _taken()
            elif tag == LOST:
                self._later.append(f"\r\n[{_LOST.unpack(payload)[0]} bytes of output were lost meanwhile]\r\n".encode())
        return self._later.pop(0)

    async def _frame(self) -> tuple[int, bytes]:
        """The next frame. Raises what ended the terminal without a last word."""
        try:
            tag, length = _HEAD.unpack(await self._reader.readexactly(_HEAD.size))
            return tag, await self._reader.readexactly(length)
        except (asyncio.IncompleteReadError, ConnectionError):
            await self._carrier  # it raises why
            raise UnavailableError("The terminal has ended.", code="terminal_lost") from None

    def begin_close(self, code: int = CloseCode.NORMAL, reason: str = "") -> None:
        """End it."""
        self._writer.close()
        if not self._carrier.done():
            self._carrier.cancel()

    async def wait_closed(self) -> None:
        """Wait until it has ended."""
        with contextlib.suppress(KohakuRiverError, asyncio.CancelledError):
            await self._carrier

    async def _end(self) -> None:
        self._writer.close()
        await cancel_all([self._carrier])


def _on_terminal(start: Start | bytes) -> bool:
    return isinstance(start, Start) and start.tty


def _taken() -> UnavailableError:
    return UnavailableError("This session was opened elsewhere.", code="session_taken")

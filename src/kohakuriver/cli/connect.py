"""`kohakuriver connect`: a terminal in a task, or a command there with its three pipes (docs/protocol.md §6)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kohakuriver.cli.behind_dashes import BehindTask, command_of
from kohakuriver.cli.options import Connection, TaskArgument, pairs, remote
from kohakuriver.cli.signals import caught
from kohakuriver.errors import HostUnreachableError, UnavailableError, UsageError

if TYPE_CHECKING:
    from kohakuriver.cli.local_terminal import RawTerminal
    from kohakuriver.cli.old_terminal import OldTerminal
    from kohakuriver.config import Settings
    from kohakuriver.tunnel.message_link import MessageLink
    from kohakuriver.tunnel.terminal import Start

__all__ = ["register"]

SIGNALLED = 128  # plus the signal's number, as shells say it
HANG_UP = 1  # SIGHUP: what the remote end gets
# What may wait to be sent, in pieces: with a terminal enough that `~.` is still seen when the link hangs.
WAITING_KEYS = 4096
WAITING_PIECES = 2
PASSED_ON = ("TERM", "COLORTERM")
STREAMS = {"stdout": 1, "stderr": 2}


TtyOption = Annotated[
    bool | None,
    typer.Option("--tty/--no-tty", "-t/-T", help="A terminal for CMD, or none. Default: between terminals one."),
]
EnvOption = Annotated[
    list[str] | None,
    typer.Option("--env", "-e", metavar="K=V", help="A variable for the shell or CMD; may be repeated."),
]
InteractiveOption = Annotated[
    bool, typer.Option("--interactive", "-i", hidden=True, help="As it always is; other programs want to be told.")
]


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(
        cls=BehindTask,
        epilog="Examples:\n\nkohakuriver connect my-task\n\nkohakuriver connect my-task nvidia-smi -L\n\n"
        "tar c data | kohakuriver connect my-task tar x -C /work\n\n"
        "In a terminal, ~. at the start of a line ends the connection, also one that hangs.",
    )(remote(connect))


def connect(
    ctx: typer.Context,
    at: Connection,
    task: TaskArgument,
    tty: TtyOption = None,
    env: EnvOption = None,
    interactive: InteractiveOption = False,
) -> int:
    """Open a terminal in a task, or run CMD there.

    Between terminals CMD gets one too. Otherwise its stdin, stdout and stderr are pipes, as with ssh. The exit code
    is that of the shell or CMD.
    """
    from kohakuriver.runtime import raise_file_limit, run
    from kohakuriver.tunnel.terminal import Start

    raise_file_limit()
    command = command_of(ctx)
    if command is not None and not command:
        raise UsageError("A command must follow '--'.")
    variables = pairs(env or [], "--env")
    chosen = at.settings()
    if not _wants_terminal(tty):
        return run(Session(chosen, task, Start(command or [], tty=False, env=variables)).run())
    return _interactive(chosen, task, command or [], variables)


def _wants_terminal(wish: bool | None) -> bool:
    """Whether CMD gets a terminal: between two, if nothing else is wished. Raises UsageError where it can't."""
    between = os.isatty(0) and os.isatty(1)
    if wish and not between:
        raise UsageError("--tty needs a terminal as stdin and stdout; leave it out to use pipes.")
    return between if wish is None else wish


def _interactive(chosen: Settings, task: str, command: list[str], variables: dict[str, str]) -> int:
    from kohakuriver.runtime import run
    from kohakuriver.tunnel.terminal import Start, is_utf8

    try:
        from kohakuriver.cli.local_terminal import Keeper, size
    except ImportError as error:
        raise UnavailableError(
            "A terminal needs a Unix system on this side; use `-- CMD` with its output redirected, or `vps connect`.",
            code="not_supported",
        ) from error
    rows, cols = size(1)
    env = {name: value for name in PASSED_ON if (value := os.environ.get(name)) and is_utf8(value)}
    with Keeper(0):
        return run(Session(chosen, task, Start(command, True, rows, cols, {**env, **variables})).run())


class Session:
    """One terminal, from its opening to its end."""

    def __init__(self, chosen: Settings, task: str, start: Start) -> None:
        self._settings = chosen
        self._task = task
        self._start = start
        self._shown = False
        self._exited = False
        self._link: MessageLink | OldTerminal
        self._ended: asyncio.Future[int]

    async def run(self) -> int:
        """The remote exit code, or 128 + N when signal N ended this command.

        Raises KohakuRiverError when there is no terminal, or the connection is lost; BrokenPipeError when nobody
        reads the output.
        """
        self._ended = asyncio.get_running_loop().create_future()
        self._link = await self._open()
        with caught(self._signalled):
            try:
                await self._link.send(self._start.to_message())
                with self._raw() as terminal:
                    return await self._relay(terminal)
            finally:
                self._link.begin_close()
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._link.wait_closed(), 0.5)

    async def _open(self) -> MessageLink | OldTerminal:
        from kohakuriver.config import path_segment
        from kohakuriver.http_proxy import http_proxy
        from kohakuriver.tls import client_context
        from kohakuriver.tunnel.dial import Server, open_messages
        from kohakuriver.tunnel.protocol import TERMINAL_V2

        base = self._settings.host.replace("http", "ws", 1)
        tty = "1" if self._start.tty else "0"
        url = f"{base}/ws/task/{path_segment(self._task)}/terminal?start=1&tty={tty}"
        trusted = client_context(self._settings.host, self._settings.ca_file)
        server = Server(url, self._settings.token, trusted, http_proxy(url))
        link = await open_messages(server, subprotocols=(TERMINAL_V2,))
        if self._start.tty:
            link.limit_window()
        return link if link.subprotocol == TERMINAL_V2 else self._old(link)

    def _old(self, link: MessageLink) -> OldTerminal:
        """The terminal of a host that speaks version 1 alone. Raises UnavailableError where it can't do what is due."""
        from kohakuriver.cli.old_terminal import OldTerminal

        if self._start.tty and not self._start.command:
            return OldTerminal(link)
        link.abort()
        raise UnavailableError(
            "The host, or the task's node, speaks version 1, which has only a shell in a terminal: run connect in one, "
            "without CMD.",
            code="not_supported",
        )

    @contextlib.contextmanager
    def _raw(self) -> Iterator[RawTerminal | None]:
        """The local terminal, raw for as long as the remote one is there."""
        if not self._start.tty:
            yield None
            return
        from kohakuriver.cli.local_terminal import RawTerminal, clean

        try:
            with RawTerminal(0) as terminal:
                yield terminal
        finally:
            if self._shown and not self._exited:
                clean(1)

    async def _relay(self, terminal: RawTerminal | None) -> int:
        """Everything both ways; back when there is an exit code."""
        from kohakuriver.runtime import cancel_all

        loop = asyncio.get_running_loop()
        keys: asyncio.Queue[str | bytes] = asyncio.Queue(WAITING_KEYS if terminal else WAITING_PIECES)
        ends: list[asyncio.Future[Any]] = [
            self._ended,
            loop.create_task(self._read(keys)),
            loop.create_task(self._send(keys)),
            loop.create_task(self._show()),
        ]
        try:
            with self._following(terminal, keys):
                while not self._ended.done():
                    done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                    for end in done:
                        end.result()
                        ends.remove(end)
            return self._ended.result()
        finally:
            await cancel_all(ends)

    @contextlib.contextmanager
    def _following(self, terminal: RawTerminal | None, keys: asyncio.Queue[str | bytes]) -> Iterator[None]:
        """Tell the task when the local terminal's size changes, and take the terminal again after a suspension."""
        if terminal is None:
            yield
            return
        from kohakuriver.cli.local_terminal import size
        from kohakuriver.tunnel.terminal import resize

        def changed() -> None:
            with contextlib.suppress(asyncio.QueueFull):  # nothing gets through just now
                keys.put_nowait(resize(*size(1)))

        def continued() -> None:
            terminal.again()
            changed()

        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGWINCH, changed)
        loop.add_signal_handler(signal.SIGCONT, continued)
        if size(1) != (self._start.rows, self._start.cols):
            changed()  # while the connection was being made
        try:
            yield
        finally:
            loop.remove_signal_handler(signal.SIGWINCH)
            loop.remove_signal_handler(signal.SIGCONT)

    async def _read(self, keys: asyncio.Queue[str | bytes]) -> None:
        """What is typed, or piped in."""
        from kohakuriver.cli.stdio import Escapes, read_stdin
        from kohakuriver.tunnel.terminal import end

        pieces: asyncio.Queue[bytes] = asyncio.Queue(1)
        read_stdin(pieces)
        escapes = Escapes() if self._start.tty else None
        while data := await pieces.get():
            leave = False
            if escapes is not None:
                data, leave = escapes.feed(data)
            if data:
                await keys.put(data)
            if leave:
                self._end(SIGNALLED + HANG_UP)
                return
        await keys.put(end())

    async def _send(self, keys: asyncio.Queue[str | bytes]) -> None:
        with contextlib.suppress(ConnectionError):  # whoever receives hears why
            while True:
                await self._link.send(await keys.get())

    async def _show(self) -> None:
        """What comes, until the end."""
        from kohakuriver.cli.stdio import Output
        from kohakuriver.tunnel.terminal import failure, read_control

        shown, stream = Output(), STREAMS["stdout"]
        while (message := await self._link.receive()) is not None:
            if isinstance(message, bytes):
                self._shown = True
                await shown.write(stream, message)
                continue
            control = read_control(message)
            if control["type"] == "stream":
                stream = STREAMS.get(control.get("name", ""), stream)
            elif control["type"] == "error":
                raise failure(control)
            elif control["type"] == "exit":
                self._exited = True
                self._end(int(control["code"]))
                return
        raise HostUnreachableError(f"The connection to task {self._task} was lost: {self._why_lost()}.")

    def _why_lost(self) -> str:
        from kohakuriver.tunnel.protocol import CloseCode

        reason = self._link.close_reason.rstrip(".")
        return reason or (
            "the host is gone" if self._link.close_code == CloseCode.ABNORMAL else f"close code {self._link.close_code}"
        )

    def _signalled(self, number: signal.Signals) -> None:
        self._end(SIGNALLED + number)

    def _end(self, code: int) -> None:
        if not self._ended.done():
            self._ended.set_result(code)

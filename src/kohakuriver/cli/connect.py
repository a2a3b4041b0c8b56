"""`kohakuriver connect`: a terminal in a task, or a command there with its three pipes (docs/protocol.md §6)."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kohakuriver.cli.behind_dashes import BehindTask, command_of
from kohakuriver.cli.options import Connection, TaskArgument, pairs, remote
from kohakuriver.cli.signals import caught
from kohakuriver.errors import HostUnreachableError, KohakuRiverError, UnavailableError, UsageError

if TYPE_CHECKING:
    from kohakuriver.cli.local_terminal import RawTerminal
    from kohakuriver.cli.old_terminal import OldTerminal
    from kohakuriver.client.forward import Event
    from kohakuriver.client.lasting_terminal import LastingTerminal
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
UserOption = Annotated[
    str,
    typer.Option(
        "--user", "-u", metavar="USER", help="As whom in the container. Default: as the task.", show_default=False
    ),
]
WorkdirOption = Annotated[
    str,
    typer.Option("--workdir", "-w", metavar="DIR", help="Where. Default: where the task began.", show_default=False),
]
SessionOption = Annotated[
    str | None,
    typer.Option(
        "--session",
        "-s",
        metavar="NAME",
        help="A terminal with a name: it stays when you type ~. or close the window; the same command is back in it.",
        show_default=False,
    ),
]
NoResumeOption = Annotated[
    bool,
    typer.Option("--no-resume", help="End with the connection to the host, in the place of waiting for the next one."),
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
        "kohakuriver connect my-task --session train -- python train.py\n\n"
        "In a terminal, ~. at the start of a line ends the connection, also one that hangs.",
    )(remote(connect))


def connect(
    ctx: typer.Context,
    at: Connection,
    task: TaskArgument,
    tty: TtyOption = None,
    env: EnvOption = None,
    user: UserOption = "",
    workdir: WorkdirOption = "",
    session: SessionOption = None,
    no_resume: NoResumeOption = False,
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
    if workdir[:1] not in ("", "/"):
        raise UsageError(f"--workdir takes an absolute path, not {workdir!r}.")
    if session is not None:
        _check_session(session, {"--user": user, "--no-resume": no_resume, "--no-tty": tty is False})
    variables = pairs(env or [], "--env")
    wanted = Start(command or [], tty=False, env=variables, user=user, workdir=workdir, session=session or "")
    chosen = at.settings()
    if not _wants_terminal(True if session else tty, "--session" if session else "--tty"):
        return run(Session(chosen, task, wanted, resume=not no_resume).run())
    return _interactive(chosen, task, wanted, resume=not no_resume)


def _check_session(name: str, others: dict[str, object]) -> None:
    """Raises UsageError for what can't be a session's name, or one of the `others`, by its option, beside a session."""
    from kohakuriver.tunnel.terminal import SESSION_NAME

    if not SESSION_NAME.fullmatch(name):
        raise UsageError(f"--session takes letters, digits, '.', '_' and '-', 64 at most, not {name!r}.")
    for option in (option for option, given in others.items() if given):
        raise UsageError(f"--session and {option} don't go together; leave one of them out.")


def _wants_terminal(wish: bool | None, option: str) -> bool:
    """Whether CMD gets a terminal: between two, if no option wishes else. Raises UsageError where it can't."""
    between = os.isatty(0) and os.isatty(1)
    if wish and not between:
        raise UsageError(f"{option} needs a terminal as stdin and stdout; leave it out to use pipes.")
    return between if wish is None else wish


def _interactive(chosen: Settings, task: str, wanted: Start, *, resume: bool) -> int:
    from kohakuriver.runtime import run
    from kohakuriver.tunnel.terminal import is_utf8

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
        started = replace(wanted, tty=True, rows=rows, cols=cols, env={**env, **wanted.env})
        return run(Session(chosen, task, started, resume=resume).run())


class Session:
    """One terminal, from its opening to its end."""

    def __init__(self, chosen: Settings, task: str, start: Start, *, resume: bool) -> None:
        self._resume = resume
        self._waits = False
        self._settings = chosen
        self._task = task
        self._start = start
        self._shown = False
        self._exited = False
        self._left = False
        self._link: MessageLink | OldTerminal | LastingTerminal
        self._ended: asyncio.Future[int]

    async def run(self) -> int:
        """The remote exit code, or 128 + N when signal N ended this command.

        Raises KohakuRiverError when there is no terminal, or the connection is lost; BrokenPipeError when nobody
        reads the output.
        """
        self._ended = asyncio.get_running_loop().create_future()
        # As another user the engine, or the runner, starts it: they know whom the task's own processes may become.
        lasting = await self._open_lasting() if self._resume and not self._start.user else None
        self._lasts = lasting is not None
        self._link = lasting or await self._open()
        with caught(self._signalled):
            try:
                if not self._lasts:
                    await self._link.send(self._start.to_message())
                with self._raw() as terminal:
                    code = await self._relay(terminal)
                if self._left:
                    again = shlex.join(["kohakuriver", "connect", self._task, "--session", self._start.session])
                    self._say(f"The session goes on; `{again}` is back in it.")
                return code
            finally:
                self._link.begin_close()
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(self._link.wait_closed(), 0.5)

    async def _open_lasting(self) -> LastingTerminal | None:
        """A terminal that outlives its connections; None where only another one can be had.

        Raises KohakuRiverError where none can.
        """
        from kohakuriver.client.lasting_terminal import NO_LASTING, LastingTerminal

        terminal = LastingTerminal(self._task, self._settings, self._start, self._told)
        try:
            await terminal.open()
        except KohakuRiverError as error:
            of_old = isinstance(error, UsageError) or (isinstance(error, HostUnreachableError) and error.url is None)
            if self._start.session:
                raise self._no_session(error) from error
            # The task's end has no terminals that outlive connections, or can't start this one.
            if error.code in (NO_LASTING, "tunnel_not_connected") or of_old:
                return None
            raise
        return terminal

    def _no_session(self, error: KohakuRiverError) -> KohakuRiverError:
        """The error to show: without terminals that last, a session can't be had in any other way."""
        from kohakuriver.client.lasting_terminal import NO_LASTING

        if error.code != NO_LASTING:
            return error
        why, name = re.sub(r"^.*: E[A-Z]+: ", "", error.message), self._start.session
        return UnavailableError(f"Task {self._task} can't keep the session {name}: {why}", code=NO_LASTING)

    def _told(self, event: Event) -> None:
        """Say that the connection is lost, if it does not come back at once, and then that it is back."""
        from kohakuriver.client.forward import Notice, Reconnecting, Resumed

        if isinstance(event, Reconnecting) and event.delay and not self._waits:
            self._waits = True
            self._say(f"{event.what}: the terminal waits.")
        elif isinstance(event, Resumed) and self._waits:
            self._waits = False
            self._say(f"Back after {event.seconds:.0f} s.")
        elif isinstance(event, Notice):
            self._say(event.message)

    def _say(self, sentence: str) -> None:
        end = "\r\n" if self._start.tty else "\n"
        with contextlib.suppress(OSError):
            os.write(2, f"{end if self._start.tty else ''}{sentence}{end}".encode())

    async def _open(self) -> MessageLink | OldTerminal:
        from kohakuriver.client.hosts import Hosts
        from kohakuriver.config import path_segment
        from kohakuriver.tunnel.dial import open_messages
        from kohakuriver.tunnel.protocol import TERMINAL_V2

        tty = "1" if self._start.tty else "0"
        path = f"/ws/task/{path_segment(self._task)}/terminal?start=1&tty={tty}"
        link = await Hosts(self._settings).reach(path, partial(open_messages, subprotocols=(TERMINAL_V2,)))
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
        from kohakuriver.cli.stdio import Escapes, Input
        from kohakuriver.tunnel.terminal import end

        stdin = Input()
        escapes = Escapes() if self._start.tty else None
        while data := await stdin.read():
            leave = False
            if escapes is not None:
                data, leave = escapes.feed(data)
            if data:
                await keys.put(data)
            if leave:
                self._leave()
                return
        if self._start.tty:
            # Raw, it ends with its window alone: no ^D, which would end an idle shell that is to stay.
            self._end(SIGNALLED + HANG_UP)
        else:
            await keys.put(end())

    def _leave(self) -> None:
        """The user wants out; what is in a session goes on."""
        if self._start.session:
            self._left = True
            self._end(0)
        else:
            self._end(SIGNALLED + HANG_UP)

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

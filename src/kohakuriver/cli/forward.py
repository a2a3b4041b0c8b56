"""`kohakuriver forward`: local ports that lead to ports of a task."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from dataclasses import replace
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kohakuriver.cli import output
from kohakuriver.cli.behind_dashes import WithCommand, command_of
from kohakuriver.cli.options import Remote, TaskArgument, remote
from kohakuriver.cli.signals import BY_KEYS, caught, in_foreground, suspended
from kohakuriver.errors import KohakuRiverError, UsageError

if TYPE_CHECKING:
    from kohakuriver.cli.forward_view import Aside
    from kohakuriver.client.forward import Forwarder, PortForward

__all__ = ["Running", "register"]

WAIT_SECONDS = 60
NOT_FOUND, NOT_EXECUTABLE, KILLED_BY = 127, 126, 128  # as shells say it


class Proto(str, Enum):
    """What a forwarded port speaks."""

    tcp = "tcp"
    udp = "udp"


PortsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="REMOTE_PORT",
        help="Ports of the task; also LOCAL:REMOTE, and with /udp. LOCAL 0 is any free port.",
        show_default=False,
    ),
]
LocalPortOption = Annotated[
    int | None,
    typer.Option("--local-port", "-l", help="Default: the remote port. 0 is any free port.", show_default=False),
]
LocalHostOption = Annotated[
    str,
    typer.Option(
        "--local-host",
        "-H",
        help="The local address to listen on. Default: both loopback addresses.",
        show_default=False,
    ),
]
ProtoOption = Annotated[
    Proto, typer.Option("--proto", "-p", case_sensitive=False, help="What ports speak that don't say so.")
]
WaitOption = Annotated[
    float | None,
    typer.Option(
        "--wait",
        "-w",
        min=0,
        metavar="[=SECONDS]",
        help=f"Wait until the service listens in the task; {WAIT_SECONDS} seconds at most.",
        show_default=False,
    ),
]


NoResumeOption = Annotated[
    bool,
    typer.Option("--no-resume", help="Reset connections when the connection to the host is lost; they wait otherwise."),
]
ResumeForOption = Annotated[
    int | None,
    typer.Option(
        "--resume-for",
        min=1,
        max=86_400,
        metavar="SECONDS",
        help="For how long connections wait. Default: 3600, or KOHAKURIVER_RESUME_FOR.",
        show_default=False,
    ),
]


WebOption = Annotated[
    bool,
    typer.Option(
        "--web", help="Also give each TCP port an address of its own for the browser: http://TASK-PORT.localhost."
    ),
]


class _Forward(WithCommand):
    """Takes `--wait` without a number too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ours = args.index("--") if "--" in args else len(args)
        filled = [f"--wait={WAIT_SECONDS}" if each in ("--wait", "-w") else each for each in args[:ours]]
        return super().parse_args(ctx, [*filled, *args[ours:]])


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(
        cls=_Forward,
        epilog="Examples:\n\nkohakuriver forward my-task 8888\n\nkohakuriver forward my-task 9999:8888 5060/udp\n\n"
        "kohakuriver forward my-task 0:5432 -- sh -c 'psql -h 127.0.0.1 -p $KOHAKURIVER_PORT_5432'",
    )(remote(forward))


def forward(
    ctx: typer.Context,
    at: Remote,
    task: TaskArgument,
    ports: PortsArgument,
    local_port: LocalPortOption = None,
    local_host: LocalHostOption = "localhost",
    proto: ProtoOption = Proto.tcp,
    wait: WaitOption = None,
    no_resume: NoResumeOption = False,
    resume_for: ResumeForOption = None,
    web: WebOption = False,
) -> int:
    """Forward local ports to ports of a task, until Ctrl-C.

    With CMD, run it once every port listens, with KOHAKURIVER_PORT_<remote> in its environment; its exit code is ours.
    """
    from kohakuriver.client.forward import Forwarder
    from kohakuriver.client.web import WebForwarder, label_of
    from kohakuriver.runtime import raise_file_limit, run

    files = raise_file_limit()
    command = command_of(ctx)
    _check_command(command, at.json)
    _check_wait(wait, task, ports)
    wanted = _ports(ports, local_port, proto.value)
    chosen = at.settings()
    if resume_for is not None:
        chosen = replace(chosen, resume_for=resume_for)
    _warn_if_exposed(local_host)

    async def main() -> int:
        from kohakuriver.cli.forward_view import view_for

        made = partial(WebForwarder, label=await label_of(task, chosen)) if web else Forwarder
        with view_for(task, json=at.json, beside_command=command is not None) as view:
            forwarder = made(
                task,
                wanted,
                settings=chosen,
                local_host=local_host,
                patience=wait,
                resume=not no_resume,
                on_event=view.tell,
            )
            return await Running(forwarder, view, command, files).run()

    return run(main())


def _check_command(command: list[str] | None, json: bool) -> None:
    if command is not None and not command:
        raise UsageError("A command must follow '--'.")
    if command and json:
        raise UsageError("--json and a command don't go together: stdout is the command's.")


def _check_wait(wait: float | None, task: str, ports: list[str]) -> None:
    """Raises UsageError where the seconds of `--wait` were taken for the task."""
    if wait is not None and task.isdigit() and len(ports) > 1 and ports[0][:1].isalpha():
        raise UsageError(f"The seconds of --wait stand behind an equals sign: --wait={task} {' '.join(ports)}")


def _ports(texts: list[str], local_port: int | None, proto: str) -> list[PortForward]:
    from kohakuriver.client.forward import parse_port

    if local_port is not None and len(texts) > 1:
        raise UsageError("--local-port goes with one remote port; give several as LOCAL:REMOTE.")
    if local_port is not None and ":" in texts[0]:
        raise UsageError(f"{texts[0]!r} names the local port already: leave --local-port out.")
    return [parse_port(text, proto=proto, local=local_port) for text in texts]


def _warn_if_exposed(local_host: str) -> None:
    from kohakuriver.client.forward import exposes

    if exposes(local_host):
        output.note(f"Warning: anybody who reaches this machine on {local_host} can use this forward.")


class Running:
    """A forward from its opening to its end, with the command that it was started for, if any.

    `files` is how many files that command may open.
    """

    def __init__(self, forwarder: Forwarder, view: Aside, command: list[str] | None, files: int | None) -> None:
        self._forwarder = forwarder
        self._view = view
        self._command = command
        self._files = files
        self._child: asyncio.subprocess.Process | None = None
        self._stopped: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def run(self) -> int:
        """The exit code: the command's, or 0 when stopped. Raises KohakuRiverError when the forward can't go on."""
        reason = "stopped"
        try:
            with caught(self._signalled), suspended(self._view.rest):
                return await self._opened_and_ended()
        except KohakuRiverError as error:
            reason = error.message
            raise
        finally:
            await self._forwarder.close(reason)

    async def _opened_and_ended(self) -> int:
        if not await self._until_stopped(self._forwarder.start()):
            return 0
        from kohakuriver.runtime import freeze_heap

        freeze_heap()
        ticking = asyncio.ensure_future(self._tick())
        try:
            if self._command is not None:
                return await self._run_command(self._command)
            await self._until_stopped(self._forwarder.wait())
            return 0
        finally:
            ticking.cancel()

    async def _until_stopped(self, doing: Any) -> bool:
        """Whether `doing` came to its end before Ctrl-C or SIGTERM. What it raises is raised."""
        task = asyncio.ensure_future(doing)
        await asyncio.wait({task, self._stopped}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
            return True
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        return False

    async def _run_command(self, command: list[str]) -> int:
        from kohakuriver.runtime import lowered_file_limit

        environment = dict(os.environ)
        for local in sorted(self._forwarder.listening, key=lambda each: each.proto, reverse=True):  # TCP's counts
            environment[f"KOHAKURIVER_PORT_{local.remote_port}"] = str(local.port)
            environment[f"KOHAKURIVER_PORT_{local.remote_port}_{local.proto.upper()}"] = str(local.port)
        try:
            with lowered_file_limit(self._files):
                self._child = await asyncio.create_subprocess_exec(*command, env=environment)
        except OSError as error:
            output.error(f"{command[0]} can't be run: {error.strerror}.")
            return NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
        if self._stopped.done():  # while it was being started
            self._child.send_signal(signal.Signals[self._stopped.result()])
        lost = asyncio.ensure_future(self._say_when_lost())
        try:
            code = await self._child.wait()
        finally:
            lost.cancel()
        await self._until_stopped(self._forwarder.close(deliver=True))
        return code if code >= 0 else KILLED_BY - code

    async def _say_when_lost(self) -> None:
        try:
            await self._forwarder.wait()
        except KohakuRiverError as error:
            output.note(f"The forward has ended, the command goes on: {error.message}")

    def _signalled(self, number: signal.Signals) -> None:
        if self._child is not None and self._child.returncode is None:
            if not (number in BY_KEYS and _shares_a_foreground()):
                with contextlib.suppress(ProcessLookupError):
                    self._child.send_signal(number)
        elif not self._stopped.done():
            self._stopped.set_result(number.name)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self._view.interval)
            self._view.tick(self._forwarder.stats())


def _shares_a_foreground() -> bool:
    """Whether a Ctrl-C on our terminal reaches our child by itself: it is of the same process group."""
    if os.name == "nt":  # one console, one Ctrl-C for all on it
        return True
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return in_foreground(terminal)
    finally:
        os.close(terminal)

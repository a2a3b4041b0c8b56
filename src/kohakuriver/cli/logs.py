"""`kohakuriver vps logs`: what a task prints."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sys
from dataclasses import asdict
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from kohakuriver.cli import output
from kohakuriver.cli.options import Remote, TaskArgument, moment_of
from kohakuriver.cli.signals import caught
from kohakuriver.text import printable

if TYPE_CHECKING:
    from kohakuriver.client.host import HostClient, LogLine

__all__ = ["logs"]

_COLOURS = re.compile(r"(\x1b\[[0-9;:]{0,64}m)")
_LAYOUT = "\n\t\r\b"


def logs(
    at: Remote,
    task: TaskArgument,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on with what it prints from now on, until it ends.")
    ] = False,
    tail: Annotated[
        int | None, typer.Option("--tail", "-n", metavar="N", min=0, help="The last N lines.", show_default=False)
    ] = None,
    since: Annotated[
        str | None,
        typer.Option(
            "--since", metavar="TIME", help="How long ago, as 10m, or a moment in RFC 3339.", show_default=False
        ),
    ] = None,
    timestamps: Annotated[bool, typer.Option("--timestamps", help="When each line was printed, before it.")] = False,
) -> None:
    """Show what a task printed, also once it has ended: its stdout on stdout, its stderr on stderr."""
    moment = None if since is None else moment_of(since, "--since")
    show = _as_json if at.json else _Shown(timestamps).show

    async def pass_on(client: HostClient) -> None:
        async for line in client.logs(task, follow=follow, tail=tail, since=moment):
            show(line)

    async def until_told(client: HostClient) -> None:
        passing = asyncio.get_running_loop().create_task(pass_on(client))
        with caught(lambda _signal: _end(passing)), contextlib.suppress(asyncio.CancelledError):
            await passing

    at.ask(until_told if follow else pass_on)


def _end(passing: asyncio.Task[None]) -> None:
    passing.cancel()


def _as_json(line: LogLine) -> None:
    print(json.dumps({**asdict(line), "time": _moment(line.time)}), flush=True)


def _moment(time: float | None) -> str | None:
    """RFC 3339, in UTC."""
    if time is None:
        return None
    return datetime.fromtimestamp(time, timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class _Shown:
    """Writes what is for people, or a program behind a pipe; with `timestamps` the time before each line."""

    def __init__(self, timestamps: bool) -> None:
        self._timestamps = timestamps
        self._in_line = {"stdout": False, "stderr": False}

    def show(self, line: LogLine) -> None:
        """One line, or a part of one."""
        if line.stream == "note":
            output.note(line.text.rstrip("\n"))
            return
        to = sys.stderr if line.stream == "stderr" else sys.stdout
        stamp = self._timestamps and not self._in_line[line.stream]
        self._in_line[line.stream] = not line.text.endswith("\n")
        _write(to, (f"{_moment(line.time) or '-'} " if stamp else "") + _safe(line.text, to))


def _safe(text: str, to: TextIO) -> str:
    """What a terminal may get of a task's output: colours, and where on its line it goes on; the rest as escapes."""
    if not output.is_terminal(to):
        return text
    parts = _COLOURS.split(text)
    return "".join(each if number % 2 else printable(each, keep=_LAYOUT) for number, each in enumerate(parts))


def _write(to: TextIO, text: str) -> None:
    to.buffer.write(text.encode("utf-8", "replace"))
    to.flush()

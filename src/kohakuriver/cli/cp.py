"""`kohakuriver cp`: files and folders between this machine and a task."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kohakuriver.cli import output
from kohakuriver.cli.options import Connection, JsonOption, remote
from kohakuriver.cli.signals import caught

if TYPE_CHECKING:
    from kohakuriver.client.copying.session import Place, Progress
    from kohakuriver.client.forward import Event

__all__ = ["register"]

MOST_NAMED = 20  # failures that are named for a person
SIGNALLED = 128  # plus the signal's number, as shells say it


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(
        name="cp",
        epilog="Examples:\n\nkohakuriver cp model.bin my-task:/data/\n\n"
        "kohakuriver cp -r data my-task:/work\n\nkohakuriver cp -r my-task:/data/runs/ runs\n\n"
        "As with rsync, a folder goes along under its name, and what is in it alone where SRC ends with a slash.",
    )(remote(cp))


SourceArgument = Annotated[str, typer.Argument(metavar="SRC", help="What to copy: a path here, or TASK:PATH.")]
TargetArgument = Annotated[
    str,
    typer.Argument(
        metavar="DST", help="Where to: TASK:PATH, or a path here. A relative one begins where the task did."
    ),
]
RecursiveOption = Annotated[
    bool, typer.Option("--recursive", "-r", help="Copy folders, with all that is in them; without it a file alone.")
]
DeleteOption = Annotated[bool, typer.Option("--delete", help="With -r: take away from DST what SRC has not.")]
UpdateOption = Annotated[bool, typer.Option("--update", "-u", help="Leave alone what is newer in DST.")]
OwnerOption = Annotated[
    bool, typer.Option("--owner", help="Keep owners (their numbers) and setuid bits, where that is allowed.")
]
StreamsOption = Annotated[int, typer.Option("--streams", metavar="N", help="How many streams at once.", min=1, max=16)]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but what went wrong.")]


def cp(
    at: Connection,
    source: SourceArgument,
    target: TargetArgument,
    recursive: RecursiveOption = False,
    delete: DeleteOption = False,
    update: UpdateOption = False,
    owner: OwnerOption = False,
    streams: StreamsOption = 4,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> int:
    """Copy files into a task, or out of it.

    What is there already, as large and of the same time, is left alone; a copy that was broken off goes on where it
    stopped when the same command is given again. The image needs no program for it.
    """
    from kohakuriver._files import keep_memory
    from kohakuriver.client.copying.plan import Options
    from kohakuriver.client.copying.session import copy_files
    from kohakuriver.errors import UsageError
    from kohakuriver.runtime import raise_file_limit, run

    if delete and not recursive:
        raise UsageError("--delete goes with -r: a file alone has nothing beside it to take away.")
    raise_file_limit()
    keep_memory()
    began = time.monotonic()
    view = _View(quiet=quiet or as_json, began=began)
    try:
        result = run(
            _unless_signalled(
                copy_files(
                    _place(source),
                    _place(target),
                    settings=at.settings(),
                    folder=recursive,
                    options=Options(delete=delete, update=update, owner=owner),
                    streams=streams,
                    on_progress=view.show,
                    told=view.told,
                )
            )
        )
    finally:
        view.clear()
    if isinstance(result, int):
        output.note("Stopped; the same command goes on from here.")
        return result
    return _summary(result, time.monotonic() - began, quiet=quiet, as_json=as_json)


async def _unless_signalled(copying: Coroutine[Any, Any, Progress]) -> Progress | int:
    """What came of it, or 128 + N where signal N ended it."""
    from kohakuriver.runtime import cancel_all

    signalled: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    copy = asyncio.ensure_future(copying)
    with caught(lambda number: None if signalled.done() else signalled.set_result(SIGNALLED + number)):
        either: set[asyncio.Future[Any]] = {copy, signalled}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if copy.done():
            return copy.result()
        await cancel_all([copy])
        return signalled.result()


def _place(text: str) -> Place:
    """`TASK:PATH`, or a path of this machine: that has a slash before its first colon, or none."""
    from kohakuriver.client.copying.session import Place

    task, colon, path = text.partition(":")
    if colon and task and "/" not in task:
        return Place(task, os.fsencode(path))
    return Place(None, os.fsencode(text))


class _View:
    """One line on a terminal that says how far it is."""

    def __init__(self, *, quiet: bool, began: float) -> None:
        self._draws = not quiet and output.draws(sys.stderr)
        self._began = began
        self._quiet = quiet
        self._waits = False

    def show(self, progress: Progress) -> None:
        if self._draws and progress.plan is not None:
            self._write(_line(progress, time.monotonic() - self._began))

    def told(self, event: Event) -> None:
        """Say that the connection is lost, if it does not come back at once, and then that it is back."""
        from kohakuriver.client.forward import Reconnecting, Resumed

        if isinstance(event, Reconnecting) and event.delay and not self._waits:
            self._waits = True
            self.clear()
            output.note("Connection to the host lost: the copy waits.")
        elif isinstance(event, Resumed) and self._waits:
            self._waits = False
            output.note(f"Back after {event.seconds:.0f} s.")

    def clear(self) -> None:
        if self._draws:
            self._write("")

    def _write(self, text: str) -> None:
        sys.stderr.write(f"\r\033[K{text}")
        sys.stderr.flush()


def _line(progress: Progress, seconds: float) -> str:
    done, plan = progress.done, progress.plan
    assert plan is not None
    moved = done.size - done.kept_size
    rate = moved / seconds if seconds else 0.0
    parts = [f"{output.size(done.size)} of {output.size(plan.size)}", f"{done.files} of {len(plan.files)} files"]
    if rate:
        parts += [f"{output.size(rate)}/s", f"{_clock((plan.size - done.size) / rate)} left"]
    return ", ".join(parts)


def _clock(seconds: float) -> str:
    whole = round(max(seconds, 0))
    return f"{whole} s" if whole < 100 else f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"


def _summary(result: Progress, seconds: float, *, quiet: bool, as_json: bool) -> int:
    """Say what was done; the exit code."""
    done, plan = result.done, result.plan
    assert plan is not None
    for path, why in done.failed[:MOST_NAMED]:
        output.error(f"{os.fsdecode(path) or '.'}: {why.rstrip('.')}.")
    if done.failures > MOST_NAMED:
        output.error(f"{done.failures - MOST_NAMED} more could not be copied.")
    if plan.left_out and not quiet:
        output.note(f"Left out: {len(plan.left_out)} that are no files, folders or links, such as sockets and devices.")
    if done.not_owner and not quiet:
        output.note(f"The owner of {done.not_owner} could not be kept.")
    if as_json:
        shown = {"files": done.files, "bytes": done.size, "resumed_bytes": done.kept_size, "unchanged": plan.same}
        left_out = len(plan.left_out)
        more = {"links": done.links, "removed": done.removed, "left_out": left_out, "failed": done.failures}
        output.json_line({**shown, **more, "seconds": round(seconds, 3)})
    elif not quiet and not (done.files or done.links or done.removed or done.failures):
        output.note(f"Nothing to copy: {plan.same} {'is' if plan.same == 1 else 'are'} there already.")
    elif not quiet:
        rate = output.size((done.size - done.kept_size) / seconds)
        same = f", {plan.same} unchanged" if plan.same else ""
        went = f", {output.size(done.kept_size)} were there from before" if done.kept_size else ""
        gone = f", {done.removed} removed" if done.removed else ""
        files = f"{done.files} file{'' if done.files == 1 else 's'}"
        output.note(f"Copied {files}, {output.size(done.size)} in {seconds:.1f} s ({rate}/s){same}{went}{gone}.")
    return 1 if done.failures else 0

"""What people and programs read: plain lines, tables on a terminal, JSON on request.

Results go to stdout; messages go to stderr. Rich is imported only where a terminal is there to show it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from typing import IO, Any, NoReturn

from kohakuriver import descriptors, tracing
from kohakuriver.cli.signals import in_foreground
from kohakuriver.quotas import in_words
from kohakuriver.text import one_line, printable

__all__ = [
    "age",
    "allowed",
    "discard_stdout",
    "draws",
    "error",
    "errors_as_json",
    "failure",
    "fields",
    "flush",
    "give_up",
    "is_terminal",
    "json_line",
    "leave",
    "line",
    "note",
    "paints",
    "size",
    "table",
    "working",
]

_given_up = False
_errors_as_json = False

_GREEN = ("running", "online", "connected")
_RED = ("failed", "lost", "offline", "unreachable")


def is_terminal(stream: IO[str]) -> bool:
    """Whether a person is at the other end of `stream`."""
    return stream.isatty()


def paints(stream: IO[str]) -> bool:
    """Whether `stream` is a terminal that understands colours and movements of its cursor."""
    return is_terminal(stream) and os.environ.get("TERM", "windows" if os.name == "nt" else "") not in ("", "dumb")


def draws(stream: IO[str]) -> bool:
    """Whether `stream` is such a terminal and ours at the moment: in the background it is somebody else's."""
    return paints(stream) and in_foreground(stream.fileno())


def json_line(value: dict[str, Any]) -> None:
    """One JSON object on one line of stdout, at once."""
    print(json.dumps(value), flush=True)


def line(text: str) -> None:
    """One line of result on stdout, at once."""
    print(printable(text), flush=True)


def note(text: str) -> None:
    """One line for a person, on stderr; where logs are to be JSON, an object."""
    _say("info", printable(text))


def _say(level: str, text: str, prefix: str = "") -> None:
    if not _given_up:
        try:
            print(_as_json(level, text) if _logs_json() else prefix + text, file=sys.stderr, flush=True)
        except OSError:  # closed, broken, or its disk is full: nobody is left to be told
            descriptors.discard(sys.stderr)


def error(text: str, *, request_id: str = "") -> None:
    """Why the command fails, as one sentence on stderr, and by which id the host's log knows more."""
    sentence = " ".join(text.split()) or "It failed, and the reason is not known."
    if request_id:
        sentence += f" (request {one_line(request_id)})"
    prefix = "\033[1;31mError:\033[0m" if paints(sys.stderr) else "Error:"
    _say("error", printable(sentence), f"{prefix} ")


def _logs_json() -> bool:
    return os.environ.get("KOHAKURIVER_LOG_FORMAT") == "json"


def _as_json(level: str, text: str) -> str:
    """A line as host and runner log theirs (docs/guide/limits.md "Logs")."""
    moment = datetime.now(timezone.utc).isoformat().replace("+00:00", "Z")
    return json.dumps({"time": moment, "level": level, "event": text, "request_id": tracing.request_id()})


def errors_as_json(wanted: bool) -> None:
    """Whether whoever reads stdout reads JSON, and should find there why the command fails."""
    global _errors_as_json
    _errors_as_json = wanted


def failure(code: str, text: str, *, request_id: str = "") -> None:
    """Why the command fails: a sentence on stderr, and for programs also its code, on stdout.

    `request_id` is by what the logs of host and runner know it, where that is for them.
    """
    if _errors_as_json:
        try:
            told = {"error": code, "message": " ".join(text.split())}
            json_line(told | ({"request_id": request_id} if request_id else {}))
        except OSError:  # stdout may be what failed; the sentence on stderr still tells
            discard_stdout()
    error(text, request_id=request_id)


def discard_stdout() -> None:
    """Throw away what is still to come on stdout: whoever read it is gone, as after `| head`."""
    descriptors.discard(sys.stdout)


def give_up() -> None:
    """Another thread waits for stdout or stderr to be read, and holds its lock: nothing can be said any more."""
    global _given_up
    _given_up = True


def flush() -> None:
    """Write what is left for stdout. Raises BrokenPipeError when nobody reads it any more."""
    if not _given_up:
        sys.stdout.flush()


def leave(code: int) -> NoReturn:
    """End the program, though a thread may wait for stdout to be read: Python would wait for it too.

    What can't be written any more is thrown away: Python would say so in an exit code of its own.
    """
    if _given_up:
        os._exit(code)
    try:
        sys.stdout.flush()
    except OSError:
        discard_stdout()
    sys.exit(code)


@contextlib.contextmanager
def working(text: str) -> Iterator[Callable[[str], None] | None]:
    """Show on a terminal that something takes its time; elsewhere nothing.

    What the block gets says something else there; None where nothing is shown.
    """
    if not draws(sys.stderr):
        yield None
        return
    from rich.console import Console
    from rich.text import Text

    def shows(said: str) -> Text:
        return Text(printable(said, keep=""))

    with Console(stderr=True).status(shows(text), spinner="line") as shown:
        yield lambda other: shown.update(shows(other))


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows under headings: a Rich table on a terminal, aligned plain columns elsewhere."""
    if paints(sys.stdout):
        _rich_table(headings, rows)
        return
    lines = [[heading.upper() for heading in headings], *rows]
    widths = [max(len(cells[column]) for cells in lines) for column in range(len(headings))]
    for cells in lines:
        line("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip())


def _rich_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    needed = 0
    for number, heading in enumerate(headings):
        # Headings may take two lines where it is narrow, cells are shown whole: half an id is of no use.
        widest = max([len(word) for word in heading.split()] + [len(printable(row[number])) for row in rows])
        grid.add_column(heading, min_width=widest, overflow="fold")
        needed += widest + 2
    for row in rows:
        grid.add_row(*(Text(printable(cell), style=_style(cell)) for cell in row))
    console = Console()
    console.width = max(console.width, needed)
    console.print(grid)


def _style(cell: str) -> str:
    return "green" if cell in _GREEN else "red" if cell in _RED else ""


def aligned(pairs: Sequence[tuple[str, str]]) -> str:
    """`name: value` lines; pairs without a value are left out, and a value stays on its line whatever is in it."""
    shown = [(printable(name, keep=""), printable(value, keep="")) for name, value in pairs if value]
    width = max((len(name) for name, _ in shown), default=0)
    return "\n".join(f"{name + ':':<{width + 1}} {value}" for name, value in shown)


def fields(pairs: Sequence[tuple[str, str]]) -> None:
    """Those lines on stdout."""
    print(aligned(pairs), flush=True)


def size(count: float) -> str:
    """A number of bytes for people: `1.4 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def allowed(quota: str, used: float | None, most: float | None) -> tuple[str, str]:
    """How much somebody has of something, and how much they may have, for people; see quotas.py."""
    has = "" if used is None else in_words(quota, used)
    return has, "any" if most is None else in_words(quota, most)


def age(moment: str | None, *, now: float | None = None) -> str:
    """How long ago an ISO 8601 moment was, for people: `3 min`. One without a time zone is UTC."""
    if not moment:
        return "never"
    try:
        parsed = datetime.fromisoformat(moment.replace("Z", "+00:00"))
    except ValueError:
        return moment
    if parsed.tzinfo is None:
        parsed = parsed.replace(tzinfo=timezone.utc)
    seconds = max((time.time() if now is None else now) - parsed.timestamp(), 0)
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return f"{int(seconds)} s"

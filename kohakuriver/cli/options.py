"""Options and small checks that several commands share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from kohakuriver.errors import KohakuRiverError, UsageError

if TYPE_CHECKING:
    from kohakuriver.api import HostClient

Answer = TypeVar("Answer")

__all__ = [
    "HostOption",
    "JsonOption",
    "TaskArgument",
    "TokenOption",
    "ask",
    "complete_task",
    "pairs",
    "seconds",
]


def complete_task(incomplete: str) -> list[str]:
    """The names of the tasks that begin with what was typed; nothing where the host can't be asked."""
    try:
        tasks = ask(None, None, lambda client: client.tasks())
        return [task.name for task in tasks if task.name.startswith(incomplete)]
    except KohakuRiverError:
        return []


TaskArgument = Annotated[
    str,
    typer.Argument(
        metavar="TASK",
        help="The task's numeric id or its unique name.",
        autocompletion=complete_task,
        show_default=False,
    ),
]
HostOption = Annotated[
    str | None,
    typer.Option(
        "--host",
        metavar="URL",
        help="The host: a URL or a name. Default: KOHAKURIVER_HOST, config.toml, the cluster that 'up' started.",
        show_default=False,
    ),
]
TokenOption = Annotated[
    str | None,
    typer.Option(
        "--token",
        metavar="TOKEN",
        help="Your API token. Others on this machine can read it here; KOHAKURIVER_TOKEN stays private.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON on stdout, and nothing else there.")]


def ask(host: str | None, token: str | None, question: Callable[[HostClient], Awaitable[Answer]]) -> Answer:
    """What `question(client of the host)` answers. `host` and `token` are the flags, None where not given."""
    from kohakuriver.api import HostClient
    from kohakuriver.config import load_settings
    from kohakuriver.loops import run

    async def put() -> Answer:
        async with HostClient(load_settings(host=host, token=token)) as client:
            return await question(client)

    return run(put())


def pairs(values: list[str], option: str) -> dict[str, str]:
    """`["A=1", "B="]` as a mapping. Raises UsageError for one without a name or without `=`."""
    found: dict[str, str] = {}
    for value in values:
        name, equals, content = value.partition("=")
        if not name or not equals:
            raise UsageError(f"{option} takes NAME=VALUE, not {value!r}.")
        found[name] = content
    return found


_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def seconds(text: str, option: str) -> float:
    """A time like `90s`, `15m`, `12h`, `30d` or `4w` in seconds. Raises UsageError."""
    number, unit = text[:-1], text[-1:]
    if unit not in _UNITS or not number.isascii() or not number.isdigit() or not int(number[:9]) > 0:
        raise UsageError(f"{option} takes a time like 12h or 30d, not {text!r}.")
    return float(int(number[:9]) * _UNITS[unit])

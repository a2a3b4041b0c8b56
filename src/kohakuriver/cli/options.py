"""Options and small checks that several commands share."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from kohakuriver.cli import output
from kohakuriver.errors import KohakuRiverError, UsageError

if TYPE_CHECKING:
    from kohakuriver.client.host import HostClient
    from kohakuriver.config import Settings

Answer = TypeVar("Answer")

__all__ = [
    "CaFileOption",
    "HostOption",
    "JsonOption",
    "TaskArgument",
    "TokenOption",
    "ask",
    "complete_task",
    "pairs",
    "seconds",
    "settings",
]


def complete_task(incomplete: str) -> list[str]:
    """The names of the tasks that begin with what was typed; nothing where the host can't be asked."""
    from kohakuriver.config import load_settings

    try:
        tasks = _put(load_settings(), lambda client: client.tasks())
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


def _set_ca_file(path: str | None) -> None:
    # The same as the variable: for all that this command asks, and for what it starts.
    if path is not None:
        os.environ["KOHAKURIVER_CA_FILE"] = path


CaFileOption = Annotated[
    str | None,
    typer.Option(
        "--ca-file",
        metavar="FILE",
        callback=_set_ca_file,
        expose_value=False,
        help="Who signed the host's certificate. Default: KOHAKURIVER_CA_FILE, config.toml, the system's authorities.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON on stdout, and nothing else there.")]


def ask(host: str | None, token: str | None, question: Callable[[HostClient], Awaitable[Answer]]) -> Answer:
    """What `question(client of the host)` answers. `host` and `token` are the flags, None where not given."""
    return _put(settings(host, token), question)


def _put(settings: Settings, question: Callable[[HostClient], Awaitable[Answer]]) -> Answer:
    from kohakuriver.client.host import HostClient
    from kohakuriver.runtime import run

    async def put() -> Answer:
        async with HostClient(settings) as client:
            return await question(client)

    return run(put())


def settings(host: str | None, token: str | None) -> Settings:
    """The settings that a command works with; says on stderr what is unsafe about them."""
    from kohakuriver.config import load_settings
    from kohakuriver.tls import sends_in_clear

    chosen = load_settings(host=host, token=token)
    if sends_in_clear(chosen.host):
        output.note(f"Warning: {chosen.host} is plain HTTP: others on the network can read what goes there.")
    return chosen


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
_LONGEST = 36_500 * 86_400


def seconds(text: str, option: str) -> float:
    """A time like `90s`, `15m`, `12h`, `30d` or `4w` in seconds. Raises UsageError."""
    number, unit = text[:-1], text[-1:]
    if unit not in _UNITS or not number.isascii() or not number.isdigit() or not int(number[:9]) > 0:
        raise UsageError(f"{option} takes a time like 12h or 30d, in s, m, h, d or w, not {text!r}.")
    length = int(number[:9]) * _UNITS[unit]
    if length > _LONGEST:
        raise UsageError(f"{option} takes 36500d at most, not {text!r}.")
    return float(length)

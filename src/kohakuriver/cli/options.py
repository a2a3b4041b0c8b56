"""Options and small checks that several commands share."""

from __future__ import annotations

import functools
import inspect
import os
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from datetime import datetime, timedelta, timezone
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

from kohakuriver.cli import output
from kohakuriver.errors import KohakuRiverError, UsageError
from kohakuriver.quotas import byte_count

if TYPE_CHECKING:
    from kohakuriver.client.host import HostClient
    from kohakuriver.config import Settings

Answer = TypeVar("Answer")
Record = TypeVar("Record")

__all__ = [
    "Connection",
    "JsonOption",
    "MaybeTaskArgument",
    "MaybeTasksArgument",
    "Place",
    "Remote",
    "SlurmJobOption",
    "SshAlgorithms",
    "SshAlgorithmsOption",
    "TaskArgument",
    "TasksArgument",
    "built",
    "complete_node",
    "complete_port",
    "complete_task",
    "moment_of",
    "one_of",
    "pairs",
    "remote",
    "scheduler_time",
    "seconds",
    "size_of",
    "variables_in",
    "warned",
]


class SshAlgorithms(str, Enum):
    """What an SSH server of ours offers in an exchange of keys."""

    all = "all"
    newest = "newest"


SshAlgorithmsOption = Annotated[
    SshAlgorithms,
    typer.Option(
        "--ssh-algorithms",
        envvar="KOHAKURIVER_SSH_ALGORITHMS",
        help="What SSH servers offer: all that is safe, or the newest alone (ML-KEM: OpenSSH 9.9 and later).",
    ),
]


def _told(ctx: typer.Context, incomplete: str, ask: Callable[[HostClient], Awaitable[list[str]]]) -> list[str]:
    """Of the words that the host is asked for those that begin with what was typed; none where it can't be asked."""
    from kohakuriver.config import load_settings

    given = {name: ctx.params.get(name) for name in ("host", "token", "ca_file")}
    try:
        words = _put(load_settings(**given), ask)
        return [word for word in words if word.startswith(incomplete) and re.fullmatch(r"@?[\w./-]+", word, re.ASCII)]
    except KohakuRiverError:
        return []


def complete_task(ctx: typer.Context, incomplete: str) -> list[str]:
    """The names of the tasks that begin with what was typed."""

    async def names(client: HostClient) -> list[str]:
        return [task.name for task in await client.tasks()]

    return _told(ctx, incomplete, names)


def complete_node(ctx: typer.Context, incomplete: str) -> list[str]:
    """The same of the nodes."""

    async def names(client: HostClient) -> list[str]:
        return [node.name for node in await client.nodes()]

    return _told(ctx, incomplete, names)


def complete_port(ctx: typer.Context, incomplete: str) -> list[str]:
    """The ports that listen in the task that was named, as `forward` takes them; behind a local port, too."""
    task = ctx.params.get("task")
    local, colon, typed = incomplete.rpartition(":")
    if not task or not (local.isdigit() or not colon):
        return []

    async def ports(client: HostClient) -> list[str]:
        found = (await client.ports(task)).ports
        return [str(port.port) if port.proto == "tcp" else f"{port.port}/{port.proto}" for port in found]

    return list(dict.fromkeys(local + colon + port for port in _told(ctx, typed, ports)))


def one_of(words: Sequence[str]) -> dict[str, Any]:
    """What an option takes beside its names, for it to be one of these words."""

    def parse(word: str) -> str:
        if word not in words:
            raise typer.BadParameter(f"{word!r} is not one of {', '.join(words)}.")
        return word

    return {
        "parser": parse,
        "metavar": f"[{'|'.join(words)}]",
        "autocompletion": lambda incomplete: [word for word in words if word.startswith(incomplete)],
    }


_TASK = typer.Argument(
    metavar="TASK", help="The task's numeric id or its unique name.", autocompletion=complete_task, show_default=False
)
TaskArgument = Annotated[str, _TASK]
MaybeTaskArgument = Annotated[str | None, _TASK]


SlurmJobOption = Annotated[
    str | None,
    typer.Option("--slurm", metavar="JOBID", help="Instead of a task: a job of yours in Slurm.", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="JSON on stdout, and nothing else there.")]

_TASKS = typer.Argument(
    metavar="TASK", help="The tasks' numeric ids or unique names.", autocompletion=complete_task, show_default=False
)
TasksArgument = Annotated[list[str], _TASKS]
MaybeTasksArgument = Annotated[list[str] | None, _TASKS]

_PANEL = "Connection"


@dataclass(frozen=True)
class Place:
    """Which host a command asks, and how it is trusted, as flags; None where not given. Made by `remote`."""

    host: Annotated[
        str | None,
        typer.Option(
            "--host",
            metavar="URL",
            help="The host: a URL or a name, or several with commas between, of which the first that answers is asked. "
            "Default: KOHAKURIVER_HOST, config.toml, the cluster that 'up' started.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None
    ca_file: Annotated[
        str | None,
        typer.Option(
            "--ca-file",
            metavar="FILE",
            help="Who signed the host's certificate. Default: KOHAKURIVER_CA_FILE, config.toml, the system's.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None

    def resolved(self, token: str | None = None) -> Settings:
        """The settings in force. Raises UsageError when one makes no sense."""
        from kohakuriver.config import load_settings

        return load_settings(host=self.host, token=token, ca_file=self.ca_file)

    def ask_as(self, token: str | None, question: Callable[[HostClient], Awaitable[Answer]]) -> Answer:
        """What `question(client of the host)` answers to whoever has `token`."""
        return _put(warned(self.resolved(token)), question)


@dataclass(frozen=True)
class Connection(Place):
    """A host, and the token to show there."""

    token: Annotated[
        str | None,
        typer.Option(
            "--token",
            metavar="TOKEN",
            help="Your API token. Others on this machine can read it here; KOHAKURIVER_TOKEN stays private.",
            show_default=False,
            rich_help_panel=_PANEL,
        ),
    ] = None

    def settings(self) -> Settings:
        """The settings that a command works with; says on stderr what is unsafe about them."""
        return warned(self.resolved(self.token))

    def ask(self, question: Callable[[HostClient], Awaitable[Answer]]) -> Answer:
        """What `question(client of the host)` answers."""
        return _put(self.settings(), question)


@dataclass(frozen=True)
class Remote(Connection):
    """A host to ask, and in which form its answer is wanted."""

    json: JsonOption = False

    def show(self, value: dict[str, Any], text: str) -> None:
        """The answer on stdout: `value` for programs, or `text` for people."""
        if self.json:
            output.json_line(value)
        else:
            output.line(text)


def remote(command: Callable[..., Answer]) -> Callable[..., Answer]:
    """`command` with the options that one of its parameters, a dataclass such as Remote, is made of in its place."""
    signature = inspect.signature(command, eval_str=True)
    (whole,) = [each for each in signature.parameters.values() if is_dataclass(each.annotation)]
    hints = get_type_hints(whole.annotation, include_extras=True)
    options = [
        inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=each.default, annotation=hints[each.name])
        for each in sorted(fields(whole.annotation), key=lambda each: each.name in _LAST)
    ]

    @functools.wraps(command)
    def run(**given: Any) -> Answer:
        made = whole.annotation(**{option.name: given.pop(option.name) for option in options})
        return command(**{whole.name: made}, **given)

    own = [each.replace(kind=each.KEYWORD_ONLY) for each in signature.parameters.values() if each is not whole]
    run.__signature__ = signature.replace(parameters=[*own, *options])  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in [*own, *options]}
    return run


_LAST = ("host", "token", "ca_file")


def built(kind: type[Record], given: Mapping[str, Any], **more: Any) -> Record:
    """A `kind`, whose fields are the parameters of their names in `given`; one that was not given has its default."""
    names = {each.name for each in fields(kind)}  # type: ignore[arg-type]
    chosen = {name: _plain(value) for name, value in given.items() if name in names and value is not None}
    return kind(**{**chosen, **more})


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(_plain, value))
    return value.value if isinstance(value, Enum) else value


def _put(settings: Settings, question: Callable[[HostClient], Awaitable[Answer]]) -> Answer:
    from kohakuriver.client.host import HostClient
    from kohakuriver.runtime import run

    async def put() -> Answer:
        async with HostClient(settings) as client:
            return await question(client)

    return run(put())


def warned(chosen: Settings) -> Settings:
    """These settings; what is unsafe about them is said on stderr, once."""
    from kohakuriver.config import accept_plain_http, accepts_plain_http
    from kohakuriver.tls import sends_in_clear

    for host in chosen.hosts:
        if sends_in_clear(host) and not accepts_plain_http(host):
            output.note(
                f"Warning: {host} is plain HTTP: others on the network can read what goes there. This is said once."
            )
            accept_plain_http(host)
    return chosen


def size_of(text: str | None, option: str) -> int | None:
    """A size like `512m` or `8g` in bytes; None where it was not given. Raises UsageError."""
    try:
        return None if text is None else byte_count(text)
    except ValueError:
        raise UsageError(f"{option} takes a size such as 512m or 8g, not {text!r}.") from None


def pairs(values: list[str], option: str) -> dict[str, str]:
    """`["A=1", "B="]` as a mapping. Raises UsageError for one without a name or without `=`."""
    found: dict[str, str] = {}
    for value in values:
        name, equals, content = value.partition("=")
        if not name or not equals:
            raise UsageError(f"{option} takes NAME=VALUE, not {value!r}.")
        found[name] = content
    return found


def variables_in(file: Path, option: str) -> dict[str, str]:
    """The variables of a file as docker reads it: `NAME=VALUE` in each line, as it stands, or a NAME of our own.

    Lines that are empty or begin with # count nothing. Raises UsageError.
    """
    try:
        lines = file.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        raise UsageError(f"{option}: {file} can't be read: {reason}.") from None
    found: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        name, equals, value = line.lstrip().partition("=")
        if (not name and not equals) or name.startswith("#"):
            continue
        if not name or any(map(str.isspace, name)):
            raise UsageError(f"{option}: line {number} of {file} is not NAME=VALUE.")
        if equals:
            found[name] = value
        elif name in os.environ:
            found[name] = os.environ[name]
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


def scheduler_time(text: str, option: str) -> int:
    """A time limit as Slurm writes it, [D-][[H:]M:]S and minutes for a number alone, or as `90m`; in seconds.

    Raises UsageError.
    """
    found = re.fullmatch(r"(?:(\d{1,4})-)?(\d{1,5})(?::(\d{1,2}))?(?::(\d{1,2}))?", text)
    if found is None:
        return int(seconds(text, option))
    days, first, second, third = (None if part is None else int(part) for part in found.groups())
    if days is not None:
        total = days * 86_400 + (first or 0) * 3600 + (second or 0) * 60 + (third or 0)
    elif third is not None:
        total = (first or 0) * 3600 + (second or 0) * 60 + third
    else:
        total = (first or 0) * 60 + (second or 0)
    if total <= 0:
        raise UsageError(f"{option} takes a time like 4:00:00, not {text!r}.")
    return total


def moment_of(text: str, option: str) -> str:
    """How long ago, as `12h`, or a moment in ISO 8601; as the latter, in UTC. Raises UsageError."""
    try:
        moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        if "T" in text or text.count("-") > 1:
            raise UsageError(
                f"{option} takes a time like 12h or a moment like 2026-01-31T12:00, not {text!r}."
            ) from None
        moment = datetime.now(timezone.utc) - timedelta(seconds=seconds(text, option))
    return moment.astimezone(timezone.utc).isoformat()

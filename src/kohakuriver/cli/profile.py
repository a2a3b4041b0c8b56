"""`kohakuriver.toml`: the forwards of a project, which `kohakuriver forward` alone opens.

The file may come with somebody else's repository, so it says which ports are to be had and nothing about whom to ask
for them, what to show there, or what to run; and what it opens is open to this machine alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kohakuriver.errors import UsageError

if TYPE_CHECKING:
    from kohakuriver.client.straight import PathChoice

__all__ = ["FILE", "Entry", "chosen", "found", "read"]

FILE = "kohakuriver.toml"

_WAIT_SECONDS = 60.0
_LONGEST_RESUME = 86_400
_LARGEST = 1 << 20
_OF_THE_USER = ("host", "token", "ca_file", "ssh_proxy", "proxy", "command", "on_connect")


@dataclass(frozen=True)
class Entry:
    """One `[[forward]]` of the file. `name` is the profile's, None for what has none; `wait` is seconds.

    `socks` is the local port of a SOCKS server; `every` is the key `all`; `path` is None where the file does not say.
    """

    task: str
    ports: tuple[str, ...]
    name: str | None = None
    local_host: str | None = None
    local_port_fallback: bool = False
    wait: float | None = None
    resume: bool = True
    resume_for: int | None = None
    detach: bool = False
    socks: int | None = None
    every: bool = False
    path: PathChoice | None = None


def found(directory: Path, home: Path | None) -> Path | None:
    """The file that counts in `directory`: there, or in the nearest parent up to the repository or to `home`.

    Outside of both no parent is looked at: it may be anybody's.
    """
    upwards = [directory, *directory.parents]
    ends = [number for number, each in enumerate(upwards) if each == home or (each / ".git").exists()]
    for each in upwards[: ends[0] + 1 if ends else 1]:
        if (each / FILE).is_file():
            return _own(each / FILE)
    return None


def _own(path: Path) -> Path:
    """The file, where it is the user's or root's. Raises UsageError for another's: it would open the user's tasks."""
    owner = path.stat().st_uid
    if os.name != "nt" and owner not in (os.geteuid(), 0):
        raise UsageError(f"{path} belongs to another user (uid {owner}) and does not count; copy it to have it count.")
    return path


def read(path: Path) -> list[Entry]:
    """What the file names. Raises UsageError, with the file and the key, for what it may not have."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        with path.open("rb") as file:
            content: dict[str, Any] = tomllib.loads(file.read(_LARGEST).decode())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}.") from error
    except RecursionError as error:
        raise UsageError(f"{path} can't be read: it is nested too deeply.") from error
    for key in content:
        if key != "forward":
            raise UsageError(f"{path} may not have {key!r}{_why_not(key)}; it may have [[forward]].")
    given = content.get("forward", [])
    entries = [given] if isinstance(given, dict) else given
    if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
        raise UsageError(f"'forward' of {path} must be tables, each begun by [[forward]].")
    return [_entry(path, number, each) for number, each in enumerate(entries, 1)]


def chosen(path: Path, entries: Sequence[Entry], name: str | None) -> list[Entry]:
    """Those of the profile `name`, or all without one. Raises UsageError where there are none."""
    if not entries:
        raise UsageError(f"{path} names no forward; give it a [[forward]] with task and ports.")
    those = [each for each in entries if name is None or each.name == name]
    if not those:
        names = ", ".join(sorted({each.name for each in entries if each.name is not None}))
        has = f"those of {path} are: {names}" if names else f"no [[forward]] of {path} has a name"
        raise UsageError(f"There is no profile {name!r}; {has}.")
    return those


def _why_not(key: str) -> str:
    if key in _OF_THE_USER:
        return ": where your token goes and what runs is your own to say, by options and settings"
    return ""


def _entry(path: Path, number: int, given: dict[str, Any]) -> Entry:
    where = f"[[forward]] {number} of {path}"
    for key, value in given.items():
        if key not in _KEYS:
            raise UsageError(f"{where} may not have {key!r}{_why_not(key)}; it may have {', '.join(_KEYS)}.")
        wanted, fits = _KEYS[key]
        if not fits(value):
            raise UsageError(f"{key!r} in {where} must be {wanted}.")
    for key in ("task", "ports"):
        if key not in given and not (key == "ports" and ("socks" in given or given.get("all"))):
            raise UsageError(f"{where} lacks {key!r}, which must be {_KEYS[key][0]}.")
    ports = given.get("ports", [])
    ports = ports if isinstance(ports, list) else [ports]
    ports = [_checked_port(path, where, port) for port in ports]
    wait = given.get("wait")
    seconds = {True: _WAIT_SECONDS, False: None}[wait] if isinstance(wait, bool) else wait
    every = given.pop("all", False)
    made = {**given, "every": every, "task": str(given["task"]), "ports": tuple(map(str, ports)), "wait": seconds}
    return Entry(**made)


def _checked_port(path: Path, where: str, port: int | str) -> str:
    """The port, with the path of a Unix socket made whole. Raises UsageError for one outside of the file's directory.

    Elsewhere it could stand in for another program's.
    """
    from kohakuriver.client.ports import UNIX, parse_port

    try:
        parsed = parse_port(port)
    except UsageError as error:
        raise UsageError(f"'ports' in {where}: {error.message}") from error
    if parsed.path is None:
        return str(port)
    place = (path.parent / parsed.path).resolve()
    if not place.is_relative_to(path.parent.resolve()):
        raise UsageError(f"'ports' in {where}: the Unix socket {parsed.path} is not below the file's directory.")
    return f"{UNIX}{place}:{parsed.remote}"


def _text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _yes_or_no(value: Any) -> bool:
    return isinstance(value, bool)


def _ports(value: Any) -> bool:
    ports = value if isinstance(value, list) else [value]
    return bool(ports) and all(_text(port) or _whole(port) for port in ports)


def _wait(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, (int, float)) and 0 <= value < float("inf"))


def _local_host(value: Any) -> bool:
    from kohakuriver.client.ports import exposes

    return _text(value) and not exposes(value)


# Of each key what it must be, in words, and whether a value is that.
_KEYS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "task": ("a task's name or id", lambda value: _text(value) or _whole(value)),
    "ports": ('ports, as in ["8888", "5432:5432", "53/udp"]', _ports),
    "name": ("text", _text),
    "local_host": ("a loopback address; --local-host opens a forward to other machines", _local_host),
    "local_port_fallback": ("true or false", _yes_or_no),
    "wait": ("true, false or a number of seconds", _wait),
    "resume": ("true or false", _yes_or_no),
    "resume_for": ("a number of seconds, at most 86400", lambda value: _whole(value) and 0 < value <= _LONGEST_RESUME),
    "path": ("auto, direct or host", lambda value: value in ("auto", "direct", "host")),
    "detach": ("true or false", _yes_or_no),
    "all": ("true or false", _yes_or_no),
    "socks": ("a local port, 0 for any free one", lambda value: _whole(value) and 0 <= value <= 65535),
}

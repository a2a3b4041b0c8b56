"""What one user may have: each limit declared once, for database, HTTP API and command line (docs/guide/limits.md).

The command line loads this too, so it needs only the standard library.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Literal

from kohakuriver.errors import NotAllowedError, UnavailableError, UsageError
from kohakuriver.limits import Limits

__all__ = [
    "LEAST_MEMORY",
    "LEAST_PIDS",
    "LONGEST_TIME",
    "NOTHING",
    "QUOTAS",
    "Offer",
    "Quota",
    "QuotaName",
    "Quotas",
    "Usage",
    "byte_count",
    "checked",
    "in_words",
    "over_limit",
    "parsed",
    "seconds_in",
    "time_in_words",
]

QuotaName = Literal[
    "tasks", "running", "tokens", "sessions", "connects", "memory", "cpus", "pids", "gpus", "log", "ttl", "idle_stop"
]

LEAST_MEMORY = 16 << 20
"""Bytes of memory that a container gets at least: its tunnel client and SSH server need some of it."""

LEAST_PIDS = 16
"""Processes and threads that a container may have at least."""

SHARE = 8
"""A task that asks for nothing gets at most this part of what its user may have, so that there is room for others."""


@dataclass(frozen=True)
class Quota:
    """One limit. `what` is what it counts, in the words of a help text; `most` the largest that makes sense."""

    unit: Literal["", "bytes", "CPUs", "seconds"]
    most: float
    what: str


_MANY = 1 << 20

LONGEST_TIME = 36_500 * 86_400
"""Seconds that a time may be long."""

QUOTAS: dict[QuotaName, Quota] = {
    "tasks": Quota("", _MANY, "tasks, those that don't run included"),
    "running": Quota("", _MANY, "tasks that run"),
    "tokens": Quota("", _MANY, "tokens that are good"),
    "sessions": Quota("", _MANY, "forwards, terminals and SSH connections that are open"),
    "connects": Quota("", _MANY, "connections opened in a second on one node"),
    "memory": Quota("bytes", 1 << 50, "memory of all running containers together"),
    "cpus": Quota("CPUs", _MANY, "processors of all running containers together"),
    "pids": Quota("", 1 << 30, "processes of all running containers together"),
    "gpus": Quota("", _MANY, "GPUs of all running containers together"),
    "log": Quota("bytes", 1 << 40, "bytes that are kept of what each task prints"),
    "ttl": Quota("seconds", LONGEST_TIME, "time that each task runs until it is stopped"),
    "idle_stop": Quota("seconds", LONGEST_TIME, "time without anybody connected until a task is stopped"),
}

NOTHING = -1
"""As a limit: nothing of it, where 0 is any number."""

_CAN_BE_NOTHING = ("tasks", "running", "tokens", "gpus")
"""What is counted one by one. Of the others nothing at all would be no limit but a way to break every task."""

_OF_ADMINS = ("sessions", "connects")
"""What admins have a default of, too: it keeps a mistake in a script from everybody else."""


@dataclass(frozen=True)
class Quotas:
    """How much a user may have of each; 0 is any number, NOTHING none at all."""

    tasks: int = 0
    running: int = 0
    tokens: int = 0
    sessions: int = 0
    connects: int = 0
    memory: int = 0
    cpus: float = 0
    pids: int = 0
    gpus: int = 0
    log: int = 0
    ttl: int = 0
    idle_stop: int = 0

    @classmethod
    def by_default(cls, limits: Limits) -> Quotas:
        """What a host's environment gives users of whom nothing else is said."""
        return cls(**{name: getattr(limits, f"max_{name}") for name in QUOTAS})

    def with_own(self, role: str, own: Mapping[str, float]) -> Quotas:
        """Those of a user with that role for whom `own` were set, where these are the defaults."""
        base = self if role != "admin" else Quotas(**{name: getattr(self, name) for name in _OF_ADMINS})
        known = {name: value for name, value in own.items() if name in QUOTAS}
        return replace(base, **known)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Offer:
    """What a node has, and what a container or process gets there that asks for nothing; 0 where there is no limit.

    `user_processes`: users who are no admins may run processes there, as the runner's own user. `mount_roots` are the
    directories that they may mount, as `mount_roots.py` reads them, `gpus` the numbers of its GPUs. `no_direct` is why
    users can't reach its runner past the host, a clause; empty where they can.
    """

    memory: int = 0
    cpus: float = 0
    task_memory: int = 0
    task_cpus: float = 0
    task_pids: int = 0
    task_shm: int = 0
    task_log: int = 0
    user_processes: bool = False
    mount_roots: list[str] = field(default_factory=list)
    gpus: list[str] = field(default_factory=list)
    no_direct: str = "its runner is of a version that has no such path"


@dataclass(frozen=True)
class Usage:
    """What a user has now, or what one more task would add to it."""

    tasks: int = 0
    running: int = 0
    tokens: int = 0
    memory: int = 0
    cpus: float = 0
    pids: int = 0
    gpus: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(Usage)})

    def check(self, more: Usage, user: str, quotas: Quotas) -> None:
        """Whether the user may have `more` on top of this.

        Raises UnavailableError "over_limit" (429), or NotAllowedError (403) for what could never be.
        """
        for each in fields(Usage):
            wanted, limit = getattr(more, each.name), getattr(quotas, each.name)
            used, most = getattr(self, each.name), max(limit, 0)
            if wanted and limit and round(used + wanted, 6) > most:  # CPUs are sums of fractions
                raise over_limit(each.name, user, used=used, wanted=wanted, most=most)


_ADVICE = {
    "tasks": "remove one with `kohakuriver vps rm`",
    "running": "stop one with `kohakuriver vps stop`",
    "tokens": "revoke one with `kohakuriver token revoke`",
}


def over_limit(name: str, user: str, *, used: float, wanted: float, most: float) -> UnavailableError | NotAllowedError:
    """The error for a user who has `used` of something and wants more than `most`; it names the limit."""
    limit = f"the limit {name!r} of {user} is {in_words(name, most)}"
    if not most:
        return NotAllowedError(f"There is never room: {limit}; ask an administrator for more.", code="over_limit")
    if advice := _ADVICE.get(name):
        return UnavailableError(f"There is no room: {limit}; {advice} first.", code="over_limit", status=429)
    asks = f"this task asks for {in_words(name, wanted)}"
    if wanted > most:
        return NotAllowedError(f"There is never room: {limit}, and {asks}; give less by --{name}.", code="over_limit")
    left = f"running tasks have {in_words(name, used)} of it"
    return UnavailableError(
        f"There is no room: {limit}, {left}, and {asks}; stop one, or give less by --{name}.",
        code="over_limit",
        status=429,
    )


_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def in_words(name: str, value: float) -> str:
    """How much of something, for people: `64 GiB`, `2 CPUs`, `12`."""
    unit = _unit(name)
    if unit == "seconds":
        return time_in_words(value)
    if unit != "bytes":
        return f"{value:.15g} {unit}".rstrip()
    power = 0
    while value >= 1024 and power < len(_UNITS) - 1:
        value /= 1024
        power += 1
    return f"{value:.4g} {_UNITS[power]}"


def _unit(name: str) -> str:
    return QUOTAS[name].unit if name in QUOTAS else "bytes"


_TIMES = {"d": 86_400, "h": 3600, "min": 60, "s": 1}
_TIME_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}


def time_in_words(seconds: float) -> str:
    """A time for people, by its two largest units: `8 h`, `1 h 30 min`."""
    left = max(round(seconds), 0)
    words = []
    for unit, length in _TIMES.items():
        if left >= length:
            words.append(f"{left // length} {unit}")
            left %= length
    return " ".join(words[:2]) or "0 s"


def seconds_in(text: str) -> int:
    """A time like `90s`, `15m`, `12h`, `30d` or `4w` in seconds. Raises ValueError."""
    number, unit = text[:-1], text[-1:]
    if unit not in _TIME_UNITS or not (number.isascii() and number.isdigit()) or not int(number[:12]) > 0:
        raise ValueError(f"{text!r} is no time: write a number and s, m, h, d or w, such as 12h")
    return int(number[:12]) * _TIME_UNITS[unit]


_SIZE = re.compile(r"([0-9]{1,16}(?:\.[0-9]{1,6})?) ?(?:([kmgtp])?(?:i?b)?)", re.IGNORECASE)


def byte_count(text: str) -> int:
    """A number of bytes like `512m`, `8g`, `1.5GiB` or `1048576`. Raises ValueError for anything else."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no size: write a number and k, m, g or t, such as 8g")
    return int(float(found[1]) * 1024 ** " kmgtp".index((found[2] or " ").lower()))


_WRITTEN: dict[str, tuple[Callable[[str], float], str]] = {"bytes": (byte_count, "8g"), "seconds": (seconds_in, "12h")}
"""How a limit is read, by its unit, and an example."""


def parsed(name: str, text: str) -> float | None:
    """A limit as it is written on a command line: a number or size, `none` for no limit, `default` for None.

    Raises UsageError.
    """
    if text in ("default", "none"):
        return None if text == "default" else 0
    read, example = _WRITTEN.get(_unit(name), (float, "12"))
    option = name.replace("_", "-")
    try:
        value = read(text)
        if value == NOTHING:
            raise ValueError(text)
        if value:
            return checked(name, value)
        if name in _CAN_BE_NOTHING:
            return NOTHING
        raise UsageError(f"--{option} can't be 0; write none for no limit, or a number such as {example}.")
    except ValueError:
        raise UsageError(f"--{option} takes a number such as {example}, or none, or default, not {text!r}.") from None


def checked(name: str, value: float) -> float:
    """A value for the limit `name`: 0, which is no limit, or more, or NOTHING. Raises UsageError."""
    if name not in QUOTAS:
        raise UsageError(f"There is no limit {name!r}; there are {', '.join(QUOTAS)}.")
    quota = QUOTAS[name]
    whole = quota.unit != "CPUs"
    if value == NOTHING and name in _CAN_BE_NOTHING:
        return NOTHING
    if not 0 <= value <= quota.most or (whole and value != int(value)):
        kind = "a whole number" if whole else "a number"
        raise UsageError(f"The limit {name!r} must be {kind} from 0 (no limit) to {quota.most:.15g}, not {value!r}.")
    return int(value) if whole else value

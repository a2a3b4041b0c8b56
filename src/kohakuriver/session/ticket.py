"""Tickets: what the host shows a runner so that the runner does as it says.

A ticket is a JSON Web Token, signed with HS256 and the key that host and runner agreed on when the node registered.
It is good for one node, one purpose, one container, once, and at most 60 seconds. Sources: docs/protocol.md §5,
RFC 7519.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Literal, cast

import jwt

from kohakuriver.config import write_private
from kohakuriver.errors import NotAllowedError, UnauthenticatedError, UnavailableError

__all__ = ["MAX_TTL", "Scope", "Ticket", "UsedTickets", "check", "issue"]

Scope = Literal["control", "forward", "terminal"]

MAX_TTL = 60
"""Seconds that a ticket may be good for at most."""

# The clocks of two machines are rarely the same; without this a host that is a second ahead could open nothing.
_CLOCK_LEEWAY = 30

_ALGORITHM = "HS256"


@dataclass(frozen=True)
class Ticket:
    """What a valid ticket says. `ports` None means any port; `expires_at` is in seconds since the epoch.

    `connects` is how many streams its user may open in a second, 0 for any number; None where the host does not say.
    `tells` is every how many seconds the host wants to hear what went past it; None where nothing may.
    """

    node: str
    scope: Scope
    id: str
    expires_at: float
    task: int | None = None
    container: str | None = None
    user: str | None = None
    ports: frozenset[int] | None = None
    connects: int | None = None
    tells: float | None = None

    def allows(self, port: int) -> bool:
        """Whether a stream to this port of the container may be opened."""
        return self.ports is None or port in self.ports


def issue(
    key: bytes,
    *,
    node: str,
    scope: Scope,
    task: int | None = None,
    container: str | None = None,
    user: str | None = None,
    ports: Literal["*"] | Sequence[int] = "*",
    connects: int | None = None,
    tells: float | None = None,
    ttl: float = MAX_TTL,
) -> str:
    """A ticket for `node`, good for `ttl` seconds (0 < ttl <= 60).

    A "forward" or "terminal" ticket needs `task`, `container` and `user`; the former names the ports that its session
    may reach, the latter none; `connects` and `tells` are as a Ticket has them. A "control" ticket is about one
    `container`, or, without one, about none in particular; it names the `user` where somebody asked for it.
    Raises ValueError when it would be longer-lived or less specific than docs/protocol.md §5 allows.
    """
    if not 0 < ttl <= MAX_TTL:
        raise ValueError(f"a ticket lives between 0 and {MAX_TTL} seconds, not {ttl}")
    now = time.time()
    claims: dict[str, object] = {
        "aud": node,
        "iat": int(now),
        "exp": int(now + ttl),
        "jti": secrets.token_urlsafe(12),
        "scope": scope,
    }
    if scope == "terminal":
        ports = ()
    if scope != "control":
        if task is None or container is None or user is None:
            raise ValueError(f"a {scope} ticket needs a task, a container and a user")
        claims |= {"task": task, "container": container, "user": user, "ports": ports if ports == "*" else list(ports)}
        if connects is not None:
            claims["connects"] = connects
        if tells is not None:
            claims["tells"] = tells
    else:
        claims |= {name: value for name, value in (("container", container), ("user", user)) if value is not None}
    return jwt.encode(claims, key, algorithm=_ALGORITHM)


def check(key: bytes, ticket: str, *, node: str, scope: Scope) -> Ticket:
    """What `ticket` says, when `key` signed it, for this `node` and `scope`, and it has not run out.

    Raises UnauthenticatedError for a ticket that is no valid one, NotAllowedError for a valid one for something else.
    """
    try:
        claims = jwt.decode(
            ticket,
            key,
            algorithms=[_ALGORITHM],
            leeway=_CLOCK_LEEWAY,
            options={"require": ["aud", "exp", "iat", "jti", "scope"], "verify_aud": False},
        )
    except jwt.ExpiredSignatureError:
        raise UnauthenticatedError("The ticket has run out; check that the clocks of host and node agree.") from None
    except jwt.ImmatureSignatureError:
        raise UnauthenticatedError("The ticket is from the future; set the clocks of host and node right.") from None
    except jwt.InvalidTokenError:
        raise UnauthenticatedError("The ticket is not one that this node's host signed.") from None
    if int(claims["exp"]) - int(claims["iat"]) > MAX_TTL:
        raise UnauthenticatedError(f"The ticket is good for longer than {MAX_TTL} s, as none may be.")
    if claims["aud"] != node or claims["scope"] != scope:
        raise NotAllowedError(f"The ticket is not for {scope} on node {node!r}.")
    try:
        return _from_claims(claims)
    except (KeyError, TypeError, ValueError):
        raise UnauthenticatedError("The ticket is not one that this node's host signed.") from None


def _from_claims(claims: dict[str, object]) -> Ticket:
    scope = cast(Scope, claims["scope"])
    expires_at = float(cast(int, claims["exp"]))
    common = Ticket(node=str(claims["aud"]), scope=scope, id=str(claims["jti"]), expires_at=expires_at)
    if scope == "control":
        container, user = (cast("str | None", claims.get(name)) for name in ("container", "user"))
        return replace(common, container=container, user=user)
    ports, connects, tells = claims["ports"], claims.get("connects"), claims.get("tells")
    return replace(
        common,
        task=int(cast(int, claims["task"])),
        container=str(claims["container"]),
        user=str(claims["user"]),
        ports=None if ports == "*" else frozenset(int(port) for port in cast("list[int]", ports)),
        connects=None if connects is None else int(cast(int, connects)),
        tells=None if tells is None else float(cast(float, tells)),
    )


class UsedTickets:
    """Tickets that were shown before, for as long as they would be good; each is taken once.

    Args:
        path: where they are written down, so that a runner that was started again refuses them too.
        most: how many are remembered. More are refused until older ones have run out.
    """

    def __init__(self, path: Path, *, most: int = 100_000, clock: Callable[[], float] = time.time) -> None:
        self._path = path
        self._most = most
        self._clock = clock
        self._used: dict[str, float] = {}
        self._sweep_at = 0.0
        self._file: IO[str] | None = None
        with contextlib.suppress(OSError, UnicodeDecodeError):
            for line in path.read_text("utf-8").splitlines():
                with contextlib.suppress(ValueError):
                    until, _, id_ = line.partition(" ")
                    self._used[id_] = float(until)

    def take(self, ticket: Ticket) -> None:
        """Note that a ticket was shown.

        Raises UnauthenticatedError "ticket_used" for one that was shown before, UnavailableError "busy" where too many
        are good at the same time.
        """
        now = self._clock()
        if self._file is None or now >= self._sweep_at:
            self._file = self._sweep(now)
        if ticket.id in self._used:
            raise UnauthenticatedError("The ticket was used before, and each is good once.", code="ticket_used")
        if len(self._used) >= self._most:
            raise UnavailableError("This node gets too many requests at once; try again.", code="busy", status=503)
        until = ticket.expires_at + _CLOCK_LEEWAY
        self._used[ticket.id] = until
        self._file.write(f"{until:.0f} {ticket.id}\n")
        self._file.flush()

    def _sweep(self, now: float) -> IO[str]:
        """Forget what has run out, here and in the file, which is then open for more."""
        self.close()
        self._sweep_at = now + MAX_TTL
        self._used = {id_: until for id_, until in self._used.items() if until > now}
        write_private(self._path, "".join(f"{until:.0f} {id_}\n" for id_, until in self._used.items()))
        return self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Let go of the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

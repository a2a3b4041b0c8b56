"""Tickets: what the host shows a runner so that the runner does as it says.

A ticket is a JSON Web Token, signed with HS256 and the key that host and runner agreed on when the node registered.
It is good for one node, one purpose and at most 60 seconds. Sources: docs/protocol.md §5, RFC 7519.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, cast

import jwt

from kohakuriver.errors import NotAllowedError, UnauthenticatedError

__all__ = ["MAX_TTL", "Scope", "Ticket", "check", "issue"]

Scope = Literal["control", "forward", "terminal"]

MAX_TTL = 60
"""Seconds that a ticket may be good for at most."""

# The clocks of two machines are rarely the same; without this a host that is a second ahead could open nothing.
_CLOCK_LEEWAY = 30

_ALGORITHM = "HS256"


@dataclass(frozen=True)
class Ticket:
    """What a valid ticket says. `ports` None means any port; `expires_at` is in seconds since the epoch."""

    node: str
    scope: Scope
    id: str
    expires_at: float
    task: int | None = None
    container: str | None = None
    user: str | None = None
    ports: frozenset[int] | None = None

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
    ttl: float = MAX_TTL,
) -> str:
    """A ticket for `node`, good for `ttl` seconds (0 < ttl <= 60).

    A "forward" or "terminal" ticket needs `task`, `container` and `user`; the former names the ports that its session
    may reach, the latter none. Raises ValueError when it would be longer-lived or less specific than
    docs/protocol.md §5 allows.
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
        return common
    ports = claims["ports"]
    return replace(
        common,
        task=int(cast(int, claims["task"])),
        container=str(claims["container"]),
        user=str(claims["user"]),
        ports=None if ports == "*" else frozenset(int(port) for port in cast("list[int]", ports)),
    )

"""Who asks this program for something just now: what is written down about it, and what is limited, goes by that."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from ipaddress import IPv6Address, IPv6Network, ip_address
from typing import Any

__all__ = ["Asker", "asker", "asking", "origin_of", "peer_name"]


def origin_of(address: str) -> str:
    """Whom a limit for strangers is about: an IP address, of IPv6 the /64, all of which one machine may have."""
    try:
        parsed = ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, IPv6Address):
        return str(parsed.ipv4_mapped or IPv6Network((parsed, 64), strict=False))
    return str(parsed)


@dataclass
class Asker:
    """One request.

    `source` is the address and port that it came from, `request` what it asks for, as "DELETE /api/users/ann"; `known`
    is what has been found out about who asks: by which user, token or key.
    """

    source: str = "?"
    request: str = ""
    known: dict[str, Any] = field(default_factory=dict)

    @property
    def origin(self) -> str:
        """Whom a limit for strangers is about: see `origin_of`."""
        address = self.source.rpartition(":")[0]
        return origin_of(address) if address else self.source

    def described(self) -> dict[str, Any]:
        """All that is known, as fields of a line; nothing where nobody asks."""
        return {**self.known, "from": self.source, "request": self.request} if self.request else dict(self.known)


_now: ContextVar[Asker | None] = ContextVar("asker", default=None)


def asker() -> Asker:
    """Who asks; one of whom nothing is known where this program does something by itself."""
    return _now.get() or Asker()


@contextlib.contextmanager
def asking(who: Asker) -> Iterator[Asker]:
    """While this lasts, here and in the tasks that begin here, it is `who` that asks."""
    token = _now.set(who)
    try:
        yield who
    finally:
        _now.reset(token)


def peer_name(address: object) -> str:
    """A socket's peer as "address:port", "?" for one that has none."""
    return f"{address[0]}:{address[1]}" if isinstance(address, tuple) else "?"

"""What a browser keeps for the host and can't change: JSON Web Tokens with the host's own key (RFC 7519). No I/O."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jwt

__all__ = ["BEGIN_SECONDS", "COOKIE_SECONDS", "Admission", "Signed"]

COOKIE_SECONDS = 3600.0
"""How long an app's cookie lets a browser in, before the host is asked again whether it may."""

BEGIN_SECONDS = 30.0
"""How long the way from the host's page to an app may take."""

_ALGORITHM = "HS256"

REMEMBERED, LONGEST = 1024, 1024
"""How many cookies are remembered with what they say, and up to which length: each request shows one again."""


@dataclass(frozen=True)
class Admission:
    """That a browser was let in at the `address` with this key.

    `browser` is the digest of the login that it hangs on, or of the link where `by_link`; `until` is in seconds since
    the epoch.
    """

    address: str
    browser: str
    task_id: int
    port: int
    until: float
    by_link: bool = False


class Signed:
    """Signs with `key`, and reads again what it has signed."""

    def __init__(self, key: bytes, *, clock: Callable[[], float] = time.time) -> None:
        self._key = key
        self._clock = clock
        self._remembered = lru_cache(REMEMBERED)(self._admission)

    def admit(self, address: str, browser: str, task_id: int, port: int, *, by_link: bool = False) -> str:
        """What says that a browser was let in, for `COOKIE_SECONDS`."""
        return self._sign("app", COOKIE_SECONDS, host=address, sub=browser, task=task_id, port=port, link=int(by_link))

    def admission(self, shown: str) -> Admission | None:
        """What such a text says, be its time over or not; None for one that this host has not signed.

        Whether a signature is good never changes, so it is checked once. Times, and rights, are asked for each time.
        """
        return self._remembered(shown) if len(shown) <= LONGEST else None

    def _admission(self, shown: str) -> Admission | None:
        claims = self._read("app", shown)
        if claims is None:
            return None
        until = float(claims["exp"])
        by_link = bool(claims.get("link"))
        return Admission(claims["host"], claims["sub"], int(claims["task"]), int(claims["port"]), until, by_link)

    def begin(self, address: str) -> str:
        """What says that a browser comes from the host's own page, for `BEGIN_SECONDS`. It lets nobody in."""
        return self._sign("begin", BEGIN_SECONDS, host=address)

    def begins(self, shown: str, address: str) -> bool:
        """Whether such a text is good at an address."""
        claims = self._read("begin", shown)
        return claims is not None and claims["host"] == address and float(claims["exp"]) > self._clock()

    def is_good(self, admission: Admission) -> bool:
        """Whether its time is not over."""
        return admission.until > self._clock()

    def is_old(self, admission: Admission) -> bool:
        """Whether a newer one should take its place."""
        return admission.until - self._clock() < COOKIE_SECONDS / 2

    def _sign(self, kind: str, seconds: float, **claims: str | int) -> str:
        return jwt.encode({**claims, "kind": kind, "exp": int(self._clock() + seconds)}, self._key, _ALGORITHM)

    def _read(self, kind: str, shown: str) -> dict[str, Any] | None:
        try:
            claims: dict[str, Any] = jwt.decode(
                shown, self._key, [_ALGORITHM], options={"verify_exp": False, "require": ["exp", "kind", "host"]}
            )
        except (jwt.InvalidTokenError, ValueError):
            return None
        return claims if claims["kind"] == kind else None

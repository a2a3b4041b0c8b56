"""Who may come in: links with a code that is good once, and the cookie that it is exchanged for. No I/O.

A gateway elsewhere may have another entrance; all that it asks is `admits` and `enter`.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["CODE_SECONDS", "Entrance", "is_ours", "pairs_of", "without_ours"]

CODE_SECONDS = 60.0
SEEN_SECONDS = 2 * CODE_SECONDS
"""How long after its end the use of a used code shows that somebody has seen it; later it is just no code."""
MOST_CODES = 64
_PREFIX = b"kohakuriver-web-"
_OURS = (b"kohakuriver-", b"__host-kohakuriver-", b"__host-http-kohakuriver-", b"__secure-kohakuriver-")


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).digest()


@dataclass
class _Code:
    digest: bytes
    until: float
    cookie: bytes | None = None  # whom it let in


class Entrance:
    """The entrance to one address.

    A browser sends cookies whatever the port, so the cookie's name has the port that the address is served on.
    A code that is used again shows that somebody has seen it: whoever came in with it is out, and `revoked` is called.
    """

    def __init__(
        self, served_on: int, clock: Callable[[], float] = time.monotonic, revoked: Callable[[], None] = lambda: None
    ) -> None:
        self.cookie_name = b"%s%d" % (_PREFIX, served_on)
        self._clock = clock
        self._revoked = revoked
        self._codes: list[_Code] = []
        self._cookies: list[bytes] = []  # digests: comparing them tells nothing of the cookies

    def code(self) -> str:
        """A new code."""
        code = secrets.token_urlsafe(24)
        self._codes = [*self._codes[1 - MOST_CODES :], _Code(_digest(code.encode()), self._clock() + CODE_SECONDS)]
        return code

    def enter(self, code: bytes) -> bytes | None:
        """The Set-Cookie that lets in whoever has this code; None where it is not good, or no longer."""
        digest = _digest(code)
        found = None
        for each in self._codes:
            if hmac.compare_digest(each.digest, digest):
                found = each
        if found is None:
            return None
        if found.cookie is not None:
            if found.cookie in self._cookies and self._clock() <= found.until + SEEN_SECONDS:
                self._cookies.remove(found.cookie)
                self._revoked()
            return None
        if self._clock() > found.until:
            return None
        cookie = secrets.token_urlsafe(32).encode()
        found.cookie = _digest(cookie)
        self._cookies.append(found.cookie)
        return b"%s=%s; Path=/; HttpOnly; SameSite=Lax" % (self.cookie_name, cookie)

    def admits(self, cookies: list[bytes]) -> bool:
        """Whether these Cookie fields have one that it gave."""
        given = [_digest(value) for name, value in pairs_of(cookies) if name == self.cookie_name]
        return any(hmac.compare_digest(one, known) for one in given for known in self._cookies)


def pairs_of(cookies: list[bytes]) -> list[tuple[bytes, bytes]]:
    """The cookies in these Cookie fields, as (name, value)."""
    pairs = [each.strip(b" \t").partition(b"=") for field in cookies for each in field.split(b";")]
    return [(name.strip(b" \t"), value.strip(b" \t")) for name, equals, value in pairs if equals]


def is_ours(pair: bytes) -> bool:
    """Whether a cookie's name is one of ours, be it of another address or of a host, or could be taken for one."""
    return pair.lstrip(b" \t=").lower().startswith(_OURS)


def without_ours(cookies: bytes) -> bytes:
    """A Cookie field without ours, which no service is to see."""
    if b"kohakuriver-" not in cookies.lower():
        return cookies
    pairs = [each.strip(b" \t") for each in cookies.split(b";")]
    return b"; ".join(pair for pair in pairs if pair and not is_ours(pair))

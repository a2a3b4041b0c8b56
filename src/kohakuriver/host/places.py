"""Where a login leads: to the page of this host that sent the browser there, and nowhere else. No I/O."""

from __future__ import annotations

import re
from urllib.parse import urlencode

__all__ = ["FIRST", "login_at", "place_in"]

FIRST = "/"
"""The page to which a login leads that was begun for none."""

_PLACES = re.compile(
    r"/device|/plain"
    r"|/open/[A-Za-z0-9._~%-]{1,190}/[1-9][0-9]{0,4}"
    r"|/enter-app\?app=[A-Za-z0-9.%:-]{1,300}&state=[0-9a-f]{64}"
)


def place_in(text: str) -> str:
    """The place that is named, as a path on this host; FIRST for all that is none, as every other site's address."""
    return text if _PLACES.fullmatch(text) else FIRST


def login_at(place: str, code: str = "") -> str:
    """The path of the login that leads to a place, with the code of a link where there is one."""
    place = place_in(place)
    query = urlencode({**({"code": code} if code else {}), **({"next": place} if place != FIRST else {})})
    return f"/login?{query}" if query else "/login"

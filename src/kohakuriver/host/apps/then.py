"""Where a browser was going before it had to log in: to an app, and nowhere else; a cookie of the host keeps it."""

from __future__ import annotations

import re

from fastapi import Request
from fastapi.responses import Response

from kohakuriver.host.cookies import set_place, shown_place

__all__ = ["forget", "remember", "remembered"]

_PLACES = re.compile(
    r"/open/[A-Za-z0-9._~%-]{1,190}/[1-9][0-9]{0,4}|/enter-app\?app=[A-Za-z0-9.%:-]{1,300}&state=[0-9a-f]{64}", re.ASCII
)
_SECONDS = 600


def remember(request: Request, response: Response) -> None:
    """Have a browser that is sent to log in come back to where it is now."""
    place = _here(request)
    if _PLACES.fullmatch(place):
        set_place(request, response, place, _SECONDS)


def remembered(request: Request) -> str | None:
    """Where a browser that is logged in now was going."""
    place = (shown_place(request) or "").strip('"')
    return place if _PLACES.fullmatch(place) else None


def forget(request: Request, response: Response) -> None:
    """It goes there, or somewhere else."""
    set_place(request, response, "", 0)


def _here(request: Request) -> str:
    path = request.url.path
    return f"{path}?{request.url.query}" if path == "/enter-app" else path

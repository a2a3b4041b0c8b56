"""Where a browser was going before it had to log in: to an app, and nowhere else; it is kept in a cookie meanwhile."""

from __future__ import annotations

import re

from fastapi import Request
from fastapi.responses import Response

__all__ = ["forget", "remember", "remembered"]

_PLACES = re.compile(
    r"/open/[A-Za-z0-9._~%-]{1,190}/[1-9][0-9]{0,4}|/enter-app\?app=[a-z0-9.%:-]{1,300}&state=[0-9a-f]{64}", re.ASCII
)
_SECONDS = 600


def remember(request: Request, response: Response) -> None:
    """Have a browser that is sent to log in come back to where it is now."""
    place = _here(request)
    if _PLACES.fullmatch(place):
        response.set_cookie(_name(request), place, max_age=_SECONDS, path="/", httponly=True, samesite="lax")


def remembered(request: Request) -> str | None:
    """Where a browser that is logged in now was going."""
    place = (request.cookies.get(_name(request)) or "").strip('"')
    return place if _PLACES.fullmatch(place) else None


def forget(request: Request, response: Response) -> None:
    """It goes there, or somewhere else."""
    response.set_cookie(_name(request), "", max_age=0, path="/", httponly=True, samesite="lax")


def _here(request: Request) -> str:
    path = request.url.path
    return f"{path}?{request.url.query}" if path == "/enter-app" else path


def _name(request: Request) -> str:
    port = request.headers.get("host", "").rpartition("]")[2].partition(":")[2]
    return f"kohakuriver-then{f'-{port}' if port.isascii() and port.isdigit() else ''}"

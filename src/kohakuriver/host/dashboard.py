"""The dashboard: a page with scripts, built of src/kohakuriver-web by setup.py, and how it is served.

It has no right of its own: all that it shows and does goes by the HTTP API. Its policy lets run what this host serves,
and nothing else: no inline script and no inline style (https://www.w3.org/TR/CSP3/).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

from fastapi import APIRouter, Request
from fastapi.responses import Response

from kohakuriver.errors import NotFoundError

__all__ = ["POLICY", "assets", "built", "dashboard"]

DIRECTORY = Path(__file__).parents[1] / "dashboard"

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)

_GUARDS = {
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "same-origin",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_KEPT = {
    "Cache-Control": "public, max-age=31536000, immutable",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Vary": "Accept-Encoding",
}
_TYPES = {
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".html": "text/html; charset=utf-8",
}

assets = APIRouter()


class _Asset(NamedTuple):
    type: str
    plain: bytes
    compressed: bytes | None

    def answer(self, request: Request, headers: dict[str, str]) -> Response:
        """The whole of it, compressed for who takes that."""
        taken = {each.partition(";")[0].strip() for each in request.headers.get("accept-encoding", "").split(",")}
        if self.compressed is None or "gzip" not in taken:
            return Response(self.plain, media_type=self.type, headers=headers)
        return Response(self.compressed, media_type=self.type, headers={**headers, "Content-Encoding": "gzip"})


@functools.cache
def built() -> dict[str, _Asset]:
    """What was built, by its path below the page; nothing where it was installed without npm."""
    found = {}
    for path in sorted(DIRECTORY.rglob("*")):
        if path.suffix in _TYPES and path.is_file():
            compressed = path.with_name(f"{path.name}.gz")
            found[path.relative_to(DIRECTORY).as_posix()] = _Asset(
                _TYPES[path.suffix], path.read_bytes(), compressed.read_bytes() if compressed.exists() else None
            )
    return found


def dashboard(request: Request) -> Response | None:
    """The page; None where this installation has none."""
    page = built().get("index.html")
    return None if page is None else page.answer(request, _GUARDS)


@assets.get("/assets/{name}", include_in_schema=False)
async def asset(request: Request, name: str) -> Response:
    """A part of the dashboard. Its name changes with what is in it, so browsers may keep it for good."""
    found = built().get(f"assets/{name}")
    if found is None:
        raise NotFoundError("There is no such part of the dashboard; load the page again.", code="no_such_path")
    return found.answer(request, _KEPT)

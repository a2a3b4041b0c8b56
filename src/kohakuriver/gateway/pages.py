"""The short pages that the gateway itself answers with. No I/O."""

from __future__ import annotations

import html
from collections.abc import Sequence
from http import HTTPStatus

__all__ = ["page", "redirect"]

# Nothing in them runs, nothing is loaded, nobody frames or keeps them, and no address leaves with a click.
_GUARDS = (
    b"Content-Security-Policy: default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'\r\n"
    b"X-Content-Type-Options: nosniff\r\n"
    b"Referrer-Policy: no-referrer\r\n"
    b"Cache-Control: no-store\r\n"
)


def page(
    status: int, sentence: str, links: Sequence[str] = (), *, close: bool, head_only: bool = False, fields: bytes = b""
) -> bytes:
    """A response with one sentence, and addresses to go to."""
    phrase = HTTPStatus(status).phrase
    listed = "".join(f'<li><a href="{html.escape(link)}">{html.escape(link)}</a></li>' for link in links)
    body = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{status} {phrase}</title>'
        f"<h1>{phrase}</h1><p>{html.escape(sentence)}</p>{f'<ul>{listed}</ul>' if listed else ''}</html>\n"
    ).encode()
    head = b"HTTP/1.1 %d %s\r\nContent-Type: text/html; charset=utf-8\r\nContent-Length: %d\r\n%s%s%s\r\n" % (
        status,
        phrase.encode(),
        len(body),
        _GUARDS,
        fields,
        b"Connection: close\r\n" if close else b"",
    )
    return head if head_only else head + body


def redirect(path: str, fields: bytes, *, close: bool) -> bytes:
    """A redirection to a path of the same address."""
    closing = b"Connection: close\r\n" if close else b""
    return b"HTTP/1.1 303 See Other\r\nLocation: %s\r\nContent-Length: 0\r\n%s%s%s\r\n" % (
        path.encode(),
        _GUARDS,
        fields,
        closing,
    )

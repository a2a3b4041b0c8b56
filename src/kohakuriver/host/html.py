"""What the host's pages for people are made of: no script, nothing from elsewhere, and a policy that says so.

Source: https://www.w3.org/TR/CSP3/
"""

from __future__ import annotations

import base64
import hashlib
from html import escape

from fastapi.responses import HTMLResponse

__all__ = ["form", "onward", "page", "policy"]

_STYLE = (
    ":root{color-scheme:light dark}"
    "body{font:16px/1.5 system-ui,sans-serif;max-width:44em;margin:3em auto;padding:0 1em}"
    "h1{font-size:1.4em}label{display:block}input{font:inherit;box-sizing:border-box;width:100%;padding:.4em;"
    "margin:.3em 0 1em}button{font:inherit;padding:.4em 1.2em}code{overflow-wrap:anywhere}"
    "table{border-collapse:collapse;margin:1em 0}th,td{text-align:left;vertical-align:top;padding:.2em 1em .2em 0}"
    "form{margin:.6em 0}ul{margin:0;padding:0;list-style:none}"
)


def policy(style: str, *, forms: bool = False) -> str:
    """The Content-Security-Policy of a page with this style and nothing else; with `forms`, which lead to this host."""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    action = "'self'" if forms else "'none'"
    return (
        f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action {action}; "
        "frame-ancestors 'none'"
    )


def onward(title: str, url: str, link: str) -> HTMLResponse:
    """A page that leads on at once, also to another site, by `link` where a browser does not go by itself.

    The answer to a form can't redirect there: to browsers that is where the form was sent, and ours go to this host.
    """
    refresh = f'<meta http-equiv="refresh" content="0;url={escape(url)}">\n'
    return page(title, f'<p><a href="{escape(url)}">{escape(link)}</a></p>\n', head=refresh)


def page(title: str, body: str, status: int = 200, *, head: str = "") -> HTMLResponse:
    """A page with a title, which is text, and a body, which is HTML, as is what its `head` has besides."""
    text = (
        f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n{head}'
        f'<meta name="viewport" content="width=device-width">\n<title>{escape(title)} - KohakuRiver</title>\n'
        f"<style>{_STYLE}</style>\n<main>\n<h1>{escape(title)}</h1>\n{body}</main>\n</html>\n"
    )
    # With no-referrer a browser would name no origin when a form is sent, and its request would count as a stranger's.
    guards = {"Content-Security-Policy": policy(_STYLE, forms=True), "Referrer-Policy": "same-origin"}
    return HTMLResponse(
        text, status, {**guards, "X-Frame-Options": "DENY", "Cross-Origin-Opener-Policy": "same-origin"}
    )


def form(action: str, fields: str, button: str) -> str:
    """A form that is sent to a path of this host; `fields` are HTML."""
    return f'<form method="post" action="{escape(action)}">\n{fields}<button>{escape(button)}</button>\n</form>\n'

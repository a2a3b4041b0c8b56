"""Pages that send themselves on to another address, by a form: what is in a form gets into no log. No I/O."""

from __future__ import annotations

import base64
import hashlib
from html import escape

__all__ = ["form_page", "link_page"]

_SCRIPT = "document.forms[0].submit()"
_LINK_SCRIPT = (
    "const form = document.forms[0], code = location.hash.slice(1);"
    'if (code) { history.replaceState(null, "", location.pathname); form.elements.code.value = code; form.submit(); }'
)


def form_page(action: str, origin: str, code: str, *, referrer: str) -> tuple[str, dict[str, str]]:
    """The page, and the fields of its head; where scripts are off it has a button.

    Args:
        action: where the form goes.
        origin: of which origin that is.
        code: what it carries.
        referrer: the policy that says what the other end hears of the page's own address.
    """
    field = f'<input type="hidden" name="code" value="{escape(code)}">\n'
    return _page(action, origin, field, _SCRIPT, referrer)


def link_page(action: str, origin: str) -> tuple[str, dict[str, str]]:
    """The page that a link to a task's port leads to; what is behind its # no server hears of before that sends it."""
    field = '<label>Link: <input name="code" autocomplete="off" required></label>\n'
    return _page(action, origin, field, _LINK_SCRIPT, "same-origin")


def _page(action: str, origin: str, field: str, script: str, referrer: str) -> tuple[str, dict[str, str]]:
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    body = (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>One moment - KohakuRiver</title>\n'
        f'<form method="post" action="{escape(action)}">\n{field}<button>Go on</button>\n</form>\n'
        f"<script>{script}</script>\n</html>\n"
    )
    policy = (
        f"default-src 'none'; script-src 'sha256-{allowed}'; base-uri 'none'; form-action {origin}; "
        "frame-ancestors 'none'"
    )
    return body, {
        "Content-Security-Policy": policy,
        "Cross-Origin-Opener-Policy": "same-origin",  # who opened this page is not to read the code in it
        "Referrer-Policy": referrer,
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Cache-Control": "no-store",
    }

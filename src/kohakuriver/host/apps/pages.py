"""Pages that send themselves on to another address, by a form: what is in a form gets into no log. No I/O."""

from __future__ import annotations

import base64
import hashlib
from html import escape

__all__ = ["form_page"]

_SCRIPT = "document.forms[0].submit()"
_ALLOWED = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()


def form_page(action: str, origin: str, code: str, *, referrer: str) -> tuple[str, dict[str, str]]:
    """The page, and the fields of its head; where scripts are off it has a button.

    Args:
        action: where the form goes.
        origin: of which origin that is.
        code: what it carries.
        referrer: the policy that says what the other end hears of the page's own address.
    """
    body = (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>One moment - KohakuRiver</title>\n'
        f'<form method="post" action="{escape(action)}">\n'
        f'<input type="hidden" name="code" value="{escape(code)}">\n<button>Go on</button>\n</form>\n'
        f"<script>{_SCRIPT}</script>\n</html>\n"
    )
    policy = (
        f"default-src 'none'; script-src 'sha256-{_ALLOWED}'; base-uri 'none'; form-action {origin}; "
        "frame-ancestors 'none'"
    )
    return body, {
        "Content-Security-Policy": policy,
        "Referrer-Policy": referrer,
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Cache-Control": "no-store",
    }

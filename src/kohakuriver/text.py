"""Texts of others, shown to people: a container's error, a stranger's path may hold what a terminal obeys."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["json_of", "one_line", "printable"]

_LAYOUT = "\n\t"
LONGEST = 300
"""Characters of a peer's sentence that are shown."""


def printable(text: str, keep: str = _LAYOUT) -> str:
    """`text` with its control and invisible characters as escapes, except those in `keep`."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or each in keep else each.encode("unicode_escape").decode() for each in text
    )


def one_line(text: str) -> str:
    """What a peer says, shown inside a line of ours: it can't begin one that looks like ours, nor fill a screen."""
    line = " ".join(text[: 4 * LONGEST].split())
    return printable(line[:LONGEST] + "…" if len(line) > LONGEST else line, keep="")


def json_of(text: str | bytes) -> Any:
    """What a peer's JSON says. Raises ValueError for what is none, and for lists in lists by the thousand."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is too deep") from None

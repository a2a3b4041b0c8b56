"""Texts of others, shown to people: a container's error, a stranger's path may hold what a terminal obeys."""

from __future__ import annotations

__all__ = ["printable"]

_LAYOUT = "\n\t"


def printable(text: str, keep: str = _LAYOUT) -> str:
    """`text` with its control and invisible characters as escapes, except those in `keep`."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or each in keep else each.encode("unicode_escape").decode() for each in text
    )

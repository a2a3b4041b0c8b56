"""What a session says in its URL: the ports that it is confined to, and whether it goes on (docs/protocol.md §4)."""

from __future__ import annotations

from collections.abc import Iterable

from kohakuriver.errors import UsageError

__all__ = ["BEYOND", "GOES_ON", "MAX_PORTS", "beyond_of", "goes_on", "port_in", "ports_in", "ports_query"]

MAX_PORTS = 256

GOES_ON = "resumed=1"
"""The session goes on for one that was lost."""


BEYOND = "beyond"
"""What says in a session's URL which way its connections lead beyond the task."""


def beyond_of(query: dict[str, str]) -> str:
    """Which way that is, "to" other addresses, "at" a Unix socket of the task or "on" a place there; "" for none.

    Raises UsageError.
    """
    way = query.get(BEYOND, "")
    if way not in ("", "to", "at", "on"):
        raise UsageError(f"{BEYOND} must be to, at or on, not {way[:100]!r}")
    return way


def goes_on(query: dict[str, str]) -> bool:
    """Whether a session's URL says so."""
    return query.get("resumed") == "1"


def ports_query(ports: Iterable[int]) -> str:
    """What says in a session's URL that it is for these ports: `ports=80,443`."""
    return "ports=" + ",".join(str(port) for port in sorted(set(ports)))


def port_in(text: str) -> int:
    """A port that is written down, 1 to 65535. Raises UsageError."""
    if not _is_port(text):
        raise UsageError(f"{text[:100]!r} is no port; ports go from 1 to 65535.")
    return int(text)


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= 65535


def ports_in(query: dict[str, str]) -> frozenset[int] | None:
    """The ports that a session's URL names, None where it names none and may have any. Raises UsageError.

    What is checked and written down for each of them is small, and their number is bounded for that.
    """
    text = query.get("ports")
    if text is None:
        return None
    words = text.split(",")
    if not all(map(_is_port, words)):
        raise UsageError(f"ports must be numbers from 1 to 65535 with commas between them, not {text[:100]!r}")
    ports = frozenset(map(int, words))
    if len(ports) > MAX_PORTS:
        raise UsageError(f"A session may name {MAX_PORTS} ports; forward these {len(ports)} with several commands.")
    return ports

"""Which request it is that several programs work on, and where an exporter is configured, how long each step took.

A command makes an id and hands it on in a header; every program that works for it has it in its log. With an
OpenTelemetry exporter (otel.py) it is the id of the trace, too. Sources: docs/guide/operations.md "One request through
all logs", W3C Trace Context section 3.2.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, MutableMapping
from contextvars import ContextVar
from typing import Final, Protocol

from kohakuriver.errors import UsageError

__all__ = [
    "REQUEST_ID",
    "TRACEPARENT",
    "begin",
    "command",
    "finish",
    "headers",
    "id_in",
    "new_id",
    "request_id",
    "serve",
    "span",
    "told",
]

REQUEST_ID: Final = "X-Request-Id"
TRACEPARENT: Final = "traceparent"

_EXPORTERS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_ID = re.compile(r"(?!0{32})[0-9a-f]{32}")
_PARENT = re.compile(r"00-([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

_now: ContextVar[str] = ContextVar("request_id", default="")


class Tracer(Protocol):
    """What becomes of steps."""

    def span(self, name: str, kind: str, parent: str) -> contextlib.AbstractContextManager[None]:
        """A step, of which an exception is the result; see `span`."""

    def inject(self, headers: MutableMapping[str, str]) -> None:
        """Add to a request's headers which step asks."""

    def finish(self) -> None:
        """Hand over what has not been yet; takes seconds at most."""


_only = ""
_program = ""
_tracer: Tracer | None = None


def new_id() -> str:
    """An id for a request: 32 hexadecimal digits."""
    return os.urandom(16).hex()


def id_in(request_id: str | None, traceparent: str | None) -> str:
    """The id that a request's headers give it, or a new one where they give none, or none that is well-formed."""
    if traceparent and (parent := _PARENT.fullmatch(traceparent)) and _ID.fullmatch(parent[1]):
        return parent[1]
    return request_id if request_id and _ID.fullmatch(request_id) else new_id()


def begin(request_id: str) -> None:
    """From here on it is this request that is worked on, in this task of the event loop and in those that it makes."""
    _now.set(request_id)


def request_id() -> str:
    """Which request is worked on, "" for none."""
    return _now.get() or _only


def told(status: int) -> dict[str, str]:
    """The id of the request that is worked on, as a part of an answer of this HTTP status; nothing below 500."""
    found = request_id()
    return {"request_id": found} if found and status >= 500 else {}


def headers() -> dict[str, str]:
    """What a request to another program carries, so that it knows for which request it works."""
    found = request_id()
    carried = {REQUEST_ID: found} if found else {}
    if _tracer is not None:
        _tracer.inject(carried)
    return carried


def command() -> None:
    """This program works on one request, with an id of its own. Traces begin with its first step, where configured."""
    global _only
    _only = new_id()
    _configure("command")


def serve(program: str) -> None:
    """This program works on requests of others. Raises UsageError as `span` does."""
    global _only
    _only = ""
    _configure(program)
    if _program:
        _begin_traces()


def _configure(program: str) -> None:
    global _program, _tracer
    wanted = any(os.environ.get(name) for name in _EXPORTERS) and os.environ.get("OTEL_SDK_DISABLED") != "true"
    _program, _tracer = (program if wanted else ""), None


@contextlib.contextmanager
def span(name: str, kind: str = "internal", *, parent: str = "") -> Iterator[None]:
    """A step of a request, `kind` "client", "server" or "internal"; `parent` is the header that the request came with.

    It costs nothing where no exporter is configured. Raises UsageError where one is, and its library is not there.
    """
    if not _program:
        yield
        return
    with (_tracer or _begin_traces()).span(name, kind, parent):
        yield


def finish() -> None:
    """The program ends: hand over what has not been yet."""
    if _tracer is not None:
        _tracer.finish()


def _begin_traces() -> Tracer:
    global _tracer
    try:
        from kohakuriver.otel import OtelTracer
    except ImportError as error:
        names = " and ".join(name for name in _EXPORTERS if os.environ.get(name))
        raise UsageError(f"{names} asks for traces, which need `pip install 'kohakuriver[otel]'`.") from error
    _tracer = OtelTracer(_program, request_id)
    return _tracer

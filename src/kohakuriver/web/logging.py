"""What host and runner log: one line an event, for people or as JSON. Source: docs/guide/limits.md "Logs"."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import MutableMapping
from typing import Any

import structlog
from structlog.typing import Processor

from kohakuriver.text import printable
from kohakuriver.tracing import request_id
from kohakuriver.web.repeats import Repeats

__all__ = ["LONGEST_TRACEBACK", "LONGEST_VALUE", "configure_logging"]

LONGEST_VALUE = 1000
LONGEST_TRACEBACK = 20_000
"""Characters. Peers choose paths and names, and say reasons."""

_FIRST = ("time", "level", "event")


def configure_logging(level: str = "info", style: str = "text") -> None:
    """Log to stderr, one line an event, as `style` "text" or "json"; what libraries log joins in from warnings up.

    Only "text" has lines of their own for a traceback.
    """
    stamp = structlog.processors.TimeStamper(fmt="iso", utc=True, key="time")
    render: list[Processor] = (
        [_in_order, structlog.processors.JSONRenderer()]
        if style == "json"
        else [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), timestamp_key="time")]
    )
    of_libraries: list[Processor] = [
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        stamp,
        _of_request,
        structlog.processors.format_exc_info,
        _safe,
    ]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=of_libraries,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # its warnings are about what strangers send
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.format_exc_info,
            Repeats(),
            structlog.processors.add_log_level,
            stamp,
            _of_request,  # behind what counts lines that are the same
            _safe,
            *render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=_Lines,
    )


class _Lines(structlog.PrintLogger):
    """Lines on stderr. One that can't be written is lost: a full disk under a log must not end what is logged."""

    def __init__(self, *_: object) -> None:
        super().__init__(sys.stderr)

    def msg(self, message: str) -> None:
        with contextlib.suppress(OSError):
            super().msg(message)

    log = debug = info = warn = warning = fatal = failure = err = error = critical = exception = msg


def _of_request(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """What is logged while a request is worked on says which."""
    if found := request_id():
        event.setdefault("request_id", found)
    return event


def _safe(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Paths, names and reasons come from peers, and a log is read on terminals. Only tracebacks have lines."""
    for key, value in event.items():
        if key == "exception":
            event[key] = printable(_cut(str(value), LONGEST_TRACEBACK))
        elif not (value is None or isinstance(value, (bool, int, float)) or key.startswith("_")):
            event[key] = printable(_cut(str(value), LONGEST_VALUE), keep="")
    return event


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}… ({len(text) - most} characters more)"


def _in_order(_logger: object, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return {name: event[name] for name in _FIRST if name in event} | {
        name: value for name, value in event.items() if name not in _FIRST
    }

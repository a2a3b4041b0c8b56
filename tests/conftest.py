"""What all tests share."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import gc
import importlib
import logging
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import pytest
import structlog

from kohakuriver import runtime as loops
from kohakuriver import tracing
from tests.support.postgres import Postgres, a_server

T = TypeVar("T")

# A shell that a test starts reads no start files of whoever runs the tests: those may take seconds, or wait for a lock
# that a shell which another test has ended still holds.
os.environ["HOME"] = tempfile.mkdtemp(prefix="kohakuriver-home-")
_HOME, _OWNER = os.environ["HOME"], os.getpid()

# With it Python writes each part of a line by itself, and what a tunnel client says may come between two of them.
os.environ.pop("PYTHONUNBUFFERED", None)


@atexit.register
def _leave() -> None:
    if os.getpid() == _OWNER:  # and not a process that a test forked
        shutil.rmtree(_HOME, ignore_errors=True)


# Programs leave a signal ignored that was ignored when they started, as `nohup` and a shell's `&` have it. What the
# tests start is to end when it is told to, however the tests themselves were started.
for _number in (signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
    if signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _number is signal.SIGINT else signal.SIG_DFL)


def pytest_configure(config: pytest.Config) -> None:
    if sys.version_info < (3, 11):  # whose TLS transports count as unclosed when their peer was the one who went
        config.addinivalue_line("filterwarnings", "ignore:unclosed transport <asyncio.sslproto:ResourceWarning")


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What has been loaded stays to the end: the garbage collector needs not look at it after every few tests."""
    # Its plugin loads it at the end, if nobody has before: then it would miss what refers to a library's own chance.
    importlib.import_module("hypothesis")
    gc.collect()
    gc.freeze()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The tests that run alone are in a few files: loading all of them would take longer than some of these do."""
    if config.option.markexpr != "alone" or collection_path.suffix != ".py":
        return None
    return b"pytest.mark.alone" not in collection_path.read_bytes() or None


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """A program that a test runs in this process logs to the stderr of that test, which is closed behind it."""
    handlers = logging.root.handlers[:]
    with mock.patch.object(tracing, "_only", ""):  # nor does the next one work on a request of this one's command
        yield
    tracing.begin("")
    logging.root.handlers[:] = handlers
    structlog.reset_defaults()


@pytest.fixture
def run() -> Callable[[Coroutine[Any, Any, T]], T]:
    """Run a coroutine on a new loop of the kind that KOHAKURIVER_LOOP names.

    An exception that only the loop saw, in a callback or a task that nobody waits for, fails the test too.
    """
    return lambda main: loops.run(_watched(main))


async def _watched(main: Coroutine[Any, Any, T]) -> T:
    unseen: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: unseen.append(context))
    result = await main
    for context in unseen:
        raise AssertionError(f"the loop saw: {context}") from context.get("exception")
    return result


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A server that tests share, each with databases of its own."""
    with a_server() as server:
        yield server


@pytest.fixture
def unused_ports() -> Iterator[list[int]]:
    """TCP ports of 127.0.0.1 that are bound, so that nobody else can get them, and on which nothing listens."""
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.socket()) for _ in range(2)]
        for sock in socks:
            sock.bind(("127.0.0.1", 0))
        yield [sock.getsockname()[1] for sock in socks]

"""What a program asks of the system that it runs on: its event loop, its heap, how many files it may open.

uvloop runs where it can be had, stock asyncio anywhere else. `KOHAKURIVER_LOOP=asyncio` forces the stock loop,
`KOHAKURIVER_LOOP=uvloop` makes its absence an error.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import math
import os
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any, TypeVar

from kohakuriver.errors import UsageError
from kohakuriver.resolve import InterruptibleNames

__all__ = [
    "DescriptorWatch",
    "cancel_all",
    "file_limit",
    "freeze_heap",
    "loop_name",
    "lowered_file_limit",
    "new_event_loop",
    "out_of_descriptors",
    "raise_file_limit",
    "run",
    "serve",
    "until_readable",
    "waiting_connections",
]

T = TypeVar("T")

_CANCEL_SECONDS = 1.0


def loop_name() -> str:
    """`"uvloop"` or `"asyncio"`: the loop in force. Raises UsageError for a loop that isn't known or isn't there."""
    wanted = os.environ.get("KOHAKURIVER_LOOP", "")
    if wanted not in ("", "asyncio", "uvloop"):
        raise UsageError(f"KOHAKURIVER_LOOP must be asyncio or uvloop, not {wanted!r}.")
    if wanted == "asyncio":
        return "asyncio"
    try:
        import uvloop  # noqa: F401
    except ImportError as error:
        if wanted == "uvloop":
            raise UsageError("KOHAKURIVER_LOOP is uvloop, but uvloop is not installed.") from error
        return "asyncio"
    return "uvloop"


def new_event_loop() -> asyncio.AbstractEventLoop:
    """A new loop of the kind that is in force."""
    loop: type[Any] = asyncio.SelectorEventLoop
    if loop_name() == "uvloop":
        import uvloop

        loop = uvloop.Loop
    elif sys.platform == "win32":
        loop = asyncio.ProactorEventLoop
    made: asyncio.AbstractEventLoop = type(loop.__name__, (InterruptibleNames, loop), {"__module__": loop.__module__})()
    return made


SWITCH_SECONDS = 0.0005
"""After so long a thread that computes, as the database's, lets the event loop go on; Python's own 5 ms it would wait
after each system call, and an echo makes a dozen of them on its way."""


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` to its end on a new loop, then end whatever it left running. What it raises is raised."""
    try:
        loop = new_event_loop()
    except BaseException:
        main.close()
        raise
    try:
        asyncio.set_event_loop(loop)
        sys.setswitchinterval(SWITCH_SECONDS)
        return loop.run_until_complete(main)
    finally:
        try:
            _wind_up(loop)
        finally:
            asyncio.set_event_loop(None)


def serve(loop: asyncio.AbstractEventLoop) -> None:
    """Run a loop, on a thread of its own, until it is stopped; then what it still has to do, as closing sockets."""
    try:
        loop.run_forever()
    finally:
        _wind_up(loop)


def _wind_up(loop: asyncio.AbstractEventLoop) -> None:
    """End whatever a loop that does not run any more has left running, and close it."""
    try:
        loop.run_until_complete(_cancel_rest())
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
    finally:
        loop.close()


async def cancel_all(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel asyncio tasks (or futures) and wait until they have ended, however they do.

    Again and again: up to Python 3.11 `asyncio.wait_for` loses a cancellation that comes together with what it waits
    for, and a task that serves for ever would then go on.
    """
    left = set(tasks)
    while left:
        for task in left:
            task.cancel()
        ended, left = await asyncio.wait(left, timeout=_CANCEL_SECONDS)
        for task in ended:
            if not task.cancelled():
                task.exception()  # has been looked at, so asyncio does not complain about it


async def _cancel_rest() -> None:
    this = asyncio.current_task()
    await cancel_all(task for task in asyncio.all_tasks() if task is not this)


async def until_readable(sock: socket.socket) -> None:
    """Wait until a peer has sent something, or has gone; what it sent stays where it is. `sock` does not block."""
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()
    loop.add_reader(sock.fileno(), lambda: None if readable.done() else readable.set_result(None))
    try:
        await readable
    finally:
        loop.remove_reader(sock.fileno())


def freeze_heap() -> None:
    """Have the garbage collector pass by all objects that are there now. For a program that is about to serve.

    Modules and what was made at the start stay until the end, and are most of the objects: a full collection looks at
    all of them, for some 50 ms in a host, and meanwhile nothing else runs. What was made since is looked at when
    `Collector` says so, not whenever there is a quarter more of it: 4,000 requests that wait are 500,000 objects.

    To be called on a running event loop.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*gc.get_threshold()[:2], _NEVER)
    Collector().begin(asyncio.get_running_loop())


_NEVER = 1 << 30


class Collector:
    """Full collections of garbage that hold up nothing: while there is little to look at, or after a long time.

    Garbage that the young generations' collections miss is rare, and waits here for the next full one.
    """

    LOOK_SECONDS = 10.0
    LITTLE = 20_000  # objects, some 10 ms
    LONG_SECONDS = 600.0
    WORTHWHILE = 10  # collections of the middle generation, as Python's own third threshold

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = clock()

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        """Look from time to time, for as long as the loop runs."""
        loop.call_later(self.LOOK_SECONDS, self._look, loop)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        self.look()
        self.begin(loop)

    def look(self) -> None:
        """Collect, if it is time to."""
        if gc.get_count()[2] < self.WORTHWHILE:
            return
        if self._clock() - self._last >= self.LONG_SECONDS or len(gc.get_objects(generation=2)) <= self.LITTLE:
            gc.collect()
            self._last = self._clock()


def out_of_descriptors() -> bool:
    """Whether this process, or the whole system, can open no file now."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return error.errno in (errno.EMFILE, errno.ENFILE)
    return False


_TCPI_UNACKED = slice(24, 28)


def waiting_connections(sock: socket.socket) -> int:
    """How many connections wait to be accepted from a listening socket; 0 where the system does not tell.

    Source: tcp(7); of a listening socket the kernel gives the length of its queue as `tcpi_unacked`.
    """
    is_tcp = sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM
    if not is_tcp or not sys.platform.startswith("linux"):
        return 0
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCPI_UNACKED.stop)
    except OSError:
        return 0
    return int.from_bytes(info[_TCPI_UNACKED], sys.byteorder)


class DescriptorWatch:
    """Tells that a program can open no file any more: its event loop does not, and connections just wait.

    `tell` gets how many connections wait at the `listeners`, and is called once for each time that it happens, but not
    again within `AGAIN_SECONDS` of the last; `over` is called when it has passed.
    """

    AGAIN_SECONDS = 10.0

    def __init__(
        self,
        listeners: Callable[[], Iterable[socket.socket]],
        tell: Callable[[int], None],
        over: Callable[[], None] = lambda: None,
    ) -> None:
        self._listeners = listeners
        self._tell = tell
        self._over = over
        self._told = False
        self._told_at = -math.inf

    def look(self, *, exhausted: bool | None = None) -> None:
        """See how it is now, where the caller has not just found out."""
        exhausted = out_of_descriptors() if exhausted is None else exhausted
        if not exhausted and self._told:
            self._told = False
            self._over()
        elif exhausted and not self._told and time.monotonic() - self._told_at >= self.AGAIN_SECONDS:
            self._told, self._told_at = True, time.monotonic()
            self._tell(sum(map(waiting_connections, self._listeners())))


def raise_file_limit() -> int | None:
    """Let this process open as many files as it may have; how many it might before, None where nobody counts."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # not everywhere is there such a thing
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return soft
    return None


@contextlib.contextmanager
def lowered_file_limit(soft: int | None) -> Iterator[None]:
    """Until the block ends, the limit that was in force before it was raised: a program started now gets that.

    Programs that use select(2), or close every descriptor that they may have, want the low one that is usual.
    """
    if soft is None:
        yield
        return
    import resource

    raised = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, raised[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, raised)


def file_limit() -> int:
    """How many files this process may open now; 2²⁰ where there is no limit that we know."""
    unlimited = 1 << 20
    try:
        import resource
    except ImportError:
        return unlimited
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return soft if soft > 0 else unlimited  # "infinity" is below

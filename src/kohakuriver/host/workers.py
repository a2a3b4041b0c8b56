"""Several processes that serve on the same sockets: they are started, watched and ended together.

The first is ready before the others begin, since it may have to make the tables, the keys and the first tokens. One
that ends unasked is started again; where one can't even begin, all end. They are forked, so that they have the sockets,
and each reads on its stdin when this process is no more.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import structlog

from kohakuriver.errors import UsageError
from kohakuriver.web.server import on_terminal

__all__ = ["MOST_WORKERS", "Ready", "serve_together"]

log = structlog.get_logger("kohakuriver.host")

MOST_WORKERS = 64

Ready = dict[str, Any]
"""What a host says once it serves: `url`, `ssh_proxy`, and `metrics`, which may be None."""

Serve = Callable[[int, Callable[[Ready], None]], int]
"""(number of the worker, from 0; what it calls once it serves) → its exit code."""

RESTART_SECONDS = 1.0
"""How long after its start a worker is started again at the earliest."""

_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT) if hasattr(signal, "SIGQUIT") else ()


@dataclass
class _Worker:
    number: int
    ready: int  # what its word comes by
    began: float = field(default_factory=time.monotonic)
    said: Ready | None = None


class _Child(Exception):
    """Raised in a worker's process, to leave what its parent was at."""

    def __init__(self, number: int, ready: int) -> None:
        super().__init__(number)
        self.number, self.ready = number, ready


def serve_together(count: int, serve: Serve, announce: Callable[[list[Ready]], None], close: Callable[[], None]) -> int:
    """Have `count` processes `serve`; the exit code of the worst of them, once all have ended.

    Returns in each of them, too, with its own. Raises UsageError where the system can't fork.

    Args:
        announce: called once, when all serve.
        close: closes what this process has of the sockets, when the end begins.
    """
    if not hasattr(os, "fork"):
        raise UsageError("This system can't fork, so --workers can only be 1.")
    try:
        with _signals() as awake:
            return _Supervisor(count, announce, close, awake).run()
    except _Child as born:
        child = born
    return serve(child.number, lambda said: _say(child.ready, said))


class _Supervisor:
    def __init__(
        self, count: int, announce: Callable[[list[Ready]], None], close: Callable[[], None], awake: int
    ) -> None:
        self._count, self._announce, self._close, self._awake = count, announce, close, awake
        self._workers: dict[int, _Worker] = {}  # by pid
        self._due: dict[int, float] = {}  # when a worker of that number is to be started again
        self._life = os.pipe()  # nobody writes: it ends with this process
        self._selector = selectors.DefaultSelector()
        self._announced = self._stopping = False
        self._code = 0

    def run(self) -> int:
        self._selector.register(self._awake, selectors.EVENT_READ)
        self._start(0)
        while self._workers or (self._due and not self._stopping):
            soonest = min(self._due.values(), default=None)
            for key, _ in self._selector.select(None if soonest is None else max(0.0, soonest - time.monotonic())):
                if key.fd == self._awake:
                    self._signalled(os.read(self._awake, 4096))
                else:
                    self._heard(key.data)
            self._start_due()
        return self._code

    def _start(self, number: int) -> None:
        reads, writes = os.pipe()
        pid = os.fork()
        if not pid:
            os.setpgid(0, 0)  # a Ctrl-C at the terminal is this process's to pass on
            os.dup2(self._life[0], 0)
            for fd in (*self._life, reads, *(each.ready for each in self._workers.values() if each.ready >= 0)):
                os.close(fd)
            self._selector.close()
            raise _Child(number, writes)
        os.close(writes)
        worker = self._workers[pid] = _Worker(number, reads)
        self._selector.register(reads, selectors.EVENT_READ, worker)

    def _start_due(self) -> None:
        now = time.monotonic()
        for number in [each for each, due in self._due.items() if due <= now and not self._stopping]:
            del self._due[number]
            self._start(number)

    def _heard(self, worker: _Worker) -> None:
        """A worker says that it serves, or is no more."""
        said = os.read(worker.ready, 1 << 16)
        self._selector.unregister(worker.ready)
        os.close(worker.ready)
        worker.ready = -1
        if not said:
            return
        worker.said = json.loads(said)
        if self._announced or self._stopping:
            return
        if len(self._workers) == 1:
            for number in range(1, self._count):
                self._start(number)
        words = [each.said for each in self._workers.values() if each.said is not None]
        if len(words) == self._count:
            self._announced = True
            self._announce(words)

    def _signalled(self, numbers: bytes) -> None:
        for number in numbers:
            if number == signal.SIGCHLD:
                self._reap()
            elif number == signal.SIGHUP and not on_terminal():
                self._tell(signal.SIGHUP)
            else:
                # The second Ctrl-C hurries them, as it would hurry one alone.
                self._tell(signal.Signals(number) if self._stopping else signal.SIGTERM)
                self._end()

    def _end(self) -> None:
        if not self._stopping:
            self._stopping = True
            self._due.clear()
            self._close()

    def _tell(self, number: signal.Signals) -> None:
        for pid in self._workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _reap(self) -> None:
        while self._workers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            worker = self._workers.pop(pid, None)
            if worker is not None:
                self._ended(worker, os.waitstatus_to_exitcode(status))

    def _ended(self, worker: _Worker, code: int) -> None:
        if worker.ready >= 0:
            self._selector.unregister(worker.ready)
            os.close(worker.ready)
        if self._stopping:
            self._code = max(self._code, code if code >= 0 else 1)
        elif not self._announced:  # it has said why
            self._code = code if code > 0 else 1
            self._tell(signal.SIGTERM)
            self._end()
        else:
            log.error("a worker of this host has ended, and is started again", worker=worker.number, code=code)
            self._due[worker.number] = worker.began + RESTART_SECONDS


def _say(ready: int, said: Ready) -> None:
    with contextlib.suppress(OSError):  # nobody waits for it any more
        os.write(ready, json.dumps(said).encode())
    os.close(ready)


@contextlib.contextmanager
def _signals() -> Iterator[int]:
    """A descriptor from which the numbers of signals are read, a byte each; in a child all is as it was before."""
    reads, writes = os.pipe()
    os.set_blocking(writes, False)
    watched = (*_ENDING, signal.SIGHUP, signal.SIGCHLD)
    # What was ignored at the start stays so, as SIGHUP is by `nohup`; SIGTERM and SIGCHLD always count.
    counts = [
        each
        for each in watched
        if each in (signal.SIGTERM, signal.SIGCHLD) or signal.getsignal(each) is not signal.SIG_IGN
    ]
    before = {each: signal.signal(each, lambda *_: None) for each in counts}
    waking = signal.set_wakeup_fd(writes, warn_on_full_buffer=False)
    try:
        yield reads
    finally:
        signal.set_wakeup_fd(waking)
        for each, handler in before.items():
            signal.signal(each, handler)
        os.close(reads)
        os.close(writes)

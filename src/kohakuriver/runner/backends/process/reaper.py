"""Ends what a runner's process tasks left, also when the runner was killed and could not do it itself.

It runs as a program of its own (standard library only, so that it starts fast): every task is announced on stdin, and
when stdin ends although tasks are left, the runner is gone and they are ended. The runner uses the same functions
when a task is stopped.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

__all__ = ["MARK", "end", "main", "members"]

MARK = "KOHAKURIVER_RUN"
"""Every process of a task has this in its environment, unless it took pains to lose it: one value for each start."""

_GRACE_SECONDS = 1.0
_KILL_SECONDS = 5.0
_LOOK_AGAIN_SECONDS = 0.02


def members(session: int, run: str) -> list[int]:
    """The processes of a task: those of its session, and those that left it but kept the environment's mark."""
    mark = f"\0{MARK}={run}\0".encode()
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit() and int(process.name) != os.getpid():
            with contextlib.suppress(OSError):
                if _session_of(process) == session or mark in _environment_of(process):
                    found.append(int(process.name))
    return found


def _session_of(process: Path) -> int:
    state, _parent, _group, session = (process / "stat").read_bytes().rpartition(b")")[2].split()[:4]
    return -1 if state == b"Z" else int(session)


def _environment_of(process: Path) -> bytes:
    try:
        return b"\0" + (process / "environ").read_bytes() + b"\0"
    except PermissionError:
        return b""


def end(session: int, run: str, grace: float = _GRACE_SECONDS) -> None:
    """TERM to all processes of a task, `grace` seconds to end, then KILL to what is left. Blocks."""
    _signal_until_gone(session, run, signal.SIGTERM, grace)
    _signal_until_gone(session, run, signal.SIGKILL, _KILL_SECONDS)


def _signal_until_gone(session: int, run: str, number: signal.Signals, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    signalled: set[int] = set()
    while pids := set(_members_or_group(session, run)):
        # Again and again, because a process may have forked between our look and our signal; once for each.
        for pid in pids - signalled:
            with contextlib.suppress(OSError):
                os.kill(pid, number)
        signalled |= pids
        if time.monotonic() >= deadline:
            return
        time.sleep(_LOOK_AGAIN_SECONDS)


def _members_or_group(session: int, run: str) -> list[int]:
    if Path("/proc/self").is_dir():
        return members(session, run)
    try:
        os.killpg(session, 0)
    except OSError:
        return []
    return [-session]  # without /proc: the process group as a whole


def main() -> None:
    """Keep the list of tasks that stdin tells (`+SESSION RUN`, `-SESSION RUN`); when it ends, end those left."""
    tasks: set[tuple[int, str]] = set()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for line in sys.stdin:
        session, run = line[1:].split()
        (tasks.add if line[0] == "+" else tasks.discard)((int(session), run))
    threads = [threading.Thread(target=end, args=task) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()

"""Make one hop of the chain slower on purpose, to show that the gates see it.

A copy of this file, called sitecustomize.py, stands on the slowed cluster's PYTHONPATH: every Python process of it runs
it at its start, and the one that is the named hop then burns, after each read, PERCENT of the CPU time that it has
used since the read before. Nothing of the product knows of this.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VARIABLE = "KOHAKURIVER_BENCH_SLOW_DOWN"
PYTHON_HOPS = ("forward", "host", "runner")


@dataclass(frozen=True)
class SlowDown:
    """`hop` (one of PYTHON_HOPS) needs `percent` more CPU time."""

    hop: str
    percent: float

    @classmethod
    def parse(cls, text: str) -> SlowDown:
        """From HOP=PERCENT; ValueError if it is nothing of the kind."""
        hop, _, percent = text.partition("=")
        if hop not in PYTHON_HOPS:
            raise ValueError(f"{hop!r} is none of {', '.join(PYTHON_HOPS)}")
        return cls(hop, float(percent))

    def environment(self, directory: Path) -> dict[str, str]:
        """What the cluster's environment must hold; writes into `directory`."""
        (directory / "sitecustomize.py").write_text(Path(__file__).read_text())
        path = os.pathsep.join(filter(None, (str(directory), os.environ.get("PYTHONPATH"))))
        return {"PYTHONPATH": path, VARIABLE: f"{self.hop}={self.percent}"}


class Burner:
    """Burns a part of the CPU time that this thread has used since it burned last."""

    def __init__(self, part: float) -> None:
        self.part = part
        self.last = time.thread_time()

    def burn(self) -> None:
        now = time.thread_time()
        end = now + self.part * (now - self.last)
        while time.thread_time() < end:
            pass
        self.last = time.thread_time()


def slow(original: Callable[[Any, int], None], burner: Burner) -> Callable[[Any, int], None]:
    def buffer_updated(self: Any, nbytes: int) -> None:
        original(self, nbytes)
        burner.burn()

    return buffer_updated


def install(hop: SlowDown) -> None:
    if hop.hop not in sys.orig_argv[:5]:
        return
    from kohakuriver.tunnel.link import Link
    from kohakuriver.tunnel.local_socket import TcpStream

    burner = Burner(hop.percent / 100)
    for protocol in (Link, TcpStream):
        protocol.buffer_updated = slow(protocol.buffer_updated, burner)  # type: ignore[assignment, method-assign]


if __name__ == "sitecustomize" and VARIABLE in os.environ:
    install(SlowDown.parse(os.environ[VARIABLE]))

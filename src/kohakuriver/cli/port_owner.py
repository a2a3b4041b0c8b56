"""Which program has a local port, as far as the system tells (proc_pid_net(5), proc_pid_fd(5))."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from kohakuriver.text import one_line

__all__ = ["owner"]

_PROC = Path("/proc")
_LISTENS, _TAKES_FROM_ALL = "0A", "07"


def owner(port: int, proto: str) -> str | None:
    """`name (process 123)` of a program that has the port, UDP's for `proto` udp, else TCP's, on whichever address.

    None where nobody tells: other users' programs are shown to root alone, and other systems have no such files.
    """
    table, state = ("udp", _TAKES_FROM_ALL) if proto == "udp" else ("tcp", _LISTENS)
    wanted = {f"socket:[{inode}]" for name in (table, f"{table}6") for inode in _inodes(name, port, state)}
    if not wanted:
        return None
    for process in _PROC.glob("[0-9]*"):
        if any(link in wanted for link in _links(process)):
            with contextlib.suppress(OSError):
                name = (process / "comm").read_text("utf-8", "replace").strip()
                return f"{one_line(name)} (process {process.name})"
    return None


def _inodes(table: str, port: int, state: str) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for line in (_PROC / "net" / table).read_text("ascii").splitlines()[1:]:
            words = line.split()
            if words[3] == state and int(words[1].rpartition(":")[2], 16) == port:
                yield words[9]


def _links(process: Path) -> Iterator[str]:
    with contextlib.suppress(OSError):  # it has ended, or is another user's
        for each in (process / "fd").iterdir():
            with contextlib.suppress(OSError):
                yield str(each.readlink())

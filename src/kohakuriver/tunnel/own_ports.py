"""Which ports listen in a tunnel client's network, and of which programs (docs/protocol.md §3, "Which ports listen").

/proc is read, no program is started; of processes that may not be looked into nothing is known.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import time
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from kohakuriver.tunnel.listeners import bound
from kohakuriver.tunnel.protocol import (
    LONGEST_PROGRAM,
    MOST_PORTS,
    PROTO_TCP,
    PROTO_UDP,
    BoundPort,
    PortsAnswer,
    PortScope,
    PortsQuestion,
)

__all__ = ["look"]

_PROC = Path("/proc")
LONGEST = 1.0
"""Seconds that are spent on processes at most."""

MOST_DESCRIPTORS = 100_000
"""Of a process no more are looked at."""


@dataclass
class _Owners:
    """`programs`: by inode, whose a socket is; `ours`: those of this process; `whole`: nothing that matters lacks."""

    programs: dict[int, bytes] = field(default_factory=dict)
    ours: set[int] = field(default_factory=set)
    whole: bool = True


def look(question: PortsQuestion) -> PortsAnswer:
    """What listens now, in the scope of the question. Blocks, for about a second at most."""
    found = [
        (proto, each)
        for proto, udp in ((PROTO_TCP, False), (PROTO_UDP, True))
        for each in bound(_PROC / "net", udp=udp)
    ]
    owners = _owners({each.inode for _, each in found}, question)
    ports: dict[tuple[int, int, str], bytes] = {}
    for proto, each in found:
        program = owners.programs.get(each.inode)
        if each.inode not in owners.ours and (program is not None or question.scope is PortScope.NETWORK):
            place = proto, each.port, each.address  # several may share it (SO_REUSEPORT)
            ports[place] = program or ports.get(place, b"")
    told = [BoundPort(*place[:2], ipaddress.ip_address(place[2]), ports[place]) for place in sorted(ports)]
    more = len(told) > MOST_PORTS or not owners.whole
    return PortsAnswer(question.number, more, told[:MOST_PORTS])


def _owners(sockets: set[int], question: PortsQuestion) -> _Owners:
    until = time.monotonic() + LONGEST
    owners = _Owners(ours=_open_in(_PROC / "self") & sockets)
    wanted = sockets - owners.ours
    session = os.getsid(0)
    for process in _processes(owners):
        if len(owners.programs) == len(wanted):
            break
        if time.monotonic() >= until:
            owners.whole = question.scope is PortScope.NETWORK  # names that are missing are no loss
            break
        if not process.name.isdecimal():
            continue
        if question.scope is PortScope.OWN and not _is_own(process, session, question.mark):
            continue
        theirs = (_open_in(process) & wanted) - owners.programs.keys()
        if theirs:
            owners.programs.update(dict.fromkeys(theirs, _read(process / "comm").rstrip()[:LONGEST_PROGRAM]))
    return owners


def _processes(owners: _Owners) -> list[Path]:
    """All that can be seen; where none can be, what is found is not all."""
    try:
        return list(_PROC.iterdir())
    except OSError:
        owners.whole = False
        return []


def _is_own(process: Path, session: int, mark: bytes) -> bool:
    fields = _read(process / "stat").rpartition(b")")[2].split()  # the name before may hold anything
    in_session = len(fields) > 3 and fields[3] == str(session).encode()
    return in_session or mark in _read(process / "environ").split(b"\0")


def _open_in(process: Path) -> set[int]:
    """The inodes of the sockets that a process has open."""
    found = set()
    with contextlib.suppress(OSError), os.scandir(process / "fd") as descriptors:
        for each in islice(descriptors, MOST_DESCRIPTORS):
            with contextlib.suppress(OSError, ValueError):
                link = os.readlink(each.path)  # noqa: PTH115 - a path made of each would cost more than the look
                if link.startswith("socket:["):
                    found.add(int(link[8:-1]))
    return found


def _read(path: Path) -> bytes:
    with contextlib.suppress(OSError):
        return path.read_bytes()
    return b""

"""Where something listens in a network, as the kernel tells it (proc_pid_net(5))."""

from __future__ import annotations

import contextlib
import ipaddress
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["LOOPBACK", "Bound", "bound", "listening"]

LOOPBACK = ("127.0.0.1", "::1")
_LISTEN, _UNCONNECTED = "0A", "07"  # states in /proc/net/tcp, and of a UDP socket that takes from everybody
_LOOPBACK_6 = f"{1:032x} "  # as if_inet6 has it


class Bound(NamedTuple):
    """A socket that listens, or takes datagrams from everybody; `inode` is what /proc/PID/fd calls it, too."""

    address: str
    port: int
    inode: int


def listening(tables: Path, port: int, *, udp: bool) -> list[str]:
    """The addresses that `port` is served on according to the kernel's `tables`, 127.0.0.1 and ::1 first."""
    found = {_dialled(each.address, tables) for each in bound(tables, udp=udp) if each.port == port}
    return sorted(found, key=lambda address: (address not in LOOPBACK, ":" in address, address))


def bound(tables: Path, *, udp: bool) -> Iterator[Bound]:
    """All that listens (TCP), or takes datagrams from everybody (UDP), according to the kernel's `tables`."""
    for name in ("", "6"):
        for line in _lines(tables / f"{'udp' if udp else 'tcp'}{name}")[1:]:
            with contextlib.suppress(ValueError, IndexError):  # no line of the kernel's
                fields = line.split()
                if fields[3] == (_UNCONNECTED if udp else _LISTEN):
                    words, _, number = fields[1].partition(":")
                    yield Bound(_address(words), int(number, 16), int(fields[9]))


def _dialled(served: str, tables: Path) -> str:
    """Where to dial what is served on that address. Where there is no ::1, :: is IPv4's addresses alone."""
    if served == "::":
        return "::1" if any(line.startswith(_LOOPBACK_6) for line in _lines(tables / "if_inet6")) else "127.0.0.1"
    return "127.0.0.1" if served == "0.0.0.0" else served


def _lines(table: Path) -> list[str]:
    with contextlib.suppress(FileNotFoundError):  # the kernel has no IPv6
        return table.read_text("ascii").splitlines()
    return []


def _address(words: str) -> str:
    """An address as the kernel prints it: 32-bit words in the machine's own byte order."""
    if len(words) not in (8, 32):
        raise ValueError(words)
    order = sys.byteorder
    raw = b"".join(int(words[i : i + 8], 16).to_bytes(4, order) for i in range(0, len(words), 8))
    address = ipaddress.ip_address(raw)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)

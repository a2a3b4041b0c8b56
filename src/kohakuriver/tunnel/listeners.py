"""Where something listens in a network, as the kernel tells it (proc_pid_net(5))."""

from __future__ import annotations

import contextlib
import ipaddress
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["LOOPBACK", "listening"]

LOOPBACK = ("127.0.0.1", "::1")
_LISTEN, _UNCONNECTED = "0A", "07"  # states in /proc/net/tcp, and of a UDP socket that takes from everybody
_LOOPBACK_6 = f"{1:032x} "  # as if_inet6 has it


def listening(tables: Path, port: int, *, udp: bool) -> list[str]:
    """The addresses that `port` is served on according to the kernel's `tables`, 127.0.0.1 and ::1 first."""
    found = {
        address for name in ("", "6") for address in _served(tables / f"{'udp' if udp else 'tcp'}{name}", port, udp)
    }
    return sorted(found, key=lambda address: (address not in LOOPBACK, ":" in address, address))


def _served(table: Path, port: int, udp: bool) -> Iterator[str]:
    for line in _lines(table)[1:]:
        local, state = line.split()[1], line.split()[3]
        words, _, number = local.partition(":")
        if int(number, 16) == port and state == (_UNCONNECTED if udp else _LISTEN):
            yield _dialled(_address(words), table.parent)


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
    order = sys.byteorder
    raw = b"".join(int(words[i : i + 8], 16).to_bytes(4, order) for i in range(0, len(words), 8))
    address = ipaddress.ip_address(raw)
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)

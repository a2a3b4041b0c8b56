"""Dialling from a container's own network, with nothing of ours inside: how a runner reaches what can't be touched.

A socket belongs for life to the network namespace of the thread that made it. So a thread of its own enters the
container's and makes the sockets there; the event loop connects and serves them like any others. Source: setns(2),
network_namespaces(7).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import ipaddress
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

__all__ = ["ContainerNetwork", "listening"]

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000
_LISTEN, _UNCONNECTED = "0A", "07"  # states in /proc/net/tcp, and of a UDP socket that takes from everybody
_LOOPBACK = ("127.0.0.1", "::1")
_LOOPBACK_6 = f"{1:032x} "  # as if_inet6 has it


class ContainerNetwork:
    """The network namespace that process `pid` is in. Raises OSError where it may not be entered.

    It is the namespace itself that is held: a number that another process gets later leads nowhere else.
    """

    def __init__(self, pid: int) -> None:
        self._namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._thread = ThreadPoolExecutor(1, "container-network")  # never another one: it stays in there
        self._inside = False
        try:
            self._thread.submit(self._run, lambda: None).result()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Let go of it; sockets that were made in it go on."""
        self._thread.shutdown(wait=False)
        if self._namespace >= 0:
            os.close(self._namespace)
            self._namespace = -1

    def _run(self, work: Callable[[], T]) -> T:
        if not self._inside:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(self._namespace, _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            self._inside = True
        return work()

    async def _do(self, work: Callable[[], T]) -> T:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, self._run, work)
        except RuntimeError as error:  # it was closed
            raise ConnectionResetError("the container has ended") from error

    async def open_socket(self, family: int, kind: int) -> socket.socket:
        """A non-blocking socket of the container's network. Raises OSError."""
        return await self._do(lambda: _non_blocking(family, kind))

    async def addresses(self, port: int, *, udp: bool) -> Sequence[str]:
        """Where in the container `port` is served, loopback first; loopback where nobody serves it. Raises OSError."""
        return await self._do(lambda: listening(Path("/proc/thread-self/net"), port, udp=udp)) or _LOOPBACK


def _non_blocking(family: int, kind: int) -> socket.socket:
    sock = socket.socket(family, kind)
    sock.setblocking(False)
    return sock


def listening(tables: Path, port: int, *, udp: bool) -> list[str]:
    """The addresses that `port` is served on according to the kernel's `tables`, 127.0.0.1 and ::1 first.

    Source: proc_pid_net(5).
    """
    found = {
        address for name in ("", "6") for address in _served(tables / f"{'udp' if udp else 'tcp'}{name}", port, udp)
    }
    return sorted(found, key=lambda address: (address not in _LOOPBACK, ":" in address, address))


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

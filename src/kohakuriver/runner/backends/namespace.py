"""Dialling from a container's own network, with nothing of ours inside: how a runner reaches what can't be touched.

A socket belongs for life to the network namespace of the thread that made it. So a thread of its own enters the
container's and makes the sockets there; the event loop connects and serves them like any others. Source: setns(2),
network_namespaces(7).
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from kohakuriver.tunnel.listeners import LOOPBACK, listening

__all__ = ["ContainerNetwork"]

T = TypeVar("T")

_CLONE_NEWNET = 0x40000000


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
        return await self._do(lambda: listening(Path("/proc/thread-self/net"), port, udp=udp)) or LOOPBACK


def _non_blocking(family: int, kind: int) -> socket.socket:
    sock = socket.socket(family, kind)
    sock.setblocking(False)
    return sock

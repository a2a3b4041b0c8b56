"""What is done with a transport's socket beside the transport: direct writes, and options."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import sys
from collections.abc import Sequence

__all__ = ["DirectSocket", "TransportSink", "not_itself", "tune_listener", "tune_socket"]

# How many bytes the kernel may hold that it has not yet put on the wire; more only adds delay for small messages.
NOTSENT_LOWAT = 256 * 1024

# What a Unix socket may hold (the kernel doubles that, for its own use). It tunes none of these, and as they come they
# hold less than one read of ours.
UNIX_BUFFER = 512 * 1024

_TCP = (socket.AF_INET, socket.AF_INET6)

if sys.platform == "win32":  # sockets are no file descriptors there: everything goes through the transport
    _write = None
    _writev = None
    _readv = None
else:
    _write = os.write
    _writev = os.writev
    _readv = os.readv


class DirectSocket:
    """``write(2)`` on a transport's socket, beside the transport; (0 bytes) where that can't be done."""

    __slots__ = ("fd",)

    def __init__(self, transport: asyncio.Transport) -> None:
        self.fd = -1
        sock = transport.get_extra_info("socket")
        if sys.platform != "win32" and sock is not None and transport.get_extra_info("sslcontext") is None:
            self.fd = sock.fileno()

    def write(self, data: bytes | bytearray | memoryview) -> int:
        """How many bytes the kernel took at once; an error is left for the transport to find."""
        if self.fd < 0 or _write is None:
            return 0
        try:
            return _write(self.fd, data)
        except OSError:
            return 0

    def writev(self, views: Sequence[memoryview]) -> int:
        """The same for several ranges."""
        if self.fd < 0 or _writev is None:
            return 0
        try:
            return _writev(self.fd, views)
        except OSError:
            return 0

    def read_into(self, space: memoryview) -> int:
        """How many bytes were there already; an end is left for the transport to find. Raises OSError."""
        if self.fd < 0 or _readv is None:
            return 0
        try:
            return _readv(self.fd, (space,))
        except BlockingIOError:
            return 0


class TransportSink(DirectSocket):
    """What a transport's socket does not take at once goes through the transport."""

    __slots__ = ("_transport",)

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__(transport)
        self._transport = transport

    def keep(self, rest: bytes) -> None:
        """With a high-water mark of 0 the transport calls pause_writing() now if it can't finish at once."""
        self._transport.write(rest)

    def kept(self) -> int:
        """Bytes that wait in the transport."""
        return self._transport.get_write_buffer_size()

    def write_eof(self) -> None:
        """End our half of the connection, where a transport of this kind can."""
        if self._transport.is_closing() or not self._transport.can_write_eof():
            return
        try:
            self._transport.write_eof()
        except OSError:
            pass  # it is gone already

    def close(self) -> None:
        """The transport has closed its socket: its number may soon be another's."""
        self.fd = -1


def not_itself(sock: socket.socket) -> None:
    """Raises ConnectionRefusedError for a dial that reached itself.

    Where nothing listens on this machine the kernel may dial from the very port that it dials (RFC 9293 section 3.5).
    """
    if sock.getsockname() == sock.getpeername():
        raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))


def tune_socket(transport: asyncio.Transport) -> None:
    """TCP_NODELAY, and a small not-yet-sent queue; buffer sizes stay with the kernel's autotuning, where it has one."""
    sock: socket.socket | None = transport.get_extra_info("socket")
    if sock is None or sock.family not in (*_TCP, getattr(socket, "AF_UNIX", None)):
        return
    try:
        if sock.family in _TCP:
            _tune(sock)
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_BUFFER)
    except OSError:
        pass  # the peer may be gone already; the first read says so


def tune_listener(sock: socket.socket) -> None:
    """The same for all connections that a TCP listener accepts from now on: they begin as it is (Linux, BSD)."""
    with contextlib.suppress(OSError):  # nothing fails without it
        _tune(sock)


def _tune(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, NOTSENT_LOWAT)

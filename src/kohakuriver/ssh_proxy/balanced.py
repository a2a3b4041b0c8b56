"""Whom a balancer passes on, by the PROXY header that it sends first (HAProxy, proxy-protocol.txt, both versions)."""

from __future__ import annotations

import asyncio
import socket

from proxyprotocol import ProxyProtocolIncompleteError, ProxyProtocolWantRead
from proxyprotocol.detect import ProxyProtocolDetect
from proxyprotocol.result import ProxyResult, is_ipv4, is_ipv6

from kohakuriver.errors import UsageError

__all__ = ["MAX_HEADER", "passed_on"]

MAX_HEADER = 4096
"""Bytes. An address takes 52; balancers add what they know of TLS."""

MAX_LINE = 100
"""Bytes behind the first 8 of a header that is a line: it has 107 at most."""


async def passed_on(peer: socket.socket) -> tuple[str, int] | None:
    """Read the header: the address and port of whom the balancer passes on, None where it speaks for itself.

    Nothing behind the header is read. `peer` does not block. Raises UsageError for what is no header, and
    ConnectionResetError where the peer goes.
    """
    data, header = bytearray(), ProxyProtocolDetect()
    while True:
        found = _unpacked(header, bytes(data))
        if isinstance(found, ProxyResult):
            return (str(found.source[0]), found.source[1]) if is_ipv4(found) or is_ipv6(found) else None
        await _read(peer, data, found)


def _unpacked(header: ProxyProtocolDetect, data: bytes) -> ProxyResult | ProxyProtocolWantRead:
    """What a header says, or what is still wanted of it."""
    try:
        return header.unpack(data)
    except ProxyProtocolIncompleteError as error:
        return error.want_read
    except ValueError as error:
        raise UsageError("it does not begin with a PROXY header") from error


async def _read(peer: socket.socket, data: bytearray, wanted: ProxyProtocolWantRead) -> None:
    """Read as much more as is wanted: so many bytes, or the rest of a line, and nothing behind that."""
    loop, most = asyncio.get_running_loop(), wanted.want_bytes or MAX_LINE
    if len(data) + most > MAX_HEADER:
        raise UsageError("its PROXY header is too long")
    for _ in range(most):
        byte = await loop.sock_recv(peer, 1)
        if not byte:
            raise ConnectionResetError
        data += byte
        if wanted.want_line and byte == b"\n":
            return
    if wanted.want_line:
        raise UsageError("its PROXY header is too long")

"""UDP streams and their local sockets (docs/protocol.md §3 rule 12)."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import cast

from kohakuriver.tunnel.owner import UdpOpener, UdpOwner
from kohakuriver.tunnel.protocol import CLOSE, CONNECT, DATA
from kohakuriver.tunnel.streams import Attachment

EARLY_DATAGRAMS = 64


def send_datagram(send: Callable[[], int]) -> bool:
    """Send one datagram now; False if it does not fit or the socket takes none.

    asyncio's own sendto leaves empty datagrams out, and queues others without a limit.
    """
    for _ in range(2):  # the first try may only report what an ICMP message said of an earlier datagram
        try:
            send()
        except ConnectionRefusedError:
            continue
        except OSError:
            return False
        return True
    return False


class UdpStream:
    """One UDP stream: on the user side a source address, on the container side a connected socket."""

    __slots__ = ("_early", "_unanswered", "at", "last", "owner", "port", "send_local", "shut")

    def __init__(self, owner: UdpOwner, port: int) -> None:
        self.owner = owner
        self.port = port
        self.last = time.monotonic()
        self.at: Attachment | None = None
        self._early: deque[bytes] = deque()
        self._unanswered = 0
        self.send_local: Callable[[bytes], bool] = lambda data: False
        self.shut: Callable[[], None] = lambda: None

    def send(self, kind: int, payload: bytes = b"") -> None:
        """Send one message of the stream, while it has a link."""
        if self.at is not None:
            self.at.send(kind, payload, port=self.port if kind == CONNECT else 0)

    def hold(self) -> None:
        """Keep what comes until there is a socket; of too many the oldest go."""
        self.send_local = self._keep

    def _keep(self, data: bytes) -> bool:
        if len(self._early) == EARLY_DATAGRAMS:
            self._early.popleft()
            self.owner.totals.udp_dropped += 1
        self._early.append(data)
        return True

    def release(self) -> None:
        """Send what was kept."""
        while self._early:
            if not self.send_local(self._early.popleft()):
                self.owner.totals.udp_dropped += 1

    def from_local(self, data: bytes) -> None:
        """A datagram for the other end."""
        self.last = time.monotonic()
        if self.at is None or self.at.link.out.queued > self.owner.config.udp_queue:
            self.owner.totals.udp_dropped += 1
            return
        self.owner.totals.bytes_sent += len(data)
        self._unanswered += 1
        self.at.send(DATA, data)

    def from_link(self, data: bytes) -> None:
        """A datagram from the other end."""
        self.last = time.monotonic()
        self._unanswered = 0
        if not self.send_local(data):
            self.owner.totals.udp_dropped += 1
        else:
            self.owner.totals.bytes_received += len(data)

    def refused(self) -> None:
        """ERROR came: nothing took the datagrams that were sent since the last answer."""
        self.owner.totals.udp_dropped += self._unanswered
        self.over()

    def over(self) -> None:
        """CLOSE came."""
        at, self.at = self.at, None
        if at is not None:
            at.leave()
        self.shut()

    def link_lost(self) -> None:
        """The link is gone."""
        self.over()

    def expire(self) -> None:
        """It was silent for too long, or makes room for another."""
        self.send(CLOSE)
        self.over()


class UdpListener(asyncio.DatagramProtocol):
    """A local UDP port: every source address is a stream; the one idle longest goes when there are too many."""

    def __init__(self, owner: UdpOpener[UdpStream], remote_port: int, sock: socket.socket) -> None:
        self.owner = owner
        self.remote_port = remote_port
        self._sock = sock
        self._peers: OrderedDict[object, UdpStream] = OrderedDict()
        self._transport: asyncio.DatagramTransport = cast(asyncio.DatagramTransport, None)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str | int, ...]) -> None:
        stream = self._peers.get(addr)
        if stream is None:
            stream = self._new_peer(addr)
            if stream is None:
                self.owner.totals.udp_dropped += 1
                return
        self._peers.move_to_end(addr)
        stream.from_local(data)

    def _new_peer(self, addr: tuple[str | int, ...]) -> UdpStream | None:
        if len(self._peers) >= self.owner.config.udp_peers:
            next(iter(self._peers.values())).expire()
        stream = UdpStream(self.owner, self.remote_port)
        stream.send_local = lambda data: self._reply(data, addr)
        stream.shut = lambda: self._forget(addr)
        if not self.owner.open_udp(stream):
            return None
        self._peers[addr] = stream
        return stream

    def _forget(self, addr: object) -> None:
        self._peers.pop(addr, None)

    def _reply(self, data: bytes, addr: tuple[str | int, ...]) -> bool:
        return not self._transport.is_closing() and send_datagram(lambda: self._sock.sendto(data, addr))

    def error_received(self, exc: Exception) -> None:
        pass  # an ICMP answer to one source address says nothing about the others


class UdpSocket(asyncio.DatagramProtocol):
    """The connected socket of a UDP stream on the container side."""

    def __init__(self, stream: UdpStream, sock: socket.socket) -> None:
        self.stream = stream
        self._sock = sock
        self._transport: asyncio.DatagramTransport = cast(asyncio.DatagramTransport, None)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)
        self.stream.send_local = self._send
        self.stream.shut = transport.close

    def _send(self, data: bytes) -> bool:
        return not self._transport.is_closing() and send_datagram(lambda: self._sock.send(data))

    def datagram_received(self, data: bytes, addr: object) -> None:
        self.stream.from_local(data)

    def error_received(self, exc: Exception) -> None:
        self.stream.owner.totals.udp_dropped += 1  # nothing listens just now: the service may come back


def family_of(host: str) -> socket.AddressFamily:
    """The family of an IP address."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def connected_datagram_socket(host: str, port: int) -> socket.socket:
    """A non-blocking UDP socket that talks to ``host:port`` only. Raises OSError."""
    return connected(socket.socket(family_of(host), socket.SOCK_DGRAM), host, port)


def connected(sock: socket.socket, host: str, port: int) -> socket.socket:
    """``sock``, which from now on talks to ``host:port`` only, and waits for nothing. Raises OSError, and closes it."""
    try:
        sock.setblocking(False)
        sock.connect((host, port))
    except OSError:
        sock.close()
        raise
    return sock

"""UDP streams and their local sockets (docs/protocol.md §3 rule 12)."""

from __future__ import annotations

import asyncio
import socket
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import cast

from kohakuriver.tunnel.kept import Identity
from kohakuriver.tunnel.owner import UdpOpener, UdpOwner
from kohakuriver.tunnel.protocol import CLOSE, CONNECT, DATA, ERROR, ErrorText, Opening
from kohakuriver.tunnel.streams import Attachment

EARLY_DATAGRAMS, EARLY_BYTES = 64, 128 * 1024
HELD_DATAGRAMS, HELD_BYTES = 1024, 1 << 20


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

    __slots__ = ("_early", "_unanswered", "at", "gone", "identity", "last", "owner", "port", "send_local", "shut")

    def __init__(self, owner: UdpOwner[UdpStream], port: int, identity: Identity | None = None) -> None:
        self.owner = owner
        self.port = port
        self.identity = identity  # where it outlives its links
        self.last = time.monotonic()
        self.at: Attachment | None = None
        self.gone = False
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
        self._early.append(data)
        while len(self._early) > EARLY_DATAGRAMS or sum(map(len, self._early)) > EARLY_BYTES:
            self._early.popleft()
            self.owner.totals.udp_dropped += 1
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
        """ERROR came: nothing took the datagrams that were sent since the last answer, as the other end counts too."""
        self.owner.totals.udp_refused += self._unanswered
        self.over()

    def over(self) -> None:
        """CLOSE came."""
        if not self.gone:
            self.gone = True
            self.unlink()
            self.shut()
            self.owner.stream_over(self)

    def link_lost(self) -> None:
        """The link is gone."""
        self.over()

    def unlink(self) -> None:
        """Leave the link."""
        at, self.at = self.at, None
        if at is not None:
            at.leave()

    def detach(self) -> bool:
        if self.identity is None:
            return False
        self.unlink()
        self.owner.stream_detached(self)
        return True

    def opening(self) -> bytes:
        """The payload of CONNECT."""
        return b"" if self.identity is None else Opening(0, self.identity.key, self.identity.hold).pack()

    def resuming(self, epoch: int) -> bytes:
        """The payload of the RESUME that attaches a kept stream to another link."""
        return b"" if self.identity is None else self.identity.resuming(epoch, 0, 0, 0)

    def end(self, text: ErrorText) -> None:
        """A kept stream ends, whether it has a link or not."""
        self.send(ERROR, text.pack())
        self.over()

    def expire(self) -> None:
        """It was silent for too long, or makes room for another."""
        self.send(CLOSE)
        self.over()


class HeldDatagrams:
    """Datagrams of local programs that wait, in order, for the link by which they go; not too many of them."""

    def __init__(self) -> None:
        self._waiting: list[Callable[[], None]] = []
        self._size = 0

    def keep(self, size: int, send: Callable[[], None]) -> bool:
        """One of so many bytes, which `send` sends; False where there is no room for it."""
        if len(self._waiting) >= HELD_DATAGRAMS or self._size + size > HELD_BYTES:
            return False
        self._waiting.append(send)
        self._size += size
        return True

    def send(self) -> None:
        """Send all of them."""
        for send in self._waiting:
            send()


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
        held = self.owner.held
        if held is not None:
            if not held.keep(len(data), lambda: self.datagram_received(data, addr)):
                self.owner.totals.udp_dropped += 1
            return
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


def family_of(host: str) -> socket.AddressFamily:
    """The family of an IP address."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def connected(sock: socket.socket, host: str, port: int) -> socket.socket:
    """``sock``, which from now on talks to ``host:port`` only, and waits for nothing. Raises OSError, and closes it."""
    try:
        sock.setblocking(False)
        sock.connect((host, port))
    except OSError:
        sock.close()
        raise
    return sock

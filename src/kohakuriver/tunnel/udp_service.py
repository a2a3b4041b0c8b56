"""The container's side of a UDP stream: which address takes its datagrams (docs/protocol.md §3 rule 12)."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any, ClassVar, Protocol, cast

from kohakuriver.tunnel.error_text import LACKING, nobody_takes_datagrams, service_error
from kohakuriver.tunnel.protocol import ERROR, ErrorText
from kohakuriver.tunnel.udp import UdpStream, connected

__all__ = ["Refusals", "UdpService"]

# Datagrams, and bytes of them, that are kept until it is known who takes them.
KEPT = 16
KEPT_BYTES = 128 * 1024
# What all streams of this process keep of that together; beyond it, what an address refuses is lost.
ALL_KEPT_BYTES = 32 * 1024 * 1024
# A user's end is told no more often than this that nothing takes datagrams on a port: it opens a stream for the next.
REFUSALS_APART = 5.0


class Refusals:
    """When it was told last, by port, that nothing takes datagrams there."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told: OrderedDict[int, float] = OrderedDict()

    def pause(self, port: int) -> float:
        """Seconds until it may be told of `port` again."""
        return max(0.0, self._told.get(port, -REFUSALS_APART) + REFUSALS_APART - self._clock())

    def told(self, port: int) -> None:
        """It has been told now."""
        now = self._clock()
        self._told[port] = now
        self._told.move_to_end(port)
        while now - next(iter(self._told.values())) >= REFUSALS_APART:
            self._told.popitem(last=False)


class Reaching(Protocol):
    """What the endpoint does for it."""

    where: str
    refusals: Refusals

    async def udp_addresses(self, port: int) -> Iterable[str]:
        """Where datagrams for `port` are sent, in turn. Raises OSError where this end lacks something."""

    async def open_socket(self, host: str, kind: int) -> socket.socket:
        """A non-blocking socket that reaches `host`. Raises OSError."""

    def dial_soon(self, dial: Coroutine[Any, Any, None]) -> None:
        """Do that until the endpoint is closed."""


class Datagrams:
    """Datagrams that are kept for a while, within the bounds of one stream and of the process."""

    kept: ClassVar[int] = 0  # bytes of the process

    def __init__(self) -> None:
        self._all: list[bytes] = []
        self._size = 0

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._all)

    def add(self, data: bytes) -> bool:
        """Keep one; False where there is no room."""
        size = len(data)
        if len(self._all) == KEPT or self._size + size > KEPT_BYTES or Datagrams.kept + size > ALL_KEPT_BYTES:
            return False
        self._all.append(data)
        self._size += size
        Datagrams.kept += size
        return True

    def take(self) -> list[bytes]:
        """What was kept, which is kept no longer."""
        taken, self._all = self._all, []
        Datagrams.kept -= self._size
        self._size = 0
        return taken


class UdpService(asyncio.DatagramProtocol):
    """The socket of a stream, connected to one address after the other until one takes what is sent.

    What an address refused is sent to the next. When all have refused, the user's side is told, or told a little later,
    and the search begins anew: UDP services come and go. A service that has answered and then refuses is searched for
    with the datagrams that follow.
    """

    def __init__(self, stream: UdpStream, owner: Reaching) -> None:
        self.stream = stream
        self._owner = owner
        self._sock: socket.socket | None = None
        self._transport: asyncio.DatagramTransport | None = None
        self._untried: deque[str] | None = None
        self._kept = Datagrams()
        self._searching = True  # not once somebody answered, or took too much to be nobody
        self._moving = False
        self._refused_again = False  # by the next address, and at once
        self._held = Datagrams()  # came while there was no socket
        self._closed = False
        self._untold = 0
        self._telling: asyncio.TimerHandle | None = None

    async def open(self) -> None:
        """Connect to the first address that can be dialled. Raises OSError."""
        failure = await self._next()
        if failure is not None:
            raise failure
        self.stream.send_local = self._send
        self.stream.shut = self.close

    def close(self) -> None:
        """The stream is over."""
        self._closed = True
        if self._telling is not None:
            self._telling.cancel()
        self._kept.take()
        self._held.take()
        self._disconnect()

    def _found(self) -> None:
        """Nothing has to be sent to another address."""
        self._searching = False
        self._kept.take()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: object) -> None:
        self._found()
        self._untold = 0
        self.stream.from_local(data)

    def error_received(self, exc: Exception) -> None:
        if isinstance(exc, ConnectionRefusedError):
            self._refused()
        else:
            self.stream.owner.totals.udp_dropped += 1

    # -- to the service ----------------------------------------------------------------------------------------

    def _send(self, data: bytes) -> bool:
        """Asyncio's own sendto leaves empty datagrams out, and queues others without a limit."""
        if self._moving:
            return self._held.add(data)
        if self._sock is None:
            return False
        try:
            self._sock.send(data)
        except ConnectionRefusedError:  # of an earlier datagram, in place of sending this one
            self._refused()
            return self._held.add(data)
        except OSError:
            return False
        if self._searching and not self._kept.add(data):
            self._found()
        return True

    # -- who takes it ------------------------------------------------------------------------------------------

    def _refused(self) -> None:
        if self._moving:
            self._refused_again = True
        if self._moving or self._closed:
            return
        if not self._searching:  # which datagram it was can't be known any more
            self._lost(1)
            self._searching, self._untried = True, None
        self._moving = True
        self._owner.dial_soon(self._move())

    async def _move(self) -> None:
        """Send what is kept to the next address, and end the search where there is none."""
        try:
            failure = await self._next()
            if failure is not None:
                await self._nobody(failure)
        finally:
            self._moving = False
        for data in self._held.take():
            if not self._send(data):
                self._lost(1)

    async def _next(self) -> OSError | None:
        """Connect to the next address and send there what is kept; why none is left to connect to."""
        failure = OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))
        try:
            if self._untried is None:
                self._untried = deque(await self._owner.udp_addresses(self.stream.port))
        except OSError as error:
            return error
        while self._untried:
            refusal = await self._connect(self._untried.popleft())
            if refusal is None and not self._refused_again:
                return None
            failure = refusal or failure
        self._untried = None
        return failure

    async def _connect(self, host: str) -> OSError | None:
        """Connect to an address and send there what is kept; why that can't be done."""
        self._disconnect()
        self._refused_again = False
        try:
            sock = connected(await self._owner.open_socket(host, socket.SOCK_DGRAM), host, self.stream.port)
        except OSError as error:
            return error
        try:
            for data in self._kept:
                sock.send(data)
            await asyncio.get_running_loop().create_datagram_endpoint(lambda: self, sock=sock)
        except OSError as error:
            sock.close()
            return error
        self._sock = sock
        if self._closed:
            self._disconnect()
        return None

    def _disconnect(self) -> None:
        if self._transport is not None:
            self._transport.close()
        self._sock = self._transport = None

    async def _nobody(self, failure: OSError) -> None:
        """All addresses have refused what is kept, or could not be dialled: `failure` is the last's."""
        self._lost(len(self._kept.take()))
        if self._closed:
            return
        if failure.errno in LACKING:
            self._tell(service_error(failure, self.stream.port, self._owner.where))
            return
        pause = self._owner.refusals.pause(self.stream.port)
        if pause == 0:
            self._tell(self._refusal)
            return
        if self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(pause, self._told_late)
        await self._next()

    def _lost(self, datagrams: int) -> None:
        self._untold += datagrams
        self.stream.owner.totals.udp_dropped += datagrams

    def _told_late(self) -> None:
        self._telling = None
        if self._untold:
            self._tell(self._refusal)

    @property
    def _refusal(self) -> ErrorText:
        return nobody_takes_datagrams(self.stream.port, self._owner.where)

    def _tell(self, why: ErrorText) -> None:
        self._owner.refusals.told(self.stream.port)
        self.stream.send(ERROR, why.pack())
        self.stream.over()

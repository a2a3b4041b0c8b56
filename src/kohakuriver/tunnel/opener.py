"""The kept streams of a user's end: their keys, and how they go on over another link.

docs/protocol.md §3, "Streams that outlive links".
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
from collections.abc import Callable

from kohakuriver.tunnel.doubt import Doubt
from kohakuriver.tunnel.kept import Identity
from kohakuriver.tunnel.local_socket import TcpStream
from kohakuriver.tunnel.protocol import KEY, OPENER, PROTO_UDP, RESUME, SESSION_ID, Roll
from kohakuriver.tunnel.streams import Attachment, Streams
from kohakuriver.tunnel.udp import UdpStream

__all__ = ["KeptStreams", "is_resuming"]

# Seconds after which a stream that was told to try again does; a random part comes on top.
AGAIN_AFTER = 0.5


class KeptStreams:
    """All kept streams of one endpoint, whether they have a link or wait for one.

    Args:
        hold: for how many seconds the other end is asked to keep a stream without a link.
    """

    def __init__(self, hold: int) -> None:
        self.hold = hold
        self.streams: dict[TcpStream | UdpStream, None] = {}
        self._opener = os.urandom(OPENER)
        self._numbers = itertools.count()
        self._any = False
        self._epoch = 0  # of the present link
        self._link: Streams | None = None
        self._again: dict[TcpStream | UdpStream, asyncio.TimerHandle] = {}
        self._patience: asyncio.TimerHandle | None = None
        self.on_doubt: Callable[[], None] = lambda: None  # the link may be dead
        self.doubt = Doubt(lambda: self.streams, lambda: self.on_doubt())

    @property
    def waiting(self) -> int:
        """How many wait for a link."""
        return sum(stream.at is None for stream in self.streams)

    def identity(self) -> Identity:
        """Who a new stream is."""
        self._any = True
        return Identity(self.new_key(), self.hold)

    def new_key(self) -> bytes:
        """A key that no stream had."""
        number = next(self._numbers) % (1 << 8 * (KEY - OPENER))
        return self._opener + number.to_bytes(KEY - OPENER, "big")

    def enter(self, stream: TcpStream | UdpStream) -> None:
        """A stream was opened."""
        self.streams[stream] = None

    def over(self, stream: TcpStream | UdpStream) -> None:
        """It has ended."""
        self.streams.pop(stream, None)
        self.doubt.over(stream)
        if self._again:
            self._forget(stream)
        if self._patience is not None and not self.streams:
            self._lose_no_patience()

    def attach(self, link: Streams) -> None:
        """All go on over this link; the other end forgets those that have ended meanwhile (rule 7)."""
        self._link = link
        self.doubt.begin()
        self._lose_no_patience()
        for stream in list(self._again):
            self._forget(stream)
        self._epoch += 1
        frames = [self._resume(stream, link) for stream in self.streams]
        if self._any or (self._epoch > 1 and link.link.version >= 2):  # a runner is to know which link is in use
            frames.append(link.link.build_message(RESUME, SESSION_ID, Roll(self._opener, self._epoch).pack()))
            link.link.send(b"".join(frames))

    def leave(self) -> None:
        """No other link will come: those that are not on this one end here, and the other end forgets them."""
        if self._link is not None and any(is_resuming(stream) for stream in self.streams):
            self._epoch += 1
            self._link.link.send_message(RESUME, SESSION_ID, Roll(self._opener, self._epoch).pack())
        for stream in list(self._again):
            stream.link_lost()

    def detach(self, given_up: Callable[[], None]) -> None:
        """The link is gone. Call `given_up` if none comes for as long as the other end holds them."""
        self._link = None
        self.doubt.end()
        self._lose_no_patience()
        if self.streams:
            self._patience = asyncio.get_running_loop().call_later(self.hold, given_up)

    def _lose_no_patience(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def later(self, stream: TcpStream | UdpStream) -> None:
        """The other end asks that this one try again later."""
        stream.detach()
        delay = AGAIN_AFTER * (1 + random.random())
        self._again[stream] = asyncio.get_running_loop().call_later(delay, self._once_more, stream)

    def _once_more(self, stream: TcpStream | UdpStream) -> None:
        del self._again[stream]
        if self._link is not None:
            self._link.link.send(self._resume(stream, self._link))

    def _forget(self, stream: TcpStream | UdpStream) -> None:
        timer = self._again.pop(stream, None)
        if timer is not None:
            timer.cancel()

    def _resume(self, stream: TcpStream | UdpStream, link: Streams) -> bytes:
        number = link.new_id()
        at: Attachment
        if isinstance(stream, UdpStream):
            at, proto = link.enter_udp(stream, number, again=True), PROTO_UDP
        else:
            at, proto = link.enter(stream, number, again=True), stream.proto
        stream.at = at
        return link.link.build_message(RESUME, number, stream.resuming(self._epoch), proto=proto, port=stream.port)


def is_resuming(stream: TcpStream | UdpStream) -> bool:
    """Whether the other end was asked to go on with it, and has not said that it does; for UDP, whether it ever was."""
    if stream.identity is None or not stream.identity.epoch:
        return False
    return isinstance(stream, UdpStream) or (stream.kept is not None and not stream.kept.attached)

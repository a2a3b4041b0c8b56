"""What a connection to the host begins with: by its first Host it goes to an app, or to the host itself.

Which of the two it was stays so: neither serves a request whose Host is the other's, so nothing is gained by two
readers of one request, or by a second request behind the first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from kohakuriver.gateway.heads import Malformed, head_end, read_request
from kohakuriver.gateway.visit import Visit
from kohakuriver.limits import Limits
from kohakuriver.web.request_limits import GuardedHttp
from kohakuriver.web.waiting_room import WaitingRoom

__all__ = ["Front"]


class Front(asyncio.Protocol):
    """One connection until its first head is there.

    Args:
        owns: whether what Host says is the name of an app.
        visit: makes the protocol of apps, which waits in that room while it has no request under way.
        http: makes that of the host, which gets all that is not clearly an app's, and answers it.
    """

    def __init__(
        self,
        owns: Callable[[str], bool],
        visit: Callable[[WaitingRoom], Visit],
        http: Callable[[], GuardedHttp],
        room: WaitingRoom,
        limits: Limits,
    ) -> None:
        self._owns = owns
        self._visit = visit
        self._http = http
        self._room = room
        self._limits = limits
        self._head = bytearray()
        self._clock: asyncio.TimerHandle | None = None
        self._transport: asyncio.Transport = cast(asyncio.Transport, None)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        loop = asyncio.get_running_loop()
        self._clock = loop.call_later(self._limits.handshake_timeout, self._too_slow)
        self._room.enter(self, self._transport.abort)

    def connection_lost(self, exc: Exception | None) -> None:
        self._over()

    def data_received(self, data: bytes) -> None:
        known = len(self._head)
        self._head += data
        try:
            end = head_end(self._head, known)
            if end < 0 and len(self._head) <= self._limits.max_header:
                return
            host = None if end < 0 else read_request(bytes(self._head[:end])).fields.one(b"host")
        except Malformed:
            host = None
        if host is not None and self._owns(host.decode("latin-1")):
            self._to_app()
        else:
            self._to_host()

    def eof_received(self) -> None:
        self._to_host().eof_received()

    def _too_slow(self) -> None:
        self._to_host().too_slow()

    def _over(self) -> None:
        self._room.leave(self)
        if self._clock is not None:
            self._clock.cancel()

    def _to_host(self) -> GuardedHttp:
        self._over()
        http = self._http()
        self._transport.set_protocol(http)
        http.connection_made(self._transport)
        if self._head:
            http.data_received(bytes(self._head))
        return http

    def _to_app(self) -> None:
        self._over()
        visit = self._visit(self._room)
        self._transport.set_protocol(visit)
        visit.connection_made(self._transport)
        visit.begin(bytes(self._head))

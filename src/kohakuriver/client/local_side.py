"""The local addresses of a forward: which ones are had, and what is done where one can't be."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kohakuriver.client.ports import LOOPBACK, LOOPBACKS, PortForward
from kohakuriver.errors import LocalAddressError
from kohakuriver.tunnel.user_endpoint import ListeningSocket, UserEndpoint

__all__ = ["LocalSide"]

FREE_PORT_TRIES = 20


class LocalSide:
    """Listens for `endpoint` on `host`, where "localhost" is both loopback addresses.

    `half` is told of an address and port of the second one that another program has; the first is enough.
    """

    def __init__(self, endpoint: UserEndpoint, host: str, half: Callable[[str, int], None]) -> None:
        self._endpoint = endpoint
        self._host = host
        self._half = half

    async def listen(self, ports: Sequence[PortForward]) -> list[ListeningSocket]:
        """Bind all: those that must be had first, one for each port. Raises LocalAddressError."""
        if self._host != LOOPBACK:
            return [await self._listen(self._host, port.local, port) for port in ports]
        firsts, seconds = [], []
        for port in ports:
            first, second = await self._listen_on_loopback(port)
            firsts.append(first)
            seconds += [] if second is None else [second]
        return firsts + seconds

    async def _listen_on_loopback(self, port: PortForward) -> tuple[ListeningSocket, ListeningSocket | None]:
        """The same port number on 127.0.0.1 and, where that can be had, on ::1. Raises LocalAddressError."""
        first = await self._listen(LOOPBACKS[0], port.local, port)
        for _ in range(FREE_PORT_TRIES):
            try:
                return first, await self._listen(LOOPBACKS[1], first.port, port)
            except LocalAddressError as error:
                if error.taken is None:
                    return first, None  # this machine has no IPv6
                if port.local:
                    self._half(LOOPBACKS[1], first.port)
                    return first, None
            another = await self._listen(LOOPBACKS[0], 0, port)  # before the first is closed, so that it is another
            first.close()
            first = another
        return first, None

    async def _listen(self, host: str, local: int, port: PortForward) -> ListeningSocket:
        listen = self._endpoint.listen_udp if port.proto == "udp" else self._endpoint.listen_tcp
        return await listen(host, local, port.remote)

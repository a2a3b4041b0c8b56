"""The local addresses of a forward: which ones are had, and what is done where one can't be."""

from __future__ import annotations

import socket
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from kohakuriver.client.ports import LOOPBACK, LOOPBACKS, SOCKS, PortForward, is_udp
from kohakuriver.errors import LocalAddressError
from kohakuriver.tunnel.local_listeners import ListeningSocket, listen_for, listen_unix
from kohakuriver.tunnel.local_socket import TcpStream
from kohakuriver.tunnel.user_endpoint import UserEndpoint

__all__ = ["LocalSide"]

_Pair = tuple[ListeningSocket, ListeningSocket | None]

FREE_PORT_TRIES = 20
NEXT_PORT_TRIES = 100
"""How many ports are tried, from the one that is wanted on, where the next free one will do."""


async def _nobody(sock: socket.socket) -> None:
    sock.close()


class LocalSide:
    """Listens for `endpoint` on `host`, where "localhost" is both loopback addresses.

    `half` is told of an address and port of the second one that another program has; the first is enough. With
    `fallback` a port is passed over that is taken, and the next free one listens instead of it. `socks` serves the
    connections to a SOCKS port.
    """

    def __init__(
        self,
        endpoint: UserEndpoint,
        host: str,
        half: Callable[[str, int], None],
        *,
        fallback: bool = False,
        socks: Callable[[socket.socket], Coroutine[Any, Any, None]] = _nobody,
    ) -> None:
        self._endpoint = endpoint
        self._host = host
        self._half = half
        self._fallback = fallback
        self._socks = socks

    async def listen(self, ports: Sequence[PortForward]) -> list[ListeningSocket]:
        """Bind all: those that must be had first, one for each port. Raises LocalAddressError."""
        firsts, seconds = [], []
        for port in ports:
            others = {each.local for each in ports if each is not port and is_udp(each) == is_udp(port)}
            first, second = await self._listen_or_fall_back(port, others)
            firsts.append(first)
            seconds += [] if second is None else [second]
        return firsts + seconds

    async def _listen_or_fall_back(self, port: PortForward, others: set[int]) -> _Pair:
        """Listen for `port`, passing over those that are for `others`. Raises LocalAddressError."""
        if port.path is not None:
            return await self._listen_unix(Path(port.path).expanduser().absolute(), port.remote), None
        if not self._fallback or not port.local:
            return await self._listen_at(port.local, port)
        last = min(port.local + NEXT_PORT_TRIES, 65536)
        for local in range(port.local, last):
            if local in others:
                continue
            try:
                pair = await self._listen_at(local, port)
            except LocalAddressError as error:
                if error.taken is None:
                    raise
                continue
            for each in pair:
                if each is not None and local != port.local:
                    each.instead_of = port.local
            return pair
        raise LocalAddressError(
            f"None of the ports {port.local} to {last - 1} is free on {self._host}; choose another one, or 0 for any."
        )

    async def _listen_unix(self, path: Path, remote: int) -> ListeningSocket:
        listening = await listen_unix(path, remote, lambda: TcpStream(self._endpoint, remote))
        self._endpoint.listening.append(listening)
        return listening

    async def _listen_at(self, local: int, port: PortForward) -> _Pair:
        if self._host == LOOPBACK:
            return await self._listen_on_loopback(local, port)
        return await self._listen(self._host, local, port), None

    async def _listen_on_loopback(self, local: int, port: PortForward) -> _Pair:
        """The same port number on 127.0.0.1 and, where that can be had, on ::1. Raises LocalAddressError."""
        first = await self._listen(LOOPBACKS[0], local, port)
        for _ in range(FREE_PORT_TRIES):
            try:
                return first, await self._listen(LOOPBACKS[1], first.port, port)
            except LocalAddressError as error:
                if error.taken is None:
                    return first, None  # this machine has no IPv6
                if local and self._fallback:
                    first.close()
                    raise
                if local:
                    self._half(LOOPBACKS[1], first.port)
                    return first, None
            another = await self._listen(LOOPBACKS[0], 0, port)  # before the first is closed, so that it is another
            first.close()
            first = another
        return first, None

    async def _listen(self, host: str, local: int, port: PortForward) -> ListeningSocket:
        if port.proto == SOCKS:
            listening = await listen_for(host, local, SOCKS, self._socks)
            self._endpoint.listening.append(listening)
            return listening
        listen = self._endpoint.listen_udp if port.proto == "udp" else self._endpoint.listen_tcp
        return await listen(host, local, port.remote)

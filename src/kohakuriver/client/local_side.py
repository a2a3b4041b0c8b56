"""The local addresses of a forward: which ones are had, and what is done where one can't be."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from kohakuriver.client.ports import LOOPBACK, LOOPBACKS, SOCKS, PortForward, is_udp
from kohakuriver.errors import LocalAddressError
from kohakuriver.tunnel.local_listeners import ListeningSocket, listen_for, listen_unix
from kohakuriver.tunnel.local_socket import TcpStream
from kohakuriver.tunnel.user_endpoint import UserEndpoint, stop_listening

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
    connections to a SOCKS port. `made` makes what a connection to a TCP port is, in the place of a stream. With `both`
    one loopback address is not enough where another program has the other.
    """

    def __init__(
        self,
        endpoint: UserEndpoint,
        host: str,
        half: Callable[[str, int], None],
        *,
        fallback: bool = False,
        socks: Callable[[socket.socket], Coroutine[Any, Any, None]] = _nobody,
        made: Callable[[], asyncio.BaseProtocol] | None = None,
        both: bool = False,
    ) -> None:
        self._endpoint = endpoint
        self._host = host
        self._half = half
        self._fallback = fallback
        self._socks = socks
        self._made = made
        self._both = both

    async def listen(self, ports: Sequence[PortForward]) -> list[ListeningSocket]:
        """Bind all: those that must be had first, one for each port. Raises LocalAddressError."""
        firsts, seconds = [], []
        for port in ports:
            others = {each.local for each in ports if each is not port and is_udp(each) == is_udp(port)}
            first, second = await self._listen_or_fall_back(port, others)
            firsts.append(first)
            seconds += [] if second is None else [second]
        return firsts + seconds

    async def listen_or_any(self, port: PortForward) -> list[ListeningSocket]:
        """Bind for one port, the address first that must be had; where its local port can't be had, any free one.

        Raises LocalAddressError where there is none, or OSError where this process lacks something.
        """
        try:
            pair = await self._listen_or_fall_back(port, set())
        except LocalAddressError:
            pair = _instead_of(port.local, await self._listen_at(0, port))
        return [each for each in pair if each is not None]

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
            return pair if local == port.local else _instead_of(port.local, pair)
        raise LocalAddressError(
            f"None of the ports {port.local} to {last - 1} is free on {self._host}; choose another one, or 0 for any."
        )

    async def _listen_unix(self, path: Path, remote: int) -> ListeningSocket:
        listening = await listen_unix(path, remote, self._made or (lambda: TcpStream(self._endpoint, remote)))
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
                if local and (self._fallback or self._both):
                    stop_listening(self._endpoint, first)
                    raise
                if local:
                    self._half(LOOPBACKS[1], first.port)
                    return first, None
            except OSError:  # no file is left for it
                stop_listening(self._endpoint, first)
                raise
            another = await self._listen(LOOPBACKS[0], 0, port)  # before the first is closed, so that it is another
            stop_listening(self._endpoint, first)
            first = another
        if self._both:
            stop_listening(self._endpoint, first)
            raise LocalAddressError(f"No port was found that is free on both {' and '.join(LOOPBACKS)}; choose one.")
        return first, None

    async def _listen(self, host: str, local: int, port: PortForward) -> ListeningSocket:
        if port.proto == SOCKS:
            listening = await listen_for(host, local, SOCKS, self._socks)
            self._endpoint.listening.append(listening)
            return listening
        if port.proto == "udp":
            return await self._endpoint.listen_udp(host, local, port.remote)
        return await self._endpoint.listen_tcp(host, local, port.remote, self._made)


def _instead_of(wanted: int, pair: _Pair) -> _Pair:
    for each in pair:
        if each is not None:
            each.instead_of = wanted
    return pair

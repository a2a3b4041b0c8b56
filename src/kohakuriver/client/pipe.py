"""One connection to a task's SSH server that outlives the links between: what `kohakuriver ssh-proxy` keeps open.

It is a forward whose one local connection is a socket of its owner's, not one that a listener took.
"""

from __future__ import annotations

import asyncio
import contextlib
import select
import socket
from collections.abc import Coroutine
from typing import Any

from kohakuriver.client.forward import Event, Forwarder, PathChoice, PortForward, StreamError
from kohakuriver.config import Settings
from kohakuriver.errors import UnavailableError
from kohakuriver.runtime import cancel_all
from kohakuriver.tunnel.local_socket import TcpStream
from kohakuriver.tunnel.states import State
from kohakuriver.tunnel.user_endpoint import UserEndpoint

__all__ = ["Pipe"]

_OPENING = frozenset({State.WAITING, State.OPENING, State.OPENING_LOCAL_ENDED})

SSH_PORT = 22
"""Its number is not told: the host takes the port that the task's SSH server has."""

LOOK_EVERY = 0.5
"""Seconds between two looks whether whoever had the other end of the socket still has it."""

LAST_WORD = 1.0
"""Seconds that what they said last has to get through, once they have gone."""


class PipeStream(TcpStream):
    """A stream that tells when its local socket has gone."""

    __slots__ = ("gone",)

    def __init__(self, endpoint: UserEndpoint) -> None:
        super().__init__(endpoint, 0)
        self.gone = asyncio.Event()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.gone.set()


class Pipe(Forwarder):
    """A connection of `sock` to the SSH server of `task`. `sock` is a stream socket, and from now on this object's."""

    place = "ssh"
    """What stands in the place of a port in the session's path."""

    def __init__(self, task: str, settings: Settings, sock: socket.socket) -> None:
        # It is opened through the host, whatever is wanted later.
        path: PathChoice | None = "auto" if settings.path == "direct" else None
        ports = [PortForward(0, SSH_PORT)]
        super().__init__(task, ports, settings=settings, resume=True, path=path, on_event=self.happened)
        self._sock = sock
        self._failure: str | None = None

    def happened(self, event: Event) -> None:
        """Called with each event."""
        if isinstance(event, StreamError):
            self._failure = event.message

    def stream(self) -> PipeStream:
        """The stream that the connection is."""
        return PipeStream(self._endpoint)

    async def run(self) -> None:
        """Carry the connection until it ends.

        Raises UnavailableError where the task's end refused it or broke it, and what `start` and `wait` raise.
        """
        stream = self.stream()
        try:
            await self._unless_left(self._carry(stream), stream)
        finally:
            await self.close()
        if self._failure is not None:
            raise self.broken(self._failure)

    def broken(self, why: str) -> UnavailableError:
        """What it means that the stream was refused, or broke."""
        return UnavailableError(f"The SSH server of task {self.task} can't be reached: {why}.")

    async def _carry(self, stream: PipeStream) -> None:
        await self.start()
        loop = asyncio.get_running_loop()
        connect = loop.create_connection if self._sock.family == socket.AF_INET else loop.create_unix_connection
        await connect(lambda: stream, sock=self._sock)
        await _first_of(stream.gone.wait(), self.wait())

    async def _unless_left(self, carrying: Coroutine[Any, Any, None], stream: PipeStream) -> None:
        """Carry, but not for nobody: without a link nothing would tell that the other end of the socket is closed."""

        async def left() -> None:
            await _until_left(self._sock)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(stream.gone.wait(), LAST_WORD)

        await _first_of(carrying, left())

    def _may_go_straight(self) -> bool:
        """The host is to see what is started: the connection is opened through it, and the other end has answered."""
        kept = self._endpoint.kept
        streams = () if kept is None else kept.streams
        return any(isinstance(each, TcpStream) and each.core.state not in _OPENING for each in streams)

    async def _listen_everywhere(self) -> None:
        """Nothing listens: there is one connection, and it is there."""

    def _path(self) -> str:
        return f"{super()._path().rpartition('/')[0]}/{self.place}?proto=tcp"


async def _first_of(*each: Coroutine[Any, Any, Any]) -> None:
    """Wait until one of them has ended, and end the others. What it raises is raised."""
    tasks = [asyncio.ensure_future(one) for one in each]
    try:
        ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for one in ended:
            one.result()
    finally:
        await cancel_all(tasks)


async def _until_left(sock: socket.socket) -> None:
    """Wait until nobody has the other end of `sock`. On Windows, which doesn't tell, for ever."""
    if not hasattr(select, "poll"):
        await asyncio.get_running_loop().create_future()
    poll = select.poll()
    poll.register(sock, 0)
    while not poll.poll(0):  # noqa: ASYNC110  # a loop tells of that only where it reads, and here it may not
        await asyncio.sleep(LOOK_EVERY)

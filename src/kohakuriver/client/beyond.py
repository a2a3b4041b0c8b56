"""Forwards that lead beyond a task's ports: to its Unix sockets, on to another address, or back to this machine.

Both are streams that the task's tunnel client opens connections for, in sessions of their own (docs/protocol.md §6,
"Beyond the task").
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import re
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Final

from kohakuriver.client.forward import Event, Forwarder, PortForward, Stats
from kohakuriver.client.local_side import LocalSide
from kohakuriver.client.ports import LOOPBACK, UNIX
from kohakuriver.config import Settings
from kohakuriver.errors import KohakuRiverError, UnavailableError, UsageError
from kohakuriver.runtime import cancel_all
from kohakuriver.tunnel.error_text import WINDOW_PASSED
from kohakuriver.tunnel.link import Link
from kohakuriver.tunnel.local_socket import TcpStream
from kohakuriver.tunnel.protocol import PROTO_TERMINAL, ErrorText
from kohakuriver.tunnel.terminal import beyond
from kohakuriver.tunnel.user_endpoint import UserEndpoint
from kohakuriver.unix_sockets import address_of

__all__ = ["Address", "Back", "BackForwarder", "BeyondForwarder", "Reversed", "by_kind", "parse_address", "parse_back"]

NO_WAY = "no_lasting_terminal"
WAITING = 8
"""How many streams wait for somebody in the task, for each port there: so many may come at the same moment."""
AGAIN_SECONDS = 1.0
"""After a stream that could not wait: the task's end has as many as it may, or has been restarted."""
PIECE = 64 << 10
_OLDER: Final = ErrorText("EPROTO", "the task's tunnel client is of another version; restart the task to have this one")
_LISTENS, _CAME = b"\0", b"\1"
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER

_HOST: Final = r"\[[0-9A-Fa-f:.]+\]|[^:\[\]/\s]+"
_LOCAL: Final = r"(\d+|unix:.+?)"
_ADDRESS = re.compile(rf"{_LOCAL}:(?!\d+:)({_HOST}):(\d+)(?:/tcp)?", re.DOTALL)
_SOCKET = re.compile(rf"{_LOCAL}:unix:(.*)", re.DOTALL)
_BACK = re.compile(rf"(\d+|unix:[^:]*)(?::(?:unix:(.*)|(?:({_HOST}):)?(\d+)))?", re.DOTALL)


@dataclass(frozen=True)
class Address:
    """A local port, 0 being any free one, that leads to `port` of `host` as the task knows and reaches it.

    With `socket` it leads to the Unix socket at this path in the task. With `path`, a Unix socket there is in the place
    of the local port.
    """

    local: int
    host: str = ""
    port: int = 0
    socket: str | None = None
    path: str | None = None

    @property
    def kind(self) -> str:
        """Which sessions its connections have."""
        return "to" if self.socket is None else "at"

    @property
    def start(self) -> bytes:
        """What its connections begin with."""
        return beyond("to", self.host, str(self.port)) if self.socket is None else beyond("at", self.socket)


@dataclass(frozen=True)
class Back:
    """A port of the task's loopback that leads to `port` of `host` as this machine knows and reaches it.

    With `socket`, a Unix socket at this path in the task is in the place of its port. With `path` it leads to the Unix
    socket there on this machine.
    """

    remote: int
    host: str = ""
    port: int = 0
    socket: str | None = None
    path: str | None = None

    @property
    def start(self) -> bytes:
        """What the connections begin with that wait there."""
        return beyond("on", self.socket or str(self.remote))


def parse_address(text: str) -> Address | None:
    """`LOCAL:HOST:PORT` or `LOCAL:unix:PATH`, None where it is another kind of port; LOCAL may be `unix:PATH`, too.

    Raises UsageError.
    """
    if found := _SOCKET.fullmatch(text):
        local, socket = found.groups()
        return Address(_local(local, text), socket=_in_task(socket, text), path=_path(local))
    if found := _ADDRESS.fullmatch(text):
        local, host, port = found.groups()
        return Address(_local(local, text), host.strip("[]"), _number(port, text), path=_path(local))
    return None


def parse_back(text: str) -> Back:
    """`REMOTE`, `REMOTE:LOCAL`, `REMOTE:HOST:LOCAL` or `REMOTE:unix:PATH`; REMOTE may be `unix:PATH`, too.

    There is no colon in that path. Raises UsageError.
    """
    found = _BACK.fullmatch(text)
    if found is None:
        raise UsageError(
            f"{text!r} is not REMOTE:LOCAL, as in --reverse 9000:3000, or REMOTE:HOST:PORT, or REMOTE:unix:PATH."
        )
    remote, path, host, port = found.groups()
    socket = _in_task(remote.removeprefix(UNIX), text) if remote.startswith(UNIX) else None
    if path is None and port is None and socket is not None:
        raise UsageError(f"{text!r} does not say where {socket} leads to here: {text}:PORT, or {text}:unix:PATH.")
    number = 0 if socket is not None else _number(remote, text)
    if path is not None:
        return Back(number, socket=socket, path=_here(path, text))
    return Back(number, (host or "127.0.0.1").strip("[]"), _number(port or remote, text), socket)


def by_kind(addresses: Sequence[Address]) -> list[list[Address]]:
    """The same, those together whose connections have the same sessions."""
    kinds = dict.fromkeys(each.kind for each in addresses)  # in the order in which they were named
    return [[each for each in addresses if each.kind == kind] for kind in kinds]


def _local(text: str, whole: str) -> int:
    return 0 if text.startswith(UNIX) else _number(text, whole, least=0)


def _path(text: str) -> str | None:
    return _here(text.removeprefix(UNIX), text) if text.startswith(UNIX) else None


def _here(path: str, whole: str) -> str:
    if not path or "\0" in path:
        raise UsageError(f"{whole!r} lacks the path of a Unix socket: unix:PATH.")
    return path


def _in_task(path: str, whole: str) -> str:
    if not path.startswith("/") or "\0" in path:
        raise UsageError(f"The path {path!r} of {whole!r} is one in the task: it must begin with a slash.")
    return path


def _number(digits: str, text: str, *, least: int = 1) -> int:
    number = int(digits) if len(digits) <= 6 else 1_000_000
    if not least <= number <= 65535:
        raise UsageError(f"Port {digits} of {text!r} is out of range: it must be {least} to 65535.")
    return number


@dataclass(frozen=True)
class Reversed(Event):
    """A port of the task's loopback leads to this machine, or to what this machine reaches.

    With a path on either side that is a Unix socket, and there is no port.
    """

    event: ClassVar[str] = "reversed"
    remote_port: int
    local_host: str
    local_port: int
    remote_path: str | None = None
    local_path: str | None = None

    @classmethod
    def of(cls, back: Back) -> Reversed:
        """The event for a way back."""
        return cls(back.remote, back.host, back.port, back.socket, back.path)

    def to_json(self) -> dict[str, Any]:
        without = {"remote_path"} if self.remote_path is None else {"remote_port"}
        without |= {"local_path"} if self.local_path is None else {"local_host", "local_port"}
        return {name: value for name, value in super().to_json().items() if name not in without}


class _Stream(TcpStream):
    """A stream whose far end is what `start` says. `broken` is why it could not be opened, or broke."""

    __slots__ = ("broken", "start")

    proto = PROTO_TERMINAL

    def __init__(self, endpoint: UserEndpoint, start: bytes) -> None:
        super().__init__(endpoint, 0)
        self.start = start
        self.broken: ErrorText | None = None

    def refused(self, text: ErrorText) -> None:
        self.broken = _understood(text)


def _understood(text: ErrorText) -> ErrorText:
    """Older tunnel clients know no Unix sockets, and say this of a start that they can't read."""
    return _OLDER if text == WINDOW_PASSED else text


BY_HOST: Final = "host"
"""The path of such connections: the host says of each of them whether it may be."""


class _Beyond(Forwarder):
    """What both have in common: the session, which only a tunnel client that is connected can have."""

    kind: str

    def _path(self) -> str:
        return f"/ws/forward/{self._named}/terminal?beyond={self.kind}"

    def _stream_failed(self, remote_port: int, text: ErrorText) -> None:
        super()._stream_failed(remote_port, _understood(text))

    async def _open(self) -> Link:
        try:
            link = await super()._open()
        except UnavailableError as error:
            if error.code != NO_WAY:
                raise
            raise self._no_way() from error
        if link.version < 2:
            link.close()
            raise self._no_way()
        return link

    def _no_way(self) -> UnavailableError:
        return UnavailableError(
            f"Nothing leads beyond task {self.task}: it has no tunnel client of this version that is connected.",
            code="no_way_beyond",
        )


class BeyondForwarder(_Beyond):
    """Local ports that lead to other addresses which the task reaches, or to Unix sockets in it: all of one kind.

    The rest is as for Forwarder.
    """

    def __init__(
        self,
        task: str,
        addresses: Sequence[Address],
        *,
        settings: Settings,
        local_host: str = LOOPBACK,
        fallback: bool = False,
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> None:
        (self.kind,) = {address.kind for address in addresses}
        ports = [PortForward(address.local, address.port, path=address.path) for address in addresses]
        super().__init__(
            task, ports, settings=settings, local_host=local_host, fallback=fallback, on_event=on_event, any_port=True,
            path=BY_HOST,
        )  # fmt: skip
        self._addresses = list(addresses)
        self._at = local_host, fallback

    async def _listen_everywhere(self) -> None:
        host, fallback = self._at
        for address, port in zip(self._addresses, self.ports, strict=True):
            local = LocalSide(
                self._endpoint, host, self._half_listening, fallback=fallback, made=self._made_for(address)
            )
            for listening in await local.listen([port]):
                listening.remote_host, listening.remote_path = address.host or None, address.socket
                self.listening.append(listening)

    def _made_for(self, address: Address) -> Callable[[], TcpStream]:
        return lambda: _Stream(self._endpoint, address.start)


class BackForwarder(_Beyond):
    """Ports of the task's loopback that lead back to this machine.

    For each some streams wait in the task for somebody to connect; one that has got somebody is the connection.
    """

    kind = "on"

    def __init__(
        self,
        task: str,
        backs: Sequence[Back],
        *,
        settings: Settings,
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> None:
        super().__init__(task, [], settings=settings, on_event=on_event, any_port=True, path=BY_HOST)
        self._tell = on_event
        self._started = False
        self._backs = list(backs)
        self._serving: set[asyncio.Task[None]] = set()
        self._came = self._carried = 0  # connections so far, and now; all other streams wait for one

    @property
    def reversed(self) -> list[Reversed]:
        """Which ways back there are."""
        return [Reversed.of(back) for back in self._backs] if self._started else []

    def stats(self) -> Stats:
        """Totals, of connections alone."""
        return replace(super().stats(), streams=self._carried, opened=self._came)

    def _for_nobody(self) -> int:
        return max(self._endpoint.stream_count - self._carried, 0)

    async def _listen_everywhere(self) -> None:
        """Nothing listens here."""

    def _stream_failed(self, remote_port: int, text: ErrorText) -> None:
        if self._started:  # else `start` raises it
            super()._stream_failed(remote_port, text)

    async def start(self) -> None:
        """Open the session, and have each port listened on. Raises UnavailableError where one can't be."""
        await super().start()
        for back in self._backs:
            listens: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._begin(back, listens)
            await listens
            self._tell(Reversed.of(back))
            for _ in range(WAITING - 1):
                self._begin(back)
        self._started = True

    async def close(self, reason: str = "stopped", *, deliver: bool = False) -> None:
        await cancel_all(self._serving)
        await super().close(reason, deliver=deliver)

    def _begin(self, back: Back, listens: asyncio.Future[None] | None = None) -> None:
        """Have one more stream wait."""
        task = asyncio.get_running_loop().create_task(self._one(back, listens))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _one(self, back: Back, listens: asyncio.Future[None] | None) -> None:
        while True:
            try:
                if await self._waited(back, listens):
                    return
            except (KohakuRiverError, OSError) as error:  # out of descriptors, say: later there are some
                if listens is not None and not listens.done():
                    listens.set_exception(error if isinstance(error, KohakuRiverError) else _no_way_here(error))
                    return
            await asyncio.sleep(AGAIN_SECONDS)

    async def _waited(self, back: Back, listens: asyncio.Future[None] | None) -> bool:
        """Have one stream wait for a connection, and carry that. Whether there was one."""
        stream, reader, writer = await self._stream(back.start)
        try:
            came = await self._until_somebody_comes(reader, stream, listens)
            if came:
                self._begin(back)  # who takes the place of this one
                await self._carry(back, stream, reader, writer)
            return came
        finally:
            writer.close()

    async def _carry(
        self, back: Back, stream: _Stream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._came += 1
        self._carried += 1
        try:
            await _carry(back, stream, reader, writer)
        finally:
            self._carried -= 1

    async def _stream(self, start: bytes) -> tuple[_Stream, asyncio.StreamReader, asyncio.StreamWriter]:
        near, far = socket.socketpair()
        loop = asyncio.get_running_loop()
        stream = _Stream(self._endpoint, start)
        if near.family == socket.AF_INET:
            await loop.create_connection(lambda: stream, sock=far)
            return stream, *await asyncio.open_connection(sock=near)
        await loop.create_unix_connection(lambda: stream, sock=far)
        return stream, *await asyncio.open_unix_connection(sock=near)

    async def _until_somebody_comes(
        self, reader: asyncio.StreamReader, stream: _Stream, listens: asyncio.Future[None] | None
    ) -> bool:
        """Whether they have. Raises UnavailableError where the port is not listened on."""
        if await reader.read(1) != _LISTENS:
            why = str(stream.broken).partition(": ")[2] if stream.broken else "it has ended"
            raise UnavailableError(f"Task {self.task} does not take connections for you: {why}.", code="not_taken")
        if listens is not None and not listens.done():
            listens.set_result(None)
        return await reader.read(1) == _CAME


async def _carry(back: Back, stream: _Stream, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy between a stream and what it leads back to, until both ways have ended or one side has gone."""
    try:
        there, here = await _opened(back)
    except OSError as error:
        stream.failed(error)
        stream.reset()
        return
    try:
        await asyncio.gather(_copy(reader, here, stream), _copy(there, writer))
    except OSError as error:
        stream.failed(error)
        stream.reset()
    finally:
        if stream.broken is not None:
            with contextlib.suppress(OSError):
                here.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        here.close()


async def _opened(back: Back) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if back.path is None:
        return await asyncio.open_connection(back.host, back.port)
    if not hasattr(socket, "AF_UNIX"):
        raise OSError(errno.EAFNOSUPPORT, "this system has no Unix sockets")
    try:
        with address_of(Path(back.path).expanduser()) as address:
            return await asyncio.open_unix_connection(address)
    except UsageError as error:  # the path is longer than this system allows
        raise OSError(errno.ENAMETOOLONG, error.message) from error
    except RuntimeError as error:  # nobody's home
        raise OSError(errno.ENOENT, str(error)) from error


def _no_way_here(error: OSError) -> UnavailableError:
    return UnavailableError(f"No connection can be waited for: {error.strerror or error}.", code="not_taken")


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, of: _Stream | None = None) -> None:
    """Raises OSError where one of the two breaks; `of` is the stream that is read, whose end may be a break, too."""
    while data := await reader.read(PIECE):
        writer.write(data)
        await writer.drain()
    if of is not None and of.broken is not None:
        raise ConnectionResetError(str(of.broken))
    if writer.can_write_eof():
        writer.write_eof()

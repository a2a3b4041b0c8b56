"""A SOCKS5 server whose destinations are the ports of one task (RFC 1928): CONNECT alone, without authentication.

A program says the destination, so one local port is enough for all ports of the task. What is beyond the task is
refused. Programs of this machine may connect and say anything, or nothing: what one says before its connection begins
is a few hundred bytes, bounded in time, and how many are at that is bounded too.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
import struct
from collections.abc import Callable, Sequence

from kohakuriver.text import one_line
from kohakuriver.tunnel.local_socket import TcpStream
from kohakuriver.tunnel.protocol import ErrorText
from kohakuriver.tunnel.states import Do, State
from kohakuriver.tunnel.stream import Action
from kohakuriver.tunnel.user_endpoint import UserEndpoint

__all__ = ["SocksServer"]

HEAD_SECONDS = 10.0
"""How long a program may take to say where it wants to go."""

_VERSION, _CONNECT = 5, 1
_NO_AUTHENTICATION, _NONE_ACCEPTABLE = 0, 0xFF
_IPV4, _NAME, _IPV6 = 1, 3, 4
# Replies (RFC 1928 section 6).
_SUCCEEDED, _FAILED, _NOT_ALLOWED, _REFUSED, _NO_SUCH_COMMAND, _NO_SUCH_ADDRESS = 0, 1, 2, 5, 7, 8
_LOCALHOSTS = ("localhost", "127.0.0.1", "::1")


class _NoSocksError(Exception):
    """What came is no SOCKS5, or no more comes: there is nothing to be answered."""


class _RefusedError(Exception):
    """The request is answered with `reply` and nothing else."""

    def __init__(self, reply: int) -> None:
        super().__init__(reply)
        self.reply = reply


class SocksServer:
    """Does what each local connection wants, over `endpoint`.

    Args:
        task: its name, which is a destination beside `localhost`, 127.0.0.1 and ::1.
        refused: is told of a destination that is not the task: its port, and a sentence.
    """

    def __init__(self, endpoint: UserEndpoint, task: str, refused: Callable[[int, str], None]) -> None:
        self._endpoint = endpoint
        self._task = task
        self._names = {*_LOCALHOSTS, task.lower()}
        self._refused = refused

    async def serve(self, sock: socket.socket) -> None:
        """Hear where the program at `sock`, from now on this object's, wants to go, and connect it to that."""
        try:
            port = await asyncio.wait_for(self._asked(sock), HEAD_SECONDS)
        except _RefusedError as refusal:
            _say(sock, _reply(refusal.reply))
            sock.close()
        except (_NoSocksError, OSError, asyncio.TimeoutError):
            sock.close()
        except BaseException:
            sock.close()
            raise
        else:
            await self._connect(sock, port)

    async def _connect(self, sock: socket.socket, port: int) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(lambda: _SocksStream(self._endpoint, port), sock)
        except OSError:  # the program has gone meanwhile
            sock.close()

    async def _asked(self, sock: socket.socket) -> int:
        """The port that is asked for. No byte is read that is not of the request."""
        version, count = await _read(sock, 2)
        if version != _VERSION:
            raise _NoSocksError
        if _NO_AUTHENTICATION not in await _read(sock, count):
            _say(sock, bytes((_VERSION, _NONE_ACCEPTABLE)))
            raise _NoSocksError
        _say(sock, bytes((_VERSION, _NO_AUTHENTICATION)))
        version, command, _, kind = await _read(sock, 4)
        if version != _VERSION:
            raise _NoSocksError
        name = await _name(sock, kind)
        (port,) = struct.unpack(">H", await _read(sock, 2))
        if command != _CONNECT:
            raise _RefusedError(_NO_SUCH_COMMAND)
        if name.lower().removesuffix(".") not in self._names:
            where = one_line(name)
            self._refused(port, f"{where} is not to be had by SOCKS, which leads to localhost in {self._task} alone")
            raise _RefusedError(_NOT_ALLOWED)
        if port == 0:
            raise _RefusedError(_FAILED)
        return int(port)


async def _name(sock: socket.socket, kind: int) -> str:
    """The destination's name or address. Raises _RefusedError for a kind of address that is none."""
    if kind == _NAME:
        (length,) = await _read(sock, 1)
        return (await _read(sock, length)).decode("utf-8", "replace")
    if kind not in (_IPV4, _IPV6):
        raise _RefusedError(_NO_SUCH_ADDRESS)
    return str(ipaddress.ip_address(await _read(sock, 4 if kind == _IPV4 else 16)))


async def _read(sock: socket.socket, size: int) -> bytes:
    """Exactly so many bytes. Raises _NoSocksError where they don't come."""
    loop = asyncio.get_running_loop()
    found = b""
    while len(found) < size:
        more = await loop.sock_recv(sock, size - len(found))
        if not more:
            raise _NoSocksError
        found += more
    return found


def _say(sock: socket.socket, words: bytes) -> None:
    """Answer with a few bytes; a program that takes none is gone, or none to wait for."""
    with contextlib.suppress(OSError):
        sock.send(words)


def _reply(code: int) -> bytes:
    return bytes((_VERSION, code, 0, _IPV4)) + bytes(6)  # the address that was bound is nobody's business


class _SocksStream(TcpStream):
    """A stream whose local program hears first how its request went."""

    __slots__ = ("_answer",)

    def __init__(self, endpoint: UserEndpoint, port: int) -> None:
        super().__init__(endpoint, port)
        self._answer: int | None = _FAILED  # what it will hear, unless something else happens; None once it has heard

    def act(self, actions: Sequence[Action]) -> None:
        if self._answer is not None and self.core.state is State.OPEN:
            self._answer = _SUCCEEDED
            self._tell()
        super().act(actions)

    def refused(self, text: ErrorText) -> None:
        if self._answer is not None and text.code == "ECONNREFUSED":
            self._answer = _REFUSED

    def _tell(self) -> None:
        """Nothing was written before, so the kernel has room for it."""
        answer, self._answer = self._answer, None
        if answer is not None and self._transport is not None:
            said = _reply(answer)
            if rest := said[self._direct.write(said) :]:
                self._transport.write(rest)

    def _act_locally(self, action: Do) -> None:
        if self._answer is not None and self._transport is not None and action in (Do.RESET_LOCAL, Do.CLOSE_LOCAL):
            self._tell()
            self.close()  # a reset could overtake the answer
            return
        super()._act_locally(action)

"""Port 8002: who connects, what they want, and the relay to the SSH server of a task (docs/protocol.md §7).

A peer that greets with ``SSH-2.0…`` is an OpenSSH that wants a jump host; any other must send a request line. Nobody
is waited for longer than the handshake's time, nor listened to for more than `MAX_REQUEST` bytes, and of those who have
not shown yet that they may come in only so many are kept (`kohakuriver.web.waiting_room`).
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import cast

import structlog

from kohakuriver.asking import Asker, asking, peer_name
from kohakuriver.errors import KohakuRiverError, UsageError
from kohakuriver.limits import Limits
from kohakuriver.proxies import Proxies
from kohakuriver.runtime import cancel_all, until_readable
from kohakuriver.session.carried import Route
from kohakuriver.ssh_proxy.balanced import passed_on
from kohakuriver.ssh_proxy.jump import JumpHost, Keyholders
from kohakuriver.ssh_proxy.session import Connector, Opened, TaskConnection
from kohakuriver.text import printable
from kohakuriver.web.waiting_room import WaitingRoom

__all__ = ["SshProxy"]

log = structlog.get_logger("kohakuriver.ssh_proxy")

REQUEST = b"REQUEST_TUNNEL"
MAX_REQUEST = 4096
# Who logs in may have to type something.
LOGIN_FACTOR = 3
BACKLOG = 1024
FAREWELL_SECONDS = 2.0
MAX_IGNORED = 64 * 1024
NO_FILES_SECONDS = 0.2

# A user who vanished without a word is noticed after some two minutes; idle connections live on.
KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 4}

Authorize = Callable[["str | None", str, "int | None"], Awaitable[Route]]


class SshProxy:
    """Serves the SSH proxy on `sock`, a bound TCP socket.

    Args:
        authorize: (token or None, task's id or name, port or None) → where that port is, or without one the task's SSH
            server. Raises KohakuRiverError.
        keyholders: who a jump host lets in by a public key, and where to.
        check_user: the same for a token as password; raises KohakuRiverError for one that is not valid.
        host_keys: the directory with the jump host's own keys, made if need be.
        trusted: how runners that serve TLS are checked; None for the system's authorities.
        limits: what a connection may take.
        balancers: who sends a PROXY header first; None for nobody.
        algorithms: what the jump host offers, by name. UsageError where that can't be had here.
    """

    def __init__(
        self,
        sock: socket.socket,
        *,
        authorize: Authorize,
        keyholders: Keyholders,
        check_user: Callable[[str], Awaitable[object]],
        host_keys: Path,
        trusted: ssl.SSLContext | None = None,
        limits: Limits | None = None,
        opened: Opened = lambda _seconds, _error: None,
        balancers: Proxies | None = None,
        algorithms: str = "all",
    ) -> None:
        limits = limits or Limits()
        self._sock = sock
        self._balancers = balancers or Proxies()
        self._authorize = authorize
        self._greeting_seconds = limits.handshake_timeout
        self._connector = Connector(trusted=trusted, limits=limits, opened=opened)
        self._jump_host = JumpHost(
            host_keys,
            authorize=authorize,
            keyholders=keyholders,
            check_user=check_user,
            connector=self._connector,
            login_seconds=LOGIN_FACTOR * limits.handshake_timeout,
            handshakes=limits.max_handshakes,
            algorithms=algorithms,
        )
        self._accepting: asyncio.Task[None] | None = None
        self._room = WaitingRoom(limits.max_waiting)
        self._serving: set[asyncio.Task[None]] = set()

    @property
    def waiting(self) -> int:
        """How many peers have not shown yet that they may come in; those who may not, and linger, among them."""
        return len(self._room)

    def snapshot(self) -> dict[str, int]:
        """Connections now, and bytes passed since the start."""
        return self._connector.carrier.snapshot()

    def start(self) -> None:
        """Begin to accept connections."""
        self._sock.setblocking(False)
        self._sock.listen(BACKLOG)
        self._accepting = asyncio.get_running_loop().create_task(self._accept())

    async def stop_listening(self) -> None:
        """Accept nothing more: the port is another's. What there is goes on."""
        await cancel_all([self._accepting] if self._accepting else [])
        self._sock.close()

    async def close(self) -> None:
        """Accept nothing more and end what there is."""
        await self.stop_listening()
        await cancel_all(self._serving)
        self._connector.close()
        await self._jump_host.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                peer, _ = await loop.sock_accept(self._sock)
            except OSError as error:  # out of file descriptors, most likely: some will be free again
                log.warning("the SSH proxy can't accept a connection", reason=str(error))
                await asyncio.sleep(NO_FILES_SECONDS)
                continue
            task = loop.create_task(self._serve(peer))
            self._serving.add(task)
            self._room.enter(task, task.cancel)
            task.add_done_callback(self._served)

    def _served(self, task: asyncio.Task[None]) -> None:
        self._serving.discard(task)
        self._room.leave(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a connection to the SSH proxy failed", exc_info=error)

    def _admitted(self) -> None:
        """The peer whose task runs is no stranger any more."""
        task = asyncio.current_task()
        assert task is not None
        self._room.leave(task)

    async def _serve(self, peer: socket.socket) -> None:
        handed_over = False
        try:
            _keep_alive(peer)
            deadline = asyncio.get_running_loop().time() + self._greeting_seconds
            peer.setblocking(False)
            name = await self._who(peer)
            first = await _first_byte(peer, deadline - asyncio.get_running_loop().time())
            handed_over = bool(first)
            if first == b"S":
                # Whoever may shake hands waits in a room of the jump host's own.
                await self._jump_host.serve(peer, name, on_turn=self._admitted)
            elif first:
                await self._relay(peer, name, deadline)
        except OSError:
            pass  # the peer has gone
        except UsageError as error:
            log.warning("a balancer was refused at the SSH port", peer=peer_name(peer.getpeername()), reason=str(error))
        finally:
            if not handed_over:
                peer.close()

    async def _who(self, peer: socket.socket) -> str:
        """Who connects; raises UsageError where a balancer does not say that, ConnectionError where it says nothing."""
        address = peer.getpeername()
        if not self._balancers or not self._balancers.trusts(address[0]):
            return peer_name(address)
        try:
            return peer_name(await asyncio.wait_for(passed_on(peer), self._greeting_seconds) or address)
        except asyncio.TimeoutError:
            raise ConnectionAbortedError from None

    async def _relay(self, peer: socket.socket, name: str, deadline: float) -> None:
        loop = asyncio.get_running_loop()
        greeting = Greeting()
        try:
            transport = (await loop.connect_accepted_socket(lambda: greeting, peer))[0]
        except BaseException:
            peer.close()
            raise
        try:
            task, token = await greeting.request(deadline - loop.time())
            connection = await self._connect(greeting, name, task, token)
        except asyncio.TimeoutError:
            await greeting.farewell(f"No request came within {self._greeting_seconds:g} s.")
        except KohakuRiverError as error:
            log.info("SSH connection refused", peer=name, reason=error.message)
            await greeting.farewell(error.message)
        except BaseException:
            transport.abort()
            raise
        else:
            if connection is not None:
                _hand_over(greeting, connection)

    async def _connect(self, greeting: Greeting, peer: str, task: str, token: str | None) -> TaskConnection | None:
        """The connection to the task's SSH server, or None when the peer went meanwhile."""
        with asking(Asker(peer, f"REQUEST_TUNNEL {task}")):
            route = await self._authorize(token, task, None)
        self._admitted()
        connection = self._connector.connection(route, peer)
        await connection.open()
        if greeting.gone:
            connection.abandon()
            return None
        return connection


def _hand_over(greeting: Greeting, connection: TaskConnection) -> None:
    """From here on every byte goes between the peer and the task."""
    transport, stream = greeting.transport, connection.stream
    # Without a limit of 0 a transport may keep this line back, and the stream's direct writes would overtake it.
    transport.set_write_buffer_limits(high=0)
    transport.write(b"SUCCESS\n")
    transport.set_protocol(stream)
    stream.connection_made(transport)
    transport.resume_reading()
    stream.feed(greeting.rest)
    if greeting.ended:
        stream.eof_received()


class Greeting(asyncio.Protocol):
    """Reads one request line; holds what came behind it, which already belongs to SSH."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport = cast(asyncio.Transport, None)
        self.rest = b""
        self.gone = False
        self.ended = False
        self._deaf = False
        self._ignored = 0
        self._line: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def request(self, timeout: float) -> tuple[str, str | None]:
        """The task and the token that the peer sent, within `timeout` seconds.

        Raises asyncio.TimeoutError, ConnectionError when the peer goes, and UsageError for anything else that it sends.
        """
        words = (await asyncio.wait_for(self._line, max(timeout, 0))).split()
        if not 2 <= len(words) <= 3 or words[0] != REQUEST:
            raise UsageError("The request must be `REQUEST_TUNNEL <task> <token>`, or SSH of a client with `ssh -J`.")
        try:
            task, token = words[1].decode(), words[2].decode() if len(words) == 3 else None
        except UnicodeDecodeError:
            raise UsageError("The request is not text in UTF-8.") from None
        return task, token

    async def farewell(self, message: str) -> None:
        """Say why not, and close.

        What the peer still sends is read and forgotten, as long as it is little: closing on top of it would reset the
        connection, and the peer might never see the reason.
        """
        if self.gone:
            return
        self._deaf = True
        try:
            self.transport.write(f"ERROR {printable(' '.join(message.split()))}\n".encode())
            if self.ended:
                self.transport.close()
            else:
                self.transport.write_eof()  # raises OSError where the peer has reset the connection
                self.transport.resume_reading()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._lost), FAREWELL_SECONDS)
        finally:
            self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            self._ignored += len(data)
            if self._ignored > MAX_IGNORED:
                self.transport.abort()
            return
        self.rest += data
        if self._line.done():
            return
        line, newline, behind = self.rest.partition(b"\n")
        if newline and len(line) < MAX_REQUEST:
            self.rest = behind
            self._line.set_result(line)
        elif len(self.rest) >= MAX_REQUEST:
            self.rest = b""
            self._line.set_exception(UsageError(f"The request line has more than {MAX_REQUEST} bytes."))
        else:
            return
        self.transport.pause_reading()

    def eof_received(self) -> bool:
        self.ended = True
        if self._deaf:
            return False
        if not self._line.done():
            self._line.set_exception(ConnectionResetError())
            return False
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone = True
        if not self._line.done():
            self._line.set_exception(ConnectionResetError())
        if not self._lost.done():
            self._lost.set_result(None)


async def _first_byte(peer: socket.socket, timeout: float) -> bytes:
    """The first byte that a peer sends, left where it is; empty when it sends none within `timeout` seconds."""
    try:
        await asyncio.wait_for(until_readable(peer), timeout)
        return peer.recv(1, socket.MSG_PEEK)
    except asyncio.TimeoutError:
        return b""


def _keep_alive(peer: socket.socket) -> None:
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

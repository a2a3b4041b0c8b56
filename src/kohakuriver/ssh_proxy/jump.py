"""An SSH jump host for people without our program: ``ssh -J host:8002 root@<task>`` (docs/protocol.md §7).

It opens connections to tasks and does nothing else: no shell, no forwarding of any other kind.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import asyncssh
import structlog
from asyncssh.kex import get_kex_algs

from kohakuriver.asking import Asker, asking, peer_name
from kohakuriver.config import write_private
from kohakuriver.errors import KohakuRiverError, UnavailableError
from kohakuriver.session.carried import Route
from kohakuriver.ssh_proxy.session import Connector, TaskConnection
from kohakuriver.tunnel.tcp import TcpStream

__all__ = ["JumpHost", "Keyholders"]

log = structlog.get_logger("kohakuriver.ssh_proxy")

MAX_TRIES = 30
KEEPALIVE_SECONDS = 30

# What `tunnel-sshd` takes too: no client that can talk to a task is refused here, and nothing older is offered.
KEY_EXCHANGES = ["mlkem768x25519-sha256", "curve25519-sha256", "curve25519-sha256@libssh.org"]
CIPHERS = ["aes256-gcm@openssh.com", "aes128-gcm@openssh.com", "chacha20-poly1305@openssh.com"]
MACS = ["hmac-sha2-256-etm@openssh.com"]
USER_KEYS = [
    "ssh-ed25519",
    "sk-ssh-ed25519@openssh.com",
    "ecdsa-sha2-nistp256",
    "ecdsa-sha2-nistp384",
    "sk-ecdsa-sha2-nistp256@openssh.com",
    "rsa-sha2-512",
    "rsa-sha2-256",
]

NO_SHELL = "this is only a jump host: use `ssh -J` with it, and a task's name as the destination"

Reach = Callable[[str, "int | None"], Awaitable[Route]]
"""A task's id or name, and a port or None for its SSH server → where that is, for one user. Raises KohakuRiverError."""

Keyholders = Callable[[str], Awaitable["Reach | None"]]
"""A public key (type and base64) → what its holder may reach, None for an unknown key."""


class JumpHost:
    """The part of the SSH proxy that is an SSH server; `serve` takes its connections one by one."""

    def __init__(
        self,
        host_key: Path,
        *,
        authorize: Callable[[str | None, str, int | None], Awaitable[Route]],
        keyholders: Keyholders,
        check_user: Callable[[str], Awaitable[object]],
        connector: Connector,
        login_seconds: float,
    ) -> None:
        self.authorize = authorize
        self.connector = connector
        self._login_seconds = login_seconds
        self.keyholders = keyholders
        self.check_user = check_user
        self._host_key = _load_or_make(host_key)
        self._connections: set[asyncssh.SSHServerConnection] = set()
        # What strangers send to an open port is no news; what we refuse is told by our own log.
        logging.getLogger("asyncssh").setLevel(logging.CRITICAL)

    async def serve(self, peer: socket.socket, *, on_login: Callable[[], None]) -> None:
        """Be the SSH server of one connected socket, until it closes; `on_login` is called once a user is known."""
        try:
            connection = await asyncssh.run_server(
                peer,
                server_factory=lambda: _Login(self),
                server_host_keys=[self._host_key],
                login_timeout=self._login_seconds,
                keepalive_interval=KEEPALIVE_SECONDS,
                kex_algs=_known_exchanges(),
                encryption_algs=CIPHERS,
                mac_algs=MACS,
                signature_algs=USER_KEYS,
                compression_algs=["none"],
                kbdint_auth=False,
                gss_host=None,
                allow_pty=False,
                agent_forwarding=False,
            )
        except (asyncssh.Error, OSError, ValueError) as error:
            # The last is what the library's parsers raise for bytes that are no SSH: a stranger's, and no news either.
            log.debug("no SSH login", reason=str(error))
            return
        except KohakuRiverError as error:
            log.warning("an SSH login could not be judged", reason=error.message)
            return
        on_login()
        self._connections.add(connection)
        try:
            await connection.wait_closed()
        finally:
            self._connections.discard(connection)

    async def close(self) -> None:
        """End every connection."""
        for connection in list(self._connections):
            connection.abort()


class _Login(asyncssh.SSHServer):
    """One connection: who it is, and what it may reach."""

    def __init__(self, host: JumpHost) -> None:
        self._host = host
        self._peer = "?"
        self._gone = False
        self._tries = 0
        self._shown: Reach | None = None  # by the credential that was shown last, which may not be proven yet
        self._reach: Reach | None = None

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._peer = peer_name(conn.get_extra_info("peername"))

    def connection_lost(self, exc: Exception | None) -> None:
        self._gone = True

    def begin_auth(self, username: str) -> bool:
        return True

    def auth_completed(self) -> None:
        self._reach = self._shown

    def password_auth_supported(self) -> bool:
        return True

    def _count_try(self) -> None:
        self._tries += 1
        if self._tries > MAX_TRIES:
            raise asyncssh.DisconnectError(asyncssh.DISC_NO_MORE_AUTH_METHODS_AVAILABLE, "too many tries")

    async def validate_password(self, username: str, password: str) -> bool:
        self._count_try()
        with contextlib.suppress(KohakuRiverError), asking(Asker(self._peer, "ssh login")):
            await self._host.check_user(password)
            self._shown = lambda task, port: self._host.authorize(password, task, port)
            return True
        return False

    def public_key_auth_supported(self) -> bool:
        return True

    async def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        self._count_try()
        text = b" ".join(key.export_public_key().split()[:2]).decode()
        with asking(Asker(self._peer, "ssh login")):
            self._shown = await self._host.keyholders(text)
        return self._shown is not None

    def session_requested(self) -> bool:
        raise asyncssh.ChannelOpenError(asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED, NO_SHELL)

    def connection_requested(
        self, dest_host: str, dest_port: int, orig_host: str, orig_port: int
    ) -> Awaitable[asyncssh.SSHTCPSession[bytes]]:
        return self._connect(dest_host, dest_port)

    async def _connect(self, task: str, port: int) -> asyncssh.SSHTCPSession[bytes]:
        try:
            if self._reach is None or not 1 <= port <= 65535:
                raise UnavailableError(f"Port {port} of {task} can't be reached from here.")
            # 22 stands for the task's SSH server, wherever that listens.
            with asking(Asker(self._peer, f"ssh -J {task}:{port}")):
                route = await self._reach(task, None if port == 22 else port)
            connection = self._host.connector.connection(route, self._peer)
            await connection.open()
            if self._gone:  # asyncssh drops the channel without a word to anybody
                connection.abandon()
                raise UnavailableError("The SSH connection has ended.")
        except KohakuRiverError as error:
            log.info("SSH connection refused", task=task, reason=error.message)
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_CONNECT_FAILED, error.message) from error
        return _Session(connection)


class _Session(asyncssh.SSHTCPSession[bytes]):
    """One direct-tcpip channel, as the transport of a stream."""

    def __init__(self, connection: TaskConnection) -> None:
        self._stream: TcpStream = connection.stream

    def connection_made(self, chan: asyncssh.SSHTCPChannel[bytes]) -> None:
        self._stream.connection_made(_Channel(chan))

    def data_received(self, data: bytes, datatype: asyncssh.DataType) -> None:
        self._stream.feed(data)

    def eof_received(self) -> bool:
        return self._stream.eof_received()

    def pause_writing(self) -> None:
        self._stream.pause_writing()

    def resume_writing(self) -> None:
        self._stream.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stream.connection_lost(exc)


class _Channel(asyncio.Transport):
    """An SSH channel with the face of a transport. It shows no socket: that one is every channel's."""

    def __init__(self, channel: asyncssh.SSHTCPChannel[bytes]) -> None:
        super().__init__()
        self._channel = channel

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return default

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._channel.set_write_buffer_limits(high, low)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._channel.write(bytes(data))

    def write_eof(self) -> None:
        self._channel.write_eof()

    def pause_reading(self) -> None:
        self._channel.pause_reading()

    def resume_reading(self) -> None:
        self._channel.resume_reading()

    def is_closing(self) -> bool:
        return self._channel.is_closing()

    def close(self) -> None:
        self._channel.close()

    def abort(self) -> None:
        self._channel.abort()


def _known_exchanges() -> list[str]:
    """ML-KEM is not in every version of the libraries."""
    known = {name.decode() for name in get_kex_algs()}
    return [name for name in KEY_EXCHANGES if name in known]


def _load_or_make(path: Path) -> asyncssh.SSHKey:
    if not path.exists():
        key = asyncssh.generate_private_key("ssh-ed25519", comment="kohakuriver jump host")
        write_private(path, key.export_private_key().decode())
    return asyncssh.read_private_key(path)

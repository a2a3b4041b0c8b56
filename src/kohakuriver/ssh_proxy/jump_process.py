"""The jump host's process: ``python -m kohakuriver.ssh_proxy.jump_process CONTROL LOGIN_SECONDS ALGORITHMS HOST_KEY…``.

It speaks SSH with whoever the host hands over, and asks the host about the rest (`kohakuriver.ssh_proxy.control`).
It opens connections to tasks and does nothing else: no shell, no forwarding of any other kind.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Awaitable
from typing import cast

import asyncssh

from kohakuriver import runtime
from kohakuriver.ssh_proxy.algorithms import ALGORITHMS, Algorithms
from kohakuriver.ssh_proxy.control import Control, Message

__all__ = ["main"]

MAX_TRIES = 30
LONGEST_SECRET = 4096
LONGEST_NAME = 1024
KEEPALIVE_SECONDS = 30

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


class _Server:
    """All connections, and the questions to the host that are not answered yet."""

    def __init__(self, host_keys: list[str], login_seconds: float, algorithms: Algorithms) -> None:
        self._algorithms = algorithms
        self._exchanges = algorithms.known
        self._host_keys = [asyncssh.read_private_key(path) for path in host_keys]
        self._login_seconds = login_seconds
        self._control: Control | None = None
        self._questions: dict[int, asyncio.Future[socket.socket | None]] = {}
        self._asked = 0
        self._serving: dict[int, asyncio.Task[None]] = {}
        self._host_gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self, control: socket.socket) -> None:
        """Serve until the host ends."""
        self._control = Control(control, self._received, lambda: self._host_gone.set_result(None))
        await self._host_gone

    def _received(self, message: Message, sock: socket.socket | None) -> None:
        if "peer" in message:
            assert sock is not None
            number = message["peer"]
            self._serving[number] = asyncio.get_running_loop().create_task(self._serve(number, sock))
        elif "drop" in message:
            if serving := self._serving.get(message["drop"]):
                serving.cancel()
        else:
            self._answered(message, sock)

    def _answered(self, message: Message, sock: socket.socket | None) -> None:
        question = self._questions.pop(message["answer"], None)
        if question is None or question.done():  # who asked has gone
            if sock is not None:
                sock.close()
        elif message["error"] is not None:
            question.set_exception(_Refused(message["error"]))
        else:
            question.set_result(sock)

    def tell(self, number: int, what: Message) -> None:
        """Tell the host something about a connection."""
        if self._control is not None:
            self._control.send({"of": number, **what})

    async def ask(self, number: int, what: Message) -> socket.socket | None:
        """Ask the host. Raises _Refused with its words."""
        self._asked += 1
        asked = self._asked
        question: asyncio.Future[socket.socket | None] = asyncio.get_running_loop().create_future()
        self._questions[asked] = question
        try:
            self.tell(number, {"ask": asked, **what})
            return await question
        finally:
            self._questions.pop(asked, None)

    async def _serve(self, number: int, peer: socket.socket) -> None:
        try:
            connection = await asyncssh.run_server(
                peer,
                server_factory=lambda: _Login(self, number),
                server_host_keys=self._host_keys,
                login_timeout=self._login_seconds,
                keepalive_interval=KEEPALIVE_SECONDS,
                kex_algs=self._exchanges,
                encryption_algs=self._algorithms.ciphers,
                mac_algs=self._algorithms.macs,
                signature_algs=USER_KEYS,
                compression_algs=["none"],
                kbdint_auth=False,
                gss_host=None,
                allow_pty=False,
                agent_forwarding=False,
            )
            try:
                await connection.wait_closed()
            finally:
                connection.abort()
        except (asyncssh.Error, OSError, ValueError):
            pass  # the last is what the library's parsers raise for bytes that are no SSH: a stranger's, and no news
        finally:
            del self._serving[number]
            self.tell(number, {"over": True})


class _Refused(Exception):
    """The host said no."""


class _Login(asyncssh.SSHServer):
    """One connection."""

    def __init__(self, server: _Server, number: int) -> None:
        self._server = server
        self._number = number
        self._tries = 0

    def begin_auth(self, username: str) -> bool:
        return True

    def auth_completed(self) -> None:
        self._server.tell(self._number, {"in": True})

    async def _try(self, what: Message) -> bool:
        self._tries += 1
        if self._tries > MAX_TRIES:
            raise asyncssh.DisconnectError(asyncssh.DISC_NO_MORE_AUTH_METHODS_AVAILABLE, "too many tries")
        try:
            await self._server.ask(self._number, what)
        except _Refused:
            return False
        return True

    def password_auth_supported(self) -> bool:
        return True

    async def validate_password(self, username: str, password: str) -> bool:
        return len(password) <= LONGEST_SECRET and await self._try({"password": password})

    def public_key_auth_supported(self) -> bool:
        return True

    async def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        text = b" ".join(key.export_public_key().split()[:2]).decode()
        return len(text) <= LONGEST_SECRET and await self._try({"key": text})

    def session_requested(self) -> bool:
        raise asyncssh.ChannelOpenError(asyncssh.OPEN_ADMINISTRATIVELY_PROHIBITED, NO_SHELL)

    def connection_requested(
        self, dest_host: str, dest_port: int, orig_host: str, orig_port: int
    ) -> Awaitable[asyncssh.SSHTCPSession[bytes]]:
        return self._connect(dest_host, dest_port)

    async def _connect(self, task: str, port: int) -> asyncssh.SSHTCPSession[bytes]:
        try:
            if len(task) > LONGEST_NAME:
                raise _Refused("There is no task of that name.")
            sock = await self._server.ask(self._number, {"task": task, "port": port})
        except _Refused as refusal:
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_CONNECT_FAILED, str(refusal)) from refusal
        assert sock is not None
        local = _Local()
        await asyncio.get_running_loop().create_unix_connection(lambda: local, sock=sock)
        return _Session(local)


class _Session(asyncssh.SSHTCPSession[bytes]):
    """One direct-tcpip channel, joined to the socket that the host gave for it. Each direction ends by itself."""

    def __init__(self, local: _Local) -> None:
        self._local = local

    def __del__(self) -> None:
        self._local.transport.close()  # asyncssh drops a channel whose connection has gone without a word to it

    def connection_made(self, chan: asyncssh.SSHTCPChannel[bytes]) -> None:
        self._channel = chan

    def session_started(self) -> None:
        self._local.join(self._channel)

    def data_received(self, data: bytes, datatype: asyncssh.DataType) -> None:
        self._local.transport.write(data)

    def eof_received(self) -> bool:
        self._local.client_at_end = True
        self._local.transport.write_eof()
        return not self._local.at_end

    def pause_writing(self) -> None:
        self._local.transport.pause_reading()

    def resume_writing(self) -> None:
        self._local.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._local.transport.close()


class _Local(asyncio.Protocol):
    """The socket's side of a channel."""

    transport: asyncio.Transport

    def __init__(self) -> None:
        self._channel: asyncssh.SSHTCPChannel[bytes] | None = None
        self._early = b""
        self._over = False
        self.at_end = False
        self.client_at_end = False

    def join(self, channel: asyncssh.SSHTCPChannel[bytes]) -> None:
        """The channel is there; it gets what the task has said already."""
        self._channel = channel
        if self._early:
            channel.write(self._early)
            self.transport.resume_reading()
        if self.at_end:
            channel.write_eof()
        if self._over:
            channel.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._channel is None:
            self._early += data
            self.transport.pause_reading()
        elif not self._channel.is_closing():
            self._channel.write(data)

    def eof_received(self) -> bool:
        self.at_end = True
        if self._channel is not None and not self._channel.is_closing():
            self._channel.write_eof()
        return not self.client_at_end

    def pause_writing(self) -> None:
        if self._channel is not None:
            self._channel.pause_reading()

    def resume_writing(self) -> None:
        if self._channel is not None:
            self._channel.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._over = True
        if self._channel is not None:
            self._channel.close()


def main() -> None:
    """Run the process."""
    control, login_seconds, algorithms, *host_keys = sys.argv[1:]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the host ends, and this process with it
    # What strangers send to an open port is no news; what is refused is told by the host's log.
    logging.getLogger("asyncssh").setLevel(logging.CRITICAL)

    async def serve() -> None:
        server = _Server(host_keys, float(login_seconds), ALGORITHMS[algorithms])
        runtime.freeze_heap()
        await server.run(socket.socket(fileno=int(control)))

    runtime.run(serve())


if __name__ == "__main__":
    main()

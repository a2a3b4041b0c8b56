"""An SSH jump host for people without our program: ``ssh -J host:8002 root@<task>`` (docs/protocol.md §7).

SSH itself is spoken by a process of its own (`jump_process`), so no stranger's cryptography shares an event loop with
what users send. That process knows no rights and reaches no task: it asks here, and is given sockets.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from kohakuriver import host_keys as keys
from kohakuriver.asking import Asker, asking
from kohakuriver.errors import KohakuRiverError, UnauthenticatedError, UnavailableError
from kohakuriver.runtime import cancel_all
from kohakuriver.session.carried import Route
from kohakuriver.ssh_proxy.algorithms import check
from kohakuriver.ssh_proxy.control import Control, Message, pair
from kohakuriver.ssh_proxy.session import Connector
from kohakuriver.ssh_proxy.turnstile import Turnstile
from kohakuriver.web.waiting_room import WaitingRoom

__all__ = ["JumpHost", "Keyholders", "Reach"]

log = structlog.get_logger("kohakuriver.ssh_proxy")

MOST_STRANGERS = 128
"""Connections that have not logged in; when there is one more, the oldest is evicted."""
MOST_STRANGERS_OF_SOURCE = 32
TRIES = 6
"""Keys and tokens that may be tried for each connection that may be made, in a second."""
LONGEST_GREETING = 64 * 1024
END_SECONDS = 2.0
RESTART_SECONDS = 1.0

UNKNOWN = UnauthenticatedError("Nobody is let in by that.")
GONE = UnavailableError("The SSH connection has ended.")

Reach = Callable[[str, "int | None"], Awaitable[Route]]
"""A task's id or name, and a port or None for its SSH server → where that is, for one user. Raises KohakuRiverError."""

Keyholders = Callable[[str], Awaitable["Reach | None"]]
"""A public key (type and base64) → what its holder may reach, None for an unknown key."""


class Visit:
    """One connection to the jump host: who it is, and what it may reach."""

    def __init__(self, name: str, on_login: Callable[[], None]) -> None:
        self.name = name
        self.source = Asker(name).origin
        self.shown: Reach | None = None  # by the credential that was asked about last, which may not be proven yet
        self.reach: Reach | None = None
        self.on_login = on_login
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def end(self) -> None:
        """The connection is over."""
        if not self.over.done():
            self.over.set_result(None)


class JumpHost:
    """The part of the SSH proxy that is an SSH server; `serve` takes its connections one by one.

    Args:
        host_keys: the directory with its own keys, made if need be. OSError or ValueError where one can't be read.
        authorize, keyholders, check_user, connector: as for `SshProxy`.
        login_seconds: how long a login may take.
        handshakes: how many connections a second one source may make.
        algorithms: by name, as `algorithms.check` takes it and raises for it.
    """

    def __init__(
        self,
        host_keys: Path,
        *,
        authorize: Callable[[str | None, str, int | None], Awaitable[Route]],
        keyholders: Keyholders,
        check_user: Callable[[str], Awaitable[object]],
        connector: Connector,
        login_seconds: float,
        handshakes: float,
        algorithms: str,
    ) -> None:
        chosen = check(algorithms)
        self.algorithms = algorithms
        self.keyholders = keyholders
        files = {kind: host_keys / f"ssh_host_{kind}_key" for kind in ("ed25519", "ecdsa")}
        keys.ed25519(files["ed25519"])
        keys.ecdsa(files["ecdsa"])
        self._host_keys = [files[kind] for kind in chosen.host_keys]
        self._authorize = authorize
        self._check_user = check_user
        self._connector = connector
        self._login_seconds = login_seconds
        self._handshakes = Turnstile(handshakes, login_seconds / 3)
        self._tries = Turnstile(handshakes * TRIES, login_seconds)
        self._strangers = WaitingRoom(MOST_STRANGERS, MOST_STRANGERS_OF_SOURCE)
        self._process = _Process(self)
        self._answering: set[asyncio.Task[None]] = set()
        self._last = 0
        self.visits: dict[int, Visit] = {}

    async def serve(self, peer: socket.socket, name: str, *, on_turn: Callable[[], None]) -> None:
        """Have one connected socket served until it closes. `on_turn` is called once the handshake may begin.

        Takes the socket over. `name` is the peer's, as address and port.
        """
        task = asyncio.current_task()
        assert task is not None
        visit = Visit(name, lambda: self._strangers.leave(task))
        self._last += 1
        number = self._last
        try:
            with peer:
                await self._turn(peer, visit)
                on_turn()
                self._strangers.enter(task, task.cancel, visit.source)
                control = await self._process.control()
                self.visits[number] = visit
                control.send({"peer": number}, peer.dup())
            try:
                await visit.over
            finally:
                control.send({"drop": number})
        except UnavailableError as error:
            log.debug("no SSH login", peer=name, reason=error.message)
        finally:
            visit.end()
            self.visits.pop(number, None)
            self._strangers.leave(task)

    async def _turn(self, peer: socket.socket, visit: Visit) -> None:
        """Wait until a handshake may begin. Raises UnavailableError, and has told the peer, where it may not."""
        try:
            await self._handshakes.turn(visit.source)
        except UnavailableError as error:
            with contextlib.suppress(OSError):
                # A server may say something before its version line (RFC 4253 §4.2). What nobody has read would have
                # the system throw it away.
                peer.recv(LONGEST_GREETING)
                peer.send(f"{error.message}\r\n".encode())
            raise

    async def close(self) -> None:
        """End every connection, and the process."""
        await cancel_all(self._answering)
        await self._process.close()

    # -- what the process says ---------------------------------------------------------------------------------

    def received(self, control: Control, message: Message) -> None:
        """A message of the process."""
        visit = self.visits.get(message["of"])
        if visit is None:  # it was dropped meanwhile
            return
        if "over" in message:
            visit.end()
        elif "in" in message:
            visit.reach = visit.shown
            visit.on_login()
        else:
            answering = asyncio.get_running_loop().create_task(self._answer(control, visit, message))
            self._answering.add(answering)
            answering.add_done_callback(self._answering.discard)

    def lost(self) -> None:
        """The process has ended."""
        for visit in self.visits.values():
            visit.end()

    async def _answer(self, control: Control, visit: Visit, message: Message) -> None:
        error, sock = None, None
        try:
            if "task" in message:
                sock = await self._connect(visit, message["task"], message["port"])
            else:
                await self._tries.turn(visit.source)
                with asking(Asker(visit.name, "ssh login")):
                    visit.shown = await self._shown(message)
        except KohakuRiverError as refusal:
            error = refusal.message
        except Exception:
            log.exception("a question of the jump host could not be answered")
            error = "The host has a problem; its log says more."
        control.send({"answer": message["ask"], "error": error}, sock)

    async def _shown(self, message: Message) -> Reach:
        """What the holder of a credential may reach. Raises KohakuRiverError for one that lets nobody in."""
        if "key" in message:
            reach = await self.keyholders(message["key"])
            if reach is None:
                raise UNKNOWN
            return reach
        token = message["password"]
        await self._check_user(token)
        return lambda task, port: self._authorize(token, task, port)

    async def _connect(self, visit: Visit, task: str, port: int) -> socket.socket:
        """A socket that leads to a port of a task, 22 being where its SSH server is."""
        try:
            if visit.reach is None or not 1 <= port <= 65535:
                raise UnavailableError(f"Port {port} of {task} can't be reached from here.")
            with asking(Asker(visit.name, f"ssh -J {task}:{port}")):
                route = await visit.reach(task, None if port == 22 else port)
            connection = self._connector.connection(route, visit.name)
            await connection.open()
            if visit.over.done():
                connection.abandon()
                raise GONE
        except KohakuRiverError as error:
            log.info("SSH connection refused", task=task, reason=error.message)
            raise
        ours, theirs = socket.socketpair()
        try:
            await asyncio.get_running_loop().create_unix_connection(lambda: connection.stream, sock=ours)
        except BaseException:
            theirs.close()
            raise
        return theirs


class _Process:
    """The process that speaks SSH: started when it is needed first, and again where it has ended."""

    def __init__(self, host: JumpHost) -> None:
        self._host = host
        self._starting = asyncio.Lock()
        self._control: Control | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._not_before = 0.0
        self._closed = False

    async def control(self) -> Control:
        """The connection to it. Raises UnavailableError where it can't be started."""
        async with self._starting:
            if self._control is None or self._control.closed:
                await self._start()
            assert self._control is not None
            return self._control

    async def _start(self) -> None:
        loop = asyncio.get_running_loop()
        if self._closed or loop.time() < self._not_before:
            raise UnavailableError("The jump host's process has ended; try again in a second.")
        self._not_before = loop.time() + RESTART_SECONDS
        await self._end()
        ours, theirs = pair()
        with theirs:
            settings = [theirs.fileno(), self._host._login_seconds, self._host.algorithms, *self._host._host_keys]
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *[sys.executable, "-m", "kohakuriver.ssh_proxy.jump_process", *map(str, settings)],
                    pass_fds=[theirs.fileno()],
                    env=_environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                )
            except OSError as error:
                ours.close()
                raise UnavailableError(f"The jump host's process can't be started: {error}.") from error
        control = Control(ours, lambda message, _: self._host.received(control, message), self._lost)
        self._control = control

    def _lost(self) -> None:
        if not self._closed:
            log.error("the jump host's process ended; the next connection starts it again")
        self._host.lost()

    async def close(self) -> None:
        """End it."""
        self._closed = True
        await self._end()

    async def _end(self) -> None:
        if self._control is not None:
            self._control.close()  # which it takes for its end
        if self._process is not None:
            try:
                await asyncio.wait_for(self._process.wait(), END_SECONDS)
            except asyncio.TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()
                await self._process.wait()
            self._process = None


def _environment() -> dict[str, str]:
    """What is the host's own, its tokens for one, is none of that process's business."""
    kept = ("KOHAKURIVER_LOOP",)
    return {name: value for name, value in os.environ.items() if name in kept or not name.startswith("KOHAKURIVER_")}

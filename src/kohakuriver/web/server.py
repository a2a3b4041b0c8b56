"""The server of host and runner: uvicorn, with listeners that come and go, certificates and a quiet end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from types import FrameType
from typing import Any, cast

import structlog
import uvicorn
from fastapi import FastAPI

from kohakuriver.limits import Limits
from kohakuriver.runtime import DescriptorWatch, cancel_all
from kohakuriver.tls import ServerCertificate
from kohakuriver.web.background import in_background
from kohakuriver.web.listener import Acceptor
from kohakuriver.web.request_limits import BodyBudget, GuardedHttp, guarded, letting_go
from kohakuriver.web.waiting_room import WaitingRoom

log = structlog.get_logger("kohakuriver")

Front = Callable[[Callable[[], GuardedHttp], WaitingRoom, Limits], asyncio.BaseProtocol]
"""(what makes the protocol of HTTP, who waits with no request under way, limits) → a connection's first protocol."""

DRAIN_SECONDS = 5

KEPT_SECONDS = 10
"""For how long a connection with nothing under way is kept. Longer than hosts, runners and commands keep theirs (5 s,
httpx's own limit): else one that is just used again would be closed under a request, which nobody may ask twice."""

_ENDING = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, name))


class Server(uvicorn.Server):
    """uvicorn, with `on_ready` once it listens, `on_stop` before it drains, and listeners that come and go.

    `on_leave` comes before that, while it listens.
    `on_stop` ends what never ends by itself (tunnels, sessions); after it only HTTP answers that are under way are
    waited for.
    """

    def __init__(
        self,
        app: FastAPI,
        *,
        ws: type[asyncio.Protocol],
        on_ready: Callable[[], Awaitable[None]],
        on_stop: Callable[[], Awaitable[None]],
        on_leave: Callable[[], Coroutine[Any, Any, None]] | None = None,
        certificate: ServerCertificate | None = None,
        limits: Limits | None = None,
        front: Front | None = None,
        ahead: Callable[[str], bool] = lambda path: False,
    ) -> None:
        """`front` makes the protocol that each connection to a listener of `serve` begins with.

        Requests for paths of which `ahead` says so are begun ahead of all others.
        """
        self._limits = limits or Limits()
        self._front = front
        self._room = WaitingRoom(self._limits.max_waiting)
        self._http = guarded(self._limits, self._room, BodyBudget.within(self._limits), ahead)
        super().__init__(_config(app, ws, self._http))
        self._changed = asyncio.Event()
        self.server_state.connections = _Members(self._changed)
        self.server_state.tasks = _Members(self._changed)
        self._certificate = certificate
        self._on_ready = on_ready
        self._on_stop = on_stop
        self._on_leave = on_leave
        self._end = asyncio.Event()
        self._hurry = asyncio.Event()  # Ctrl-C was pressed a second time
        self._loop = asyncio.get_running_loop()
        self._failed = False
        self._listeners: list[socket.socket] = []
        self._descriptors = DescriptorWatch(lambda: self._listeners, _out_of_descriptors, _descriptors_again)

    @property
    def exit_code(self) -> int:
        """Of the program, once `serve` has returned: 1 where what `keep` ran has failed."""
        return int(self._failed)

    def keep(self, work: Coroutine[Any, Any, None], what: str) -> asyncio.Task[None]:
        """Run what this program is no use without. Should it fail, that is logged and the program ends."""

        def failed() -> None:
            self._failed = True
            self.stop()

        return in_background(work, what, failed=failed)

    def stop(self) -> None:
        """Begin the end, as SIGTERM does. May be called from a signal handler or another thread."""
        self.should_exit = True
        for event in (self._end, self._changed):
            self._loop.call_soon_threadsafe(event.set)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        self.stop()
        if self.force_exit:
            self._loop.call_soon_threadsafe(self._hurry.set)

    async def unless_hurried(self, waiting: Coroutine[Any, Any, None]) -> None:
        """Wait for others as long as nobody presses Ctrl-C a second time. What `waiting` raises is raised."""
        tasks = [asyncio.ensure_future(each) for each in (waiting, self._hurry.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if tasks[0].done():
                await tasks[0]
        finally:
            await cancel_all(tasks)

    async def main_loop(self) -> None:
        """Wait for the end; uvicorn would look for it ten times a second."""
        seconds = 0
        while not await self.on_tick(10 * seconds):
            seconds += 1
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._end.wait(), 1)
            self._descriptors.look()
            if self._certificate is not None:
                self._certificate.look()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """What ends a program begins a drain that ends with exit code 0, where uvicorn would raise it again.

        Without a terminal that could hang up, SIGHUP has the certificate read again. What was ignored at the start
        stays so, as SIGHUP is by `nohup` and SIGINT by a script's `&`; SIGTERM always counts.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._on(number)) for number in _ENDING if _counts(number)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on(self, number: signal.Signals) -> Callable[[int, FrameType | None], None]:
        again = number.name == "SIGHUP" and not on_terminal()
        return self._read_again if again else self.handle_exit

    def _read_again(self, _number: int, _frame: FrameType | None) -> None:
        if self._certificate is not None:
            self._loop.call_soon_threadsafe(self._certificate.reload)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup([])  # the sockets are ours to listen on: uvicorn sets no time for a TLS handshake
        tls = None if self._certificate is None else self._certificate.context
        for sock in sockets or []:
            self._listen(self.config, sock, tls, self._front)
        try:
            await self._on_ready()
        except BaseException:
            # Whoever made the sockets closes them now, and uvloop aborts where it still waits for one that is closed.
            for server in self.servers:
                server.close()
            raise

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End everything; uvicorn would look ten times a second whether it has ended."""
        if self._on_leave is not None:
            await self.unless_hurried(self._on_leave())
        for server in self.servers:
            server.close()
        await self._on_stop()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        try:
            await asyncio.wait_for(self._all_ended(), self.config.timeout_graceful_shutdown)
        except asyncio.TimeoutError:
            log.error("what was under way did not end in time", connections=len(self.server_state.connections))
            for task in list(self.server_state.tasks):
                task.cancel()

    async def _all_ended(self) -> None:
        state = self.server_state
        while (state.connections or state.tasks) and not self.force_exit:
            self._changed.clear()
            await self._changed.wait()
        for server in self.servers:
            await server.wait_closed()

    def add_listener(self, sock: socket.socket, app: FastAPI, ws: type[asyncio.Protocol]) -> Callable[[], None]:
        """Serve another application on one more bound socket, without TLS; what is returned ends that. Raises OSError.

        Connections that are set up stay.
        """
        config = _config(app, ws, self._http)
        config.load()
        acceptor = self._listen(config, sock, None)

        def end() -> None:
            acceptor.close()
            if acceptor.sock in self._listeners:
                self._listeners.remove(acceptor.sock)
                self.servers.remove(cast(asyncio.Server, acceptor))

        return end

    def _listen(
        self,
        config: uvicorn.Config,
        sock: socket.socket,
        tls: ssl.SSLContext | None,
        front: Front | None = None,
    ) -> Acceptor:
        def http() -> GuardedHttp:
            make: Any = config.http_protocol_class
            protocol: GuardedHttp = make(config=config, server_state=self.server_state, app_state=self.lifespan.state)
            return protocol

        acceptor = Acceptor(
            sock,
            http if front is None else lambda: front(http, self._room, self._limits),
            tls=tls,
            handshake_timeout=self._limits.handshake_timeout,
            room=self._room,
            exhausted=lambda: self._descriptors.look(exhausted=True),
        )
        self._listeners.append(acceptor.sock)
        self.servers.append(cast(asyncio.Server, acceptor))
        return acceptor


class _Members(set[Any]):
    """A set that sets an event when something leaves it by `discard`, as uvicorn's protocols have it."""

    def __init__(self, changed: asyncio.Event) -> None:
        super().__init__()
        self._changed = changed

    def discard(self, member: Any) -> None:
        super().discard(member)
        self._changed.set()


def _out_of_descriptors(waiting: int) -> None:
    log.error(
        "out of file descriptors: new connections wait, and none can be opened; raise the limit (ulimit -Hn, or "
        "LimitNOFILE of the service)",
        waiting=waiting,
    )


def _descriptors_again() -> None:
    log.info("there are file descriptors again, and connections are accepted")


def _counts(number: signal.Signals) -> bool:
    return number == signal.SIGTERM or signal.getsignal(number) is not signal.SIG_IGN


def on_terminal() -> bool:
    """Whether this program has a terminal that could hang up."""
    try:
        return os.isatty(0)
    except OSError:
        return False


def _config(app: FastAPI, ws: type[asyncio.Protocol], http: type[asyncio.Protocol]) -> uvicorn.Config:
    return uvicorn.Config(
        letting_go(app),
        ws=ws,
        http=http,
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,  # who is on this machine could say to be anywhere
        timeout_graceful_shutdown=DRAIN_SECONDS,
        timeout_keep_alive=KEPT_SECONDS,
    )


def stop_at_end_of_stdin(server: Server) -> None:
    """Stop `server` when stdin ends: how a child notices that whoever started it was killed."""

    def wait() -> None:
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        with contextlib.suppress(RuntimeError):  # the loop has ended before stdin did
            server.stop()

    threading.Thread(target=wait, name="stdin", daemon=True).start()

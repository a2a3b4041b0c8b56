"""One connection to a port of a task, made from the host: a session at the runner that has a single stream.

The tunnel is the one that forwards use, so nothing is published on the node. Source: docs/protocol.md §3, §7.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from urllib.parse import quote

from kohakuriver.errors import KohakuRiverError, UnavailableError
from kohakuriver.limits import Limits
from kohakuriver.session.carried import NO_CLOSE_FRAME, RUNNER_SECONDS, Carrier, Passed, Route, at_runner
from kohakuriver.session.pace import PacedReads, PacedWindow
from kohakuriver.tunnel.dial import open_session
from kohakuriver.tunnel.endpoint import AnyStream
from kohakuriver.tunnel.link import Link
from kohakuriver.tunnel.local_socket import TcpStream
from kohakuriver.tunnel.protocol import CloseCode, ErrorText
from kohakuriver.tunnel.stream import StreamCore
from kohakuriver.tunnel.user_endpoint import UserEndpoint

__all__ = ["Connector", "Opened", "TaskConnection"]

Opened = Callable[[float, "KohakuRiverError | None"], None]


class TaskConnection(UserEndpoint):
    """A stream to a port of a task, and the session that carries it; both end together.

    `open`, then make a transport's protocol of `stream`. `peer` is whose it is, as address and port.
    """

    def __init__(self, connector: Connector, route: Route, peer: str) -> None:
        super().__init__(on_stream_error=self._refused, on_detach=self._lost)
        self._connector = connector
        self._carried = connector.carrier.carry(self, route)
        self._route = route
        self._peer = peer
        self._opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.stream = TcpStream(self, route.port, self._core())

    def _core(self) -> StreamCore:
        return StreamCore(self.rules)

    async def open(self) -> None:
        """Open the session and the stream; back once the port in the task has taken the connection.

        Raises UnavailableError when nothing listens there, or what `open_session` raises.
        """
        began = time.perf_counter()
        try:
            await self._open()
        except KohakuRiverError as error:
            self._connector.opened(time.perf_counter() - began, error)
            raise
        self._connector.opened(time.perf_counter() - began, None)

    async def _open(self) -> None:
        try:
            await self._open_session()
            await asyncio.wait_for(asyncio.shield(self._opened), RUNNER_SECONDS)
        except asyncio.TimeoutError:
            self.abandon()
            raise UnavailableError(
                f"Port {self._route.port} of task {self._route.task} did not answer within {RUNNER_SECONDS:g} s.",
                code="timed_out",
                status=504,
            ) from None
        except BaseException:
            self.abandon()
            raise

    async def _open_session(self) -> None:
        route = self._route
        path = f"/ws/forward/{quote(route.container, safe='')}/{route.port}?proto=tcp"
        with at_runner(route):
            link = await open_session(route.runner(path, self._connector.trusted))
        self._carried.begin(self._peer, proto="ssh", port=route.port, ports=[str(route.port)], version=link.version)
        self.attach(link)
        self.open_tcp(self.stream)
        self._carried.hang_on_right()

    def abandon(self, reason: str = "the connection was given up", code: int = CloseCode.NORMAL) -> None:
        """End both at once; whoever is connected to the stream is reset."""
        self._carried.end("host", code, reason)
        self.cut(code, reason)

    def cut(self, code: int, reason: str) -> None:
        """End both at once; `abandon` says who wanted it."""
        self._settle(UnavailableError(f"{reason[:1].upper()}{reason[1:]}."))
        self.stream.link_lost()
        if self.link is not None:
            self.link.close(code, reason)
        self._carried.over()

    def passed(self) -> Passed:
        """Bytes so far; the task may have ended while a slow user still takes what it said last."""
        return self.totals.bytes_sent, self.totals.bytes_received + self.stream.core.held

    def _settle(self, error: KohakuRiverError | None) -> None:
        if self._opened.done():
            return
        if error is None:
            self._opened.set_result(None)
        else:
            self._opened.set_exception(error)
            self._opened.exception()  # whether or not somebody still waits

    def socket_ready(self, stream: TcpStream) -> None:
        """It is connected once `open` is back: what the task's side has said since is delivered."""

    def connected(self, stream: TcpStream, payload: bytes) -> None:
        super().connected(stream, payload)
        self._settle(None)

    def stream_over(self, stream: AnyStream) -> None:
        self._settle(UnavailableError(f"Task {self._route.task} ended the connection."))
        self._carried.end("user", CloseCode.NORMAL, "the connection has ended")
        if self.link is not None:
            self.link.close(CloseCode.NORMAL, "the connection has ended")

    def _refused(self, port: int, text: ErrorText) -> None:
        self._settle(UnavailableError(_why_refused(self._route, text)))

    def _lost(self, reason: str) -> None:
        self._carried.end("node", NO_CLOSE_FRAME, reason)
        self._carried.over()
        self._settle(UnavailableError(f"The session to task {self._route.task} broke: {reason}."))


class PacedConnection(TaskConnection):
    """A connection that may take only so many bytes a second, each way."""

    def __init__(self, connector: Connector, route: Route, peer: str) -> None:
        self._rate = connector.rate
        super().__init__(connector, route, peer)
        self._pace = PacedReads(connector.rate)

    def _core(self) -> StreamCore:
        return StreamCore(self.rules, PacedWindow(self._rate, lambda: self.stream.update_reading()))

    def attach(self, link: Link, *, line: Link | None = None) -> None:
        self._pace.begin(link)
        super().attach(link)

    def link_received(self, link: Link, start: int, stop: int) -> int:
        consumed = super().link_received(link, start, stop)
        self._pace.took(link, consumed - start)
        return consumed


class Connector:
    """Makes the connections of one proxy, within its limits, and keeps an eye on those that are open.

    `trusted` is how runners that serve TLS are checked, None for the system's authorities. `opened` is told how many
    seconds each took to open, and why it could not be.
    """

    def __init__(self, *, trusted: ssl.SSLContext | None, limits: Limits, opened: Opened = lambda _s, _e: None) -> None:
        self.trusted = trusted
        self.opened = opened
        self.rate = limits.max_rate
        self.carrier: Carrier[TaskConnection] = Carrier(limits)

    def connection(self, route: Route, peer: str) -> TaskConnection:
        """A connection that is not open yet, for the peer with that address and port."""
        return (PacedConnection if self.rate else TaskConnection)(self, route, peer)

    def close(self) -> None:
        """End every connection, at once."""
        self.carrier.cut_all("the host is shutting down")


def _why_refused(route: Route, text: ErrorText) -> str:
    """The sentence for an ERROR of the task's side."""
    task, port = route.task, route.port
    if text.code != "ECONNREFUSED":
        return f"Port {port} of task {task} can't be reached: {str(text).rstrip('.')}."
    if route.own_server:
        return f"The SSH server of task {task} does not run; `kohakuriver vps restart {task}` starts it again."
    if port == 22:
        return (
            f"Task {task} has no SSH server: nothing listens on its port 22; "
            "start one there, or make the task with `kohakuriver vps create --ssh`."
        )
    return f"Nothing listens on port {port} of task {task}."

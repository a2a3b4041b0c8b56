"""One connection to a port of a task, made from the host: a session at the runner that has a single stream.

The tunnel is the one that forwards use, so nothing is published on the node. Source: docs/protocol.md §3, §7.
"""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass
from urllib.parse import quote

from kohakuriver.errors import HostUnreachableError, KohakuRiverError, NotAllowedError, UnavailableError
from kohakuriver.limits import Limits
from kohakuriver.session.grant import NO_GRANT, Grant
from kohakuriver.session.idle import IdleWatch
from kohakuriver.session.pace import PacedReads, PacedWindow
from kohakuriver.tunnel.dial import open_session
from kohakuriver.tunnel.endpoint import AnyStream, UserEndpoint
from kohakuriver.tunnel.link import Link
from kohakuriver.tunnel.protocol import CloseCode, ErrorText
from kohakuriver.tunnel.tcp import TcpStream

__all__ = ["Connector", "SshTarget", "TaskConnection"]

OPEN_SECONDS = 10.0


@dataclass(frozen=True)
class SshTarget:
    """Where a connection goes: a port of a task, by the runner's ``ws://`` address and a ticket for it.

    `own_server` says that the port is that of the SSH server which the task was given. `grant` is the connection's
    right to go on.
    """

    task: str
    port: int
    runner_ws_url: str
    container: str
    ticket: str | None
    own_server: bool = False
    grant: Grant = NO_GRANT


class TaskConnection(UserEndpoint):
    """A stream to a port of a task, and the session that carries it; both end together.

    `open`, then make a transport's protocol of `stream`. `peer` is whose it is, as address and port.
    """

    def __init__(self, connector: Connector, target: SshTarget, peer: str) -> None:
        super().__init__(on_stream_error=self._refused, on_detach=self._lost)
        self._connector = connector
        self._target = target
        self._peer = peer
        self._ending: tuple[str, int, str] | None = None
        self._opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.stream = TcpStream(self, target.port)

    async def open(self) -> None:
        """Open the session and the stream; back once the port in the task has taken the connection.

        Raises UnavailableError when nothing listens there, or what `open_session` raises.
        """
        try:
            await self._open_session()
            await asyncio.wait_for(asyncio.shield(self._opened), OPEN_SECONDS)
        except asyncio.TimeoutError:
            self.abandon()
            target = self._target
            raise HostUnreachableError(
                f"Port {target.port} of task {target.task} did not answer within {OPEN_SECONDS:g} s.",
                code="timed_out",
                status=504,
            ) from None
        except BaseException:
            self.abandon()
            raise

    async def _open_session(self) -> None:
        target = self._target
        url = f"{target.runner_ws_url}/ws/forward/{quote(target.container, safe='')}/{target.port}?proto=tcp"
        try:
            link = await open_session(
                url, token=target.ticket, ssl=self._connector.trusted, timeout=OPEN_SECONDS, peer="runner"
            )
        except NotAllowedError as error:  # of the host, not of the user: whose credentials are good
            raise HostUnreachableError(f"The task's node did not take the host's ticket: {error}") from error
        about = {"from": self._peer, "proto": "ssh", "port": target.port, "ports": [target.port]}
        target.grant.opened(**about, version=link.version)
        self._connector.begun(self)
        self.attach(link)
        self._open(self.stream)
        target.grant.attach(self._withdrawn)

    def abandon(self, reason: str = "the connection was given up", code: int = CloseCode.NORMAL) -> None:
        """End both at once; whoever is connected to the stream is reset."""
        self._ending = self._ending or ("host", code, reason)
        self._settle(UnavailableError(f"{reason[:1].upper()}{reason[1:]}."))
        self.stream.reset()
        if self.link is not None:
            self.link.close(code, reason)
        self._closed()

    def _withdrawn(self, reason: str) -> None:
        self.abandon(reason, CloseCode.POLICY)

    @property
    def passed(self) -> int:
        """Bytes so far, both ways."""
        return self.bytes_sent + self.bytes_received

    def idle(self, reason: str) -> None:
        """Nothing has passed for long enough."""
        self.abandon(reason, CloseCode.IDLE)

    def _closed(self) -> None:
        self._connector.ended(self)
        by, code, reason = self._ending or ("host", CloseCode.NORMAL, "")
        # The task may have ended while a slow user still takes what it said last.
        to_user = self.bytes_received + self.stream.held
        passed = {"bytes_to_container": self.bytes_sent, "bytes_to_user": to_user}
        self._target.grant.closed(**passed, ended_by=by, code=code, reason=reason)

    def _settle(self, error: KohakuRiverError | None) -> None:
        if self._opened.done():
            return
        if error is None:
            self._opened.set_result(None)
        else:
            self._opened.set_exception(error)
            self._opened.exception()  # whether or not somebody still waits

    def socket_ready(self, stream: TcpStream) -> None:
        stream._pump()  # what the task's side has said already

    def connected(self, stream: TcpStream, payload: bytes) -> None:
        super().connected(stream, payload)
        self._settle(None)

    def stream_over(self, stream: AnyStream) -> None:
        super().stream_over(stream)
        self._settle(UnavailableError(f"Task {self._target.task} ended the connection."))
        self._ending = self._ending or ("user", CloseCode.NORMAL, "the connection has ended")
        if self.link is not None:
            self.link.close(CloseCode.NORMAL, "the connection has ended")

    def _refused(self, port: int, text: ErrorText) -> None:
        self._settle(UnavailableError(_why_refused(self._target, text)))

    def _lost(self, reason: str) -> None:
        self._ending = self._ending or ("node", 1006, reason)
        self._closed()
        self._settle(HostUnreachableError(f"The session to task {self._target.task} broke: {reason}."))


class PacedConnection(TaskConnection):
    """A connection that may take only so many bytes a second, each way."""

    def __init__(self, connector: Connector, target: SshTarget, peer: str) -> None:
        super().__init__(connector, target, peer)
        self.stream.sending = PacedWindow(self.stream, connector.rate)
        self._pace = PacedReads(connector.rate)

    def attach(self, link: Link) -> None:
        self._pace.begin(link)
        super().attach(link)

    def link_received(self, link: Link, start: int, stop: int) -> int:
        consumed = super().link_received(link, start, stop)
        self._pace.took(link, consumed - start)
        return consumed


class Connector:
    """Makes the connections of one proxy, within its limits, and keeps an eye on those that are open.

    `trusted` is how runners that serve TLS are checked, None for the system's authorities.
    """

    def __init__(self, *, trusted: ssl.SSLContext | None, limits: Limits) -> None:
        self.trusted = trusted
        self.rate = limits.max_rate
        self._idle = IdleWatch(limits.idle_timeout)
        self._open: dict[TaskConnection, None] = {}

    def connection(self, target: SshTarget, peer: str) -> TaskConnection:
        """A connection that is not open yet, for the peer with that address and port."""
        return (PacedConnection if self.rate else TaskConnection)(self, target, peer)

    def begun(self, connection: TaskConnection) -> None:
        """Its session is open."""
        self._open[connection] = None
        self._idle.add(connection, lambda: connection.passed, connection.idle)

    def ended(self, connection: TaskConnection) -> None:
        """Its session, if it had one, has ended."""
        self._open.pop(connection, None)
        self._idle.discard(connection)

    def close(self) -> None:
        """End every connection, at once."""
        for connection in list(self._open):
            connection.abandon("the host is shutting down", CloseCode.GOING_AWAY)


def _why_refused(target: SshTarget, text: ErrorText) -> str:
    """The sentence for an ERROR of the task's side."""
    task, port = target.task, target.port
    if text.code != "ECONNREFUSED":
        return f"Port {port} of task {task} can't be reached: {str(text).rstrip('.')}."
    if target.own_server:
        return f"The SSH server of task {task} does not run; `kohakuriver vps restart {task}` starts it again."
    if port == 22:
        return (
            f"Task {task} has no SSH server: nothing listens on its port 22; "
            "start one there, or make the task with `kohakuriver vps create --ssh`."
        )
    return f"Nothing listens on port {port} of task {task}."

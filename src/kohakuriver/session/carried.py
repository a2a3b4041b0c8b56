"""Sessions that a program carries between a user and a task, whatever is in them: all but their bytes.

What a session holds (the right to go on, its place in the idle watch, its line in the audit log) is taken and let go of
here alone. Forwards, terminals and SSH connections keep only what they move.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

from kohakuriver.errors import HostUnreachableError, NotAllowedError, UnavailableError
from kohakuriver.limits import Limits
from kohakuriver.session.grant import NO_GRANT, Grant
from kohakuriver.session.idle import IdleWatch
from kohakuriver.session.nodes import node_unreachable, ticket_refused
from kohakuriver.tunnel.dial import Server
from kohakuriver.tunnel.protocol import SESSION_ENDED, CloseCode

__all__ = ["NO_CLOSE_FRAME", "RUNNER_SECONDS", "Carried", "Carrier", "Passed", "Route", "Session", "at_runner"]

RUNNER_SECONDS = 10.0
"""How long a runner may take to open a session."""

NO_CLOSE_FRAME = int(CloseCode.ABNORMAL)
"""What the audit log has where a link ended without a code (RFC 6455 §7.1.5)."""

Passed = tuple[int, int]
"""Bytes so far: to the container, to the user."""


@dataclass(frozen=True)
class Route:
    """Where a session goes: the runner's ``ws://`` or ``wss://`` address, the task there, the ticket to show.

    `grant` is its right to go on, `task` and `node` are their names. `port` is for a session that reaches one alone,
    `own_server` says that it is that of the SSH server which the task was given, `preserve_host` that a service is told
    the address that a browser has, `keep_prefix` that it is told the whole path of it. `moves`: where its node is gone
    the task soon is at another one, as an agent is that dials the next host.
    """

    runner_ws_url: str
    container: str
    ticket: str | None
    grant: Grant = NO_GRANT
    task_id: int = 0
    task: str = ""
    node: str = ""
    port: int = 0
    own_server: bool = False
    preserve_host: bool = False
    keep_prefix: bool = False
    moves: bool = False

    def runner(self, path: str, trusted: ssl.SSLContext | None) -> Server:
        """The WebSocket of the runner to open, by its path and query. No HTTP proxy stands before a runner."""
        return Server(self.runner_ws_url + path, self.ticket, trusted, timeout=RUNNER_SECONDS, peer="runner")


@contextlib.contextmanager
def at_runner(route: Route) -> Iterator[None]:
    """While a session is opened at the runner: what goes wrong is told in words of tasks and nodes.

    Raises UnavailableError "runner_refused", "runner_unreachable" or "tunnel_not_connected", or the runner's own error.
    """
    try:
        yield
    except NotAllowedError as error:
        raise ticket_refused(route.node, error.message) from error
    except (HostUnreachableError, UnavailableError) as error:
        if error.code == "tunnel_not_connected":
            sentence = f"Task {route.task} runs, but its tunnel is not connected; is the tunnel client in it alive?"
            raise UnavailableError(sentence, code=error.code, status=error.status) from error
        if error.code not in ("host_unreachable", "timed_out"):
            raise
        why = (isinstance(error, HostUnreachableError) and error.reason) or error.message
        raise node_unreachable(route.node, why, error) from error


class Session(Protocol):
    """What a program moves between a user and a task."""

    def passed(self) -> Passed:
        """Bytes so far."""

    def cut(self, code: int, reason: str) -> None:
        """End both sides, because this program wants it: `CloseCode.POLICY` where the right to go on is gone."""


S = TypeVar("S", bound=Session)


class Carried(Generic[S]):
    """What one session holds. As a context manager around its opening it lets go of that when the opening fails."""

    def __init__(self, carrier: Carrier[S], session: S, grant: Grant) -> None:
        self._carrier = carrier
        self._session = session
        self._grant = grant
        self._ending: tuple[str, int, str] | None = None
        self._begun = False
        self._over = False

    def __enter__(self) -> Carried[S]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.over()

    def begin(self, peer: str, **about: Any) -> None:
        """Both sides are there; `about` is for the audit log."""
        self._begun = True
        self._grant.counted(self._session.passed)
        self._grant.opened(**{"from": peer}, **about)
        self._carrier.open[self._session] = self
        self._carrier.idle.add(self, lambda: sum(self._session.passed()), self._idle)

    def ran(self, command: list[str]) -> None:
        """The user asked for a command."""
        self._grant.ran(command)

    def need_room(self) -> None:
        """Raises UnavailableError (429) while its user has done more than can be written down."""
        self._grant.need_room()

    def stays(self) -> None:
        """Something of the session stays in the task when it has ended."""
        self._grant.stays()

    def hang_on_right(self) -> None:
        """From here on the session ends when the right to it does: at once if that has happened already."""
        self._grant.attach(self._withdrawn)

    def end(self, by: str, code: int, reason: str) -> None:
        """Note who ended the session ("user", "node", "host"), and how. The first one counts."""
        self._ending = self._ending or (by, code, reason)

    def cut(self, code: int, reason: str) -> None:
        """End the session, because this program wants it."""
        self.end("host", code, reason)
        self._session.cut(code, reason)

    def over(self) -> None:
        """Let go of everything; the session has ended, or never began."""
        if self._over:
            return
        self._over = True
        if not self._begun:
            self._grant.release()
            return
        self._carrier.idle.discard(self)
        to_container, to_user = self._session.passed()
        self._carrier.ended(self._session, to_container, to_user)
        by, code, reason = self._ending or ("host", NO_CLOSE_FRAME, "")
        lost = {"lost": True} if code not in SESSION_ENDED else {}
        passed = {"bytes_to_container": to_container, "bytes_to_user": to_user}
        self._grant.closed(**passed, ended_by=by, code=code, reason=reason, **lost)

    def _idle(self, reason: str) -> None:
        self.cut(CloseCode.IDLE, reason)

    def _withdrawn(self, reason: str) -> None:
        self.cut(CloseCode.POLICY, reason)


class Carrier(Generic[S]):
    """All sessions of one kind that this program carries, in the order in which they began. `limits` are theirs."""

    def __init__(self, limits: Limits) -> None:
        self.idle = IdleWatch(limits.idle_timeout)
        self.open: dict[S, Carried[S]] = {}
        self._closed_to_container = 0
        self._closed_to_user = 0
        self._emptied: asyncio.Event | None = None

    def carry(self, session: S, route: Route) -> Carried[S]:
        """What `session` will hold. Whoever asks uses the answer as a context manager until it has begun."""
        return Carried(self, session, route.grant)

    def ended(self, session: S, to_container: int, to_user: int) -> None:
        """A session is over, with so many bytes passed."""
        del self.open[session]
        if self._emptied is not None and not self.open:
            self._emptied.set()
        self._closed_to_container += to_container
        self._closed_to_user += to_user

    async def emptied(self, seconds: float) -> None:
        """Wait until no session is open, and for so many seconds at most."""
        self._emptied = asyncio.Event()
        if self.open:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._emptied.wait(), seconds)

    def cut_all(self, reason: str) -> None:
        """End every session."""
        for carried in list(self.open.values()):
            carried.cut(CloseCode.GOING_AWAY, reason)

    def snapshot(self) -> dict[str, int]:
        """Sessions now, and bytes passed since the start."""
        passed = [session.passed() for session in self.open]
        return {
            "sessions": len(self.open),
            "bytes_to_container": self._closed_to_container + sum(to_container for to_container, _ in passed),
            "bytes_to_user": self._closed_to_user + sum(to_user for _, to_user in passed),
        }

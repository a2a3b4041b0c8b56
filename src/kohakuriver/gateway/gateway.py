"""The gateway of one session: browsers' connections on one side, its streams on the other."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from kohakuriver.gateway.destination import Destination
from kohakuriver.gateway.gate import Gate
from kohakuriver.gateway.heads import RequestHead
from kohakuriver.gateway.names import Place
from kohakuriver.gateway.visit import Visit
from kohakuriver.tunnel.link import soon
from kohakuriver.tunnel.user_endpoint import UserEndpoint

__all__ = ["Gateway"]

LOOK_EVERY = 1.0


class Gateway:
    """Makes a `Visit` of each connection.

    Args:
        endpoint: whose streams lead to the services.
        gate: which addresses there are, and who may go where.
        trouble: why nothing can be reached now, as a sentence; None where something may be.
    """

    def __init__(self, endpoint: UserEndpoint, gate: Gate, trouble: Callable[[], str | None]) -> None:
        self.endpoint = endpoint
        self.gate = gate
        gate.revoked = self._put_out
        self.visits: set[Visit] = set()
        self._trouble = trouble
        self._timer: asyncio.TimerHandle | None = None
        self._look()

    def visit(self) -> Visit:
        """The protocol of a new connection."""
        return Visit(self)

    def now(self) -> float:
        """The loop's time, in seconds."""
        return asyncio.get_running_loop().time()

    def judge(self, visit: Visit, head: RequestHead, form: bytes, *, close: bool) -> Destination | bytes:
        """Where a request may go, else what is answered. Raises Malformed."""
        answer = self.gate.judge(head, close=close)
        return Destination(answer, self.endpoint, self._trouble) if isinstance(answer, Place) else answer

    def takes_form(self, head: RequestHead) -> bool:
        """Whether the body of a request is for the gateway itself: it has no forms."""
        return False

    def waits(self, visit: Visit, *, waits: bool) -> None:
        """Whether a browser has no request under way: those of this machine may stay."""

    def _look(self) -> None:
        now = self.now()
        for visit in list(self.visits):
            visit.overdue(now)
        self._timer = asyncio.get_running_loop().call_later(LOOK_EVERY, self._look)

    def _put_out(self, place: Place) -> None:
        """End what is open to an address: whose it is, is not known, and who may go on comes back with the cookie."""
        for visit in list(self.visits):
            if visit.destination is not None and visit.destination.place == place:
                soon(visit.abort)  # one of them may be asking at this moment

    def close(self) -> None:
        """End all connections."""
        if self._timer is not None:
            self._timer.cancel()
        for visit in list(self.visits):
            visit.reset()

"""How much one user, and one stranger, may ask of this host (docs/guide/limits.md)."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from kohakuriver.asking import asker
from kohakuriver.errors import UnavailableError
from kohakuriver.fair_turns import FairTurns
from kohakuriver.host.services.audit import NOWHERE, Audit
from kohakuriver.host.services.credentials import ANONYMOUS, Caller
from kohakuriver.rates import TokenBucket

__all__ = ["Requests"]

BURST_SECONDS = 5
"""How many seconds' worth of requests may come at once."""

AT_ONCE = 4
"""Requests that are begun before everything else of the host gets its turn: some 3 ms of work."""

KNOWN = 4096
"""Users that are told apart; of more the one that has asked least lately starts anew."""


@dataclass
class _Used:
    bucket: TokenBucket
    under_way: int = 0


class Requests:
    """The requests of users to the HTTP API, and the sessions that they open. Those of nodes are not among them.

    Args:
        rate: how many one user may begin in a second, 0 for any number.
        most: how many requests one user may have under way, 0 for any number. Sessions have a limit of their own.
        audit: where what changes something, or opens a session, must still have room.
    """

    def __init__(
        self, *, rate: int = 0, most: int = 0, audit: Audit = NOWHERE, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rate = rate
        self._most = most
        self._audit = audit
        self._clock = clock
        self._used: OrderedDict[str, _Used] = OrderedDict()
        self._turns = FairTurns(AT_ONCE)

    async def turn(self, who: Hashable) -> None:
        """Return when it is the turn of a request of `who`, which nobody has checked yet.

        A thousand requests that come at once are a second's work: it is done a little at a time, and each who has
        requests gets one of them done in turn.
        """
        await self._turns.turn(who)

    @staticmethod
    def needs_room(method: str, path: str) -> bool:
        """Whether the audit log must have room for what a user asks. Looking, ending and taking away need none.

        What can be taken away was written down when it was made, so there is no more of that than there was room for.
        """
        return method not in ("GET", "DELETE") and not (method == "POST" and path.endswith("/stop"))

    def count(self, caller: Caller, *, needs_room: bool = True) -> None:
        """One more is begun; with `needs_room` the audit log must have room for what it does.

        Raises UnavailableError "too_many_requests" (429).
        """
        if self._rate and not self._of(caller).bucket.try_take(self._clock()):
            raise UnavailableError(
                f"{caller.name} asks this host for more than {self._rate} things a second; ask again in a moment.",
                code="too_many_requests",
                status=429,
            )
        if needs_room:
            self._audit.need_room(caller.name)

    def begin(self, caller: Caller, *, needs_room: bool = True) -> Callable[[], None]:
        """A request is under way until what this gives is called. Raises as `count` does."""
        used = self._of(caller)
        if self._most and used.under_way >= self._most:
            raise UnavailableError(
                f"{caller.name} has {used.under_way} requests under way, as many as this host allows; wait for some.",
                code="too_many_requests",
                status=429,
            )
        self.count(caller, needs_room=needs_room)
        used.under_way += 1

        def end() -> None:
            used.under_way -= 1

        return end

    @staticmethod
    def whose(caller: Caller) -> str:
        """By what name these requests are counted: those without a token are told apart by where they are."""
        return f"{caller.name} at {asker().origin}" if caller.role == ANONYMOUS else caller.name

    def _of(self, caller: Caller) -> _Used:
        name = self.whose(caller)
        used = self._used.get(name)
        if used is None:
            used = self._used[name] = _Used(TokenBucket(self._rate or 1, BURST_SECONDS * self._rate, self._clock()))
            self._forget_one()
        self._used.move_to_end(name)
        return used

    def _forget_one(self) -> None:
        if len(self._used) > KNOWN:
            idle = next((name for name, used in self._used.items() if not used.under_way), None)
            if idle is not None:
                del self._used[idle]

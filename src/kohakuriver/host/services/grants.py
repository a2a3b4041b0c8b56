"""Sessions under way of every kind, the right of each to go on, and what is written down about them.

A session is checked when it is opened, whenever a right was taken away here, and when another host on the same database
tells of one; besides every few seconds, because a token expires by itself and what is told may be lost. The bytes of a
session are no part of that: all that a session pays is one entry in a set.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shlex
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import structlog

from kohakuriver.asking import asker
from kohakuriver.errors import KohakuRiverError, NotAllowedError, UnavailableError
from kohakuriver.host.services.audit import NOWHERE, Audit, fingerprint
from kohakuriver.host.services.credentials import Caller
from kohakuriver.host.services.requests import Requests
from kohakuriver.store import Accounts, SessionCounts, Task, Use
from kohakuriver.tunnel.protocol import LONGEST_HOLD

__all__ = ["CHECK_SECONDS", "Grant", "Grants", "UnderWay"]

CHECK_SECONDS = 2.0
"""How often the sessions under way are checked when nothing is known to have changed."""

MAX_HELD = 1000
"""Of how many lost sessions of one user the rights are watched; of more, of the newest."""

log = structlog.get_logger("kohakuriver.host")

Revoke = Callable[[str, str, str, str], Awaitable[None]]
"""(node, container, user, reason): end what is held there for the user's next session."""


async def _nothing_is_held(node: str, container: str, user: str, reason: str) -> None:
    pass


@dataclass(frozen=True)
class Held:
    """A session that left something in its container, held streams or a terminal with a name.

    It is watched until `until` (monotonic seconds). `told` says that it could not be ended, and that this was said.
    """

    use: Use
    node: str
    container: str
    user: str
    until: float
    told: bool = False


class UnderWay(NamedTuple):
    """A session that is open for `seconds`: `owner` is the task's, `about` what the audit log has of it.

    `passed` are the bytes so far, to the container and to the user.
    """

    owner: str
    seconds: float
    about: Mapping[str, Any]
    passed: tuple[int, int]


def _nothing() -> tuple[int, int]:
    return 0, 0


class Grant:
    """One session's right to go on; see `kohakuriver.session.grant`."""

    def __init__(self, grants: Grants, caller: Caller, task: Task, use: Use) -> None:
        self.caller = caller
        self.owner = task.owner
        self.use = use
        self._grants = grants
        self._about: dict[str, Any] = {
            "session": secrets.token_hex(8),
            **asker().described(),
            "user": caller.name,
            "key": None if use.key is None else fingerprint(use.key),
            "task": task.task_id,
            "name": task.name,
            "node": task.node,
            "container": task.container,
        }
        self._began: float | None = None
        self._passed: Callable[[], tuple[int, int]] = _nothing
        self._over = False
        self._stays = False
        self._end: Callable[[str], None] | None = None
        self._withdrawn: str | None = None

    def opened(self, **about: Any) -> None:
        """The session has begun."""
        self._about |= about
        self._began = time.monotonic()
        self._grants.write("session_opened", self._about)

    def counted(self, passed: Callable[[], tuple[int, int]]) -> None:
        """`passed` says how many bytes have gone to the container and to the user so far."""
        self._passed = passed

    @property
    def under_way(self) -> UnderWay | None:
        """What can be told of it; None before it has begun, and once it is over."""
        if self._began is None or self._over:
            return None
        return UnderWay(self.owner, time.monotonic() - self._began, self._about, self._passed())

    def need_room(self) -> None:
        """Raises UnavailableError (429) while its user has done more than can be written down."""
        self._grants.audit.need_room(self.caller.name)

    def ran(self, command: list[str]) -> None:
        """A command was asked for in the session."""
        self._grants.write("session_command", {**self._about, "command": shlex.join(command)})

    def stays(self) -> None:
        """What it leaves in the task goes when the right does."""
        self._stays = True

    def attach(self, end: Callable[[str], None]) -> None:
        """`end` is called with the reason once the right is gone: at once if that has happened already."""
        self._end = end
        if self._withdrawn is not None:
            end(self._withdrawn)

    def closed(self, **how: Any) -> None:
        """The session has ended."""
        if not self._over and self._began is not None:
            seconds = round(time.monotonic() - self._began, 3)
            self._grants.write("session_closed", {**self._about, "seconds": seconds, **how})
            # What goes past this host may not have ended with it: whose right has gone is ended there, too.
            if how.get("lost") or self._stays or self._withdrawn is not None:
                self._grants.hold(self._held())
        self.release()

    def _held(self) -> Held:
        about = self._about
        use = self.use._replace(left=True)
        return Held(use, about["node"], about["container"], about["user"], time.monotonic() + LONGEST_HOLD)

    def release(self) -> None:
        """The session has ended, or never began."""
        if not self._over:
            self._over = True
            self._grants.forget(self)

    def withdraw(self, reason: str) -> None:
        """End the session."""
        self._withdrawn = reason
        log.info("session ended", user=self.caller.name, task=self.use.task_id, reason=reason)
        if self._end is not None:
            try:
                self._end(reason)
            except Exception:  # a failure here must not keep the other sessions open
                log.exception("a session could not be ended", user=self.caller.name, task=self.use.task_id)


class Grants:
    """All sessions of this host, whatever they carry.

    Args:
        requests: counts them among what their users ask for.
        audit: where sessions are written down.
        revoke: ends what a lost session left in its container, once the right to it has gone.
        counts: how many sessions each user has, here and at other hosts.
    """

    def __init__(
        self,
        accounts: Accounts,
        *,
        requests: Requests | None = None,
        audit: Audit = NOWHERE,
        revoke: Revoke = _nothing_is_held,
        counts: SessionCounts | None = None,
    ) -> None:
        self._revoke = revoke
        self._held: dict[str, OrderedDict[Use, Held]] = {}  # by user
        self._accounts = accounts
        self._requests = requests or Requests()
        self.audit = audit
        self._grants: set[Grant] = set()
        self.counts = counts or SessionCounts()
        self._to_look = asyncio.Event()

    def open(self, caller: Caller, task: Task, key: str | None = None) -> Grant:
        """Enter a session that `caller` opens to a task, before anything is done for it.

        `key` is the public key, as its type and base64, that the task's owner let in and that is all who opens it has.
        Raises UnavailableError "too_many_sessions" or "too_many_requests" (429).
        """
        self._requests.count(caller)
        _check_room(caller, self.counts.here(caller.name))
        grant = Grant(self, caller, task, Use(caller.digest, task.task_id, key))
        self._grants.add(grant)
        self.counts.add(caller.name, 1)
        return grant

    async def enter(
        self, caller: Caller, task: Task, key: str | None = None, *, onward: Literal["", "admin", "owner"] = ""
    ) -> Grant:
        """`open`, and then ask whether the right is still there; it may be some time since the caller was looked up.

        A session that leads `onward` from the task hangs on the caller's being that, too.
        Whatever is taken away from here on finds the session among those under way. Raises NotAllowedError besides.
        """
        grant = self.open(caller, task, key)
        grant.use = grant.use._replace(onward=onward)
        try:
            if caller.quotas.sessions:
                elsewhere = await self.counts.enter(caller.name)
                _check_room(caller, elsewhere + self.counts.here(caller.name) - 1)
            reason = (await self._accounts.withdrawn([grant.use])).get(grant.use)
            if reason is not None:
                raise NotAllowedError(f"This can't be opened: {reason}.")
        except BaseException:
            grant.release()
            raise
        return grant

    def forget(self, grant: Grant) -> None:
        """The session has ended."""
        self._grants.discard(grant)
        self.counts.add(grant.caller.name, -1)

    def hold(self, held: Held) -> None:
        """A session was lost: what it left behind hangs on the same right."""
        of_user = self._held.setdefault(held.user, OrderedDict())
        of_user[held.use] = held
        of_user.move_to_end(held.use)
        if len(of_user) > MAX_HELD:
            of_user.popitem(last=False)

    def write(self, event: str, about: dict[str, Any]) -> None:
        """Write down what became of a session."""
        self.audit.write(event, **about)

    async def open_of(self, user: str) -> int:
        """How many sessions a user has open, at all hosts. Raises KohakuRiverError when the database fails."""
        return self.counts.here(user) + await self.counts.elsewhere(user)

    def look_now(self) -> None:
        """A right may have ended elsewhere: have `run` check at once."""
        self._to_look.set()

    def under_way(self) -> list[UnderWay]:
        """All sessions that are open on this host now."""
        return [found for grant in self._grants if (found := grant.under_way) is not None]

    def __len__(self) -> int:
        return len(self._grants)

    async def check(self) -> None:
        """End every session whose token, user or share is gone. Raises KohakuRiverError when the database fails."""
        now = time.monotonic()
        for held in [each for each in self._all_held() if each.until <= now]:
            self._hold_no_more(held)
        uses = {each.use for each in self._all_held()}
        withdrawn = await self._accounts.withdrawn({*uses, *(grant.use for grant in self._grants)})
        for grant in list(self._grants):
            if grant.use in withdrawn:
                self._grants.discard(grant)  # it is told once
                grant.withdraw(withdrawn[grant.use])
        gone = [held for held in self._without_right(withdrawn) if not await self._has_others(held)]
        await self._let_go(gone, withdrawn)

    def _without_right(self, withdrawn: dict[Use, str]) -> list[Held]:
        """What is to end now. While the same user has another right to the task, that would end what is its own."""
        gone = [held for held in self._all_held() if held.use in withdrawn]
        if not gone:
            return []
        entitled = {(grant.caller.name, grant.use.task_id) for grant in self._grants if grant.use not in withdrawn}
        entitled |= {(held.user, held.use.task_id) for held in self._all_held() if held.use not in withdrawn}
        return [held for held in gone if (held.user, held.use.task_id) not in entitled]

    async def _has_others(self, held: Held) -> bool:
        """Whether its user may use the task by another right, and has sessions at other hosts, which may hang on it.

        Those would end, too; so it stays for as long as they do. Raises KohakuRiverError when the database fails.
        """
        return bool(await self.counts.elsewhere(held.user)) and await self._accounts.uses(held.user, held.use.task_id)

    async def _let_go(self, gone: list[Held], why: dict[Use, str]) -> None:
        """End what sessions left behind. Where a node can't be reached it is tried again."""
        for held in gone:
            self._hold_no_more(held)
        calls = (self._revoke(held.node, held.container, held.user, why[held.use]) for held in gone)
        for held, failure in zip(gone, await asyncio.gather(*calls, return_exceptions=True), strict=True):
            if failure is not None:
                self.hold(replace(held, told=True))
            if failure is not None and not held.told:
                log.warning("what a user left in a task can't be ended yet", user=held.user, reason=str(failure))

    def _all_held(self) -> list[Held]:
        return [held for of_user in self._held.values() for held in of_user.values()]

    def _hold_no_more(self, held: Held) -> None:
        of_user = self._held.get(held.user, OrderedDict())
        of_user.pop(held.use, None)
        if not of_user:
            self._held.pop(held.user, None)

    async def run(self) -> None:
        """Check every `CHECK_SECONDS`, and when `look_now` was called, until cancelled."""
        trouble = ""
        while True:
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._to_look.wait(), CHECK_SECONDS)
            self._to_look.clear()
            if self._grants or self._held:
                before, trouble = trouble, await self._trouble_with_check()
                if trouble != before:
                    _tell(trouble)

    async def _trouble_with_check(self) -> str:
        try:
            await self.check()
        except KohakuRiverError as error:
            return error.message
        except Exception as error:
            log.exception("the check of the rights of sessions has a fault")
            return repr(error)
        return ""


def _check_room(caller: Caller, have: int) -> None:
    """Raises UnavailableError "too_many_sessions" (429) where a user with so many sessions may have no more."""
    most = caller.quotas.sessions
    if most and have >= most:
        sessions = "1 session" if have == 1 else f"{have} sessions"
        raise UnavailableError(
            f"{caller.name or 'This user'} has {sessions} open, and the limit 'sessions' is {most}; end one first.",
            code="too_many_sessions",
            status=429,
        )


def _tell(trouble: str) -> None:
    if trouble:
        log.error("the rights of sessions can't be checked: those that are open go on", reason=trouble)
    else:
        log.info("the rights of sessions are checked again")

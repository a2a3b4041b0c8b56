"""Telling the host that this node is there and how its tasks are, again and again."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import httpx
import structlog

from kohakuriver import __version__, tls
from kohakuriver.errors import (
    HostUnreachableError,
    KohakuRiverError,
    NotFoundError,
    UnauthenticatedError,
    UnavailableError,
    from_answer,
)
from kohakuriver.no_connection import reason
from kohakuriver.quotas import Offer
from kohakuriver.runner.services.state import State
from kohakuriver.runtime import cancel_all
from kohakuriver.session import ticket
from kohakuriver.session.ticket import Scope, Ticket, UsedTickets
from kohakuriver.tunnel.backoff import Backoff
from kohakuriver.web.background import in_background

__all__ = ["NodeIdentity", "Registration"]

log = structlog.get_logger("kohakuriver.runner")

_ANSWER_SECONDS = 10.0
_LEAVE_SECONDS = 2.0
_LONGEST_REASON = 300
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 5.0  # seconds

TASKS_AT_ONCE = 100
"""How many tasks one heartbeat tells in full: with the longest messages some 700 kB, and a host takes 1 MiB."""


@dataclass(frozen=True)
class NodeIdentity:
    """Who this node says it is. `url` is how the host reaches it, `instance` tells it from a namesake.

    `other_hosts` are URLs of hosts on the same database, for when the one at `host_url` is away. `ca_file` holds
    the authority that signed the host's certificate; None where the system knows it. `offer` is what the node has
    for tasks.
    """

    name: str
    url: str
    instance: str
    host_url: str
    token: str
    ca_file: Path | None = None
    offer: Offer = field(default_factory=Offer)
    other_hosts: Sequence[str] = ()


class Registration:
    """Registers with the host, sends heartbeats, and registers again whenever the host does not know the node.

    `heartbeat` gives what to tell, and `told` is called with it when the host has heard it all; `backends` gives what
    is offered, or why it is not; `remove` ends a task that the host says is removed. `on_registered` is called when the
    host has taken the node in, also after it was away.
    """

    def __init__(
        self,
        identity: NodeIdentity,
        state: State,
        *,
        heartbeat: Callable[[], dict[str, Any]],
        told: Callable[[dict[str, Any]], None] = lambda beat: None,
        backends: Callable[[], dict[str, str | None]],
        remove: Callable[[int], Coroutine[Any, Any, None]],
        on_registered: Callable[[], None] = lambda: None,
    ) -> None:
        self._identity = identity
        self._state = state
        self._heartbeat = heartbeat
        self._told = told
        self._backends = backends
        self._remove = remove
        self._on_registered = on_registered
        self._changed = asyncio.Event()
        self._ticket_key = state.ticket_key
        self._used_tickets = UsedTickets(state.directory / "used-tickets")
        self._registered = False
        self._registered_at: float | None = None
        self._trouble = ""
        self._unreachable: str | None = None
        self._removing: dict[int, asyncio.Task[None]] = {}
        self._hosts = [_client(url, identity) for url in (identity.host_url, *identity.other_hosts)]
        self._away = False

    @property
    def host(self) -> str:
        """The URL of the host that is told now."""
        return str(self._http.base_url).rstrip("/")

    @property
    def _http(self) -> httpx.AsyncClient:
        return self._hosts[0]

    def changed(self) -> None:
        """Have the next heartbeat sent now."""
        self._changed.set()

    def check_ticket(self, credential: str | None, scope: Scope) -> Ticket:
        """What a ticket of the host says, and use it up.

        Raises UnauthenticatedError, NotAllowedError or UnavailableError.
        """
        if credential is None:
            raise UnauthenticatedError("This needs a ticket from the host; ask the host instead of the runner.")
        if self._ticket_key is None:
            raise UnavailableError("This node is not registered with its host yet; try again.", code="node_offline")
        checked = ticket.check(self._ticket_key, credential, node=self._identity.name, scope=scope)
        self._used_tickets.take(checked)
        return checked

    async def run(self) -> None:
        """Keep the host informed, until cancelled."""
        backoff = Backoff(_FIRST_PAUSE, _LONGEST_PAUSE)
        tried = 0
        while True:
            self._registered_at = None
            trouble = await self._stay_registered()
            tried = tried + 1 if self._registered_for() is None else 1
            backoff.ended(self._registered_for())
            if trouble != self._trouble:
                log.warning("the host does not take this node in", reason=trouble)
            self._trouble = trouble
            if self._away:
                self._hosts.append(self._hosts.pop(0))
            if not self._away or tried >= len(self._hosts):
                tried = 0
                await asyncio.sleep(backoff.pause())

    def _registered_for(self) -> float | None:
        """For how many seconds the host has had this node; None where it did not take it in."""
        return None if self._registered_at is None else time.monotonic() - self._registered_at

    async def _stay_registered(self) -> str:
        """Register and send heartbeats until something is in the way; what that is."""
        offered = self._backends()
        self._away = False
        try:
            while True:
                seconds = await self._register(offered)
                log.info("registered with the host", host=self.host, node=self._identity.name)
                self._trouble = ""
                if self._registered_at is None:
                    self._on_registered()
                self._registered_at = time.monotonic()
                with contextlib.suppress(NotFoundError):  # the host has forgotten this node: tell it again
                    offered = await self._beat(seconds, offered)
        except KohakuRiverError as error:
            self._away = isinstance(error, HostUnreachableError)
            return error.message
        except Exception:  # unheard, it would end the heartbeats, and the host would call this node offline
            log.exception("a heartbeat could not be made")
            return "this runner could not make a heartbeat; see the error above"

    async def _register(self, offered: dict[str, str | None]) -> float:
        answer = await self._post(
            "/api/nodes/register",
            {
                "name": self._identity.name,
                "url": self._identity.url,
                "instance": self._identity.instance,
                "backends": [name for name, trouble in offered.items() if trouble is None],
                "unavailable": {name: trouble[:_LONGEST_REASON] for name, trouble in offered.items() if trouble},
                "version": __version__,
                "offer": asdict(self._identity.offer),
            },
        )
        key = base64.b64decode(answer["ticket_key"])
        if key != self._ticket_key:
            self._ticket_key = self._state.ticket_key = key
        self._registered = True
        return float(answer["heartbeat_seconds"])

    async def _beat(self, seconds: float, offered: dict[str, str | None]) -> dict[str, str | None]:
        """Send heartbeats until this node offers other backends than `offered`; those."""
        while (now := self._backends()) == offered:
            self._changed.clear()
            for part in _parts(beat := self._heartbeat()):
                answer = await self._post(self._heartbeat_path, part)
                self._heed(answer.get("unreachable"))
                self._remove_soon(answer.get("remove", ()))
            self._told(beat)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), seconds)
        return now

    def _remove_soon(self, task_ids: Iterable[int]) -> None:
        """End tasks that the host says are removed, each once, beside the heartbeats: an engine may take long to."""
        for task_id in task_ids:
            if task_id not in self._removing:
                ending = self._removing[task_id] = in_background(self._remove(task_id), "ending a removed task")
                ending.add_done_callback(lambda _, task_id=task_id: self._removing.pop(task_id))  # type: ignore[misc]

    def _heed(self, unreachable: str | None) -> None:
        """Say in this node's own log what the host says of the way back."""
        if unreachable is not None and unreachable != self._unreachable:
            log.warning("the host can't reach this node", reason=unreachable)
        elif unreachable is None and self._unreachable is not None:
            log.info("the host reaches this node again")
        self._unreachable = unreachable

    @property
    def _heartbeat_path(self) -> str:
        return f"/api/nodes/{self._identity.name}/heartbeat"

    async def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        try:
            answer = await self._http.post(path, json=body)
            if answer.status_code >= 400:
                raise from_answer(
                    self.host,
                    answer.status_code,
                    answer.content,
                    location=answer.headers.get("location", ""),
                )
            content: dict[str, Any] = answer.json()
        except (httpx.HTTPError, OSError, ValueError) as error:  # without descriptors it can fail anywhere
            raise HostUnreachableError(f"The host at {self.host} {self._trouble_with(error)}.") from error
        return content

    def _trouble_with(self, error: Exception) -> str:
        """What it means that no answer came, as the rest of a sentence about the host."""
        if isinstance(error, httpx.TimeoutException):
            return f"did not answer within {_ANSWER_SECONDS:g} s"
        if isinstance(error, (httpx.RemoteProtocolError, httpx.ReadError)) and tls.reason(error) is None:
            return f"can't be reached: {tls.hung_up(self.host)}"
        return f"can't be reached: {reason(error)}"

    async def leave(self) -> None:
        """Tell the host that this node leaves, most likely to be started again. `run` must have ended.

        What is not heard the host finds out by itself, a little later.
        """
        if self._registered:
            try:
                await asyncio.wait_for(self._leave(), _LEAVE_SECONDS)
            except (KohakuRiverError, asyncio.TimeoutError):
                self._registered = False  # and doesn't wait for it once more

    async def close(self) -> None:
        """Tell the host what has become of the tasks, where it was told that this node leaves."""
        await cancel_all(self._removing.values())
        await self.leave()
        for host in self._hosts:
            await host.aclose()
        self._used_tickets.close()

    async def _leave(self) -> None:
        for part in _parts(self._heartbeat()):
            await self._post(self._heartbeat_path, {**part, "leaving": True})


def _client(host_url: str, identity: NodeIdentity) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=host_url,
        headers={"Authorization": f"Bearer {identity.token}"},
        timeout=_ANSWER_SECONDS,
        verify=tls.trusted_at(host_url, identity.ca_file),
        trust_env=False,
    )


def _parts(beat: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A heartbeat as requests that no host finds too large: each tells some tasks in full and names the others."""
    tasks = beat["tasks"]
    for start in range(0, len(tasks) or 1, TASKS_AT_ONCE):
        told = tasks[start : start + TASKS_AT_ONCE]
        others = [task["task_id"] for task in (*tasks[:start], *tasks[start + TASKS_AT_ONCE :])]
        yield {**beat, "tasks": told, "others": others}
        beat = {**beat, "incidents": []}

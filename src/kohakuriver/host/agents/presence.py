"""Writes down when agents come and when they leave (docs/guide/limits.md "Audit log")."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kohakuriver.asking import Asker, asker, asking
from kohakuriver.host.agents.book import AgentTask
from kohakuriver.host.services.audit import Audit
from kohakuriver.tunnel.protocol import CloseCode

__all__ = ["Presence"]

_REPLACED = (CloseCode.REPLACED, "replaced by a newer connection of its own")


@dataclass(frozen=True)
class _Visit:
    """An agent that is connected: since when, by whose request, and as what."""

    since: float
    who: Asker
    about: dict[str, Any]


class Presence:
    """Which agents are connected, as the audit log has it."""

    def __init__(self, audit: Audit, clock: Callable[[], float]) -> None:
        self._audit = audit
        self._clock = clock
        self._here: dict[str, _Visit] = {}

    def came(self, task: AgentTask, node: str) -> None:
        """The agent of a task is connected, and it is that which asks just now."""
        self.left(task, _REPLACED)
        about = {"task": task.task_id, "name": task.name, "owner": task.owner, "node": node}
        self._here[task.container] = _Visit(self._clock(), asker(), about)
        self._audit.write("agent_connected", **about, container=task.container, machine=task.machine)

    def left(self, task: AgentTask, ended_by: tuple[int, str] | None) -> None:
        """Its link has gone, with this code and reason, if it was closed; nothing where it was not there."""
        visit = self._here.pop(task.container, None)
        if visit is None:
            return
        code, reason = ended_by or (CloseCode.ABNORMAL, "")
        ended = {} if task.exit_code is None else {"exit_code": task.exit_code}
        seconds = round(self._clock() - visit.since, 3)
        with asking(visit.who):
            self._audit.write(
                "agent_left",
                **visit.about,
                container=task.container,
                seconds=seconds,
                code=int(code),
                reason=reason,
                **ended,
            )

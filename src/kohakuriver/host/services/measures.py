"""What a host has to tell of itself to Prometheus (docs/guide/operations.md has the list)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Protocol

from prometheus_client.core import Metric

from kohakuriver.host.services.nodes import Nodes
from kohakuriver.store import Store, tasks_by_status
from kohakuriver.web.metrics import counter, gauge

__all__ = ["HostMeasures", "Snapshots"]

NODE_STATES = ("online", "unreachable", "offline")


class Snapshots(Protocol):
    """What carries sessions of one kind: how many it has, and the bytes that passed."""

    def snapshot(self) -> dict[str, int]:
        """`sessions` now, and `bytes_to_container` and `bytes_to_user` since the start."""


class HostMeasures:
    """Sessions by their kind, nodes by their state, and tasks by their status as they were at the last `refresh`."""

    def __init__(self, carriers: Mapping[str, Snapshots], nodes: Nodes, store: Store) -> None:
        self._carriers = carriers
        self._nodes = nodes
        self._store = store
        self._by_state: Counter[str] = Counter()
        self._by_status: dict[str, int] = {}

    async def refresh(self) -> None:
        """Ask the database. Raises KohakuRiverError when it fails."""
        self._by_status = await tasks_by_status(self._store)
        self._by_state = Counter(view.status for view in await self._nodes.views())

    def look(self) -> Iterable[Metric]:
        """All of it."""
        seen = {kind: carrier.snapshot() for kind, carrier in self._carriers.items()}
        sessions = [((kind,), counts["sessions"]) for kind, counts in seen.items()]
        yield gauge("sessions", "Sessions that are open.", sessions, ("kind",))
        ways = ("to_container", "to_user")
        passed = [((kind, way), counts[f"bytes_{way}"]) for kind, counts in seen.items() for way in ways]
        yield counter("bytes", "Bytes that passed.", passed, ("kind", "direction"))
        states = [((state,), self._by_state[state]) for state in NODE_STATES]
        yield gauge("nodes", "Nodes by their state.", states, ("state",))
        statuses = [((status,), count) for status, count in self._by_status.items()]
        yield gauge("tasks", "Tasks by their status.", statuses, ("status",))

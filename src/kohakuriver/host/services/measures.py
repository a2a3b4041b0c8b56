"""What a host has to tell of itself to Prometheus (docs/guide/operations.md has the list)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Protocol

from prometheus_client.core import Metric

from kohakuriver.host.services.nodes import Nodes
from kohakuriver.store import Store, tasks_by_status
from kohakuriver.web.metrics import counter, gauge

__all__ = ["AGENT_STATES", "HostMeasures", "Snapshots"]

NODE_STATES = ("online", "unreachable", "offline")
AGENT_STATES = ("connected", "away", "lost")

_WAYS = ("to_container", "to_user")


class Snapshots(Protocol):
    """What carries sessions of one kind: how many it has, and the bytes that passed."""

    def snapshot(self) -> Mapping[str, int]:
        """`sessions` now, and `bytes_to_container` and `bytes_to_user` since the start."""


class HostMeasures:
    """Sessions by their kind, agents by their state; nodes and tasks as they were at the last `refresh`."""

    def __init__(self, carriers: Mapping[str, Snapshots], agents: Snapshots, nodes: Nodes, store: Store) -> None:
        self._carriers = carriers
        self._agents = agents
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
        passed = [((kind, way), counts[f"bytes_{way}"]) for kind, counts in seen.items() for way in _WAYS]
        yield counter("bytes", "Bytes that passed.", passed, ("kind", "direction"))
        yield from self._of_agents()
        states = [((state,), self._by_state[state]) for state in NODE_STATES]
        yield gauge("nodes", "Nodes by their state.", states, ("state",))
        statuses = [((status,), count) for status, count in self._by_status.items()]
        yield gauge("tasks", "Tasks by their status.", statuses, ("status",))

    def _of_agents(self) -> Iterable[Metric]:
        """What a runner tells of its tunnel clients, of those that dial in to this host itself."""
        now = self._agents.snapshot()
        states = [((state,), now[state]) for state in AGENT_STATES]
        yield gauge("agents", "Agents by their state.", states, ("state",))
        passed = [((way,), now[f"bytes_{way}"]) for way in _WAYS]
        yield counter("agent_bytes", "Bytes that passed to agents' tasks and back.", passed, ("direction",))
        yield gauge("streams", "Connections and UDP peers to agents' tasks.", [((), now["streams"])])
        yield counter("window_stalls", "Times that a stream had to wait for its receiver.", [((), now["stalls"])])
        yield counter("udp_dropped", "Datagrams that nobody took.", [((), now["udp_dropped"])])

"""What a runner has to tell of itself to Prometheus (docs/guide/operations.md has the list)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client.core import Metric

from kohakuriver.runner.services.task_book import TaskBook
from kohakuriver.web.measuring import Look
from kohakuriver.web.metrics import counter, gauge

__all__ = ["runner_measures"]


def runner_measures(
    snapshot: Callable[[], Mapping[str, Any]], book: TaskBook, backends: Callable[[], Mapping[str, str | None]]
) -> Look:
    """Sessions, streams and bytes as `snapshot` of the tunnel server has them, tasks, and backends (None: well)."""

    def look() -> Iterable[Metric]:
        now = snapshot()
        yield gauge("sessions", "Sessions that are open.", [(("forward",), now["sessions"])], ("kind",))
        yield gauge("streams", "Connections and UDP peers in them.", [((), now["streams"])])
        passed = [(("forward", way), now[f"bytes_{way}"]) for way in ("to_container", "to_user")]
        yield counter("bytes", "Bytes that passed.", passed, ("kind", "direction"))
        yield counter("window_stalls", "Times that a stream had to wait for its receiver.", [((), now["stalls"])])
        yield counter("udp_dropped", "Datagrams that nobody took.", [((), now["udp_dropped"])])
        tunnels = sum(1 for seen in now["containers"].values() if seen["version"])
        yield gauge("tunnels", "Tunnel clients that are connected.", [((), tunnels)])
        statuses = [((status,), count) for status, count in Counter(task.status for task in book.all()).items()]
        yield gauge("tasks", "Tasks by their status.", statuses, ("status",))
        offered = [((name,), trouble is None) for name, trouble in backends().items()]
        yield gauge("backend_up", "Whether a backend can start tasks.", offered, ("backend",))

    return look

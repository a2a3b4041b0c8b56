"""What keeps a container from taking its node from others: what it gets of it, and what it may not do there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import structlog

from kohakuriver.limits import Limits
from kohakuriver.runner.services.state import TaskRecord

__all__ = ["LOG_FILES", "OOM_SCORE", "bounds_of", "warn_of_unbounded"]

log = structlog.get_logger("kohakuriver.runner")

LOG_FILES = 4
"""In how many files the engine keeps what a container prints: when all are full the oldest goes."""

OOM_SCORE = 500
"""Where a node runs out of memory, the kernel ends a container before it ends the runner or the engine (proc(5))."""

_KEPT = {"MemoryLimit": "memory", "CpuCfsQuota": "cpus", "PidsLimit": "pids"}
"""What an engine says of its system, and which limit it can't keep without."""


def bounds_of(task: TaskRecord) -> dict[str, Any]:
    """A container's bounds, in the engine's words."""
    size = task.log_size or Limits().task_log
    return {
        "Memory": task.memory or 0,
        "MemorySwap": task.memory or 0,  # as much as its memory means that none of it is swap
        "NanoCpus": int((task.cpus or 0) * 1e9),
        "PidsLimit": task.pids or 0,
        "ShmSize": task.shm_size or 0,
        "LogConfig": {
            "Type": "json-file",
            "Config": {"max-size": str(size // LOG_FILES), "max-file": str(LOG_FILES)},
        },
        "SecurityOpt": ["no-new-privileges"],
        "CapDrop": ["NET_RAW"],
        "OomScoreAdj": OOM_SCORE,
    }


def warn_of_unbounded(about: Mapping[str, Any]) -> None:
    """Say in the log which limits that tasks need this engine does not keep, as it says `about` itself."""
    unkept = [limit for fact, limit in _KEPT.items() if not about.get(fact)]
    if unkept:
        log.warning(
            "CONTAINERS ARE NOT BOUNDED: this engine can't keep them to their limits; a rootless one needs cgroups of "
            "version 2, with these controllers",
            limits=", ".join(unkept),
        )

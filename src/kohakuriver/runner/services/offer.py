"""What this node has, and what a task gets of it that asks for nothing (docs/guide/limits.md)."""

from __future__ import annotations

import os

from kohakuriver.limits import Limits
from kohakuriver.quotas import Offer

__all__ = ["offered"]


def offered(limits: Limits) -> Offer:
    """The machine's memory and processors, and what the environment says of tasks: never more than the machine has."""
    memory, cpus = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), os.cpu_count() or 1
    task_memory = min(limits.task_memory or memory // 2, memory)
    return Offer(
        memory=memory,
        cpus=cpus,
        task_memory=task_memory,
        task_cpus=min(limits.task_cpus, cpus),
        task_pids=limits.task_pids,
        task_shm=min(limits.task_shm, task_memory),
        task_log=limits.task_log,
    )

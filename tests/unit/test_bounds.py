"""What an engine is told of a container's bounds, and what is said where it can't keep them."""

from __future__ import annotations

from typing import Any

import pytest
from structlog.testing import capture_logs

from kohakuriver.runner.backends.docker.bounds import LOG_FILES, bounds_of, warn_of_unbounded
from kohakuriver.runner.services.state import TaskRecord


def record(**more: Any) -> TaskRecord:
    return TaskRecord(task_id=1, container="kohakuriver-vps-1", backend="docker", **more)


def test_a_container_is_kept_to_what_its_order_says() -> None:
    bounds = bounds_of(record(memory=1 << 30, cpus=1.5, pids=99, shm_size=1 << 26, log_size=1 << 20))
    assert (bounds["Memory"], bounds["MemorySwap"], bounds["ShmSize"]) == (1 << 30, 1 << 30, 1 << 26)
    assert (bounds["NanoCpus"], bounds["PidsLimit"]) == (1_500_000_000, 99)
    log = bounds["LogConfig"]["Config"]
    assert int(log["max-size"]) * int(log["max-file"]) == 1 << 20


def test_a_container_of_which_nothing_is_said_has_a_bounded_log_and_few_rights() -> None:
    bounds = bounds_of(record())
    assert (bounds["Memory"], bounds["NanoCpus"], bounds["PidsLimit"]) == (0, 0, 0)
    assert 0 < int(bounds["LogConfig"]["Config"]["max-size"]) * LOG_FILES <= 64 << 20
    assert (bounds["SecurityOpt"], bounds["CapDrop"]) == (["no-new-privileges"], ["NET_RAW"])


@pytest.mark.parametrize(
    ("about", "limits"),
    [
        ({"MemoryLimit": True, "CpuCfsQuota": True, "PidsLimit": True}, None),
        ({"MemoryLimit": True, "CpuCfsQuota": False, "PidsLimit": True}, "cpus"),
        ({"MemoryLimit": False, "CpuCfsQuota": False, "PidsLimit": False}, "memory, cpus, pids"),
    ],
)
def test_a_runner_says_which_limits_its_engine_does_not_keep(about: dict[str, bool], limits: str | None) -> None:
    with capture_logs() as lines:
        warn_of_unbounded(about)
    assert [line["limits"] for line in lines] == ([] if limits is None else [limits])

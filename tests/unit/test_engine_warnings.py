"""What a runner says of an engine that can't do all that tasks need."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from kohakuriver.runner.backends.docker.bounds import warn_of_unbounded

KEPT = {"MemoryLimit": True, "CpuCfsQuota": True, "PidsLimit": True, "SwapLimit": True}


@pytest.mark.parametrize(
    ("about", "warnings"),
    [
        ({**KEPT, "SecurityOptions": ["name=seccomp,profile=default"]}, []),
        ({**KEPT, "SecurityOptions": None}, []),
        ({**KEPT, "SecurityOptions": ["name=userns"]}, []),
        ({**KEPT, "SecurityOptions": ["name=seccomp", "name=rootless"]}, ["THIS ENGINE IS ROOTLESS"]),
        ({"SecurityOptions": ["name=rootless"]}, ["THIS ENGINE IS ROOTLESS", "CONTAINERS ARE NOT BOUNDED"]),
    ],
)
def test_an_engine_that_keeps_no_limits_or_leads_no_tunnel_here_is_told_of(
    about: dict[str, Any], warnings: list[str]
) -> None:
    async def info() -> dict[str, Any]:
        return about

    with capture_logs() as lines:
        asyncio.run(warn_of_unbounded(cast(Any, SimpleNamespace(system=SimpleNamespace(info=info)))))
    assert [line["event"].partition(":")[0] for line in lines] == warnings

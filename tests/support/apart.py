"""What a file's tests share: a host and a runner started one by one, and a task whose service echoes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.processes import eventually
from tests.support.up import Apart, Service

__all__ = ["cluster", "service"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Apart]:
    """The admin's commands, with a token in the environment."""
    cluster = Apart(tmp_path_factory.mktemp("cluster"))
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def service(cluster: Apart) -> Service:
    """The node runs processes by now, of which this is one."""
    eventually(lambda: "process" in cluster.run("node", "list", "--json").stdout)
    return cluster.service()

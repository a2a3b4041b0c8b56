"""What a runner says of an engine that can't do all that tasks need, and where it doesn't give containers a door."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import pytest
from structlog.testing import capture_logs

from kohakuriver.runner.backends.docker.bounds import warn_of_unbounded
from kohakuriver.runner.backends.docker.tasks import DockerBackend
from kohakuriver.runner.backends.docker.whose_kernel import why_no_sockets

KEPT = {"MemoryLimit": True, "CpuCfsQuota": True, "PidsLimit": True, "SwapLimit": True}
HERE = {**KEPT, "KernelVersion": os.uname().release, "DefaultRuntime": "runc"}
ROOTLESS = {**HERE, "SecurityOptions": ["name=seccomp", "name=rootless"]}


@pytest.mark.parametrize(
    ("about", "warnings"),
    [
        ({**KEPT, "SecurityOptions": ["name=seccomp,profile=default"]}, []),
        ({**KEPT, "SecurityOptions": None}, []),
        ({"SecurityOptions": ["name=rootless"]}, ["CONTAINERS ARE NOT BOUNDED"]),
    ],
)
def test_an_engine_that_keeps_no_limits_is_told_of(about: dict[str, Any], warnings: list[str]) -> None:
    with capture_logs() as lines:
        warn_of_unbounded(about)
    assert [line["event"].partition(":")[0] for line in lines] == warnings


class Connector(aiohttp.UnixConnector):
    """As the engine's client has it, without an event loop: nothing is dialled."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)

    def __del__(self, *_: Any) -> None:
        pass


@pytest.fixture
def engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An engine's client whose socket is of this user."""
    (tmp_path / "docker.sock").touch()
    monkeypatch.setattr(aiohttp, "UnixConnector", Connector)
    return SimpleNamespace(connector=Connector(tmp_path / "docker.sock"))


@pytest.mark.parametrize(
    ("about", "why"),
    [
        (HERE, None),
        ({**HERE, "SecurityOptions": ["name=seccomp", "name=userns"]}, None),
        (ROOTLESS, None),  # it is this user's
        ({**HERE, "KernelVersion": "6.6.0-elsewhere"}, "another machine"),
        ({**HERE, "DefaultRuntime": "runsc"}, "a kernel of their own"),
        ({**HERE, "SecurityOptions": ["name=selinux"]}, "SELinux"),
    ],
)
def test_containers_get_a_door_where_nothing_keeps_them_from_it(
    engine: Any, about: dict[str, Any], why: str | None
) -> None:
    found = why_no_sockets(engine, about)
    assert found is None if why is None else why in str(found)


def test_containers_of_an_engine_that_is_reached_over_the_network_get_no_door(engine: Any) -> None:
    engine.connector = object()
    assert "over the network" in str(why_no_sockets(engine, HERE))


def test_why_containers_get_no_door_is_said_once(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    backend = cast(Any, DockerBackend.__new__(DockerBackend))
    backend._no_doors, backend._watch = None, SimpleNamespace(docker=engine)
    with capture_logs() as lines:
        for _ in range(2):
            backend._judge_doors(ROOTLESS)
    assert [line["event"].partition(":")[0] for line in lines] == [
        "containers reach this runner over TCP",
        "THIS ENGINE IS ROOTLESS",
    ]

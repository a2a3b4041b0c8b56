"""Forwards in the background, as tests start them and look at them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.apart import cluster, service
from tests.support.up import Apart, Commands, Service, connect, echoes

__all__ = ["cluster", "detach", "gone", "left_of", "listed", "service", "user", "user_of", "works"]


@pytest.fixture
def user(cluster: Apart, tmp_path: Path) -> Iterator[Commands]:
    """Somebody who uses the cluster, and has nothing in the background yet."""
    with user_of(cluster, tmp_path) as user:
        yield user


@contextlib.contextmanager
def user_of(cluster: Commands, directory: Path) -> Iterator[Commands]:
    """Somebody who uses the cluster, and has nothing in the background at first; and nothing is left at the end."""
    user = Commands(directory)
    user.environment |= {name: cluster.environment[name] for name in ("KOHAKURIVER_HOST", "KOHAKURIVER_TOKEN")}
    yield user
    user.run("forward", "--stop", "--all")
    left = {each["pid"] for each in listed(user)}
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    user.close()
    assert left == set()


def listed(user: Commands) -> list[dict[str, Any]]:
    forwards: list[dict[str, Any]] = json.loads(user.succeed("forward", "--list", "--json"))["forwards"]
    return forwards


def detach(user: Commands, service: Service, *more: str, **environment: str) -> tuple[str, int]:
    """The id and the local port of a forward in the background."""
    done = user.run("forward", service.task, f"0:{service.port}", "--detach", "--json", *more, **environment)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    port = next(event["local_port"] for event in events if event["event"] == "listening")
    return events[-1]["id"], port


def works(port: int) -> bool:
    with connect(port) as connection:
        return echoes(connection)


def gone(pid: int) -> bool:
    try:
        process = psutil.Process(pid)
        # The first of its threads may have ended before the others, which still have its sockets.
        return process.status() == psutil.STATUS_ZOMBIE and process.num_threads() == 1
    except psutil.NoSuchProcess:
        return True


def left_of(user: Commands) -> list[str]:
    """What is in the directory of those in the background, without the names of machines."""
    return sorted(re.sub(r"\.\w+-\w*", "", path.name) for path in (user.directory / "forwards").iterdir())

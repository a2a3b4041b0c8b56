"""Two hosts on one PostgreSQL, under traffic: what is replaced or killed loses nothing and stalls nobody long."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support.docker_images import busybox_image, require_engine
from tests.support.echoing import Traffic
from tests.support.postgres import Postgres
from tests.support.processes import eventually
from tests.support.services import echo
from tests.support.two_hosts import NAMES, Asking, TwoHosts, balancer, two_hosts

OUTSIDE = ("/bin/busybox", "chroot", "/host")
"""What leads from the container's image to this machine's programs."""
SIZES = (64, 64, 4096, 1 << 20)
BACK = 3.0
"""Seconds within which everything goes on after a host was killed."""
STALL = 2.0
"""Seconds that a round may take while a hop is replaced in good order, on a busy machine."""
ROUNDS = int(os.environ.get("KOHAKURIVER_TEST_ROUNDS", "1"))
"""How often everything is restarted; by hand it may be for minutes."""

pytestmark = [pytest.mark.docker, pytest.mark.timeout(240 + 30 * ROUNDS)]


@pytest.fixture
def hosts(postgres: Postgres, tmp_path: Path) -> Iterator[TwoHosts]:
    """With two runners of containers, and on each a task that echoes, with the node's name."""
    require_engine()
    with two_hosts(tmp_path, postgres.new_database(), "--drain=20", "--drain-notice=1") as hosts:
        for node in ("n1", "n2"):
            hosts.start_runner(node, "--backend=docker")
            eventually(partial(hosts.online, node))
            more = {"node": node, "backend": "docker", "image": busybox_image(), "mounts": ["/:/host"]}
            hosts.ports[node] = hosts.echo_task(f"on-{node}", **more, command=[*OUTSIDE, *echo()])
        yield hosts
        for node in ("n1", "n2"):
            hosts.http["a"].delete(f"/api/tasks/on-{node}")


@contextlib.contextmanager
def traffic(hosts: TwoHosts, *ways: str) -> Iterator[list[Traffic]]:
    """Streams to both nodes by each way, a host's URL or several; at the end none is broken."""
    with contextlib.ExitStack() as stack:
        flows = []
        for way in ways:
            for node in ("n1", "n2"):
                forward = stack.enter_context(hosts.forward(f"on-{node}", hosts.ports[node], host=way))
                flows += [Traffic(forward.local_port, size) for size in SIZES]
        try:
            assert all(each.goes_on() for each in flows)
            yield flows
            assert all(each.goes_on() for each in flows), [each.broken for each in flows]
        finally:
            for each in flows:
                each.end()


def test_everything_is_restarted_in_turn_and_no_byte_is_lost_and_no_request_fails(hosts: TwoHosts) -> None:
    with balancer(hosts) as url, traffic(hosts, url, ",".join(hosts.urls.values())) as flows:
        asking = Asking(url, hosts.token)
        began = time.monotonic()
        for _ in range(ROUNDS):
            for name in NAMES:
                hosts.restart_host(name)
                assert all(each.goes_on() for each in flows), [each.broken for each in flows]
            for node in ("n1", "n2"):
                hosts.restart_runner(node)
                assert all(each.goes_on() for each in flows), [each.broken for each in flows]
        seconds = time.monotonic() - began
        asking.end()
    moved, slowest = sum(each.moved for each in flows), max(each.slowest for each in flows)
    print(f"{seconds:.0f} s, {ROUNDS} rounds, {moved} bytes, slowest {slowest:.2f} s, {asking.asked} requests")
    assert asking.asked
    assert asking.failed == []


def test_a_host_that_is_killed_stalls_its_sessions_for_seconds_alone(hosts: TwoHosts) -> None:
    """Of those who know both hosts."""
    with traffic(hosts, ",".join(hosts.urls.values())) as flows:
        hosts.hosts["a"].stop(signal.SIGKILL)
        began = time.monotonic()
        assert all(each.goes_on() for each in flows), [each.broken for each in flows]
        seconds = time.monotonic() - began
        hosts.start_host("a")
    print(f"all go on {seconds:.2f} s after the kill, slowest round {max(each.slowest for each in flows):.2f} s")
    assert seconds < BACK
    assert max(each.slowest for each in flows) < BACK

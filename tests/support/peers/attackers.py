"""Who attacks, and with what: each attack is one peer, in a process of its own (attack.py beside this)."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator

from tests.support.hops import ROOT
from tests.support.peers.wire import PATIENCE, Counts, Target
from tests.support.processes import Cluster, eventually
from tests.support.services import echo, port_in

# Where the machine is that stands for the attacker's own.
ELSEWHERE = "127.0.0.7"


def process_task(cluster: Cluster, *command: str) -> tuple[str, str, int]:
    """A process task that is connected: its id, its container, and the port that it printed."""
    task = cluster.create(*command, backend="process")
    cluster.connected(task["task_id"])
    return str(task["task_id"]), task["container"], eventually(lambda: port_in(cluster.log_of(task)))


def _an_ordinary_user(cluster: Cluster, *tasks: str) -> str:
    """The token of a new user, who may use these tasks."""
    name = f"mallory{tasks[0]}"
    for path, body in [("users", {"name": name}), *((f"tasks/{task}/shares", {"user": name}) for task in tasks)]:
        status, answer = cluster.call("POST", f"/api/{path}", body)
        assert status == 201, answer
    status, answer = cluster.call("POST", "/api/tokens", {"user": name})
    assert status == 201, answer
    return str(answer["token"])


def _tunnel_token(cluster: Cluster, node: str, container: str) -> str:
    """What the runner of a node keeps of a container's tunnel client."""
    tasks = json.loads((cluster.state_of(node) / "tasks.json").read_text())
    return next(str(task["tunnel_token"]) for task in tasks if task["container"] == container)


def _container(cluster: Cluster, image: str) -> str:
    """A container's task that is connected."""
    task = cluster.create("/bin/busybox", "sleep", "1000", image=image, backend="docker")
    return str(cluster.connected(task["task_id"])["task_id"])


@contextlib.contextmanager
def attackers_own(cluster: Cluster, node: str, image: str = "") -> Iterator[Target]:
    """What the attacker, an ordinary user, has.

    That is a task with a service, a machine on whose tunnel it can speak, a task whose tunnel never comes, and
    somebody's token. Its terminals are in containers of the `image`, where there is one.
    """
    task, _, port = process_task(cluster, *echo())
    _, victim, _ = process_task(cluster, *echo())
    status, machine = cluster.call("POST", "/api/tasks/adopt", {"address": ELSEWHERE, "node": node})
    assert status == 201, machine
    own_task = str(machine["task_id"])
    agent = cluster.call("GET", f"/api/tasks/{own_task}/agent")[1]
    silent = cluster.create("sleep", "1000", backend="process", env={"RUNNER_URL": "http://127.0.0.1:9"})
    rooms = [_container(cluster, image) for _ in range(2)] if image else [task, str(silent["task_id"])]
    yield Target(
        host_port=int(cluster.url.rpartition(":")[2]),
        runner_port=int(cluster.runners[node].ready["url"].rpartition(":")[2]),
        ssh_port=int(cluster.host.ready["ssh_proxy"].rpartition(":")[2]),
        token=_an_ordinary_user(cluster, *dict.fromkeys([task, own_task, str(silent["task_id"]), *rooms])),
        task=task,
        service_port=port,
        own_task=own_task,
        container=agent["container"],
        tunnel_token=agent["token"],
        silent_task=str(silent["task_id"]),
        terminal_tasks=(rooms[0], rooms[1]),
        victim=victim,
        victims_token=_tunnel_token(cluster, node, victim),
    )
    for room in rooms if image else ():
        status, answer = cluster.call("DELETE", f"/api/tasks/{room}")
        assert status == 200, answer


@contextlib.contextmanager
def attacked(name: str, target: Target) -> Iterator[Counts]:
    """Run an attack in a process of its own; inside the `with` it is under way, and all it sent has been taken.

    Yields what it did. AssertionError where it did not happen.
    """
    argv = [sys.executable, "-m", "tests.support.peers.attack", name, target.to_json()]
    with subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            said, _, counts = process.stdout.readline().partition(" {")
            assert said == "under way", f"{name} did not happen, its exit code is {process.wait()}"
            yield json.loads("{" + counts)
            process.stdin.close()
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()

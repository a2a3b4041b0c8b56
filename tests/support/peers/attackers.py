"""Who attacks, with what, and how: each attack is one peer, in a process of its own.

`python -m tests.support.peers.attackers NAME TARGET` runs one by itself (`TARGET` is a Target as JSON): it prints
`under way` once all of it is with the other side, and then holds what it opened until its stdin ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

from kohakuriver.runner.services.state import State
from tests.support.hops import ROOT
from tests.support.peers.greedy import GREEDY
from tests.support.peers.hostile import ATTACKS
from tests.support.peers.wire import PATIENCE, Attack, Target
from tests.support.processes import Cluster, eventually
from tests.support.services import echo, port_in

EVERY_ATTACK: dict[str, Attack] = ATTACKS | GREEDY

# A task that does nothing, and prints the process id of its tunnel client where others print their port.
QUIET = "import os, signal; print('port', os.getppid(), flush=True); signal.pause()"


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


@contextlib.contextmanager
def attackers_own(cluster: Cluster, node: str) -> Iterator[Target]:
    """What the attacker, an ordinary user, has: a task with a service, and a container whose tunnel it can speak on."""
    task, _, port = process_task(cluster, *echo())
    own_task, container, tunnel_client = process_task(cluster, sys.executable, "-c", QUIET)
    os.kill(tunnel_client, signal.SIGSTOP)  # so that it does not come back when the attacker takes its place
    yield Target(
        host_port=int(cluster.url.rpartition(":")[2]),
        runner_port=int(cluster.runners[node].ready["url"].rpartition(":")[2]),
        ssh_port=int(cluster.host.ready["ssh_proxy"].rpartition(":")[2]),
        token=_an_ordinary_user(cluster, task, own_task),
        task=task,
        service_port=port,
        own_task=own_task,
        container=container,
        tunnel_token=State(cluster.state_of(node)).tunnel_token(container),
    )
    os.kill(tunnel_client, signal.SIGCONT)


def main() -> None:
    name, target = sys.argv[1:]
    for _ in EVERY_ATTACK[name](Target(**json.loads(target))):
        print("under way", flush=True)
        sys.stdin.read()


@contextlib.contextmanager
def attacked(name: str, target: Target) -> Iterator[None]:
    """Run an attack in a process of its own; inside the `with` it is under way, and all it sent has been taken."""
    argv = [sys.executable, "-m", "tests.support.peers.attackers", name, target.to_json()]
    with subprocess.Popen(argv, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            assert process.stdout.readline() == "under way\n", f"{name} ended early: {process.wait()}"
            yield
            process.stdin.close()
            assert process.wait(PATIENCE) == 0
        finally:
            process.kill()


if __name__ == "__main__":
    main()

"""One user of a node's Docker engine does all that may be done: another user's work there goes on."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from tests.support.processes import PATIENCE, Cluster, a_cluster, eventually

pytestmark = [pytest.mark.docker, pytest.mark.usefixtures("engine")]

STAY = ("/bin/busybox", "sleep", "100000")
NORMAL = 10.0
"""Seconds; alone each of these takes one or two."""


class Person:
    """An ordinary user."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        assert cluster.call("POST", "/api/users", {"name": name})[0] == 201
        self.token = cluster.call("POST", "/api/tokens", {"user": name})[1]["token"]
        headers = {"Authorization": f"Bearer {self.token}"}
        self.cluster = cluster
        self.asking: dict[str, Any] = {"base_url": cluster.url, "headers": headers, "timeout": 60, "trust_env": False}

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        with httpx.Client(**self.asking) as client:
            answer = client.request(method, path, json=body)
        return answer.status_code, answer.json()

    def create(self, name: str, image: str, *command: str) -> dict[str, Any]:
        status, task = self.call("POST", "/api/tasks", {"name": name, "image": image, "command": list(command)})
        assert status == 201, task
        return task

    @contextlib.contextmanager
    def terminal(self, task: str, *command: str) -> Iterator[ClientConnection]:
        """A terminal with a command in it."""
        url = f"ws{self.cluster.url.removeprefix('http')}/ws/task/{task}/terminal?start=1"
        with connect(
            url,
            additional_headers={"Authorization": f"Bearer {self.token}"},
            subprotocols=[Subprotocol("kohakuriver.terminal.v2")],
            open_timeout=PATIENCE,
            proxy=None,
        ) as opened:
            opened.send(json.dumps({"type": "start", "tty": True, "command": list(command)}))
            yield opened


@contextlib.contextmanager
def a_docker_cluster(directory: Path, *arguments: str, **env: str) -> Iterator[Cluster]:
    with a_cluster(directory) as cluster, ExitStack() as stack:
        stack.callback(_remove_all, cluster)
        cluster.start_runner("n1", "--backend", "docker", *arguments, env=env)
        yield cluster


def _remove_all(cluster: Cluster) -> None:
    for task in cluster.call("GET", "/api/tasks")[1]:
        cluster.call("DELETE", f"/api/tasks/{task['task_id']}")
        subprocess.run(["docker", "rm", "-f", task["container"]], capture_output=True, check=False)


class Registry:
    """What answers requests of `docker pull` as `answer` says: nothing at all for None. `asked` counts them."""

    def __init__(self, answer: bytes | None) -> None:
        self.asked = 0
        self._answer = answer
        self._sock = socket.create_server(("127.0.0.1", 0))
        self.name = f"127.0.0.1:{self._sock.getsockname()[1]}"
        self._open: list[socket.socket] = []
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Registry:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for sock in [self._sock, *self._open]:
            sock.close()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                peer, _ = self._sock.accept()
                self._open.append(peer)
                self.asked += 1
                if self._answer is not None:
                    peer.recv(65536)
                    peer.sendall(self._answer)
                    peer.shutdown(socket.SHUT_WR)


def until(terminal: ClientConnection, text: bytes) -> None:
    """Receive output until it contains `text`."""
    seen = b""
    while text not in seen:
        message = terminal.recv(PATIENCE)
        seen += message if isinstance(message, bytes) else b""


def took(work: Callable[[], object]) -> float:
    start = time.monotonic()
    work()
    return time.monotonic() - start


def test_as_many_terminals_as_one_user_may_have_hold_up_nobody_else(tmp_path: Path, busybox: str) -> None:
    with a_docker_cluster(tmp_path) as cluster, ExitStack() as stack:
        eve, ann = Person(cluster, "eve"), Person(cluster, "ann")
        for name in ("first", "second", "third"):
            eve.create(name, busybox, *STAY)
        ann.create("hers", busybox, *STAY)

        def cat(task: str) -> ClientConnection:
            terminal = stack.enter_context(eve.terminal(task, "/bin/busybox", "cat"))
            terminal.send(b"ready\r")
            until(terminal, b"ready")
            return terminal

        with ThreadPoolExecutor(8) as pool:
            terminals = list(pool.map(cat, ["first"] * 64 + ["second"] * 64))
        for task, whose in (("first", "This task has 64 "), ("third", "eve has 128 ")):
            with pytest.raises(InvalidStatus) as refused, eve.terminal(task):
                pass
            assert refused.value.response.status_code == 429
            assert whose in json.loads(refused.value.response.body)["message"]

        def hello() -> None:
            with ann.terminal("hers", "/bin/busybox", "echo", "hello") as terminal:
                until(terminal, b"hello")

        assert took(hello) < NORMAL
        assert took(lambda: ann.create("another", busybox, *STAY)) < NORMAL
        assert (
            took(lambda: ann.call("POST", "/api/tasks/another/stop")) < NORMAL + 10
        )  # what sleep has to end by itself
        assert ann.call("DELETE", "/api/tasks/hers")[0] == 200
        assert cluster.task("first")["status"] == "running"
        for terminal in terminals:
            terminal.send(b"still there\r")
            until(terminal, b"still")


def test_slow_pulls_of_one_user_hold_up_nobody_elses_work_nor_pulls(tmp_path: Path, busybox: str) -> None:
    with Registry(None) as slow, a_docker_cluster(tmp_path, "--registry", slow.name) as cluster:
        eve, ann = Person(cluster, "eve"), Person(cluster, "ann")
        with ThreadPoolExecutor(20) as pool:
            for i in range(6):  # three times as many as are fetched at a time
                body = {"name": f"slow{i}", "image": f"{slow.name}/image{i}", "command": list(STAY)}
                pool.submit(eve.call, "POST", "/api/tasks", body)
            eventually(lambda: slow.asked >= 2)
            assert took(lambda: ann.create("hers", busybox, *STAY)) < NORMAL
            before = slow.asked
            pool.submit(ann.call, "POST", "/api/tasks", {"name": "pulled", "image": f"{slow.name}/her/image"})
            eventually(lambda: slow.asked > before)
            for i in range(6):
                assert eve.call("DELETE", f"/api/tasks/slow{i}")[0] == 200


def test_a_pull_of_which_nothing_comes_is_given_up(tmp_path: Path) -> None:
    with (
        Registry(None) as slow,
        a_docker_cluster(tmp_path, "--registry", slow.name, KOHAKURIVER_PULL_TIMEOUT="1") as cluster,
    ):
        status, answer = cluster.call("POST", "/api/tasks", {"image": f"{slow.name}/a/b"})
    assert (status, answer["error"]) == (404, "image_pull_stalled")


def test_a_node_asks_no_registry_that_it_was_not_given(tmp_path: Path) -> None:
    with Registry(None) as stranger, a_docker_cluster(tmp_path) as cluster:
        for registry in (stranger.name, "ghcr.io", "169.254.169.254"):
            status, answer = cluster.call("POST", "/api/tasks", {"image": f"{registry}/a/b", "name": "none"})
            assert (status, answer["error"]) == (409, "registry_not_allowed"), answer
            assert f"--registry {registry}" in answer["message"]
        assert stranger.asked == 0
        for image in ("../containers/x", "a?b=c", "a#b", "..%2Fcontainers"):
            assert cluster.call("POST", "/api/tasks", {"image": image})[0] == 400


def test_what_a_registry_says_is_for_the_runners_log_alone(tmp_path: Path) -> None:
    secret = json.dumps({"errors": [{"code": "DENIED", "message": "the secret of another server"}]}).encode()
    head = f"HTTP/1.1 403 Forbidden\r\nContent-Type: application/json\r\nContent-Length: {len(secret)}\r\n\r\n"
    with Registry(head.encode() + secret) as registry:
        with a_docker_cluster(tmp_path, "--registry", registry.name) as cluster:
            status, answer = cluster.call("POST", "/api/tasks", {"image": f"{registry.name}/a/b", "name": "none"})
            assert status == 404
            assert answer["error"] in ("image_not_found", "image_pull_failed")
            assert f"{registry.name}/a/b" in answer["message"]
            assert cluster.call("GET", "/api/tasks/none")[0] == 404
            assert "secret" not in answer["message"]
            assert "secret" in cluster.runners["n1"].log.read_text()

"""The host's HTTP API over real sockets, with nodes that do as the test says."""

from __future__ import annotations

import asyncio
import base64
import re
import stat
import threading
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

import httpx
import pytest

from kohakuriver.errors import KohakuRiverError, UnavailableError
from kohakuriver.runner.services.registration import TASKS_AT_ONCE, NodeIdentity, Registration
from kohakuriver.runner.services.state import State
from kohakuriver.runner.services.task_book import LONGEST_MESSAGE
from kohakuriver.store import Node, Task
from tests.support.hops import until
from tests.support.host_only import HEARTBEAT_SECONDS, FakeRunner, HostUnderTest, a_host

Run = Callable[[Coroutine[Any, Any, None]], None]

TASK_FIELDS = {"pending_removal", "no_direct", "preserve_host", "keep_prefix"} | {
    *(
        "task_id",
        "name",
        "node",
        "backend",
        "status",
        "tunnel",
        "image",
        "address",
        "container",
        "created_at",
        "message",
    ),
    "owner",
    *(
        "creator",
        "ssh_port",
        "ssh_host_key",
        "ssh_host_key_ecdsa",
        "shared_with",
        "traffic",
        "command",
        "mounts",
        "volumes",
        "env",
        "exit_code",
    ),
    *("memory", "cpus", "pids", "shm_size", "log_size", "ttl", "idle_stop", "ends_at", "network"),
    *("time_limit", "partition", "account", "qos"),
    *("entrypoint", "workdir", "run_as", "pull", "devices", "labels", "restart", "gpus", "gpu_ids"),
}


def test_a_new_task_is_started_on_a_node_and_told_of_in_full(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            task = await host.create(name="web", command=["serve", "-p", "80"], env={"A": "b=c"})
            assert set(task) == TASK_FIELDS
            assert (task["name"], task["node"], task["backend"], task["status"]) == ("web", "n1", "process", "running")
            assert (task["command"], task["env"], task["mounts"]) == (["serve", "-p", "80"], ["A"], [])
            assert task["owner"] == "admin"
            assert task["container"] == f"kohakuriver-task-{task['task_id']}"
            assert len(str(task["task_id"])) == 10
            method, path, body = runner.asked[0]
            assert (method, path) == ("POST", "/api/tasks")
            assert (body["command"], body["env"]) == (["serve", "-p", "80"], {"A": "b=c"})
            by_id = await host.user.get(f"/api/tasks/{task['task_id']}")
            assert by_id.json() == (await host.user.get("/api/tasks/web")).json() == task
            assert (await host.user.get("/api/tasks")).json() == [task]

    run(check())


def test_a_task_without_a_name_gets_one(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            await host.runner()
            task = await host.create()
            assert task["name"] == f"vps-{task['task_id']}"

    run(check())


def test_an_image_means_a_container(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            await host.runner()
            task = await host.create(image="busybox")
            assert (task["backend"], task["container"]) == ("docker", f"kohakuriver-vps-{task['task_id']}")

    run(check())


def test_a_new_task_goes_to_the_least_loaded_node_that_fits(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            await host.runner("a", backends=("docker",))
            await host.runner("b")
            await host.runner("c")
            assert [(await host.create())["node"] for _ in range(4)] == ["b", "c", "b", "c"]
            assert (await host.create(node="b"))["node"] == "b"

    run(check())


KEY = base64.b64encode(b"\0\0\0\x0bssh-ed25519\0\0\0\x20" + bytes(32)).decode()
REFUSED: list[tuple[dict[str, Any], int, str, str]] = [
    ({}, 400, "bad_request", "--image"),
    ({"node": "nowhere", "image": "x"}, 404, "not_found", "node list"),
    ({"node": "n1", "backend": "docker", "image": "x"}, 409, "backend_not_offered", "Docker engine"),
    ({"image": "x"}, 409, "backend_not_offered", "No node that is online offers"),
    ({"backend": "docker"}, 400, "bad_request", "--image"),
    ({"backend": "process", "image": "x"}, 400, "bad_request", "--image"),
    ({"mounts": ["/a:/b"], "backend": "process"}, 400, "bad_request", "--mount"),
    ({"entrypoint": ["x"], "backend": "process"}, 400, "bad_request", "--entrypoint"),
    ({"run_as": "x", "backend": "process"}, 400, "bad_request", "takes --user;"),
    ({"devices": ["/dev/null"], "backend": "process"}, 400, "bad_request", "--device"),
    ({"labels": ["a=b"], "backend": "process"}, 400, "bad_request", "takes --label;"),
    ({"image": "x", "labels": ["kohakuriver.task=1"]}, 400, "bad_request", "labels of kohakuriver are its own"),
    ({"image": "x", "labels": ["a"]}, 400, "bad_request", "write K=V"),
    ({"image": "x", "workdir": "a/b"}, 400, "bad_request", "whole path"),
    ({"image": "x", "run_as": "a:b:c"}, 400, "bad_request", "USER:GROUP"),
    ({"image": "x", "gpus": "some"}, 400, "bad_request", "how many, all, or numbers"),
    ({"gpus": "1", "backend": "process"}, 400, "bad_request", "--gpus"),
    ({"image": "x", "time_limit": 60}, 400, "bad_request", "Only a task of a scheduler takes --time"),
    ({"backend": "process", "partition": "gpu"}, 400, "bad_request", "Only a task of a scheduler takes --partition"),
    ({"backend": "slurm", "partition": "a b"}, 400, "bad_request", "write a name as Slurm has it"),
    ({"backend": "slurm", "gpus": "0,1"}, 400, "bad_request", "say with --gpus how many"),
    ({"backend": "slurm", "shm_size": 1 << 20}, 400, "bad_request", "--shm-size"),
    ({"backend": "slurm", "run_as": "root"}, 400, "bad_request", "--user"),
    ({"image": "x", "restart": "on-failure:0"}, 400, "bad_request", "on-failure:N"),
    ({"image": "x", "pull": "sometimes"}, 400, "bad_request", "'always'"),
    ({"image": "x", "devices": ["/etc/passwd"]}, 400, "bad_request", "/dev/NAME"),
    ({"image": "x", "mounts": ["a"]}, 400, "bad_request", "SOURCE:/TARGET"),
    ({"name": "123"}, 400, "bad_request", "a number means a task's id"),
    ({"name": "lab.kohakuriver"}, 400, "bad_request", "to ssh the name before .kohakuriver is a task's"),
    ({"name": "Über"}, 400, "bad_request", "a-z"),
    ({"name": "a" * 64}, 400, "bad_request", "63"),
    ({"name": "web\n"}, 400, "bad_request", "a-z"),
    ({"command": ["a\0b"]}, 400, "bad_request", "NUL"),
    ({"env": {"A=B": "x"}}, 400, "bad_request", "variable"),
    ({"ssh_keys": [f"ssh-ed25519 {KEY}"] * 101}, 400, "bad_request", "at most 100"),
    ({"ssh_keys": ["-----BEGIN OPENSSH PRIVATE KEY-----"]}, 400, "bad_request", "public key"),
    ({"ssh_keys": [f'command="sh" ssh-ed25519 {KEY}']}, 400, "bad_request", "public key"),
    ({"ssh_keys": [f"ssh-rsa {KEY}"]}, 400, "bad_request", "public key"),
    ({"ssh_keys": [f"ssh-ed25519 {KEY} me\nssh-rsa"]}, 400, "bad_request", "public key"),
    ({"comand": []}, 400, "bad_request", "comand"),
]


@pytest.mark.parametrize(("body", "status", "code", "words"), REFUSED)
def test_a_task_that_can_not_be_is_refused_in_a_sentence(
    run: Run, tmp_path: Path, body: dict[str, Any], status: int, code: str, words: str
) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            await host.runner(backends=("process",))
            answer = await host.user.post("/api/tasks", json=body)
            got = answer.json()
            assert (answer.status_code, set(got), got["error"]) == (status, {"error", "message"}, code)
            assert words in got["message"]
            assert got["message"].endswith(".")
            assert (await host.user.get("/api/tasks")).json() == []

    run(check())


def test_a_body_of_a_hundred_thousand_values_is_refused_before_it_is_taken_apart(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            await host.runner()
            wrong = {"backend": "docker", "image": "i", "command": [0] * 100_000}
            for client, path, body in (
                (host.user, "/api/tasks", wrong),
                (host.user, "/api/tasks", {"image": {"a": [[0] * 100_000]}}),
                (host.node, "/api/nodes/n1/heartbeat", {"tasks": [0] * 100_000}),
            ):
                answer = await client.post(path, json=body)
                assert (answer.status_code, answer.json()["error"]) == (413, "too_large")
            assert (await host.user.post("/api/tasks", json={**wrong, "command": ["true"] * 4000})).status_code == 201

    run(check())


def test_without_any_node_the_user_is_told_to_start_one(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            answer = await host.user.post("/api/tasks", json={"backend": "process"})
            assert answer.status_code == 409
            assert answer.json()["error"] == "no_node"
            assert "kohakuriver runner" in answer.json()["message"]

    run(check())


def test_a_name_that_is_taken_is_refused_and_free_again_after_the_removal(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            await host.create(name="web")
            answer = await host.user.post("/api/tasks", json={"name": "web", "backend": "process"})
            assert (answer.status_code, answer.json()["error"]) == (409, "name_taken")
            assert len(runner.tasks) == 1
            assert (await host.user.delete("/api/tasks/web")).json()["status"] == "running"
            await host.create(name="web")

    run(check())


def test_what_the_node_can_not_start_leaves_nothing_and_its_sentence_reaches_the_user(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            said = {"error": "image_not_found", "message": "The image 'x' is not on node n1; pull it there."}
            runner.answers["/api/tasks"] = (404, said)
            answer = await host.user.post("/api/tasks", json={"image": "x", "name": "web"})
            assert (answer.status_code, answer.json()) == (404, said)
            assert (await host.user.get("/api/tasks")).json() == []
            runner.answers.clear()
            await host.create(name="web")

    run(check())


def test_a_node_that_can_not_be_reached_is_named(run: Run, tmp_path: Path, unused_port: int) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            gone = FakeRunner(host, "n1")
            gone.url = f"http://127.0.0.1:{unused_port}"
            await gone.register()
            answer = await host.user.post("/api/tasks", json={"name": "web", "backend": "process"})
            assert (answer.status_code, answer.json()["error"]) == (502, "runner_unreachable")
            told = answer.json()["message"]
            assert "n1: Connection refused; check that its runner runs" in told
            assert gone.url not in told
            assert (await host.user.get("/api/tasks")).json() == []

    run(check())


def test_stop_restart_and_remove_are_passed_to_the_node(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            container = (await host.create(name="web"))["container"]
            assert (await host.user.post("/api/tasks/web/stop")).json()["status"] == "stopped"
            assert (await host.user.post("/api/tasks/web/stop")).json()["status"] == "stopped"
            assert (await host.user.post("/api/tasks/web/restart")).json()["status"] == "running"
            assert (await host.user.delete("/api/tasks/web")).status_code == 200
            assert (await host.user.delete("/api/tasks/web")).status_code == 404
            stop, restart = f"/api/tasks/{container}/stop", f"/api/tasks/{container}/restart"
            assert [path for _, path, _ in runner.asked[1:]] == [stop, stop, restart, f"/api/tasks/{container}"]

    run(check())


def test_a_task_that_its_node_has_forgotten_can_still_be_removed(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            container = (await host.create(name="web"))["container"]
            runner.answers[f"/api/tasks/{container}"] = (404, {"error": "not_found", "message": "No such task."})
            assert (await host.user.delete("/api/tasks/web")).status_code == 200
            assert (await host.user.get("/api/tasks")).json() == []

    run(check())


def test_the_ports_that_a_node_tells_of_a_task_are_believed_only_where_they_can_be(run: Run, tmp_path: Path) -> None:
    good: dict[str, Any] = {"port": 8888, "proto": "tcp", "address": "::", "program": "python3"}

    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            path = f"/api/tasks/{(await host.create(name='web'))['container']}/ports"
            runner.answers[path] = (
                200,
                {"ports": [good | {"program": "a\x1b[2J"}, good | {"program": None}], "more": True},
            )
            told = (await host.user.get("/api/tasks/web/ports")).json()
            assert told == {"ports": [good | {"program": "a\\x1b[2J"}, good | {"program": None}], "more": True}
            wrong: list[dict[str, Any]] = [
                {"port": 0},
                {"port": 65536},
                {"proto": "sctp"},
                {"address": "here"},
                {"program": 1},
            ]
            nonsense: list[Any] = [*([good | each] for each in wrong), [good] * 1001, None]
            for ports in nonsense:
                runner.answers[path] = 200, {"ports": ports}
                answer = await host.user.get("/api/tasks/web/ports")
                assert (answer.status_code, answer.json()["error"]) == (502, "runner_unreachable")
            asked = len(runner.asked)
            await host.user.post("/api/tasks/web/stop")
            answer = await host.user.get("/api/tasks/web/ports")
            assert (answer.status_code, answer.json()["error"]) == (409, "task_not_running")
            assert len(runner.asked) == asked + 1  # to stop it

    run(check())


def test_a_node_is_offline_after_three_missed_heartbeats_and_its_tasks_are_lost_until_it_is_back(
    run: Run, tmp_path: Path
) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            await host.create(name="web")
            host.clock.now += 3 * HEARTBEAT_SECONDS
            assert (await host.user.get("/api/nodes")).json()[0]["status"] == "online"
            host.clock.now += 0.1
            node = (await host.user.get("/api/nodes")).json()[0]
            assert (node["name"], node["status"], node["backends"]) == ("n1", "offline", ["process", "docker"])
            task = (await host.user.get("/api/tasks/web")).json()
            assert (task["status"], task["tunnel"], task["message"]) == ("lost", False, "node n1 is offline")
            for answer in (
                await host.user.post("/api/tasks/web/stop"),
                await host.user.post("/api/tasks/web/restart"),
                await host.user.get("/api/tasks/web/wait"),
                await host.user.post("/api/tasks", json={"node": "n1", "image": "x"}),
            ):
                assert (answer.status_code, answer.json()["error"]) == (409, "node_offline")
            await runner.beat()
            assert (await host.user.get("/api/nodes")).json()[0]["status"] == "online"
            assert (await host.user.get("/api/tasks/web")).json()["status"] == "running"

    run(check())


def test_a_node_that_says_it_leaves_is_offline_at_once(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            await runner.beat(leaving=True)
            assert (await host.user.get("/api/nodes")).json()[0]["status"] == "offline"

    run(check())


def test_a_task_removed_while_its_node_is_away_is_ended_when_the_node_is_back(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            task = await host.create(name="web")
            host.clock.now += 100
            assert (await host.user.delete("/api/tasks/web")).status_code == 200
            assert (await host.user.get("/api/tasks")).json() == []
            assert (await runner.beat()).json()["remove"] == [task["task_id"]]
            await host.create(name="web")
            runner.tasks.pop(task["container"])
            assert (await runner.beat()).json()["remove"] == []
            assert (await runner.beat()).json()["remove"] == []

    run(check())


def test_a_task_that_its_node_no_longer_lists_is_lost(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            task = await host.create(name="web")
            del runner.tasks[task["container"]]
            await runner.beat()  # may have been written before the task was made
            assert (await host.user.get("/api/tasks/web")).json()["status"] == "running"
            host.clock.now += 2 * HEARTBEAT_SECONDS + 1
            await runner.beat()
            assert (await host.user.get("/api/tasks/web")).json()["status"] == "lost"

    run(check())


def test_a_node_has_a_say_in_its_own_tasks_and_in_nothing_else(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            ann, _ = await host.person("ann")
            secret = await host.create(name="secret")
            path = "/api/tasks"
            runner.answers[path] = 200, {"task_id": secret["task_id"], "status": "running", "tunnel": True}
            task = {"task_id": 1, "status": "running"}
            answers: list[Any] = [{"status": "none such"}, [], task | {"message": "m" * (1 << 20)}, "end"]
            for nonsense in answers:
                answer = await ann.post(path, json={"name": "web", "backend": "process"})
                assert (answer.status_code, answer.json()["error"]) == (502, "runner_unreachable")
                assert "does not understand" in answer.json()["message"]
                runner.answers[path] = 200, nonsense
            assert [task["name"] for task in (await host.user.get(path)).json()] == ["secret"]
            key = f"ssh-ed25519 {KEY}"
            for bad in ("no key", f"{key}\n@cert-authority * {key}"):
                runner.change(secret["container"], ssh_host_key=bad)
                assert (await runner.beat()).status_code == 400
            runner.change(secret["container"], ssh_host_key=key)
            assert (await runner.beat()).status_code == 200
            assert (await host.user.get("/api/tasks/secret")).json()["ssh_host_key"] == key

    run(check())


def test_a_node_stays_online_however_many_tasks_there_are_and_whatever_they_say(run: Run, tmp_path: Path) -> None:
    def report(task_id: int) -> dict[str, Any]:
        told = {"task_id": task_id, "status": "failed", "message": "\U0001f525" * LONGEST_MESSAGE, "revision": 2**62}
        return {**told, "traffic": {"streams": task_id % 1000}}

    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            ids = {name: (await host.create(name=name))["task_id"] for name in ("first", "middle", "last", "unnamed")}
            many = [report(n) for n in range(10 * TASKS_AT_ONCE)]
            tasks = [report(ids["first"]), *many, report(ids["middle"]), *many, report(ids["last"])]
            host.clock.now += 100
            assert (await host.user.delete("/api/tasks/last")).status_code == 200
            removed: asyncio.Queue[int] = asyncio.Queue()
            token = (tmp_path / "node-token").read_text().strip()
            registration = Registration(
                NodeIdentity("n1", runner.url, "", host.url, token),
                State(tmp_path / "runner"),
                heartbeat=lambda: {"tasks": tasks, "traffic": {}},
                backends=lambda: {"process": None},
                remove=removed.put,
            )
            running = asyncio.ensure_future(registration.run())
            for _ in range(len(tasks) // TASKS_AT_ONCE + 1):
                assert await removed.get() == ids["last"]
            running.cancel()
            await asyncio.wait([running])
            seen = {task["name"]: task["status"] for task in (await host.user.get("/api/tasks")).json()}
            assert seen == {"first": "failed", "middle": "failed", "unnamed": "lost"}
            node = await host.store.node("n1")
            assert node is not None
            assert node.traffic["tasks"][str(ids["first"])] == {"streams": ids["first"] % 1000}
            await registration.close()

    run(check())


def test_a_heartbeat_from_an_unknown_node_is_told_to_register(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            assert (await FakeRunner(host, "stranger").beat()).status_code == 404

    run(check())


def test_a_second_runner_can_not_take_the_name_of_one_that_is_online(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            assert (await runner.register(instance="other")).status_code == 409
            host.clock.now += 100
            assert (await runner.register(instance="other")).status_code == 200

    run(check())


def test_waiting_ends_as_soon_as_the_tunnel_is_connected(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            task = await host.create(name="web")
            waiting = asyncio.ensure_future(host.user.get("/api/tasks/web/wait?timeout=30"))
            other = asyncio.ensure_future(host.user.get(f"/api/tasks/{task['task_id']}/wait?timeout=30"))
            runner.change(task["container"], tunnel=True)
            await runner.beat()
            for answer in await asyncio.gather(waiting, other):
                assert (answer.status_code, answer.json()["tunnel"]) == (200, True)

    run(check())


def test_however_many_wait_for_a_task_the_database_is_asked_once_when_it_changes(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            task = await host.create(name="web")
            asked: list[str] = []
            look = host.store.task_and_node

            async def noted(reference: str) -> Any:
                asked.append(reference)
                return await look(reference)

            monkeypatch.setattr(host.store, "task_and_node", noted)
            waiting = [asyncio.ensure_future(host.tasks.wait(task["task_id"], 30)) for _ in range(200)]
            await until(lambda: len(asked) >= 1)
            runner.change(task["container"], tunnel=True)
            await runner.beat()
            assert all(view.tunnel for view in await asyncio.gather(*waiting))
            assert len(asked) < 20

    run(check())


def test_a_tunnel_counts_as_gone_when_its_runner_was_started_again(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            task = await host.create(name="web")
            runner.change(task["container"], tunnel=True)
            await runner.beat()
            await runner.register()
            assert (await host.user.get("/api/tasks/web/wait?timeout=0")).status_code == 504
            await runner.beat()
            assert (await host.user.get("/api/tasks/web/wait?timeout=0")).status_code == 200

    run(check())


def test_waiting_for_a_task_that_fails_gives_the_reason(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            task = await host.create(name="web")
            waiting = asyncio.ensure_future(host.user.get("/api/tasks/web/wait?timeout=30"))
            runner.change(task["container"], status="failed", message="it ended with exit code 127")
            await runner.beat()
            answer = await waiting
            assert (answer.status_code, answer.json()["error"]) == (409, "task_not_running")
            assert "exit code 127" in answer.json()["message"]

    run(check())


@pytest.mark.parametrize(
    ("status", "message", "advice"),
    [
        ("lost", "its container was removed", "`kohakuriver vps rm ad` ends the task."),
        ("stopped", None, "`kohakuriver vps restart --container ad` starts the container again."),
    ],
)
def test_the_advice_for_an_adopted_task_that_does_not_run_can_be_followed(
    run: Run, tmp_path: Path, status: str, message: str | None, advice: str
) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            answer = await host.user.post("/api/tasks/adopt", json={"container": "ad", "name": "ad"})
            runner.change(answer.json()["container"], status=status, message=message)
            await runner.beat()
            answer = await host.user.get("/api/tasks/ad/wait?timeout=0")
            assert answer.json()["error"] == "task_not_running"
            assert answer.json()["message"].endswith(f"; {advice}")

    run(check())


def test_waiting_in_vain_ends_in_time(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            await host.runner()
            await host.create(name="web")
            answer = await host.user.get("/api/tasks/web/wait?timeout=0.05")
            assert (answer.status_code, answer.json()["error"]) == (504, "tunnel_not_connected")

    run(check())


def test_an_address_is_adopted_by_the_node_that_is_named(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner("a", backends=("address",))
            await host.runner("b", backends=("address",))
            answer = await host.user.post("/api/tasks/adopt", json={"address": "192.0.2.9"})
            assert (answer.status_code, answer.json()["error"]) == (400, "bad_request")
            assert "--node" in answer.json()["message"]
            answer = await host.user.post("/api/tasks/adopt", json={"address": "192.0.2.9", "node": "a", "name": "vm"})
            task = answer.json()
            assert (answer.status_code, task["address"], task["backend"]) == (201, "192.0.2.9", "address")
            assert task["container"] == f"vm-{task['task_id']}"
            assert runner.asked[0][1] == "/api/tasks/adopt"
            assert runner.asked[0][2]["address"] == "192.0.2.9"

    run(check())


@pytest.mark.parametrize(
    "body",
    [{}, {"address": "not-an-ip"}, {"address": "1.2.3.4", "container": "c"}, {"container": "../x"}, {"container": ""}],
)
def test_an_adoption_that_makes_no_sense_is_refused(run: Run, tmp_path: Path, body: dict[str, str]) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            await host.runner()
            answer = await host.user.post("/api/tasks/adopt", json=body)
            assert (answer.status_code, answer.json()["error"]) == (400, "bad_request")

    run(check())


def test_a_container_is_adopted_by_the_node_that_has_it(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            without, has = await host.runner("a"), await host.runner("b")
            none = {"error": "not_found", "message": "Node a has no container 'c'."}
            without.answers["/api/tasks/adopt"] = (404, none)
            task = (await host.user.post("/api/tasks/adopt", json={"container": "c", "name": "web"})).json()
            assert (task["node"], task["name"]) == ("b", "web")
            assert has.asked[0][2]["engine_name"] == "c"
            has.answers["/api/tasks/adopt"] = (404, none)
            answer = await host.user.post("/api/tasks/adopt", json={"container": "c"})
            assert answer.status_code == 404
            assert len((await host.user.get("/api/tasks")).json()) == 1

    run(check())


@pytest.mark.parametrize(
    ("container", "name"), [("my-db", "my-db"), ("Caps", None), ("0123456789ab", None), ("12345", None), ("web", None)]
)
def test_an_adopted_container_keeps_its_own_name_where_that_will_do(
    run: Run, tmp_path: Path, container: str, name: str | None
) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            await host.runner()
            await host.user.post("/api/tasks/adopt", json={"container": "other", "name": "web"})
            task = (await host.user.post("/api/tasks/adopt", json={"container": container})).json()
            assert task["name"] == (name or f"vps-{task['task_id']}")

    run(check())


def test_adopting_a_container_again_gives_the_task_that_it_is(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            first = (await host.user.post("/api/tasks/adopt", json={"container": "c", "name": "web"})).json()
            runner.answers["/api/tasks/adopt"] = (201, runner.tasks[first["container"]])
            again = (await host.user.post("/api/tasks/adopt", json={"container": "c"})).json()
            assert (again["task_id"], again["name"]) == (first["task_id"], "web")
            assert len((await host.user.get("/api/tasks")).json()) == 1

    run(check())


USER_ROUTES = [
    ("GET", "/api/nodes"),
    ("GET", "/api/tasks"),
    ("POST", "/api/tasks"),
    ("POST", "/api/tasks/adopt"),
    ("GET", "/api/tasks/web"),
    ("GET", "/api/tasks/web/wait"),
    ("POST", "/api/tasks/web/stop"),
    ("POST", "/api/tasks/web/restart"),
    ("DELETE", "/api/tasks/web"),
]
NODE_ROUTES = [("POST", "/api/nodes/register"), ("POST", "/api/nodes/n1/heartbeat")]


@pytest.mark.parametrize("allow_anonymous", [False, True])
def test_nothing_but_the_health_check_answers_without_the_right_token(
    run: Run, tmp_path: Path, allow_anonymous: bool
) -> None:
    async def check() -> None:
        async with a_host(tmp_path, allow_anonymous=allow_anonymous) as host:
            await host.runner()
            await host.create(name="web")
            stranger = host.client("not-a-token")
            for routes, wrong in ((USER_ROUTES, host.node), (NODE_ROUTES, host.user)):
                for method, path in routes:
                    for client in (host.nobody, stranger, wrong):
                        answer = await client.request(method, path, json={} if method == "POST" else None)
                        assert (answer.status_code, answer.json()["error"]) == (401, "not_authenticated"), path
            assert (await host.nobody.get("/health")).json()["status"] == "ok"
            odd = await host.nobody.get("/api/tasks", headers={"Authorization": "Basic YTpi"})
            assert odd.status_code == 401
            assert [task["name"] for task in (await host.user.get("/api/tasks")).json()] == ["web"]

    run(check())


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("PUT", "/api/tasks", 405), ("GET", "/api/tasks/web/wait?timeout=soon", 400)],
)
def test_every_error_has_a_code_and_a_sentence(run: Run, tmp_path: Path, method: str, path: str, status: int) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            await host.runner()
            await host.create(name="web")
            answer = await host.user.request(method, path)
            assert answer.status_code == status
            assert set(answer.json()) == {"error", "message"}

    run(check())


def test_a_body_that_can_not_be_read_is_refused_in_a_sentence_about_it(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            for body in (b"{", b"[" * 100_000, b'{"memory": %s}' % (b"9" * 5000), b'{"name": "\xff"}'):
                answer = await host.user.post("/api/tasks", content=body, headers={"Content-Type": "application/json"})
                assert (answer.status_code, answer.json()["error"]) == (400, "bad_request")
                assert "body" in answer.json()["message"] or "JSON" in answer.json()["message"]

    run(check())


@pytest.mark.sqlite_only
def test_the_tokens_are_for_their_owner_alone_and_stay_good_with_a_new_database(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            token = host.admin_token
        for name in ("admin-token", "node-token"):
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
        for file in tmp_path.glob("host.db*"):
            file.unlink()
        async with a_host(tmp_path) as host:
            assert (await host.client(token).get("/api/tasks")).status_code == 200

    run(check())


HALF = b'"\\ud800"'
UNHOLDABLE = [
    ("user", "/api/tasks", b'{"command": [%s]}' % HALF),
    ("user", "/api/tasks", b"{%s: 1}" % HALF),
    ("user", "/api/tasks/adopt", b'{"address": %s}' % HALF),
    ("node", "/api/nodes/register", b'{"name": "n2", "url": "http://x", "backends": [], "version": %s}' % HALF),
    ("node", "/api/nodes/n1/heartbeat", b'{"tasks": [{"task_id": 1, "status": "running", "message": %s}]}' % HALF),
    (
        "node",
        "/api/nodes/n1/heartbeat",
        b'{"tasks": [{"task_id": 1, "status": "running", "revision": 1%s}]}' % (b"0" * 30),
    ),
    ("node", "/api/nodes/n1/heartbeat", b'{"tasks": [{"task_id": 1%s, "status": "running"}]}' % (b"0" * 30)),
    ("node", "/api/nodes/n1/heartbeat", b'{"traffic": {"sessions": -1}}'),
]


@pytest.mark.parametrize(("who", "path", "body"), UNHOLDABLE)
def test_what_the_database_can_not_hold_is_refused(run: Run, tmp_path: Path, who: str, path: str, body: bytes) -> None:
    async def main() -> None:
        async with a_host(tmp_path) as host:
            await host.runner("n1")
            client: httpx.AsyncClient = getattr(host, who)
            answer = await client.post(path, content=body, headers={"Content-Type": "application/json"})
            assert (answer.status_code, answer.json()["error"]) == (400, "bad_request")

    run(main())


def test_the_page_of_the_api_shows_every_route_and_needs_nothing_from_elsewhere(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            page = await host.user.get("/docs")
            assert page.status_code == 200
            assert "<script" not in page.text
            assert "//" not in page.text
            assert page.headers["content-security-policy"].startswith("default-src 'none'; style-src 'sha256-")
            described = (await host.user.get("/openapi.json")).json()
            for path, operations in described["paths"].items():
                for method in operations:
                    assert f"<code>{method.upper()} {path}</code>" in page.text
            for name in described["components"]["schemas"]:
                assert page.text.count(f'id="{name}"') == 1
            assert set(re.findall(r'href="#(\w+)"', page.text)) <= set(described["components"]["schemas"])

    run(check())


def test_the_description_of_the_api_asks_for_a_token_wherever_one_is_needed(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            described = (await host.user.get("/openapi.json")).json()
            assert described["info"]["title"] == "KohakuRiver host"
            assert described["components"]["securitySchemes"]["token"]["scheme"] == "bearer"
            for path, operations in described["paths"].items():
                needed = path.startswith("/api/") and not path.startswith("/api/auth/device")
                for operation in operations.values():
                    assert operation.get("security") == ([{"token": []}] if needed else None)

    run(check())


@pytest.mark.sqlite_only
def test_a_host_whose_database_does_not_answer_is_not_ready_and_says_so_soon(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kohakuriver.store.database.CHECK_SECONDS", 0.05)

    async def check() -> None:
        async with a_host(tmp_path) as host:
            answers = threading.Event()
            held = asyncio.ensure_future(host.store.read(lambda _session: answers.wait(60)))
            try:
                refused = await asyncio.gather(*(host.nobody.get("/health/ready") for _ in range(10)))
                assert {answer.status_code for answer in refused} == {503}
                assert {answer.json()["error"] for answer in refused} == {"database_down"}
                assert "does not answer" in refused[0].json()["message"]
                assert host.store._database._thread._work_queue.qsize() == 1  # type: ignore[attr-defined]
                assert (await host.nobody.get("/health")).status_code == 200
            finally:
                answers.set()
            await held
            monkeypatch.setattr("kohakuriver.store.database.CHECK_SECONDS", 60)
            assert (await host.nobody.get("/health/ready")).status_code == 200

    run(check())


@pytest.mark.sqlite_only
def test_a_nodes_heartbeat_does_not_wait_behind_what_users_ask(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            await host.create(name="web")
            answers = threading.Event()
            held = [asyncio.ensure_future(host.store.read(lambda _session: answers.wait())) for _ in range(20)]
            asked = [asyncio.ensure_future(host.user.get("/api/tasks")) for _ in range(20)]
            try:
                assert (await runner.beat()).status_code == 200
                assert (await runner.register()).status_code == 200
                assert not any(each.done() for each in asked)
            finally:
                answers.set()
            await asyncio.gather(*held)
            assert {answer.status_code for answer in await asyncio.gather(*asked)} == {200}

    run(check())


@pytest.mark.sqlite_only
def test_many_who_wait_for_a_task_ask_the_database_once_in_a_while_for_all_of_them(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kohakuriver.host.services.tasks._CHANGES_SECONDS", 0.01)

    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            task = await host.create(name="web")
            looks, stamps, look, stamp = [], [], host.store.task_and_node, host.store.stamps

            async def counted(reference: str) -> tuple[Task, Node]:
                looks.append(reference)
                return await look(reference)

            async def stamped(task_ids: Iterable[int]) -> dict[int, tuple[float, Node]]:
                stamps.append(1)
                return await stamp(task_ids)

            monkeypatch.setattr(host.store, "task_and_node", counted)
            monkeypatch.setattr(host.store, "stamps", stamped)
            waiting = [asyncio.ensure_future(host.tasks.wait(task["task_id"], 60)) for _ in range(10)]
            await until(lambda: len(stamps) >= 20)
            assert len(looks) <= 2 * len(waiting)  # when they began, and once when they were first looked after
            runner.change(task["container"], tunnel=True)
            await runner.beat()
            assert {view.tunnel for view in await asyncio.gather(*waiting)} == {True}

    run(check())


@pytest.mark.parametrize("how", ["another host changes it", "its node falls silent"])
def test_who_waits_for_a_task_hears_of_what_this_host_did_not_do(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr("kohakuriver.host.services.tasks._CHANGES_SECONDS", 0.01)

    async def check() -> None:
        async with a_host(tmp_path) as host:
            await host.runner()
            task = await host.create(name="web")
            waiting = asyncio.ensure_future(host.tasks.wait(task["task_id"], 60))
            await until(lambda: bool(host.tasks._changes.watched()))
            if how == "another host changes it":
                async with a_host(tmp_path) as other:
                    await other.store.change_task(task["task_id"], {"tunnel": True})
                    assert (await waiting).tunnel
            else:
                host.clock.now += 100
                with pytest.raises(UnavailableError, match="offline"):
                    await waiting

    run(check())


def test_a_request_about_a_task_looks_it_up_once(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            await host.runner()
            await host.create(name="web")
            looks, look = [], host.store.task_and_node

            async def counted(reference: str) -> tuple[Task, Node]:
                looks.append(reference)
                return await look(reference)

            monkeypatch.setattr(host.store, "task_and_node", counted)
            for method, path in (("GET", ""), ("POST", "/stop"), ("POST", "/restart"), ("DELETE", "")):
                assert (await host.user.request(method, f"/api/tasks/web{path}")).status_code == 200
            assert looks == ["web"] * 4

    run(check())


class Full:
    """A database that takes no change while it is full."""

    def __init__(self, host: HostUnderTest) -> None:
        self.host = host
        self.change_task = host.store.change_task

    async def fails(self, *_: Any) -> Any:
        raise KohakuRiverError("The database failed: database or disk is full.", code="database")


def test_a_removal_that_can_not_be_written_down_destroys_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            await host.create(name="web")
            full = Full(host)
            monkeypatch.setattr(host.store, "change_task", full.fails)
            assert (await host.user.delete("/api/tasks/web")).status_code == 500
            assert len(runner.tasks) == 1
            monkeypatch.setattr(host.store, "change_task", full.change_task)
            monkeypatch.setattr(host.store, "forget_tasks", full.fails)
            assert (await host.user.delete("/api/tasks/web")).status_code == 200
            assert (await host.user.get("/api/tasks")).json() == []
            monkeypatch.undo()
            await runner.beat()
            await host.create(name="web")

    run(check())


def test_a_task_that_stopped_while_nothing_could_be_written_down_has_stopped(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            await host.create(name="web")
            monkeypatch.setattr(host.store, "change_task", Full(host).fails)
            answer = await host.user.post("/api/tasks/web/stop")
            assert (answer.status_code, answer.json()["status"]) == (200, "stopped")
            monkeypatch.undo()
            await runner.beat()
            assert (await host.user.get("/api/tasks/web")).json()["status"] == "stopped"

    run(check())


def test_a_task_that_its_node_has_forgotten_is_made_again_as_it_was_ordered(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            task = await host.create(name="web", command=["serve"], env={"A": "b"})
            runner.tasks.clear()
            path = f"/api/tasks/{task['container']}/restart"
            runner.answers[path] = (404, {"error": "not_found", "message": "This node has no such task."})
            answer = await host.user.post("/api/tasks/web/restart")
            assert (answer.status_code, answer.json()["status"]) == (200, "running")
            assert runner.asked[-1] == ("POST", "/api/tasks", runner.asked[0][2])

    run(check())


def test_a_task_that_the_node_can_not_end_stays_and_one_of_a_node_that_is_away_ends_later(
    run: Run, tmp_path: Path
) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            task = await host.create(name="web")
            path = f"/api/tasks/{task['container']}"
            runner.answers[path] = (500, {"error": "failed", "message": "The engine is stuck."})
            assert (await host.user.delete("/api/tasks/web")).status_code == 500
            assert (await host.user.get("/api/tasks/web")).json()["status"] == "running"
            host.clock.now += 4 * HEARTBEAT_SECONDS
            assert (await host.user.delete("/api/tasks/web")).json()["pending_removal"] is True
            assert (await runner.beat()).json()["remove"] == [task["task_id"]]

    run(check())


def test_the_host_says_what_it_is_and_whether_its_database_works(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            assert (await host.nobody.get("/")).json()["name"] == "KohakuRiver host"
            assert (await host.nobody.get("/health/ready")).status_code == 200
            monkeypatch.setattr(host.store, "read", Full(host).fails)
            down = await host.nobody.get("/health/ready")
            assert (down.status_code, down.json()["error"]) == (503, "database_down")
            assert "disk is full" in down.json()["message"]

    run(check())


def test_version_1s_command_line_learns_a_tasks_status(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            await host.runner()
            task = await host.create(name="web")
            answer = await host.user.get(f"/api/status/{task['task_id']}")
            assert answer.json() == {"task_id": task["task_id"], "task_type": "vps", "status": "running"}

    run(check())

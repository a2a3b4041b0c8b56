"""The client of the host's HTTP API, against answers made up here."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import httpx
import pytest

from kohakuriver.client.host import HostClient, NewTask, Task
from kohakuriver.client.host_http import LONGEST_ANSWER
from kohakuriver.config import Settings, load_settings
from kohakuriver.errors import HostUnreachableError, KohakuRiverError, NotFoundError, UnavailableError, UsageError

Run = Callable[[Coroutine[Any, Any, Any]], Any]
TASK: dict[str, Any] = {
    "task_id": 1234567890, "name": "web", "node": "n1", "backend": "process", "status": "running", "tunnel": True,
    "image": None, "address": None, "container": "kohakuriver-task-1234567890", "created_at": "2030-01-01T00:00:00Z",
    "message": None, "owner": "admin",
}  # fmt: skip


@pytest.fixture
def settings() -> Settings:
    return load_settings(host="http://host.invalid", token="secret")


def asked(run: Run, settings: Settings, answer: Callable[[httpx.Request], httpx.Response], question: Any) -> Any:
    async def ask() -> Any:
        async with HostClient(settings, transport=httpx.MockTransport(answer)) as client:
            return await question(client)

    return run(ask())


def test_the_token_goes_with_every_request(run: Run, settings: Settings) -> None:
    seen: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["Authorization"])
        return httpx.Response(200, json=[TASK])

    tasks = asked(run, settings, answer, lambda host: host.tasks())
    assert seen == ["Bearer secret"]
    assert tasks == [Task(**TASK)]


def test_only_what_was_asked_for_is_sent_when_a_task_is_made(run: Run, settings: Settings) -> None:
    bodies: list[Any] = []

    def answer(request: httpx.Request) -> httpx.Response:
        bodies.append(json.loads(request.content))
        return httpx.Response(201, json=TASK)

    asked(run, settings, answer, lambda host: host.create(NewTask(name="web", command=["sleep", "9"], env={"A": "1"})))
    assert bodies == [{"name": "web", "command": ["sleep", "9"], "env": {"A": "1"}}]


def test_a_task_name_can_not_reach_another_path(run: Run, settings: Settings) -> None:
    paths: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        paths.append(request.url.raw_path.decode())
        return httpx.Response(404, json={"error": "not_found", "message": "There is no such task."})

    with pytest.raises(NotFoundError, match="no such task"):
        asked(run, settings, answer, lambda host: host.task("nodes?x"))
    for name in ("../nodes?x", ".."):  # they are not even sent: "shares/.." is the task itself
        with pytest.raises(UsageError, match="can't be a name"):
            asked(run, settings, answer, lambda host, name=name: host.unshare("lab", name))
    assert paths == ["/api/tasks/nodes%3Fx"]


def test_fields_of_a_newer_host_are_ignored_and_missing_ones_are_said(run: Run, settings: Settings) -> None:
    newer = {**TASK, "flavour": "sweet"}
    assert asked(run, settings, lambda r: httpx.Response(200, json=newer), lambda host: host.task("web")) == Task(
        **TASK
    )
    older = {key: value for key, value in TASK.items() if key != "tunnel"}
    with pytest.raises(KohakuRiverError, match="tunnel"):
        asked(run, settings, lambda r: httpx.Response(200, json=older), lambda host: host.task("web"))


def test_a_node_says_its_traffic(run: Run, settings: Settings) -> None:
    node = {"name": "n1", "url": "http://n1:8001", "status": "online", "last_seen": None, "backends": ["docker"],
            "tasks": 2, "version": "1", "traffic": {"bytes_to_user": 7, "more": 1}}  # fmt: skip
    (found,) = asked(run, settings, lambda r: httpx.Response(200, json=[node]), lambda host: host.nodes())
    assert (found.traffic.bytes_to_user, found.traffic.streams, found.tasks) == (7, 0, 2)


def test_waiting_asks_again_when_the_host_gave_up_and_time_is_left(run: Run, settings: Settings) -> None:
    answers = iter(
        [httpx.Response(504, json={"error": "timed_out", "message": "Not yet."}), httpx.Response(200, json=TASK)]
    )
    task = asked(run, settings, lambda r: next(answers), lambda host: host.wait("web", timeout=60))
    assert task.name == "web"


def test_waiting_that_takes_too_long_is_an_unavailable_task_not_an_unreachable_host(
    run: Run, settings: Settings
) -> None:
    late = httpx.Response(504, json={"error": "tunnel_not_connected", "message": "Its tunnel is not connected."})
    with pytest.raises(UnavailableError, match="tunnel is not connected"):
        asked(run, settings, lambda r: late, lambda host: host.wait("web", timeout=0))


def test_a_host_that_is_not_there_is_said_with_its_address(run: Run, settings: Settings) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectError("All connection attempts failed") from ConnectionRefusedError(
            111, "Connection refused"
        )

    with pytest.raises(HostUnreachableError, match=r"http://host\.invalid can't be reached: Connection refused"):
        asked(run, settings, answer, lambda host: host.tasks())


@pytest.mark.parametrize("name", ["a..b", "a" * 70 + ".test"])
def test_a_name_that_can_not_be_one_is_a_host_that_can_not_be_reached(run: Run, name: str) -> None:
    async def ask() -> None:
        async with HostClient(load_settings(host=f"http://{name}:1")) as client:
            await client.tasks()

    with pytest.raises(HostUnreachableError, match=f"The host at http://{name}:1 can't be reached: "):
        run(ask())


@pytest.mark.parametrize("status", [200, 404, 302, 503])
def test_what_answers_and_is_no_host_is_an_unreachable_host(run: Run, settings: Settings, status: int) -> None:
    page = httpx.Response(status, content=b"<html>", headers={"location": "https://elsewhere.test/"})
    with pytest.raises(HostUnreachableError, match=r"What answers at http://host\.invalid "):
        asked(run, settings, lambda r: page, lambda host: host.tasks())


@pytest.mark.parametrize("body", [b"hello", b"{}", b"null"])
def test_something_else_that_answers_is_an_error_and_no_crash(run: Run, settings: Settings, body: bytes) -> None:
    with pytest.raises(KohakuRiverError):
        asked(run, settings, lambda r: httpx.Response(200, content=body), lambda host: host.tasks())


COMMAND = "web\n    ProxyCommand touch x\nHost *"
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIPZ9gmNi4B7T5sBhmGQ1zCzz0lbYbyQMIDEfSR+aGPg4"


@pytest.mark.parametrize(
    "told",
    [
        *({"name": COMMAND}, {"name": "-oProxyCommand=x"}, {"name": 7}, {"name": "*"}, {"name": "\x1b[31mweb"}),
        *({"task_id": "1; touch x"}, {"task_id": True}, {"ssh_host_key": f"{KEY}\n@cert-authority * {KEY}"}),
        *({"ssh_host_key_ecdsa": "none"}, {"ssh_host_key": ["a"]}),
    ],
)
def test_what_ssh_would_take_for_more_than_a_task_is_believed_of_no_host(
    run: Run, settings: Settings, told: dict[str, Any]
) -> None:
    def answer(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=[{**TASK, "ssh_host_key": KEY}, {**TASK, **told}])

    with pytest.raises(KohakuRiverError, match="don't trust that host"):
        asked(run, settings, answer, lambda host: host.tasks())


def test_a_hosts_own_node_and_a_name_that_no_new_task_can_have_are_believed(run: Run, settings: Settings) -> None:
    node: dict[str, Any] = {"url": "http://n1:8001", "status": "online", "last_seen": None, "backends": []}
    node |= {"tasks": 0, "version": "1"}
    nodes = [{**node, "name": name} for name in ("n1", "@agents", "@agents-1a2b3c4d")]
    found = asked(run, settings, lambda _: httpx.Response(200, json=nodes), lambda host: host.nodes())
    assert [node.name for node in found] == ["n1", "@agents", "@agents-1a2b3c4d"]
    tasks = [{**TASK, "name": "lab.kohakuriver"}]
    (task,) = asked(run, settings, lambda _: httpx.Response(200, json=tasks), lambda host: host.tasks())
    assert task.name == "lab.kohakuriver"
    hostile = [{**node, "name": "n1; touch x"}]
    with pytest.raises(KohakuRiverError, match="don't trust that host"):
        asked(run, settings, lambda _: httpx.Response(200, json=hostile), lambda host: host.nodes())


class Endless(httpx.AsyncByteStream):
    """An answer that goes on for as long as somebody reads it."""

    def __init__(self) -> None:
        self.read = 0

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            self.read += 1 << 20
            yield bytes(1 << 20)


@pytest.mark.parametrize("status", [200, 500])
@pytest.mark.parametrize("question", ["tasks", "logs"])
def test_an_answer_without_an_end_fills_no_memory(run: Run, settings: Settings, question: str, status: int) -> None:
    body = Endless()

    async def ask(host: HostClient) -> None:
        if question == "tasks":
            await host.tasks()
        else:
            async for _ in host.logs("web"):
                pass

    with pytest.raises(KohakuRiverError, match="has no end"):
        asked(run, settings, lambda _: httpx.Response(status, stream=body), ask)
    assert body.read <= LONGEST_ANSWER + (1 << 20)


def test_lists_in_lists_by_the_thousand_are_no_answer_of_a_host(run: Run, settings: Settings) -> None:
    deep = b"[" * 200_000 + b"]" * 200_000
    answers = iter([httpx.Response(200, content=deep), httpx.Response(500, content=deep)])
    for _ in range(2):
        with pytest.raises(HostUnreachableError, match="no KohakuRiver host"):
            asked(run, settings, lambda _: next(answers), lambda host: host.tasks())

"""When a node fetches an image, and what it says where it does not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import aiodocker
import pytest
from aiodocker.exceptions import DockerError

from kohakuriver.cli.vps import starting
from kohakuriver.client.host import HostClient, NewTask
from kohakuriver.config import Settings
from kohakuriver.errors import KohakuRiverError, UsageError
from kohakuriver.images import Registries
from kohakuriver.runner.backends.docker import pull
from kohakuriver.runner.backends.docker.pull import Images
from kohakuriver.task import Pull
from tests.support.hops import until
from tests.support.host_only import FakeRunner, a_host

Run = Callable[[Coroutine[Any, Any, object]], object]
ORIGIN = "python@sha256:" + "0" * 64


EVENTS: list[dict[str, Any]] = [
    {"status": "Pulling from library/python", "id": "3.12"},
    {"status": "Pulling fs layer", "progressDetail": {}, "id": "a"},
    {"status": "Downloading", "progressDetail": {"current": 1 << 20, "total": 3 << 20}, "id": "a"},
    {"status": "Downloading", "progressDetail": {"current": 1 << 20, "total": 5 << 20}, "id": "b"},
    {"status": "Download complete", "progressDetail": {}, "id": "a"},
    {"status": "Extracting", "progressDetail": {"current": 1, "total": 3 << 20}, "id": "a"},
    {"status": "Downloading", "progressDetail": {"current": 5, "total": -1}, "id": "c"},
    {"status": "Pull complete", "progressDetail": {}, "id": "b"},
    {"status": "Digest: sha256:0"},
]


class Engine:
    """An engine with images by their names, and with what a registry would give it."""

    def __init__(self, there: dict[str, list[str]], registry: dict[str, list[str]]) -> None:
        self.there, self.registry = there, registry
        self.pulled: list[str] = []
        self.images = self

    async def inspect(self, name: str) -> dict[str, Any]:
        if name.startswith("%5B"):  # an address of IPv6
            raise DockerError(400, "no such image: invalid reference format")
        if name not in self.there:
            raise DockerError(404, "no such image")
        return {"RepoDigests": self.there[name], "Config": {"Cmd": [name]}}

    async def pull(self, name: str, *, stream: bool) -> Any:
        self.pulled.append(name)
        if name not in self.registry:
            raise DockerError(404, "not found")
        self.there[name] = self.registry[name]
        for event in EVENTS:
            yield event

    async def close(self) -> None:
        pass


def images(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Images:
    docker = cast("aiodocker.Docker", SimpleNamespace(images=engine))
    monkeypatch.setattr(pull, "own_connection", lambda _docker: engine)
    return Images(lambda: docker, "n1", Registries(["docker.io"]), seconds=0)


def nothing(_: str) -> None:
    pass


@pytest.mark.parametrize(
    ("when", "there", "pulled"),
    [
        ("missing", True, False),
        ("missing", False, True),
        ("always", True, True),
        ("always", False, True),
        ("never", True, False),
    ],
)
def test_an_image_is_fetched_when_that_was_asked_for(
    run: Run, monkeypatch: pytest.MonkeyPatch, when: Pull, there: bool, pulled: bool
) -> None:
    async def check() -> None:
        engine = Engine({"library/python": [ORIGIN]} if there else {}, {"library/python": [ORIGIN]})
        found = await images(engine, monkeypatch).need("library/python", nothing, when)
        assert found == {"Cmd": ["library/python"]}
        assert engine.pulled == (["library/python"] if pulled else [])

    run(check())


@pytest.mark.parametrize(
    ("image", "there", "when", "code", "words"),
    [
        ("python", {}, "never", "image_not_found", "`--pull never` fetches none"),
        ("python", {"python": [ORIGIN]}, "always", "image_not_found", "leave `--pull always` out to use the one"),
        ("python", {"python": []}, "always", "image_is_local", "was made on node n1"),
        ("python", {"python": ["other@sha256:" + "0" * 64]}, "always", "image_is_local", "was made on node n1"),
        ("ghcr.io/a", {"ghcr.io/a": []}, "always", "registry_not_allowed", "fetches no images from ghcr.io"),
    ],
)
def test_what_can_not_be_fetched_is_refused_in_a_sentence_and_what_is_there_stays(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    image: str,
    there: dict[str, list[str]],
    when: Pull,
    code: str,
    words: str,
) -> None:
    async def check() -> None:
        engine = Engine(dict(there), {})
        with pytest.raises(KohakuRiverError, match=words) as caught:
            await images(engine, monkeypatch).need(image, nothing, when)
        assert caught.value.code == code
        assert engine.there == there
        assert engine.pulled == ([image] if code == "image_not_found" and when == "always" else [])

    run(check())


def ordered(runner: FakeRunner) -> dict[str, Any] | None:
    """The task that the node was told to start."""
    return next((body for _, path, body in runner.asked if path == "/api/tasks"), None)


def test_a_name_that_an_older_engine_does_not_take_is_refused_in_our_words(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        with pytest.raises(
            UsageError, match=r"^The engine of node \S+ takes '\[::1\]:5000/a' for no name of an image\.$"
        ):
            await images(Engine({}, {}), monkeypatch).need("[::1]:5000/a", lambda _: None)

    run(check())


def test_who_makes_a_task_is_told_what_its_node_fetches_meanwhile(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            runner.held.clear()  # it fetches
            said: asyncio.Queue[str] = asyncio.Queue()
            async with HostClient(Settings(host=host.url, token=host.admin_token)) as client:
                made = client.create(NewTask(image="python", name="lab"))
                work = asyncio.ensure_future(starting(client, made, "python", said.put_nowait, every=0.05))
                try:
                    await until(lambda: ordered(runner) is not None)
                    order = ordered(runner)
                    assert order is not None
                    runner.tasks[order["container"]] = {
                        "task_id": order["task_id"],
                        "status": "starting",
                        "image": "python",
                    }
                    runner.change(order["container"], message="pulling the image python: 1 MiB of 3 MiB")
                    assert (await runner.beat()).status_code == 200
                    words = await said.get()
                finally:
                    runner.held.set()
                assert words.endswith("(lab) on n1: pulling the image python: 1 MiB of 3 MiB")
                assert (await work).name == "lab"

    run(check())


def test_a_pull_tells_how_much_of_the_image_is_there(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull, "TOLD_SECONDS", 0.0)

    async def check() -> None:
        told: list[str] = []
        await images(Engine({}, {"python": [ORIGIN]}), monkeypatch).need("python", told.append)
        assert told[:2] == ["waiting for other images, then pulling python", "pulling the image python"]
        parts = [words.removeprefix("pulling the image python: ") for words in dict.fromkeys(told[2:])]
        assert parts == ["1 MiB of 3 MiB", "2 MiB of 8 MiB", "4 MiB of 8 MiB", "8 MiB of 8 MiB"]

    run(check())

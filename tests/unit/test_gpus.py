"""GPUs: which a task gets, who may have how many, and how an engine gives them."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from kohakuriver.errors import UsageError
from kohakuriver.gpus import NotThereError, choose
from kohakuriver.quotas import Offer
from kohakuriver.runner.services.gpus import Gpu, found, granted
from tests.support.host_only import a_host

Run = Callable[[Coroutine[Any, Any, object]], object]


@pytest.mark.parametrize(
    ("asked", "taken", "given"),
    [
        ("1", "", "0"),
        ("2", "0", "12"),
        ("all", "", "0123"),
        ("0,2", "1", "02"),
        ("device=3", "012", "3"),
        ("4", "0", "node n has 3 of its 4 GPUs free"),
        ("all", "2", "node n has 3 of its 4 GPUs free"),
        ("1,2", "2", "GPU 2 of node n is in use"),
        ("5", "", "node n has 4 GPUs, with the numbers 0, 1, 2, 3"),
        ("device=7", "", "node n has 4 GPUs, with the numbers 0, 1, 2, 3"),
    ],
)
def test_a_task_gets_gpus_that_are_there_and_free_or_a_reason(asked: str, taken: str, given: str) -> None:
    if given.isdigit():
        assert choose(asked, list("0123"), set(taken), "n") == list(given)
    else:
        with pytest.raises(NotThereError, match=f"^{given}$"):
            choose(asked, list("0123"), set(taken), "n")


def test_a_task_goes_to_a_node_that_has_its_gpus_free_and_has_them_alone(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            await host.runner("a")
            runner = await host.runner("b", offer=Offer(gpus=["0", "1"]))
            task = await host.create(image="x", name="train", gpus="1")
            assert (task["node"], task["gpus"], task["gpu_ids"]) == ("b", "1", ["0"])
            assert runner.asked[-1][2]["gpu_ids"] == ["0"]
            nodes = {node["name"]: node for node in (await host.user.get("/api/nodes")).json()}
            assert (nodes["a"]["gpus"], nodes["a"]["gpus_free"]) == ([], [])
            assert (nodes["b"]["gpus"], nodes["b"]["gpus_free"]) == (["0", "1"], ["1"])
            for gpus, code, words in (
                ("2", "gpus_taken", "node b has 1 of its 2 GPUs free; try again"),
                ("device=0", "gpus_taken", "GPU 0 of node b is in use"),
                ("3", "no_gpus", "node b has 2 GPUs, with the numbers 0, 1; ask for others by --gpus."),
            ):
                answer = await host.user.post("/api/tasks", json={"image": "x", "gpus": gpus})
                assert (answer.status_code, answer.json()["error"]) == (409, code)
                assert words in answer.json()["message"]
            assert (await host.create(image="x", gpus="1"))["gpu_ids"] == ["1"]

    run(check())


def test_a_stopped_task_gives_its_gpus_back_and_waits_for_them_when_it_is_restarted(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            await host.runner("a", offer=Offer(gpus=["0"]))
            await host.create(image="x", name="first", gpus="all")
            assert (await host.user.post("/api/tasks/first/stop")).status_code == 200
            await host.create(image="x", name="second", gpus="1")
            answer = await host.user.post("/api/tasks/first/restart")
            assert (answer.status_code, answer.json()["error"]) == (409, "gpus_taken")
            assert "GPU 0 of node a, which task first had, is another task's now" in answer.json()["message"]
            assert (await host.user.post("/api/tasks/second/stop")).status_code == 200
            assert (await host.user.post("/api/tasks/first/restart")).status_code == 200

    run(check())


def test_a_user_has_no_more_gpus_than_the_limit_says(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            await host.runner("a", offer=Offer(gpus=["0", "1", "2", "3"]))
            ann, _ = await host.person("ann")
            assert (await host.user.patch("/api/users/ann/limits", json={"gpus": 2})).status_code == 200
            answer = await ann.post("/api/tasks", json={"image": "x", "gpus": "all"})
            assert (answer.status_code, answer.json()["error"]) == (403, "over_limit")
            assert "the limit 'gpus' of ann is 2, and this task asks for 4; give less by --gpus" in answer.text
            assert (await ann.post("/api/tasks", json={"image": "x", "gpus": "2"})).status_code == 201
            answer = await ann.post("/api/tasks", json={"image": "x", "gpus": "1"})
            assert (answer.status_code, answer.json()["error"]) == (429, "over_limit")

    run(check())


def test_a_nodes_gpus_are_nvidias_devices_with_the_names_that_the_driver_tells(tmp_path: Path) -> None:
    dev, proc = tmp_path / "dev", tmp_path / "proc"
    for folder in (dev, proc / "0000:01:00.0"):
        folder.mkdir(parents=True)
    for name in ("nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm", "null"):
        (dev / name).touch()
    (proc / "0000:01:00.0" / "information").write_text("Model: \t H100\nGPU UUID: \t GPU-1\nDevice Minor: \t 1\n")
    gpus = found(dev=dev, proc=proc)
    assert [(gpu.number, gpu.uuid) for gpu in gpus] == [("0", ""), ("1", "GPU-1"), ("10", "")]
    assert gpus[1].path == str(dev / "nvidia1")
    assert found(["/dev/null", "/dev/zero"]) == [Gpu("0", "/dev/null"), Gpu("1", "/dev/zero")]
    with pytest.raises(UsageError, match="--gpu /no/such"):
        found(["/no/such"])


def test_gpus_that_are_named_by_their_devices_are_these_also_for_nvidias_tools() -> None:
    named = [Gpu("0", "/dev/nvidia2"), Gpu("1", "/dev/nvidia3", "GPU-3")]
    by_runtime = granted(["0", "1"], named, {"Runtimes": {"nvidia": {}}}, "n")
    assert by_runtime.requests[0]["DeviceIDs"] == ["2", "GPU-3"]
    for names in (["2", "3"], ["2", "GPU-3"]):
        devices = [{"Source": "cdi", "ID": f"nvidia.com/gpu={name}"} for name in ("0", "1", *names)]
        by_cdi = granted(["0", "1"], named, {"DiscoveredDevices": devices}, "n")
        assert by_cdi.requests == [{"Driver": "cdi", "DeviceIDs": [f"nvidia.com/gpu={name}" for name in names]}]


NVIDIA = [Gpu("0", "/dev/nvidia0", "GPU-0"), Gpu("1", "/dev/nvidia1")]


def test_an_engine_is_asked_for_gpus_in_the_way_that_it_knows() -> None:
    runtime = granted(["0", "1"], NVIDIA, {"Runtimes": {"nvidia": {}}}, "n")
    assert runtime.requests == [{"Driver": "", "DeviceIDs": ["GPU-0", "1"], "Capabilities": [["gpu"]]}]
    devices = [{"Source": "cdi", "ID": "nvidia.com/gpu=1"}]
    cdi = granted(["1"], NVIDIA, {"Runtimes": {"runc": {}}, "DiscoveredDevices": devices}, "n")
    assert cdi.requests == [{"Driver": "cdi", "DeviceIDs": ["nvidia.com/gpu=1"]}]
    engines: list[dict[str, Any]] = [{}, {"Runtimes": None, "DiscoveredDevices": []}]
    for engine in engines:
        plain = granted(["1"], NVIDIA, engine, "n")
        assert (plain.requests, [device["PathOnHost"] for device in plain.devices]) == ([], ["/dev/nvidia1"])
    other = granted(["0"], [Gpu("0", "/dev/dri/renderD128")], {"Runtimes": {"nvidia": {}}}, "n")
    assert [device["PathInContainer"] for device in other.devices] == ["/dev/dri/renderD128"]

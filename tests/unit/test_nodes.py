"""Nodes that can't be reached, that get no new tasks, and that are forgotten: as the host's HTTP API has it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from kohakuriver.errors import HostUnreachableError
from kohakuriver.host.services.hearing import OUTAGE_SECONDS, Hearing
from kohakuriver.host.services.nodes import MISSED_HEARTBEATS, Nodes
from kohakuriver.host.services.reach import Reach
from kohakuriver.runner.services.registration import NodeIdentity, Registration
from kohakuriver.runner.services.state import State
from tests.support.hops import until
from tests.support.host_only import FakeRunner, HostUnderTest, a_host

Run = Callable[[Coroutine[Any, Any, None]], None]


async def node(host: HostUnderTest, name: str = "n1") -> dict[str, Any]:
    found: dict[str, Any] = next(each for each in (await host.user.get("/api/nodes")).json() if each["name"] == name)
    return found


async def a_node_away(host: HostUnderTest, unused_port: int, name: str = "n1") -> FakeRunner:
    """A node that tells the host an address on which nothing listens."""
    runner = FakeRunner(host, name)
    runner.url = f"http://127.0.0.1:{unused_port}"
    assert (await runner.register()).status_code == 200
    return runner


def test_a_node_that_the_host_can_not_dial_is_unreachable_with_the_reason_until_it_answers(
    run: Run, tmp_path: Path, unused_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            away = await a_node_away(host, unused_port)
            await host.nodes.look()
            seen = await node(host)
            assert seen["status"] == "unreachable"
            assert "can't reach node n1: Connection refused; check" in seen["reason"]
            assert "--advertise-url" in seen["reason"]
            assert (await away.beat()).json()["unreachable"] == seen["reason"]
            await host.nodes.look()

            back = await host.runner()
            assert back.key == away.key
            await host.nodes.look()
            seen = await node(host)
            assert (seen["status"], seen["reason"]) == ("online", None)
            assert (await back.beat()).json()["unreachable"] is None

            host.clock.now += 100
            assert (await node(host))["status"] == "offline"

    run(check())
    told = capsys.readouterr().out
    assert (told.count("can't be reached from here"), told.count("is reached again")) == (1, 1)


def test_another_program_at_a_nodes_address_is_not_taken_for_the_node(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            runner.answers["/api/node"] = 403, {"error": "not_allowed", "message": "The ticket is for another node."}
            await host.nodes.look()
            assert "did not take the host's ticket" in (await node(host))["reason"]
            del runner.answers["/api/node"]
            await host.nodes.look()
            assert (await node(host))["status"] == "online"

    run(check())


def test_a_node_that_registers_is_dialled_at_its_first_heartbeat(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            host.nodes._heartbeat_seconds = 1000.0
            looking = asyncio.ensure_future(host.nodes.run())
            runner = await host.runner()
            dialled = asyncio.Event()
            host.clock.now += 1
            asked = runner.asked.append

            class Asked(list[Any]):
                def append(self, request: Any) -> None:
                    asked(request)
                    dialled.set()

            runner.asked = Asked()
            assert not dialled.is_set()
            await runner.beat()
            await dialled.wait()
            looking.cancel()

    run(check())


def test_what_comes_of_dialling_a_node_where_it_was_says_nothing_of_where_it_is(
    run: Run, tmp_path: Path, unused_port: int
) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            runner.held.clear()
            looking = asyncio.ensure_future(host.nodes.look())
            await until(lambda: bool(runner.asked))
            runner.url = f"http://127.0.0.1:{unused_port}"
            await runner.register()
            runner.held.set()
            await looking
            await host.nodes.look()
            assert (await node(host))["status"] == "unreachable"

    run(check())


def test_a_runner_says_in_its_own_log_that_the_host_does_not_reach_it(
    run: Run, tmp_path: Path, unused_port: int, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "host").mkdir()

    async def check() -> None:
        async with a_host(tmp_path / "host") as host:
            token = (tmp_path / "host/node-token").read_text().strip()
            identity = NodeIdentity("n1", f"http://127.0.0.1:{unused_port}", "one", host.url, token)
            beats: list[asyncio.Event] = [asyncio.Event() for _ in range(4)]
            sent = iter(beats)

            def heartbeat() -> dict[str, Any]:
                next(sent).set()
                return {"tasks": [], "traffic": {}}

            async def remove(_task_id: int) -> None:
                raise AssertionError

            registration = Registration(
                identity,
                State(tmp_path / "runner"),
                heartbeat=heartbeat,
                backends=lambda: {"process": None},
                remove=remove,
            )
            running = asyncio.ensure_future(registration.run())
            await beats[0].wait()
            await host.nodes.look()
            for beat in beats[1:3]:
                registration.changed()
                await beat.wait()
            running.cancel()
            await asyncio.wait([running])
            await registration.close()

    run(check())
    assert capsys.readouterr().out.count("the host can't reach this node") == 1


def test_a_cordoned_node_gets_no_new_tasks_and_those_that_it_has_go_on(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            await host.runner()
            await host.create(name="old")
            assert (await host.user.post("/api/nodes/n1/cordon")).json()["cordoned"] is True
            for more in ({}, {"node": "n1"}):
                refused = await host.user.post("/api/tasks", json={"name": "new", "image": "x", **more})
                assert (refused.status_code, refused.json()["error"]) == (409, "node_cordoned")
                assert "node uncordon n1" in refused.json()["message"]
            for action in ("stop", "restart"):
                assert (await host.user.post(f"/api/tasks/old/{action}")).status_code == 200
            await host.runner("n2")
            assert (await host.create(name="new"))["node"] == "n2"
            assert (await node(host))["cordoned"] is True
            assert (await host.user.post("/api/nodes/n1/uncordon")).json()["cordoned"] is False
            assert (await host.create(name="newer", node="n1"))["node"] == "n1"
            assert (await host.user.post("/api/nodes/nowhere/cordon")).status_code == 404

    run(check())


def test_a_node_stays_cordoned_when_its_runner_registers_again(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            await host.user.post("/api/nodes/n1/cordon")
            await runner.register()
            assert (await node(host))["cordoned"] is True

    run(check())


def test_a_host_that_has_just_begun_takes_no_node_for_silent_that_was_there_before(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            await host.runner("lately")
            (known,) = await host.store.nodes()
            for outage, online in ((OUTAGE_SECONDS - 1, True), (OUTAGE_SECONDS + 1, False)):
                host.clock.now = known.last_seen + outage
                assert not host.nodes.is_online(known)
                after = Nodes(
                    host.store, Reach(host.runners), heartbeat_seconds=1, on_change=lambda _: None, clock=host.clock
                )
                assert after.is_online(known) is online
                host.clock.now += MISSED_HEARTBEATS + 0.1
                assert not after.is_online(known)

    run(check())


class Ears:
    """A host that looks each second whether it can hear nodes, with 15 s of patience, and has begun long ago."""

    def __init__(self) -> None:
        self.now = 10_000.0
        self.down = False
        self.hearing = Hearing(15, self.check, clock=lambda: self.now)
        self.now += 2 * OUTAGE_SECONDS

    async def check(self) -> None:
        if self.down:
            raise HostUnreachableError("down", code="database_down", status=503)

    async def pass_on(self, seconds: int) -> None:
        for _ in range(seconds):
            await self.hearing.look()
            self.now += 1


def test_while_the_database_is_away_no_node_falls_silent_and_those_that_had_before_stay_so(run: Run) -> None:
    async def check() -> None:
        host = Ears()
        await host.pass_on(20)
        seen, silent = host.now - 6, host.now - 20
        for time in range(3):
            host.down = True
            await host.pass_on(60)
            host.down = False
            assert not host.hearing.is_silent(seen), time
            assert host.hearing.is_silent(silent), time
            await host.pass_on(12)  # it went again before all could be heard
        assert not host.hearing.is_silent(seen)
        await host.pass_on(5)
        assert host.hearing.is_silent(seen)

    run(check())


def test_while_the_hosts_machine_sleeps_no_node_falls_silent(run: Run) -> None:
    async def check() -> None:
        host = Ears()
        await host.pass_on(20)
        seen, silent = host.now - 6, host.now - 20
        host.now += 8 * 3600
        assert not host.hearing.is_silent(seen), "asked before it was looked"
        assert host.hearing.is_silent(silent)
        await host.pass_on(14)
        assert not host.hearing.is_silent(seen)
        await host.pass_on(2)
        assert host.hearing.is_silent(seen)

    run(check())


def test_a_host_looks_whether_it_hears_nodes_more_often_than_one_can_fall_silent(run: Run) -> None:
    async def check() -> None:
        looked: list[float] = []

        async def answers() -> None:
            looked.append(asyncio.get_running_loop().time())

        looking = asyncio.create_task(Hearing(0.06, answers).run())
        await until(lambda: len(looked) > 3)
        looking.cancel()

    run(check())


def test_who_waits_for_a_node_hears_when_it_registers_and_of_no_other(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            with host.nodes.coming_back("n1") as back, host.nodes.coming_back("n1") as too:
                await host.runner("n2")
                assert not back.is_set()
                await runner.register()
                assert back.is_set()
                assert too.is_set()
            assert not host.nodes._registered.watched()

    run(check())


def test_a_node_that_can_be_reached_is_chosen_before_one_that_can_not(
    run: Run, tmp_path: Path, unused_port: int
) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            await a_node_away(host, unused_port, "a-first")
            await host.runner("n2")
            await host.nodes.look()
            assert [(await host.create())["node"] for _ in range(2)] == ["n2", "n2"]

    run(check())


def test_a_node_is_forgotten_when_it_is_offline_and_its_tasks_only_by_force(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            task = await host.create(name="web")
            await host.person("bob")
            await host.user.post("/api/tasks/web/shares", json={"user": "bob"})
            for force in ("false", "true"):
                refused = await host.user.delete(f"/api/nodes/n1?force={force}")
                assert (refused.status_code, refused.json()["error"]) == (409, "node_online")
            await runner.beat(leaving=True)
            refused = await host.user.delete("/api/nodes/n1")
            assert (refused.status_code, refused.json()["error"]) == (409, "node_has_tasks")
            assert "1 task: web;" in refused.json()["message"]
            assert (await host.user.get("/api/tasks/web")).status_code == 200
            assert (await host.user.delete("/api/nodes/n1?force=true")).json()["tasks"] == 1
            assert (await host.user.get("/api/nodes")).json() == []
            assert (await host.user.get("/api/tasks")).json() == []
            assert await host.people._accounts.shares([task["task_id"]]) == {}
            assert (await runner.beat()).status_code == 404  # its runner registers again
            await runner.register()
            assert await host.create(name="web")
            assert (await host.user.delete("/api/nodes/nowhere")).status_code == 404

    run(check())


def test_who_waits_for_a_task_hears_that_its_node_was_forgotten(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            task = await host.create(name="web")
            await runner.beat(leaving=True)
            heard: list[list[int]] = []
            host.nodes._on_change = heard.append
            await host.user.delete("/api/nodes/n1?force=true")
            assert heard == [[task["task_id"]]]

    run(check())


@pytest.mark.parametrize(
    "offer",
    [
        *({"task_memory": -(1 << 40)}, {"memory": 1 << 63}, {"cpus": "nan"}, {"task_cpus": "inf"}, {"task_pids": -1}),
        *(
            {"gpus": ["\x1b[31m0"]},
            {"gpus": [str(number % 1000) for number in range(1001)]},
            {"mount_roots": ["/" * 5000]},
        ),
    ],
)
def test_a_node_that_offers_less_than_nothing_or_what_no_node_has_is_not_taken_in(
    run: Run, tmp_path: Path, offer: dict[str, Any]
) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            about = {"name": "n1", "url": "http://127.0.0.1:1", "backends": ["docker"]}
            answer = await host.node.post("/api/nodes/register", json={**about, "offer": offer})
            assert (answer.status_code, answer.json()["error"]) == (400, "bad_request")
            assert len(answer.text) < 500
            assert (await host.user.get("/api/nodes")).json() == []

    run(check())


@pytest.mark.parametrize("more", [{"version": "v" * 65}, {"instance": "i" * 65}, {"url": "http://" + "n" * 300}])
def test_a_node_has_no_longer_names_than_people_give(run: Run, tmp_path: Path, more: dict[str, str]) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            about = {"name": "n1", "url": "http://127.0.0.1:1", "backends": ["docker"]}
            assert (await host.node.post("/api/nodes/register", json={**about, **more})).status_code == 400

    run(check())


def test_what_a_node_says_pushes_nothing_out_of_the_audit_log_and_how_much_more_it_was_is_told(
    run: Run, tmp_path: Path
) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            told = [{"task_id": 1, "reason": "no", "source": str(number), "count": 1} for number in range(100)]
            for _ in range(5):
                assert (await runner.beat(incidents=told)).status_code == 200
            host.audit.tell_left_out()
            events = (await host.user.get("/api/audit")).json()["events"]
            assert sum(each["event"] in ("tunnel_refused", "node_registered") for each in events) == 20
            left_out = [each for each in events if each["event"] == "refusals_left_out"]
            assert [(each["node"], each["count"]) for each in left_out] == [("n1", 481)]

    run(check())

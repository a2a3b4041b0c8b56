"""Named volumes: what users keep on nodes, whatever becomes of their tasks."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest

from kohakuriver.errors import UsageError
from kohakuriver.host.services.volumes import node_of
from kohakuriver.store.volumes import MOST_VOLUMES, REMOVAL_SECONDS, Volumes
from tests.support.host_only import a_host

Run = Callable[[Coroutine[Any, Any, None]], None]


async def made(who: httpx.AsyncClient, *volumes: str, **more: Any) -> dict[str, Any]:
    answer = await who.post("/api/tasks", json={"image": "x", "volumes": list(volumes), **more})
    return {**answer.json(), "http": answer.status_code}


async def listed(who: httpx.AsyncClient) -> list[tuple[str, str, str, list[str]]]:
    volumes = (await who.get("/api/volumes")).json()
    return [(each["name"], each["owner"], each["node"], each["tasks"]) for each in volumes]


def test_a_volume_stays_where_it_was_made_and_its_owners_tasks_follow_it(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            one, two = await host.runner("n1"), await host.runner("n2")
            ann, _ = await host.person("ann")
            first = await made(ann, "data:/data", name="first", node="n2")
            assert (first["http"], first["volumes"]) == (201, ["data:/data"])
            (volume_id,) = two.asked[-1][2]["volume_ids"]
            # n1 has less to do, and would be taken otherwise.
            second = await made(ann, "data:/data:ro", "more:/more", name="second")
            assert second["node"] == "n2"
            assert two.asked[-1][2]["volume_ids"][0] == volume_id
            assert await listed(ann) == [("data", "ann", "n2", ["first", "second"]), ("more", "ann", "n2", ["second"])]
            refused = await made(ann, "data:/data", node="n1")
            assert (refused["error"], refused["message"]) == (
                "volume_elsewhere", "The volume 'data' is on node n2; have the task run there."
            )  # fmt: skip
            assert all(method == "GET" for method, _, _ in one.asked)

    run(check())


def test_a_name_is_another_volume_for_every_user(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            ann, _ = await host.person("ann")
            bob, _ = await host.person("bob")
            ids = []
            for who in (ann, bob, host.user):
                assert (await made(who, "data:/data"))["http"] == 201
                ids += runner.asked[-1][2]["volume_ids"]
            assert len(set(ids)) == 3
            assert [owner for _, owner, _, _ in await listed(bob)] == ["bob"]
            assert [owner for _, owner, _, _ in await listed(host.user)] == ["admin", "ann", "bob"]
            forged = {"image": "x", "volumes": ["data:/data"], "volume_ids": ids[:1]}
            assert (await bob.post("/api/tasks", json=forged)).status_code == 400
            theirs = await bob.delete("/api/volumes/data", params={"owner": "ann"})
            assert (theirs.status_code, theirs.json()["error"]) == (403, "not_admin")

    run(check())


def test_a_volume_is_removed_when_that_is_asked_for_and_no_task_has_it(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            ann, _ = await host.person("ann")
            await made(ann, "data:/data", name="lab")
            path = f"/api/volumes/{runner.asked[-1][2]['volume_ids'][0]}"
            used = await ann.delete("/api/volumes/data")
            assert (used.status_code, used.json()["message"]) == (
                409, "Task lab has the volume 'data'; remove the task first."
            )  # fmt: skip
            assert (await ann.delete("/api/tasks/lab")).status_code == 200
            assert [name for name, *_ in await listed(ann)] == ["data"]  # a task's end takes nothing with it
            runner.answers[path] = 409, {"error": "engine", "message": "The engine can't remove the volume."}
            assert (await ann.delete("/api/volumes/data")).status_code == 409
            assert (await made(ann, "data:/data", name="again"))["http"] == 201  # it is as good as it was
            await ann.delete("/api/tasks/again")
            del runner.answers[path]
            assert (await ann.delete("/api/volumes/data")).json()["node"] == "n1"
            assert runner.asked[-1][:2] == ("DELETE", path)
            assert await listed(ann) == []
            assert (await ann.delete("/api/volumes/data")).status_code == 404

    run(check())


def test_a_task_that_can_not_be_started_leaves_no_volume_but_those_that_were_there_or_that_others_have(
    run: Run, tmp_path: Path
) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            ann, _ = await host.person("ann")
            assert (await made(ann, "old:/old", name="lab"))["http"] == 201
            runner.answers["/api/tasks"] = 404, {"error": "no_image", "message": "There is no image x."}
            assert (await made(ann, "old:/old", "new:/new"))["error"] == "no_image"
            assert runner.asked[-1][:2] == ("DELETE", f"/api/volumes/{runner.asked[-2][2]['volume_ids'][1]}")
            assert await listed(ann) == [("old", "ann", "n1", ["lab"])]
            del runner.answers["/api/tasks"]
            task = await made(ann, "new:/new")
            await made(ann, "new:/new", name="other")
            assert await Volumes(host.store, clock=host.clock).begin_undoing(task["task_id"]) == []

    run(check())


def test_a_new_volume_that_its_node_can_not_remove_stays_and_the_reason_of_the_task_is_told(
    run: Run, tmp_path: Path
) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            ann, _ = await host.person("ann")
            runner.answers["/api/tasks"] = 404, {"error": "no_image", "message": "There is no image x."}
            runner.answers["DELETE"] = 409, {"error": "engine", "message": "The engine can't remove the volume."}
            assert (await made(ann, "new:/new"))["error"] == "no_image"
            assert await listed(ann) == [("new", "ann", "n1", [])]

    run(check())


def test_a_volume_whose_removal_died_with_its_host_is_good_again_after_two_minutes(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            ann, _ = await host.person("ann")
            for again in (False, True):
                assert (await made(ann, "data:/data", name="lab"))["http"] == 201
                await ann.delete("/api/tasks/lab")
                await Volumes(host.store, clock=host.clock).begin_removal("ann", "data")  # and no word any more
                host.clock.now += REMOVAL_SECONDS - 1
                await runner.beat()
                assert (await made(ann, "data:/data"))["error"] == "volume_going"
                assert (await ann.delete("/api/volumes/data")).json()["error"] == "volume_going"
                host.clock.now += 1
                if again:
                    assert (await ann.delete("/api/volumes/data")).status_code == 200
                    assert await listed(ann) == []

    run(check())


def test_a_removal_that_ends_late_undoes_nothing_that_was_begun_since(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            ann, _ = await host.person("ann")
            await made(ann, "data:/data", name="lab")
            await ann.delete("/api/tasks/lab")
            volumes = Volumes(host.store, clock=host.clock)
            late, _ = await volumes.begin_removal("ann", "data")
            host.clock.now += REMOVAL_SECONDS
            await runner.beat()
            second, _ = await volumes.begin_removal("ann", "data")
            await volumes.end_removal(late.volume_id, late.going, gone=False)
            assert (await made(ann, "data:/data"))["error"] == "volume_going"  # the second one is under way
            host.clock.now += REMOVAL_SECONDS
            await runner.beat()
            assert (await made(ann, "data:/data", name="new"))["http"] == 201
            await volumes.end_removal(second.volume_id, second.going, gone=True)
            assert await listed(ann) == [("data", "ann", "n1", ["new"])]

    run(check())


def test_an_heir_gets_a_removed_users_volumes_and_whoever_is_called_so_next_does_not(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            await host.runner()
            ann, _ = await host.person("ann")
            for who in (ann, host.user):
                await made(who, "data:/data")
            await made(ann, "own:/own")
            assert (await host.user.delete("/api/users/ann")).status_code == 200
            names = [(name, owner) for name, owner, _, _ in await listed(host.user)]
            assert names == [("ann-data", "admin"), ("data", "admin"), ("own", "admin")]
            again, _ = await host.person("ann")
            assert await listed(again) == []

    run(check())


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"volumes": ["Data:/data"]}, 400, "NAME:/TARGET"),
        ({"volumes": ["data:data"]}, 400, "NAME:/TARGET"),
        ({"volumes": ["/etc:/data"]}, 400, "NAME:/TARGET"),
        ({"volumes": ["a:/x", "a:/y"]}, 400, "each of its volumes once"),
        ({"volumes": ["a:/x"], "image": None, "backend": "process"}, 400, "in a container takes --volume"),
    ],
)
def test_what_is_no_volume_is_refused_with_what_is_wanted(
    run: Run, tmp_path: Path, body: dict[str, Any], status: int, said: str
) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            await host.runner()
            answer = await host.user.post("/api/tasks", json={"image": "x", **body})
            assert (answer.status_code, said in answer.text) == (status, True), answer.text
            assert await listed(host.user) == []

    run(check())


def test_a_user_has_so_many_volumes_at_most(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            await host.runner()
            assert (await made(host.user, *(f"v{number}:/{number}" for number in range(MOST_VOLUMES))))["http"] == 201
            more = await made(host.user, "one-more:/x", name="more")
            assert more["error"] == "over_limit"
            assert (await host.user.get("/api/tasks/more")).status_code == 404

    run(check())


def test_volumes_on_two_nodes_go_into_no_task() -> None:
    assert node_of({"a": "n1", "b": "n1"}, None) == "n1"
    assert node_of({}, "n2") == "n2"
    with pytest.raises(UsageError, match="'b' is on node n2"):
        node_of({"a": "n1", "b": "n2"}, None)

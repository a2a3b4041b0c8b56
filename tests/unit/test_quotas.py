"""Limits of users: what they may have, on one host and on several with one database, and what is refused."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
from sqlalchemy import select

from kohakuriver.errors import NotAllowedError, UnavailableError, UsageError
from kohakuriver.limits import Limits
from kohakuriver.quotas import NOTHING, QUOTAS, Offer, QuotaName, Quotas, Usage, byte_count, checked, in_words, parsed
from kohakuriver.session import ticket
from kohakuriver.store import Token
from kohakuriver.store.accounts import MOST_BAD_TOKENS
from tests.support.host_only import HostUnderTest, a_host

Run = Callable[[Coroutine[Any, Any, None]], None]

GIB = 1 << 30
PROCESS = {"backend": "process"}
MANY = 12


def statuses(answers: Iterable[httpx.Response]) -> Counter[int]:
    return Counter(answer.status_code for answer in answers)


async def limit(host: HostUnderTest, user: str = "ann", **limits: float | None) -> dict[str, Any]:
    answer = await host.user.patch(f"/api/users/{user}/limits", json=limits)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()["limits"]
    return found


async def used(client: httpx.AsyncClient, name: str) -> float:
    count: float = (await client.get("/api/auth")).json()["limits"][name]["used"]
    return count


def refusal(answer: httpx.Response, status: int, *words: str) -> None:
    body = answer.json()
    assert (answer.status_code, body["error"]) == (status, "over_limit"), answer.text
    assert all(word in body["message"] for word in words), body["message"]
    assert body["message"].count(".") - body["message"].count("1.5") <= 1


def test_every_limit_is_declared_and_has_a_default_of_the_host() -> None:
    assert set(QUOTAS) == set(get_args(QuotaName)) == set(Quotas.__dataclass_fields__)
    defaults = Quotas.by_default(Limits())
    assert all(getattr(defaults, name) > 0 for name, quota in QUOTAS.items() if quota.unit != "seconds")


@pytest.mark.parametrize(
    ("text", "count"),
    [("1048576", 1 << 20), ("64g", 64 * GIB), ("1.5GiB", 3 * GIB // 2), ("512 MB", 512 << 20), ("2T", 2 << 40)],
)
def test_a_size_is_read_as_it_is_written(text: str, count: int) -> None:
    assert byte_count(text) == count
    assert parsed("memory", text) == count
    assert byte_count(in_words("memory", count)) == count


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("memory", text) for text in ("much", "-1g", "", "9999999p")),
        *(("tasks", text) for text in ("1.5", "-1", "nan")),
        *(("cpus", text) for text in ("inf", "two")),
        ("log", "1e3"),
    ],
)
def test_what_is_no_limit_is_refused_by_its_name(name: str, text: str) -> None:
    with pytest.raises(UsageError, match=name):
        parsed(name, text)


def test_none_is_no_limit_and_default_is_none_of_ones_own() -> None:
    assert (parsed("tasks", "none"), parsed("tasks", "default")) == (0, None)
    with pytest.raises(UsageError, match="no limit 'taks'"):
        checked("taks", 1)


@pytest.mark.parametrize("name", ["tasks", "running", "tokens", "gpus"])
def test_who_writes_0_gets_nothing_and_not_everything(name: str) -> None:
    assert parsed(name, "0") == NOTHING
    with pytest.raises(NotAllowedError, match=f"the limit {name!r} of ann is 0; ask an administrator for more"):
        Usage().check(Usage(**{name: 1}), "ann", Quotas(**{name: NOTHING}))
    Usage().check(Usage(), "ann", Quotas(**{name: NOTHING}))


@pytest.mark.parametrize("name", sorted(set(QUOTAS) - {"tasks", "running", "tokens", "gpus"}))
def test_of_what_no_task_can_do_without_0_is_refused(name: QuotaName) -> None:
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} "):
        parsed(name, "0s" if QUOTAS[name].unit == "seconds" else "0")
    with pytest.raises(UsageError, match=name):
        checked(name, NOTHING)


def test_a_user_who_may_have_nothing_is_shown_0_and_refused(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            await host.runner()
            _, secret = await host.person("ann")
            await limit(host, tasks=NOTHING)
            client = host.client(secret)
            assert (await client.get("/api/auth")).json()["limits"]["tasks"] == {"limit": 0, "used": 0, "own": True}
            refusal(await client.post("/api/tasks", json=PROCESS), 403, "'tasks' of ann is 0", "administrator")

    run(check())


def test_sums_of_fractions_of_a_processor_fill_a_limit_to_the_brim() -> None:
    have = sum((Usage(cpus=0.1) for _ in range(9)), start=Usage())
    have.check(Usage(cpus=0.1), "ann", Quotas(cpus=1))
    with pytest.raises(UnavailableError, match="'cpus' of ann is 1 CPUs"):
        have.check(Usage(cpus=0.2), "ann", Quotas(cpus=1))


def test_parallel_creates_on_two_hosts_with_one_database_never_give_more_than_the_limit(
    run: Run, tmp_path: Path
) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host, a_host(tmp_path) as other:
            await host.runner()
            _, secret = await host.person("ann")
            await limit(host, tasks=5)
            clients = [each.client(secret) for each in (host, other)]
            answers = await asyncio.gather(*(clients[n % 2].post("/api/tasks", json=PROCESS) for n in range(MANY)))
            assert statuses(answers) == {201: 5, 429: MANY - 5}
            refusal(next(each for each in answers if each.status_code == 429), 429, "'tasks' of ann is 5", "vps rm")
            assert len((await clients[0].get("/api/tasks")).json()) == 5

    run(check())


def test_parallel_creates_never_share_the_same_memory(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host, a_host(tmp_path) as other:
            await host.runner()
            _, secret = await host.person("ann")
            await limit(host, memory=10 * GIB)
            clients = [each.client(secret) for each in (host, other)]
            body = {"image": "x", "memory": 3 * GIB}
            answers = await asyncio.gather(*(clients[n % 2].post("/api/tasks", json=body) for n in range(MANY)))
            assert statuses(answers) == {201: 3, 429: MANY - 3}
            refused = next(each for each in answers if each.status_code == 429)
            refusal(refused, 429, "'memory' of ann is 10 GiB", "9 GiB of it", "asks for 3 GiB", "--memory")
            assert await used(clients[0], "memory") == 9 * GIB

    run(check())


def test_what_no_user_could_ever_have_is_refused_as_not_allowed(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            ann, _ = await host.person("ann")
            for name, value in (("memory", 65 * GIB), ("cpus", 33), ("pids", 40_000)):
                refusal(await ann.post("/api/tasks", json={"image": "x", name: value}), 403, f"'{name}'", f"--{name}")
            assert runner.asked == []

    run(check())


def test_removing_and_stopping_give_room_and_a_start_that_failed_takes_none(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            ann, _ = await host.person("ann")
            await limit(host, tasks=2, running=1)
            runner.answers["/api/tasks"] = (409, {"error": "docker", "message": "No."})
            assert (await ann.post("/api/tasks", json={"name": "a", **PROCESS})).status_code == 409
            runner.answers.clear()
            assert (await ann.post("/api/tasks", json={"name": "a", **PROCESS})).status_code == 201
            refusal(
                await ann.post("/api/tasks", json={"name": "b", **PROCESS}),
                429,
                "'running' of ann is 1",
                "vps stop",
            )
            assert (await ann.post("/api/tasks/a/stop")).status_code == 200
            assert (await ann.post("/api/tasks", json={"name": "b", **PROCESS})).status_code == 201
            refusal(await ann.post("/api/tasks", json={"name": "c", **PROCESS}), 429, "'tasks' of ann is 2")
            assert (await ann.delete("/api/tasks/b")).status_code == 200
            host.clock.now += 100  # the node is away: a task that is removed then is free at once, too
            assert (await ann.delete("/api/tasks/a")).json()["pending_removal"]
            assert (await used(ann, "tasks"), await used(ann, "running")) == (0, 0)

    run(check())


def test_of_stopped_tasks_no_more_start_again_at_once_than_may_run(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host, a_host(tmp_path) as other:
            runner = await host.runner()
            _, secret = await host.person("ann")
            clients = [each.client(secret) for each in (host, other)]
            names = [f"t{n}" for n in range(4)]
            for name in names:
                assert (await clients[0].post("/api/tasks", json={"name": name, **PROCESS})).status_code == 201
                assert (await clients[0].post(f"/api/tasks/{name}/stop")).status_code == 200
            await limit(host, running=2)
            runner.held.clear()
            starting = [
                asyncio.ensure_future(clients[n % 2].post(f"/api/tasks/{t}/restart")) for n, t in enumerate(names)
            ]
            refused, _ = await asyncio.wait(starting, return_when=asyncio.FIRST_COMPLETED)
            await runner.beat()  # says that all are stopped, from before
            while len(refused) < 2:
                refused |= (await asyncio.wait(set(starting) - refused, return_when=asyncio.FIRST_COMPLETED))[0]
            runner.held.set()
            assert statuses(await asyncio.gather(*starting)) == {200: 2, 429: 2}
            assert await used(clients[0], "running") == 2

    run(check())


def test_a_restart_that_fails_takes_no_room(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            ann, _ = await host.person("ann")
            task = (await ann.post("/api/tasks", json={"name": "a", **PROCESS})).json()
            assert (await ann.post("/api/tasks/a/stop")).status_code == 200
            await limit(host, running=1)
            runner.answers[f"/api/tasks/{task['container']}/restart"] = (409, {"error": "docker", "message": "No."})
            assert (await ann.post("/api/tasks/a/restart")).status_code == 409
            assert await used(ann, "running") == 0
            assert (await ann.post("/api/tasks", json={"name": "b", **PROCESS})).status_code == 201

    run(check())


def test_a_limit_that_is_lowered_ends_nothing_and_refuses_the_next(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            ann, secret = await host.person("ann")
            for name in ("a", "b"):
                assert (await ann.post("/api/tasks", json={"name": name, **PROCESS})).status_code == 201
            grants = [(await host.forwards.authorize(secret, "a", 80, "tcp")).grant for _ in range(3)]
            asked = len(runner.asked)
            shown = await limit(host, tasks=1, running=1, sessions=2)
            assert shown["tasks"] == {"limit": 1, "used": 2, "own": True}
            assert len(runner.asked) == asked
            assert [task["status"] for task in (await ann.get("/api/tasks")).json()] == ["running"] * 2
            refusal(await ann.post("/api/tasks", json={"name": "c", **PROCESS}), 429, "'tasks' of ann is 1")
            with pytest.raises(UnavailableError, match="3 sessions open, and the limit 'sessions' is 2"):
                await host.forwards.authorize(secret, "a", 80, "tcp")
            assert (await ann.post("/api/tasks/a/restart")).status_code == 200  # what runs already may
            for grant in grants:
                grant.release()
            shown = await limit(host, tasks=None, running=None, sessions=None)
            assert shown["tasks"] == {"limit": Limits().max_tasks, "used": 2, "own": False}
            assert (await ann.post("/api/tasks", json={"name": "c", **PROCESS})).status_code == 201

    run(check())


def test_a_host_that_is_started_again_keeps_the_limits(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            body = {"name": "ann", "limits": {"tasks": 1, "cpus": 1.5, "tokens": None}}
            made = await host.user.post("/api/users", json=body)
            assert (made.status_code, made.json()["limits"]) == (201, {"tasks": 1, "cpus": 1.5})
            secret = await host.token(user="ann")
        async with a_host(tmp_path) as host:
            await host.runner()
            ann = host.client(secret)
            assert (await ann.post("/api/tasks", json=PROCESS)).status_code == 201
            refusal(await ann.post("/api/tasks", json=PROCESS), 429, "'tasks'")
            assert (await host.user.get("/api/users/ann/limits")).json()["limits"]["cpus"]["limit"] == 1.5

    run(check())


def test_a_shared_task_counts_for_its_owner_alone(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            await host.runner()
            ann, _ = await host.person("ann")
            bob, _ = await host.person("bob")
            await limit(host, "bob", tasks=1, memory=GIB)
            for name in ("a", "b"):
                body = {"name": name, "image": "x", "memory": 2 * GIB}
                assert (await ann.post("/api/tasks", json=body)).status_code == 201
                assert (await ann.post(f"/api/tasks/{name}/shares", json={"user": "bob"})).status_code == 201
            assert (await used(bob, "tasks"), await used(bob, "memory")) == (0, 0)
            assert (await bob.post("/api/tasks", json={"name": "c", "image": "x"})).status_code == 201
            assert await used(ann, "tasks") == 2

    run(check())


def test_parallel_requests_never_make_more_tokens_than_the_limit_and_bad_ones_give_room(
    run: Run, tmp_path: Path
) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host, a_host(tmp_path) as other:
            ann, secret = await host.person("ann")
            await limit(host, tokens=4)
            clients = [ann, other.client(secret)]
            answers = await asyncio.gather(
                *(clients[n % 2].post("/api/tokens", json={"name": f"t{n}", "expires_in": 60}) for n in range(MANY))
            )
            assert statuses(answers) == {201: 3, 429: MANY - 3}
            refusal(next(each for each in answers if each.status_code == 429), 429, "'tokens' of ann is 4")
            by_admin = await host.user.post("/api/tokens", json={"user": "ann"})
            refusal(by_admin, 429, "'tokens' of ann is 4", "token revoke")
            made = next(each for each in answers if each.status_code == 201).json()
            assert (await ann.delete(f"/api/tokens/{made['id']}")).status_code == 200
            assert (await ann.post("/api/tokens", json={"name": "again"})).status_code == 201
            host.clock.now += 61  # the other two have expired
            assert await used(ann, "tokens") == 2
            assert (await ann.post("/api/tokens", json={"name": "more"})).status_code == 201

    run(check())


def test_limits_are_for_admins_to_set_and_are_in_the_audit_log(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            ann, _ = await host.person("ann")
            assert (await ann.patch("/api/users/ann/limits", json={"tasks": 1000})).status_code == 403
            assert (await host.user.patch("/api/users/nobody/limits", json={"tasks": 1})).status_code == 404
            bodies: list[Any] = [{"taks": 1}, {"memory": -1}, {"tasks": 1.5}, {"tasks": "x"}, {"memory": 1e30}, [], 1]
            for body in bodies:
                assert (await host.user.patch("/api/users/ann/limits", json=body)).status_code in (400, 422), body
            await limit(host, tasks=3, memory=GIB)
            await limit(host, memory=None)
            events = (await host.user.get("/api/audit?user=ann")).json()["events"]
            limited = [(event["user"], event["limits"]) for event in events if event["event"] == "user_limited"]
            assert limited == [("admin", {"tasks": 3, "memory": GIB}), ("admin", {"tasks": 3})]

    run(check())


def test_admins_have_no_limits_but_those_that_are_set_for_them(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path, limits=Limits(max_requests=0, max_tasks=1, max_tokens=1)) as host:
            await host.runner()
            root, _ = await host.person("root", "admin")
            for _ in range(2):
                assert (await root.post("/api/tasks", json={"image": "x", "memory": 1 << 40})).status_code == 201
                assert (await root.post("/api/tokens", json={})).status_code == 201
            limits = (await root.get("/api/auth")).json()["limits"]
            assert [name for name, each in limits.items() if each["limit"]] == ["sessions", "connects"]
            await limit(host, "root", tasks=2)
            refusal(await root.post("/api/tasks", json=PROCESS), 429, "'tasks' of root is 2")

    run(check())


def test_a_sessions_ticket_says_how_many_connections_its_user_may_open(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            ann, secret = await host.person("ann")
            await ann.post("/api/tasks", json={"name": "web", **PROCESS})
            for connects, told in ((7, 7), (0, 0), (None, Limits().max_connects)):
                await limit(host, connects=connects)
                route = await host.forwards.authorize(secret, "web", 80, "tcp")
                assert route.ticket is not None
                assert ticket.check(runner.key, route.ticket, node="n1", scope="forward").connects == told
                route.grant.release()

    run(check())


def test_a_container_that_asks_for_nothing_gets_what_its_node_gives_and_leaves_room_for_others(
    run: Run, tmp_path: Path
) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            tasks: dict[str, Any] = {
                "task_memory": 32 * GIB,
                "task_pids": 1000,
                "task_shm": 1 << 26,
                "task_log": 1 << 20,
            }
            runner = await host.runner(offer=Offer(memory=64 * GIB, cpus=4, **tasks))
            ann, _ = await host.person("ann")
            task = (await ann.post("/api/tasks", json={"name": "a", "image": "x"})).json()
            given = {name: task[name] for name in ("memory", "cpus", "pids", "shm_size", "log_size")}
            # Of the memory and the processors that Ann may have an eighth is less than what the node gives.
            assert given == {"memory": 8 * GIB, "cpus": 4, "pids": 1000, "shm_size": 1 << 26, "log_size": 1 << 20}
            assert {name: runner.asked[-1][2][name] for name in given} == given
            admins = (await host.user.post("/api/tasks", json={"image": "x"})).json()
            assert (admins["memory"], admins["cpus"], admins["pids"]) == (32 * GIB, None, 1000)
            await limit(host, log=1 << 17)
            assert (await ann.post("/api/tasks", json=PROCESS)).json()["log_size"] == 1 << 17

    run(check())


def test_a_task_that_asks_for_much_goes_to_a_node_that_has_it_or_nowhere(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            await host.runner("a", offer=Offer(memory=4 * GIB, cpus=2))
            await host.runner("b", offer=Offer(memory=16 * GIB, cpus=8))
            assert (await host.create(image="x", memory=8 * GIB))["node"] == "b"
            assert (await host.create(image="x", cpus=3))["node"] == "b"
            for body, word in (({"memory": 17 * GIB}, "4 GiB"), ({"node": "a", "cpus": 3}, "node a has 2 CPUs")):
                answer = await host.user.post("/api/tasks", json={"image": "x", **body})
                assert (answer.status_code, answer.json()["error"]) == (409, "node_too_small")
                assert word in answer.json()["message"]

    run(check())


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"image": "x", "memory": 1000}, "16777216"),
        ({"image": "x", "pids": 1}, "16"),
        ({"image": "x", "cpus": 0}, "0.01"),
        ({"image": "x", "memory": 1 << 30, "shm_size": 2 << 30}, "part of a task's memory, which is 1 GiB"),
        ({"backend": "process", "memory": 1 << 30}, "Only a task in a container takes --memory"),
        ({"backend": "process", "shm_size": 1 << 20}, "Only a task in a container takes --shm-size"),
        ({"backend": "process", "network": "none"}, "Only a task in a container takes --network"),
        ({"image": "x", "network": "host"}, "a task's network is none, or left out"),
    ],
)
def test_amounts_that_make_no_sense_are_refused(run: Run, tmp_path: Path, body: dict[str, Any], said: str) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            await host.runner()
            answer = await host.user.post("/api/tasks", json=body)
            assert answer.status_code == 400, answer.text
            assert said in answer.json()["message"]

    run(check())


def test_a_user_who_makes_and_revokes_tokens_without_end_fills_no_disk(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            ann, _ = await host.person("ann")
            secrets = []
            for n in range(MOST_BAD_TOKENS + 5):
                host.clock.now += 1
                made = (await ann.post("/api/tokens", json={"name": f"t{n}"})).json()
                secrets.append(made["token"])
                assert (await ann.delete(f"/api/tokens/{made['id']}")).status_code == 200
            every = await host.store.read(lambda session: len(list(session.scalars(select(Token)))))
            assert every <= MOST_BAD_TOKENS + 4  # with the host's two, the one that is good, and the last
            for secret, error in ((secrets[0], "not_authenticated"), (secrets[-1], "token_revoked")):
                answer = await host.client(secret).get("/api/auth")
                assert (answer.status_code, answer.json()["error"]) == (401, error)

    run(check())

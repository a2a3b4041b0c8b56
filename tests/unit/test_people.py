"""Users, tokens, shares: what the host's HTTP API makes of them, and that sessions end with the right to them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from kohakuriver.errors import KohakuRiverError, NotAllowedError, NotFoundError, UnauthenticatedError
from kohakuriver.host.services.authorize import Forwards
from kohakuriver.host.services.credentials import Caller, Credentials
from kohakuriver.session.carried import Route
from kohakuriver.store import Groups, Task, Token
from tests.support.hops import until
from tests.support.host_only import HostUnderTest, a_host

Run = Callable[[Coroutine[Any, Any, None]], None]


def test_a_user_sees_and_uses_own_tasks_alone_until_one_is_shared(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            await host.runner()
            ann, _ = await host.person("ann")
            bob, bobs = await host.person("bob")
            task = (await ann.post("/api/tasks", json={"name": "web", "backend": "process"})).json()
            assert (task["owner"], task["shared_with"]) == ("ann", [])
            assert (await bob.get("/api/tasks")).json() == []
            for reference in ("web", task["task_id"]):
                answer = await bob.get(f"/api/tasks/{reference}")
                assert (answer.status_code, answer.json()["error"]) == (403, "not_your_task")
                assert "vps share web bob" in answer.json()["message"]
            with pytest.raises(NotAllowedError):
                await host.forwards.authorize(bobs, "web", 80, "tcp")

            assert (await ann.post("/api/tasks/web/shares", json={"user": "bob"})).json()["shared_with"] == ["bob"]
            assert [seen["name"] for seen in (await bob.get("/api/tasks")).json()] == ["web"]
            (await host.forwards.authorize(bobs, "web", 80, "tcp")).grant.release()
            for answer in (
                await bob.post("/api/tasks/web/stop"),
                await bob.delete("/api/tasks/web"),
                await bob.post("/api/tasks/web/shares", json={"user": "bob"}),
            ):
                assert answer.status_code == 403

            own = await ann.post("/api/tasks/web/shares", json={"user": "ann"})
            assert (own.status_code, "ann's own" in own.json()["message"]) == (400, True)

            assert (await ann.delete("/api/tasks/web/shares/bob")).json()["shared_with"] == []
            assert (await bob.get("/api/tasks/web")).status_code == 403
            assert (await ann.delete("/api/tasks/web/shares/bob")).status_code == 404
            assert (await ann.post("/api/tasks/web/shares", json={"user": "nobody"})).status_code == 404

    run(check())


def test_processes_on_a_node_are_for_admins_unless_its_runner_opens_them_to_users(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            await host.runner("closed", user_processes=False)
            ann, _ = await host.person("ann")
            process = {"backend": "process"}
            for body in (process, {**process, "node": "closed"}):
                answer = await ann.post("/api/tasks", json=body)
                assert (answer.status_code, answer.json()["error"]) == (403, "not_admin")
                assert "--user-processes" in answer.json()["message"]
            assert (await ann.post("/api/tasks", json={"image": "x"})).status_code == 201
            assert (await host.user.post("/api/tasks", json=process)).status_code == 201
            await host.runner("open")
            for _ in range(3):
                assert (await ann.post("/api/tasks", json=process)).json()["node"] == "open"
            nodes = (await ann.get("/api/nodes")).json()
            assert {node["name"]: node["user_processes"] for node in nodes} == {"closed": False, "open": True}

    run(check())


def test_admins_see_and_change_every_task(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            await host.runner()
            ann, _ = await host.person("ann")
            root, _ = await host.person("root", "admin")
            await ann.post("/api/tasks", json={"name": "web", "backend": "process"})
            assert [task["owner"] for task in (await root.get("/api/tasks")).json()] == ["ann"]
            assert (await root.post("/api/tasks/web/stop")).status_code == 200
            assert (await root.delete("/api/tasks/web")).status_code == 200

    run(check())


def test_a_share_ends_with_its_task(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            ann, _ = await host.person("ann")
            await host.person("bob")
            for away in (False, True):
                task = (await ann.post("/api/tasks", json={"name": "web", "backend": "process"})).json()
                await ann.post("/api/tasks/web/shares", json={"user": "bob"})
                if away:
                    host.clock.now += 100
                assert (await ann.delete("/api/tasks/web")).status_code == 200
                assert await host.people._accounts.shares([task["task_id"]]) == {}
            await runner.beat()

    run(check())


def test_what_reaches_beyond_a_users_own_containers_is_for_admins(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            await host.runner(backends=("docker", "address"))
            ann, _ = await host.person("ann")
            for path, body in (
                ("/api/tasks", {"image": "x", "mounts": ["/etc:/etc"]}),
                ("/api/tasks", {"image": "x", "devices": ["/dev/mem"]}),
                ("/api/tasks", {"image": "x", "labels": ["traefik.enable=true"]}),
                ("/api/tasks/adopt", {"container": "somebodys"}),
                ("/api/tasks/adopt", {"address": "127.0.0.1"}),
            ):
                answer = await ann.post(path, json=body)
                assert (answer.status_code, answer.json()["error"]) == (403, "not_admin")
            assert (await host.user.post("/api/tasks", json={"image": "x", "mounts": ["/etc:/etc"]})).status_code == 201
            host.tasks._user_mounts = True
            assert (await ann.post("/api/tasks", json={"image": "x", "mounts": ["/etc:/etc"]})).status_code == 201
            assert (await ann.post("/api/tasks", json={"image": "x", "devices": ["/dev/mem"]})).status_code == 403

    run(check())


def test_a_token_is_shown_once_and_listed_without_its_secret(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            ann, _ = await host.person("ann")
            host.clock.now += 1
            made = (await ann.post("/api/tokens", json={"name": "laptop", "expires_in": 3600})).json()
            assert made["token"].startswith("kr_")
            listed = (await ann.get("/api/tokens")).json()
            assert [(token["name"], token["user"], token["status"]) for token in listed] == [
                ("first", "ann", "valid"),
                ("laptop", "ann", "valid"),
            ]
            assert listed[1] == {key: value for key, value in made.items() if key != "token"}
            assert made["token"] not in (await host.user.get("/api/tokens?all=true")).text
            taken = await ann.post("/api/tokens", json={"name": "laptop"})
            assert (taken.status_code, taken.json()["error"]) == (400, "name_taken")
            host.clock.now += 3601
            assert (await ann.get("/api/tokens")).json()[1]["status"] == "expired"

    run(check())


@pytest.mark.parametrize(
    ("how", "said"), [("expired", "expired"), ("revoked", "revoked"), ("removed", "revoked"), ("made up", "not know")]
)
def test_a_token_that_is_not_valid_any_more_opens_nothing_and_says_why(
    run: Run, tmp_path: Path, how: str, said: str
) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            await host.runner()
            ann, secret = await host.person("ann", expires_in=60)
            await ann.post("/api/tasks", json={"name": "web", "backend": "process"})
            if how == "expired":
                host.clock.now += 60
            elif how == "revoked":
                assert (await ann.delete("/api/tokens/first")).status_code == 200
            elif how == "removed":
                assert (await host.user.delete("/api/users/ann")).status_code == 200
            else:
                ann = host.client(secret := secret[:-1])
            answer = await ann.get("/api/auth")
            assert answer.status_code == 401
            assert said in answer.json()["message"]
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            with pytest.raises(UnauthenticatedError):
                await host.forwards.authorize(secret, "web", 80, "tcp")

    run(check())


def test_a_user_manages_own_tokens_and_no_others(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            ann, _ = await host.person("ann")
            bob, _ = await host.person("bob")
            anns = (await ann.get("/api/tokens")).json()[0]
            assert (await bob.delete(f"/api/tokens/{anns['id']}")).status_code == 404
            assert (await bob.get("/api/tokens?user=ann")).status_code == 403
            assert (await bob.get("/api/tokens?all=true")).status_code == 403
            assert (await bob.post("/api/tokens", json={"name": "x", "user": "ann"})).status_code == 403
            assert (await bob.post("/api/tokens", json={"name": "x", "node": "n1"})).status_code == 403
            assert (await bob.post("/api/tokens", json={"name": "x", "user": "bob"})).status_code == 201
            # "first" is the name of a token of each: it means one's own.
            assert (await bob.delete("/api/tokens/first")).json()["user"] == "bob"
            # An admin's command for a token that is gone already does not go on to somebody else's of that name.
            assert (await host.user.delete("/api/tokens/first")).status_code == 404
            revoked = (await host.user.delete(f"/api/tokens/{anns['id']}")).json()
            assert (revoked["user"], revoked["status"]) == ("ann", "revoked")

    run(check())


def test_a_token_that_expires_makes_none_that_outlives_it(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            ann, _ = await host.person("ann", expires_in=100)
            first = (await ann.get("/api/tokens")).json()[0]
            for expires_in in (None, 1000):
                made = await ann.post("/api/tokens", json={"name": f"more {expires_in}", "expires_in": expires_in})
                assert made.json()["expires_at"] == first["expires_at"]
            sooner = await ann.post("/api/tokens", json={"name": "sooner", "expires_in": 10})
            assert sooner.json()["expires_at"] < first["expires_at"]

    run(check())


def test_the_tasks_of_a_user_who_is_removed_pass_to_the_admin_who_does_it(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            await host.runner()
            ann, _ = await host.person("ann")
            root, _ = await host.person("root", "admin")
            await ann.post("/api/tasks", json={"name": "web", "backend": "process"})
            assert (await root.delete("/api/users/ann")).json()["name"] == "ann"
            assert (await root.get("/api/tasks/web")).json()["owner"] == "root"
            # Whoever gets the name next gets nothing else with it.
            again, _ = await host.person("ann")
            assert (await again.get("/api/tasks")).json() == []
            assert (await root.delete("/api/users/nobody")).status_code == 404
            for stays in ("root", "admin"):
                assert (await root.delete(f"/api/users/{stays}")).status_code == 400

    run(check())


def test_what_a_user_asks_for_while_being_removed_is_not_there_for_the_next_of_that_name(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            await host.runner()
            ann, _ = await host.person("ann")
            caller = Credentials.caller

            async def and_then_removed(credentials: Credentials, secret: str | None) -> tuple[Caller, Token]:
                found = await caller(credentials, secret)
                if found[0].name == "ann":
                    await host.people.remove_user("ann", Caller("admin", "admin"))
                return found

            monkeypatch.setattr(Credentials, "caller", and_then_removed)
            for path, body, told in (
                ("/api/tokens", {"name": "late"}, (401, "not_authenticated")),
                ("/api/tasks", {"name": "late", "image": "x"}, (404, "not_found")),
            ):
                answer = await ann.post(path, json=body)
                assert (answer.status_code, answer.json()["error"]) == told
                ann, _ = await host.person("ann")
            assert [token["name"] for token in (await host.user.get("/api/tokens?user=ann")).json()] == ["first"]
            assert (await host.user.get("/api/tasks")).json() == []
            with pytest.raises(NotFoundError):
                await host.people.remove_user("ann", Caller("gone", "admin"))

    run(check())


@pytest.mark.parametrize("name", ["", "Ann", "an n", "anonymous", "x" * 64, "-ann"])
def test_a_user_can_not_be_called_just_anything(run: Run, tmp_path: Path, name: str) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            assert (await host.user.post("/api/users", json={"name": name})).status_code == 400
            assert (await host.user.post("/api/users", json={"name": "admin"})).json()["error"] == "name_taken"

    run(check())


def test_the_hosts_own_token_is_replaced_after_it_was_revoked(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        secrets = []
        for _ in range(2):
            async with a_host(tmp_path) as host:
                secrets.append(host.admin_token)
                assert (await host.user.get("/api/auth")).json()["user"] == "admin"
                assert (await host.user.delete("/api/tokens/admin-token")).status_code == 200
                assert (await host.user.get("/api/auth")).status_code == 401
        assert secrets[0] != secrets[1]
        async with a_host(tmp_path) as host:
            for secret in secrets:
                assert (await host.client(secret).get("/api/auth")).status_code == 401

    run(check())


def test_a_nodes_own_token_registers_that_node_alone(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            host.node = host.client(await host.token(node="n1", name="for n1"))
            runner = await host.runner("n1")
            assert (await runner.beat()).status_code == 200
            body = {"name": "n2", "url": "http://n2:1", "backends": []}
            refused = await host.node.post("/api/nodes/register", json=body)
            assert (refused.status_code, "--name n1" in refused.json()["message"]) == (403, True)
            assert (await host.node.post("/api/nodes/n2/heartbeat", json={})).status_code == 403
            await host.user.delete("/api/tokens/for n1")
            assert (await runner.beat()).status_code == 401

    run(check())


class Session:
    """A session as the host's registry knows it."""

    def __init__(self, target: Route) -> None:
        assert target.grant is not None
        self.ended: list[str] = []
        self.grant = target.grant
        self.grant.attach(self.ended.append)

    @classmethod
    async def open(cls, forwards: Forwards, secret: str | None, task: str = "web") -> Session:
        return cls(await forwards.authorize(secret, task, 80, "tcp"))


async def two_users(host: HostUnderTest) -> tuple[Any, str, Any, str]:
    """ann, who owns the task "web", and bob, with whom it is shared."""
    await host.runner()
    ann, anns = await host.person("ann")
    bob, bobs = await host.person("bob", expires_in=100)
    await ann.post("/api/tasks", json={"name": "web", "backend": "process"})
    await ann.post("/api/tasks/web/shares", json={"user": "bob"})
    return ann, anns, bob, bobs


@pytest.mark.parametrize(
    ("how", "said"),
    [("revoke", "revoked"), ("remove user", "user"), ("unshare", "not shared"), ("expire", "expired")],
)
def test_sessions_end_with_the_right_to_them_and_others_go_on(run: Run, tmp_path: Path, how: str, said: str) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            ann, anns, bob, bobs = await two_users(host)
            second = (await bob.post("/api/tokens", json={"name": "second"})).json()["token"]
            sessions = [await Session.open(host.forwards, secret) for secret in (anns, bobs, second, host.admin_token)]
            if how == "revoke":
                await bob.delete("/api/tokens/first")
            elif how == "remove user":
                await host.user.delete("/api/users/bob")
            elif how == "unshare":
                await ann.delete("/api/tasks/web/shares/bob")
            else:
                host.clock.now += 101
                await host.grants.check()
            hit = [len(session.ended) for session in sessions]
            assert hit == ([0, 1, 0, 0] if how == "revoke" else [0, 1, 1, 0])
            assert said in sessions[1].ended[0]
            assert len(host.grants) == 4 - sum(hit)
            for session in sessions:
                session.grant.release()
            assert len(host.grants) == 0

    run(check())


@pytest.mark.parametrize("left", ["lost", "named"])
@pytest.mark.parametrize("how", ["revoke", "remove user", "unshare"])
def test_what_a_session_left_in_its_task_ends_with_the_right_to_it(
    run: Run, tmp_path: Path, how: str, left: str
) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            ann, anns, bob, bobs = await two_users(host)
            for secret, leaves in ((anns, True), (bobs, True), (host.admin_token, False)):
                grant = (await host.forwards.authorize(secret, "web", 80, "tcp")).grant
                grant.opened()
                if leaves and left == "named":
                    grant.stays()
                grant.closed(**({"lost": True} if leaves and left == "lost" else {}))
            await host.grants.check()
            assert not host.revoked
            if how == "revoke":
                await bob.delete("/api/tokens/first")
            elif how == "remove user":
                await host.user.delete("/api/users/bob")
            else:
                await ann.delete("/api/tasks/web/shares/bob")
            ((node, container, user, reason),) = host.revoked
            assert (node, container.startswith("kohakuriver-"), user) == ("n1", True, "bob")
            assert reason
            await host.grants.check()
            assert len(host.revoked) == 1

    run(check())


def test_a_session_that_loses_its_right_while_it_is_being_opened_ends_as_soon_as_it_is_open(
    run: Run, tmp_path: Path
) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            _, _, bob, bobs = await two_users(host)
            target = await host.forwards.authorize(bobs, "web", 80, "tcp")
            await bob.delete("/api/tokens/first")
            assert "revoked" in Session(target).ended[0]

    run(check())


@pytest.mark.parametrize("how", ["revoke", "unshare"])
def test_a_right_that_goes_between_the_look_at_it_and_the_session_opens_nothing(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            _, _, bob, bobs = await two_users(host)
            check_usable = host.forwards._access.check_usable

            async def and_then_no_more(caller: Caller, task: Task) -> None:
                await check_usable(caller, task)
                if how == "revoke":
                    await bob.delete("/api/tokens/first")
                else:
                    await host.people.unshare(task, "bob")

            monkeypatch.setattr(host.forwards._access, "check_usable", and_then_no_more)
            with pytest.raises(NotAllowedError, match="revoked" if how == "revoke" else "not shared"):
                await host.forwards.authorize(bobs, "web", 80, "tcp")
            assert len(host.grants) == 0

    run(check())


@pytest.mark.parametrize("how", ["revoke", "remove user", "unshare"])
def test_a_pass_is_worth_no_more_than_the_token_that_it_stands_for(run: Run, tmp_path: Path, how: str) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            ann, _, bob, _ = await two_users(host)
            shown = (await bob.post("/api/tasks/web/ssh-pass")).json()["pass"]
            if how == "revoke":
                await bob.delete("/api/tokens/first")
            elif how == "remove user":
                await host.user.delete("/api/users/bob")
            else:
                await ann.delete("/api/tasks/web/shares/bob")
            with pytest.raises(NotAllowedError):
                await host.forwards.authorize_ssh(shown, "web")
            assert len(host.grants) == 0

    run(check())


def test_what_another_host_on_the_same_database_revokes_ends_here_too(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kohakuriver.host.services.grants.CHECK_SECONDS", 0.01)

    async def check() -> None:
        async with a_host(tmp_path) as host:
            _, _, _, bobs = await two_users(host)
            checking = asyncio.ensure_future(host.grants.run())
            target = await host.forwards.authorize(bobs, "web", 80, "tcp")
            ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
            assert target.grant is not None
            target.grant.attach(ended.set_result)
            async with a_host(tmp_path) as other:
                assert (await other.user.delete("/api/users/bob")).status_code == 200
                assert "user" in await ended
            checking.cancel()

    run(check())


def test_a_session_that_can_not_be_ended_keeps_no_other_open(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kohakuriver.host.services.grants.CHECK_SECONDS", 0.01)

    async def check() -> None:
        async with a_host(tmp_path) as host:
            _, _, bob, bobs = await two_users(host)

            def fail(_reason: str) -> None:
                raise RuntimeError

            for _ in range(3):
                (await host.forwards.authorize(bobs, "web", 80, "tcp")).grant.attach(fail)
            session = await Session.open(host.forwards, bobs)
            assert (await bob.delete("/api/tokens/first")).status_code == 200
            assert len(session.ended) == 1

            checks, look = [], host.grants.check

            async def fail_once() -> None:
                checks.append(1)
                if len(checks) == 1:
                    raise RuntimeError
                await look()

            session = await Session.open(host.forwards, host.admin_token)
            monkeypatch.setattr(host.grants, "check", fail_once)
            checking = asyncio.ensure_future(host.grants.run())
            await until(lambda: len(checks) > 1)
            checking.cancel()

    run(check())


def test_a_check_of_rights_that_fails_is_told_once_and_tried_again(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("kohakuriver.host.services.grants.CHECK_SECONDS", 0.01)

    async def check() -> None:
        async with a_host(tmp_path) as host:
            await two_users(host)
            await Session.open(host.forwards, host.admin_token)
            checks, look = [], host.grants.check
            went_on = asyncio.Event()

            async def fail_twice() -> None:
                checks.append(1)
                if len(checks) <= 2:
                    raise KohakuRiverError("The database failed: it is locked.", code="database")
                await look()
                if len(checks) == 4:
                    went_on.set()

            monkeypatch.setattr(host.grants, "check", fail_twice)
            checking = asyncio.ensure_future(host.grants.run())
            await went_on.wait()
            checking.cancel()

    run(check())
    told = capsys.readouterr().out
    assert told.count("it is locked") == 1
    assert told.count("are checked again") == 1


def test_a_session_without_a_token_is_nobodys_to_end(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path, allow_anonymous=True) as host:
            await two_users(host)
            session = await Session.open(host.forwards, None)
            await host.grants.check()
            assert session.ended == []

    run(check())


def test_a_token_without_a_name_is_named_after_its_day(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            made = [(await host.user.post("/api/tokens", json={})).json()["name"] for _ in range(2)]
            assert all(name.startswith("cli-20") for name in made)
            assert len(set(made)) == 2

    run(check())


def test_who_is_in_a_group_may_use_what_is_shared_with_it_and_who_leaves_may_not(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            runner = await host.runner()
            ann, _ = await host.person("ann")
            bob, bobs = await host.person("bob")
            cid, cids = await host.person("cid")
            admin = host.user
            made = await admin.post("/api/groups", json={"name": "lab", "members": ["bob"]})
            assert (made.status_code, made.json()["members"]) == (201, ["bob"])
            await ann.post("/api/tasks", json={"name": "web", "backend": "process"})
            assert (await bob.get("/api/tasks/web")).status_code == 403
            shared = await ann.post("/api/tasks/web/shares", json={"group": "lab"})
            assert (shared.status_code, shared.json()["shared_with"]) == (201, ["@lab"])

            assert [task["name"] for task in (await bob.get("/api/tasks")).json()] == ["web"]
            assert (await bob.get("/api/tasks/web")).status_code == 200
            assert (await bob.post("/api/tasks/web/stop")).status_code == 403
            assert (await cid.get("/api/tasks")).json() == []
            assert (await cid.get("/api/tasks/web")).status_code == 403
            seen = [[group["name"] for group in (await who.get("/api/groups")).json()] for who in (admin, bob, cid)]
            assert seen == [["lab"], ["lab"], []]

            ended: dict[str, str] = {}
            for name, secret in (("bob", bobs), ("cid", cids)):
                if name == "cid":
                    changed = await admin.patch("/api/groups/lab", json={"add": ["cid"]})
                    assert changed.json()["members"] == ["bob", "cid"]
                route = await host.forwards.authorize(secret, "web", 80, "tcp")
                route.grant.attach(lambda reason, name=name: ended.update({name: reason}))  # type: ignore[misc]
            asked = len(runner.asked)
            left = await admin.patch("/api/groups/lab", json={"remove": ["bob"]})
            assert left.json()["members"] == ["cid"]
            assert ended == {"bob": "the task is not shared with bob any more"}  # before the answer
            assert [path.rpartition("/")[2] for _, path, _ in runner.asked[asked:]] == ["token"]
            assert (await bob.get("/api/tasks/web")).status_code == 403

            await ann.post("/api/tasks/web/shares", json={"user": "cid"})
            assert (await admin.delete("/api/groups/lab")).json()["members"] == ["cid"]
            assert "cid" not in ended  # there is another right to it
            assert (await ann.get("/api/tasks/web")).json()["shared_with"] == ["cid"]

    run(check())


def test_another_host_takes_a_member_that_left_out_within_its_next_look(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            await host.runner()
            ann, _ = await host.person("ann")
            _, bobs = await host.person("bob")
            await host.user.post("/api/groups", json={"name": "lab", "members": ["bob"]})
            await ann.post("/api/tasks", json={"name": "web", "backend": "process"})
            await ann.post("/api/tasks/web/shares", json={"group": "lab"})
            route = await host.forwards.authorize(bobs, "web", 80, "tcp")
            ended: list[str] = []
            route.grant.attach(ended.append)
            await Groups(host.store).change("lab", remove=["bob"])  # as the other one does
            assert not ended
            await host.grants.check()  # which every host does every two seconds
            assert ended == ["the task is not shared with bob any more"]

    run(check())


def test_what_is_no_group_or_no_member_is_refused_and_changes_nothing(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            await host.runner()
            await host.person("ann")
            _, _ = await host.person("bob")
            admin = host.user
            await admin.post("/api/groups", json={"name": "lab", "members": ["ann"]})
            await host.create(name="web")
            for method, path, body, status, words in (
                ("POST", "/api/groups", {"name": "lab"}, 400, "group 'lab' already"),
                ("POST", "/api/groups", {"name": "@lab"}, 422, "1 to 62"),
                ("POST", "/api/groups", {"name": "new", "members": ["nobody"]}, 404, "no user 'nobody'"),
                ("PATCH", "/api/groups/lab", {"add": ["bob"], "remove": ["nobody"]}, 404, "'nobody' is not in"),
                ("PATCH", "/api/groups/other", {"add": ["bob"]}, 404, "no group 'other'"),
                ("DELETE", "/api/groups/other", None, 404, "no group 'other'"),
                ("POST", "/api/tasks/web/shares", {"group": "other"}, 404, "no group 'other'"),
                ("POST", "/api/tasks/web/shares", {"group": "lab", "user": "ann"}, 422, "either a user or a group"),
                ("DELETE", "/api/tasks/web/shares/@lab", None, 404, "not shared with '@lab'"),
            ):
                answer = await admin.request(method, path, json=body)
                assert (answer.status_code in (status, 400), words in answer.json()["message"]) == (True, True), path
            groups = (await admin.get("/api/groups")).json()
            assert [(group["name"], group["members"]) for group in groups] == [("lab", ["ann"])]
            await admin.delete("/api/users/ann")  # who gets the name one day is not in it
            assert (await admin.get("/api/groups")).json()[0]["members"] == []

    run(check())

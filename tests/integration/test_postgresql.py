"""Hosts on a real PostgreSQL server: what one does the other knows, and what is seen while the server is down."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import statistics
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from kohakuriver.errors import UnavailableError
from kohakuriver.store import Accounts, Browsers, DeviceCodes, Identities, Store
from tests.support import forked
from tests.support.postgres import Postgres, a_server
from tests.support.processes import PATIENCE, Program, a_cluster, eventually
from tests.support.two_hosts import TwoHosts, two_hosts
from tests.support.up import connect, echoes

DOWN = "Error: The host's database is down; its administrator finds the reason in the host's log."
AT_ONCE = 0.2
"""Seconds by which the other host is later than the one that was told; by its own look it would be two."""


def asking(url: str, **headers: str) -> httpx.Client:
    return httpx.Client(base_url=url, headers=headers, trust_env=False, timeout=PATIENCE)


@pytest.fixture
def own_postgres() -> Iterator[Postgres]:
    """A server that a test may stop."""
    with a_server() as server:
        yield server


def test_a_host_without_its_database_lives_is_not_ready_and_tells_users_a_sentence_with_7(
    own_postgres: Postgres, tmp_path: Path
) -> None:
    postgres = own_postgres
    with a_cluster(tmp_path, "--database", postgres.url) as cluster, asking(cluster.url) as plain:
        cluster.start_runner("n1", "--backend", "process")
        environment = {**os.environ, "KOHAKURIVER_HOST": cluster.url, "KOHAKURIVER_TOKEN": cluster.token}

        def listed() -> tuple[int, str]:
            done = forked.run(["vps", "list"], env=environment, stdin="", timeout=PATIENCE)
            return done.returncode, done.stderr

        assert listed()[0] == 0
        assert plain.get("/health/ready").status_code == 200
        postgres.end()
        code, said = listed()
        told = re.fullmatch(rf"{re.escape(DOWN)} \(request [0-9a-f]{{32}}\)\n", said)
        assert code == 7
        assert told is not None, said
        assert plain.get("/health/live").json()["status"] == "ok"
        answer = plain.get("/health/ready")
        assert (answer.status_code, answer.json()["error"]) == (503, "database_down")
        assert DOWN.removeprefix("Error: ") == answer.json()["message"]
        log = cluster.host.log.read_text()
        assert "the database is down" in log
        assert str(postgres.port) in log, "the driver's own words are in the log"
        looked = forked.run(["doctor"], env=environment, stdin="", timeout=PATIENCE)
        assert "ok    websocket" in looked.stdout
        assert "WRONG login      The host's database is down" in looked.stdout
        postgres.start()
        eventually(lambda: listed()[0] == 0)
        eventually(lambda: (cluster.node("n1") or {})["status"] == "online")
        assert plain.get("/health/ready").status_code == 200


def test_first_logins_at_once_make_one_user_of_a_subject_and_of_a_name_as_many_as_there_are(
    postgres: Postgres, run: Callable[[Coroutine[Any, Any, None]], None]
) -> None:
    async def check() -> None:
        database = postgres.new_database()
        stores = [await Store.open(database) for _ in range(2)]
        hosts = [Identities(store) for store in stores]
        try:
            same = await asyncio.gather(*(host.enter("https://id", "1", "ann", "user") for host in hosts * 4))
            assert {came.user for came in same} == {"ann"}
            assert sum(came.is_new for came in same) == 1
            others = (host.enter("https://id", f"{n}", "ann", "user") for n, host in enumerate(hosts * 4, 2))
            names = {came.user for came in await asyncio.gather(*others)}
            assert names == {f"ann-{n}" for n in range(2, 10)}
        finally:
            for store in stores:
                await store.close()

    run(check())


def test_a_command_line_that_asks_two_hosts_at_once_for_its_token_has_one(
    postgres: Postgres, run: Callable[[Coroutine[Any, Any, None]], None]
) -> None:
    async def check() -> None:
        database = postgres.new_database()
        stores = [await Store.open(database) for _ in range(2)]
        accounts = [Accounts(store) for store in stores]
        hosts = [DeviceCodes(store, each) for store, each in zip(stores, accounts, strict=True)]
        try:
            await accounts[0].add_user("ann", "user")
            token = await accounts[0].add_token("kr_x", kind="user", name="ann", label="x")
            browser, _ = await Browsers(stores[0]).add("krb_x", token.digest)
            await hosts[0].add("code", "TYPED", origin="o", source="s", machine="m")
            waiting = await hosts[1].typed("TYPED")
            assert waiting is not None
            answers = (host.answer("TYPED", waiting.id, browser, allow=True) for host in hosts * 2)
            assert sum(answer is not None for answer in await asyncio.gather(*answers)) == 1
            given = await asyncio.gather(*(host.take("code", f"kr_{n}") for n, host in enumerate(hosts * 2)))
            assert sorted(each.what for each in given) == ["given", "gone", "gone", "gone"]
        finally:
            for store in stores:
                await store.close()

    run(check())


def test_a_node_whose_host_dies_goes_on_with_another_host_on_the_same_database(
    postgres: Postgres, tmp_path: Path
) -> None:
    database = postgres.new_database()
    with a_cluster(tmp_path, "--database", database) as cluster:
        state = tmp_path / "second"
        place = ("--bind", "127.0.0.1", "--port", "0", "--ssh-port", "0")
        second = Program(tmp_path / "second.log", "host", "--state-dir", str(state), *place, "--database", database)
        try:
            runner = cluster.start_runner("n1", "--host-url", second.ready["url"], "--backend", "process")
            assert runner.next_event()["host"] == cluster.url
            cluster.host.end(signal.SIGKILL)
            assert runner.next_event()["host"] == second.ready["url"]
            with asking(second.ready["url"], Authorization=f"Bearer {cluster.token}") as through:
                eventually(lambda: through.get("/api/nodes").json()[0]["status"] == "online")
                order = {"backend": "process", "name": "web", "command": ["sleep", "1000"]}
                assert through.post("/api/tasks", json=order).status_code == 201
                assert through.get(f"/api/tasks/web/wait?timeout={PATIENCE}").status_code == 200
            cluster.start_host(int(cluster.url.rpartition(":")[2]))
            second.end(signal.SIGKILL)
            assert runner.next_event()["host"] == cluster.url
            assert cluster.connected("web")["status"] == "running"
        finally:
            second.process.kill()


@pytest.fixture(scope="module")
def hosts(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    """With a runner, which tells host `a`."""
    with two_hosts(tmp_path_factory.mktemp("hosts"), postgres.new_database()) as hosts:
        hosts.start_runner("n1", "--backend=process", "--user-processes")
        eventually(lambda: hosts.online("n1"))
        yield hosts


@pytest.fixture(scope="module")
def port(hosts: TwoHosts) -> int:
    """Where the task `web` echoes."""
    return hosts.echo_task("web")


def ended_after(connection: socket.socket, began: float) -> float:
    """How many seconds after a moment a connection has ended, however it does."""
    try:
        while connection.recv(65536):
            pass
    except ConnectionError:
        pass
    return time.monotonic() - began


def test_a_right_that_ends_at_one_host_ends_sessions_at_the_other_at_once(hosts: TwoHosts, port: int) -> None:
    """Whether it is a token, a share, a membership or a user."""
    task = "/api/tasks/web"
    admin = hosts.http["a"]
    took = []
    assert admin.post("/api/groups", json={"name": "lab", "members": []}).status_code == 201
    for number, how in enumerate(("token", "share", "group", "user", "token")):
        name = f"user{number}"
        token = hosts.new_user(name)
        if how == "group":
            assert admin.patch("/api/groups/lab", json={"add": [name]}).status_code == 200
        whom = {"group": "lab"} if how == "group" else {"user": name}
        assert admin.post(f"{task}/shares", json=whom).status_code == 201
        (own,) = admin.get(f"/api/tokens?user={name}").json()
        ends = {
            "token": ("DELETE", f"/api/tokens/{own['id']}", None),
            "share": ("DELETE", f"{task}/shares/{name}", None),
            "group": ("PATCH", "/api/groups/lab", {"remove": [name]}),
            "user": ("DELETE", f"/api/users/{name}", None),
        }
        with contextlib.ExitStack() as stack, ThreadPoolExecutor(3) as threads:
            opened = []
            for at in "ab":
                forward = stack.enter_context(hosts.forward("web", port, host=hosts.urls[at], token=token))
                opened.append(stack.enter_context(connect(forward.local_port)))
                assert echoes(opened[-1])
            began = time.monotonic()
            asked = threads.submit(admin.request, *ends[how][:2], json=ends[how][2])
            told, other = threads.map(ended_after, opened, [began, began])
            assert asked.result().is_success
            took.append((told, other))
    print("sessions at the host that was told, and at the other, ended after", took)
    assert statistics.median(other - told for told, other in took) < AT_ONCE, took


def test_the_sessions_of_a_user_are_counted_over_all_hosts_but_those_of_a_dead_one(hosts: TwoHosts, port: int) -> None:
    token = hosts.new_user("bob", sessions=2)
    assert hosts.http["a"].post("/api/tasks/web/shares", json={"user": "bob"}).status_code == 201
    with hosts.forward("web", port, host=hosts.urls["a"], token=token):
        with hosts.forward("web", port, host=hosts.urls["b"], token=token):
            for url in hosts.urls.values():
                with (
                    pytest.raises(UnavailableError, match="bob has 2 sessions open, and the limit 'sessions' is 2"),
                    hosts.forward("web", port, host=url, token=token),
                ):
                    pass
            own = hosts.client(hosts.urls["a"], token)
            # A session that was refused counts at the other host until that has written down that it is over.
            eventually(lambda: own.get("/api/auth").json()["limits"]["sessions"]["used"] == 2)

        def room() -> bool:
            try:
                with hosts.forward("web", port, host=hosts.urls["a"], token=token):
                    return True
            except UnavailableError:
                return False

        eventually(room)  # what has ended at the other host counts no more
        with hosts.forward("web", port, host=hosts.urls["b"], token=token):
            hosts.hosts["b"].stop(signal.SIGKILL)
            try:
                began = time.monotonic()
                eventually(room)
                assert time.monotonic() - began < 1
            finally:
                hosts.start_host("b")  # others go on with it


def test_what_a_host_hears_of_a_task_wakes_who_waits_at_the_other(hosts: TwoHosts) -> None:
    """The runner tells host `a`. Who waits at `b` would look again each second or so."""
    took = []
    for number in range(5):
        order = {"backend": "process", "name": f"late{number}", "command": ["sleep", "1000"]}
        assert hosts.http["a"].post("/api/tasks", json=order).status_code == 201
        waited = threading.Thread(target=hosts.http["b"].get, args=(f"/api/tasks/late{number}/wait?timeout=30",))
        waited.start()
        assert hosts.http["a"].get(f"/api/tasks/late{number}/wait?timeout=30").status_code == 200
        began = time.monotonic()
        waited.join()
        took.append(time.monotonic() - began)
    assert statistics.median(took) < AT_ONCE, took


def test_a_pass_of_one_host_opens_port_8002_of_the_other_once(hosts: TwoHosts, port: int) -> None:
    shown = hosts.http["a"].post("/api/tasks/web/ssh-pass").json()["pass"]
    answers = []
    for _ in range(2):
        host, _, ssh = hosts.ssh["b"].rpartition(":")
        with socket.create_connection((host, int(ssh)), timeout=PATIENCE) as connection:
            connection.sendall(f"REQUEST_TUNNEL web {shown}\n".encode())
            answers.append(connection.makefile().readline())
    assert "pass was used" not in answers[0]
    assert "This pass was used or has run out" in answers[1]


def test_the_jump_host_has_one_key_whichever_host_it_is_of(hosts: TwoHosts) -> None:
    keys = {(hosts.directory / f"host-{name}" / "ssh_host_ed25519_key").read_text() for name in "ab"}
    assert len(keys) == 1
    assert "PRIVATE KEY" in keys.pop()


def test_a_users_commands_go_by_the_next_host_when_one_is_gone(hosts: TwoHosts, port: int) -> None:
    """After one login for both."""
    alone = {"KOHAKURIVER_HOST": "", "KOHAKURIVER_TOKEN": ""}
    both = ",".join(hosts.urls.values())
    done = hosts.run("auth", "login", "--host", both, stdin=hosts.token, **alone)
    assert done.stdout == f"Logged in to {both} as admin (admin).\n", done.stderr
    hosts.hosts["a"].stop(signal.SIGKILL)
    try:
        for command in (["vps", "list"], ["auth", "status"], ["connect", "web", "--", "printf", "web"]):
            done = hosts.run(*command, **alone)
            assert done.returncode == 0, done.stderr
            assert "web" in done.stdout or both in done.stdout
        pipe = hosts.start("forward", "web", f"0:{port}", "--json", **alone)
        with connect(pipe.listening()) as connection:
            assert echoes(connection)
        assert pipe.stop() == 0
    finally:
        hosts.start_host("a")
    assert hosts.run("auth", "logout", "--host", both, **alone).stdout == f"Logged out of {both}.\n"


def test_one_host_cares_for_all_and_the_next_one_when_it_dies(hosts: TwoHosts, postgres: Postgres) -> None:
    def carer() -> int | None:
        held = postgres.ask(
            "SELECT l.pid FROM pg_locks l JOIN pg_database d ON l.database = d.oid WHERE l.locktype = 'advisory' AND "
            f"l.granted AND l.classid = {0x6B73} AND d.datname = '{hosts.database_name}'"
        )
        assert len(held) <= 1
        return held[0][0] if held else None

    before = eventually(carer)
    for name in "ab":
        hosts.restart_host(name, signal.SIGKILL)
    eventually(lambda: carer() not in (None, before))


def test_a_database_that_stands_still_holds_up_no_session_and_is_told_in_a_sentence(
    own_postgres: Postgres, tmp_path: Path
) -> None:
    """It answers nothing, as when its machine is gone: sooner or later everything that was asked would wait for it."""
    with two_hosts(tmp_path, own_postgres.url) as hosts:
        hosts.start_runner("n1", "--backend=process")
        eventually(lambda: hosts.online("n1"))
        port = hosts.echo_task("web")
        with hosts.forward("web", port, host=hosts.urls["b"]) as forward, connect(forward.local_port) as connection:
            assert echoes(connection)
            with own_postgres.standing_still():
                began = time.monotonic()
                with ThreadPoolExecutor(24) as many:  # more than a host has connections for
                    asked = [many.submit(hosts.http[name].get, "/api/tasks") for name in 12 * "ab"]
                answers = [each.result() for each in asked]
                assert {(each.status_code, each.json()["error"]) for each in answers} == {(503, "database_down")}
                assert time.monotonic() - began < PATIENCE / 2
                assert hosts.http["b"].get("/health/ready").status_code == 503
                assert hosts.http["b"].get("/health/live").status_code == 200
                assert echoes(connection)
            eventually(lambda: all(hosts.http[name].get("/health/ready").status_code == 200 for name in "ab"))
            eventually(lambda: hosts.online("n1"))
            assert echoes(connection)
        with hosts.forward("web", port, host=hosts.urls["a"]) as forward, connect(forward.local_port) as connection:
            assert echoes(connection)

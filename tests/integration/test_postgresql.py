"""A host on a real PostgreSQL server: what everybody sees while that is down."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from kohakuriver.store import Accounts, Browsers, DeviceCodes, Identities, Store
from tests.support import forked
from tests.support.processes import PATIENCE, Program, a_cluster, eventually

DOWN = "Error: The host's database is down; its administrator finds the reason in the host's log.\n"


class Postgres:
    """A server of PostgreSQL on a loopback port of its own. As root it is run by `nobody`: it refuses to be root's."""

    def __init__(self, directory: Path) -> None:
        if os.environ.get("CI") != "true":
            pytest.importorskip("psycopg")
        places = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda place: int(place.parent.name))
        if not places and os.environ.get("CI") != "true":
            pytest.skip("PostgreSQL is not installed: run scripts/system-packages test")
        self._programs = places[-1]
        self._as_owner = ["setpriv", "--reuid=nobody", "--clear-groups"] if os.geteuid() == 0 else []
        self._data = directory / "data"
        self._log = directory / "postgres.log"
        self._data.mkdir(mode=0o700)
        if self._as_owner:
            shutil.chown(directory, "nobody")
            shutil.chown(self._data, "nobody")
        self._run("initdb", "-A", "trust", "-U", "river", "-N", "-D", str(self._data))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def _run(self, program: str, *arguments: str) -> None:
        subprocess.run([*self._as_owner, self._programs / program, *arguments], check=True, capture_output=True)

    @property
    def url(self) -> str:
        return f"postgresql://river@127.0.0.1:{self.port}/postgres"

    def start(self) -> None:
        command = [*self._as_owner, str(self._programs / "postgres"), "-D", str(self._data), "-p", str(self.port)]
        options = ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=", "-c", "fsync=off"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen([*command, *options], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        eventually(self._is_ready)

    def _is_ready(self) -> bool:
        said = self._log.read_text()
        assert self._process is not None
        assert self._process.poll() is None, said
        return "database system is ready to accept connections" in said

    def end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            self._log.write_text("")
            with process:
                process.send_signal(signal.SIGINT)  # a fast shutdown: no client is waited for
                process.wait(PATIENCE)


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    with tempfile.TemporaryDirectory() as directory:  # pytest's own are root's alone, and made so again by each start
        server = Postgres(Path(directory))
        yield server
        server.end()


def asking(url: str, **headers: str) -> httpx.Client:
    return httpx.Client(base_url=url, headers=headers, trust_env=False, timeout=PATIENCE)


def test_a_host_without_its_database_lives_is_not_ready_and_tells_users_a_sentence_with_7(
    postgres: Postgres, tmp_path: Path
) -> None:
    with a_cluster(tmp_path, "--database", postgres.url) as cluster, asking(cluster.url) as plain:
        cluster.start_runner("n1", "--backend", "process")
        environment = {**os.environ, "KOHAKURIVER_HOST": cluster.url, "KOHAKURIVER_TOKEN": cluster.token}

        def listed() -> tuple[int, str]:
            done = forked.run(["vps", "list"], env=environment, stdin="", timeout=PATIENCE)
            return done.returncode, done.stderr

        assert listed()[0] == 0
        assert plain.get("/ready").status_code == 200
        postgres.end()
        assert listed() == (7, DOWN)
        assert plain.get("/health").json()["status"] == "ok"
        answer = plain.get("/ready")
        assert (answer.status_code, answer.json()["error"]) == (503, "database_down")
        assert DOWN.removeprefix("Error: ").strip() == answer.json()["message"]
        log = cluster.host.log.read_text()
        assert "the database is down" in log
        assert str(postgres.port) in log, "the driver's own words are in the log"
        postgres.start()
        eventually(lambda: listed()[0] == 0)
        eventually(lambda: (cluster.node("n1") or {})["status"] == "online")
        assert plain.get("/ready").status_code == 200


def test_first_logins_at_once_make_one_user_of_a_subject_and_of_a_name_as_many_as_there_are(
    postgres: Postgres, run: Callable[[Coroutine[Any, Any, None]], None]
) -> None:
    async def check() -> None:
        stores = [await Store.open(postgres.url) for _ in range(2)]
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
        stores = [await Store.open(postgres.url) for _ in range(2)]
        accounts = [Accounts(store) for store in stores]
        hosts = [DeviceCodes(store, each) for store, each in zip(stores, accounts, strict=True)]
        try:
            await accounts[0].add_user("ann", "user")
            token = await accounts[0].add_token("kr_x", kind="user", name="ann", label="x")
            browser = await Browsers(stores[0]).add("krb_x", token.digest)
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
    with a_cluster(tmp_path, "--database", postgres.url) as cluster:
        state = tmp_path / "second"
        place = ("--bind", "127.0.0.1", "--port", "0", "--ssh-port", "0")
        second = Program(tmp_path / "second.log", "host", "--state-dir", str(state), *place, "--database", postgres.url)
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

from __future__ import annotations

import asyncio
import os
import sqlite3
import sys
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, select
from sqlalchemy.exc import DataError, OperationalError
from sqlalchemy.orm import Session

from kohakuriver.errors import HostUnreachableError, KohakuRiverError, NotFoundError, UnauthenticatedError, UsageError
from kohakuriver.store import Accounts, Browsers, Node, Store, Task, sqlite_url
from kohakuriver.store.database import find_task
from kohakuriver.store.links import Links
from kohakuriver.store.models import TaskKey
from tests.support.databases import database_url

Run = Callable[[Coroutine[Any, Any, None]], None]


def a_task(task_id: int, name: str | None, **changes: Any) -> Task:
    values: dict[str, Any] = {
        "task_id": task_id,
        "name": name,
        "node": "n1",
        "backend": "process",
        "container": f"kohakuriver-task-{task_id}",
        "owner": "ann",
        "status": "running",
        "created_at": float(task_id),
        "changed_at": 0.0,
    }
    return Task(**(values | changes))


@asynccontextmanager
async def a_store(directory: Path) -> AsyncIterator[Store]:
    store = await Store.open(database_url(directory))
    try:
        yield store
    finally:
        await store.close()


async def add_node(store: Store, name: str = "n1", key: bytes = b"key") -> None:
    await store.put_node(name, {"url": "http://n:1", "last_seen": 1.0}, key)


def test_a_task_is_found_by_its_number_and_by_its_name(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_store(tmp_path) as store:
            await add_node(store)
            await store.add_task(a_task(1234567890, "web"))
            assert (await store.task_and_node("1234567890"))[0].name == "web"
            assert (await store.task_and_node("web"))[0].task_id == 1234567890

    run(check())


@pytest.mark.parametrize("reference", ["nobody", "17", "9" * 40, "", "١٢"])
def test_a_task_that_is_not_there_is_said_to_be_not_there(run: Run, tmp_path: Path, reference: str) -> None:
    async def check() -> None:
        async with a_store(tmp_path) as store:
            with pytest.raises(NotFoundError, match="vps list"):
                await store.task_and_node(reference)

    run(check())


def test_a_name_is_given_once_until_its_task_is_removed(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_store(tmp_path) as store:
            await add_node(store)
            await store.add_task(a_task(1, "web"))
            with pytest.raises(KohakuRiverError, match="'web'") as caught:
                await store.add_task(a_task(2, "web"))
            assert (caught.value.status, caught.value.code) == (409, "name_taken")
            await store.remove_task(1)
            await store.add_task(a_task(3, "web"))
            assert [task.task_id for task, _ in await store.tasks_and_nodes()] == [3]

    run(check())


def test_a_public_key_is_found_in_the_tasks_that_have_it_and_no_part_of_it_is(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_store(tmp_path) as store:
            await add_node(store)
            await store.add_task(a_task(1, "none"))
            await store.add_task(a_task(2, "two", ssh_keys=["ssh-rsa BBBB", "ssh-ed25519  AA+a/AA== me@home"]))
            for key in ("ssh-ed25519 AA+a/AA==", "ssh-rsa BBBB"):
                assert await store.lets_in(key)
            for key in ("ssh-ed25519 AA", "ssh-ed25519 aa+A/aa==", "ssh-ed25519 BBBB", "ssh-rsa %", "ssh-rsa ", ""):
                assert not await store.lets_in(key)
            await store.remove_task(2)
            assert not await store.lets_in("ssh-rsa BBBB")

    run(check())


@pytest.mark.sqlite_only
def test_a_strangers_key_costs_one_look_up_by_an_index_however_many_tasks_there_are(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_store(tmp_path) as store:
            await add_node(store)
            for number in range(50):
                await store.add_task(
                    a_task(number, f"t{number}", ssh_keys=[f"ssh-rsa K{number}", "ssh-rsa EVERYWHERE"])
                )
            asked: list[str] = []
            event.listen(store._database.engine, "before_cursor_execute", lambda *call: asked.append(call[2]))
            for key, known in (("ssh-rsa K17", True), ("ssh-rsa EVERYWHERE", True), ("ssh-rsa K", False)):
                asked.clear()
                assert await store.lets_in(key) is known
                (query,) = [text for text in asked if text.startswith("SELECT")]
            plan = await store.read(
                lambda session: session.connection().exec_driver_sql(f"EXPLAIN QUERY PLAN {query}", ("d", 1, 0)).all()
            )
            assert all("SEARCH" in row[3] for row in plan), plan
            assert not any("SCAN" in row[3] for row in plan), plan

    run(check())


def test_a_thousand_requests_with_one_token_at_once_are_two_questions(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_store(tmp_path) as store:
            accounts = Accounts(store)
            await accounts.add_user("ann", "user")
            await accounts.add_token("secret", kind="user", name="ann", label="one")
            asked: list[str] = []
            event.listen(store._database.engine, "before_cursor_execute", lambda *call: asked.append(call[2]))
            found = await asyncio.gather(*(accounts.token("secret") for _ in range(1000)), accounts.token("other"))
            assert {user.name if user else None for _, user in found[:-1]} == {"ann"}
            assert found[-1] == (None, None)
            assert sum("FROM tokens" in text for text in asked) <= 3

    run(check())


def test_a_token_that_was_just_revoked_is_known_to_be_while_others_still_ask_about_it(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_store(tmp_path) as store:
            accounts = Accounts(store)
            await accounts.add_user("ann", "user")
            await accounts.add_token("secret", kind="user", name="ann", label="one")
            before = asyncio.ensure_future(accounts.token("secret"))
            await asyncio.sleep(0)  # its question is with the database
            revoking = asyncio.ensure_future(accounts.revoke_token("one", "ann"))
            await revoking
            token, _ = await accounts.token("secret")
            assert token is not None
            assert token.revoked_at is not None
            await before

    run(check())


def test_a_users_keys_open_nothing_once_the_user_or_the_task_is_gone(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_store(tmp_path) as store:
            await add_node(store)
            accounts = Accounts(store)
            for name in ("admin", "ann"):
                await accounts.add_user(name, "admin")
            await store.add_task(a_task(1, "one", owner="ann", ssh_keys=["ssh-rsa ANN"]))
            await store.add_task(a_task(2, "two", ssh_keys=["ssh-rsa BOB"]))
            await accounts.remove_user("ann", "admin")
            assert not await store.lets_in("ssh-rsa ANN")
            await store.forget_tasks([2])
            assert not await store.lets_in("ssh-rsa BOB")
            assert await store.read(lambda session: list(session.scalars(select(TaskKey)))) == []

    run(check())


def test_tasks_and_nodes_outlive_the_host(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_store(tmp_path) as store:
            await add_node(store)
            await store.add_task(a_task(1, "web"))
        async with a_store(tmp_path) as store:
            task, node = await store.task_and_node("web")
            assert (task.container, node.ticket_key) == ("kohakuriver-task-1", b"key")

    run(check())


def test_a_node_that_registers_again_keeps_its_ticket_key(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_store(tmp_path) as store:
            await add_node(store, key=b"first")
            again = await store.put_node("n1", {"url": "http://elsewhere:2", "last_seen": 2.0}, b"second")
            assert (again.url, again.ticket_key) == ("http://elsewhere:2", b"first")

    run(check())


def test_an_older_report_never_undoes_a_newer_one(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_store(tmp_path) as store:
            await add_node(store)
            await store.add_task(a_task(1, "web"))
            await store.change_task(1, {"status": "stopped", "revision": 5})
            late = await store.change_task(1, {"status": "running", "revision": 4})
            assert late is not None
            assert (late.status, late.revision) == ("stopped", 5)
            newer = await store.change_task(1, {"status": "running", "revision": 6})
            assert newer is not None
            assert newer.status == "running"

    run(check())


@pytest.mark.sqlite_only
def test_a_token_is_kept_as_its_digest_alone(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_store(tmp_path) as store:
            accounts = Accounts(store)
            await accounts.add_user("ann", "user")
            await accounts.add_token("very-secret", kind="user", name="ann", label="laptop")
            found, _ = await accounts.token("very-secret")
            assert found is not None
            assert (found.kind, found.name) == ("user", "ann")
            assert (await accounts.token("very-secre"))[0] is None
        assert all(b"very-secret" not in file.read_bytes() for file in tmp_path.iterdir())

    run(check())


def test_a_credential_that_has_ended_since_it_was_shown_makes_no_token(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_store(tmp_path) as store:
            accounts = Accounts(store)
            await accounts.add_user("ann", "user")
            shown = await accounts.add_token("s", kind="user", name="ann", label="laptop")
            browser, _ = await Browsers(store).add("krb_x", shown.digest)
            await accounts.add_token("t", kind="user", name="ann", label="second", maker=browser)
            await accounts.revoke_token("laptop", "ann")
            for number, maker in enumerate((shown, browser)):
                with pytest.raises(UnauthenticatedError):
                    await accounts.add_token(f"u{number}", kind="user", name="ann", label=f"u{number}", maker=maker)
            assert not {"u0", "u1"} & {token.label for token in await accounts.tokens("ann")}

    run(check())


def test_a_link_goes_with_its_task(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_store(tmp_path) as store:
            accounts, links = Accounts(store), Links(store)
            await accounts.add_user("ann", "user")
            shown = await accounts.add_token("s", kind="user", name="ann", label="laptop")
            await add_node(store)
            await store.add_task(a_task(1, "web"))
            await links.add("krl_x", 1, 8888, shown, None)
            await store.remove_task(1)
            assert [token.kind for token in await accounts.tokens("ann")] == ["user"]

    run(check())


def test_another_runner_under_a_nodes_name_never_learns_what_opens_the_first(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_store(tmp_path) as store:
            values = {"url": "http://n:1", "last_seen": 1.0}
            await store.put_node("n1", {**values, "instance": "one"}, b"first")
            other = await store.put_node("n1", {**values, "instance": "other"}, b"second")
            assert other.ticket_key == b"second"

    run(check())


def test_the_load_of_a_node_is_what_it_starts_or_runs(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_store(tmp_path) as store:
            await add_node(store)
            await add_node(store, "n2")
            for number, status in enumerate(("running", "starting", "stopped", "failed", "lost")):
                await store.add_task(a_task(number + 1, f"t{number}", status=status))
            await store.remove_task(1)
            assert await store.active_tasks_by_node() == {"n1": 1}

    run(check())


def test_database_work_leaves_the_event_loop_free(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_store(tmp_path) as store:
            loop_went_on = threading.Event()
            slow = asyncio.ensure_future(store.read(lambda _session: loop_went_on.wait(30)))
            asyncio.get_running_loop().call_later(0.01, loop_went_on.set)
            assert await slow

    run(check())


@pytest.mark.sqlite_only
def test_what_is_read_together_is_from_one_moment_whoever_writes_meanwhile(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_store(tmp_path) as store:
            await add_node(store)
            await store.add_task(a_task(1, "web"))

            def look_twice(session: Session) -> tuple[str | None, str]:
                name = find_task(session, "1")
                with closing(sqlite3.connect(tmp_path / "host.db")) as other, other:
                    other.execute("UPDATE nodes SET url = 'http://elsewhere:1'")
                node = session.get(Node, "n1")
                assert name is not None
                assert node is not None
                return name.name, node.url

            assert await store.read(look_twice) == ("web", "http://n:1")
            assert [node.url for node in await store.nodes()] == ["http://elsewhere:1"]

    run(check())


@pytest.mark.sqlite_only
def test_nobody_writes_between_the_look_at_a_row_and_the_change_of_it(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_store(tmp_path) as store:
            await add_node(store)

            def look_and_change(session: Session) -> None:
                node = session.get(Node, "n1")
                assert node is not None
                with (
                    closing(sqlite3.connect(tmp_path / "host.db", timeout=0)) as other,
                    pytest.raises(sqlite3.OperationalError, match="locked"),
                ):
                    other.execute("UPDATE nodes SET url = 'http://elsewhere:1'")
                node.url += "2"

            await store.write(look_and_change)
            assert [node.url for node in await store.nodes()] == ["http://n:12"]

    run(check())


@pytest.mark.sqlite_only
@pytest.mark.parametrize("before", ["nothing", "a database that others can read"])
def test_nobody_else_can_read_the_file_whatever_the_umask_is(run: Run, tmp_path: Path, before: str) -> None:
    async def check() -> None:
        if before != "nothing":
            async with a_store(tmp_path) as store:
                await add_node(store)
            (tmp_path / "host.db").chmod(0o644)
        async with a_store(tmp_path) as store:
            await add_node(store)
            files = sorted(tmp_path.glob("host.db*"))
            assert [file.name for file in files] == ["host.db", "host.db-shm", "host.db-wal"]
            assert {file.stat().st_mode & 0o777 for file in files} == {0o600}

    umask = os.umask(0)
    try:
        run(check())
    finally:
        os.umask(umask)


@pytest.mark.sqlite_only
def test_the_file_is_in_wal_mode_so_that_readers_never_wait_for_a_writer(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_store(tmp_path):
            connection = sqlite3.connect(tmp_path / "host.db")
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            connection.close()

    run(check())


@pytest.mark.sqlite_only
@pytest.mark.parametrize("url", ["nonsense", "nosuchdatabase://ann:hunter2@db/kr"])
def test_a_database_that_can_not_be_used_is_refused_without_showing_its_password(run: Run, url: str) -> None:
    async def check() -> None:
        with pytest.raises(UsageError) as caught:
            await Store.open(url)
        assert "hunter2" not in caught.value.message

    run(check())


@pytest.mark.sqlite_only
def test_a_file_that_is_no_database_fails_in_a_sentence(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        (tmp_path / "host.db").write_text("this is a letter to my aunt, and longer than a page header\n" * 40)
        with pytest.raises(KohakuRiverError, match="not a database"):
            await Store.open(sqlite_url(tmp_path / "host.db"))

    run(check())


def test_what_the_database_cannot_hold_is_the_callers_mistake(run: Run, tmp_path: Path) -> None:
    def refuse(_session: Session) -> None:
        raise DataError("SELECT", {}, Exception("text fields cannot contain NUL (0x00) bytes"))

    async def main() -> None:
        async with a_store(tmp_path) as store:
            with pytest.raises(UsageError, match=r"can't hold what was given: text fields cannot contain NUL"):
                await store.read(refuse)

    run(main())


@pytest.mark.sqlite_only
@pytest.mark.parametrize(
    "url", ["sqlite+aiosqlite:///x", "mysql://ann@db/kr", "postgresql+asyncpg://db/kr", "/var/lib/x.db", ""]
)
def test_a_database_that_is_neither_sqlite_nor_postgresql_is_refused_in_a_sentence(run: Run, url: str) -> None:
    async def check() -> None:
        with pytest.raises(UsageError, match="must be sqlite:///FILE or postgresql://"):
            await Store.open(url)

    run(check())


@pytest.mark.sqlite_only
def test_who_lacks_the_driver_of_postgresql_is_told_what_to_install(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    monkeypatch.delitem(sys.modules, "kohakuriver.store.postgresql", raising=False)

    async def check() -> None:
        with pytest.raises(UsageError, match=r"Python package 'psycopg'; `pip install 'kohakuriver\[postgresql\]'`"):
            await Store.open("postgresql://ann:hunter2@db/kr")

    run(check())


@pytest.mark.sqlite_only
def test_a_database_that_is_down_is_told_without_the_drivers_words(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_session: Session) -> None:
        raise OperationalError("SELECT", {}, Exception('connection to server at "10.0.0.7", port 5432 failed'))

    async def main() -> None:
        async with a_store(tmp_path) as store:
            monkeypatch.setattr(store._database.engine.dialect, "name", "postgresql")
            with pytest.raises(HostUnreachableError, match="database is down") as caught:
                await store.read(refuse)
            assert "10.0.0.7" not in caught.value.message
            assert (caught.value.exit_code, caught.value.status) == (7, 503)

    run(main())

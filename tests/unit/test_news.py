"""What hosts on one database tell each other, and how many sessions they count, on a real PostgreSQL."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from kohakuriver.errors import HostUnreachableError, KohakuRiverError
from kohakuriver.store import Accounts, Browsers, Passes, SessionCounts, Store, forget_what_has_run_out, kept
from kohakuriver.store.models import LoginCode, SessionCount, SshPass
from kohakuriver.store.news import EVERYTHING, LONGEST, News, note
from kohakuriver.store.passes import PASS_SECONDS
from kohakuriver.store.postgresql import CONNECTIONS
from tests.support.postgres import Postgres

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.mark.parametrize(
    "news", [News(), News(rights=True), News(tasks=frozenset({1, 10**12})), News(nodes=frozenset({"n1"})), EVERYTHING]
)
def test_news_arrive_as_they_were_told(news: News) -> None:
    assert News.unpacked(news.packed(7)) == (7, news)


def test_more_news_than_postgresql_takes_are_everything() -> None:
    many = News(tasks=frozenset(range(10**9, 10**9 + 1000)))
    assert len(many.packed(7)) <= LONGEST
    assert News.unpacked(many.packed(7)) == (7, EVERYTHING)


@pytest.mark.parametrize("said", ["", "[]", "{}", "[1]", '["x", 0, 0, 0, 0]', "[1, true, 5, [], false]"])
def test_what_a_host_of_another_version_tells_is_taken_for_everything(said: str) -> None:
    assert News.unpacked(said) == (0, EVERYTHING)


class Listening:
    """A host's store, and what it has heard."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.heard: asyncio.Queue[News] = asyncio.Queue()
        assert store.server is not None
        self.line = store.server.line
        self._task = asyncio.ensure_future(self.line.run(self.heard.put_nowait))

    async def end(self) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        await self.store.close()


@contextlib.asynccontextmanager
async def hosts(url: str) -> AsyncIterator[tuple[Listening, Listening]]:
    """Two that hear each other."""
    a, b = [Listening(await Store.open(url)) for _ in range(2)]
    try:
        for each in (a, b):
            assert await asyncio.wait_for(each.heard.get(), 30) == EVERYTHING
        yield a, b
    finally:
        await a.end()
        await b.end()


def test_what_a_transaction_changes_the_other_host_hears_once_it_is_committed(run: Run, postgres: Postgres) -> None:
    def change(session: Session) -> None:
        note(session, tasks=[1])
        note(session, rights=True, nodes=["n1"])

    def fail(session: Session) -> None:
        note(session, tasks=[2])
        raise KohakuRiverError("No.")

    async def main() -> None:
        async with hosts(postgres.new_database()) as (a, b):
            with pytest.raises(KohakuRiverError):
                await a.store.write(fail)
            await a.store.write(change)
            heard = await asyncio.wait_for(b.heard.get(), 30)
            assert heard == News(rights=True, tasks=frozenset({1}), nodes=frozenset({"n1"}))
            await b.store.write(lambda session: note(session, tasks=[3]))
            assert await asyncio.wait_for(a.heard.get(), 30) == News(tasks=frozenset({3})), "not what it told itself"

    run(main())


def test_a_host_whose_line_was_cut_looks_at_everything_when_it_has_another(run: Run, postgres: Postgres) -> None:
    async def main() -> None:
        database = postgres.new_database()
        async with hosts(database) as (a, b):
            name = database.rpartition("/")[2]
            ended = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
            await asyncio.to_thread(postgres.ask, ended)
            assert await asyncio.wait_for(b.heard.get(), 30) == EVERYTHING
            assert await asyncio.wait_for(a.heard.get(), 30) == EVERYTHING
            assert await a.store.nodes() == [], "and so are connections made anew that users' questions need"

    run(main())


def test_one_host_leads_and_the_other_when_it_goes(run: Run, postgres: Postgres) -> None:
    async def main() -> None:
        async with hosts(postgres.new_database()) as (a, b):

            async def until(lead: Callable[[], bool]) -> None:
                deadline = time.monotonic() + 30
                while not lead():
                    assert time.monotonic() < deadline
                    await asyncio.sleep(0.01)

            await until(lambda: a.line.leads or b.line.leads)
            first, second = (a, b) if a.line.leads else (b, a)
            assert not second.line.leads
            first._task.cancel()
            await until(lambda: second.line.leads)
            assert not first.line.leads

    run(main())


def test_of_two_hosts_that_let_somebody_in_at_a_time_one_sees_the_other(run: Run, postgres: Postgres) -> None:
    async def main() -> None:
        async with hosts(postgres.new_database()) as (a, b):
            counts = [SessionCounts(each.store) for each in (a, b)]
            for _ in range(20):
                for each in counts:
                    each.add("ann", 1)
                seen = await asyncio.gather(*(each.enter("ann") for each in counts))
                assert max(seen) == 1, seen
                for each in counts:
                    each.add("ann", -1)
                    await each.enter("ann")

    run(main())


def test_sessions_of_a_host_that_is_gone_count_no_more_and_are_forgotten(run: Run, postgres: Postgres) -> None:
    async def main() -> None:
        async with hosts(postgres.new_database()) as (a, b):
            counts = [SessionCounts(each.store) for each in (a, b)]
            counts[1].add("ann", 1)
            await counts[1].enter("ann")
            assert await counts[0].elsewhere("ann") == 1
            await counts[0].forget_the_dead()
            assert await counts[0].elsewhere("ann") == 1
            await b.end()
            while await counts[0].elsewhere("ann"):  # the server has yet to see that the connection ended
                pass
            await counts[0].forget_the_dead()
            rows = await a.store.read(lambda session: session.query(SessionCount).count())
            assert rows == 0

    run(main())


def test_a_heartbeat_does_not_wait_behind_what_users_ask(run: Run, postgres: Postgres) -> None:
    from kohakuriver.store import ahead_of_users

    async def main() -> None:
        store = await Store.open(postgres.new_database())
        slow = [
            asyncio.ensure_future(store.read(lambda session: session.execute(text("SELECT pg_sleep(1)"))))
            for _ in range(CONNECTIONS + 2)
        ]
        await asyncio.sleep(0.1)
        end = ahead_of_users()
        await asyncio.wait_for(store.node("n1"), 30)
        end()
        assert not any(each.done() for each in slow)
        await asyncio.gather(*slow)
        await store.close()

    run(main())


def test_a_question_that_is_not_answered_in_time_is_given_up_and_its_connection_with_it(
    run: Run, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kohakuriver.store.postgresql.ANSWER_SECONDS", 0.3)

    async def main() -> None:
        store = await Store.open(postgres.new_database())
        for _ in range(2):
            asked = [
                asyncio.ensure_future(store.write(lambda session: session.execute(text("SELECT pg_sleep(60)"))))
                for _ in range(CONNECTIONS + 3)
            ]
            for each in asked:
                with pytest.raises(HostUnreachableError, match="database is down"):
                    await asyncio.wait_for(each, 30)
        monkeypatch.setattr("kohakuriver.store.postgresql.ANSWER_SECONDS", 5)
        assert await store.nodes() == []
        await store.close()

    run(main())


def test_a_commit_that_nobody_knows_the_end_of_is_not_done_again(
    run: Run, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        store = await Store.open(postgres.new_database())
        tried = 0

        def work(session: Session) -> None:
            nonlocal tried
            tried += 1
            session.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

        with pytest.raises(HostUnreachableError):
            await store.write(work)
        assert tried == 2, "before the commit it is done again, once"

        async def lost(session: Any) -> None:
            raise DBAPIError("COMMIT", {}, Exception("gone"), connection_invalidated=False)

        tried = 0
        monkeypatch.setattr("kohakuriver.store.postgresql._commit", lost)

        def add(session: Session) -> None:
            nonlocal tried
            tried += 1

        with pytest.raises(KohakuRiverError):
            await store.write(add)
        assert tried == 1
        await store.close()

    run(main())


def test_a_user_is_given_no_more_tokens_than_they_may_have_by_several_hosts_at_a_time(
    run: Run, postgres: Postgres
) -> None:
    async def main() -> None:
        async with hosts(postgres.new_database()) as both:
            accounts = [Accounts(each.store) for each in both]
            await accounts[0].add_user("ann", "user", {"tokens": 3})
            made = await asyncio.gather(
                *(
                    each.add_token(f"s{number}{of}", kind="user", name="ann", label=f"{number}{of}")
                    for number in range(10)
                    for of, each in enumerate(accounts)
                ),
                return_exceptions=True,
            )
            assert sum(not isinstance(each, BaseException) for each in made) == 3

    run(main())


def test_what_has_run_out_is_forgotten_and_what_is_good_is_not(run: Run, postgres: Postgres) -> None:
    async def main() -> None:
        async with hosts(postgres.new_database()) as (a, _):
            accounts, browsers, passes = Accounts(a.store), Browsers(a.store), Passes(a.store)
            await accounts.add_user("ann", "user")
            token = await accounts.add_token("s", kind="user", name="ann", label="one")
            await browsers.add_code("code", token.digest)
            await passes.issue("ann", token.digest, 1)

            def left(session: Session) -> tuple[int, int]:
                return session.query(LoginCode).count(), session.query(SshPass).count()

            await forget_what_has_run_out(a.store, time.time())
            assert await a.store.read(left) == (1, 1)
            await forget_what_has_run_out(a.store, time.time() + PASS_SECONDS)
            assert await a.store.read(left) == (1, 0)
            await forget_what_has_run_out(a.store, time.time() + 3600)
            assert await a.store.read(left) == (0, 0)

    run(main())


def test_hosts_that_start_at_a_time_agree_on_what_they_share(run: Run, postgres: Postgres) -> None:
    async def main() -> None:
        async with hosts(postgres.new_database()) as (a, b):
            said = await asyncio.gather(*(kept(each.store, "key", str(n)) for n, each in enumerate([a, b] * 5)))
            assert len(set(said)) == 1
            assert await kept(b.store, "key", "later") == said[0]

    run(main())

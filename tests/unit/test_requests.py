"""How much one user and one stranger may ask of a host, and that nobody else feels it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest

from kohakuriver.errors import UnauthenticatedError, UnavailableError
from kohakuriver.host.schemas import LONGEST_REQUEST
from kohakuriver.host.services.credentials import ANONYMOUS, Caller
from kohakuriver.host.services.failures import LONGEST_WAIT, Failures
from kohakuriver.host.services.requests import AT_ONCE as BEGUN_AT_ONCE
from kohakuriver.host.services.requests import BURST_SECONDS, Requests
from kohakuriver.limits import Limits
from kohakuriver.web.request_limits import SHARES
from tests.support.hops import until
from tests.support.host_only import HostUnderTest, a_host
from tests.unit.test_routes import Tickets, a_runner

PER_SECOND = Limits().max_failures
AT_ONCE = 4 * PER_SECOND
MIB = 1 << 20
Run = Callable[[Coroutine[Any, Any, None]], None]


async def statuses(client: httpx.AsyncClient, count: int, path: str = "/api/tasks") -> list[int]:
    """Of so many requests at once."""
    return [answer.status_code for answer in await asyncio.gather(*(client.get(path) for _ in range(count)))]


def test_a_request_wakes_no_thread_but_the_databases(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            await host.runner()
            ann, _ = await host.person("ann")
            before = set(threading.enumerate())
            assert await statuses(ann, 20) == [200] * 20
            begun = {thread.name for thread in set(threading.enumerate()) - before}
            assert not [name for name in begun if not name.startswith(("store", "audit"))]

    run(check())


def test_a_flood_of_one_users_requests_leaves_all_others_their_turns(run: Run) -> None:
    async def check() -> None:
        requests, rounds = Requests(), 0
        done: list[str] = []

        async def ask(who: str) -> None:
            await requests.turn(who)
            done.append(who)

        def count() -> None:
            nonlocal rounds
            rounds += 1
            loop.call_soon(count)

        loop = asyncio.get_running_loop()
        flood = [asyncio.ensure_future(ask("eve")) for _ in range(1000)]
        await asyncio.sleep(0)
        flood[500].cancel()  # a peer that goes meanwhile costs no turn
        loop.call_soon(count)
        await ask("ann")
        assert len(done) <= 1 + 4 * BEGUN_AT_ONCE
        begun = rounds
        await asyncio.gather(*flood, return_exceptions=True)
        assert len(done) == 1000
        assert (
            rounds - begun >= (1000 - 5 * BEGUN_AT_ONCE) / BEGUN_AT_ONCE
        )  # what else the loop had to do came in between
        done.clear()
        await ask("eve")  # at once, where nobody waits
        assert done == ["eve"]

    run(check())


def test_a_user_who_asks_too_often_is_refused_and_nobody_else_nor_a_heartbeat(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path, limits=Limits(max_requests=3)) as host:
            runner = await host.runner()
            ann, _ = await host.person("ann")
            bob, _ = await host.person("bob")
            beats = asyncio.gather(*(runner.beat() for _ in range(30)))
            found = await statuses(ann, 40)
            answers = await beats
            assert found.count(200) >= 3 * BURST_SECONDS
            assert found.count(429) >= 15
            assert {answer.status_code for answer in answers} == {200}
            assert (await bob.get("/api/tasks")).status_code == 200
            refused = await first_refused(ann)
            assert (refused.json()["error"], refused.headers["retry-after"]) == ("too_many_requests", "1")
            await host.audit.written()
            assert '"event": "limit_met"' in (tmp_path / "audit.jsonl").read_text()

    run(check())


@pytest.mark.parametrize("who", ["a node", "another user"])
def test_nobody_is_held_up_by_however_many_requests_of_one_user_that_came_before(
    run: Run, tmp_path: Path, who: str
) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host, contextlib.AsyncExitStack() as stack:
            await host.runner()
            _, eve = await host.person("eve")
            _, bob = await host.person("bob")
            port, order = int(host.url.rpartition(":")[2]), list[str]()

            async def connected() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                stack.callback(writer.close)
                writer.write(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
                await reader.readuntil(b"}")
                return reader, writer

            async def answered(who: str, reader: asyncio.StreamReader) -> None:
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200 ")
                order.append(who)

            peers = [await connected() for _ in range(301)]
            beats = host.node.headers["authorization"].removeprefix("Bearer ")
            last = {
                "a node": ("POST /api/nodes/n1/heartbeat", b"{}", beats),
                "another user": ("GET /api/auth", b"", bob),
            }[who]
            for number, (_, writer) in enumerate(peers):
                what, body, token = last if number == 300 else ("GET /api/auth", b"", eve)
                head = f"{what} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                writer.write(
                    f"{head}Authorization: Bearer {token}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
                )
            names = ["eve"] * 300 + [who]
            await asyncio.gather(*(answered(name, peer[0]) for name, peer in zip(names, peers, strict=True)))
            assert order.index(who) < 20  # of 300

    run(check())


async def first_refused(client: httpx.AsyncClient) -> httpx.Response:
    while (answer := await client.get("/api/tasks")).status_code != 429:
        pass
    return answer


def test_a_user_has_so_many_requests_under_way_and_may_ask_again_when_one_has_ended(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path, limits=Limits(max_requests=0, max_under_way=3)) as host:
            runner = await host.runner()
            ann, _ = await host.person("ann")
            bob, _ = await host.person("bob")
            await ann.post("/api/tasks", json={"name": "web", "backend": "process"})
            runner.held.clear()
            stops = [asyncio.ensure_future(ann.post("/api/tasks/web/stop")) for _ in range(3)]
            await until(lambda: len(runner.asked) == 4)
            answer = await ann.get("/api/tasks")
            assert (answer.status_code, answer.json()["error"]) == (429, "too_many_requests")
            assert (await bob.get("/api/tasks")).status_code == 200
            runner.held.set()
            await asyncio.gather(*stops)
            assert (await ann.get("/api/tasks")).status_code == 200

    run(check())


async def half_a_request(stack: contextlib.AsyncExitStack, url: str, secret: str, size: int) -> asyncio.StreamReader:
    """A connection with a request of so many bytes, of which the last byte never comes: where its answer would."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    stack.callback(writer.close)  # which also keeps it from being collected
    head = f"POST /api/tasks HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {secret}\r\n"
    writer.write(f"{head}Content-Type: application/json\r\nContent-Length: {size}\r\n\r\n".encode() + b" " * (size - 1))
    return reader


async def asks_for_more_than_a_share(
    stack: contextlib.AsyncExitStack, url: str, secret: Callable[[], str], size: int = MIB
) -> None:
    """Begin more requests of one user than that user's share has bytes for; back when so many are refused."""
    share = Limits().max_bodies // SHARES // size
    asked = [await half_a_request(stack, url, secret(), size) for _ in range(share + 8)]
    answers = {asyncio.ensure_future(reader.readuntil(b"}")) for reader in asked}
    while len(answers) > share:
        done, answers = await asyncio.wait(answers, return_when=asyncio.FIRST_COMPLETED)
        for each in done:
            assert each.result().startswith(b"HTTP/1.1 429 ")
            assert b"as many bytes as one user's may" in each.result()
    for waiting in answers:
        waiting.cancel()


def test_the_bodies_of_one_users_requests_have_a_share_and_those_of_others_get_in(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host, contextlib.AsyncExitStack() as stack:
            _, eve = await host.person("eve")
            bob, _ = await host.person("bob")
            await asks_for_more_than_a_share(stack, host.url, lambda: eve, LONGEST_REQUEST)
            answer = await bob.post("/api/tokens", json={"name": "x", "more": "x" * 200_000})
            assert (answer.status_code, answer.json()["error"]) == (400, "bad_request")  # it was read

    run(check())


def test_at_a_runner_the_bodies_of_one_users_tasks_have_a_share_too(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_runner(tmp_path) as (runner, client), contextlib.AsyncExitStack() as stack:
            tickets = Tickets(runner.KEY, "n1")
            await asks_for_more_than_a_share(
                stack, f"{client.base_url}".rstrip("/"), lambda: tickets.issue("control", "c1", user="eve")
            )
            shown = {"Authorization": f"Bearer {tickets.issue('control', 'c1', user='bob')}"}
            answer = await client.post("/api/tasks", json={"more": "x" * 900_000}, headers=shown)
            assert (answer.status_code, answer.json()["error"]) == (400, "bad_request")

    run(check())


@pytest.mark.parametrize(
    ("length", "status"), [(f"Content-Length: {LONGEST_REQUEST + 1}", 413), ("Transfer-Encoding: chunked", 411)]
)
def test_no_body_is_read_that_is_longer_than_a_user_needs(run: Run, tmp_path: Path, length: str, status: int) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            _, eve = await host.person("eve")
            reader, writer = await asyncio.open_connection("127.0.0.1", int(host.url.rpartition(":")[2]))
            head = f"POST /api/tasks HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {eve}\r\n{length}\r\n\r\n"
            writer.write(head.encode())
            assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 %d " % status)
            writer.close()

    run(check())


@pytest.mark.parametrize("path", ["/api/auth/device", "/api/auth/device/token"])
@pytest.mark.parametrize(("length", "status"), [("Content-Length: 1048576", 413), ("Transfer-Encoding: chunked", 411)])
def test_what_is_open_to_strangers_reads_no_large_bodies(
    run: Run, tmp_path: Path, path: str, length: str, status: int
) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(host.url.rpartition(":")[2]))
            writer.write(f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{length}\r\n\r\n".encode())
            answer = await reader.readuntil(b"}")  # though nothing of the body has come
            assert answer.startswith(b"HTTP/1.1 %d " % status)
            writer.close()
            asked = await host.nobody.post("/api/auth/device", json={"machine": "laptop"})
            assert asked.status_code == 201

    run(check())


def test_who_leaves_in_the_middle_of_a_body_is_no_failure_of_the_host(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            port = int(host.url.rpartition(":")[2])
            for path, token in (("tokens", host.admin_token), ("auth/device", ""), ("nodes/n1/heartbeat", "x")):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                head = f"POST /api/{path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 100\r\n"
                writer.write(f"{head}Authorization: Bearer {token}\r\n\r\n{{".encode())
                await asyncio.sleep(0.1)  # so long that it is being read
                writer.close()
            await host.user.get("/api/tasks")
            assert not [line.getMessage() for line in caplog.records if line.levelno >= logging.ERROR]

    run(check())


def test_sessions_count_too_and_those_without_a_token_by_where_they_come_from() -> None:
    now = 0.0
    requests = Requests(rate=1, clock=lambda: now)
    for caller in (Caller("ann", "user"), Caller(ANONYMOUS, ANONYMOUS)):
        for _ in range(BURST_SECONDS):
            requests.count(caller)
        with pytest.raises(UnavailableError, match="ask again in a moment"):
            requests.count(caller)
    now = 1.0
    requests.count(Caller("ann", "user"))


async def tries(host: HostUnderTest, secret: str, count: int) -> list[int]:
    return await statuses(host.client(secret), count)


def test_a_source_that_fails_often_is_slowed_down_and_a_good_credential_from_there_gets_in(
    run: Run, tmp_path: Path
) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            ann, _ = await host.person("ann")
            failing = asyncio.ensure_future(tries(host, "kr_wrong", 200))
            start = time.monotonic()
            while not failing.done():
                assert (await ann.get("/api/auth")).status_code == 200
            found = await failing
            seconds = time.monotonic() - start + LONGEST_WAIT
            assert found.count(401) <= AT_ONCE + seconds * PER_SECOND + 1
            assert found.count(429) == 200 - found.count(401)
            answer = await host.client("kr_wrong").get("/api/tasks")
            assert (await ann.get("/api/auth")).status_code == 200
            assert answer.json()["error"] in ("too_many_failures", "not_authenticated")

    run(check())


def test_what_one_source_fails_slows_no_other_down(run: Run) -> None:
    async def check() -> None:
        failures = Failures(rate=PER_SECOND, clock=lambda: 0.0)
        error = UnauthenticatedError("The host does not know this token.")
        begun = time.monotonic()
        for source in range(100):
            for _ in range(AT_ONCE):
                await failures.failed(f"192.0.2.{source}", error)
        assert time.monotonic() - begun < LONGEST_WAIT
        async with failures.looking("192.0.2.1"):
            pass
        late = [asyncio.ensure_future(failures.failed("192.0.2.1", error)) for _ in range(50)]
        ends = await asyncio.gather(*late, return_exceptions=True)
        told = [end for end in ends if isinstance(end, UnavailableError)]
        assert len(told) == 50 - LONGEST_WAIT * PER_SECOND - 1
        assert (told[0].status, told[0].code) == (429, "too_many_failures")
        assert str(told[0]).startswith("The host does not know this token; wait a moment: 192.0.2.1 has shown too many")

    run(check())


def test_answers_are_kept_by_no_cache_and_taken_for_nothing_else(run: Run, tmp_path: Path) -> None:
    async def check() -> None:
        async with a_host(tmp_path) as host:
            for answer in (
                await host.user.post("/api/tokens", json={"name": "new"}),
                await host.nobody.get("/api/tasks"),
                await host.user.get("/nothing"),
                await host.nobody.get("/docs"),
            ):
                assert answer.headers["cache-control"] == "no-store"
                assert answer.headers["x-content-type-options"] == "nosniff"
                assert "strict-transport-security" not in answer.headers

    run(check())

"""Several hosts for one user: which is asked, and when the next one is."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import pytest

from kohakuriver.client.host import HostClient
from kohakuriver.client.hosts import Hosts
from kohakuriver.config import Settings, host_urls, load_settings
from kohakuriver.errors import HostUnreachableError, KohakuRiverError, NotFoundError, UsageError
from kohakuriver.tunnel.dial import Server

Run = Callable[[Coroutine[Any, Any, None]], None]

A, B, C = "http://a:8000", "https://b:1", "http://c:8000"
SETTINGS = Settings(A, "secret", other_hosts=(B, C))


@pytest.mark.parametrize("text", ["a,https://b:1,c", "a https://b:1 c:8000", " a, https://b:1/ ,c ", f"{A},{B},a,{C}"])
def test_hosts_are_named_with_commas_or_spaces_between(text: str) -> None:
    assert host_urls(text) == (A, B, C)


@pytest.mark.parametrize("text", ["", "a,", "a,,b", "a,ftp://b"])
def test_an_empty_name_among_hosts_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="must be a URL"):
        host_urls(text)


def test_the_ssh_proxies_of_several_hosts_are_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KOHAKURIVER_HOST", "a,https://b:1,c")
    settings = load_settings()
    assert (settings.hosts, settings.ssh_proxy) == ((A, B, C), "a:8002,b:8002,c:8002")
    assert load_settings(host=settings.named) == settings


class Answering:
    """Hosts, of which some are down, and what they were asked."""

    def __init__(self, down: dict[str, type[httpx.TransportError]]) -> None:
        self.down = down
        self.asked: list[str] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        host = request.url.host
        self.asked.append(f"{request.method} {host}")
        if host in self.down:
            raise self.down[host]("it is down", request=request)
        return httpx.Response(200, json=[])

    def client(self) -> HostClient:
        return HostClient(SETTINGS, transport=httpx.MockTransport(self))


def test_the_next_host_is_asked_when_one_does_not_answer_and_first_from_then_on(run: Run) -> None:
    async def main() -> None:
        hosts = Answering({"a": httpx.ConnectError})
        async with hosts.client() as client:
            assert await client.tasks() == []
            assert await client.tasks() == []
        assert hosts.asked == ["GET a", "GET b", "GET b"]

    run(main())


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (httpx.ConnectError, ["POST a", "POST b", "GET b"]),
        (httpx.ConnectTimeout, ["POST a", "POST b", "GET b"]),
        (httpx.ReadError, ["POST a", "GET a", "GET b"]),
        (httpx.ReadTimeout, ["POST a", "GET a", "GET b"]),
    ],
)
def test_what_changes_things_is_asked_of_one_host_once_that_may_have_heard_it(
    run: Run, error: type[httpx.TransportError], asked: list[str]
) -> None:
    async def main() -> None:
        hosts = Answering({"a": error})
        async with hosts.client() as client:
            with pytest.raises(KohakuRiverError, match=f"does not understand|{A}"):
                await client.make_token("new")
            assert await client.tasks() == []
        assert hosts.asked == asked

    run(main())


def test_hosts_of_which_none_answers_are_all_named_in_one_sentence(run: Run) -> None:
    async def main() -> None:
        hosts = Answering(dict.fromkeys("abc", httpx.ConnectError))
        async with hosts.client() as client:
            with pytest.raises(HostUnreachableError) as caught:
                await client.tasks()
        message = caught.value.message
        assert message.startswith(f"No host answers: the host at {A} can't be reached: ")
        assert all(url in message for url in (A, B, C))
        assert message.count(". ") == 0

    run(main())


def test_what_all_hosts_say_is_said_once(run: Run) -> None:
    async def main() -> None:
        down = HostUnreachableError("The host's database is down.", code="database_down", status=503)

        async def open_at(server: Server) -> None:
            raise down

        with pytest.raises(HostUnreachableError) as caught:
            await Hosts(SETTINGS).reach("/x", open_at)
        assert caught.value is down

    run(main())


def test_a_session_goes_by_the_first_host_that_is_there_and_the_next_one_when_that_goes(run: Run) -> None:
    async def main() -> None:
        hosts, down, tried = Hosts(SETTINGS), {"ws://a:8000"}, []

        async def open_at(server: Server) -> str:
            tried.append(server.url)
            if server.url.rpartition("/")[0] in down:
                raise HostUnreachableError(f"{server.url} is down.")
            assert server.token == "secret"
            return server.url

        assert await hosts.reach("/x", open_at) == "wss://b:1/x"
        assert await hosts.reach("/x", open_at) == "wss://b:1/x"
        hosts.turn()
        assert await hosts.reach("/x", open_at) == "ws://c:8000/x"
        assert tried == ["ws://a:8000/x", "wss://b:1/x", "wss://b:1/x", "ws://c:8000/x"]

    run(main())


def test_what_a_host_refuses_is_refused_and_no_other_is_asked(run: Run) -> None:
    async def main() -> None:
        tried = []

        async def open_at(server: Server) -> None:
            tried.append(server.url)
            raise NotFoundError("There is no such task.")

        with pytest.raises(NotFoundError):
            await Hosts(SETTINGS).reach("/x", open_at)
        assert len(tried) == 1

    run(main())

"""Proxies before a host whose word of where a request comes from counts, and everybody else whose word does not."""

from __future__ import annotations

import json
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from kohakuriver.asking import asker
from kohakuriver.errors import UsageError
from kohakuriver.proxies import Proxies
from kohakuriver.tunnel.accept import TunnelRoute, UpgradeRequest, serve_ws
from tests.support.browser import Browser
from tests.support.host_only import HostUnderTest, a_host, websocket_status
from tests.support.serving import serving

Run = Callable[[Coroutine[Any, Any, None]], None]
PEER = ("10.0.3.7", 4711)
PROXIES = Proxies(["10.0.3.0/24", "192.0.2.1", "fd00::/8"])


@pytest.mark.parametrize(
    ("told", "client"),
    [
        ([], PEER),
        (["203.0.113.9"], ("203.0.113.9", 0)),
        (["203.0.113.9:443"], ("203.0.113.9", 443)),
        (["[2001:db8::9]:443"], ("2001:db8::9", 443)),
        (["2001:db8::9"], ("2001:db8::9", 0)),
        (["203.0.113.9, 192.0.2.1"], ("203.0.113.9", 0)),
        (["203.0.113.9", "fd00::1,10.0.3.200"], ("203.0.113.9", 0)),
        # Whoever asks wrote the first words: the last one that is no proxy of ours is who that was.
        (["127.0.0.1, 10.0.3.9, 203.0.113.9"], ("203.0.113.9", 0)),
        (["127.0.0.1, 203.0.113.9, 10.0.3.9"], ("203.0.113.9", 0)),
        (["10.0.3.9"], ("10.0.3.9", 0)),
        ([""], PEER),
        (["unknown"], PEER),
        (["203.0.113.9, _hidden"], PEER),
        (["203.0.113.9, nonsense, 10.0.3.9"], ("10.0.3.9", 0)),
        (["203.0.113.9:x"], PEER),
        (["203.0.113.9,"], PEER),
        (["1.2.3.4," * 100_000 + "203.0.113.9"], ("203.0.113.9", 0)),
        (["10.0.3.9," * 100_000 + "10.0.3.8"], ("10.0.3.9", 0)),
    ],
)
def test_who_asks_is_the_last_that_is_no_proxy_of_ours(told: list[str], client: tuple[str, int]) -> None:
    assert PROXIES.client(PEER, told) == client


@pytest.mark.parametrize("peer", ["203.0.113.1", "10.0.4.1", "::1", "", "testclient"])
def test_nobody_else_is_believed(peer: str) -> None:
    assert PROXIES.client((peer, 1), ["192.0.2.66"]) == (peer, 1)
    assert PROXIES.tls(peer, ["https"]) is None
    assert not PROXIES.trusts(peer)
    assert Proxies().client(PEER, ["192.0.2.66"]) == PEER
    assert Proxies().tls(PEER[0], ["https"]) is None


def test_a_network_of_ipv4_may_be_given_as_ipv6_has_it() -> None:
    for given in ("::ffff:10.0.3.0/120", "::ffff:10.0.3.7"):
        assert Proxies([given]).trusts("10.0.3.7")
    assert not Proxies(["::ffff:10.0.3.0/120"]).trusts("10.0.4.7")


def test_a_proxy_of_ipv4_is_one_on_a_socket_of_ipv6_too() -> None:
    assert PROXIES.client(("::ffff:10.0.3.7", 1), ["203.0.113.9"]) == ("203.0.113.9", 0)


@pytest.mark.parametrize(
    ("told", "tls"),
    [
        ([], None),
        (["https"], True),
        (["HTTPS"], True),
        (["wss"], True),
        (["http"], False),
        (["https, http"], False),
        (["http", "https"], True),
        (["ftp"], None),
        ([""], None),
    ],
)
def test_the_proxy_next_to_us_says_whether_a_browser_came_over_tls(told: list[str], tls: bool | None) -> None:
    assert PROXIES.tls(PEER[0], told) is tls


@pytest.mark.parametrize("text", ["10.0.3.1/24", "river.example.org", "", "*", "10.0.3.0/33"])
def test_what_is_no_network_is_told_in_one_sentence(text: str) -> None:
    with pytest.raises(UsageError, match=r"--trusted-proxy 10\.0\.3\.0/24"):
        Proxies([text])


def test_audit_lines_and_cookies_go_by_what_a_trusted_proxy_says(run: Run, tmp_path: Path) -> None:
    claim = {"X-Forwarded-For": "198.51.100.1, 203.0.113.9", "X-Forwarded-Proto": "https"}

    async def check(host: HostUnderTest) -> list[str]:
        await host.user.post("/api/users", json={"name": "ann"}, headers=claim)
        await host.nobody.get("/api/tasks", headers={**claim, "Authorization": "Bearer kr_wrong"})
        await host.audit.written()
        lines = [json.loads(line) for line in host.audit.path.read_text().splitlines()]
        assert [line["event"] for line in lines[-2:]] == ["user_added", "login_refused"]
        assert all(("forwarded_for" in line) != bool(host.proxies) for line in lines[-2:])
        return [line["from"].rpartition(":")[0] for line in lines[-2:]]

    async def cookie(host: HostUnderTest, proto: str) -> str:
        browser = Browser(host, "river.localhost")
        origin = f"{proto}://{browser.authority}"
        answer = await browser.ask(
            "POST", "/login", data={"token": host.admin_token}, origin=origin, headers={"X-Forwarded-Proto": proto}
        )
        return str(answer.headers.get("set-cookie", answer.status_code))

    async def main() -> None:
        for name, proxies, source in (("a", ["127.0.0.1"], "203.0.113.9"), ("b", [], "127.0.0.1")):
            (tmp_path / name).mkdir()
            async with a_host(tmp_path / name, proxies=proxies) as host:
                assert await check(host) == [source] * 2
                answer = await host.user.get("/health", headers=claim)
                assert ("strict-transport-security" in answer.headers) == bool(proxies)
                secure = await cookie(host, "https")
                assert secure.startswith("__Host-")
                # Now a page without TLS is another's, and what it has set is not taken.
                browser = Browser(host, "river.localhost")
                browser.cookies = dict([secure.removeprefix("__Host-").partition(";")[0].split("=", 1)])
                over_tls = {"X-Forwarded-Proto": "https"}
                answer = await browser.ask("GET", "/api/auth", headers=over_tls, site=None)
                assert answer.status_code == (401 if proxies else 200)

    run(main())


@pytest.mark.parametrize(("proxies", "known"), [(["127.0.0.0/8"], ("203.0.113.9:0", True)), ([], ("127.0.0.1", False))])
def test_a_websocket_comes_from_where_a_trusted_proxy_says(
    run: Run, proxies: list[str], known: tuple[str, bool]
) -> None:
    asked: list[tuple[str, str, bool]] = []

    async def answer(request: UpgradeRequest) -> None:
        asked.append((request.peer, asker().source, request.over_tls))
        request.reject(404, "no_such_task", "There is none.")

    async def main() -> None:
        ws = serve_ws([TunnelRoute("/ws/x", answer)], proxies=Proxies(proxies))
        async with serving(FastAPI(), ws) as url:
            claim = {"X-Forwarded-For": "198.51.100.1, 203.0.113.9", "X-Forwarded-Proto": "https"}
            assert await websocket_status(url.replace("http", "ws") + "/ws/x", claim) == 404
        [(peer, source, over_tls)] = asked
        assert peer == source
        assert peer.startswith(known[0])
        assert over_tls is known[1]

    run(main())

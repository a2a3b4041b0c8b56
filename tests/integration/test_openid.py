"""Logging in to a host at a real OpenID provider: who comes in, as whom, who does not, and out again."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from kohakuriver.host.services.oidc import EVERYBODY, Rules
from kohakuriver.host.services.oidc_provider import Provider
from tests.support.browser import Browser, link_of
from tests.support.host_only import HostUnderTest, a_host
from tests.support.openid import RealProvider, a_visitor, path_in, real_provider, start_of

Run = Callable[[Coroutine[Any, Any, None]], None]

LAB = Rules(frozenset({"lab"}), admins=frozenset({"wheel"}))
ANN = {"preferred_username": "ann", "groups": ["lab"], "email": "ann@uni.example", "email_verified": True}
BOB = {"preferred_username": "bob", "groups": ["lab", "wheel"], "email": "bob@uni.example", "email_verified": True}
EVE = {"preferred_username": "eve", "groups": ["others"], "email": "eve@elsewhere.example", "email_verified": True}


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealProvider]:
    """A real one, on loopback."""
    with real_provider(tmp_path_factory.mktemp("openid")) as found:
        yield found


@pytest.fixture(autouse=True)
def _people(provider: RealProvider) -> None:
    provider.knows(a1=ANN, b2=BOB, e3=EVE)


@contextlib.asynccontextmanager
async def a_host_with(provider: Provider, directory: Path, rules: Rules = LAB) -> AsyncIterator[HostUnderTest]:
    async with a_host(directory, oidc=(provider, rules)) as host:
        assert host.oidc is not None
        try:
            yield host
        finally:
            await host.oidc.close()


async def come_in(
    provider: RealProvider, host: HostUnderTest, who: str, at: httpx.AsyncClient | None = None
) -> tuple[Browser, httpx.Response]:
    """The whole way of a user, in a browser that is new here; `at` is that browser as it is at the provider."""
    browser = a_visitor(host)
    async with contextlib.AsyncExitStack() as stack:
        http = await stack.enter_async_context(provider.a_browser()) if at is None else at
        back = await provider.log_in(http, await start_of(browser), who)
    return browser, await browser.open(path_in(back), site="cross-site")


def events(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "audit.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("client", "secret"), [("river", "a-secret-of-the-tests"), ("public-river", None)])
def test_two_people_come_in_and_a_user_is_made_of_each_at_the_first_time(
    run: Run, tmp_path: Path, provider: RealProvider, client: str, secret: str | None
) -> None:
    async def check() -> None:
        async with a_host_with(provider.as_client(client, secret), tmp_path) as host:
            for who, name, role in (("a1", "ann", "user"), ("b2", "bob", "admin"), ("a1", "ann", "user")):
                browser, answer = await come_in(provider, host, who)
                assert (answer.status_code, answer.headers.get("location")) == (303, "/"), answer.text
                assert await browser.user() == name
                assert {key.partition("-host-")[0] for key in browser.cookies} == {"__Host-kohakuriver-host"}
                assert (await browser.ask("GET", "/api/auth")).json()["role"] == role
            users = {user["name"]: user for user in (await host.user.get("/api/users")).json()}
            assert {name: user["oidc"] for name, user in users.items()} == {"admin": None, "ann": "a1", "bob": "b2"}
            assert users["ann"]["limits"] == {}
            kinds = [token["kind"] for token in (await host.user.get("/api/tokens?user=ann")).json()]
            assert kinds == ["browser", "browser"]
            await host.audit.written()
            made = [event for event in events(tmp_path) if event["event"] == "browser_logged_in"]
            assert [(event["user"], event["by"], event["subject"]) for event in made][:2] == [
                ("ann", "oidc", "a1"),
                ("bob", "oidc", "b2"),
            ]

    run(check())


def test_who_is_in_no_group_that_may_does_not_come_in(run: Run, tmp_path: Path, provider: RealProvider) -> None:
    async def check() -> None:
        async with a_host_with(provider.as_client(), tmp_path) as host:
            browser, answer = await come_in(provider, host, "e3")
            assert (answer.status_code, browser.cookies) == (403, {})
            assert "is in no group that this host lets in" in answer.text
            assert [user["name"] for user in (await host.user.get("/api/users")).json()] == ["admin"]
            await host.audit.written()
            (refused,) = [event for event in events(tmp_path) if event["event"] == "refused"]
            assert (refused["code"], refused["subject"]) == ("oidc_not_allowed", "e3")

    run(check())


def test_groups_count_at_the_next_login_and_whose_group_went_is_out(
    run: Run, tmp_path: Path, provider: RealProvider
) -> None:
    async def check() -> None:
        async with a_host_with(provider.as_client(), tmp_path) as host:
            first, _ = await come_in(provider, host, "a1")
            provider.knows(a1={**ANN, "groups": ["wheel"]})
            await come_in(provider, host, "a1")
            assert (await first.ask("GET", "/api/auth")).json()["role"] == "admin"
            provider.knows(a1=ANN)
            second, _ = await come_in(provider, host, "a1")
            assert (await second.ask("GET", "/api/auth")).json()["role"] == "user"
            provider.knows(a1={**ANN, "groups": []})
            third, answer = await come_in(provider, host, "a1")
            assert answer.status_code == 403
            assert [await each.user() for each in (first, second, third)] == [None, None, None]

    run(check())


def test_nobody_takes_a_user_over_who_has_the_same_name_or_address(
    run: Run, tmp_path: Path, provider: RealProvider
) -> None:
    async def check() -> None:
        provider.knows(a1=ANN, x9={**ANN, "preferred_username": "ADMIN"}, y8={"email": "ann@uni.example"})
        async with a_host_with(provider.as_client(), tmp_path, Rules(frozenset({EVERYBODY}))) as host:
            await host.person("ann")
            for who, name in (("a1", "ann-2"), ("x9", "admin-2"), ("y8", "ann-3")):
                browser, _ = await come_in(provider, host, who)
                assert await browser.user() == name
                assert (await browser.ask("GET", "/api/auth")).json()["role"] == "user"

    run(check())


def test_an_admin_binds_a_user_to_a_subject_and_takes_that_back(
    run: Run, tmp_path: Path, provider: RealProvider
) -> None:
    async def check() -> None:
        async with a_host_with(provider.as_client(), tmp_path) as host:
            await host.person("chief", role="admin")
            linked = await host.user.put("/api/users/chief/oidc", json={"subject": "a1"})
            assert (linked.status_code, linked.json()["oidc"]) == (200, "a1")
            browser, _ = await come_in(provider, host, "a1")
            who = (await browser.ask("GET", "/api/auth")).json()
            assert (who["user"], who["role"]) == ("chief", "admin")  # an admin said so: no group takes that away
            other, _ = await come_in(provider, host, "b2")
            taken = await host.user.put("/api/users/chief/oidc", json={"subject": "b2"})
            assert (taken.status_code, taken.json()["error"]) == (400, "name_taken")
            assert "kohakuriver user unlink bob" in taken.json()["message"]
            assert (await host.user.delete("/api/users/chief/oidc")).json()["oidc"] is None
            assert [await browser.user(), await other.user()] == [None, "bob"]
            assert (await host.user.delete("/api/users/chief/oidc")).status_code == 404
            assert (await host.user.put("/api/users/nobody/oidc", json={"subject": "b2"})).status_code == 404

    run(check())


def test_a_command_line_that_such_a_browser_logs_in_ends_when_its_user_may_not_come_in_any_more(
    run: Run, tmp_path: Path, provider: RealProvider
) -> None:
    async def check() -> None:
        async with a_host_with(provider.as_client(), tmp_path) as host:
            browser, _ = await come_in(provider, host, "a1")
            asked = (await host.nobody.post("/api/auth/device", json={"machine": "laptop"})).json()
            page = await browser.ask("POST", "/device", data={"code": asked["user_code"]})
            sent = dict(re.findall(r'name="(code|asked)" value="([^"]+)"', page.text))
            await browser.ask("POST", "/device", data={**sent, "answer": "yes"})
            code = {"device_code": asked["device_code"]}
            command = host.client((await host.nobody.post("/api/auth/device/token", json=code)).json()["token"])
            more = host.client((await command.post("/api/tokens", json={"name": "more"})).json()["token"])
            theirs = Browser(host)
            await theirs.open(await link_of(command))
            assert [(await each.get("/api/auth")).json()["user"] for each in (command, more)] == ["ann", "ann"]
            assert await theirs.user() == "ann"
            last = host.client((await theirs.ask("POST", "/api/tokens", json={"name": "last"})).json()["token"])
            provider.knows(a1={**ANN, "groups": ["others"]})
            assert (await come_in(provider, host, "a1"))[1].status_code == 403
            assert {(await each.get("/api/auth")).status_code for each in (command, more, last)} == {401}
            assert await theirs.user() is None

    run(check())


def test_a_removed_users_login_makes_a_new_one_with_nothing_of_the_old(
    run: Run, tmp_path: Path, provider: RealProvider
) -> None:
    async def check() -> None:
        async with a_host_with(provider.as_client(), tmp_path) as host:
            old, _ = await come_in(provider, host, "a1")
            await (await host.runner()).beat()
            mine = await old.ask("POST", "/api/tasks", json={"name": "mine", "backend": "process"})
            assert mine.status_code == 201, mine.text
            assert (await host.user.delete("/api/users/ann")).status_code == 200
            assert await old.user() is None
            new, _ = await come_in(provider, host, "a1")
            assert await new.user() == "ann"
            assert (await new.ask("GET", "/api/tasks")).json() == []

    run(check())


def test_a_code_is_good_once_and_in_the_browser_alone_that_began(
    run: Run, tmp_path: Path, provider: RealProvider
) -> None:
    async def check() -> None:
        async with a_host_with(provider.as_client(), tmp_path) as host, provider.a_browser() as http:
            ann, eve = a_visitor(host), a_visitor(host)
            back = path_in(await provider.log_in(http, await start_of(ann), "a1"))
            # Sent to somebody else: they have begun none, or another one.
            assert (await eve.open(back, site="cross-site")).status_code == 401
            theirs = re.search(r"state=([^&]+)", await start_of(eve))
            assert theirs is not None
            injected = re.sub(r"state=[^&]+", theirs[0], back)
            answer = await eve.open(injected, site="cross-site")
            assert answer.status_code == 401
            assert await eve.user() is None
            assert "invalid_grant" in answer.text
            kept = dict(ann.cookies)
            assert (await ann.open(back, site="cross-site")).status_code == 303
            again = a_visitor(host)
            again.cookies = kept
            assert (await again.open(back, site="cross-site")).status_code == 401

    run(check())


def test_who_logs_out_here_is_led_to_log_out_there(run: Run, tmp_path: Path, provider: RealProvider) -> None:
    async def check() -> None:
        async with a_host_with(provider.as_client(), tmp_path) as host, provider.a_browser() as http:
            browser, _ = await come_in(provider, host, "a1", http)
            out = await browser.ask("POST", "/logout")
            assert (out.status_code, browser.cookies) == (200, {})
            link = re.search(r'href="(https://localhost[^"]+)"', out.text)
            assert link is not None
            back = await provider.log_out(http, link[1].replace("&amp;", "&"))
            assert back == "https://river.localhost/login"
            assert 'name="login"' in (await http.get(await start_of(browser), follow_redirects=True)).text
            by_token = a_visitor(host)
            await by_token.log_in(host.admin_token)
            assert (await by_token.ask("POST", "/logout")).headers["location"] == "/login"

    run(check())


def test_the_button_leads_to_the_provider_with_pkce_and_keeps_no_secret_in_its_address(
    run: Run, tmp_path: Path, provider: RealProvider
) -> None:
    async def check() -> None:
        async with a_host_with(provider.as_client(), tmp_path) as host:
            browser = a_visitor(host)
            page = await browser.open("/login")
            assert f"Log in with {provider.issuer.removeprefix('https://')}" in page.text
            assert 'name="token"' in page.text
            url = httpx.URL(await start_of(browser))
            asked = dict(url.params)
            assert asked["code_challenge_method"] == "S256"
            assert (asked["response_type"], asked["scope"]) == ("code", "openid profile email groups")
            assert asked["redirect_uri"] == "https://river.localhost/login/oidc/back"
            (kept,) = browser.cookies.values()
            began, state, nonce, verifier, place = kept.split(".")
            assert (asked["state"], asked["nonce"], place) == (state, nonce, "%2F")
            assert verifier not in str(url)
            assert began.isdigit()
            other = await start_of(a_visitor(host))
            assert not {state, nonce, asked["code_challenge"]} & set(dict(httpx.URL(other).params).values())

    run(check())


def test_a_login_that_was_begun_for_a_page_of_the_host_leads_there_and_nowhere_else(
    run: Run, tmp_path: Path, provider: RealProvider
) -> None:
    async def check() -> None:
        async with a_host_with(provider.as_client(), tmp_path) as host, provider.a_browser() as http:
            app = f"/enter-app?app=lab-8888-x.apps.example.org%3A8443&state={'0' * 64}"
            places = {"/device": "/device", app: app, "https://evil.example/": "/", "//evil.example/device": "/"}
            for place, path in places.items():
                browser = a_visitor(host)
                back = await provider.log_in(http, await start_of(browser, next=place), "a1")
                answer = await browser.open(f"{path_in(back)}&next=//evil.example", site="cross-site")
                assert answer.headers["location"] == path

    run(check())

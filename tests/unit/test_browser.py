"""Browsers that are logged in to a host: how they come in and go, what keeps them apart, and who is kept out."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest

from kohakuriver.config import NAME_IN_BROWSERS, browser_url
from kohakuriver.errors import UnauthenticatedError, UnavailableError
from kohakuriver.host.schemas import iso_time
from kohakuriver.host.services.failures import TOO_MANY_FAILURES, Failures
from kohakuriver.host.services.logins import name_in_browsers
from kohakuriver.limits import Limits
from kohakuriver.store import Accounts, Use
from kohakuriver.store.accounts import digest
from kohakuriver.store.browsers import CODE_SECONDS, IDLE_SECONDS, LONGEST_SECONDS, MOST_BROWSERS, SEEN_SECONDS
from kohakuriver.web.origin import is_own_page
from tests.support.browser import Browser, link_of
from tests.support.host_only import HostUnderTest, websocket_status

Run = Callable[[Coroutine[Any, Any, None]], None]
Check = Callable[[HostUnderTest], Coroutine[Any, Any, None]]


def events(directory: Path) -> list[dict[str, Any]]:
    """What was written down."""
    return [json.loads(line) for line in (directory / "audit.jsonl").read_text().splitlines()]


# -- the way in and out --------------------------------------------------------------------------------------------


def test_a_token_logs_a_browser_in_and_the_button_out(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest) -> None:
        _, token = await host.person("ann")
        browser = Browser(host)
        assert (await browser.open("/")).headers["location"] == "/login"
        assert 'type="password"' in (await browser.open("/login")).text
        answer = await browser.log_in(f" {token}\n")
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        assert "ann" in (await browser.open("/plain")).text
        assert await browser.user() == "ann"
        out = await browser.ask("POST", "/logout")
        assert (out.status_code, out.headers["location"], browser.cookies) == (303, "/login", {})
        assert await browser.user() is None

    on_host(check)


def test_the_cookie_is_for_this_host_alone_and_no_script_reads_it(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest) -> None:
        browser = Browser(host)
        answer = await browser.log_in(host.admin_token)
        port = browser.authority.rpartition(":")[2]
        name, _, rest = answer.headers["set-cookie"].partition("=")
        parts = {part.strip().lower() for part in rest.split(";")[1:]}
        assert name == f"kohakuriver-host-{port}"
        assert {"httponly", "path=/", "samesite=lax", f"max-age={int(LONGEST_SECONDS)}"} == parts

    on_host(check)


def test_behind_a_proxy_with_tls_the_cookie_is_secure_and_no_other_name_can_set_it(
    on_host: Callable[..., None],
) -> None:
    async def check(host: HostUnderTest) -> None:
        browser = Browser(host, "river.localhost")
        answer = await browser.ask(
            "POST", "/login", data={"token": host.admin_token}, origin=f"https://{browser.authority}"
        )
        assert answer.headers["set-cookie"].startswith("__Host-kohakuriver-host-")
        assert "; Secure" in answer.headers["set-cookie"]
        assert "Domain" not in answer.headers["set-cookie"]
        assert await browser.user() == "admin"

    on_host(check)


def test_over_tls_no_cookie_counts_that_a_page_without_it_could_have_set(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest) -> None:
        url = "https://river.localhost:8000"
        async with httpx.AsyncClient(transport=httpx.ASGITransport(host.app), base_url=url) as client:
            data = {"token": host.admin_token}
            plain = await client.post("/login", data=data, headers={"Origin": url.replace("https", "http")})
            assert plain.status_code == 403
            answer = await client.post("/login", data=data, headers={"Origin": url})
            assert "max-age" in answer.headers["strict-transport-security"]
            name, _, rest = answer.headers["set-cookie"].partition("=")
            assert name == "__Host-kohakuriver-host-8000"
            assert {"Secure", "Path=/"} <= {part.strip() for part in rest.split(";")}
            value = rest.partition(";")[0]
            client.cookies.clear()
            for known, status in ((name, 200), (name.removeprefix("__Host-"), 401)):
                got = await client.get("/api/auth", headers={"Cookie": f"{known}={value}"})
                assert got.status_code == status

    on_host(check)


def test_only_a_hash_of_cookies_and_links_is_kept_and_none_of_it_in_the_audit_log(
    on_host: Callable[..., None], tmp_path: Path
) -> None:
    async def check(host: HostUnderTest) -> None:
        browser = Browser(host)
        await browser.log_in(host.admin_token)
        link = await link_of(host.user)
        (secret,) = browser.cookies.values()
        await Browser(host).open(link, site="cross-site")
        await Browser(host).open("/login?code=x")
        await host.audit.written()
        kept = b"".join(path.read_bytes() for path in (*tmp_path.glob("host.db*"), tmp_path / "audit.jsonl"))
        assert secret.encode() not in kept
        assert link.partition("code=")[2].encode() not in kept

    on_host(check)


def test_the_pages_run_no_script_load_nothing_and_are_in_nobodys_frame(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest) -> None:
        browser = Browser(host)
        link = await link_of(host.user)
        pages = [await browser.open("/login"), await browser.open(link, site="cross-site")]
        pages.append(await browser.log_in("kr_wrong"))
        await browser.log_in(host.admin_token)
        pages.append(await browser.open("/plain"))
        for page in pages:
            policy = page.headers["content-security-policy"]
            assert {"default-src 'none'", "frame-ancestors 'none'", "form-action 'self'"} <= set(policy.split("; "))
            assert "unsafe" not in policy
            assert page.headers["x-content-type-options"] == "nosniff"
            assert page.headers["cache-control"] == "no-store"
            assert page.headers["referrer-policy"] == "same-origin"
            assert "<script" not in page.text
            assert " on" not in re.sub(r">[^<]*<", "><", page.text)

    on_host(check)


def test_a_wrong_token_is_told_in_the_page_and_logs_nobody_in(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest) -> None:
        browser = Browser(host)
        for token, words in (("kr_<b>", "does not know this token"), (" ", "Type a token")):
            answer = await browser.log_in(token)
            assert (answer.status_code, browser.cookies) == (401, {})
            assert words in answer.text
            assert "<b>" not in answer.text
            assert 'name="token"' in answer.text
        node = await host.token(node="n1", name="n")
        assert (await browser.log_in(node)).status_code == 401
        await browser.log_in(host.admin_token)
        (cookie,) = browser.cookies.values()
        assert (await Browser(host).log_in(cookie)).status_code == 401
        assert (await host.client(cookie).get("/api/auth")).status_code == 401

    on_host(check)


def test_wrong_tokens_at_the_page_are_answered_ever_later(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest) -> None:
        browser = Browser(host)
        statuses = [(await browser.log_in("kr_wrong")).status_code for _ in range(4)]
        assert statuses == [401] * 4
        many = await asyncio.gather(*(browser.log_in(f"kr_{n}") for n in range(12)))
        assert 429 in {answer.status_code for answer in many}
        assert (await browser.log_in(host.admin_token)).status_code == 303

    on_host(check, limits=Limits(max_requests=0, max_failures=1))


@pytest.mark.parametrize("path", ["/login", "/"])
def test_a_browser_with_an_old_cookie_gets_the_form_however_many_bad_credentials_its_address_has_shown(
    on_host: Callable[..., None], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def too_many(failures: Failures, origin: str, error: UnauthenticatedError) -> None:
        raise UnavailableError("too many", code=TOO_MANY_FAILURES, status=429)

    async def check(host: HostUnderTest) -> None:
        browser = Browser(host)
        await browser.log_in(host.admin_token)
        (name,) = browser.cookies
        monkeypatch.setattr(Failures, "failed", too_many)
        browser.cookies = {name: "krb_forgotten"}
        answer = await browser.open(path)
        assert answer.status_code == (200 if path == "/login" else 303)
        assert browser.cookies == {}
        assert 'name="token"' in (await browser.open("/login")).text

    on_host(check)


def test_a_browser_that_was_logged_out_has_guessed_nothing(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest) -> None:
        browser = Browser(host)
        await browser.log_in(host.admin_token)
        cookies = dict(browser.cookies)
        await browser.ask("POST", "/logout")
        browser.cookies = cookies
        answers = await asyncio.gather(*(browser.ask("GET", "/api/auth") for _ in range(12)))
        assert {answer.status_code for answer in answers} == {401}
        assert (await Browser(host).log_in("kr_wrong")).status_code == 401

    on_host(check, limits=Limits(max_requests=0, max_failures=1))


@pytest.mark.parametrize("path", ["/login", "/"])
def test_a_cookie_that_is_no_good_is_cleared_under_the_name_with_which_it_came(
    on_host: Callable[..., None], path: str
) -> None:
    """No request for a page tells that it came over TLS to a proxy, and `__Host-` goes with `Secure` alone."""

    async def check(host: HostUnderTest) -> None:
        browser = Browser(host, "river.localhost")
        port = browser.authority.rpartition(":")[2]
        for prefix in ("__Host-", ""):
            name = f"{prefix}kohakuriver-host-{port}"
            browser.cookies = {name: "krb_x", "other": "1"}
            (cleared,) = (await browser.open(path)).headers.get_list("set-cookie")
            parts = {part.strip().lower() for part in cleared.split(";")}
            assert {f'{name.lower()}=""', "max-age=0", "path=/"} <= parts
            assert ("secure" in parts) == bool(prefix)
        assert "set-cookie" not in (await Browser(host).open(path)).headers

    on_host(check)


@pytest.mark.parametrize(
    ("headers", "content", "status"),
    [
        ({"Content-Type": "application/json"}, b'{"token": "x"}', 400),
        ({"Content-Type": "application/x-www-form-urlencoded"}, b"token=" + b"x" * 5000, 413),
        ({"Content-Type": "application/x-www-form-urlencoded"}, b"a=1&" * 50, 400),
        ({"Content-Type": "application/x-www-form-urlencoded"}, b"token=\xff", 400),
        ({"Content-Type": "application/x-www-form-urlencoded"}, b"token=%ff", 400),
    ],
)
def test_a_form_that_is_none_is_refused_in_one_sentence(
    on_host: Callable[..., None], headers: dict[str, str], content: bytes, status: int
) -> None:
    async def check(host: HostUnderTest) -> None:
        answer = await Browser(host).ask("POST", "/login", headers=headers, content=content)
        assert answer.status_code == status
        assert "<p>" in answer.text

    on_host(check)


# -- links -----------------------------------------------------------------------------------------------------------


def test_a_link_that_is_opened_by_hand_logs_in_once(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest) -> None:
        ann, _ = await host.person("ann")
        link = await link_of(ann)
        browser = Browser(host)
        assert (await browser.open(link)).headers["location"] == "/"
        assert await browser.user() == "ann"
        again = await browser.open(link)  # reload, or back
        assert again.headers["location"] == "/"
        assert await browser.user() == "ann"

    on_host(check)


def test_a_link_that_is_used_a_second_time_puts_out_who_came_in_first(
    on_host: Callable[..., None], tmp_path: Path
) -> None:
    async def check(host: HostUnderTest) -> None:
        link = await link_of(host.user)
        first, second = Browser(host), Browser(host)
        await first.open(link)
        answer = await second.open(link)
        assert (answer.status_code, second.cookies) == (401, {})
        assert "kohakuriver open" in answer.text
        assert await first.user() is None
        await host.audit.written()
        assert "login_link_used_twice" in [event["event"] for event in events(tmp_path)]

    on_host(check)


def test_a_used_link_ends_nothing_any_more_once_its_time_is_long_over(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest) -> None:
        link = await link_of(host.user)
        first = Browser(host)
        await first.open(link)
        host.clock.now += CODE_SECONDS + SEEN_SECONDS + 1
        assert (await Browser(host).open(link)).status_code == 401
        assert await first.user() == "admin"

    on_host(check)


def test_a_link_that_is_older_than_a_minute_or_made_up_logs_nobody_in(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest) -> None:
        link = await link_of(host.user)
        host.clock.now += CODE_SECONDS
        for each in (link, "/login?code=x", "/login?code="):
            browser = Browser(host)
            assert (await browser.open(each)).status_code == 401
            assert browser.cookies == {}

    on_host(check)


@pytest.mark.parametrize("how", [{"site": "cross-site"}, {"site": "same-site"}, {"Sec-Purpose": "prefetch"}])
def test_a_page_that_sends_the_browser_to_its_own_link_logs_nobody_in_unasked(
    on_host: Callable[..., None], how: dict[str, str]
) -> None:
    async def check(host: HostUnderTest) -> None:
        mallory, _ = await host.person("mallory")
        link = await link_of(mallory)
        browser = Browser(host)
        page = await browser.open(link, **how)
        assert (page.status_code, browser.cookies) == (200, {})
        assert "Log in as mallory" in page.text
        code = re.search(r'name="code" value="([^"]+)"', page.text)
        assert code is not None
        assert (await browser.ask("POST", "/login", data={"code": code[1]})).status_code == 303
        assert await browser.user() == "mallory"

    on_host(check)


def test_a_link_of_somebody_else_asks_a_browser_that_is_logged_in(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest) -> None:
        _, token = await host.person("ann")
        mallory, _ = await host.person("mallory")
        browser = Browser(host)
        await browser.log_in(token)
        page = await browser.open(await link_of(mallory))
        assert page.status_code == 200
        assert "You are logged in as <strong>ann</strong>" in page.text
        assert await browser.user() == "ann"

    on_host(check)


def test_a_browser_makes_no_links_so_none_stays_beyond_its_time(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest) -> None:
        browser = Browser(host)
        await browser.log_in(host.admin_token)
        answer = await browser.ask("POST", "/api/auth/link")
        assert (answer.status_code, answer.json()["error"]) == (403, "no_token")
        await (await host.runner()).beat()
        await host.create(name="web")
        passed = await browser.ask("POST", "/api/tasks/web/ssh-pass")
        assert (passed.status_code, "SSH" in passed.json()["message"]) == (403, True)
        made = (await browser.ask("POST", "/api/tokens", json={"name": "kept"})).json()
        (browser_row,) = [row for row in (await host.user.get("/api/tokens")).json() if row["kind"] == "browser"]
        assert made["expires_at"] is not None
        host.clock.now += LONGEST_SECONDS
        assert (await host.client(made["token"]).get("/api/auth")).status_code == 401
        assert browser_row["user"] == "admin"

    on_host(check)


def test_nothing_that_an_admins_browser_makes_outlives_its_last_day(on_host: Callable[..., None]) -> None:
    """A stolen cookie does not renew itself: not by a token for another admin or a node, nor by one of such a token."""

    async def check(host: HostUnderTest) -> None:
        browser = Browser(host)
        await browser.log_in(host.admin_token)
        for name in ("eve", "mallory"):
            assert (await browser.ask("POST", "/api/users", json={"name": name, "role": "admin"})).status_code == 201
        last = host.clock.now + LONGEST_SECONDS
        asked: list[dict[str, Any]] = [{"user": "eve"}, {"user": "eve", "expires_in": 9e6}, {"node": "n1"}]
        made = [
            (await browser.ask("POST", "/api/tokens", json={"name": f"t{n}", **body})).json()
            for n, body in enumerate(asked)
        ]
        eve = host.client(made[0]["token"])
        of_eve: list[dict[str, Any]] = [{}, {"user": "mallory"}, {"node": "n2"}]
        host.clock.now += 100
        made += [
            (await eve.post("/api/tokens", json={"name": f"of eve {n}", **body})).json()
            for n, body in enumerate(of_eve)
        ]
        assert {each["expires_at"] for each in made} == {iso_time(last)}
        sooner = await browser.ask("POST", "/api/tokens", json={"name": "sooner", "user": "eve", "expires_in": 10})
        assert sooner.json()["expires_at"] == iso_time(host.clock.now + 10)
        by_token = await host.user.post("/api/tokens", json={"name": "by a token", "node": "n3"})
        assert by_token.json()["expires_at"] is None
        host.clock.now = last
        assert (await host.client(made[4]["token"]).get("/api/auth")).status_code == 401

    on_host(check)


def test_nothing_leads_from_the_login_to_another_site(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest) -> None:
        browser = Browser(host)
        for query in ("?next=https://evil.example/", "?code=&to=//evil.example", "?//evil.example"):
            answer = await browser.ask("POST", f"/login{query}", data={"token": host.admin_token})
            assert answer.headers["location"] == "/"
            place = query.partition("=")[2]
            answer = await browser.ask("POST", "/login", data={"token": host.admin_token, "next": place})
            assert answer.headers["location"] == "/"
            assert (await browser.open(f"/login{query}")).headers.get("location", "/") == "/"  # who is in already
            answer = await browser.open(f"{await link_of(host.user)}&next={place}")
            assert answer.headers["location"] == "/"
            assert (await browser.ask("POST", f"/logout{query}")).headers["location"] == "/login"

    on_host(check)


# -- what there is ---------------------------------------------------------------------------------------------------


def test_the_page_shows_the_tasks_that_the_user_may_use_and_the_ports_that_listen_in_them(
    on_host: Callable[..., None],
) -> None:
    async def check(host: HostUnderTest) -> None:
        runner = await host.runner()
        await runner.beat()
        ann, token = await host.person("ann")
        browser = Browser(host)
        await browser.log_in(token)
        assert "There is no task yet" in (await browser.open("/plain")).text
        await host.create(name="hidden")
        for name in ("lab", "silent"):
            assert (await ann.post("/api/tasks", json={"name": name, "backend": "process"})).status_code == 201
        container = (await ann.get("/api/tasks/lab")).json()["container"]
        port = {"port": 8888, "proto": "tcp", "address": "0.0.0.0", "program": "<i>jupyter"}
        others = [{**port, "address": "::"}, {**port, "port": 53, "proto": "udp"}]
        runner.answers[f"/api/tasks/{container}/ports"] = (200, {"ports": [port, *others]})
        silent = (await ann.get("/api/tasks/silent")).json()["container"]
        runner.answers[f"/api/tasks/{silent}/ports"] = (503, {"error": "no_tunnel", "message": "It is not connected."})
        text = (await browser.open("/plain")).text
        assert text.count('href="/open/lab/8888"') == 1
        assert "(&lt;i&gt;jupyter)" in text
        assert " 53<" not in text
        assert "silent" in text
        assert "hidden" not in text

    on_host(check)


# -- how long ---------------------------------------------------------------------------------------------------------


def test_a_browser_that_asks_for_nothing_is_logged_out_and_one_that_is_used_is_not_until_its_last_day(
    on_host: Callable[..., None],
) -> None:
    async def check(host: HostUnderTest) -> None:
        used, idle = Browser(host), Browser(host)
        await used.log_in(host.admin_token)
        await idle.log_in(host.admin_token)
        began = host.clock.now
        while host.clock.now + IDLE_SECONDS - 60 < began + LONGEST_SECONDS:
            host.clock.now += IDLE_SECONDS - 60
            assert await used.user() == "admin"
        answer = await idle.ask("GET", "/api/auth")
        assert (answer.status_code, answer.json()["error"]) == (401, "logged_out")
        assert {row["kind"] for row in (await host.user.get("/api/tokens")).json()} == {"user", "browser"}
        host.clock.now = began + LONGEST_SECONDS
        assert await used.user() is None
        assert [row["kind"] for row in (await host.user.get("/api/tokens")).json()] == ["user"]

    on_host(check)


def test_a_browser_ends_with_the_token_that_let_it_in(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest) -> None:
        ann, _ = await host.person("ann")
        soon = await host.token(user="ann", name="soon", expires_in=100)
        revoked = await host.token(user="ann", name="revoked")
        by_time, by_hand, by_link = Browser(host), Browser(host), Browser(host)
        await by_time.log_in(soon)
        await by_hand.log_in(revoked)
        link, late = [await link_of(host.client(revoked)) for _ in range(2)]
        await by_link.open(link)
        assert await by_link.user() == "ann"
        assert (await ann.delete("/api/tokens/revoked")).status_code == 200
        assert [await by_hand.user(), await by_link.user()] == [None, None]
        assert (await Browser(host).open(late)).status_code == 401
        host.clock.now += 100
        assert await by_time.user() is None

    on_host(check)


def test_a_removed_user_is_logged_out(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest) -> None:
        _, token = await host.person("ann")
        browser = Browser(host)
        await browser.log_in(token)
        await host.user.delete("/api/users/ann")
        assert await browser.user() is None

    on_host(check)


def test_browsers_are_listed_and_revoked_with_the_tokens_each_by_its_own_user(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest) -> None:
        ann, token = await host.person("ann")
        bob, _ = await host.person("bob")
        browser = Browser(host)
        await browser.log_in(token)
        (row,) = [row for row in (await ann.get("/api/tokens")).json() if row["kind"] == "browser"]
        assert (row["user"], row["status"], row["name"][:8]) == ("ann", "valid", "browser-")
        assert [each["kind"] for each in (await bob.get("/api/tokens")).json()] == ["user"]
        assert (await bob.delete(f"/api/tokens/{row['id']}")).status_code == 404
        assert (await ann.delete(f"/api/tokens/{row['id']}")).status_code == 200
        assert await browser.user() is None

    on_host(check)


def test_of_too_many_browsers_of_one_user_the_one_that_was_used_least_lately_goes(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest) -> None:
        _, token = await host.person("ann")
        browsers = [Browser(host) for _ in range(MOST_BROWSERS + 1)]
        for browser in browsers:
            host.clock.now += 100
            await browser.log_in(token)
            if browser is browsers[1]:
                host.clock.now += 100
                assert await browsers[0].user() == "ann"
        assert [await browser.user() for browser in browsers[:3]] == ["ann", None, "ann"]

    on_host(check)


def test_a_browser_that_is_logged_in_anew_puts_none_of_the_users_others_out(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest) -> None:
        _, token = await host.person("ann")
        browsers = [Browser(host) for _ in range(MOST_BROWSERS)]
        for browser in browsers:
            host.clock.now += 100
            await browser.log_in(token)
        await browsers[1].log_in(token)
        assert [await browser.user() for browser in browsers] == ["ann"] * MOST_BROWSERS

    on_host(check)


def test_what_a_browser_has_open_ends_when_it_is_logged_out(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest) -> None:
        await (await host.runner()).beat()
        await host.create(name="web")
        browser = Browser(host)
        await browser.log_in(host.admin_token)
        (cookie,) = browser.cookies.values()
        caller, _ = await host.logins.visitor(cookie)
        grant = await host.grants.enter(caller, (await host.store.task_and_node("web"))[0])
        ended: list[str] = []
        grant.attach(ended.append)
        await browser.ask("POST", "/logout")
        assert ended == ["the browser of this session is not logged in any more"]

    on_host(check)


def test_what_a_browser_has_left_in_tasks_stays_when_its_user_logs_in_anew_and_ends_with_the_log_out(
    on_host: Callable[..., None],
) -> None:
    """As a terminal of the page does while `kohakuriver open lab 8888` logs the same browser in once more."""

    async def check(host: HostUnderTest) -> None:
        _, token = await host.person("ann", "admin")
        await (await host.runner()).beat()
        await host.create(name="web")
        task = (await host.store.task_and_node("web"))[0]
        browser = Browser(host)

        async def leave(*, ended_by: str) -> list[tuple[str, ...]]:
            (cookie,) = browser.cookies.values()
            caller, _ = await host.logins.visitor(cookie)
            before, after = [await host.grants.enter(caller, task) for _ in range(2)]
            for grant in (before, after):
                grant.opened(proto="terminal")
                grant.stays()
            before.closed()
            ended: list[str] = []

            def end(reason: str) -> None:
                ended.append(reason)
                after.closed()

            after.attach(end)
            host.revoked.clear()
            await browser.log_in(ended_by)
            await host.grants.check()
            assert ended == ["the browser of this session is not logged in any more"]
            return list(host.revoked)

        await browser.log_in(host.admin_token)
        assert await leave(ended_by=host.admin_token) == []
        await browser.ask("POST", "/logout")
        await host.grants.check()
        assert {of[2] for of in host.revoked} == {"admin"}
        await browser.log_in(host.admin_token)
        assert {of[2] for of in await leave(ended_by=token)} == {"admin"}  # somebody else

    on_host(check)


def test_a_link_by_the_token_of_its_login_ends_nothing_that_a_browser_has_open(on_host: Callable[..., None]) -> None:
    """As `kohakuriver open lab 6006 --at-host` beside a notebook that was opened so."""

    async def check(host: HostUnderTest) -> None:
        await (await host.runner()).beat()
        await host.create(name="web")
        task = (await host.store.task_and_node("web"))[0]
        other = host.client(await host.token(user="admin", name="other"))
        browser, ended = Browser(host), list[str]()

        async def comes_in_anew(by: httpx.AsyncClient) -> bool:
            (before,) = browser.cookies.values()
            caller, _ = await host.logins.visitor(before)
            ended.clear()
            (await host.grants.enter(caller, task)).attach(ended.append)
            assert (await browser.open(await link_of(by))).status_code == 303
            await host.grants.check()
            assert await browser.user() == "admin"
            anew = browser.cookies != dict.fromkeys(browser.cookies, before)
            assert anew == bool(ended)
            return anew

        await browser.open(await link_of(host.user))
        assert [await comes_in_anew(by) for by in (host.user, host.user, other, other, host.user)] == [
            False, False, True, False, True,
        ]  # fmt: skip
        for _ in range(8):  # its last day is not put off by that
            host.clock.now += IDLE_SECONDS - 1
            assert await browser.user() == "admin"
        assert await comes_in_anew(host.user)
        link = await link_of(host.user)
        await browser.open(link)
        assert await browser.user() == "admin"
        assert (await Browser(host).open(link)).status_code == 401  # somebody else has seen the link
        assert await browser.user() is None

    on_host(check)


def test_what_was_left_goes_over_from_login_to_login_but_not_from_one_that_had_ended(
    on_host: Callable[..., None],
) -> None:
    async def check(host: HostUnderTest) -> None:
        await (await host.runner()).beat()
        task_id = (await host.create(name="web"))["task_id"]
        browser = Browser(host)

        async def log_in() -> str:
            await browser.log_in(host.admin_token)
            (cookie,) = browser.cookies.values()
            return digest(cookie)

        async def hangs_on_nothing(key: str, *, left: bool = True) -> bool:
            use = Use(key, task_id, left=left)
            return use in await Accounts(host.store, clock=host.clock).withdrawn([use])

        first, second, third = [await log_in() for _ in range(3)]
        assert [await hangs_on_nothing(key) for key in (first, second, third)] == [False, False, False]
        assert await hangs_on_nothing(first, left=False)  # the session itself ends
        host.clock.now += IDLE_SECONDS
        await log_in()  # whoever had the browser before may be another
        assert [await hangs_on_nothing(key) for key in (first, second, third)] == [True, True, True]

    on_host(check)


# -- who is kept out -----------------------------------------------------------------------------------------------


def test_logging_in_makes_a_new_cookie_and_ends_the_one_that_the_browser_had(on_host: Callable[..., None]) -> None:
    """Nobody fixes a cookie in somebody's browser and is in when they are."""

    async def check(host: HostUnderTest) -> None:
        ann, token = await host.person("ann")
        _, other = await host.person("mallory")
        theirs = Browser(host)
        await theirs.log_in(other)
        browser = Browser(host)
        browser.cookies = dict(theirs.cookies)
        await browser.log_in(token)
        assert browser.cookies != theirs.cookies
        assert [await browser.user(), await theirs.user()] == ["ann", None]
        made_up = dict.fromkeys(browser.cookies, "krb_chosen")
        browser.cookies = dict(made_up)
        await browser.open(await link_of(ann))
        assert browser.cookies != made_up

    on_host(check)


def test_two_cookies_of_ours_that_differ_are_none(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest) -> None:
        browser = Browser(host)
        await browser.log_in(host.admin_token)
        ((name, value),) = browser.cookies.items()
        for cookies, status in ((f"{name}={value}; {name}={value}", 200), (f"{name}=krb_x; {name}={value}", 401)):
            headers = {"Host": browser.authority, "Cookie": cookies}
            assert (await host.nobody.get("/api/auth", headers=headers)).status_code == status

    on_host(check)


FOREIGN: list[dict[str, str | None]] = [
    {"site": "cross-site"},
    {"site": "same-site"},
    {"site": "same-site", "origin": "http://lab-8888.localhost:1"},
    {"site": None, "origin": None},
    {"site": None, "origin": "http://kohakuriver.localhost:1"},
    {"site": None, "origin": "http://kohakuriver.localhost"},
    {"site": None, "origin": "https://evil.example"},
    {"site": None, "origin": "null"},
    {"site": "same-origin", "origin": "null"},
    {"site": "cross-site", "origin": "null"},
]


@pytest.mark.parametrize("sender", FOREIGN, ids=str)
def test_what_no_page_of_the_host_sent_changes_nothing_with_a_browsers_login(
    on_host: Callable[..., None], sender: dict[str, Any]
) -> None:
    async def check(host: HostUnderTest) -> None:
        browser = Browser(host)
        assert (await browser.ask("POST", "/login", data={"token": host.admin_token}, **sender)).status_code == 403
        assert browser.cookies == {}
        await browser.log_in(host.admin_token)
        for method, path in (("POST", "/logout"), ("POST", "/api/users"), ("DELETE", "/api/users/x")):
            assert (await browser.ask(method, path, json={"name": "x"}, **sender)).status_code == 403
        assert await browser.user() == "admin"
        assert [user["name"] for user in (await host.user.get("/api/users")).json()] == ["admin"]

    on_host(check)


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_another_page_can_not_even_ask_with_a_browsers_login(on_host: Callable[..., None], site: str) -> None:
    async def check(host: HostUnderTest) -> None:
        browser = Browser(host)
        await browser.log_in(host.admin_token)
        answer = await browser.ask("GET", "/api/auth", site=site)
        assert (answer.status_code, answer.json()["error"]) == (403, "origin_not_allowed")
        assert "access-control-allow-origin" not in answer.headers
        assert await browser.user() == "admin"

    on_host(check)


def test_a_site_that_may_use_tokens_here_may_not_use_a_browsers_login() -> None:
    assert not is_own_page("POST", "river:8000", ["https://allowed.example"], [], tls=False)
    assert not is_own_page("GET", "river:8000", ["http://river:8000", "https://evil.example"], [], tls=False)
    assert not is_own_page("POST", "river:8000", ["http://river:8000"], ["same-origin"], tls=True)
    assert is_own_page("POST", "river:8000", ["http://River:8000"], [], tls=False)
    assert is_own_page("POST", "river", ["https://river"], ["same-origin"], tls=False)


def test_a_name_that_leads_here_by_a_trick_gets_no_page(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest) -> None:
        browser = Browser(host, "evil.example")
        for method, path in (("GET", "/login"), ("POST", "/login"), ("GET", "/"), ("POST", "/logout")):
            answer = await browser.ask(method, path, headers={"Accept": "text/html"})
            assert (answer.status_code, answer.json()["error"]) == (403, "host_not_allowed")

    on_host(check)


TERMINALS = ("/ws/forward/web/terminal", "/ws/task/web/terminal")


def test_a_page_of_the_host_opens_terminals_with_the_cookie_and_no_port(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest) -> None:
        await (await host.runner()).beat()
        await host.create(name="web")
        browser = Browser(host)
        await browser.log_in(host.admin_token)
        ((name, value),) = browser.cookies.items()
        cookie, url = {"Cookie": f"{name}={value}"}, host.url.replace("http", "ws")
        for path in TERMINALS:
            # This runner has no terminals; that it was asked for one shows that the browser may.
            assert await websocket_status(url + path, {**cookie, "Origin": host.url}) in (101, 404)
        for path in ("/ws/forward/web/80", "/ws/forward/web/ssh"):
            assert await websocket_status(url + path, {**cookie, "Origin": host.url}) == 401
        await browser.ask("POST", "/logout")
        for path in TERMINALS:
            assert await websocket_status(url + path, {**cookie, "Origin": host.url}) == 401

    on_host(check)


@pytest.mark.parametrize("origin", [None, "null", "http://lab-8888.localhost:1", "http://127.0.0.1:1", "https://{}"])
def test_no_other_page_opens_a_terminal_with_the_cookie_nor_does_a_program(
    on_host: Callable[..., None], origin: str | None
) -> None:
    async def check(host: HostUnderTest) -> None:
        await (await host.runner()).beat()
        await host.create(name="web")
        browser = Browser(host)
        await browser.log_in(host.admin_token)
        ((name, value),) = browser.cookies.items()
        headers = {"Cookie": f"{name}={value}", "Sec-Fetch-Site": "cross-site"}
        for sent in ({}, {"Origin": host.url}) if origin is None else ({"Origin": origin.format("127.0.0.1")},):
            for path in TERMINALS:
                assert await websocket_status(host.url.replace("http", "ws") + path, {**headers, **sent}) == 403

    on_host(check)


def test_no_answer_leads_to_an_address_that_the_request_names(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest) -> None:
        browser = Browser(host, "river.localhost")
        for path in ("/login/", "/device/", "/api/users/", "//evil.example/login/", "/login//", "/docs/"):
            answer = await browser.open(path)
            assert (answer.status_code, answer.headers.get("location")) == (404, None), path
        for path in ("/", "/device", "/login?next=//evil.example", "/login?next=%2Fdevice"):
            where = (await browser.open(path)).headers.get("location", "/")
            assert where.startswith("/")
            assert not where.startswith("//")

    on_host(check)


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost", "LOCALHOST"])
def test_by_a_name_that_others_share_no_browser_comes_in_nor_hears_of_the_right_one(
    on_host: Callable[..., None], name: str
) -> None:
    async def check(host: HostUnderTest) -> None:
        browser = Browser(host, name)
        link = await link_of(host.user)
        answers = [await browser.open(path) for path in ("/", "/login", link)]
        answers += [await browser.log_in(host.admin_token)]
        for answer in answers:
            assert (answer.status_code, browser.cookies) == (403, {})
            assert "kohakuriver open" in answer.text
            assert host.logins.name not in answer.text + str(answer.headers)
        assert (await browser.ask("GET", "/", headers={"Accept": "*/*"})).json()["name"] == "KohakuRiver host"

    on_host(check)


@pytest.mark.parametrize("name", ["kohakuriver.localhost", "kr-a.localhost"])
def test_no_cookie_is_set_without_tls_at_a_local_name_that_a_page_can_choose(
    on_host: Callable[..., None], name: str
) -> None:
    async def check(host: HostUnderTest) -> None:
        browser = Browser(host, name)
        page = await browser.open(await link_of(host.user))
        assert (page.status_code, browser.cookies) == (200, {})
        assert (await browser.log_in(host.admin_token)).status_code == 403
        assert browser.cookies == {}
        assert host.logins.name not in page.text

    on_host(check)


def test_the_pages_of_a_browser_that_is_logged_in_do_not_show_the_hosts_name(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest) -> None:
        browser = Browser(host)
        await browser.log_in(host.admin_token)
        for path in ("/", "/login", "/docs", "/openapi.json"):
            answer = await browser.open(path)
            assert host.logins.name not in answer.text + str(answer.headers)

    on_host(check)


def test_a_host_makes_its_name_in_browsers_once_and_nobody_else_reads_it(tmp_path: Path) -> None:
    names = {name_in_browsers(tmp_path / each / "browser-name") for each in ("a", "a", "b")}
    assert len(names) == 2
    assert all(NAME_IN_BROWSERS.fullmatch(name) for name in names)
    assert (tmp_path / "a" / "browser-name").stat().st_mode & 0o777 == 0o600


def test_the_url_for_a_browser_has_that_name_too() -> None:
    name = "kr-x.localhost"
    assert browser_url("http://127.0.0.1:8000", name) == "http://kr-x.localhost:8000"
    assert browser_url("http://[::1]:8000/x", name) == "http://kr-x.localhost:8000/x"
    assert browser_url("http://localhost", name) == "http://kr-x.localhost"
    for other in ("https://localhost:8000", "http://river.localhost:8000", "http://127.0.0.2:1"):
        assert browser_url(other, name) == other


def test_audit_lines_say_that_a_browser_did_it(on_host: Callable[..., None], tmp_path: Path) -> None:
    async def check(host: HostUnderTest) -> None:
        browser = Browser(host)
        await browser.log_in(host.admin_token)
        await browser.ask("POST", "/api/users", json={"name": "ann"})
        await browser.ask("POST", "/logout")
        await host.user.post("/api/users", json={"name": "bob"})
        await host.audit.written()
        lines = {(line["event"], line.get("of_user")): line for line in events(tmp_path)}
        made = lines["user_added", "ann"]
        assert (made["via"], made["user"]) == ("browser", "admin")
        assert "via" not in lines["user_added", "bob"]
        came, went = lines["browser_logged_in", None], lines["browser_logged_out", None]
        assert came["token"] == went["token"] == made["token"]
        assert (came["by"], came["via"]) == ("token", "browser")

    on_host(check)

"""Logging a command line in by a browser: what it gets, who confirms that, and who can't."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest

from kohakuriver.cli.device_login import machine_name
from kohakuriver.host.schemas import DeviceRequest
from kohakuriver.host.services import device_logins, failures
from kohakuriver.host.services.device_logins import DeviceLogins
from kohakuriver.limits import Limits
from kohakuriver.store import DeviceCodes
from kohakuriver.store.browsers import LONGEST_SECONDS
from kohakuriver.store.device_codes import CODE_SECONDS, MOST_OF_ONE
from tests.support.browser import Browser
from tests.support.host_only import HostUnderTest

Run = Callable[[Coroutine[Any, Any, None]], None]
Check = Callable[[HostUnderTest], Coroutine[Any, Any, None]]


@pytest.fixture
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Questions are not held."""
    monkeypatch.setattr(device_logins, "HOLD_SECONDS", 0.0)


async def ask(host: HostUnderTest, machine: str = "ann@laptop") -> dict[str, Any]:
    """A command line begins."""
    answer = await host.nobody.post("/api/auth/device", json={"machine": machine})
    assert answer.status_code == 201, answer.text
    asked: dict[str, Any] = answer.json()
    return asked


async def take(host: HostUnderTest, asked: dict[str, Any]) -> httpx.Response:
    """It asks for its token."""
    return await host.nobody.post("/api/auth/device/token", json={"device_code": asked["device_code"]})


def hidden(page: httpx.Response) -> dict[str, str]:
    """What the first form of the page that asks sends along: that with Yes."""
    return dict(re.findall(r'<input type="hidden" name="([^"]+)" value="([^"]*)">', page.text.partition("</form>")[0]))


async def question(browser: Browser, asked: dict[str, Any]) -> httpx.Response:
    """Type its code."""
    return await browser.ask("POST", "/device", data={"code": asked["user_code"].lower()})


async def confirm(browser: Browser, asked: dict[str, Any], answer: str = "yes") -> httpx.Response:
    """Type its code, and answer."""
    return await browser.ask("POST", "/device", data={**hidden(await question(browser, asked)), "answer": answer})


async def logged_in(host: HostUnderTest, name: str = "ann") -> tuple[httpx.AsyncClient, Browser]:
    """A new user, with a browser that is logged in."""
    client, token = await host.person(name)
    browser = Browser(host)
    await browser.log_in(token)
    return client, browser


def test_a_command_line_waits_until_a_browser_confirms_and_has_a_token_of_that_user(
    on_host: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check(host: HostUnderTest) -> None:
        ann, browser = await logged_in(host)
        asked = await ask(host)
        assert re.fullmatch(r"[B-DF-HJ-NP-TV-XZ]{4}-[B-DF-HJ-NP-TV-XZ]{4}", asked["user_code"])
        waiting = asyncio.ensure_future(take(host, asked))
        page = await question(browser, asked)
        for words in ("act as <strong>ann</strong> (user)", "<td>127.0.0.1", "<td>ann@laptop", "it is theirs"):
            assert words in page.text
        assert not waiting.done()
        assert "ann@laptop is logged in as ann" in (await confirm(browser, asked)).text
        made = (await waiting).json()  # woken: nothing looks again in this test
        assert (made["name"], made["user"], made["kind"], made["status"]) == ("ann@laptop", "ann", "user", "valid")
        command = host.client(made["token"])
        assert (await command.get("/api/auth")).json()["user"] == "ann"
        assert "ann@laptop" in [token["name"] for token in (await ann.get("/api/tokens")).json()]
        assert (await ann.delete("/api/tokens/ann@laptop")).status_code == 200
        assert (await command.get("/api/auth")).status_code == 401

    for name in ("HOLD_SECONDS", "LOOK_SECONDS"):
        monkeypatch.setattr(device_logins, name, 1000.0)
    on_host(check)


@pytest.mark.usefixtures("_at_once")
def test_the_token_ends_with_the_browsers_last_day_and_so_do_those_that_it_makes(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest) -> None:
        _, browser = await logged_in(host)
        asked = await ask(host)
        await confirm(browser, asked)
        secret = (await take(host, asked)).json()["token"]
        made = await host.client(secret).post("/api/tokens", json={"name": "more"})
        host.clock.now += LONGEST_SECONDS
        for each in (secret, made.json()["token"]):
            assert (await host.client(each).get("/api/auth")).json()["error"] == "token_expired"

    on_host(check)


@pytest.mark.usefixtures("_at_once")
def test_codes_are_good_once_and_in_no_page_log_or_database(on_host: Callable[..., None], tmp_path: Path) -> None:
    async def check(host: HostUnderTest) -> None:
        _, browser = await logged_in(host)
        asked = await ask(host)
        pages = [await question(browser, asked), await confirm(browser, asked)]
        assert (await question(browser, asked)).status_code == 401
        kept = b"".join(path.read_bytes() for path in tmp_path.glob("host.db*"))
        answer = await take(host, asked)
        assert answer.status_code == 201
        secret = answer.json()["token"]
        again = await take(host, asked)
        assert (again.status_code, again.json()["error"]) == (400, "expired_token")
        await host.audit.written()
        written = (tmp_path / "audit.jsonl").read_text()
        kept += b"".join(path.read_bytes() for path in tmp_path.glob("host.db*")) + written.encode()
        for each in (secret, asked["device_code"], asked["user_code"], asked["user_code"].replace("-", "")):
            assert each.encode() not in kept
        for each in (secret, asked["device_code"]):
            assert not any(each in page.text for page in pages)
        lines = {line["event"]: line for line in map(json.loads, written.splitlines())}
        confirmed, made = lines["device_login_confirmed"], lines["token_made"]
        assert (confirmed["user"], confirmed["via"], confirmed["machine"]) == ("ann", "browser", "ann@laptop")
        assert (made["of_user"], made["label"], made["by"]) == ("ann", "ann@laptop", "device")

    on_host(check)


@pytest.mark.usefixtures("_at_once")
def test_a_login_that_is_refused_gives_no_token(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest) -> None:
        ann, browser = await logged_in(host)
        asked = await ask(host)
        assert "It was refused." in (await confirm(browser, asked, "no")).text
        answer = await take(host, asked)
        assert (answer.status_code, answer.json()["error"]) == (400, "access_denied")
        assert (await confirm(browser, asked)).status_code == 401
        assert {token["kind"] for token in (await ann.get("/api/tokens")).json()} == {"user", "browser"}
        assert len((await ann.get("/api/tokens")).json()) == 2

    on_host(check)


@pytest.mark.usefixtures("_at_once")
def test_a_login_that_nobody_confirms_ends_after_ten_minutes(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest) -> None:
        _, browser = await logged_in(host)
        asked = await ask(host)
        assert asked["expires_in"] == CODE_SECONDS == 600
        assert (await take(host, asked)).json()["error"] == "authorization_pending"
        page = await question(browser, asked)
        host.clock.now += CODE_SECONDS
        late = await browser.ask("POST", "/device", data={**hidden(page), "answer": "yes"})
        assert (late.status_code, "has run out" in late.text) == (401, True)
        assert (await take(host, asked)).json()["error"] == "expired_token"

    on_host(check)


@pytest.mark.usefixtures("_at_once")
def test_only_the_page_that_shows_who_asks_confirms_and_only_for_the_one_that_it_showed(
    on_host: Callable[..., None],
) -> None:
    async def check(host: HostUnderTest) -> None:
        _, browser = await logged_in(host)
        asked, other = await ask(host), await ask(host, "mallory@evil")
        sent = {**hidden(await question(browser, asked)), "answer": "yes"}
        senders: list[dict[str, Any]] = [
            {"site": "cross-site"},
            {"site": "same-site"},
            {"origin": "https://evil.example"},
        ]
        for sender in senders:
            assert (await browser.ask("POST", "/device", data=sent, **sender)).status_code == 403
        link = f"/device?code={asked['user_code']}&answer=yes"
        assert asked["user_code"] not in (await browser.open(link, site="cross-site")).text
        for wrong in ({**sent, "asked": ""}, {**sent, "code": other["user_code"]}, {**sent, "answer": "maybe"}):
            await browser.ask("POST", "/device", data=wrong)
        for each in (asked, other):
            assert (await take(host, each)).json()["error"] == "authorization_pending"
        assert (await browser.ask("POST", "/device", data=sent)).status_code == 200

    on_host(check)


def test_who_is_not_logged_in_logs_in_first_and_comes_back(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest) -> None:
        _, token = await host.person("ann")
        asked, browser = await ask(host), Browser(host)
        for answer in (await browser.open("/device"), await question(browser, asked)):
            assert (answer.status_code, answer.headers["location"]) == (303, "/login?next=%2Fdevice")
        form = await browser.open("/login?next=%2Fdevice")
        assert hidden(form) == {"next": "/device"}
        answer = await browser.ask("POST", "/login", data={"token": token, "next": "/device"})
        assert answer.headers["location"] == "/device"
        assert "Never type one that somebody has sent you" in (await browser.open("/device")).text
        for place in ("https://evil.example", "//evil.example/device", "/\\evil.example", "device", '"><b>evil'):
            out = Browser(host)
            assert "evil" not in (await out.open(f"/login?next={place}")).text
            answer = await out.ask("POST", "/login", data={"token": token, "next": place})
            assert answer.headers["location"] == "/"

    on_host(check)


def test_what_a_command_line_says_of_itself_is_shown_as_text_and_bounded(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest) -> None:
        for machine in ("<b>", "", "x" * 64, "a\nb", "\u202e", " x"):
            answer = await host.nobody.post("/api/auth/device", json={"machine": machine})
            assert (answer.status_code, set(answer.json())) == (400, {"error", "message"})
        _, browser = await logged_in(host)
        headers = {"X-Forwarded-For": "<i>1.2.3.4"}
        asked = (await host.nobody.post("/api/auth/device", json={"machine": "m"}, headers=headers)).json()
        assert (
            "127.0.0.1, which says that it is a proxy and asks for &lt;i&gt;1.2.3.4"
            in (await question(browser, asked)).text
        )

    on_host(check)


def test_guesses_are_answered_ever_later(on_host: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "LONGEST_WAIT", 0.0)

    async def check(host: HostUnderTest) -> None:
        _, browser = await logged_in(host)
        codes = [f"BBBB-BBB{letter}" for letter in "BCDFGHJKLMNP"]
        pages = await asyncio.gather(*(browser.ask("POST", "/device", data={"code": code}) for code in codes))
        assert 429 in {page.status_code for page in pages}
        takes = await asyncio.gather(*(take(host, {"device_code": f"x{n}"}) for n in range(12)))
        assert {answer.status_code for answer in takes} <= {400, 429}
        assert 429 in {answer.status_code for answer in takes}

    on_host(check, limits=Limits(max_requests=0, max_failures=1))


def test_one_address_has_so_many_command_lines_wait_and_no_more(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest) -> None:
        for _ in range(MOST_OF_ONE):
            await ask(host)
        full = await host.nobody.post("/api/auth/device", json={"machine": "m"})
        assert (full.status_code, full.json()["error"]) == (429, "too_many_logins")
        host.clock.now += CODE_SECONDS
        await ask(host)

    on_host(check)


def test_a_command_line_that_asks_twice_at_a_time_is_told_to_slow_down_and_is_let_go_at_the_end(
    on_host: Callable[..., None],
) -> None:
    async def check(host: HostUnderTest) -> None:
        asked = await ask(host)
        both = [asyncio.ensure_future(take(host, asked)) for _ in range(2)]
        done, held = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        assert [(each.result().status_code, each.result().json()["error"]) for each in done] == [(400, "slow_down")]
        host.devices.close()
        assert [(await each).json()["error"] for each in held] == ["authorization_pending"]

    on_host(check)


@pytest.mark.usefixtures("_at_once")
def test_what_ends_between_confirming_and_taking_ends_the_login(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest) -> None:
        _, browser = await logged_in(host)
        asked = await ask(host)
        await confirm(browser, asked)
        await browser.ask("POST", "/logout")
        assert (await take(host, asked)).json()["error"] == "access_denied"
        _, browser = await logged_in(host, "bob")
        asked = await ask(host)
        await confirm(browser, asked)
        await host.user.delete("/api/users/bob")
        assert (await take(host, asked)).json()["error"] == "access_denied"

    on_host(check)


@pytest.mark.usefixtures("_at_once")
def test_such_tokens_count_among_the_users_and_each_has_a_name_of_its_own(on_host: Callable[..., None]) -> None:
    async def check(host: HostUnderTest) -> None:
        ann, browser = await logged_in(host)
        await host.user.patch("/api/users/ann/limits", json={"tokens": 3})
        names = []
        for machine in ("x" * 63, "x" * 63, "y"):
            asked = await ask(host, machine)
            await confirm(browser, asked)
            answer = await take(host, asked)
            names.append(answer.json().get("name") or answer.json()["error"])
        assert names == ["x" * 63, "x" * 61 + "-2", "over_limit"]
        assert len((await ann.get("/api/tokens")).json()) == 4  # with the browser

    on_host(check)


def test_a_host_hears_what_another_one_on_its_database_was_told(
    on_host: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check(host: HostUnderTest) -> None:
        _, browser = await logged_in(host)
        asked = await ask(host)
        codes = DeviceCodes(host.store, host.people._accounts, clock=host.clock)
        other = DeviceLogins(codes, host.credentials, host.audit)
        waiting = asyncio.ensure_future(other.take(asked["device_code"]))
        await confirm(browser, asked)
        token, _ = await waiting
        assert token.name == "ann"

    monkeypatch.setattr(device_logins, "LOOK_SECONDS", 0.05)
    on_host(check)


def test_a_command_lines_name_is_one_that_a_token_can_have(monkeypatch: pytest.MonkeyPatch) -> None:
    for user, machine, name in (
        ("ann", "laptop", "ann@laptop"),
        ("山田", "höst.example", "h-st.example"),
        ("", "x" * 100, "x" * 63),
        ("", "...", "command line"),
    ):
        monkeypatch.setattr("getpass.getuser", lambda user=user: user)
        monkeypatch.setattr("socket.gethostname", lambda machine=machine: machine)
        assert DeviceRequest(machine=machine_name()).machine == machine_name()
        assert name in machine_name()

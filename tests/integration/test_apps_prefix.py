"""Apps of a host without names for them: each under a path of the one origin, and what is kept apart there."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from kohakuriver.host.apps.addresses import PREFIX_VARIABLE
from kohakuriver.host.apps.serving import where_in
from tests.support.apps import Surfer
from tests.support.scene import Check, Scene, code_for, come_by, enter, scene
from tests.support.up import Commands

__all__ = ["scene"]

HOST, APPS = "http://river.example.org", "http://apps.example.org"
KEY = f"Sec-WebSocket-Version: 13\nSec-WebSocket-Key: {'A' * 22}=="


@pytest.fixture
def prefixed(scene: Callable[..., None]) -> Callable[..., None]:
    """Run a check with a scene whose apps are all at APPS, or where it is said."""

    def go(check: Check, *, apps_url: str = APPS, **how: Any) -> None:
        scene(check, where=where_in(None, HOST, [], 80, apps_url), **how)

    return go


async def another(made: Scene) -> str:
    """The prefix of the same service as a port of another task, which the browser has opened."""
    task = await made.stage.host.create(name="other", command=["true"])
    base = made.stage.app(task, made.app.port)
    answer = await made.surfer.go(f"{HOST}/open/other/{made.app.port}", site="same-origin")
    assert dict(answer.json()["fields"])["X-Forwarded-Prefix"] == urlsplit(base).path
    return base


def prefix_of(made: Scene) -> str:
    return urlsplit(made.origin).path


def test_a_click_on_the_hosts_page_leads_to_the_service_under_its_prefix(prefixed: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        answer = await made.surfer.go(made.link, site="same-origin")
        assert made.surfer.been[-1] == f"GET {made.origin}/"
        assert made.origin.startswith(f"{APPS}/lab-")
        told = answer.json()
        fields = dict(told["fields"])
        assert (told["path"], fields["Host"]) == ("/", f"localhost:{made.app.port}")
        assert (fields["X-Forwarded-Prefix"], fields["X-Forwarded-Host"]) == (prefix_of(made), "apps.example.org")
        posted = await made.get("/a?b", method="POST", site="same-origin", headers={"Origin": APPS}, data={"c": "d"})
        assert (posted.json()["path"], posted.json()["body"]) == ("/a?b", "c=d")
        async with made.stage.websocket(made.surfer, f"{made.origin}/socket") as ws:
            await ws.send("there")
            assert await ws.recv() == "there"
        about = (await made.surfer.ask(f"{HOST}/api/auth", site="same-origin")).json()
        assert (about["apps"], about["apps_prefix"]) == (True, True)

    prefixed(check, there=False)


def test_cookies_of_ours_are_of_the_prefix_alone_and_no_service_sees_them(prefixed: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        page = await made.surfer.go(made.link, site="same-origin", until="/.kohakuriver/enter")
        code = re.search(r'name="code" value="([^"]*)"', page.text)
        assert code
        answer = await enter(made, made.surfer, code[1])
        [cookie, _] = answer.headers.get_list("set-cookie")
        about = cookie.partition("; ")[2]
        assert about == f"Max-Age=604800; Path={prefix_of(made)}/; HttpOnly; SameSite=Lax"
        assert answer.headers["location"] == f"{prefix_of(made)}/"
        assert made.surfer.jar.get("apps.example.org", {}) == {}
        for request in made.app.asked:
            assert "kohakuriver-" not in str(request.headers)
        cookies = (await made.get("/cookie")).headers.get_list("set-cookie")
        assert cookies == [f"theirs=1; Path={prefix_of(made)}/"]

    prefixed(check, there=False)


def test_the_owner_has_a_service_told_paths_with_the_prefix_and_the_task_is_told_that_one(
    prefixed: Callable[..., None],
) -> None:
    async def check(made: Scene) -> None:
        host = made.stage.host
        [ordered] = [body for method, path, body in made.stage.runner.asked if (method, path) == ("POST", "/api/tasks")]
        assert f"{ordered['env'][PREFIX_VARIABLE]}/{made.app.port}" == prefix_of(made)
        for kept in (True, False):
            answer = await host.user.post("/api/tasks/lab/web", json={"keep_prefix": kept})
            assert (answer.json()["keep_prefix"], answer.json()["preserve_host"]) == (kept, False)
            await made.surfer.go(made.link, site="same-origin")
            path = f"{prefix_of(made)}/" if kept else "/"
            await made.told(path, f"localhost:{made.app.port}")  # the session that is open goes by it
            told = (await made.get("/")).json()
            assert ("X-Forwarded-Prefix" in dict(told["fields"])) is not kept
        assert [event["keep_prefix"] for event in made.events() if event["event"] == "task_changed"] == [True, False]

    prefixed(check, there=False)


async def variables(made: Scene, **body: Any) -> Any:
    """Those that a new task is ordered with."""
    await made.stage.host.create(name="second", command=["true"], **body)
    return made.stage.runner.asked[-1][2].get("env", {})


def test_a_task_that_says_a_prefix_itself_keeps_that(prefixed: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        env = {PREFIX_VARIABLE: "/mine"}
        assert await variables(made, env=env) == env

    prefixed(check, there=False)


def test_a_task_is_told_no_prefix_where_apps_have_names(scene: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        assert await variables(made) == {}

    scene(check, there=False)


def test_what_is_typed_or_ends_without_a_slash_leads_to_the_app(prefixed: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        for url in (made.origin, f"{made.origin}?x=1", f"{APPS}/lab/{made.app.port}", f"{APPS}/lab/{made.app.port}/y"):
            answer = await made.surfer.go(url)
            assert answer.json()["path"] in ("/", "/?x=1")
            assert made.surfer.been[-1].startswith(f"GET {made.origin}/")
        for path in ("/", "/favicon.ico", "/static/app.js", "/api/auth", "/login", "/health", "/.kohakuriver/enter"):
            answer = await made.surfer.ask(f"{APPS}{path}")
            assert (answer.status_code, "X-Forwarded-Prefix" in answer.text) == (404, True)
        assert {each.path for each in made.app.asked} == {"/"}

    prefixed(check)


def test_who_was_away_comes_back_to_the_path_that_they_came_for(prefixed: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        stranger = Surfer(made.stage.host)
        await stranger.go(f"{made.origin}/tree?x=1")
        (place,) = parse_qs(urlsplit(stranger.been[-1].removeprefix("GET ")).query)["next"]
        there = (await stranger.fill_in(made.stage.host.admin_token, next=place)).headers["location"]
        assert there == place
        assert (await stranger.go(HOST + there)).json()["path"] == "/tree?x=1"

    prefixed(check, there=False)


def test_a_host_that_is_told_nonsense_says_so_and_does_not_start(tmp_path: Path) -> None:
    at = ("host", "--bind=127.0.0.1", "--port=0", "--ssh-port=0")
    public = "--public-url=https://river.example.org"
    for options, sentence in (
        (["--apps-port=0"], "--apps-port goes with --apps-url"),
        ([public, "--apps-url=apps.example.org"], "'apps.example.org' is no URL of a host: give one as in `--apps-url"),
        ([public, "--apps-url=https://apps.example.org", "--apps-domain=apps.example.org"], "not both"),
        ([public, "--apps-url=https://river.example.org"], "--apps-url must have another name or port"),
        (["--apps-url=https://apps.example.org"], "--apps-url needs the host's own address"),
    ):
        done = Commands(tmp_path).run(*at, *options)
        assert (done.returncode, sentence in done.stderr) == (2, True), done.stderr


def test_services_are_told_paths_as_the_owner_says_on_the_command_line(prefixed: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        commands = Commands(made.stage.host.audit.path.parent / "admin")
        commands.environment |= {
            "KOHAKURIVER_HOST": made.stage.host.url,
            "KOHAKURIVER_TOKEN": made.stage.host.admin_token,
        }
        said = await asyncio.to_thread(commands.succeed, "vps", "web", "lab", "--keep-prefix")
        assert "are told localhost and their own port, with paths as the browser has them" in said
        assert "as the browser has them" in await asyncio.to_thread(commands.succeed, "vps", "status", "lab")
        told = await asyncio.to_thread(commands.succeed, "vps", "web", "lab", "--preserve-host", "--json")
        assert (json.loads(told)["preserve_host"], json.loads(told)["keep_prefix"]) == (True, True)
        refused = await asyncio.to_thread(commands.run, "vps", "web", "lab")
        assert (refused.returncode, "--keep-prefix" in refused.stderr) == (2, True)
        answer = await made.stage.host.user.post("/api/tasks/lab/web", json={})
        assert (answer.status_code, "keep_prefix" in answer.json()["message"]) == (400, True)

    prefixed(check, there=False)


def test_addresses_in_other_fields_are_those_of_both_sides_too(prefixed: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        answer = await made.get("/refreshing")
        assert answer.headers["refresh"] == f"0; url={prefix_of(made)}/landed?x"
        assert answer.headers["link"] == f"<{APPS}{prefix_of(made)}/next>; rel=next"
        for own in (f"{made.origin}/b", f"{prefix_of(made)}/b"):
            headers = {"Origin": APPS, "Destination": own, "If": f"<{own}> (<urn:uuid:1>)"}
            moved = await made.get("/a", method="MOVE", site="same-origin", headers=headers)
            fields = dict(moved.json()["fields"])
            inner = f"http://localhost:{made.app.port}/b" if own.startswith("http") else "/b"
            assert (fields["Destination"], fields["If"]) == (inner, f"<{inner}> (<urn:uuid:1>)")

    prefixed(check)


# -- what is kept apart ----------------------------------------------------------------------------------------------


def test_the_cookie_of_one_prefix_opens_no_other(prefixed: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        other = await another(made)
        asked = len(made.app.asked)
        guest = Surfer(made.stage.host)
        own, foreign = made.surfer.cookies(f"{made.origin}/"), made.surfer.cookies(f"{other}/")
        assert own != foreign
        guest.jar[f"apps.example.org{urlsplit(other).path}"] = own  # as a page of the first could set it there
        assert (await guest.ask(f"{other}/")).status_code == 303
        cors = {"Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"}
        assert (await guest.ask(f"{other}/", site="same-origin", headers=cors)).status_code == 401
        with pytest.raises(InvalidStatus, match="401"):
            async with made.stage.websocket(guest, f"{other}/socket"):
                pass
        both = "; ".join(f"{name}={value}" for jar in (own, foreign) for name, value in jar.items())
        assert (await guest.ask(f"{other}/", headers={"Cookie": both})).status_code == 303  # of two none counts
        assert len(made.app.asked) == asked

    prefixed(check)


def test_a_code_and_a_begin_are_no_good_at_another_prefix_nor_twice(prefixed: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        other = await another(made)
        began = next(url for url in reversed(made.surfer.been) if "/begin?" in url).partition("?")[2]
        answer = await made.surfer.ask(f"{made.origin}/.kohakuriver/begin?{began}")
        assert answer.status_code == 403
        code = await code_for(made)
        state = dict(made.surfer.cookies(f"{made.origin}/"))
        before = dict(made.surfer.cookies(f"{other}/"))
        made.surfer.jar[f"apps.example.org{urlsplit(other).path}"] = {**before, **state}
        assert (await enter(made, made.surfer, code, other)).status_code == 401
        assert (await enter(made, made.surfer, code)).status_code == 401  # it is used up
        code = await code_for(made)
        state = dict(made.surfer.cookies(f"{made.origin}/"))
        assert (await enter(made, made.surfer, code)).status_code == 303
        made.surfer.jar[f"apps.example.org{prefix_of(made)}"] = state
        assert (await enter(made, made.surfer, code)).status_code == 401

    prefixed(check, there=False)


def test_the_way_in_leads_to_no_other_place(prefixed: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        base = prefix_of(made)
        ways = ["//evil.example/", "https://evil.example/", "/", "/other/80/", f"{base}/../x", f"{base}/%2e%2e/x"]
        for path in (*ways, f"{base}/\\evil", f"{base}9/", base, "/\\evil.example", f"{base}/a\r\nX: y"):
            code = await code_for(made)
            jar = made.surfer.cookies(f"{made.origin}/")
            evil = base64.urlsafe_b64encode(path.encode()).decode().rstrip("=")
            name = "kohakuriver-state-80"
            jar[name] = f"{jar[name].partition('.')[0]}.{evil}"
            answer = await enter(made, made.surfer, code)
            assert (answer.status_code, answer.headers["location"]) == (303, f"{base}/"), path
        key = f"apps.example.org{base}"
        for app in (f"evil.example{base}", f"{key}/", f"{key}9", f"//{key}", "apps.example.org", f"{key}/../x"):
            query = f"app={app}&state={'0' * 64}"
            assert (await made.surfer.ask(f"{HOST}/enter-app?{query}")).status_code in (400, 404), app

    prefixed(check, there=False)


def test_no_path_leads_out_of_its_prefix(prefixed: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        other = urlsplit(await another(made)).path
        own, end = prefix_of(made), f"Host: apps.example.org\nCookie: {made.cookie}\nConnection: close\n\n"
        refused = ["/..", "/.", "%2e%2e", "%2E.", ".%2e", "\\..\\", "/../", "/x/../.."]
        for path in [f"{own}/{part.lstrip('/')}{other}/x" for part in refused if part != "\\..\\"] + [
            f"{own}\\..{other}"
        ]:
            before = len(made.app.asked)
            answer = await made.raw(f"GET {path} HTTP/1.1\n{end}")
            assert answer.split(" ")[1] in ("400", "404"), (path, answer)
            assert len(made.app.asked) == before, path
        for path in (f"/{own}/", f"/x/..{own}/", f"/.{own}/", f"{own.upper()}/", own.replace("-", "%2d") + "/"):
            answer = await made.raw(f"GET {path} HTTP/1.1\n{end}")
            assert answer.split(" ")[1] in ("400", "404"), (path, answer)
        # What a service alone might take for a way out is told to the prefix's own, as it came.
        for path in (f"/..%2f..{other}/", f"//{other}/", f"/%2f..%2f{other}"):
            answer = await made.raw(f"GET {own}{path} HTTP/1.1\n{end}")
            assert answer.split(" ")[1] == "200"
            assert made.app.asked[-1].headers["X-Forwarded-Prefix"] == own
            assert made.app.asked[-1].raw_path == path

    prefixed(check)


def test_one_connection_goes_to_several_apps_and_never_to_the_host(prefixed: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        other = await another(made)
        made.app.asked.clear()
        requests = [
            f"GET {urlsplit(base).path}/x HTTP/1.1\nHost: apps.example.org\nCookie: "
            + "; ".join(f"{name}={value}" for name, value in made.surfer.cookies(f"{base}/").items())
            + "\n\n"
            for base in (made.origin, other, made.origin)
        ]
        last = "GET /health HTTP/1.1\nHost: river.example.org\nConnection: close\n\n"
        answer = await made.raw(*requests, last)
        assert re.findall(r"HTTP/1\.1 (\d+) ", answer) == ["200", "200", "200", "421"]
        told = [each.headers["X-Forwarded-Prefix"] for each in made.app.asked]
        assert told == [urlsplit(base).path for base in (made.origin, other, made.origin)]
        to_host = "GET /health HTTP/1.1\nHost: river.example.org\n\n"
        upgrade = (
            f"GET /ws/forward/lab/1 HTTP/1.1\nHost: apps.example.org\nConnection: Upgrade\nUpgrade: websocket\n{KEY}"
        )
        for then in (requests[0].replace("\n\n", "\nConnection: close\n\n"), f"{upgrade}\nX: Connection: close\n\n"):
            assert re.findall(r"HTTP/1\.1 (\d+) ", await made.raw(to_host, then)) == ["200", "421"]

    prefixed(check)


@pytest.mark.parametrize("apps_url", [APPS, f"{HOST}:8443"])
def test_a_page_of_an_app_does_nothing_at_the_host(prefixed: Callable[..., None], apps_url: str) -> None:
    """Nor where it is at another port of the host's name, to which browsers send the host's cookie, too."""

    async def check(made: Scene) -> None:
        cookie = "; ".join(f"{name}={value}" for name, value in made.surfer.jar["river.example.org"].items())
        for site in ("same-site", "cross-site", None):
            for method, path in (("GET", "/api/auth"), ("POST", "/api/auth/link"), ("POST", "/logout")):
                fields = {"Origin": apps_url, "Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"}
                answer = await made.surfer.ask(f"{HOST}{path}", method, site=site, headers=fields)
                assert (answer.status_code, path) == (403, path)
                assert "access-control-allow-origin" not in answer.headers
        assert (await made.surfer.ask(f"{HOST}/api/auth", site="same-origin")).status_code == 200
        for path in (f"/ws/forward/lab/{made.app.port}", "/ws/containers/lab/terminal"):
            head = f"GET {path} HTTP/1.1\nHost: river.example.org\nOrigin: {apps_url}\nCookie: {cookie}\n{KEY}"
            told = await made.raw(f"{head}\nConnection: Upgrade\nUpgrade: websocket\nX: Connection: close\n\n")
            assert told.split(" ")[1] in ("403", "404")
        answer = await made.get(headers={"Cookie": f"{cookie}; {made.cookie}; own=1"})
        assert dict(answer.json()["fields"])["Cookie"] == "own=1"
        own = {"Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "script"}
        query = f"app={urlsplit(made.origin).netloc}{prefix_of(made)}&state={'0' * 64}"
        assert (await made.surfer.ask(f"{HOST}/enter-app?{query}", site="same-site", headers=own)).status_code == 403

    prefixed(check, apps_url=apps_url)


def test_a_websocket_is_opened_by_pages_of_the_apps_origin_alone(prefixed: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        for each in (
            HOST,
            "http://evil.example",
            "null",
            "",
            f"{APPS}:8000",
            APPS.replace("http", "https"),
            f"{APPS}.",
        ):
            with pytest.raises(InvalidStatus, match="403"):
                async with made.stage.websocket(made.surfer, f"{made.origin}/socket", Origin=each):
                    pass

    prefixed(check)


def test_other_pages_may_do_what_a_link_may(prefixed: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        frame, cors = {"Sec-Fetch-Dest": "iframe"}, {"Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"}
        for method, how, status in (
            ("GET", {"site": "cross-site"}, 200),
            ("POST", {"site": "same-site", "headers": {"Origin": HOST}}, 403),
            ("GET", {"site": "same-site", "headers": cors}, 403),
            ("GET", {"site": "cross-site", "headers": frame}, 403),
            ("DELETE", {"site": None}, 403),
            ("POST", {"site": "same-origin"}, 200),
        ):
            assert (await made.get("/x", method=method, **how)).status_code == status, (method, how)

    prefixed(check)


# -- links and ends --------------------------------------------------------------------------------------------------


def test_whoever_has_a_link_opens_that_prefix_and_nothing_else(prefixed: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        host, guest = made.stage.host, Surfer(made.stage.host)
        other = await another(made)
        url = (await host.user.post("/api/tasks/lab/links", json={"port": made.app.port})).json()["url"]
        assert url.startswith(f"{made.origin}/.kohakuriver/link#krl_")
        answer = await come_by(guest, url)
        assert (answer.status_code, answer.headers["location"]) == (303, f"{prefix_of(made)}/")
        assert (await guest.ask(f"{made.origin}/")).json()["path"] == "/"
        assert (await guest.ask(f"{other}/")).status_code == 303
        secret = url.partition("#")[2]
        next_port = f"{made.origin.rpartition('/')[0]}/{made.app.port - 1}"
        for base in (other, next_port):
            post = partial(guest.ask, f"{base}/.kohakuriver/link", "POST", data={"code": secret})
            assert (await post(site="same-origin")).status_code == 401
            assert (await post(site="cross-site")).status_code == 403
        let_in = [place for place, jar in guest.jar.items() if any("-app-" in name for name in jar)]
        assert let_in == [f"apps.example.org{prefix_of(made)}"]

    prefixed(check, there=False)


def test_a_log_out_ends_what_is_open_under_every_prefix(prefixed: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        other = await another(made)
        async with contextlib.AsyncExitStack() as stack:
            opened = [
                await stack.enter_async_context(made.stage.websocket(made.surfer, f"{base}/socket"))
                for base in (made.origin, other)
            ]
            out = made.surfer.ask(f"{HOST}/logout", "POST", site="same-origin", headers={"Origin": HOST})
            assert (await out).status_code == 303
            for ws in opened:
                with pytest.raises(ConnectionClosed):
                    await ws.recv()
        for base in (made.origin, other):
            made.surfer.been.clear()
            await made.surfer.go(f"{base}/")
            assert urlsplit(made.surfer.been[-1].removeprefix("GET ")).path == "/login"

    prefixed(check)

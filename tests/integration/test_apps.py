"""Apps at the host: how a browser gets to a task's port by an address of its own, and who does not."""

from __future__ import annotations

import asyncio
import base64
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus

from kohakuriver.cli.pki import Authority
from kohakuriver.client.host import HostClient
from kohakuriver.config import Settings
from kohakuriver.host.apps import sessions, signed
from kohakuriver.host.apps.serving import where_in
from kohakuriver.limits import Limits
from kohakuriver.store.apps import APP_CODE_SECONDS
from kohakuriver.tls import ServerCertificate
from tests.support.apps import Surfer
from tests.support.hops import until
from tests.support.scene import SIZE, Scene, code_for, come_by, enter, scene

__all__ = ["scene"]


def test_a_service_is_told_the_browsers_address_where_the_tasks_owner_wants_that(scene: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        inner = f"localhost:{made.app.port}"
        for preserved in (True, False):
            answer = await made.stage.host.user.post("/api/tasks/lab/web", json={"preserve_host": preserved})
            assert answer.json()["preserve_host"] is preserved
            await made.surfer.go(made.link, site="same-origin")
            # The session that is open, too, goes by it.
            await made.told("/", made.host if preserved else inner)
            answer = await made.get("/x", method="POST", site="same-origin", headers={"Origin": made.origin})
            told = dict(answer.json()["fields"])
            assert told["Origin"] == (made.origin if preserved else f"http://{inner}")
        assert [event["preserve_host"] for event in made.events() if event["event"] == "task_changed"] == [True, False]

    scene(check, there=False)


def test_behind_a_trusted_proxy_service_and_audit_log_are_told_where_the_browser_is(scene: Callable[..., None]) -> None:
    """Of each request anew: a proxy asks for many over one connection."""

    async def check(made: Scene) -> None:
        for address in ("203.0.113.9", "203.0.113.10"):
            fields = {"X-Forwarded-For": f"198.51.100.1, {address}", "X-Forwarded-Host": "elsewhere.example.org"}
            told = dict((await made.get(headers=fields)).json()["fields"])
            assert (told["X-Forwarded-For"], told["X-Forwarded-Host"]) == (address, made.host)
        await made.surfer.ask(f"{made.surfer.main}/logout", "POST", site="same-origin", headers=fields)
        assert (await made.get("/", headers=fields)).status_code != 200
        await until(lambda: any(event["event"] == "session_closed" for event in made.events()))
        opened = next(event for event in made.events() if event["event"] == "session_opened")
        assert opened["from"].startswith("127.0.0.1")  # by which the browser came first

    scene(check, proxies=["127.0.0.1"])


# -- the way in ------------------------------------------------------------------------------------------------------


def test_a_click_on_the_hosts_page_leads_to_the_service_under_its_own_address(scene: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        listening = {"port": made.app.port, "proto": "tcp", "address": "0.0.0.0", "program": "python"}
        [container] = made.stage.runner.tasks
        made.stage.runner.answers[f"/api/tasks/{container}/ports"] = (200, {"ports": [listening]})
        page = await made.surfer.ask(f"{made.surfer.main}/plain", site="none")
        assert (await made.surfer.ask(f"{made.surfer.main}/api/auth", site="same-origin")).json()["apps"] is True
        assert f'href="/open/lab/{made.app.port}"' in page.text
        answer = await made.surfer.go(made.link, site="same-origin")
        told = answer.json()
        fields = dict(told["fields"])
        assert fields["Host"] == f"localhost:{made.app.port}"
        assert fields["X-Forwarded-Host"] == made.host
        assert fields["X-Forwarded-Proto"] == "http"
        assert made.surfer.been[-1] == f"GET {made.origin}/"

    scene(check, there=False)


def test_the_service_learns_neither_cookies_of_ours_nor_what_the_host_is_called(scene: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        made.surfer.cookies(made.origin)["own"] = "1"
        told = (await made.get()).json()
        assert dict(told["fields"])["Cookie"] == "own=1"
        secrets = [made.stage.host.logins.name, *made.surfer.cookies(made.origin).values()]
        for request in made.app.asked:
            text = f"{request.path_qs} {list(request.headers.items())}"
            assert not [secret for secret in secrets if len(secret) > 10 and secret in text]

    scene(check)


def test_nothing_that_lets_in_is_in_an_address(scene: Callable[..., None], tmp_path: Path) -> None:
    """Addresses get into logs and histories: there are hashes in them, and what only begins."""

    async def check(made: Scene) -> None:
        words = {
            word for url in made.surfer.been for values in parse_qs(urlsplit(url).query).values() for word in values
        }
        assert len(words) == 3  # begin's ticket, the address, the hash of the state
        for word in words:
            for url in (f"{made.origin}/.kohakuriver/enter", f"{made.surfer.main}/login"):
                stranger = Surfer(made.stage.host)
                answer = await stranger.ask(url, "POST", site="same-origin", data={"code": word, "token": word})
                assert answer.status_code in (401, 403)

    scene(check)


def test_on_ones_own_machine_an_address_tells_strangers_nothing_of_the_host(scene: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        for path in ("/", "/.kohakuriver/begin?ticket=x", "/.kohakuriver/enter"):
            answer = await Surfer(made.stage.host).ask(f"{made.origin}{path}")
            assert answer.status_code in (403, 404)
            assert made.stage.host.logins.name not in answer.text + str(answer.headers)
        assert "kohakuriver open lab" in (await Surfer(made.stage.host).ask(made.origin)).text

    scene(check, there=False)


def test_who_may_not_use_the_task_gets_no_way_in(scene: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        _, token = await made.stage.host.person("mallory")
        mallory = await made.stage.surfer(token)
        for url in (made.link, f"{mallory.main}/enter-app?app={made.host}&state={'0' * 64}"):
            answer = await mallory.go(url, site="same-origin")
            assert answer.status_code == 403
            assert "not yours" in answer.text
        nobody = Surfer(made.stage.host)
        await nobody.go(made.link)
        assert urlsplit(nobody.been[-1].removeprefix("GET ")).path == "/login"

    scene(check, there=False)


def test_whom_the_task_is_shared_with_gets_in_until_that_is_taken_back(scene: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        host = made.stage.host
        _, token = await host.person("ann")
        ann = await made.stage.surfer(token)
        assert (await host.user.post("/api/tasks/lab/shares", json={"user": "ann"})).status_code == 201
        assert (await ann.go(made.link, site="same-origin")).status_code == 200
        async with made.stage.websocket(ann, f"{made.origin}/socket") as ws:
            await ws.send("there")
            assert await ws.recv() == "there"
            assert (await host.user.delete("/api/tasks/lab/shares/ann")).status_code == 200
            with pytest.raises(ConnectionClosed):
                await ws.recv()
        answer = await ann.ask(made.origin)
        assert answer.status_code == 403
        assert (await made.get()).status_code == 200  # the owner's goes on

    scene(check, there=True)


def test_a_log_out_ends_what_is_open_at_once_and_the_address_lets_nobody_in(scene: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        async with made.stage.websocket(made.surfer, f"{made.origin}/socket") as ws:
            await ws.send("there")
            assert await ws.recv() == "there"
            out = await made.surfer.ask(
                f"{made.surfer.main}/logout", "POST", site="same-origin", headers={"Origin": made.surfer.main}
            )
            assert out.status_code == 303
            with pytest.raises(ConnectionClosed):
                await ws.recv()
        made.surfer.been.clear()
        await made.surfer.go(made.origin)
        assert urlsplit(made.surfer.been[-1].removeprefix("GET ")).path == "/login"

    scene(check)


def test_a_login_that_somebody_else_revokes_ends_what_is_open_within_two_seconds(scene: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        async with made.stage.websocket(made.surfer, f"{made.origin}/socket") as ws:
            listed = (await made.stage.host.user.get("/api/tokens")).json()
            token = next(each for each in listed if each["kind"] == "browser")
            # Past this host's own knowledge, as by another one on the same database.
            await made.stage.host.app_server.apps._credentials._accounts.revoke_token(token["id"])
            began = asyncio.get_running_loop().time()
            with pytest.raises(ConnectionClosed):
                await ws.recv()
            assert asyncio.get_running_loop().time() - began < 4  # two, and the time of a busy machine

    scene(check)


# -- codes -----------------------------------------------------------------------------------------------------------


def test_a_code_is_good_once(scene: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        code = await code_for(made)
        state = dict(made.surfer.cookies(made.origin))
        assert (await enter(made, made.surfer, code)).status_code == 303
        made.surfer.jar[urlsplit(made.origin).hostname or ""] = state
        assert (await enter(made, made.surfer, code)).status_code == 401
        assert (await made.get()).status_code == 403

    scene(check, there=False)


def test_a_code_is_good_for_half_a_minute(scene: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        code = await code_for(made)
        made.stage.host.clock.now += APP_CODE_SECONDS
        assert (await enter(made, made.surfer, code)).status_code == 401

    scene(check, there=False)


def test_a_code_is_no_good_at_another_address(scene: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        code = await code_for(made)
        other = made.stage.app(made.task, made.app.port - 1)
        port = urlsplit(made.origin).port
        made.surfer.cookies(other).update(made.surfer.cookies(made.origin))
        assert (await enter(made, made.surfer, code, other)).status_code == 401
        assert f"kohakuriver-app-{port}" not in made.surfer.cookies(other)
        assert (await enter(made, made.surfer, code)).status_code == 401  # nor anywhere else after that

    scene(check, there=False)


def test_a_code_lets_in_only_the_browser_that_was_sent_to_fetch_it(scene: Callable[..., None]) -> None:
    """Nobody logs another's browser in with a code of their own, nor themselves with a code that they have seen."""

    async def check(made: Scene) -> None:
        _, token = await made.stage.host.person("mallory")
        await made.stage.host.user.post("/api/tasks/lab/shares", json={"user": "mallory"})
        mallory = await made.stage.surfer(token)
        code = await code_for(made, mallory)
        victim = Surfer(made.stage.host)
        await victim.ask(f"{made.origin}/.kohakuriver/enter", "POST", site="cross-site", data={"code": code})
        assert victim.cookies(made.origin) == {}
        answer = await enter(made, victim, code)
        assert (answer.status_code, victim.cookies(made.origin)) == (403, {})
        await code_for(made, made.surfer)
        answer = await enter(made, made.surfer, code)  # with a state of its own
        assert answer.status_code == 401
        assert (await made.get()).status_code == 403

    scene(check, there=False)


def test_what_is_no_code_lets_nobody_in_and_is_not_shown_as_it_is(scene: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        url = f"{made.origin}/.kohakuriver/enter"
        for code in ("", "x" * 5000, "%00", '"><script>alert(1)</script>', "x&code=y"):
            made.surfer.jar.pop(urlsplit(made.origin).hostname or "", None)
            for site in ("cross-site", "same-origin"):
                answer = await made.surfer.ask(url, "POST", site=site, data={"code": code})
                assert "<script>alert" not in answer.text
                assert made.surfer.cookies(made.origin) == {}
            await code_for(made)
            assert (await enter(made, made.surfer, code)).status_code in (401, 413)
            assert (await made.get()).status_code == 403

    scene(check, there=False)


def test_the_way_in_leads_to_no_other_place(scene: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        port = urlsplit(made.origin).port
        for path in ("//evil.example/", "/\\evil.example", "https://evil.example/", "/a\r\nX: y", ""):
            code = await code_for(made)
            kept = made.surfer.cookies(made.origin)[f"kohakuriver-state-{port}"]
            evil = base64.urlsafe_b64encode(path.encode()).decode().rstrip("=")
            made.surfer.cookies(made.origin)[f"kohakuriver-state-{port}"] = f"{kept.partition('.')[0]}.{evil}"
            answer = await enter(made, made.surfer, code)
            assert (answer.status_code, answer.headers["location"]) == (303, "/")
        for app in (
            "evil.example",
            made.host + ".evil.example",
            f"lab-{made.app.port}.localhost:{port}",
            "",
            "x" * 999,
        ):
            answer = await made.surfer.ask(f"{made.surfer.main}/enter-app?app={app}&state={'0' * 64}")
            assert answer.status_code == 400
            assert "evil" not in answer.headers["content-security-policy"]

    scene(check, there=False)


def test_the_path_that_somebody_came_for_is_where_they_get(scene: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        made.stage.host.clock.now += signed.COOKIE_SECONDS + 1
        answer = await made.surfer.go(f"{made.origin}/lab/tree?reset=1")
        assert answer.json()["path"] == "/lab/tree?reset=1"

    scene(check)


def test_who_has_to_log_in_first_gets_to_the_app_after_that(scene: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        stranger = Surfer(made.stage.host)
        await stranger.go(made.link)
        token, asked = made.stage.host.admin_token, urlsplit(stranger.been[-1].removeprefix("GET "))
        assert asked.path == "/login"
        (place,) = parse_qs(asked.query)["next"]
        assert place == urlsplit(made.link).path
        answer = await stranger.fill_in(token, next=place)
        # A redirection to the app's site would be a form sent to that.
        assert (answer.status_code, f'content="0;url={place}"' in answer.text) == (200, True)
        assert (await stranger.go(made.link)).json()["path"] == "/"
        assert (await stranger.go(f"{stranger.main}/")).status_code == 200
        assert stranger.been[-1] == f"GET {stranger.main}/"  # where somebody was going is not kept
        for place in ("//evil.example", "/logout", "/open/lab/1/../..", "/enter-app?app=x", "https://evil.example"):
            assert (await stranger.fill_in(token, next=place)).headers["location"] == "/"

    scene(check, there=False)


def test_a_link_of_the_command_line_logs_in_and_leads_to_the_app(scene: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        host = made.stage.host
        async with HostClient(Settings(host.url, host.admin_token)) as client:
            link = await client.login_link(f"/open/lab/{made.app.port}")
        assert link.url.startswith(f"{made.surfer.main}/open/lab/{made.app.port}?code=")
        assert (await Surfer(host).go(link.url)).json()["path"] == "/"

    scene(check, there=False)


def test_under_a_domain_with_tls_all_of_it_works_and_cookies_are_of_one_address_alone(
    scene: Callable[..., None], tmp_path: Path
) -> None:
    made_for = Authority(tmp_path / "ca").issue(["river.example.org", "*.apps.example.org"], 1)
    certificate = ServerCertificate(made_for.cert, made_for.key)

    async def check(made: Scene) -> None:
        assert made.origin.startswith(f"https://lab-{made.app.port}-")
        assert made.origin.endswith(".apps.example.org")
        assert list(made.surfer.cookies(made.origin)) == ["__Host-kohakuriver-app"]
        fields = dict((await made.get()).json()["fields"])
        assert (fields["X-Forwarded-Proto"], "Cookie" in fields) == ("https", False)
        assert len((await made.get("/large")).content) == SIZE
        async with made.stage.websocket(made.surfer, f"{made.origin}/socket") as ws:
            await ws.send("there")
            assert await ws.recv() == "there"
        short = f"https://lab-{made.app.port}.apps.example.org/"
        assert (await made.surfer.go(short)).json()["path"] == "/"
        stranger = Surfer(made.stage.host)
        await stranger.go(f"{made.origin}/lab/tree?x=1")
        (place,) = parse_qs(urlsplit(stranger.been[-1].removeprefix("GET ")).query)["next"]
        there = (await stranger.fill_in(made.stage.host.admin_token, next=place)).headers["location"]
        assert there == place
        assert (await stranger.go(stranger.main + there)).json()["path"] == "/lab/tree?x=1"
        for name in ("apps.example.org", "x.apps.example.org", f"x.{made.host}", "lab-1-aaaaaaaaaaaa.apps.example.org"):
            answer = await made.surfer.ask(f"https://{name}/")
            assert answer.status_code in (303, 421)
            assert len(made.app.asked) == len([each for each in made.app.asked if each.host.startswith("localhost")])

    scene(check, certificate=certificate, where=where_in("apps.example.org", None, certificate.names, 443))


# -- who may do what at an address -----------------------------------------------------------------------------------


REQUESTS: list[tuple[str, dict[str, Any], int]] = [
    ("GET", {"site": "cross-site"}, 200),  # a link
    ("GET", {"site": "same-site"}, 200),
    ("POST", {"site": "same-site", "headers": {"Origin": "http://other.localhost"}}, 403),
    ("POST", {"site": "cross-site", "headers": {"Origin": "null"}}, 401),
    ("GET", {"site": "same-site", "headers": {"Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"}}, 403),
    ("GET", {"site": "cross-site", "headers": {"Sec-Fetch-Dest": "iframe"}}, 403),
    ("GET", {"site": "cross-site", "headers": {"Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "script"}}, 403),
    ("DELETE", {"site": None}, 403),
    ("POST", {"site": "same-origin"}, 200),
]


def test_other_pages_may_do_what_a_link_may(scene: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        for method, how, status in REQUESTS:
            answer = await made.get("/x", method=method, **how)
            assert (method, how, answer.status_code) == (method, how, status)

    scene(check)


def test_a_websocket_is_opened_only_by_a_page_of_the_address_itself(scene: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        others = (made.origin.replace("lab-", "lob-"), made.origin.replace("http", "https"), made.surfer.main)
        for each in ("http://evil.example", "null", "", "http://localhost:1", *others):
            with pytest.raises(InvalidStatus, match="403"):
                async with made.stage.websocket(made.surfer, f"{made.origin}/socket", Origin=each):
                    pass
        with pytest.raises(InvalidStatus, match="401"):
            async with made.stage.websocket(Surfer(made.stage.host), f"{made.origin}/socket"):
                pass

    scene(check)


def test_a_page_of_an_app_does_nothing_at_the_host(scene: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        made.surfer.cookies(made.surfer.main)
        for site in ("same-site", "cross-site"):
            fields = {"Origin": made.origin, "Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"}
            answer = await made.surfer.ask(f"{made.surfer.main}/api/auth", site=site, headers=fields)
            assert answer.status_code == 403
            assert "access-control-allow-origin" not in answer.headers
            fields = {"Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "script"}
            answer = await made.surfer.ask(
                f"{made.surfer.main}/enter-app?app={made.host}&state={'0' * 64}", site=site, headers=fields
            )
            assert answer.status_code == 403

    scene(check)


def test_no_cache_may_keep_what_the_host_itself_answers_at_an_address_whatever_its_path(
    scene: Callable[..., None],
) -> None:
    """Cache deception: a path that looks like a picture's, at which a page for one visitor is."""

    async def check(made: Scene) -> None:
        own = [f"/.kohakuriver/{name}{end}" for name in ("begin", "enter", "link") for end in ("", "?x=1", "/logo.png")]
        for surfer in (made.surfer, Surfer(made.stage.host)):
            for path in (*own, *(("/x.css", "/") if surfer is not made.surfer else ())):
                for method in ("GET", "POST"):
                    answer = await surfer.ask(f"{made.origin}{path}", method, site="same-origin", data={"code": "x"})
                    assert answer.headers["cache-control"] == "no-store", (method, path)
        assert len(made.app.asked) == 1

    scene(check)


def test_a_cookie_that_the_host_did_not_sign_lets_nobody_in(scene: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        name = f"kohakuriver-app-{urlsplit(made.origin).port}"
        head, claims, _ = made.surfer.cookies(made.origin)[name].split(".")
        unsigned = "eyJhbGciOiJub25lIn0"
        for cookie in ("x", "a.b.c", f"{unsigned}.e30.", f"{unsigned}.{claims}.", f"{head}.{claims}."):
            made.surfer.cookies(made.origin)[name] = cookie
            assert (await made.get()).status_code == 403
            cors = {"Sec-Fetch-Mode": "cors", "Sec-Fetch-Dest": "empty"}
            assert (await made.get(site="same-origin", headers=cors)).status_code == 401

    scene(check)


def test_of_two_cookies_that_differ_none_counts(scene: Callable[..., None]) -> None:
    """A page of a sibling may have set one of them, where there is no TLS: nobody is to work with another's login."""

    async def check(made: Scene) -> None:
        name, value = next(iter(made.surfer.cookies(made.origin).items()))
        for cookies, status in ((f"{name}={value}; {name}=x", 403), (f"{name}={value}; {name}={value}", 200)):
            assert (await made.get(headers={"Cookie": cookies})).status_code == status

    scene(check)


def test_the_cookie_of_one_address_opens_no_other_and_not_the_host(scene: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        other = made.stage.app(made.task, made.app.port - 1)
        made.surfer.cookies(other).update(made.surfer.cookies(made.origin))
        assert (await made.surfer.ask(other)).status_code == 403
        [cookie] = made.surfer.cookies(made.origin).values()
        stranger = Surfer(made.stage.host)
        stranger.cookies(stranger.main)[f"kohakuriver-host-{made.stage.port}"] = cookie
        assert (await stranger.ask(f"{stranger.main}/api/auth", site="same-origin")).status_code == 401
        assert (await made.stage.host.client(cookie).get("/api/auth")).status_code == 401

    scene(check)


def test_no_service_sets_a_cookie_of_ours_or_one_for_other_addresses(scene: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        answer = await made.get("/cookie")
        assert answer.headers.get_list("set-cookie") == ["theirs=1; Path=/"]

    scene(check)


# -- names -----------------------------------------------------------------------------------------------------------


def test_only_the_exact_name_leads_to_a_service(scene: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        task, port = made.task["task_id"], made.app.port
        tag = made.host.partition(".")[0].rpartition("-")[2]
        wrong = "a" * 12
        names = {
            f"lab-{port}-{wrong}.localhost": 401,
            f"lob-{port}-{tag}.localhost": 401,
            f"{task}-{port}-{tag}.localhost": 401,
            f"lab-{port - 1}-{tag}.localhost": 401,
            f"lab-{port}-{tag}.localhost.": 421,
            f"xn--lab-{port}-{tag}.localhost": 401,
        }
        for name, status in names.items():
            fields = f"Host: {name}:{made.stage.port}\nCookie: {made.cookie}\n"
            answer = await made.raw(f"GET / HTTP/1.1\n{fields}\n")
            assert answer.split(" ")[1] in (str(status), "421"), (name, answer)
        for wrong_port in (made.stage.port + 1, 80):
            host = f"{made.host.partition(':')[0]}:{wrong_port}"
            answer = await made.raw(f"GET / HTTP/1.1\nHost: {host}\nCookie: {made.cookie}\n\n")
            assert answer.split(" ")[1] in ("401", "421")
        assert not [each for each in made.app.asked if each.path != "/"]
        assert len(made.app.asked) == 1

    scene(check)


def test_no_other_field_says_which_service_is_meant(scene: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        end = f"Cookie: {made.cookie}\nConnection: close\n\n"
        for field in ("X-Forwarded-Host", "Forwarded", "X-Original-Host", "X-Host", "Host"):
            made.app.asked.clear()
            for host in ("evil.example", made.surfer.main.partition("//")[2]):
                await made.raw(f"GET / HTTP/1.1\nHost: {host}\n{field}: {made.host}\n{end}")
                assert not made.app.asked
            answer = await made.raw(f"GET / HTTP/1.1\nHost: {made.host}\n{field}: evil.example\n{end}")
            refused = field == "Host"
            assert answer.split(" ")[1] in (("400", "421") if refused else ("200",)), (field, answer)
            assert "evil" not in answer or field in ("X-Original-Host", "X-Host")
            assert len(made.app.asked) == (not refused)

    scene(check)


def test_a_name_that_is_made_to_lead_here_reaches_no_service(scene: Callable[..., None]) -> None:
    """DNS rebinding: the page's own name resolves to this machine, and its requests come with that name."""

    async def check(made: Scene) -> None:
        for name in ("evil.example", f"{made.host.partition(':')[0]}.evil.example"):
            host = f"{name}:{made.stage.port}"
            answer = await made.raw(f"GET / HTTP/1.1\nHost: {host}\nCookie: {made.cookie}\nConnection: close\n\n")
            assert answer.startswith("HTTP/1.1 403 ")
        assert len(made.app.asked) == 1

    scene(check)


def test_what_a_connection_began_with_it_stays(scene: Callable[..., None]) -> None:
    """A request to the other side, behind one that was let through, is not answered by the wrong one."""

    async def check(made: Scene) -> None:
        main = made.surfer.main.partition("//")[2]
        to_app = f"GET /hidden HTTP/1.1\nHost: {made.host}\nCookie: {made.cookie}\nConnection: close\n\n"
        to_host = f"GET /health HTTP/1.1\nHost: {main}\n\n"
        answer = await made.raw(to_host, to_app)
        assert re.findall(r"HTTP/1\.1 (\d+) ", answer) == ["200", "421"]
        assert [each.path for each in made.app.asked] == ["/"]
        answer = await made.raw(
            to_app.replace("Connection: close\n", ""), to_host.replace("\n\n", "\nConnection: close\n\n")
        )
        assert re.findall(r"HTTP/1\.1 (\d+) ", answer) == ["200", "421"]
        assert '"status"' not in answer
        key = f"Sec-WebSocket-Version: 13\nSec-WebSocket-Key: {'A' * 22}=="
        upgrade = f"X: Connection: close\nConnection: Upgrade\nUpgrade: websocket\n{key}"
        answer = await made.raw(to_host, f"GET /ws/forward/lab/1 HTTP/1.1\nHost: {made.host}\n{upgrade}\n\n")
        assert re.findall(r"HTTP/1\.1 (\d+) ", answer) == ["200", "421"]

    scene(check)


SMUGGLED = "GET /hidden HTTP/1.1\nHost: {app}\nCookie: {cookie}\n\n"


AMBIGUOUS = [
    "POST /a HTTP/1.1\nHost: {app}\nContent-Length: 4\nTransfer-Encoding: chunked\n\n0\n\n",
    "POST /a HTTP/1.1\nHost: {app}\nContent-Length: 4\nContent-Length: 0\n\n",
    "POST /a HTTP/1.1\nHost: {app}\nTransfer-Encoding: gzip, chunked\n\n0\n\n",
    "POST /a HTTP/1.1\nHost: {app}\nTransfer-Encoding : chunked\n\n0\n\n",
    "POST /a HTTP/1.1\nHost: {app}\nX: a\n Host: {main}\nContent-Length: 0\n\n",
    "GET http://{main}/a HTTP/1.1\nHost: {app}\n\n",
    "GET /a HTTP/1.1\nHost: {main}\nHost: {app}\n\n",
    "GET /a HTTP/1.1\nHost: {main}, {app}\n\n",
    "GET /a HTTP/1.1\nHost:\t{app}\x0b\n\n",
    "GET /a HTTP/1.1\nHost: {app}\x00\n\n",
    "PRI * HTTP/2.0\n\nSM\n\n",
    "CONNECT {app} HTTP/1.1\nHost: {app}\n\n",
]


def test_what_two_readers_could_take_differently_reaches_no_service(scene: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        names = {"app": made.host, "main": made.surfer.main.partition("//")[2], "cookie": made.cookie}
        for head in AMBIGUOUS:
            first = head.replace("\n\n", f"\nCookie: {made.cookie}\nSec-Fetch-Site: same-origin\n\n", 1)
            answer = await made.raw(first.format(**names), SMUGGLED.format(**names))
            assert [each.path for each in made.app.asked] == ["/"], (head, answer)
            assert "X-Forwarded-Proto" not in answer

    scene(check)


def test_what_the_host_alone_serves_is_not_at_an_address_and_the_other_way_round(scene: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        for path in ("/api/auth", "/login", "/health"):
            assert (await made.get(path)).json()["path"] == path
        token = made.stage.host.admin_token
        answer = await made.get("/api/auth", headers={"Authorization": f"Bearer {token}"})
        assert ["Authorization", f"Bearer {token}"] in answer.json()["fields"]  # the app's own business
        stranger = Surfer(made.stage.host)
        answer = await stranger.ask(f"{made.origin}/", headers={"Authorization": f"Bearer {token}"})
        assert answer.status_code == 403

    scene(check)


# -- links -----------------------------------------------------------------------------------------------------------


async def a_link(made: Scene, **how: Any) -> dict[str, Any]:
    answer = await made.stage.host.user.post("/api/tasks/lab/links", json={"port": made.app.port, **how})
    assert answer.status_code == 201, answer.text
    link: dict[str, Any] = answer.json()
    return link


def test_whoever_has_a_link_opens_that_port_and_nothing_else_until_it_is_taken_back(scene: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        host, guest = made.stage.host, Surfer(made.stage.host)
        link = await a_link(made)
        assert link["url"].startswith(f"{made.origin}/.kohakuriver/link#krl_")
        answer = await come_by(guest, link["url"])
        assert (answer.status_code, answer.headers["location"]) == (303, "/")
        assert (await guest.ask(made.origin)).json()["path"] == "/"
        secret = link["url"].partition("#")[2]
        for url in (f"{guest.main}/api/auth", f"{guest.main}/api/tasks"):
            assert (await host.client(secret).get(urlsplit(url).path)).status_code == 401
            assert (await guest.ask(url, site="same-origin")).status_code == 401
        assert (
            await guest.ask(
                f"{guest.main}/login",
                "POST",
                site="same-origin",
                data={"token": secret},
                headers={"Origin": guest.main},
            )
        ).status_code == 401
        other = made.stage.app(made.task, made.app.port - 1)
        answer = await guest.ask(f"{other}/.kohakuriver/link", "POST", site="same-origin", data={"code": secret})
        assert (answer.status_code, guest.cookies(other)) == (401, {})
        async with made.stage.websocket(guest, f"{made.origin}/socket") as ws:
            await ws.send("there")
            assert await ws.recv() == "there"
            [listed] = (await host.user.get("/api/tasks/lab/links")).json()
            assert (listed["id"], "url" in listed) == (link["id"], False)
            assert (await host.user.delete(f"/api/tasks/lab/links/{link['id']}")).status_code == 200
            with pytest.raises(ConnectionClosed):
                await ws.recv()
        gone = await guest.ask(made.origin)
        assert (gone.status_code, guest.cookies(made.origin)) == (401, {})
        assert host.logins.name not in gone.text + str(gone.headers)
        assert (await come_by(Surfer(host), link["url"])).status_code == 401
        await host.audit.written()
        lines = {event["event"]: event for event in made.events()}
        assert {"link_made", "link_ended"} <= set(lines)
        assert (lines["session_opened"]["via"], lines["session_opened"]["token"]) == ("link", link["id"])
        kept = b"".join(path.read_bytes() for path in host.audit.path.parent.glob("*") if path.is_file())
        assert secret.encode() not in kept

    scene(check, there=False)


def test_a_link_is_good_for_its_time_and_no_longer_than_the_token_that_made_it(scene: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        host, guest = made.stage.host, Surfer(made.stage.host)
        ann, _ = await host.person("ann")
        await ann.post("/api/tasks", json={"name": "anns", "backend": "process", "command": ["true"]})
        url = (await ann.post("/api/tasks/anns/links", json={"port": made.app.port})).json()["url"]
        own = (await ann.get("/api/auth")).json()["token"]["id"]
        assert (await ann.delete(f"/api/tokens/{own}")).status_code == 200
        assert (await come_by(guest, url)).status_code == 401
        link = await a_link(made, expires_in=7200)
        await come_by(guest, link["url"])
        assert (await guest.ask(made.origin)).status_code == 200
        host.clock.now += signed.COOKIE_SECONDS + 1  # nobody is asked again: who has the link could come by it anyway
        assert (await guest.ask(made.origin)).status_code == 200
        host.clock.now += 7200
        assert (await come_by(Surfer(host), link["url"])).status_code == 401

    scene(check, there=False)


def test_a_link_is_sent_by_its_own_page_alone(scene: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        page, _, secret = (await a_link(made))["url"].partition("#")
        guest = Surfer(made.stage.host)
        for site in ("cross-site", "same-site"):
            answer = await guest.ask(page, "POST", site=site, data={"code": secret})
            assert (answer.status_code, guest.cookies(made.origin)) == (403, {})
        shown = await guest.ask(page)
        policy = shown.headers["content-security-policy"]
        assert f"form-action {made.origin};" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy

    scene(check, there=False)


# -- sessions --------------------------------------------------------------------------------------------------------


def test_all_of_a_browsers_requests_to_a_port_go_by_one_session_that_the_audit_log_has(
    scene: Callable[..., None],
) -> None:
    async def check(made: Scene) -> None:
        await asyncio.gather(*(made.get(f"/{number}") for number in range(8)))
        assert len(made.stage.host.app_server.sessions.carrier.open) == 1
        await made.stage.host.app_server.close()
        await until(lambda: not made.stage.host.app_server.sessions.carrier.open)
        await made.stage.host.audit.written()
        [opened] = [event for event in made.events() if event["event"] == "session_opened"]
        [closed] = [event for event in made.events() if event["event"] == "session_closed"]
        assert (opened["via"], opened["user"], opened["port"], opened["name"]) == (
            "browser",
            "admin",
            made.app.port,
            "lab",
        )
        assert closed["bytes_to_user"] > 0
        assert opened["token"] in [
            event.get("token") for event in made.events() if event["event"] == "browser_logged_in"
        ]

    scene(check)


def test_sessions_of_browsers_are_among_those_that_a_user_may_have(scene: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        host = made.stage.host
        task, _ = await host.store.task_and_node("lab")
        caller, _ = await host.app_server.apps._credentials.caller(host.admin_token)
        grant = host.grants.open(caller, task)
        answer = await made.surfer.go(made.link, site="same-origin")
        assert answer.status_code == 429
        assert "limit &#x27;sessions&#x27; is 1" in answer.text
        grant.release()
        assert (await made.get()).status_code == 200

    scene(check, there=False, limits=Limits(max_requests=0, max_sessions=1))


def test_a_session_that_nobody_uses_ends(scene: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "KEEP_SECONDS", 0.0)

    async def check(made: Scene) -> None:
        await made.surfer.connections(made.origin).aclose()
        await until(lambda: not made.stage.host.app_server.sessions.carrier.open)
        assert await made.stage.host.grants.open_of("admin") == 0

    scene(check)


def test_a_download_goes_on_over_a_lost_connection_to_the_node(scene: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", made.stage.port)
        writer.write(f"GET /large HTTP/1.1\r\nHost: {made.host}\r\nCookie: {made.cookie}\r\n\r\n".encode())
        await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(1 << 20)
        made.stage.link.cut()
        await reader.readexactly(SIZE - (1 << 20))
        writer.close()
        assert made.stage.link.accepted >= 2

    scene(check)


def test_the_end_of_a_task_ends_what_is_open_to_it(scene: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        async with made.stage.websocket(made.surfer, f"{made.origin}/socket") as ws:
            assert (await made.stage.host.user.delete("/api/tasks/lab")).status_code == 200
            made.stage.link.cut()
            with pytest.raises(ConnectionClosed):
                await ws.recv()
        assert (await made.get()).status_code == 404

    scene(check)


def test_an_hour_later_the_browser_has_a_new_cookie_without_being_asked(scene: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        clock = made.stage.host.clock
        before = made.cookie
        clock.now += signed.COOKIE_SECONDS * 0.6
        answer = await made.get()
        assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store")
        assert made.cookie != before  # by the way, with an answer of the service
        assert "cache-control" not in (await made.get()).headers
        clock.now += signed.COOKIE_SECONDS * 1.1
        assert (await made.get(site="same-origin", headers={"Sec-Fetch-Mode": "cors"})).status_code == 401
        made.surfer.been.clear()
        assert (await made.surfer.go(made.origin)).status_code == 200
        assert any("/enter-app" in url for url in made.surfer.been)

    scene(check)


def test_a_port_that_nobody_listens_on_is_told_in_one_sentence(scene: Callable[..., None]) -> None:
    async def check(made: Scene) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            port = unused.getsockname()[1]
            answer = await made.surfer.go(f"{made.surfer.main}/open/lab/{port}", site="same-origin")
        assert answer.status_code == 502
        assert f"Nothing listens on port {port} of task lab." in answer.text

    scene(check, there=False)

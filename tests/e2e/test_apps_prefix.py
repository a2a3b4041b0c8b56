"""Apps of a host without names for them, in Chromium: all under one origin, of another name or port, over TLS."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from kohakuriver.cli.pki import Authority
from kohakuriver.host.apps.addresses import PREFIX_VARIABLE
from kohakuriver.host.dashboard import built
from tests.e2e.conftest import free_port, require, until
from tests.e2e.test_apps import open_by_hand
from tests.e2e.test_jupyterlab import SOURCE, Page, lab_in
from tests.e2e.test_login import text_of
from tests.support.up import Commands

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

# A service that knows nothing of prefixes: its page has relative addresses, its redirections and cookies have paths of
# its own. What its page has done, and what it is told of another address, are in its title.
SERVICE = """
import sys
from aiohttp import WSMsgType, web
PAGE = '''<!doctype html><title>there</title>
<form method="post" action="sent"><input name="word" value="form"><button>Send</button></form>
<a href="moved">Moved</a>
<script>
async function tries(other) {
  const told = {cookies: document.cookie};
  told.socket = await new Promise((done) => {
    const socket = new WebSocket(new URL("socket", location.href));
    socket.onopen = () => socket.send("echo");
    socket.onmessage = (message) => done(message.data);
    socket.onerror = () => done("failed");
  });
  told.own = await fetch("asked").then((answer) => answer.text());
  told.host = await fetch(other, {credentials: "include"}).then((answer) => answer.text(), () => "failed");
  for (const scope of ["/", "./"])
    told[scope] = await navigator.serviceWorker.register("worker.js", {scope}).then((made) => made.scope, String);
  document.title = JSON.stringify(told);
}
</script>'''
async def page(request):
    answer = web.Response(text=PAGE, content_type="text/html")
    answer.set_cookie(sys.argv[2], "1")
    return answer
async def sent(request):
    return web.Response(text="posted " + (await request.post())["word"])
async def moved(request):
    raise web.HTTPFound("/landed")
async def told(request):
    return web.Response(text=request.path + " " + " ".join(sorted(request.cookies)))
async def worker(request):
    fields = {"Service-Worker-Allowed": "/", "Content-Type": "text/javascript"}
    return web.Response(text="", headers=fields)
async def socket(request):
    answer = web.WebSocketResponse()
    await answer.prepare(request)
    async for message in answer:
        if message.type is WSMsgType.TEXT:
            await answer.send_str(message.data)
    return answer
app = web.Application()
app.add_routes([web.get("/", page), web.post("/sent", sent), web.get("/moved", moved), web.get("/socket", socket),
                web.get("/worker.js", worker), web.get("/{path:.*}", told)])
web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None)
"""


@dataclass
class Prefixed:
    """A host with TLS, whose apps are all at `apps`, and a runner; `commands` are its admin's."""

    commands: Commands
    main: str
    apps: str

    def create(self, name: str, *command: str, kept: bool = False) -> None:
        options = ("--keep-prefix",) if kept else ()
        self.commands.succeed("vps", "create", "--name", name, "--backend=process", *options, "--", *command)

    def log_in(self, browser: Any) -> None:
        link = self.commands.succeed("open", "--print").strip()
        # The command goes by the address, the browser by the name for people.
        browser.get(self.main + link.partition("//")[2][link.partition("//")[2].index("/") :])
        until(lambda: "code" in browser.current_url or browser.current_url == f"{self.main}/", "the login")


@pytest.fixture(scope="module", params=["name", "port"])
def prefixed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prefixed]:
    directory, port, other = tmp_path_factory.mktemp("prefixed"), free_port(), free_port()
    made = Authority(directory / "ca").issue(["river.localhost", "apps.localhost", "127.0.0.1"], 1)
    main = f"https://river.localhost:{port}"
    apps = f"https://apps.localhost:{port}" if request.param == "name" else f"https://river.localhost:{other}"
    commands = Commands(directory)
    with contextlib.closing(commands):
        commands.environment["KOHAKURIVER_CA_FILE"] = str(directory / "ca" / "ca.pem")
        options = [f"--tls-cert={made.cert}", f"--tls-key={made.key}", f"--public-url={main}", f"--apps-url={apps}"]
        options += [f"--apps-port={other}"] if request.param == "port" else []
        host = ("host", "--json", "--bind=127.0.0.1", f"--port={port}", "--ssh-port=0", *options)
        ready = commands.start(*host).event("ready")
        commands.environment["KOHAKURIVER_TOKEN"] = (directory / "host" / "admin-token").read_text().strip()
        commands.environment["KOHAKURIVER_HOST"] = ready["url"]
        runner = ("--bind=127.0.0.1", "--port=0", f"--host-url={ready['url']}", "--backend=process")
        token = f"--node-token-file={directory / 'host' / 'node-token'}"
        commands.start("runner", "--json", *runner, token).event("registered")
        yield Prefixed(commands, main, apps)


@pytest.fixture
def services(prefixed: Prefixed, tmp_path: Path) -> Iterator[list[int]]:
    """The ports of the service in the tasks `first` and `second`, each with a cookie that is called so."""
    program, ports = tmp_path / "service.py", [free_port(), free_port()]
    program.write_text(SERVICE)
    for name, port in zip(("first", "second"), ports, strict=True):
        prefixed.create(name, sys.executable, str(program), str(port), name)
    yield ports
    for name in ("first", "second"):
        prefixed.commands.succeed("vps", "rm", name)


def open_there(prefixed: Prefixed, browser: Any, port: int) -> str:
    """Follow the link to a port on the host's page; where that leads, without the slash."""
    open_by_hand(prefixed.main, browser, port)
    until(lambda: browser.title == "there", "the page of the service")
    base: str = browser.current_url.rstrip("/")
    assert (base.startswith(f"{prefixed.apps}/"), base.endswith(f"/{port}")) == (True, True)
    return base


def test_a_page_works_under_its_prefix_and_gets_neither_at_the_host_nor_at_cookies_of_another(
    prefixed: Prefixed, services: list[int], browser: Any
) -> None:
    prefixed.log_in(browser)
    bases = [open_there(prefixed, browser, port) for port in services]
    browser.get(f"{bases[0]}/")
    browser.execute_script("tries(arguments[0])", f"{prefixed.main}/api/auth")
    until(lambda: browser.title.startswith("{"), "the tries")
    told = json.loads(browser.title)
    assert told.pop("/").startswith("SecurityError")  # a worker for all of the origin, which the service allows
    assert told == {
        "cookies": "first=1",
        "socket": "echo",
        "own": "/asked first",
        "host": "failed",
        "./": f"{bases[0]}/",
    }
    cookies = {each["name"]: each for each in browser.get_cookies()}
    ours = cookies.pop("__Secure-kohakuriver-app")
    path = urlsplit(bases[0]).path
    assert (ours["path"], ours["httpOnly"], ours["secure"], ours["sameSite"]) == (f"{path}/", True, True, "Lax")
    assert cookies.pop("first")["path"] == f"{path}/"
    assert [name for name in cookies if not name.startswith("__Host-Http-kohakuriver-host")] == []  # another port's
    browser.get(f"{bases[0]}/")
    browser.find_element("tag name", "button").click()
    until(lambda: browser.current_url == f"{bases[0]}/sent", "the form")
    assert "posted form" in browser.page_source
    browser.get(f"{bases[0]}/")
    browser.find_element("link text", "Moved").click()
    until(lambda: browser.current_url == f"{bases[0]}/landed", "the redirection")
    assert "/landed first" in browser.page_source
    # By its short address a page opens another app, and does not get to know its prefix.
    first = browser.current_window_handle
    browser.execute_script("window.other = open(arguments[0])", f"{prefixed.apps}/second/{services[1]}/")
    until(lambda: len(browser.window_handles) == 2, "the other window")
    browser.switch_to.window(browser.window_handles[1])
    until(lambda: browser.current_url == f"{bases[1]}/", "the other app")
    browser.switch_to.window(first)
    assert browser.execute_script("return other.closed || other.location.href") is True
    link = prefixed.commands.succeed("vps", "share", "first", "--link", str(services[0])).strip()
    browser.delete_all_cookies()
    browser.get(link)
    until(lambda: browser.current_url == f"{bases[0]}/" and browser.title == "there", "the page by the link")
    # Where the host has the same name, the page can set cookies for it, but none that it takes for a login.
    mine = f"__Host-Http-kohakuriver-host-{urlsplit(prefixed.main).port}"
    for name in ("__Host-own", mine):
        browser.execute_script("document.cookie = `${arguments[0]}=evil; Secure; Path=/`", name)
    told = browser.execute_script("return document.cookie")
    assert ("__Host-own=evil" in told, mine in told) == (True, False)
    prefixed.log_in(browser)
    names = [each["name"] for each in browser.get_cookies() if "-host-" in each["name"]]
    assert names == [mine if prefixed.main.rpartition(":")[0] in prefixed.apps else mine.replace("Http-", "")]


@pytest.mark.parametrize("prefixed", ["name"], indirect=True)
def test_the_dashboard_has_the_next_request_of_an_open_page_told_with_its_prefix(
    prefixed: Prefixed, services: list[int], browser: Any
) -> None:
    require(built(), "the dashboard")
    prefixed.log_in(browser)
    base = open_there(prefixed, browser, services[0])

    def choose(kept: bool) -> None:
        browser.get(f"{prefixed.main}/#/tasks/first")
        choice = until(lambda: browser.find_elements("name", "keep_prefix"), "the choice")[0]
        browser.find_element("css selector", ".told summary").click()
        choice.click()
        until(lambda: (choice.is_enabled(), choice.is_selected()) == (True, kept), "it is taken")

    def told(path: str) -> bool:
        browser.get(f"{base}/asked")
        return text_of(browser).startswith(f"{path} ")

    for kept, path in ((True, f"{urlsplit(base).path}/asked"), (False, "/asked")):
        choose(kept)
        until(partial(told, path), f"the service is told {path}")


@pytest.mark.parametrize("prefixed", ["name"], indirect=True)
def test_jupyterlab_and_tensorboard_that_are_told_their_prefix_work(
    prefixed: Prefixed, browser: Any, tmp_path: Path
) -> None:
    require(importlib.util.find_spec("tensorboard"), "tensorboard")
    port, board = free_port(), free_port()
    lab = [*lab_in(tmp_path, SOURCE, port), f"--ServerApp.base_url=${PREFIX_VARIABLE}/{port}/"]
    quoted = " ".join(f'"{word}"' for word in lab)
    logs = f"-m tensorboard.main --logdir {tmp_path} --host 127.0.0.1 --port {board} --path_prefix"
    prefixed.create(
        "jupyter",
        *("sh", "-c", f'{sys.executable} {logs} "${PREFIX_VARIABLE}/{board}" & exec {quoted}'),
        kept=True,
    )
    try:
        prefixed.log_in(browser)
        for each in (port, board):
            open_by_hand(prefixed.main, browser, each)
            if each == board:
                until(lambda: "TensorBoard" in browser.title, "TensorBoard")
                until(lambda: "No dashboards" in browser.execute_script("return document.body.innerText"), "its data")
                continue
            page = Page(browser, browser.current_url.partition(f"/{each}")[0] + f"/{each}")
            page.run_cell()
            until(lambda page=page: "computed 500500 in the task" in page.output(), "the output")  # type: ignore[misc]
    finally:
        prefixed.commands.succeed("vps", "rm", "jupyter")

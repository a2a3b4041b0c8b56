"""Ports of tasks in Chromium by the host's own addresses for them: no command line, and nobody's page in between."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from kohakuriver.host.dashboard import built
from tests.e2e.conftest import KOHAKURIVER, Cluster, free_port, require, until
from tests.e2e.test_dashboard import Page as Dashboard
from tests.e2e.test_dashboard import serving_files
from tests.e2e.test_jupyterlab import Page, jupyter
from tests.e2e.test_login import link_of, text_of
from tests.support.docker_images import busybox_image, require_engine
from tests.support.up import Apart

__all__ = ["jupyter"]

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

# A service whose page tells how its tries with another address went, which stands behind the # of its own.
TRYING = """
import http.server, sys
PAGE = b'''<!doctype html><title>trying</title><script>
const told = {cookies: document.cookie, referrer: document.referrer};
document.cookie = "tossed=1; Domain=localhost";
document.cookie = "tossed=1; Domain=" + location.hostname.split(".").slice(-1)[0];
const other = location.hash.slice(1);
async function tries() {
  for (const how of [{}, {mode: "no-cors"}, {method: "POST", mode: "no-cors", body: "x"}])
    told[JSON.stringify(how)] = await fetch(other + "/asked", {credentials: "include", ...how})
      .then((answer) => answer.text(), () => "failed");
  told.socket = await new Promise((done) => {
    const socket = new WebSocket(other.replace("http", "ws") + "/socket");
    socket.onopen = () => done("open");
    socket.onerror = () => done("failed");
  });
  told.frame = await new Promise((done) => {
    const frame = document.createElement("iframe");
    frame.onload = () => { try { done(frame.contentDocument ? "empty" : "other"); } catch { done("other"); } };
    frame.src = other + "/framed";
    document.body.append(frame);
  });
  document.title = JSON.stringify(told);
}
if (other) addEventListener("load", tries);
</script><body></body>'''
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.log_message(self.command + " " + self.path)
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.send_header("Content-Length", str(len(PAGE)))
        self.end_headers()
        self.wfile.write(PAGE)
    do_POST = do_GET
    def log_message(self, line, *_):
        with open(sys.argv[2], "a") as log:
            log.write(line + "\\n")
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def log_in(cluster: Cluster, browser: Any) -> str:
    """Log in to the host; its origin."""
    link = link_of(cluster)
    browser.get(link)
    return link.partition("/login")[0]


def open_by_hand(main: str, browser: Any, port: int) -> str:
    """Follow the link to a port on the host's page without scripts; the origin to which that leads."""
    browser.get(f"{main}/plain")

    def link() -> Any:
        browser.refresh()
        return next(iter(browser.find_elements("link text", f"Open {port}")), None)

    until(link, f"the link to port {port}").click()
    until(lambda: browser.current_url.split("/")[2] != main.split("/")[2], "the address of the port")
    until(lambda: "/.kohakuriver/" not in browser.current_url and "/enter-app" not in browser.current_url, "the app")
    parts = urlsplit(browser.current_url)
    return f"{parts.scheme}://{parts.netloc}"


def test_a_notebook_cell_runs_after_a_click_on_the_hosts_page(cluster: Cluster, jupyter: int, browser: Any) -> None:
    main = log_in(cluster, browser)
    origin = open_by_hand(main, browser, jupyter)
    name = urlsplit(origin).hostname or ""
    assert name.startswith(f"jupyter-{jupyter}-")
    page = Page(browser, origin)
    page.run_cell()
    until(lambda: "computed 500500 in the task" in page.output(), "the output is the kernel's")
    assert "kohakuriver" not in browser.execute_script("return document.cookie")
    browser.switch_to.new_window("tab")
    browser.get(f"{main}/plain")
    browser.find_element("tag name", "button").click()
    until(lambda: browser.current_url.endswith("/login"), "the log out")
    browser.get(f"{origin}/lab")
    until(lambda: browser.current_url.startswith(f"{main}/login?next="), "the host asks who that is")
    assert "Log in" in text_of(browser)


def test_whoever_has_to_log_in_by_the_form_first_gets_to_the_app_after_that(cluster: Cluster, browser: Any) -> None:
    with serving_files(cluster, "listed") as port:
        main = log_in(cluster, browser)
        origin = open_by_hand(main, browser, port)
        for there in (f"{origin}/", f"{main}/open/listed/{port}"):
            browser.get(f"{main}/plain")
            browser.find_element("tag name", "button").click()
            until(lambda: browser.current_url.endswith("/login"), "the log out")
            browser.get(there)
            until(lambda: browser.current_url.startswith(f"{main}/login?next="), "the host asks who that is")
            browser.find_element("id", "token").send_keys(cluster.token + "\n")
            until(lambda: "Directory listing" in browser.title, "the app")
            assert browser.current_url == f"{origin}/"


def test_the_page_of_one_app_gets_nowhere_in_another(
    cluster: Cluster, browser: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    service = tmp_path / "trying.py"
    service.write_text(TRYING)
    origins, logs = [], []
    main = log_in(cluster, browser)
    for name in ("mallorys", "anns"):
        port, log = free_port(), tmp_path / f"{name}.log"
        log.touch()
        cluster.create(name, sys.executable, str(service), str(port), str(log))
        request.addfinalizer(partial(cluster.remove, name))  # whatever fails: no other test is to meet it
        origins.append(open_by_hand(main, browser, port))
        logs.append(log)
    browser.get(f"{origins[0]}/#{origins[1]}")
    browser.refresh()
    until(lambda: browser.title.startswith("{"), "the tries")
    told = json.loads(browser.title)
    assert (told["cookies"], told["referrer"], told["socket"], told["frame"]) == ("", "", "failed", "other")
    assert {told["{}"], told['{"mode":"no-cors"}']} <= {"failed", ""}
    asked = logs[1].read_text()
    assert "/asked" not in asked
    assert "/socket" not in asked
    assert "/framed" not in asked
    browser.get(origins[1])
    assert "tossed" not in browser.execute_script("return document.cookie")
    browser.get(main)
    assert "tossed" not in str(browser.get_cookies())


def share(cluster: Cluster, *arguments: str) -> Any:
    """What `vps share` or `unshare` tells."""
    argv = [*KOHAKURIVER, "vps", *arguments, "--json"]
    done = subprocess.run(argv, env=cluster.env, capture_output=True, text=True, timeout=60, check=True)
    return json.loads(done.stdout)


def test_whoever_has_a_link_sees_that_port_without_a_login_until_it_is_taken_back(
    cluster: Cluster, browser: Any
) -> None:
    with serving_files(cluster, "shown") as port:
        link = share(cluster, "share", "shown", "--link", str(port), "--expires", "1h")
        browser.get(link["url"])
        until(lambda: "Directory listing" in text_of(browser), "the page of the service")
        origin = link["url"].partition("/.kohakuriver/")[0]
        assert browser.current_url == f"{origin}/"
        assert browser.execute_script("return document.cookie") == ""
        main = link_of(cluster).partition("/login")[0]
        browser.get(main)
        until(lambda: browser.current_url == f"{main}/login", "the host, which knows nobody")
        browser.get(f"{origin}/")
        until(lambda: "Directory listing" in text_of(browser), "the page of the service again")
        share(cluster, "unshare", "shown", "--link", link["id"])
        browser.refresh()
        until(lambda: "Directory listing" not in text_of(browser), "the link is taken back")
        browser.get(link["url"])
        until(lambda: "link" in text_of(browser), "it opens nothing any more")
        assert "Directory listing" not in text_of(browser)


TICKS = """#!/bin/busybox sh
printf 'Content-Type: text/plain\\r\\n\\r\\n'
tick=0
while echo "tick$((tick += 1))."; do /bin/busybox sleep 0.05; done
"""
# Reads what never ends, as pages of training runs and logs do.
READING = """<!doctype html><title>reading</title><script>
window.told = "";
async function read() {
  const reader = (await fetch("/cgi-bin/ticks")).body.pipeThrough(new TextDecoderStream()).getReader();
  for (let part; !(part = await reader.read()).done;) window.told += part.value;
  return "the end";
}
read().then((how) => { window.over = how; }, (error) => { window.over = String(error); });
</script>"""


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[Apart]:
    """A host and a runner whose containers outlive it, with the task `pages` that serves ticks."""
    require_engine()
    folder = tmp_path / "www"
    (folder / "cgi-bin").mkdir(parents=True)
    (folder / "index.html").write_text(READING)
    script = folder / "cgi-bin" / "ticks"
    script.write_text(TICKS)
    script.chmod(0o755)
    with contextlib.closing(Apart(tmp_path / "apart", runner_options=("--backend=docker",))) as apart:
        until(lambda: "online" in apart.run("node", "list").stdout, "the node is online")
        serve = ["/bin/busybox", "httpd", "-f", "-p", "8080", "-h", "/www"]
        apart.succeed(
            "vps", "create", "--name=pages", f"--image={busybox_image()}", f"--mount={folder}:/www:ro", "--", *serve
        )
        try:
            yield apart
        finally:
            apart.run("vps", "rm", "pages")


@pytest.mark.docker
def test_a_page_and_a_terminal_go_on_while_the_runner_is_killed_or_ended_and_started_again(
    apart: Apart, browser: Any
) -> None:
    from selenium.webdriver.common.keys import Keys

    require(built(), "the dashboard")
    terminal = Dashboard(browser)
    terminal.open(apart.succeed("open", "--print").strip())
    terminal.go("tasks/pages/terminal")
    terminal.shows("Shift+Esc")
    terminal.type("kept=here; echo begun-$((1 + 1))", Keys.ENTER)
    terminal.screen_shows("begun-2")
    first = browser.current_window_handle
    browser.switch_to.new_window("window")
    second = browser.current_window_handle
    browser.get(apart.succeed("open", "pages", "8080", "--at-host", "--print").strip())

    def ticks() -> list[int]:
        return [int(tick) for tick in re.findall(r"tick(\d+)\.", browser.execute_script("return window.told || ''"))]

    until(ticks, "the page reads")
    for how in (signal.SIGKILL, signal.SIGTERM):
        apart.runner.stop(how)
        if how is signal.SIGTERM:
            browser.switch_to.window(first)
            browser.refresh()  # a page that is opened while the tunnel is away waits for it, too
            browser.switch_to.window(second)
        before = ticks()[-1]
        apart.start_runner()
        until(lambda before=before: ticks()[-1] > before + 20, "the page reads on")  # type: ignore[misc]
        seen = ticks()
        assert seen == list(range(1, len(seen) + 1))
        browser.switch_to.window(first)
        until(lambda: "Shift+Esc" in terminal.text, "the terminal is back")
        terminal.type(f"echo $kept-over-{how.name}", Keys.ENTER)
        terminal.screen_shows(f"here-over-{how.name}")
        browser.switch_to.window(second)
        assert browser.execute_script("return window.over") is None

"""Logging in to a host in Chromium, and what pages of others can't do with that."""

from __future__ import annotations

import html
import http.server
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from tests.e2e.conftest import KOHAKURIVER, Cluster, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

HOSTILE = """<!doctype html><title>hostile</title>
<form method="post" action="{host}/logout"><button>x</button></form>
<iframe src="{host}/"></iframe>
<script>
const told = [];
for (const how of [{{}}, {{mode: "no-cors"}}, {{method: "POST", mode: "no-cors"}}])
  fetch("{host}/api/auth", {{credentials: "include", ...how}})
    .then((answer) => answer.text(), () => "failed").then((text) => told.push(text));
const waiting = setInterval(() => {{
  if (told.length == 3) {{ clearInterval(waiting); document.title = "told:" + told.join("|"); }}
}}, 50);
</script>
"""


def link_of(cluster: Cluster) -> str:
    argv = [*KOHAKURIVER, "open", "--print"]
    return subprocess.run(argv, env=cluster.env, capture_output=True, text=True, timeout=60, check=True).stdout.strip()


@pytest.fixture
def hostile(cluster: Cluster) -> Iterator[str]:
    """A page on another origin of the same machine, which tries what it can with the browser's login."""
    host = link_of(cluster).partition("/login")[0]
    page = HOSTILE.format(host=html.escape(host)).encode()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://hostile.localhost:{server.server_port}/"
        server.shutdown()


def text_of(browser: Any) -> str:
    """What the page says now; asked in one call, since another page may come between two."""
    return str(browser.execute_script("return document.body ? document.body.innerText : ''"))


def is_in(browser: Any) -> bool:
    """Whether the page is the host's own, of a browser that is logged in as the admin."""
    text = text_of(browser)
    return "Log out" in text and "admin" in text


def test_a_link_and_a_form_log_a_browser_in_and_a_button_logs_it_out(cluster: Cluster, browser: Any) -> None:
    link = link_of(cluster)
    browser.get(link)
    until(lambda: is_in(browser), "the host's page")
    assert "code=" not in browser.current_url
    browser.find_element("tag name", "button").click()
    until(lambda: browser.current_url.endswith("/login"), "the page that asks for a token")
    browser.find_element("id", "token").send_keys("kr_wrong\n")
    until(lambda: "does not know this token" in text_of(browser), "the error")
    browser.find_element("id", "token").send_keys(cluster.token + "\n")
    until(lambda: is_in(browser), "the host's page")
    assert browser.execute_script("return document.cookie") == ""
    assert [entry for entry in browser.get_log("browser") if "Security" in entry["message"]] == []


def test_a_page_of_another_origin_does_nothing_with_the_login(cluster: Cluster, browser: Any, hostile: str) -> None:
    link = link_of(cluster)
    browser.get(link)
    browser.get(hostile)
    until(lambda: browser.title.startswith("told:"), "the answers to the hostile page")
    assert "admin" not in browser.title
    browser.find_element("tag name", "button").click()
    until(lambda: "may not use" in text_of(browser) or "Only a page" in text_of(browser), "the refusal")
    browser.get(link.partition("/login")[0] + "/")
    until(lambda: is_in(browser), "the host's page")


def test_a_page_of_another_origin_can_not_log_the_browser_in_unasked(
    cluster: Cluster, browser: Any, hostile: str
) -> None:
    link = link_of(cluster)
    browser.get(hostile)
    browser.execute_script(f"location.href = {link!r}")
    until(lambda: "This link logs this browser in as admin" in text_of(browser), "the question")
    browser.find_element("tag name", "button").click()
    until(lambda: is_in(browser), "the host's page")

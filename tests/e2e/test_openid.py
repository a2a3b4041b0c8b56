"""Logging in at a real OpenID provider, and a command line by that, in Chromium: cookies and policies as they are."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kohakuriver.cli.pki import Authority
from tests.e2e.conftest import free_port, until
from tests.e2e.test_login import text_of
from tests.support.openid import CLIENT, SECRET, RealProvider, real_provider
from tests.support.up import Commands

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture
def provider(tmp_path: Path) -> Iterator[RealProvider]:
    with real_provider(tmp_path / "openid") as found:
        people = {"a1": ("ann", "lab"), "b2": ("bob", "lab"), "m3": ("mallory", "guests")}
        found.knows(**{key: {"preferred_username": name, "groups": [group]} for key, (name, group) in people.items()})
        yield found


def options_of(tmp_path: Path, provider: RealProvider) -> list[str]:
    """Those of a host with TLS and that provider, which lets one group in."""
    made = Authority(tmp_path / "openid").issue(["river.localhost", "apps.localhost", "127.0.0.1"], 1)
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    secret.chmod(0o600)
    options = [f"--tls-cert={made.cert}", f"--tls-key={made.key}", f"--oidc-issuer={provider.issuer}"]
    options += [f"--oidc-client-id={CLIENT}", f"--oidc-client-secret-file={secret}", "--oidc-allowed-group=lab"]
    options += [f"--oidc-ca-file={provider.ca_file}", f"--state-dir={tmp_path / 'host'}"]
    return ["host", "--json", "--bind=127.0.0.1", "--ssh-port=0", *options]


@pytest.fixture
def host(tmp_path: Path, provider: RealProvider) -> Iterator[tuple[Commands, str]]:
    """A host: somebody's commands with settings of their own, and its URL."""
    commands = Commands(tmp_path / "ann")
    started = commands.start(*options_of(tmp_path, provider), "--port=0")
    port = started.event("ready")["url"].rpartition(":")[2]
    yield commands, f"https://river.localhost:{port}"
    commands.close()


BUTTON = "return [...document.querySelectorAll('button')].find(each => each.innerText.startsWith(arguments[0]));"


def press(browser: Any, button: str) -> None:
    """Press the button with that text, once it is there."""
    until(lambda: browser.execute_script(BUTTON, button), f"the button {button}").click()


def come_in(browser: Any, provider: RealProvider, who: str) -> None:
    """Log in at the provider, on a page of the host that asks for it."""
    press(browser, "Log in with localhost:")
    until(lambda: browser.current_url.startswith(provider.issuer), "the provider's page")
    browser.find_element("name", "login").send_keys(who)
    browser.find_element("name", "password").send_keys("-\n")
    until(lambda: "Authorize" in browser.title or "Continue" in text_of(browser), "the question for consent")
    browser.find_element("css selector", "button[type=submit]").click()


def test_a_user_logs_in_at_the_provider_then_a_command_line_by_that_and_out_of_both(
    host: tuple[Commands, str], provider: RealProvider, browser: Any, tmp_path: Path
) -> None:
    commands, url = host
    browser.get(f"{url}/login")
    come_in(browser, provider, "a1")
    until(lambda: {"ann", "Log out"} <= set(text_of(browser).split("\n")), "the dashboard")
    assert browser.current_url == f"{url}/"
    cookies = {each["name"].rpartition("-")[0]: each for each in browser.get_cookies()}
    assert set(cookies) == {"__Host-kohakuriver-host"}
    (cookie,) = cookies.values()
    assert (cookie["secure"], cookie["httpOnly"], cookie["sameSite"]) == (True, True, "Lax")

    at = ("--host", f"https://127.0.0.1:{url.rpartition(':')[2]}", "--ca-file", str(tmp_path / "openid" / "ca.pem"))
    login = commands.start("auth", "login", "--web", *at)
    code = login.line("Type this code there", err=True).rpartition(" ")[2]
    browser.get(f"{url}/device")
    browser.find_element("id", "code").send_keys(code + "\n")
    until(lambda: "act as ann (user)" in text_of(browser), "the question")
    browser.save_screenshot(str(tmp_path / "question.png"))
    press(browser, "Yes, log it in as ann")
    until(lambda: "is logged in as ann" in text_of(browser), "the answer")
    assert login.line("as ann (user)")
    assert login.ended() == 0
    assert "@" in commands.succeed("token", "list")

    browser.get(f"{url}/")
    press(browser, "Log out")
    until(lambda: "You are logged out here" in text_of(browser), "the way out of the provider")
    browser.find_element("partial link text", "log out there").click()
    until(lambda: browser.current_url.startswith(provider.issuer), "the provider's question")
    browser.find_element("css selector", "button[name=logout], button[autofocus]").click()
    until(lambda: browser.current_url == f"{url}/login", "the host's page")
    assert [entry for entry in browser.get_log("browser") if "Security" in entry["message"]] == []


@pytest.fixture
def one_origin(tmp_path: Path, provider: RealProvider) -> Iterator[tuple[Commands, str, str]]:
    """An admin's commands for a host whose apps are all under one origin, and a runner; the URLs of host and apps."""
    commands, port = Commands(tmp_path / "admin"), free_port()
    main, apps = f"https://river.localhost:{port}", f"https://apps.localhost:{port}"
    with contextlib.closing(commands):
        commands.environment["KOHAKURIVER_CA_FILE"] = str(tmp_path / "openid" / "ca.pem")
        where = (f"--port={port}", f"--public-url={main}", f"--apps-url={apps}")
        ready = commands.start(*options_of(tmp_path, provider), *where).event("ready")
        commands.environment["KOHAKURIVER_TOKEN"] = (tmp_path / "host" / "admin-token").read_text().strip()
        commands.environment["KOHAKURIVER_HOST"] = ready["url"]
        token = f"--node-token-file={tmp_path / 'host' / 'node-token'}"
        runner = ("--bind=127.0.0.1", "--port=0", f"--host-url={ready['url']}", "--backend=process", token)
        commands.start("runner", "--json", *runner).event("registered")
        yield commands, main, apps


def test_users_of_the_provider_open_by_prefix_what_is_shared_with_them_until_they_log_out(
    one_origin: tuple[Commands, str, str], provider: RealProvider, browser: Any
) -> None:
    commands, main, apps = one_origin
    port = free_port()

    def somebody_else() -> None:
        browser.execute_cdp_cmd("Network.clearBrowserCookies", {})
        browser.get(f"{apps}/pages/{port}/")
        until(lambda: browser.current_url.startswith(f"{main}/login?next="), "the host asks who that is")

    browser.get(f"{main}/login")
    come_in(browser, provider, "a1")
    until(lambda: "Log out" in text_of(browser), "the dashboard")
    serve = (sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1")
    commands.succeed("vps", "create", "--name=pages", "--backend=process", "--", *serve)
    commands.succeed("vps", "share", "pages", "ann")
    browser.get(f"{main}/#/tasks/pages")
    until(lambda: browser.find_elements("link text", "Open"), "the link to the port")[0].click()
    until(lambda: len(browser.window_handles) == 2, "the other window")
    browser.switch_to.window(browser.window_handles[1])
    until(lambda: "Directory listing" in browser.title, "the page")
    there = browser.current_url
    assert (there.startswith(f"{apps}/pages-"), there.endswith(f"/{port}/")) == (True, True)

    somebody_else()
    come_in(browser, provider, "m3")
    until(lambda: "is in no group that this host lets in" in text_of(browser), "the refusal")
    browser.get(there)
    until(lambda: browser.current_url.startswith(f"{main}/login?next="), "the host asks who that is")

    somebody_else()
    come_in(browser, provider, "b2")
    until(lambda: "not yours" in text_of(browser), "the refusal")
    browser.get(there)
    until(lambda: "not yours" in text_of(browser), "the refusal")
    commands.succeed("vps", "share", "pages", "bob")
    browser.get(there)
    until(lambda: "Directory listing" in browser.title, "the page")
    browser.get(f"{main}/")
    press(browser, "Log out")
    until(lambda: "You are logged out here" in text_of(browser), "the way out of the provider")
    browser.get(there)
    until(lambda: browser.current_url.startswith(f"{main}/login?next="), "the host asks who that is")

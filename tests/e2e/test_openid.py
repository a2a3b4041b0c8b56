"""Logging in at a real OpenID provider, and a command line by that, in Chromium: cookies and policies as they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kohakuriver.cli.pki import Authority
from tests.e2e.conftest import until
from tests.e2e.test_login import text_of
from tests.support.openid import CLIENT, SECRET, RealProvider, real_provider
from tests.support.up import Commands

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture
def provider(tmp_path: Path) -> Iterator[RealProvider]:
    with real_provider(tmp_path / "openid") as found:
        found.knows(a1={"preferred_username": "ann", "groups": ["lab"]})
        yield found


@pytest.fixture
def host(tmp_path: Path, provider: RealProvider) -> Iterator[tuple[Commands, str]]:
    """A host with TLS: somebody's commands with settings of their own, and its URL."""
    made = Authority(tmp_path / "openid").issue(["river.localhost", "127.0.0.1"], 1)
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    secret.chmod(0o600)
    commands = Commands(tmp_path / "ann")
    options = [f"--tls-cert={made.cert}", f"--tls-key={made.key}", f"--oidc-issuer={provider.issuer}"]
    options += [f"--oidc-client-id={CLIENT}", f"--oidc-client-secret-file={secret}", "--oidc-allowed-group=lab"]
    options += [f"--oidc-ca-file={provider.ca_file}", f"--state-dir={tmp_path / 'host'}"]
    started = commands.start("host", "--json", "--bind=127.0.0.1", "--port=0", "--ssh-port=0", *options)
    port = started.event("ready")["url"].rpartition(":")[2]
    yield commands, f"https://river.localhost:{port}"
    commands.close()


BUTTON = "return [...document.querySelectorAll('button')].find(each => each.innerText.startsWith(arguments[0]));"


def press(browser: Any, button: str) -> None:
    """Press the button with that text, once it is there."""
    until(lambda: browser.execute_script(BUTTON, button), f"the button {button}").click()


def test_a_user_logs_in_at_the_provider_then_a_command_line_by_that_and_out_of_both(
    host: tuple[Commands, str], provider: RealProvider, browser: Any, tmp_path: Path
) -> None:
    commands, url = host
    browser.get(f"{url}/login")
    press(browser, "Log in with localhost:")
    until(lambda: browser.current_url.startswith(provider.issuer), "the provider's page")
    browser.find_element("name", "login").send_keys("a1")
    browser.find_element("name", "password").send_keys("-\n")
    until(lambda: "Authorize" in browser.title or "Continue" in text_of(browser), "the question for consent")
    browser.find_element("css selector", "button[type=submit]").click()
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

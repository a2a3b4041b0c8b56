"""The dashboard in Chromium: tasks, ports, terminals; by keyboard alone, on a phone, and as axe-core judges it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kohakuriver.host.dashboard import built
from tests.e2e.conftest import Cluster, free_port, require, until
from tests.e2e.test_login import link_of, text_of
from tests.support.up import Apart

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

AXE = Path(__file__).resolve().parents[2] / "src/kohakuriver-web/node_modules/axe-core/axe.min.js"
PICTURES = os.environ.get("KOHAKURIVER_PICTURES", "")

# What the page's policy has refused, from the first moment.
NOTE_VIOLATIONS = """
window.refused = [];
document.addEventListener(
    "securitypolicyviolation", event => window.refused.push(`${event.violatedDirective} ${event.sourceFile}`)
);
"""

# What has the keyboard, as a screen reader would say it.
FOCUSED = """
const e = document.activeElement;
const label = e.labels && e.labels[0];
return e.getAttribute("aria-label") || (label && label.innerText) || e.innerText || e.id || e.tagName;
"""

VIOLATIONS = """
const done = arguments[arguments.length - 1];
axe.run(document, {resultTypes: ["violations"]}).then(
    found => done(found.violations), error => done([{id: String(error), nodes: []}])
);
"""

KIND = "return document.querySelector('[name=kind]:checked').value;"
LIVE = "return document.querySelector('.live:not(.off)') !== null;"
SCREEN = "const rows = document.querySelector('.xterm-rows'); return rows ? rows.innerText : '';"
SELECTED = "return document.querySelector('.xterm-selection div') !== null;"
COPIED = "const done = arguments[0]; navigator.clipboard.readText().then(done, error => done(String(error)));"
COLOURS_SHOWN = "return [...document.querySelectorAll('.xterm-rows span')].map(e => getComputedStyle(e).color);"

SIZES = {"wide": (1280, 800), "phone": (390, 844)}
SCHEMES = ("light", "dark")


@pytest.fixture
def page(cluster: Cluster, browser: Any) -> Page:
    """The dashboard of the cluster's admin."""
    require(built(), "the dashboard")
    opened = Page(browser)
    opened.open(link_of(cluster))
    return opened


class Page:
    """A browser with the dashboard."""

    def __init__(self, browser: Any) -> None:
        self.browser = browser
        browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": NOTE_VIOLATIONS})

    def open(self, link: str) -> None:
        self.browser.get(link)
        self.shows("Log out")
        until(lambda: self.browser.execute_script(LIVE), "the host tells how all is")
        self.host = link.partition("/login")[0]

    def go(self, where: str) -> None:
        self.browser.execute_script("location.hash = arguments[0]", f"#/{where}")

    @property
    def text(self) -> str:
        return text_of(self.browser)

    def shows(self, *words: str) -> None:
        until(lambda: all(word in self.text for word in words), f"the page shows {words}, not only:\n{self.text}")

    def type(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.browser).send_keys(*keys).perform()

    def press(self, *held: str, key: str) -> None:
        from selenium.webdriver import ActionChains

        actions = ActionChains(self.browser)
        for each in held:
            actions.key_down(each)
        actions.send_keys(key)
        for each in held:
            actions.key_up(each)
        actions.perform()

    def focused(self) -> str:
        return str(self.browser.execute_script(FOCUSED)).strip()

    def tab_to(self, what: str, *, most: int = 60) -> None:
        """Go there with the Tab key."""
        from selenium.webdriver.common.keys import Keys

        seen = []
        for _ in range(most):
            if self.focused() == what:
                return
            seen.append(self.focused())
            self.type(Keys.TAB)
        pytest.fail(f"Tab never came to {what!r}: {seen}")

    def screen(self) -> str:
        """What the terminal shows."""
        shown = self.browser.execute_script(SCREEN)
        return str(shown).replace("\xa0", " ")

    def screen_shows(self, words: str) -> None:
        until(lambda: words in self.screen(), f"the terminal shows {words!r}, not only:\n{self.screen()}")

    def look(self, scheme: str, size: tuple[int, int]) -> None:
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size[0] < 600}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def violations(self) -> list[str]:
        """What axe-core finds wrong with the page as it is."""
        found = self.browser.execute_async_script(VIOLATIONS)
        return [f"{each['id']}: {[node['html'][:150] for node in each['nodes']]}" for each in found]

    def refused(self) -> list[str]:
        """What the page's policy did not let it do."""
        refused: list[str] = self.browser.execute_script("return window.refused")
        return refused


@contextlib.contextmanager
def serving_files(cluster: Cluster, name: str, *, more: tuple[str, ...] = ()) -> Iterator[int]:
    """A task that serves a folder by HTTP; its port."""
    port = free_port()
    cluster.create(name, *more, sys.executable, "-u", "-m", "http.server", str(port), "--bind", "127.0.0.1")
    yield port
    cluster.remove(name)


def test_by_keyboard_alone_a_task_is_made_its_port_found_a_terminal_used_and_the_task_removed(page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    port = free_port()
    page.tab_to("New task")
    page.type(Keys.ENTER)
    page.shows("What it is")
    if page.browser.execute_script(KIND) == "docker":  # as it is where there is an engine
        page.tab_to("A container")
        page.type(Keys.ARROW_DOWN)
    assert page.browser.execute_script(KIND) == "process"
    page.tab_to("Name")
    page.type("keys")
    page.tab_to("Command")
    page.type(f"{sys.executable} -u -m http.server {port} --bind 127.0.0.1")
    page.tab_to("Make it")
    page.type(Keys.ENTER)
    page.shows("keys", "running", f"kohakuriver open keys {port}", "Serving HTTP", "Task keys was made.")
    page.tab_to("Terminal")
    page.type(Keys.ENTER)
    until(lambda: page.focused() == "Terminal input", "the keyboard is in the terminal")
    page.shows("Shift+Esc")
    assert "was made" not in page.text  # what was said on another page covers nothing here
    page.type("echo $((6 * 7))-here", Keys.ENTER)
    page.screen_shows("42-here")
    page.press(Keys.SHIFT, key=Keys.ESCAPE)
    assert page.focused() == "New terminal"
    page.go("tasks/keys")
    page.shows("From your machine")
    page.tab_to("Remove")
    page.type(Keys.ENTER)
    page.shows("Remove keys?")
    page.tab_to("Remove it")
    page.type(Keys.ENTER)
    page.shows("Task keys was removed.")
    until(lambda: "keys" not in page.text.replace("Task keys was removed.", ""), "the task is gone from the list")
    assert page.refused() == []


def test_a_change_that_somebody_else_makes_is_in_the_page_at_once(cluster: Cluster, page: Page) -> None:
    page.shows("There is no task yet")
    with serving_files(cluster, "elsewhere"):
        page.shows("elsewhere", "running")
    until(lambda: "elsewhere" not in page.text, "the task is gone from the page")


COLOURS = r"printf '\033[38;2;200;10;30mtrue\033[0m \xe6\xbc\xa2\xe5\xad\x97 \xf0\x9f\x91\x8d done\n'"


def test_the_terminal_has_size_colours_and_unicode_and_the_policy_refuses_nothing(cluster: Cluster, page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    with serving_files(cluster, "term"):
        page.shows("term")
        page.go("tasks/term/terminal")
        page.shows("Shift+Esc")
        page.type(COLOURS, Keys.ENTER)
        page.screen_shows("漢字 👍 done")
        assert "rgb(200, 10, 30)" in _colours(page)
        rows, cols = _size(page)
        page.type("stty size", Keys.ENTER)
        page.screen_shows(f"{rows} {cols}")
        page.look("light", SIZES["phone"])
        until(lambda: _size(page)[1] < cols, "the terminal is as narrow as its window")
        rows, cols = _size(page)
        page.type("clear; stty size", Keys.ENTER)
        page.screen_shows(f"{rows} {cols}")
        assert page.refused() == []


def test_what_is_selected_in_a_terminal_is_copied_and_any_of_the_keys_for_it_pastes(
    cluster: Cluster, page: Page
) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.keys import Keys

    may = ["clipboardReadWrite", "clipboardSanitizedWrite"]  # from then on nothing else may be done
    page.browser.execute_cdp_cmd("Browser.grantPermissions", {"permissions": may})
    with serving_files(cluster, "pasted"):
        page.shows("pasted")
        page.go("tasks/pasted/terminal")
        page.shows("Shift+Esc")
        page.type("PS1=; clear; echo copied-$((6 * 7))", Keys.ENTER)
        until(lambda: page.screen().startswith("copied-42"), "the word alone")
        word = page.browser.find_element("css selector", ".xterm-rows > div")
        beginning = 30 - word.size["width"] // 2  # of the row, from its middle
        ActionChains(page.browser).move_to_element_with_offset(word, beginning, 0).double_click().perform()
        until(lambda: page.browser.execute_script(SELECTED), "the word is selected")
        page.press(Keys.CONTROL, key="c")
        until(lambda: page.browser.execute_async_script(COPIED) == "copied-42", "the word is copied")
        for held in ((Keys.CONTROL,), (Keys.CONTROL, Keys.SHIFT)):
            page.type(f"echo {len(held)}-")
            page.press(*held, key="v")
            page.type(Keys.ENTER)
            page.screen_shows(f"\n{len(held)}-copied-42")
        # As a picker of emoji types it.
        page.type("echo ")
        page.browser.execute_cdp_cmd("Input.insertText", {"text": "\U0001f44d\u6f22"})
        page.type("-end", Keys.ENTER)
        page.screen_shows("\n\U0001f44d\u6f22-end")


def _size(page: Page) -> tuple[int, int]:
    rows, cols = page.browser.execute_script(
        """const rows = document.querySelectorAll(".xterm-rows > div").length;
        const one = document.querySelector(".xterm-char-measure-element").getBoundingClientRect().width / 32;
        return [rows, Math.round(document.querySelector(".xterm-screen").getBoundingClientRect().width / one)];"""
    )
    return int(rows), int(cols)


def _colours(page: Page) -> list[str]:
    colours: list[str] = page.browser.execute_script(COLOURS_SHOWN)
    return colours


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[Apart]:
    with contextlib.closing(Apart(tmp_path / "apart")) as apart:
        yield apart


def test_a_terminal_goes_on_over_a_reload_a_restart_of_the_host_and_in_another_window(
    apart: Apart, browser: Any
) -> None:
    from selenium.webdriver.common.keys import Keys

    require(built(), "the dashboard")
    until(lambda: "online" in apart.run("node", "list").stdout, "the node is online")
    apart.succeed("vps", "create", "--name=lab", "--backend=process", "--", "sleep", "9999")
    page = Page(browser)
    page.open(apart.succeed("open", "--print").strip())
    page.go("tasks/lab/terminal")
    page.shows("Shift+Esc")
    page.type("marker=kept; echo begun-$((1 + 1))", Keys.ENTER)
    page.screen_shows("begun-2")
    browser.refresh()
    page.screen_shows("begun-2")
    page.type("echo $marker-over-reload", Keys.ENTER)
    page.screen_shows("kept-over-reload")
    apart.host.stop()
    page.shows("The connection was lost")
    apart.start_host()
    until(lambda: "Shift+Esc" in page.text, "the terminal is back", 60)
    page.type("echo $marker-over-restart", Keys.ENTER)
    page.screen_shows("kept-over-restart")
    first = browser.current_window_handle
    url = browser.current_url
    browser.switch_to.new_window("window")
    browser.get(url)
    page.screen_shows("kept-over-restart")
    browser.switch_to.window(first)
    page.shows("This terminal was opened elsewhere.")
    browser.find_element("xpath", "//button[text()='Take it back']").click()
    page.shows("Shift+Esc")
    page.type("exit", Keys.ENTER)
    page.shows("The shell has ended")


def test_a_page_that_is_open_is_of_whoever_logs_in_beside_it(cluster: Cluster, page: Page) -> None:
    kohakuriver = [sys.executable, "-m", "kohakuriver"]
    added = subprocess.run(
        [*kohakuriver, "user", "add", "beside", "--json"], env=cluster.env, capture_output=True, text=True, check=True
    ).stdout
    as_beside = cluster.env | {"KOHAKURIVER_TOKEN": json.loads(added)["token"]}
    link = subprocess.run(
        [*kohakuriver, "open", "--print"], env=as_beside, capture_output=True, text=True, check=True
    ).stdout.strip()
    page.shows("Users", "Audit")
    first = page.browser.current_window_handle
    page.browser.switch_to.new_window("window")
    page.browser.get(link)
    page.browser.find_element("xpath", "//button[text()='Log in as beside']").click()
    page.shows("beside", "Log out")
    page.browser.switch_to.window(first)
    until(lambda: "beside" in page.text and "Audit" not in page.text, "the first page is of the same user")


def test_a_login_that_ends_takes_the_page_and_its_terminal_with_it(cluster: Cluster, page: Page) -> None:
    with serving_files(cluster, "ending"):
        page.shows("ending")
        page.go("tasks/ending/terminal")
        page.shows("Shift+Esc")
        tokens = subprocess.run(
            [sys.executable, "-m", "kohakuriver", "token", "list", "--json"],
            env=cluster.env, capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        for token in _browsers(tokens):
            subprocess.run(
                [sys.executable, "-m", "kohakuriver", "token", "revoke", token],
                env=cluster.env, capture_output=True, check=True,
            )  # fmt: skip
        until(lambda: page.browser.current_url.endswith("/login"), "the page that asks for a token", 10)


def _browsers(listed: str) -> list[str]:
    return [row["id"] for row in json.loads(listed)["tokens"] if row["kind"] == "browser" and row["status"] == "valid"]


PLACES = {"tasks": "tasks", "task": "tasks/web", "sessions": "sessions", "nodes": "nodes", "tokens": "tokens"}
PLACES |= {"users": "users", "audit": "audit", "terminal": "tasks/web/terminal"}
READY = {"tasks": "running", "task": "kohakuriver open web", "sessions": "Open sessions", "nodes": "online"}
READY |= {"tokens": "this browser", "users": "admin", "audit": "task_created", "terminal": "It goes on when"}


def test_axe_finds_nothing_wrong_with_any_page_wide_or_narrow_light_or_dark(cluster: Cluster, page: Page) -> None:
    require(AXE.exists(), "axe-core")
    wrong: dict[tuple[str, ...], list[str]] = {}
    with serving_files(cluster, "web"):
        page.shows("web")
        for name, where in PLACES.items():
            page.go(where)
            page.shows(READY[name])
            page.browser.execute_script(AXE.read_text())
            for shape, size in SIZES.items():
                for scheme in SCHEMES:
                    page.look(scheme, size)
                    if found := page.violations():
                        wrong[name, shape, scheme] = found
                    wide = page.browser.execute_script("return document.documentElement.scrollWidth")
                    if wide > size[0]:
                        wrong[name, shape, scheme] = [f"the page is {wide} wide"]
                    if PICTURES:
                        page.browser.save_screenshot(f"{PICTURES}/{name}-{shape}-{scheme}.png")
        page.go("tasks")
        page.shows("New task")
        page.browser.find_element("xpath", "//button[text()='New task']").click()
        page.browser.find_element("tag name", "summary").click()
        for scheme in SCHEMES:
            page.look(scheme, SIZES["phone"])
            if found := page.violations():
                wrong["new", scheme] = found
            if PICTURES:
                page.browser.save_screenshot(f"{PICTURES}/new-phone-{scheme}.png")
    assert wrong == {}
    assert page.refused() == []


def test_the_first_load_takes_less_than_300_kb_of_the_line(page: Page) -> None:
    taken = page.browser.execute_script(
        """return performance.getEntriesByType("resource").concat(performance.getEntriesByType("navigation"))
        .filter(e => !e.name.includes("/api/")).map(e => e.encodedBodySize);"""
    )
    assert 10_000 < sum(taken) < 300 * 1024

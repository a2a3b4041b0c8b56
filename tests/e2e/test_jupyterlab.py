"""JupyterLab in a browser behind a forward: pages, kernel WebSockets and all."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Cluster, free_port, require, until
from tests.support.docker_images import busybox_image, require_engine
from tests.support.up import Apart

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

SOURCE = "import os\nprint('computed', sum(range(1001)), os.environ['WHERE'])\n"

# Prints until it is told to end, so that there is no moment in which it might be over too soon.
TICKS = """
import os, time
tick = 0
while not os.path.exists({end!r}):
    tick += 1
    print(f"tick{{tick}}", end=" ", flush=True)
    time.sleep(0.1)
print("computed", sum(range(1001)), os.environ["WHERE"])
"""

# The page's WebSockets that have ended, and why.
NOTE_ENDS = """
window.endedSockets = [];
window.WebSocket = class extends WebSocket {
    constructor(...about) {
        super(...about);
        this.addEventListener("close", event => window.endedSockets.push([this.url, event.code]));
    }
};
"""


def notebook(source: str) -> str:
    cell: dict[str, Any] = {
        "cell_type": "code",
        "id": "only",
        "metadata": {},
        "source": source,
        "outputs": [],
        "execution_count": None,
    }
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return json.dumps({"cells": [cell], "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5})


def lab_in(directory: Path, source: str, port: int) -> list[str]:
    """The command of a JupyterLab, whose folder has one notebook with one cell."""
    require(importlib.util.find_spec("jupyterlab"), "jupyterlab")
    folder = directory / "notebooks"
    folder.mkdir()
    (folder / "sum.ipynb").write_text(notebook(source))
    own = {
        name: str(directory / name.lower())
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
    }
    settings = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.open_browser": False,
        "ServerApp.root_dir": str(folder),
        "IdentityProvider.token": "secret",
    }
    environment = ("env", "WHERE=in the task", *(f"{name}={value}" for name, value in own.items()))
    flags = (f"--{name}={value}" for name, value in settings.items())
    return [*environment, sys.executable, "-m", "jupyterlab", "--allow-root", *flags]


@pytest.fixture
def jupyter(cluster: Cluster, tmp_path: Path) -> Iterator[int]:
    """The port of a JupyterLab in the task `jupyter`, with nothing configured but that; its folder has one notebook."""
    port = free_port()
    cluster.create("jupyter", *lab_in(tmp_path, SOURCE, port))
    yield port
    cluster.remove("jupyter")


class Page:
    """The notebook of a JupyterLab in the browser."""

    def __init__(self, browser: Any, url: str) -> None:
        self.browser = browser
        self._url = f"{url}/lab/tree/sum.ipynb?token=secret"

    def element(self, css: str) -> Any:
        from selenium.webdriver.common.by import By

        return next(iter(self.browser.find_elements(By.CSS_SELECTOR, css)), None)

    def opened(self) -> bool:
        from selenium.common.exceptions import WebDriverException

        try:
            self.browser.get(self._url)
        except WebDriverException:  # a connection to a port on which nothing listens yet is reset
            return False
        return "Jupyter" in self.browser.title

    def _cell(self) -> Any:
        cell = self.element(".jp-Notebook .jp-CodeCell .cm-content")
        return cell if cell and cell.is_displayed() else None

    def is_idle(self) -> bool:
        bar = self.element("#jp-main-statusbar")
        return bar is not None and "| Idle" in bar.text

    def run_cell(self) -> None:
        """Open the notebook, and run its cell."""
        from selenium.webdriver import ActionChains
        from selenium.webdriver.common.keys import Keys

        until(self.opened, "JupyterLab's page opens")
        until(self.is_idle, "the kernel is idle")
        until(self._cell, "the notebook is open").click()
        ActionChains(self.browser).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()

    def output(self) -> str:
        """What the cell has printed."""
        output = self.element(".jp-OutputArea-output")
        return "" if output is None else str(output.text)


def test_a_notebook_cell_runs_in_the_kernel_of_a_forwarded_jupyterlab(
    cluster: Cluster, jupyter: int, browser: Any
) -> None:
    page = Page(browser, f"http://127.0.0.1:{cluster.forward('jupyter', jupyter)}")
    page.run_cell()
    until(lambda: "computed 500500 in the task" in page.output(), "the output is the kernel's")


def test_a_notebook_cell_runs_under_an_address_of_jupyterlabs_own(cluster: Cluster, jupyter: int, browser: Any) -> None:
    served = cluster.event(cluster.start("open", "jupyter", str(jupyter), "--json"), "served")
    browser.get(served["link"])
    page = Page(browser, served["url"].rstrip("/"))
    page.run_cell()
    until(lambda: "computed 500500 in the task" in page.output(), "the output is the kernel's")


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[Apart]:
    """A host and a runner whose containers outlive it."""
    require_engine()
    with contextlib.closing(Apart(tmp_path, runner_options=("--backend=docker",))) as apart:
        until(lambda: "online" in apart.run("node", "list").stdout, "the node is online")
        try:
            yield apart
        finally:
            apart.run("vps", "rm", "jupyter")


@pytest.mark.docker
def test_a_cell_goes_on_and_its_page_notices_nothing_while_host_and_runner_are_killed_and_started_again(
    apart: Apart, browser: Any, tmp_path: Path
) -> None:
    end, port = tmp_path / "end", 8888  # a port in a container is nobody else's
    outside = ["/bin/busybox", "chroot", "/host"]
    apart.succeed(
        *("vps", "create", "--name=jupyter", f"--image={busybox_image()}", "--mount=/:/host", "--", *outside),
        *lab_in(tmp_path, TICKS.format(end=str(end)), port),
    )
    forward = apart.start("forward", "jupyter", f"0:{port}", "--json")
    page = Page(browser, f"http://127.0.0.1:{forward.listening()}")
    browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": NOTE_ENDS})
    page.run_cell()

    def last_tick() -> int:
        return max(map(int, re.findall(r"tick(\d+)\b", page.output())), default=0)

    for hop in ("host", "runner"):
        seen = last_tick()
        until(lambda seen=seen: last_tick() > seen, f"the cell prints before the {hop} is killed")  # type: ignore[misc]
        getattr(apart, hop).stop(signal.SIGKILL)
        seen = last_tick()
        getattr(apart, f"start_{hop}")()
        forward.event("resumed")
        until(lambda seen=seen: last_tick() > seen + 10, f"the cell prints after the {hop} was killed")  # type: ignore[misc]
    assert "computed" not in page.output()
    end.touch()
    until(lambda: "computed 500500 in the task" in page.output(), "the end of the output is there")
    until(page.is_idle, "the kernel is idle again")
    ticks = list(map(int, re.findall(r"tick(\d+)\b", page.output())))
    assert ticks == list(range(1, len(ticks) + 1))
    assert browser.execute_script("return window.endedSockets") == []
    assert page.element(".jp-Dialog") is None

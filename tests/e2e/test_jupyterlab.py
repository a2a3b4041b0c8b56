"""JupyterLab in a browser behind a forward: pages, kernel WebSockets and all."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Cluster, free_port, require, until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

SOURCE = "import os\nprint('computed', sum(range(1001)), os.environ['WHERE'])\n"


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


@pytest.fixture
def jupyter(cluster: Cluster, tmp_path: Path) -> Iterator[int]:
    """The port of a JupyterLab in the task `jupyter`, with nothing configured but that; its folder has one notebook."""
    require(importlib.util.find_spec("jupyterlab"), "jupyterlab")
    folder = tmp_path / "notebooks"
    folder.mkdir()
    (folder / "sum.ipynb").write_text(notebook(SOURCE))
    port = free_port()
    own = {
        name: str(tmp_path / name.lower()) for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR")
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
    cluster.create("jupyter", *environment, sys.executable, "-m", "jupyterlab", "--allow-root", *flags)
    yield port
    cluster.remove("jupyter")


def test_a_notebook_cell_runs_in_the_kernel_of_a_forwarded_jupyterlab(
    cluster: Cluster, jupyter: int, browser: Any
) -> None:
    runs_a_cell(f"http://127.0.0.1:{cluster.forward('jupyter', jupyter)}", browser)


def test_a_notebook_cell_runs_under_an_address_of_jupyterlabs_own(cluster: Cluster, jupyter: int, browser: Any) -> None:
    served = cluster.event(cluster.start("open", "jupyter", str(jupyter), "--json"), "served")
    browser.get(served["link"])
    runs_a_cell(served["url"].rstrip("/"), browser)


def runs_a_cell(jupyter: str, browser: Any) -> None:
    """Open the notebook of the JupyterLab at this address, run its cell, and find the output."""
    from selenium.common.exceptions import WebDriverException
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    def element(css: str) -> Any:
        return next(iter(browser.find_elements(By.CSS_SELECTOR, css)), None)

    def opened() -> bool:
        try:
            browser.get(f"{jupyter}/lab/tree/sum.ipynb?token=secret")
        except WebDriverException:  # a connection to a port on which nothing listens yet is reset
            return False
        return "Jupyter" in browser.title

    def visible_cell() -> Any:
        cell = element(".jp-Notebook .jp-CodeCell .cm-content")
        return cell if cell and cell.is_displayed() else None

    until(opened, "JupyterLab's page opens")
    until(lambda: "| Idle" in (bar.text if (bar := element("#jp-main-statusbar")) else ""), "the kernel is idle")
    cell = until(visible_cell, "the notebook is open")
    cell.click()
    ActionChains(browser).key_down(Keys.SHIFT).send_keys(Keys.ENTER).key_up(Keys.SHIFT).perform()

    output = until(lambda: element(".jp-OutputArea-output"), "the cell has an output")
    until(lambda: "computed 500500 in the task" in output.text, "the output is the kernel's")

"""Programs that know nothing of this, unconfigured, at the host's addresses for their ports: files, hot reload."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from tests.e2e.conftest import KOHAKURIVER, Cluster, free_port, require, until
from tests.e2e.test_jupyterlab import Page, jupyter

__all__ = ["jupyter"]

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200)]

VITE = Path(__file__).resolve().parents[2] / "src/kohakuriver-web/node_modules/vite/bin/vite.js"
MEGABYTES = int(os.environ.get("KOHAKURIVER_E2E_MB", "64"))
"""How large the file is that is copied; by hand also a gigabyte."""

# JupyterLab's button for uploads, where the browser would ask a person for a file: the field is in the page instead.
UPLOAD = """
HTMLInputElement.prototype.click = function () { document.body.append(this); };
document.querySelector("[title='Upload Files']").click();
return [...document.querySelectorAll("body > input[type=file]")].pop();
"""

# Whether Vite's server has greeted the page's WebSocket: of what is edited before, it does not tell.
NOTE_GREETING = """
window.WebSocket = class extends WebSocket {
    constructor(...about) {
        super(...about);
        this.addEventListener("message", () => { window.greeted = true; });
    }
};
"""

PAGE = '<!doctype html><title>vite</title><p id="said"></p><script type="module" src="/main.js"></script>'
SAYS = 'document.querySelector("#said").textContent = "{word}";\nimport.meta.hot.accept();\n'


def open_at_host(cluster: Cluster, browser: Any, task: str, port: int) -> str:
    """Open a port at the host's address for it; the origin to which that leads."""
    argv = [*KOHAKURIVER, "open", task, str(port), "--at-host", "--print"]
    link = subprocess.run(argv, env=cluster.env, capture_output=True, text=True, timeout=60, check=True).stdout.strip()
    browser.get(link)
    until(lambda: (urlsplit(browser.current_url).hostname or "").startswith(f"{task}-{port}-"), "the port's address")
    parts = urlsplit(browser.current_url)
    return f"{parts.scheme}://{parts.netloc}"


class Memory:
    """What the host's process takes of the machine's memory, in bytes."""

    def __init__(self, cluster: Cluster) -> None:
        children = psutil.Process(cluster.processes[0].pid).children(recursive=True)
        [self._host] = [each for each in children if "host" in each.cmdline()[:5]]

    def now(self) -> int:
        size: int = self._host.memory_info().rss
        return size


def digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            found.update(piece)
    return found.hexdigest()


def test_a_file_goes_into_jupyterlab_and_out_again_as_it_was_and_the_host_keeps_nothing_of_it(
    cluster: Cluster, jupyter: int, browser: Any, tmp_path: Path
) -> None:
    memory, size = Memory(cluster), MEGABYTES << 20
    origin = open_at_host(cluster, browser, "jupyter", jupyter)
    page = Page(browser, origin)
    until(page.opened, "JupyterLab's page opens")
    until(lambda: page.element(".jp-DirListing-content [title*='sum.ipynb']"), "the list of files")
    before, seen = memory.now(), 0
    chosen = tmp_path / "big.bin"
    with chosen.open("wb") as file:
        for _ in range(MEGABYTES):
            file.write(os.urandom(1 << 20))
    browser.execute_script(UPLOAD).send_keys(str(chosen))
    if MEGABYTES > 15:
        until(lambda: page.element(".jp-Dialog .jp-mod-accept"), "the question whether it may be as large").click()
    uploaded = tmp_path / "notebooks" / "big.bin"

    def is_there() -> bool:
        nonlocal seen
        seen = max(seen, memory.now())
        return uploaded.exists() and uploaded.stat().st_size == size

    until(is_there, "all of the file is there", 900)
    downloads = tmp_path / "downloads"
    behavior = {"behavior": "allow", "downloadPath": str(downloads)}
    browser.execute_cdp_cmd("Browser.setDownloadBehavior", behavior)
    browser.execute_script(f"location.href = {origin + '/files/big.bin?download=1&token=secret'!r}")

    def is_back() -> bool:
        nonlocal seen
        seen = max(seen, memory.now())
        return (downloads / "big.bin").exists() and (downloads / "big.bin").stat().st_size == size

    until(is_back, "all of the file is back", 900)
    told = f"{MEGABYTES} MB: host {before >> 20} MB before, {seen >> 20} MB at most, {memory.now() >> 20} MB after"
    print(told, digest(chosen), digest(uploaded), digest(downloads / "big.bin"))
    assert digest(chosen) == digest(uploaded) == digest(downloads / "big.bin")
    assert seen - before < 32 << 20, told


def test_what_is_edited_is_in_the_page_of_a_vite_dev_server_at_once_without_a_reload(
    cluster: Cluster, browser: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    require(VITE.exists() and shutil.which("node"), "Vite")
    port, main = free_port(), tmp_path / "main.js"
    (tmp_path / "index.html").write_text(PAGE)
    main.write_text(SAYS.format(word="first"))
    cluster.create("vite", "env", "-C", str(tmp_path), "node", str(VITE), "--port", str(port), "--strictPort")
    request.addfinalizer(lambda: cluster.remove("vite"))
    browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": NOTE_GREETING})
    origin = open_at_host(cluster, browser, "vite", port)

    def says() -> str:
        return str(
            browser.execute_script("const said = document.querySelector('#said'); return said && said.innerText")
        )

    def is_open() -> bool:
        browser.get(origin)
        return bool(browser.title == "vite")

    until(is_open, "Vite serves")
    until(lambda: says() == "first", "the script runs")
    until(lambda: browser.execute_script("return window.greeted"), "the page's WebSocket is there")
    browser.execute_script("window.kept = 'since the first load'")
    main.write_text(SAYS.format(word="edited"))
    until(lambda: says() == "edited", "the page has what was edited", 20)
    assert browser.execute_script("return window.kept") == "since the first load"

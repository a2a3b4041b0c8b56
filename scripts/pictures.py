"""python -m scripts.pictures [measures]: make the pictures of a terminal, the dashboard's task pages and the measures.

A cluster by `kohakuriver up`, a task with a web page, and a session to it. What the commands print on a real terminal
becomes docs/images/terminal.svg, and what Chromium shows of the host dashboard.png, dashboard-task.png (in dark
colours) and dashboard-phone.png there. A host and a runner under a load that comes and goes are read by a Prometheus,
whose own graphs of deploy/grafana's panels become measures.png. Needs what `make e2e` installs.
"""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import shutil
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pexpect
from rich.console import Console
from rich.text import Text

from tests.support.processes import Cluster as Apart
from tests.support.processes import a_cluster, ask, eventually
from tests.support.prometheus import DEPLOY, prometheus
from tests.support.services import echo, port_in
from tests.support.up import Cluster

IMAGES = Path(__file__).parents[1] / "docs" / "images"
COLUMNS = 104
SECONDS = 60

# As Rich has it, but for fonts that it would have a reader's browser fetch.
SVG = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, monospace; font-size: {char_height}px;
  line-height: {line_height}px; }}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""

PAGE = """
import http.server, sys
class Page(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b"epoch 12, loss 0.084\\n"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *about):
        pass
server = http.server.ThreadingHTTPServer(("127.0.0.1", 8888), Page)
print("serving on port 8888", flush=True)
server.serve_forever()
"""

SHOWN = ("Bytes per second", "Sessions that are open", "Time to open a session, p95", "Event loop lag, p99")
MOST, USED = 6, 120.0
"""Sessions at most, and for how many seconds there are some."""
BARE = """
const style = document.createElement("style");
style.textContent = `
  nav, .page-options, .form-inline, .nav-tabs, .clearfix, .eval_stats, .text-right, #add_graph, .expression_input {
    display: none !important }
  .graph_wrapper { display: inline-block; vertical-align: top; width: 49% }
  body { padding-top: 0 }`;
document.head.append(style);
document.querySelectorAll(".graph_wrapper").forEach((each, n) => {
  const title = document.createElement("h6");
  title.textContent = arguments[0][n];
  title.style.paddingLeft = "70px";
  each.prepend(title);
  each.querySelector(".execute_btn").click();
});
document.activeElement.blur();
"""
"""Of Prometheus' page the graphs alone, two beside each other, with titles."""
DRAWN = "return [...document.querySelectorAll('.graph_wrapper')].every(each => each.querySelector('.graph path'));"

LIVE = "return document.querySelector('.live:not(.off)') !== null;"


def shown(cluster: Cluster, words: Sequence[str]) -> str:
    """What a command prints on a terminal of its own."""
    child = pexpect.spawn(
        sys.executable, ["-m", "kohakuriver", *words],
        env={**cluster.environment, "TERM": "xterm-256color"}, dimensions=(40, COLUMNS), timeout=SECONDS,
    )  # fmt: skip
    child.expect(pexpect.EOF)
    child.close()
    assert child.exitstatus == 0, child.before.decode()
    text: str = child.before.decode()
    return text.replace("\r\n", "\n").rpartition("\r")[2]  # what was drawn over is not there any more


def draw_terminal(cluster: Cluster, path: Path) -> None:
    """What somebody sees who makes a task and reaches it."""
    session = (
        ("vps", "list"),
        ("vps", "logs", "train"),
        ("forward", "train", "9000:8888", "--", "curl", "-s", "http://127.0.0.1:9000"),
        ("connect", "train", "--", "sh", "-c", "echo in the task, as $(id -un)"),
        ("vps", "ports", "train"),
    )
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for words in session:
        console.print(Text.assemble(("$ ", "green"), (f"kohakuriver {shlex.join(words)}", "bold")))
        console.print(Text.from_ansi(shown(cluster, words).rstrip("\n")))
    path.write_text(console.export_svg(title="kohakuriver", code_format=SVG, unique_id="river"))


def look(browser: Any, scheme: str, width: int, height: int) -> None:
    """Have the page in a window of that size, in light or dark colours."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def draw_phone(browser: Any, path: Path) -> None:
    """The page of a task on a phone, in light colours, beside a new task in dark ones."""
    look(browser, "light", 390, 844)
    seen = [browser.get_screenshot_as_base64()]
    browser.execute_script("location.hash = '#/tasks'")
    until(browser, "return document.querySelector('h1 + .primary') !== null")
    browser.find_element("css selector", "h1 + .primary").click()
    look(browser, "dark", 390, 844)
    seen.append(browser.get_screenshot_as_base64())
    images = "".join(f'<img src="data:image/png;base64,{each}" style="margin-right: 15px">' for each in seen)
    with tempfile.NamedTemporaryFile("w", suffix=".html") as page:
        page.write(f'<body style="margin: 0; display: flex">{images}')
        page.flush()
        browser.get(f"file://{page.name}")
        look(browser, "light", 2 * 390 + 15, 844)
        browser.save_screenshot(str(path))


def chromium() -> Any:
    """One without a window."""
    from selenium import webdriver

    program, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert program, "chromium is missing: make e2e installs it"
    assert driver, "chromedriver is missing: make e2e installs it"
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in ("--headless", "--no-sandbox", "--no-proxy-server", "--window-size=1280,860", "--hide-scrollbars"):
        options.add_argument(flag)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))


def draw_dashboard(cluster: Cluster, images: Path) -> None:
    """What Chromium shows of a task that is in use."""
    forward = cluster.start("forward", "train", "0:8888", "--json")
    port = forward.event("listening")["local_port"]
    browser = chromium()
    try:
        browser.get(cluster.succeed("open", "--print").strip())
        until(browser, LIVE)
        browser.execute_script("location.hash = '#/tasks/train'")
        end = time.monotonic() + 25  # for the plot of rates to have something to show
        while time.monotonic() < end:
            for _ in range(20):
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as answer:
                    answer.read()
            time.sleep(0.2)
        browser.save_screenshot(str(images / "dashboard.png"))
        look(browser, "dark", 1280, 800)
        browser.save_screenshot(str(images / "dashboard-task.png"))
        draw_phone(browser, images / "dashboard-phone.png")
    finally:
        browser.quit()
        forward.stop()


def until(browser: Any, script: str) -> None:
    """Wait until a script in the page says so."""
    end = time.monotonic() + SECONDS
    while not browser.execute_script(script):
        assert time.monotonic() < end, script
        time.sleep(0.1)


def use(cluster: Apart, port: int, seconds: float) -> None:
    """Sessions and bytes that come and go: one session more each while, and then all of them less."""
    with contextlib.ExitStack() as stack:
        end, ports = time.monotonic() + seconds, list[int]()
        while (left := end - time.monotonic()) > 0:
            if len(ports) < MOST and left < seconds * (1 - len(ports) / MOST / 2):
                ports.append(stack.enter_context(cluster.forward("web", port)).local_port)
            for each in ports:
                ask(each, bytes(100_000))
            cluster.call("GET", "/api/tasks")
            time.sleep(0.05)


def draw_measures(path: Path) -> None:
    """What Prometheus itself shows of a host and its runner, while they are used and after it."""
    panels = {each["title"]: each for each in json.loads((DEPLOY / "grafana/kohakuriver.json").read_text())["panels"]}
    shown = [panels[title]["targets"][0]["expr"].replace("$__rate_interval", "20s") for title in SHOWN]
    query = "&".join(
        urllib.parse.urlencode({f"g{n}.expr": expression, f"g{n}.tab": 0, f"g{n}.range_input": f"{USED + 40:.0f}s"})
        for n, expression in enumerate(shown)
    )
    with tempfile.TemporaryDirectory() as name, a_cluster(Path(name), "--metrics", "0") as cluster:
        cluster.start_runner("n1", "--backend", "process", "--metrics", "127.0.0.1:0")
        task = cluster.create(*echo(), name="web")
        port = eventually(lambda: port_in(cluster.log_of(task)))
        (Path(name) / "prometheus").mkdir()
        with prometheus(cluster, "n1", Path(name) / "prometheus") as url:
            use(cluster, port, USED)
            time.sleep(15)  # that it ends is part of the picture
            browser = chromium()
            try:
                look(browser, "light", 1280, 1090)
                browser.get(f"{url}/classic/graph?{query}")
                until(browser, DRAWN)
                browser.execute_script(BARE, SHOWN)
                time.sleep(3)  # drawn again, in the new width
                browser.execute_script("scrollTo(0, 0)")
                browser.save_screenshot(str(path))
            finally:
                browser.quit()


def main() -> None:
    if sys.argv[1:] == ["measures"]:
        draw_measures(IMAGES / "measures.png")
        return
    with tempfile.TemporaryDirectory() as name:
        cluster = Cluster(Path(name))
        try:
            create = ("vps", "create", "--name", "train", "--backend", "process", "--")
            cluster.succeed(*create, sys.executable, "-c", PAGE)
            draw_terminal(cluster, IMAGES / "terminal.svg")
            draw_dashboard(cluster, IMAGES)
        finally:
            cluster.close()
    draw_measures(IMAGES / "measures.png")


if __name__ == "__main__":
    main()

"""A cluster, tasks and forwards by the `kohakuriver` program, and a headless Chromium."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CI = os.environ.get("CI", "") not in ("", "0", "false")
KOHAKURIVER = [sys.executable, "-m", "kohakuriver"]
START_SECONDS = 90.0

# Chromium would otherwise look for updates and services of its maker, which no test wants to depend on.
CHROMIUM_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--no-proxy-server",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,900",
)


def require(condition: object, what: str) -> None:
    """Skip where `what` is missing; in CI that is a failure."""
    if not condition:
        (pytest.fail if CI else pytest.skip)(f"{what} is missing: make e2e installs it")


def until(condition: Callable[[], Any], what: str, seconds: float = START_SECONDS) -> Any:
    """What `condition()` returns once it is true: for programs that say in no other way that they are ready."""
    end = time.monotonic() + seconds
    while not (result := condition()):
        if time.monotonic() > end:
            pytest.fail(f"after {seconds} s still not: {what}")
        time.sleep(0.1)
    return result


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Cluster:
    """`kohakuriver up` with its own configuration directory, and what its user does."""

    def __init__(self, directory: Path) -> None:
        self.log = directory / "log"
        self.env = dict(os.environ, KOHAKURIVER_CONFIG_DIR=str(directory))
        for name in ("KOHAKURIVER_HOST", "KOHAKURIVER_TOKEN"):
            self.env.pop(name, None)
        self.processes: list[subprocess.Popen[str]] = []
        ports = ("--host-port", "0", "--runner-port", "0", "--ssh-port", "0")
        self.event(self.start("up", "--json", *ports, "--state-dir", str(directory / "state")), "ready")

    @property
    def token(self) -> str:
        """The admin's."""
        return (Path(self.env["KOHAKURIVER_CONFIG_DIR"]) / "state" / "admin-token").read_text().strip()

    def start(self, *args: str) -> subprocess.Popen[str]:
        with self.log.open("a") as log:
            process = subprocess.Popen(
                [*KOHAKURIVER, *args],
                env=self.env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self.processes.append(process)
        return process

    def event(self, process: subprocess.Popen[str], name: str) -> dict[str, Any]:
        assert process.stdout is not None
        for line in process.stdout:
            event: dict[str, Any] = json.loads(line)
            if event["event"] == name:
                return event
        raise AssertionError(f"{process.args!r} ended without {name!r}:\n{self.log.read_text()}")

    def create(self, name: str, *command: str) -> None:
        """A process task that runs `command`."""
        self._succeed("create", "--name", name, "--backend", "process", "--", *command)

    def remove(self, name: str) -> None:
        """End the task."""
        self._succeed("rm", name)

    def _succeed(self, *args: str) -> None:
        argv = [*KOHAKURIVER, "vps", *args]
        result = subprocess.run(
            argv, env=self.env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
        )
        assert result.returncode == 0, result.stderr + self.log.read_text()

    def forward(self, name: str, port: int) -> int:
        """The local port of a new forward to the task's `port`."""
        local: int = self.event(self.start("forward", name, f"0:{port}", "--json"), "listening")["local_port"]
        return local

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.send_signal(signal.SIGTERM)
        for process in reversed(self.processes):
            assert process.stdout is not None
            with process.stdout:
                process.wait(30)


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    running = Cluster(tmp_path_factory.mktemp("cluster"))
    yield running
    running.stop()


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    """A Chromium with an empty profile, driven by Selenium."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    require(chromium and driver, "chromium with its driver")
    require(importlib.util.find_spec("selenium"), "selenium")
    assert chromium
    assert driver
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.accept_insecure_certs = True  # tests' own authorities are in no browser
    for flag in (*CHROMIUM_FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    service = webdriver.ChromeService(executable_path=driver)
    chrome = webdriver.Chrome(options=options, service=service)
    chrome.set_page_load_timeout(START_SECONDS)
    yield chrome
    chrome.save_screenshot(str(tmp_path / "page.png"))  # what was there when a test failed
    chrome.quit()

"""TensorBoard on real event files, in a browser at the host's address for its port."""

from __future__ import annotations

import importlib.util
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Cluster, free_port, require, until
from tests.e2e.test_programs import open_at_host

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

STEPS = 200


def loss(step: int) -> float:
    return math.exp(-step / 50)


@pytest.fixture
def event_files(tmp_path: Path) -> Path:
    """A run with a scalar and a histogram in real event files."""
    require(importlib.util.find_spec("tensorboard") and importlib.util.find_spec("tensorboardX"), "tensorboard")
    from tensorboardX import SummaryWriter

    directory = tmp_path / "runs"
    noise = random.Random(7)
    with SummaryWriter(str(directory / "first")) as writer:
        for step in range(STEPS):
            writer.add_scalar("training/loss", loss(step), step)
        writer.add_histogram("weights", [noise.gauss(0, 1) for _ in range(10_000)], STEPS)
    return directory


def text_of(browser: Any) -> str:
    text: str = browser.execute_script("return document.body.innerText")
    return text


def test_tensorboard_shows_what_a_training_run_wrote(cluster: Cluster, browser: Any, event_files: Path) -> None:
    port = free_port()
    command = ("-m", "tensorboard.main", "--logdir", str(event_files), "--host", "127.0.0.1", "--port", str(port))
    cluster.create("tensorboard", sys.executable, *command)
    url = open_at_host(cluster, browser, "tensorboard", port)

    def loaded() -> bool:
        from selenium.common.exceptions import WebDriverException

        try:
            browser.get(url)
        except WebDriverException:  # a connection to a port on which nothing listens yet is reset
            return False
        return "TensorBoard" in browser.title

    until(loaded, "TensorBoard's page opens")
    until(lambda: "first" in text_of(browser), "the run is listed")
    until(lambda: f"{loss(STEPS - 1):.4f}" in text_of(browser), "the last value is in the card's table")

    browser.get(f"{url}/data/plugin/scalars/scalars?run=first&tag=training%2Floss")
    points = json.loads(text_of(browser))
    assert [step for _, step, _ in points] == list(range(STEPS))
    assert [value for _, _, value in points] == pytest.approx([loss(step) for step in range(STEPS)])

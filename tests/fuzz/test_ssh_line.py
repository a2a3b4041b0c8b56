"""The kept corpus of the SSH proxy's first line, and mutations of it that are the same on every run."""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tests.fuzz.mutation import corpus
from tests.fuzz.ssh_line import check_all, mutated

Run = Callable[[Coroutine[Any, Any, None]], None]


def test_kept_lines_break_nothing(run: Run) -> None:
    run(check_all(corpus("ssh_line")))


@pytest.mark.parametrize("seed", range(4))
def test_mutated_lines_break_nothing(run: Run, seed: int) -> None:
    rng = random.Random(seed)
    inputs = corpus("ssh_line")
    run(check_all([mutated(inputs, rng) for _ in range(250)]))

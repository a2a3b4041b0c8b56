"""The kept corpus, and a few mutations of it that are the same on every run."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.fuzz import frame
from tests.fuzz.mutation import corpus, kept, mutate


@pytest.mark.parametrize("path", kept("frame"), ids=lambda path: path.name)
def test_kept_input_breaks_nothing(path: Path) -> None:
    frame.check(path.read_bytes())


@pytest.mark.parametrize("seed", range(4))
def test_mutated_inputs_break_nothing(seed: int) -> None:
    rng = random.Random(seed)
    inputs = corpus("frame")
    for _ in range(250):
        frame.check(mutate(rng.choice(inputs), inputs, rng))

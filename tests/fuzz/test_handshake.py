"""The kept corpora of both sides of the handshake, and mutations of them that are the same on every run."""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from tests.fuzz.handshake import TARGETS, check_all
from tests.fuzz.mutation import corpus, mutate

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.mark.parametrize("target", TARGETS)
def test_kept_handshakes_break_nothing(run: Run, target: str) -> None:
    run(check_all(target, corpus(target)))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("seed", range(4))
def test_mutated_handshakes_break_nothing(run: Run, target: str, seed: int) -> None:
    rng = random.Random(seed)
    inputs = corpus(target)
    run(check_all(target, [mutate(rng.choice(inputs), inputs, rng) for _ in range(150)]))

"""What all tests share."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest

from kohakuriver import loops

T = TypeVar("T")


@pytest.fixture
def run() -> Callable[[Coroutine[Any, Any, T]], T]:
    """Run a coroutine on a new loop of the kind that KOHAKURIVER_LOOP names."""
    return loops.run

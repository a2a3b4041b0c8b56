"""One suite, two implementations: the ids say which one runs. The extension missing is an error, never a skip."""

from __future__ import annotations

from typing import Any

import pytest

from kohakuriver import _frame
from tests.reference import frame as twin


@pytest.fixture(params=[_frame, twin], ids=["c", "py"])
def frame(request: pytest.FixtureRequest) -> Any:
    """The module under test."""
    return request.param

"""One suite, two implementations: the ids say which one runs. The extension missing is an error, never a skip."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings

from kohakuriver import _frame
from tests.reference import frame as twin

# How long an example takes says nothing here, on a busy machine or under the sanitizers.
settings.register_profile("without deadlines", deadline=None)
settings.load_profile("without deadlines")


@pytest.fixture(params=[_frame, twin], ids=["c", "py"])
def frame(request: pytest.FixtureRequest) -> Any:
    """The module under test."""
    return request.param

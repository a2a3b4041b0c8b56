"""How HTTP requests take turns; what they may be is in tests/integration/test_limits.py."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from kohakuriver.tunnel.turns import Turn
from kohakuriver.web.request_limits import STARTED_AT_ONCE

Run = Callable[[Coroutine[Any, Any, None]], None]


def test_few_requests_are_begun_in_a_turn_and_all_in_order(run: Run) -> None:
    async def main() -> None:
        starts, begun = Turn(STARTED_AT_ONCE), list[int]()
        for number in range(2 * STARTED_AT_ONCE + 1):
            starts.begin(partial(begun.append, number))
        for turn in (1, 2):
            assert begun == list(range(turn * STARTED_AT_ONCE))
            await asyncio.sleep(0)
        starts.begin(partial(begun.append, 2 * STARTED_AT_ONCE + 1))
        assert begun == list(range(2 * STARTED_AT_ONCE + 2))

    run(main())

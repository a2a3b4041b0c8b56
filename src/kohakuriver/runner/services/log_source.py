"""What a task prints, as lines of JSON for the host (docs/protocol.md §4)."""

from __future__ import annotations

import json
from dataclasses import asdict

from kohakuriver.runner.backends.printed import Printed

__all__ = ["LogSource"]


class LogSource:
    """Makes an HTTP answer's lines of what a backend reads."""

    def __init__(self, printed: Printed) -> None:
        self._printed = printed

    async def read(self) -> bytes | None:
        """The next lines, None at the end. Raises KohakuRiverError."""
        lines = await self._printed.read()
        if lines is None:
            return None
        return "".join(json.dumps(asdict(line)) + "\n" for line in lines).encode()

    async def close(self) -> None:
        """Free what is held."""
        await self._printed.close()

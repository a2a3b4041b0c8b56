"""What all that happens to a forward has in common."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

__all__ = ["Event", "Served"]


@dataclass(frozen=True)
class Event:
    """Something that happened to a forward. `to_json` is one line of `forward --json`."""

    event: ClassVar[str]

    def to_json(self) -> dict[str, Any]:
        return {"event": self.event, **asdict(self)}


@dataclass(frozen=True)
class Served(Event):
    """A port of the task has an address of its own, `url`; `link` lets one browser in, once, within a minute."""

    event: ClassVar[str] = "served"
    url: str
    link: str
    remote_port: int

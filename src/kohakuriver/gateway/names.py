"""The addresses of tasks' ports: `http://lab-8888.localhost:PORT/`. No I/O.

One label has both the task and the port, so each port is an origin of its own to a browser.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["LOOPBACK_NAMES", "Place", "authority", "is_label"]

# With a dash and five digits behind it, it is a label of the domain name system; browsers read xn-- as something else.
_LABEL = re.compile(r"(?!..--)[a-z0-9](?:[a-z0-9-]{0,55}[a-z0-9])?")
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
"""What a browser on this machine may have asked for by hand."""
HTTP_PORT = 80


def is_label(task: str) -> bool:
    """Whether a task's name can stand in an address; its id always can."""
    return _LABEL.fullmatch(task) is not None


def authority(host: str, port: int) -> str:
    """`host:port` as browsers write it: without the port that http has anyway."""
    return host if port == HTTP_PORT else f"{host}:{port}"


@dataclass(frozen=True)
class Place:
    """A port of a task, and the address that it has.

    Args:
        label: the task's name or id.
        port: its port.
        served_on: the port that its address is served on.
        preserve_host: the service is told the address as it is, not that it is on localhost.
    """

    label: str
    port: int
    served_on: int
    preserve_host: bool = False

    @property
    def host(self) -> str:
        """What a browser puts into Host."""
        return authority(f"{self.label}-{self.port}.localhost", self.served_on)

    @property
    def origin(self) -> str:
        return f"http://{self.host}"

    @property
    def url(self) -> str:
        return f"{self.origin}/"

    @property
    def inner_host(self) -> str:
        """What the service is told to be called."""
        return self.host if self.preserve_host else authority("localhost", self.port)

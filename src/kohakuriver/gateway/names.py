"""The addresses of tasks' ports, as `http://lab-8888.localhost:PORT/`. No I/O.

One label has both the task and the port, so each port is an origin of its own to a browser. Where a host has no names
for that, all ports are under one origin, each under a path of its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

__all__ = ["LOOPBACK_NAMES", "Place", "authority", "is_label"]

# With a dash and five digits behind it, it is a label of the domain name system; browsers read xn-- as something else.
_LABEL = re.compile(r"(?!..--)[a-z0-9](?:[a-z0-9-]{0,55}[a-z0-9])?")
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
"""What a browser on this machine may have asked for by hand."""
_PORT_OF = {"http": 80, "https": 443}


def is_label(task: str) -> bool:
    """Whether a task's name can stand in an address; its id always can."""
    return _LABEL.fullmatch(task) is not None


def authority(host: str, port: int, scheme: str = "http") -> str:
    """`host:port` as browsers write it: without the port that the scheme has anyway."""
    return host if port == _PORT_OF[scheme] else f"{host}:{port}"


@dataclass(frozen=True)
class Place:
    """A port of a task, and the address that it has.

    Args:
        label: the task's name or id.
        port: its port.
        served_on: the port that its address is served on.
        preserve_host: the service is told the address as it is, not that it is on localhost.
        name: how it is called in its address; "" for a name under localhost.
        scheme: that of its address, http or https.
        prefix: the path under which it is, as `/lab-k3hd7wq2m5ta/8888`; "" where its origin is its own.
        keep_prefix: the service is told paths as browsers have them, not without the prefix.
    """

    label: str
    port: int
    served_on: int
    preserve_host: bool = False
    name: str = ""
    scheme: str = "http"
    prefix: str = ""
    keep_prefix: bool = False

    @cached_property
    def host(self) -> str:
        """What a browser puts into Host."""
        return authority(self.name or f"{self.label}-{self.port}.localhost", self.served_on, self.scheme)

    @cached_property
    def origin(self) -> str:
        return f"{self.scheme}://{self.host}"

    @property
    def base(self) -> str:
        """What its paths are put behind, in a URL."""
        return f"{self.origin}{self.prefix}"

    @property
    def url(self) -> str:
        return f"{self.base}/"

    def path(self, target: bytes) -> bytes:
        """A path that a browser has asked for, without the prefix, under which it is."""
        return target[len(self.prefix) :] if self.prefix else target

    @cached_property
    def stripped(self) -> bytes:
        """What is in front of paths outside and not inside."""
        return b"" if self.keep_prefix else self.prefix.encode()

    def has(self, path: bytes) -> bool:
        """Whether a path, as browsers have it, is under the prefix."""
        own = self.prefix.encode()
        return path.startswith(own) and path[len(own) : len(own) + 1] in (b"", b"/", b"?", b"#")

    @cached_property
    def inner_host(self) -> str:
        """What the service is told to be called."""
        return self.host if self.preserve_host else authority("localhost", self.port)

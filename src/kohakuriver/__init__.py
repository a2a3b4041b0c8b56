"""KohakuRiver Tunnel: reach any port of any task on the cluster from your own machine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kohakuriver.errors import (
    HostUnreachableError,
    KohakuRiverError,
    LocalAddressError,
    NotAllowedError,
    NotFoundError,
    UnauthenticatedError,
    UnavailableError,
    UsageError,
)

if TYPE_CHECKING:
    from kohakuriver.client.api import Forward, forward, forward_sync

__version__ = "0.1.0"

__all__ = [
    "Forward",
    "HostUnreachableError",
    "KohakuRiverError",
    "LocalAddressError",
    "NotAllowedError",
    "NotFoundError",
    "UnauthenticatedError",
    "UnavailableError",
    "UsageError",
    "__version__",
    "forward",
    "forward_sync",
]

_LAZY = frozenset({"Forward", "forward", "forward_sync"})


def __getattr__(name: str) -> Any:
    # The host, the runner and the command line's --help import this package too, and none of them forwards anything.
    if name in _LAZY:
        from kohakuriver.client import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

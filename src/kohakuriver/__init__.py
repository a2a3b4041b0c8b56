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
    from kohakuriver.client.tasks import (
        ListeningPort,
        Task,
        TaskSync,
        create,
        create_sync,
        logs,
        logs_sync,
        ports,
        ports_sync,
        run,
        run_sync,
        status,
        status_sync,
        stop,
        stop_sync,
        tasks,
        tasks_sync,
    )

__version__ = "0.2.0"

__all__ = [
    "Forward",
    "HostUnreachableError",
    "KohakuRiverError",
    "ListeningPort",
    "LocalAddressError",
    "NotAllowedError",
    "NotFoundError",
    "Task",
    "TaskSync",
    "UnauthenticatedError",
    "UnavailableError",
    "UsageError",
    "__version__",
    "create",
    "create_sync",
    "forward",
    "forward_sync",
    "logs",
    "logs_sync",
    "ports",
    "ports_sync",
    "run",
    "run_sync",
    "status",
    "status_sync",
    "stop",
    "stop_sync",
    "tasks",
    "tasks_sync",
]

_IN = {"Forward": "api", "forward": "api", "forward_sync": "api"}


def __getattr__(name: str) -> Any:
    # The host, the runner and the command line's --help import this package too, and none of them needs any of these.
    if name in __all__:
        from importlib import import_module

        return getattr(import_module(f"kohakuriver.client.{_IN.get(name, 'tasks')}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*(name for name in globals() if name.startswith("__")), *__all__})

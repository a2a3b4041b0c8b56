"""What one peer may take of a host or a runner, and the environment that changes it (docs/guide/limits.md)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields

from kohakuriver.errors import UsageError

__all__ = ["Limits", "from_environment"]

LEAST_RATE = 64 << 10
LONGEST = 86_400 * 365.0


@dataclass(frozen=True)
class Limits:
    """Bytes, seconds and counts; 0 is no limit where the bounds below allow it.

    Each is set by its name in the environment: `KOHAKURIVER_MAX_STREAMS`.
    """

    max_tasks: int = 100
    """Tasks of one user, those that don't run included; it and the next ten can be set for single users."""
    max_running: int = 50
    """Tasks of one user that run."""
    max_tokens: int = 100
    """Tokens of one user that are good."""
    max_sessions: int = 1000
    """Forward sessions of one user that the host has open at a time."""
    max_requests: int = 100
    """HTTP requests and sessions that one user may begin in a second; five times as many may come at once."""
    max_under_way: int = 256
    """HTTP requests of one user that are under way."""
    max_failures: int = 5
    """Credentials that are no good from one address that are answered in a second; four times as many at once."""
    max_streams: int = 32_768
    """Streams of one session that are open at a time."""
    max_user_streams: int = 65_536
    """Streams of one user that are open on a node at a time, in all sessions together."""
    max_node_streams: int = 262_144
    """Streams of all users together that are open on a node at a time."""
    max_connects: int = 5000
    """Streams that one user may open on a node in a second; as many may come at once."""
    max_terminals: int = 128
    """Terminals and commands of one user that are open on a node at a time."""
    max_task_terminals: int = 64
    """Those in one task."""
    max_node_terminals: int = 1024
    """Those of all users on a node."""
    pull_timeout: float = 120.0
    """Seconds without any progress after which the pull of an image is given up."""
    max_memory: int = 64 << 30
    """Bytes of memory of one user's running containers together."""
    max_cpus: float = 32.0
    """Processors of one user's running containers together."""
    max_pids: int = 32_768
    """Processes and threads of one user's running containers together."""
    max_gpus: int = 8
    """GPUs of one user's running containers together."""
    max_log: int = 64 << 20
    """Bytes that are kept of what each of a user's tasks prints."""
    max_ttl: int = 0
    """Seconds that each task of a user runs before it is stopped, where it asks for less or nothing."""
    max_idle_stop: int = 0
    """Seconds without anybody connected after which each task of a user is stopped."""
    task_memory: int = 0
    """Bytes of memory of a container that asks for nothing; 0 stands for half of what the node has."""
    task_cpus: float = 0.0
    """Processors of such a container."""
    task_pids: int = 4096
    """Processes and threads of such a container."""
    task_shm: int = 64 << 20
    """Bytes of shared memory (/dev/shm) of such a container."""
    task_log: int = 64 << 20
    """Bytes that are kept of what a task on this node prints."""
    max_node_logs: int = 1 << 30
    """Bytes that a node keeps of what process tasks print, of all of them together."""
    max_rate: int = 0
    """Bytes a second of one session, each way."""
    max_message: int = 16 << 20
    """Bytes of one WebSocket message."""
    max_header: int = 32 << 10
    """Bytes of the head of one HTTP request, a WebSocket's opening handshake included."""
    max_body: int = 1 << 20
    """Bytes of the body of one HTTP request."""
    max_bodies: int = 64 << 20
    """Bytes of the bodies of all HTTP requests under way in one program: 64 of the largest, as installed."""
    max_backlog: int = 512 << 20
    """Bytes on their way to users that wait in one runner, of all sessions together."""
    max_user_backlog: int = 128 << 20
    """Of those, bytes on their way to one user, of all of that user's sessions together."""
    handshake_timeout: float = 10.0
    """Seconds that a peer has for its TLS handshake, and again to send a whole HTTP request."""
    max_waiting: int = 1000
    """Connections of strangers that have no request under way; when one more comes, the oldest goes."""
    max_handshakes: float = 5.0
    """SSH handshakes a second that one address may begin at the jump host; five times as many all together."""
    max_audit: int = 256 << 20
    """Bytes of the host's audit log, its rotated files included."""
    lease: float = 60.0
    """Seconds that a straight path may go on while its runner hears nothing from the host."""
    idle_timeout: float = 0.0
    """Seconds without a byte of payload after which a session is closed."""


_BOUNDS: dict[str, tuple[float, float]] = {
    "max_tasks": (0, 1 << 20),
    "max_running": (0, 1 << 20),
    "max_tokens": (0, 1 << 20),
    "max_memory": (16 << 20, 1 << 50),
    "max_cpus": (0.01, 1 << 20),
    "max_pids": (16, 1 << 30),
    "max_gpus": (0, 1 << 20),
    "max_log": (64 << 10, 1 << 40),
    "max_ttl": (60, LONGEST),
    "max_idle_stop": (60, LONGEST),
    "task_memory": (16 << 20, 1 << 50),
    "task_cpus": (0.01, 1 << 20),
    "task_pids": (16, 1 << 22),
    "task_shm": (64 << 10, 1 << 50),
    "task_log": (64 << 10, 1 << 40),
    "max_sessions": (0, 1 << 20),
    "max_requests": (0, 1 << 20),
    "max_under_way": (0, 1 << 20),
    "max_failures": (0, 1 << 20),
    "max_streams": (0, 1 << 20),
    "max_user_streams": (16, 1 << 24),
    "max_node_streams": (16, 1 << 24),
    "max_connects": (0, 1 << 20),
    "max_terminals": (1, 1 << 20),
    "max_task_terminals": (1, 1 << 20),
    "max_node_terminals": (1, 1 << 20),
    "pull_timeout": (1, LONGEST),
    "max_node_logs": (1 << 20, 1 << 50),
    "max_rate": (LEAST_RATE, 1 << 40),
    "max_message": (1 << 20, 16 << 20),
    "max_header": (4 << 10, 1 << 20),
    "max_body": (64 << 10, 64 << 20),
    "max_bodies": (1 << 20, 1 << 40),
    "max_backlog": (96 << 20, 1 << 40),
    "max_user_backlog": (96 << 20, 1 << 40),
    "handshake_timeout": (0.1, 600),
    "max_waiting": (16, 1 << 20),
    "max_handshakes": (0.1, 10_000),
    "max_audit": (1 << 20, 1 << 40),
    "lease": (1, LONGEST),
    "idle_timeout": (0.1, LONGEST),
}
_MAY_BE_OFF = {
    "max_tasks",
    "max_running",
    "max_tokens",
    "max_memory",
    "max_cpus",
    "max_pids",
    "max_gpus",
    "max_log",
    "max_ttl",
    "max_idle_stop",
    "task_cpus",
    "task_pids",
    "max_sessions",
    "max_requests",
    "max_under_way",
    "max_failures",
    "max_streams",
    "max_user_streams",
    "max_node_streams",
    "max_connects",
    "max_node_logs",
    "max_terminals",
    "max_task_terminals",
    "max_node_terminals",
    "pull_timeout",
    "max_rate",
    "max_backlog",
    "max_user_backlog",
    "max_audit",
    "idle_timeout",
}


def from_environment(environ: Mapping[str, str] = os.environ) -> Limits:
    """The limits that the environment gives. Raises UsageError with the variable's name."""
    given: dict[str, float] = {}
    for field in fields(Limits):
        name = f"KOHAKURIVER_{field.name.upper()}"
        if text := environ.get(name):
            given[field.name] = _number(name, field.name, text, whole=isinstance(field.default, int))
    return Limits(**given)  # type: ignore[arg-type]


def _number(variable: str, name: str, text: str, *, whole: bool) -> float:
    least, most = _BOUNDS[name]
    number: float
    try:
        number = int(text) if whole else float(text)
    except ValueError:
        number = -1
    if least <= number <= most or (number == 0 and name in _MAY_BE_OFF):
        return number
    kind = "a whole number" if whole else "a number"
    if least == 0:
        bounds = f"from 0 (no limit) to {most:.15g}"
    else:
        bounds = f"from {least:.15g} to {most:.15g}{', or 0 for no limit' if name in _MAY_BE_OFF else ''}"
    raise UsageError(f"{variable} must be {kind} {bounds}, not {text!r}.")

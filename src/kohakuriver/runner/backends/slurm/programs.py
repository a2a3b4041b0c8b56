"""How Slurm's programs, and those of the cluster's users, are started and ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Sequence
from typing import Any

from kohakuriver.runner.backends.slurm.users import ClusterUser

__all__ = ["END_SECONDS", "as_whom", "end", "start"]

_PASSED_ON = ("PATH", "LANG", "TZ", "SLURM_CONF")
"""What of the runner's environment they see; nothing that is a secret, for a user can read what their own programs
have in theirs, and a job gets all of it from sbatch(1)."""

_AS_AT_LOGIN = 'umask 022 && exec "$@"'
"""A service has a umask of its own (UMask= in systemd), which a job would have from sbatch(1)."""

END_SECONDS = 2.0
"""How long an end is waited for: a file system that does not answer can hold a program for longer."""


def as_whom(words: Sequence[str], who: ClusterUser | None) -> dict[str, Any]:
    """The `args`, `env` and `cwd` of a program (subprocess.Popen) that a user runs, or without one the runner."""
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    if who is None:
        return {"args": list(words), "env": environment, "cwd": "/"}
    args = ["sh", "-c", _AS_AT_LOGIN, "sh", *who.command(words)]
    return {"args": args, "env": {**environment, **who.environment}, "cwd": "/"}


async def start(words: Sequence[str], who: ClusterUser | None, stdin: int) -> asyncio.subprocess.Process:
    """Start a program whose output and errors are read here, as a user or as the runner. Raises OSError."""
    how = as_whom(words, who)
    args = how.pop("args")
    return await asyncio.create_subprocess_exec(
        *args, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how
    )


async def end(process: asyncio.subprocess.Process) -> None:
    """Kill a program, and let go of what it prints: where sudo(8) has started it, it is not ours to kill, and ends by
    itself.
    """
    transport: asyncio.SubprocessTransport = process._transport  # type: ignore[attr-defined]
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            process.kill()
        for number in (1, 2):
            if (pipe := transport.get_pipe_transport(number)) is not None:
                pipe.close()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(process.wait(), END_SECONDS)
    if process.returncode is not None:  # else uvloop would kill it once more, and say that it may not
        transport.close()

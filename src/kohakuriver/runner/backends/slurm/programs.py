"""How Slurm's programs, and those of the cluster's users, are started and ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import Sequence
from typing import Any

from kohakuriver.runner.backends.slurm.users import ClusterUser

__all__ = ["END_SECONDS", "Leash", "as_whom", "end", "start"]

_PASSED_ON = ("PATH", "LANG", "TZ", "SLURM_CONF")
"""What of the runner's environment they see; nothing that is a secret, for a user can read what their own programs
have in theirs, and a job gets all of it from sbatch(1)."""

_AS_AT_LOGIN = 'umask 022 && exec "$@"'
"""A service has a umask of its own (UMask= in systemd), which a job would have from sbatch(1)."""

_ON_TERMINAL = ': <"$0" && exec "$@"'
"""The first terminal that the leader of a session opens controls it (credentials(7))."""

END_SECONDS = 2.0
"""How long an end is waited for: a file system that does not answer can hold a program for longer."""


class Leash:
    """Ends a program, also one that sudo(8) has started for a user.

    That may not be ours to kill, and where it is, what it runs stays. So it gets a terminal of its own, which nothing
    is read from nor written to: when that hangs up, the kernel sends SIGHUP to whoever it controls, and sudo passes it
    on. A pipe that breaks would end only who writes. Raises OSError.
    """

    def __init__(self, who: ClusterUser | None) -> None:
        self._ours = self._theirs = -1
        if who is not None and not who.is_ours_to_end:
            self._ours, self._theirs = os.openpty()

    def on(self, how: dict[str, Any]) -> dict[str, Any]:
        """A program as `as_whom` has it, which is ended by this."""
        if self._ours < 0:
            return how
        args = ["sh", "-c", _ON_TERMINAL, os.ttyname(self._theirs), *how["args"]]
        return {**how, "args": args, "start_new_session": True}

    def end(self, process: subprocess.Popen[bytes] | asyncio.subprocess.Process) -> None:
        """Kill the program; nothing where it has ended."""
        if self._ours < 0:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
        self.let_go()

    def let_go(self) -> None:
        """Hang up, which nobody notices if it has ended, or was not started."""
        for number in (self._ours, self._theirs):
            if number >= 0:
                os.close(number)
        self._ours = self._theirs = -1


def as_whom(words: Sequence[str], who: ClusterUser | None) -> dict[str, Any]:
    """The `args`, `env` and `cwd` of a program (subprocess.Popen) that a user runs, or without one the runner."""
    environment = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
    if who is None:
        return {"args": list(words), "env": environment, "cwd": "/"}
    args = ["sh", "-c", _AS_AT_LOGIN, "sh", *who.command(words)]
    return {"args": args, "env": {**environment, **who.environment}, "cwd": "/"}


async def start(words: Sequence[str], who: ClusterUser | None, stdin: int, leash: Leash) -> asyncio.subprocess.Process:
    """Start a program whose output and errors are read here, as a user or as the runner. Raises OSError."""
    how = leash.on(as_whom(words, who))
    args = how.pop("args")
    return await asyncio.create_subprocess_exec(
        *args, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **how
    )


async def end(process: asyncio.subprocess.Process, leash: Leash) -> None:
    """Kill a program if it runs, and let go of it and of what it prints."""
    transport: asyncio.SubprocessTransport = process._transport  # type: ignore[attr-defined]
    if process.returncode is None:
        leash.end(process)
        for number in (1, 2):
            if (pipe := transport.get_pipe_transport(number)) is not None:
                pipe.close()
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(process.wait(), END_SECONDS)
    leash.let_go()
    if process.returncode is not None:  # else uvloop would kill it once more, and say that it may not
        transport.close()

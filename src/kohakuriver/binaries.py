"""The static programs that tasks get, and whether this installation has them: without cargo it was made without."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

__all__ = ["SSH_SERVER", "TUNNEL_CLIENT", "Binary", "missing", "ssh_server_options"]


class Binary(NamedTuple):
    """A program by its file's name, what it is, and the variable of the environment that may name another file."""

    name: str
    what: str
    variable: str

    def find(self) -> Path | None:
        """Where it is, None where there is none."""
        named = os.environ.get(self.variable)
        path = Path(named).absolute() if named else Path(__file__).parent / "bin" / self.name
        return path if os.access(path, os.X_OK) and path.is_file() else None


TUNNEL_CLIENT = Binary("tunnel-client", "static tunnel client", "KOHAKURIVER_TUNNEL_CLIENT")
SSH_SERVER = Binary("tunnel-sshd", "SSH server for tasks", "KOHAKURIVER_TUNNEL_SSHD")


def ssh_server_options(port: int, host_keys: Sequence[str], authorized_keys: str, algorithms: str) -> list[str]:
    """The command line of `tunnel-sshd` on a port of loopback, without the program.

    `host_keys` are its key files, Ed25519 first, and `algorithms` is "all" or "newest", which has only that one.
    """
    offered = [] if algorithms == "all" else ["--algorithms", algorithms]
    keys = host_keys if algorithms == "all" else host_keys[:1]
    words = [word for key in keys for word in ("--host-key", key)]
    return ["--listen", f"127.0.0.1:{port}", *words, "--authorized-keys", authorized_keys, *offered]


def missing() -> str | None:
    """What this installation lacks to run tasks here, and what to do, as a sentence; None where it has all."""
    lacking = [binary.what for binary in (TUNNEL_CLIENT, SSH_SERVER) if binary.find() is None]
    if not lacking:
        return None
    return (
        f"This installation has no {' and no '.join(lacking)}, which a runner needs for containers: to have it here, "
        "install it again with Rust's cargo on the path."
    )

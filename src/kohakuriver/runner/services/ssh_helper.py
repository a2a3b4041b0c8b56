"""Giving a task an SSH server: which program it is, its host keys, the keys it lets in, and how to see that it serves.

A container's own sshd is used where its image has one; a process, and any other container, gets `tunnel-sshd`, a
static binary that needs nothing of its surroundings. Source: docs/architecture.md.
"""

from __future__ import annotations

import asyncio
import io
import os
import socket
import tarfile
import time
from collections.abc import Mapping
from pathlib import Path

from kohakuriver import host_keys
from kohakuriver.binaries import SSH_SERVER, ssh_server_options
from kohakuriver.config import write_private
from kohakuriver.errors import UnavailableError
from kohakuriver.runner.services.state import State, TaskRecord
from kohakuriver.runner.services.tunnel_helper import INSIDE, install_binary

__all__ = ["CONTAINER_PORT", "OWN_SSHD", "SshHelper", "free_port", "until_listening"]

CONTAINER_PORT = 62022
"""Where the SSH server of a container listens, on its loopback: above the ports that the kernel hands out."""

OWN_SSHD = ("/usr/sbin/sshd", "/usr/bin/sshd", "/usr/local/sbin/sshd")
"""Where images have their own sshd."""

START_SECONDS = 5.0
_LOOK_AGAIN_SECONDS = 0.02

_FOLDER = f"{INSIDE}/ssh"
_HOST_KEY = "host_key"
_ECDSA_HOST_KEY = "host_key_ecdsa"
_AUTHORIZED_KEYS = "authorized_keys"
_CONFIG = "sshd_config"

# Forwarding is what people and editors use SSH for, and images differ in what they allow: the configuration is ours.
_SSHD_CONFIG = f"""\
ListenAddress 127.0.0.1:{CONTAINER_PORT}
HostKey {_FOLDER}/{_HOST_KEY}
HostKey {_FOLDER}/{_ECDSA_HOST_KEY}
AuthorizedKeysFile {_FOLDER}/{_AUTHORIZED_KEYS} .ssh/authorized_keys
PidFile none
PermitRootLogin prohibit-password
PubkeyAuthentication yes
PasswordAuthentication no
KbdInteractiveAuthentication no
AllowTcpForwarding yes
AllowAgentForwarding yes
PrintMotd no
Subsystem sftp internal-sftp
AcceptEnv LANG LC_* COLORTERM
MaxSessions 64
MaxStartups 64
"""


class SshHelper:
    """Knows the SSH server of this installation, and keeps each task's host keys in its directory.

    `algorithms` are what it offers, by name: "all" or "newest".
    """

    def __init__(self, state: State, algorithms: str = "all") -> None:
        self._state = state
        self._algorithms = algorithms
        self._source = SSH_SERVER.find()

    def prepare(self, task: TaskRecord) -> None:
        """Lay down a task's host keys, made once and kept, and the keys that are let in."""
        folder = self._folder(task)
        task.ssh_host_key = host_keys.ed25519(folder / _HOST_KEY)
        task.ssh_host_key_ecdsa = host_keys.ecdsa(folder / _ECDSA_HOST_KEY)
        write_private(folder / _AUTHORIZED_KEYS, "".join(f"{line}\n" for line in task.ssh_keys))

    def process_command(self, task: TaskRecord, port: int) -> list[str]:
        """The command line of an SSH server on the node itself. Raises UnavailableError without a binary."""
        return [str(self.binary()), *self._options(port, str(self._folder(task)))]

    def container_command(self, sshd: str | None) -> list[str]:
        """The command line inside a container; `sshd` is the path of its own, None for ours.

        Raises UnavailableError where it has to be ours and there is none.
        """
        if sshd is None:
            self.binary()
            return [f"{INSIDE}/{SSH_SERVER.name}", *self._options(CONTAINER_PORT, _FOLDER)]
        return [sshd, "-D", "-e", "-f", f"{_FOLDER}/{_CONFIG}"]

    def mounts(self) -> list[tuple[Path, str]]:
        """What a new container sees read-only beside the tunnel client, in case its image has no sshd."""
        return [] if self._source is None else [(self.binary(), f"{INSIDE}/{SSH_SERVER.name}")]

    def archive(self, task: TaskRecord, environment: Mapping[str, str]) -> bytes:
        """A tar archive for a container's root: keys, and what its own sshd needs.

        `environment` is the container's, which an sshd, other than ours, does not pass on to its sessions.
        """
        folder = self._folder(task)
        config = _SSHD_CONFIG + _set_env(environment)
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            # Debian's sshd wants /run/sshd, which a service manager would make.
            for name, mode in ((_FOLDER, 0o755), ("/run/sshd", 0o755)):
                entry = tarfile.TarInfo(name.lstrip("/"))
                entry.type, entry.mode = tarfile.DIRTYPE, mode
                tar.addfile(entry)
            for name, content, mode in (
                (_HOST_KEY, (folder / _HOST_KEY).read_bytes(), 0o600),
                (_ECDSA_HOST_KEY, (folder / _ECDSA_HOST_KEY).read_bytes(), 0o600),
                (_AUTHORIZED_KEYS, (folder / _AUTHORIZED_KEYS).read_bytes(), 0o644),
                (_CONFIG, config.encode(), 0o600),  # with the container's environment, which may have secrets
            ):
                entry = tarfile.TarInfo(f"{_FOLDER.lstrip('/')}/{name}")
                entry.size, entry.mode = len(content), mode
                tar.addfile(entry, io.BytesIO(content))
        return out.getvalue()

    def binary(self) -> Path:
        """Our copy of the SSH server. Raises UnavailableError."""
        if self._source is None:
            raise UnavailableError(
                "This node's installation has no SSH server for tasks; reinstall kohakuriver there where cargo is, or "
                "set KOHAKURIVER_TUNNEL_SSHD to one.",
                code="no_ssh_server",
            )
        return install_binary(self._state, self._source)

    def files(self, task: TaskRecord) -> list[Path]:
        """What the SSH server of a process task reads: its host keys, and the keys that are let in."""
        return [self._folder(task) / name for name in (_HOST_KEY, _ECDSA_HOST_KEY, _AUTHORIZED_KEYS)]

    def log_file(self, task: TaskRecord) -> Path:
        """Where the SSH server of a process task says what is the matter."""
        return self._folder(task) / "log"

    def _options(self, port: int, folder: str) -> list[str]:
        keys = [f"{folder}/{name}" for name in (_HOST_KEY, _ECDSA_HOST_KEY)]
        return ssh_server_options(port, keys, f"{folder}/{_AUTHORIZED_KEYS}", self._algorithms)

    def _folder(self, task: TaskRecord) -> Path:
        folder = self._state.task_dir(task.container) / "ssh"
        folder.mkdir(exist_ok=True, mode=0o700)
        return folder


def _set_env(environment: Mapping[str, str]) -> str:
    """A line that gives sessions these variables; a value that sshd's syntax can't say is left out."""
    sayable = [
        f'"{name}={value}"'
        for name, value in environment.items()
        if name not in ("HOME", "USER", "LOGNAME", "SHELL") and value.isprintable() and not set('"\\') & set(value)
    ]
    return f"SetEnv {' '.join(sayable)}\n" if sayable else ""


def free_port(preferred: int | None) -> int:
    """A free TCP port of this node's loopback: `preferred` if that is one."""
    for port in (preferred or 0, 0):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(sock.getsockname()[1])
    raise UnavailableError("This node has no free port left for an SSH server.")


async def until_listening(pid: int, port: int) -> bool:
    """Wait until something listens on `port` in the network that process `pid` sees, for a few seconds.

    False when that does not happen. Where the process can't be looked into, as with an engine on another kernel, it is
    taken to be so.
    """
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            if _listens(pid, port):
                return True
        except PermissionError:
            return True
        except OSError:
            return not Path("/proc/self/net").is_dir()
        if time.monotonic() >= deadline:
            return False
        await asyncio.sleep(_LOOK_AGAIN_SECONDS)


def _listens(pid: int, port: int) -> bool:
    end, listening = f":{port:04X}", "0A"
    os.stat(f"/proc/{pid}")  # noqa: PTH116 - only to raise where the process is gone
    for line in Path(f"/proc/{pid}/net/tcp").read_text("ascii").splitlines()[1:]:
        columns = line.split()
        if columns[1].endswith(end) and columns[3] == listening:
            return True
    return False

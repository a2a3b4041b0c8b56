"""Putting the tunnel client into a task: which program it is, where it lies, what it is told.

Source: docs/architecture.md (injection), docs/protocol.md §5 (the container's own token).
"""

from __future__ import annotations

import hashlib
import io
import secrets
import shutil
import sys
import tarfile
from pathlib import Path

from kohakuriver.binaries import TUNNEL_CLIENT
from kohakuriver.config import write_private
from kohakuriver.errors import UnavailableError
from kohakuriver.runner.services.state import State, TaskRecord
from kohakuriver.tunnel.settings import variables

__all__ = ["DOOR", "FIRST_TOKEN", "INSIDE", "TunnelHelper", "install_binary", "name_token", "new_token"]

INSIDE = "/.kohakuriver"
"""Where the tunnel client and its token lie inside a container."""

DOOR = f"{INSIDE}/runner"
"""Where a container finds the directory with its own socket of the runner."""

_PROGRAM = f"{INSIDE}/{TUNNEL_CLIENT.name}"
_TOKEN_FOLDER = f"{INSIDE}/tunnel"
FIRST_TOKEN = "token"
"""The file's name for the tunnel client that a container begins with: no older one runs then."""


def name_token(task: TaskRecord) -> None:
    """Give the next tunnel client of a task a token file of its own: an older one would take what it finds in its."""
    task.token_name = f"{FIRST_TOKEN}-{secrets.token_hex(4)}"


def new_token(task: TaskRecord) -> str:
    """Make the token of a task's next start, or a fresh one for this; the one before is worth nothing from now on."""
    task.tunnel_token, task.tunnel_client, task.token_start = secrets.token_hex(32), "", None
    return task.tunnel_token


class TunnelHelper:
    """Knows the tunnel client of this installation, and lays down each container's own token."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._source = TUNNEL_CLIENT.find()
        self.settings = variables()
        """Windows and times that every task's tunnel client is told, unless the task's own environment has others."""

    @property
    def has_binary(self) -> bool:
        """Whether there is a static tunnel client, which containers need."""
        return self._source is not None

    def process_command(self, command: list[str], *, copied: bool = False) -> list[str]:
        """The command line that runs `command` beside a tunnel client on the node itself.

        `copied`: by our copy of the tunnel client, for a user who may not reach this installation.
        """
        if self._source is None:
            program = [sys.executable, "-m", "kohakuriver.tunnel.client"]
        else:
            program = [str(install_binary(self._state, self._source) if copied else self._source)]
        return [*program, "run", *(["--", *command] if command else [])]

    def container_command(self, command: list[str], *, open_stdin: bool = False) -> list[str]:
        """The command line that runs `command` inside a container, with the tunnel client as PID 1.

        With `open_stdin` the command's input stays open and empty.
        """
        options = ["--open-stdin"] if open_stdin else []
        return [_PROGRAM, *options, "run", "--", *command] if command else [_PROGRAM, "run"]

    def adopted_command(self, task: TaskRecord, tunnel_url: str) -> list[str]:
        """The command line of a tunnel client that is started inside a container that runs already."""
        token = f"{_TOKEN_FOLDER}/{task.token_name}"
        options = {"--runner-url": tunnel_url, "--container-id": task.container, "--take-token": token}
        return [_PROGRAM, *(part for option in options.items() for part in option)]

    def environment(self, container: str, tunnel_url: str, token_file: str) -> dict[str, str]:
        """What a tunnel client reads from its environment."""
        return {
            "KOHAKURIVER_TUNNEL_URL": tunnel_url,
            "KOHAKURIVER_CONTAINER_ID": container,
            "KOHAKURIVER_TUNNEL_TAKE_TOKEN": token_file,
        }

    def container_environment(self, container: str, tunnel_url: str) -> dict[str, str]:
        """`environment` for inside a container."""
        return self.environment(container, tunnel_url, f"{_TOKEN_FOLDER}/{FIRST_TOKEN}")

    def token_file(self, task: TaskRecord) -> Path:
        """A file with a process task's token, in a directory that is the runner's alone; its client takes it away."""
        path = self._state.task_dir(task.container) / task.token_name
        for older in path.parent.glob(f"{FIRST_TOKEN}-*"):  # of a client that ended before it took it
            older.unlink()
        write_private(path, task.tunnel_token)
        return path

    def forget(self, container: str) -> None:
        """Remove what was laid down for a container that is gone."""
        shutil.rmtree(self._state.task_dir(container), ignore_errors=True)

    def mounts(self) -> list[tuple[Path, str]]:
        """What a new container sees read-only: files on the node, and their places inside. Raises UnavailableError."""
        return [(self.program(), _PROGRAM)]

    def program_archive(self) -> bytes:
        """A tar archive with the tunnel client, for the root of a container that is there already.

        Raises UnavailableError.
        """
        return _archive(
            (INSIDE, None, 0o755, 0),
            (_PROGRAM, self.program().read_bytes(), 0o755, 0),
        )

    def token_archive(self, task: TaskRecord, user: int) -> bytes:
        """A tar archive with a task's token, for its container's root.

        Only the `user` that its tunnel client runs as, a number as the container counts, can read it and take it away.
        """
        token = task.tunnel_token.encode()
        return _archive(
            (INSIDE, None, 0o755, 0),
            (_TOKEN_FOLDER, None, 0o700, user),
            (f"{_TOKEN_FOLDER}/{task.token_name}", token, 0o400, user),
        )

    def program(self) -> Path:
        """Our copy of the tunnel client. Raises UnavailableError."""
        if self._source is None:
            raise UnavailableError(
                "This installation has no static tunnel client, which containers need; reinstall kohakuriver where "
                "cargo is, or set KOHAKURIVER_TUNNEL_CLIENT to one.",
                code="no_tunnel_client",
            )
        return install_binary(self._state, self._source)


def _archive(*entries: tuple[str, bytes | None, int, int]) -> bytes:
    """A tar archive of paths, each with its content (None for a folder), mode and owner."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for path, content, mode, user in entries:
            entry = tarfile.TarInfo(path.lstrip("/"))
            entry.mode, entry.uid = mode, user
            if content is None:
                entry.type = tarfile.DIRTYPE
                tar.addfile(entry)
            else:
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def install_binary(state: State, source: Path) -> Path:
    """Our copy of a program, named after its content: containers keep theirs when the package changes."""
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    target = state.directory / "bin" / f"{source.name}-{digest}"
    if not target.exists():
        target.parent.mkdir(exist_ok=True)
        partial = target.with_suffix(".new")
        shutil.copyfile(source, partial)
        partial.chmod(0o755)
        partial.replace(target)
    return target

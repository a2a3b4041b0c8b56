"""Putting the tunnel client into a task: which program it is, where it lies, what it is told.

Source: docs/architecture.md (injection), docs/protocol.md §5 (the container's own token).
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import sys
import tarfile
from pathlib import Path

import kohakuriver
from kohakuriver.errors import UnavailableError
from kohakuriver.runner.services.state import State
from kohakuriver.tunnel.settings import variables

__all__ = ["INSIDE", "TunnelHelper", "find_binary", "install_binary"]

INSIDE = "/.kohakuriver"
"""Where the tunnel client and its token lie inside a container."""

_BINARY = "tunnel-client"
_TOKEN = "token"


class TunnelHelper:
    """Knows the tunnel client of this installation, and hands out each container's own token."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._source = find_binary(_BINARY, "KOHAKURIVER_TUNNEL_CLIENT")
        self.settings = variables()
        """Windows and times that every task's tunnel client is told, unless the task's own environment has others."""

    @property
    def has_binary(self) -> bool:
        """Whether there is a static tunnel client, which containers need."""
        return self._source is not None

    def process_command(self, command: list[str]) -> list[str]:
        """The command line that runs `command` beside a tunnel client on the node itself."""
        program = [sys.executable, "-m", "kohakuriver.tunnel.client"] if self._source is None else [str(self._source)]
        return [*program, "run", *(["--", *command] if command else [])]

    def container_command(self, command: list[str]) -> list[str]:
        """The command line that runs `command` inside a container, with the tunnel client as PID 1."""
        return [f"{INSIDE}/{_BINARY}", "run", *(["--", *command] if command else [])]

    def adopted_command(self, container: str, tunnel_url: str) -> list[str]:
        """The command line of a tunnel client that is started inside a container that runs already."""
        options = {"--runner-url": tunnel_url, "--container-id": container, "--token-file": f"{INSIDE}/{_TOKEN}"}
        return [f"{INSIDE}/{_BINARY}", *(part for option in options.items() for part in option)]

    def environment(self, container: str, tunnel_url: str, token_file: str) -> dict[str, str]:
        """What a tunnel client reads from its environment."""
        return {
            "KOHAKURIVER_TUNNEL_URL": tunnel_url,
            "KOHAKURIVER_CONTAINER_ID": container,
            "KOHAKURIVER_TUNNEL_TOKEN_FILE": token_file,
        }

    def container_environment(self, container: str, tunnel_url: str) -> dict[str, str]:
        """`environment` for inside a container."""
        return self.environment(container, tunnel_url, f"{INSIDE}/{_TOKEN}")

    def token_file(self, container: str, *, mode: int = 0o600) -> Path:
        """The file with the container's own token, in the task's directory, which is the runner's alone."""
        path = self._state.task_dir(container) / _TOKEN
        path.write_text(self._state.tunnel_token(container), "utf-8")
        path.chmod(mode)
        return path

    def forget(self, container: str) -> None:
        """Remove what was laid down for a container that is gone."""
        shutil.rmtree(self._state.task_dir(container), ignore_errors=True)

    def mounts(self, container: str) -> list[tuple[Path, str]]:
        """What a new container sees read-only: files on the node, and their places inside. Raises UnavailableError.

        The token's mode lets the container's user read it, whichever user that is.
        """
        token = self.token_file(container, mode=0o644)
        return [(self._installed_binary(), f"{INSIDE}/{_BINARY}"), (token, f"{INSIDE}/{_TOKEN}")]

    def archive(self, container: str) -> bytes:
        """A tar archive of `INSIDE` for a container that is there already. Raises UnavailableError."""
        binary = self._installed_binary().read_bytes()
        token = self._state.tunnel_token(container).encode()
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            folder = tarfile.TarInfo(INSIDE.lstrip("/"))
            folder.type, folder.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(folder)
            for name, content, mode in ((_BINARY, binary, 0o755), (_TOKEN, token, 0o644)):
                file = tarfile.TarInfo(f"{folder.name}/{name}")
                file.size, file.mode = len(content), mode
                tar.addfile(file, io.BytesIO(content))
        return out.getvalue()

    def _installed_binary(self) -> Path:
        """Our copy of the tunnel client. Raises UnavailableError."""
        if self._source is None:
            raise UnavailableError(
                "This installation has no static tunnel client, which containers need; reinstall kohakuriver where "
                "cargo is, or set KOHAKURIVER_TUNNEL_CLIENT to one.",
                code="no_tunnel_client",
            )
        return install_binary(self._state, self._source)


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


def find_binary(name: str, variable: str) -> Path | None:
    """The program of that name in this installation; the environment's `variable` may name another."""
    built_in = Path(kohakuriver.__file__).parent / "bin" / name
    named = os.environ.get(variable)
    path = Path(named).absolute() if named else built_in
    return path if os.access(path, os.X_OK) and path.is_file() else None

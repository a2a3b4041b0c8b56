"""What a runner keeps over its restarts: its identity, its port, its tasks, and what it marks users with."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kohakuriver.config import write_private
from kohakuriver.task import TaskOrder, TaskReport, next_revision, part_of, taken_from

__all__ = ["State", "TaskRecord"]


@dataclass
class TaskRecord(TaskOrder, TaskReport):
    """A task on this node: what was ordered, what is reported, and what only the node has to know.

    `engine_id` is Docker's own id of the container. `tunnel_url` is where the tunnel client that began with the task
    dials; the `exec_*` are about one that was put into a running container, the `ssh_exec_*` about an SSH server there.
    `stopped` means that the task was stopped on purpose, by `stop_reason` where that was nobody. `deadline` is when its
    time to live is over, and `idle_deadline` how long it may go on being idle, as a runner that ended kept it. `user`
    is who started it last, "" where nobody knows. `printed_at` is the file that a scheduler's job prints
    into, and `cluster_user` whose it is there.

    For its restart policy, `halted` means that somebody has stopped it, `cut_off` that it ended with its node, and
    `failures` are those in a row after which it was to run again.

    `tunnel_token` opens the tunnel of the task's present start. It belongs to the tunnel client that showed it first,
    `tunnel_client` (a digest of the id that it made for itself), and is taken from the addresses `tunnel_from` alone,
    None where these are not known. `token_start` is the start of a tunnel client that it was given to, as the backend
    tells starts apart; None where one is due. `token_name` is the file in which that client looks for it: one
    of its own for each that may begin while an older one still runs, since whoever finds a token takes it away.
    """

    engine_id: str | None = None
    exec_id: str | None = None
    exec_url: str | None = None
    exec_start: str | None = None
    ssh_exec_id: str | None = None
    ssh_exec_start: str | None = None
    stopped: bool = False
    stop_reason: str | None = None
    deadline: list[str | float] | None = None
    idle_deadline: list[str | float] | None = None
    mounted: list[str] = field(default_factory=list)
    halted: bool = False
    cut_off: bool = False
    failures: int = 0
    user: str = ""
    tunnel_url: str | None = None
    printed_at: str = ""
    cluster_user: str = ""
    tunnel_token: str = field(default="", repr=False)
    tunnel_client: str = ""
    tunnel_from: list[str] | None = None
    token_start: str | None = None
    token_name: str = "token"
    status: str = "starting"
    revision: int = field(default_factory=next_revision)

    @property
    def active(self) -> bool:
        """Whether the task runs or is about to."""
        return self.status in ("starting", "running")

    @property
    def has_door(self) -> bool:
        """Whether its tunnel client comes by a Unix socket that is the task's own, and from nowhere else."""
        return (self.tunnel_url or "").startswith("unix:")

    @property
    def dialled(self) -> bool:
        """Whether the runner itself dials the task's ports, with no tunnel client inside."""
        return self.no_client or self.address is not None

    def report(self) -> dict[str, Any]:
        """What the host hears of it."""
        return {**part_of(self, TaskReport, without=("traffic",)), "container": self.container}


class State:
    """The runner's state directory; everything in it is for the runner's user alone."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory = directory.absolute()  # engines and tasks have other working directories
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        directory.chmod(0o700)
        self.instance = self._keep("instance", secrets.token_hex(16))
        self._mark_key = bytes.fromhex(self._keep("mark-key", secrets.token_hex(32)))

    def _keep(self, name: str, fresh: str) -> str:
        path = self.directory / name
        if not path.exists():
            write_private(path, fresh + "\n")
        return path.read_text("utf-8").strip()

    def mark(self, user: str, container: str) -> bytes:
        """What the container's end knows a user by, "" for nobody: 16 bytes that tell no more (docs/protocol.md §3)."""
        return hmac.new(self._mark_key, f"{user}\0{container}".encode(), hashlib.sha256).digest()[:16]

    @property
    def last_port(self) -> int:
        """The port that the runner had when it ran last, 0 if it never did.

        Containers that outlive the runner keep dialling it, so "any free port" means this one first.
        """
        try:
            return int((self.directory / "port").read_text("utf-8"))
        except (OSError, ValueError):
            return 0

    @last_port.setter
    def last_port(self, port: int) -> None:
        write_private(self.directory / "port", f"{port}\n")

    def port_at(self, address: str) -> int:
        """The port that containers found the runner at last time at this address of the node; 0 if they never did."""
        return int(self._ports().get(address, 0))

    def keep_port_at(self, address: str, port: int) -> None:
        """Remember it: tunnel clients that outlive the runner keep dialling it."""
        write_private(self.directory / "ports.json", json.dumps({**self._ports(), address: port}))

    def _ports(self) -> dict[str, int]:
        try:
            return dict(json.loads((self.directory / "ports.json").read_text("utf-8")))
        except (OSError, ValueError):
            return {}

    @property
    def ticket_key(self) -> bytes | None:
        """What the host's tickets are signed with, as of the last registration.

        Kept, so that sessions can be opened at once after a restart.
        """
        try:
            return bytes.fromhex((self.directory / "ticket-key").read_text("utf-8"))
        except (OSError, ValueError):
            return None

    @ticket_key.setter
    def ticket_key(self, key: bytes) -> None:
        write_private(self.directory / "ticket-key", key.hex() + "\n")

    def load_tasks(self) -> list[TaskRecord]:
        """The tasks as they were saved last."""
        try:
            saved = json.loads((self.directory / "tasks.json").read_text("utf-8"))
        except FileNotFoundError:
            return []
        return [taken_from(task, TaskRecord) for task in saved]

    def save_tasks(self, tasks: Iterable[TaskRecord]) -> None:
        """Write all tasks down in one step."""
        write_private(self.directory / "tasks.json", json.dumps([asdict(task) for task in tasks], indent=1))

    def task_path(self, container: str) -> Path:
        """Where the directory of one task is, if there is one."""
        return self.directory / "tasks" / container

    def task_dir(self, container: str) -> Path:
        """The directory of one task, made if need be."""
        path = self.task_path(container)
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        return path

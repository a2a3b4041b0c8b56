"""The one interface behind which the ways of running a task live."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from kohakuriver.errors import UnavailableError
from kohakuriver.images import Registries
from kohakuriver.limits import Limits
from kohakuriver.mount_roots import MountRoots
from kohakuriver.relay.direct import DirectTarget
from kohakuriver.relay.open_ports import TaskSockets
from kohakuriver.runner.backends.printed import LogRequest, Printed
from kohakuriver.runner.services.doors import Doors
from kohakuriver.runner.services.gpus import Gpu
from kohakuriver.runner.services.ssh_helper import SshHelper
from kohakuriver.runner.services.state import State, TaskRecord
from kohakuriver.runner.services.tunnel_helper import TunnelHelper
from kohakuriver.tunnel.accept import Peer

__all__ = [
    "CTRL_D",
    "STDERR",
    "STDOUT",
    "Backend",
    "ExecRequest",
    "ExecSession",
    "Reporter",
    "Surroundings",
    "locale_for",
]

STDOUT: Final = 1
STDERR: Final = 2
CTRL_D: Final = b"\x04"


class Reporter(Protocol):
    """What a backend calls with a task's state; `message` is for a person, without a full stop.

    `exit_code` is that of a task that has ended, 128 + N after signal N.
    """

    def __call__(
        self, container: str, status: str, message: str | None = None, exit_code: int | None = None
    ) -> None: ...


@dataclass(frozen=True)
class ExecRequest:
    """What to run inside a task that runs already.

    `command` is a program and its arguments, searched for in the task's PATH; empty means the best shell that is
    there. With `tty` it gets a terminal of `rows` x `cols` characters, otherwise three pipes. `env` is added to the
    task's own environment. `user` and `workdir` are "" for those that the task has itself.
    """

    command: Sequence[str] = ()
    tty: bool = False
    rows: int = 24
    cols: int = 80
    env: Mapping[str, str] = field(default_factory=dict)
    user: str = ""
    workdir: str = ""


def locale_for(request: ExecRequest, known: Collection[str]) -> dict[str, str]:
    """What a command on a terminal needs besides the variables `known`, to show more than ASCII."""
    if not request.tty or {"LANG", "LC_ALL", "LC_CTYPE"} & set(known):
        return {}
    return {"LANG": "C.UTF-8"}


class ExecSession(ABC):
    """A command that runs inside a task.

    One reader, one writer; `close` may be called at any time, also while they wait. What is not read holds the
    command up, and a command that does not read holds `write` up: nothing is buffered without a bound.
    """

    @abstractmethod
    async def read(self) -> tuple[int, bytes] | None:
        """The next piece of output as (STDOUT or STDERR, bytes), None at the end. A terminal has STDOUT alone."""

    @abstractmethod
    async def write(self, data: bytes) -> None:
        """Give the command input; returns once it is taken. Thrown away when the command has closed its stdin."""

    @abstractmethod
    async def write_eof(self) -> None:
        """No more input. On a terminal this is the character that means it (Ctrl-D at the start of a line)."""

    @abstractmethod
    async def resize(self, rows: int, cols: int) -> None:
        """Change the terminal's size, in characters. Nothing without a terminal, or after the end."""

    @abstractmethod
    async def wait(self) -> int:
        """The exit code, 128 + N after signal N; to be called once `read` has returned None."""

    @abstractmethod
    async def close(self) -> None:
        """Hang up (SIGHUP, as a closed terminal does) if the command still runs, and free what the session holds."""


@dataclass(frozen=True)
class Surroundings:
    """What a runner gives its backends.

    `node` is its name. `doors` are the tasks' own Unix sockets; where one can't be had, `listen_at` makes the runner
    reachable at one of the node's addresses, for containers, and gives the URL, and `local_url` is that for the node's
    own processes. `on_change` is called when a backend's `trouble` is another. `user_processes`: others than admins may
    run processes here. `process_user`: as whom, None for the runner's own user. `registries` are those that images may
    come from, `mount_roots` what users may mount and `limits` what they may take. `gpus` are the node's.

    `slurm_users` says who users are on the cluster, `slurm_client` where its nodes have a tunnel client, None where
    they have none; `url_for_jobs` is the URL by which these reach the runner, and `ca_for_jobs` who signed its
    certificate, None for the authorities that they know. `tell` says a sentence to those who are connected to a
    container, `begin` lets a task's time to live begin, `touch` tells the host that it is another.
    """

    node: str
    state: State
    helper: TunnelHelper
    ssh: SshHelper
    report: Reporter
    doors: Doors
    listen_at: Callable[[str], Awaitable[str]]
    local_url: Callable[[], str]
    on_change: Callable[[], None]
    user_processes: bool
    process_user: str | None
    registries: Registries
    mount_roots: MountRoots
    limits: Limits
    gpus: Sequence[Gpu] = ()
    slurm_users: Path | None = None
    slurm_client: str | None = None
    url_for_jobs: str = ""
    ca_for_jobs: Path | None = None
    tell: Callable[[str, str], None] = lambda container, sentence: None
    begin: Callable[[TaskRecord], None] = lambda task: None
    touch: Callable[[TaskRecord], None] = lambda task: None


class Backend(ABC):
    """One way of running tasks.

    Methods return when the thing is done and may raise KohakuRiverError with a sentence that says what to do. They are
    never called twice at once for the same task. They may write into the record's fields about the engine and the
    tunnel client; status and message go through the reporter.
    """

    name: str
    """As backends.py of the package declares it."""

    @classmethod
    @abstractmethod
    def made(cls, around: Surroundings) -> Backend:
        """A backend of the runner that has these parts."""

    @property
    def trouble(self) -> str | None:
        """Why new tasks can't be started now, without a full stop; None where they can."""
        return None

    @abstractmethod
    async def open(self, tasks: list[TaskRecord], found: Callable[[TaskRecord], None]) -> None:
        """Begin. `tasks` are this backend's from before the restart: their state is reported anew.

        `found` is called, now or later, with a task that runs and is not among them.
        """

    @abstractmethod
    async def start(self, task: TaskRecord) -> None:
        """Start a new task. One that can't be started leaves nothing behind."""

    @abstractmethod
    async def adopt(self, task: TaskRecord) -> TaskRecord:
        """Make what runs already reachable as this task; the answer is another task if it was adopted before."""

    @abstractmethod
    async def stop(self, task: TaskRecord) -> None:
        """Stop it; nothing to do when it does not run."""

    @abstractmethod
    async def start_again(self, task: TaskRecord) -> None:
        """Start a task that was stopped or ended."""

    @abstractmethod
    async def remove(self, task: TaskRecord) -> None:
        """Stop it and remove what it left. What was adopted goes on, without its tunnel."""

    async def discard(self, task: TaskRecord) -> None:
        """Remove what was laid down for a task that could not be started and that nobody knows of."""
        return

    @abstractmethod
    async def exec(self, task: TaskRecord, request: ExecRequest) -> ExecSession:
        """Run a command inside a task that runs; the caller closes the session.

        Raises UnavailableError "no_shell" where a shell was asked for and there is none. A command that can't be
        run is no error here: like a shell would, the session says so on stderr and ends with 127 (not found) or 126.
        """

    @abstractmethod
    async def logs(self, task: TaskRecord, request: LogRequest) -> Printed:
        """What the task printed, whether it runs or not; the caller closes it.

        Raises UnavailableError where there is nothing that could be read.
        """

    async def comes_from(self, task: TaskRecord, peer: Peer) -> bool:
        """Whether a tunnel client that shows the task's token is where the task is."""
        return True

    async def sockets(self, task: TaskRecord) -> TaskSockets:
        """Which sockets are a task's that runs. Raises UnavailableError where they can't be told from others."""
        return TaskSockets()

    async def give_token(self, task: TaskRecord) -> None:
        """Lay a running task's token down where its tunnel client finds it, if the backend started that."""
        return

    def tunnel_changed(self, task: TaskRecord, connected: bool) -> None:
        """The task's tunnel client came or went."""
        return

    async def remove_volume(self, volume: str) -> None:
        """Remove what a task was given as one of its `volume_ids`, if it is there. Raises UnavailableError."""
        raise UnavailableError(f"Tasks of the {self.name} backend have no volumes.", code="not_supported")

    def target(self, task: TaskRecord) -> DirectTarget | None:
        """What the runner itself dials for a task's ports, None where a tunnel client does it."""
        return None

    @abstractmethod
    async def close(self, tasks: list[TaskRecord], *, stop_tasks: bool) -> None:
        """End. Tasks that can outlive the runner do, unless `stop_tasks`."""

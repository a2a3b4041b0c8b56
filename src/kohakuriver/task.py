"""A task, declared once: what a user asks for, what the host orders of a node, what the node reports, what users see.

Command line, client, host, database and runner all go by these classes, so that a new property of a task is one field
here, one option of the command line, and what a backend makes of it. The command line loads this module too, so it
needs only the standard library. Where pydantic is given one of these classes, it checks what the annotations say.
"""

from __future__ import annotations

import base64
import re
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, asdict, dataclass, field, fields
from ipaddress import ip_address
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeVar, get_args

from kohakuriver.backends import kind_of, making
from kohakuriver.gpus import GPUS
from kohakuriver.images import ImageName
from kohakuriver.quotas import LEAST_MEMORY, LEAST_PIDS, LONGEST_TIME
from kohakuriver.text import printable

__all__ = [
    "MOST_FIGURES",
    "Backend",
    "Check",
    "Declared",
    "ListeningPort",
    "LogLine",
    "LogStream",
    "Name",
    "NewTask",
    "NodeName",
    "Pull",
    "Status",
    "TaskOrder",
    "TaskReport",
    "TaskSpec",
    "TaskTraffic",
    "TaskView",
    "Whole",
    "asked_for",
    "describe_exit",
    "is_engine_id",
    "is_public_key",
    "is_task_name",
    "is_told_node_name",
    "is_told_task_name",
    "matching",
    "next_revision",
    "part_of",
    "taken_from",
]

Status = Literal["starting", "running", "stopped", "failed", "lost"]

LogStream = Literal["stdout", "stderr", "note"]

MAX_SSH_KEYS = 100

LONGEST_SHOWN = 200
"""Characters of what won't do that are told to who gave it."""

LONGEST_SAID = 4000
"""Characters of what a node says of a task that are kept: a stolen one must not fill the database."""

MOST_FIGURES = 100
"""Of what passed through a task, or through a node."""


class Check:
    """In an annotation: a function that returns the value, or raises ValueError with what is wanted instead."""

    def __init__(self, check: Callable[[Any], Any]) -> None:
        self.check = check

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(self.check, handler(source))


class _FirstFault:
    """In an annotation of a list: it is looked at no further than to its first part that won't do. One such list may
    have many thousands, and nobody else gets a turn while they are told of."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        return handler(source) | {"fail_fast": True}


def matching(pattern: str, otherwise: str) -> Check:
    """Take only strings that match as a whole; `otherwise` says what is wanted."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            shown = value if len(value) <= LONGEST_SHOWN else f"{value[:LONGEST_SHOWN]}…"
            raise ValueError(f"{shown!r} won't do: {otherwise}")
        return value

    return Check(check)


def _no_longer_than(most: int) -> Check:
    def check(value: Any) -> Any:
        if len(value) > most:
            raise ValueError(f"it may have {most} at most")
        return value

    return Check(check)


def _said(text: str) -> str:
    return printable(text[:LONGEST_SAID])[:LONGEST_SAID]


def _between(least: float, most: float) -> Check:
    def check(value: Any) -> Any:
        if not least <= value <= most:
            raise ValueError(f"it must be a number from {least} to {most}")
        return value

    return Check(check)


def _no_more_keys_than_fit(keys: list[str]) -> list[str]:
    if len(keys) > MAX_SSH_KEYS:
        raise ValueError(f"a task takes at most {MAX_SSH_KEYS} public keys")
    return keys


def _public_key(text: str) -> str:
    """Take only a line as `ssh-keygen` writes it: type, base64, and perhaps a comment; no options before it."""
    if len(text) > LONGEST_SAID:
        raise ValueError(f"a public key has {LONGEST_SAID} characters at most")
    line = text.strip()
    kind, _, rest = line.partition(" ")
    try:
        blob = base64.b64decode(rest.split()[0], validate=True)
    except (ValueError, IndexError):
        blob = b""
    if not kind or blob[: 4 + len(kind)] != len(kind).to_bytes(4, "big") + kind.encode() or not line.isprintable():
        raise ValueError(f"{line[:40]!r} is no SSH public key; give the line of a file like ~/.ssh/id_ed25519.pub")
    return line


def _backend(name: str) -> str:
    return kind_of(name).name


def _making_backend(name: str) -> str:
    if not kind_of(name).makes:
        raise ValueError(f"{name!r} starts no tasks; give {' or '.join(making())}")
    return name


def _image(text: str) -> str:
    ImageName.parse(text)
    return text


_NAME = r"[a-z0-9][a-z0-9._-]{0,62}"
_NODE_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"

Name = Annotated[
    str,
    matching(_NAME, "it must be 1 to 63 of a-z, 0-9, dot, dash and underscore"),
    matching(r".*[^0-9].*", "a number means a task's id, so a name needs something else in it too"),
    matching(r"(?!.*\.kohakuriver$).*", "to ssh the name before .kohakuriver is a task's"),
]
NodeName = Annotated[str, matching(_NODE_NAME, "it must be 1 to 63 letters, digits, dots, dashes, underscores")]
Image = Annotated[str, Check(_image)]
Backend = Annotated[str, Check(_backend)]
"""The name of a way of running a task: see backends.py."""
EnvName = Annotated[str, matching(r"[^=\0]+", "a variable's name has no = in it")]
NoNul = Annotated[str, matching(r"(?s)[^\0]*", "it has a NUL byte in it")]
Mount = Annotated[str, matching(r"[^:\0]+:/[^:\0]*(:ro)?", "write SOURCE:/TARGET or SOURCE:/TARGET:ro")]
Volume = Annotated[
    str,
    matching(
        r"[a-z0-9][a-z0-9._-]{0,62}:/[^:\0]*(:ro)?", "write NAME:/TARGET or NAME:/TARGET:ro, NAME of a-z, 0-9, ._-"
    ),
]
VolumeId = Annotated[str, matching(r"kohakuriver-volume-[0-9a-f]{32}", "no volume of a task is called so")]
"""What a node's engine calls a volume: nobody can guess it, and no two users have one."""
PublicKey = Annotated[str, Check(_public_key)]
Port = Annotated[int, _between(1, 65535)]
MemorySize = Annotated[int, _between(LEAST_MEMORY, 1 << 50)]
"""Bytes."""
Cpus = Annotated[float, _between(0.01, 1 << 20)]
Pids = Annotated[int, _between(LEAST_PIDS, 1 << 22)]
Network = Annotated[str, matching("none", "a task's network is none, or left out")]
ShmSize = Annotated[int, _between(64 << 10, 1 << 50)]
"""Bytes."""
Seconds = Annotated[int, _between(1, LONGEST_TIME)]
Directory = Annotated[str, matching(r"(?s)/[^\0]*", "it must be a whole path")]
UserInside = Annotated[str, matching(r"[^\0:]+(:[^\0:]+)?", "write USER or USER:GROUP, names or numbers")]
Pull = Literal["missing", "always", "never"]
Device = Annotated[
    str,
    matching(
        r"/dev/[^:\0]+(:/[^:\0]+)?(:[rwm]{1,3})?", "write /dev/NAME, /dev/NAME:/dev/INSIDE or with :rwm behind it"
    ),
]
Label = Annotated[
    str,
    matching(
        r"(?!kohakuriver\.)[A-Za-z0-9][A-Za-z0-9._/-]{0,127}=[^\0]*", "write K=V; labels of kohakuriver are its own"
    ),
]
Restart = Annotated[
    str,
    matching(
        "no|on-failure(:[1-9][0-9]{0,3})?|always|unless-stopped",
        "it must be no, on-failure, on-failure:N, always or unless-stopped",
    ),
]
OfScheduler = Annotated[str, matching(r"[A-Za-z0-9_][A-Za-z0-9_.,-]{0,127}", "write a name as Slurm has it")]
"""A partition, an account or a quality of service."""
Gpus = Annotated[str, matching(GPUS, "write how many, all, or numbers as in 0,1 or device=0")]
ReportedStatus = Annotated[str, matching("|".join(get_args(Status)), "no task is in such a state")]
Whole = Annotated[int, _between(0, 2**63 - 1)]
Moment = Annotated[float, _between(0, 253_402_300_799)]  # up to the year 9999
"""What a column of the database holds."""


def is_task_name(text: str) -> bool:
    """Whether a task may be called this."""
    return is_told_task_name(text) and not text.endswith(".kohakuriver")


def is_told_task_name(text: str) -> bool:
    """Whether a host may say that a task is called this. One that was made by another version may be."""
    return re.fullmatch(_NAME, text) is not None and not text.isdigit()


def is_told_node_name(text: str) -> bool:
    """Whether a host may say that a node is called this, which of a host's own begins with `@`."""
    return re.fullmatch(f"@?{_NODE_NAME}", text) is not None


def is_public_key(text: str) -> bool:
    """Whether this is the line of an SSH public key, and that alone."""
    try:
        return _public_key(text) == text
    except ValueError:
        return False


def is_engine_id(text: str) -> bool:
    """Whether this is a container's id, or a part of one, as the engine prints it."""
    return re.fullmatch(r"[0-9a-f]{12,64}", text) is not None


@dataclass(kw_only=True)
class TaskSpec:
    """What a user can ask of a new task: `mounts` are `SRC:DST` or `SRC:DST:ro`.

    With `ssh_keys`, public keys as their files have them, it gets an SSH server that lets their owners in.
    A container gets so many bytes of `memory`, `cpus`, processes and threads (`pids`), and bytes of /dev/shm
    (`shm_size`, a part of its memory); where that is None, what its node gives by default. With the `network` "none" a
    container has no network but its own loopback.
    It is stopped `ttl` seconds after its start, and when nobody was connected to it for `idle_stop` seconds.
    Without a `command` a container runs its image's own; `entrypoint` takes the place of the image's own, and without
    a command of its CMD, too, so that with neither the container just stays up. It runs in `workdir` and `run_as` a
    user, None for those of the image. When the image is fetched `pull` says, None for where it is missing.
    `restart` says when what has ended runs again, None for never. `gpus` are a number, "all", or those with the numbers
    "0,1" or "device=0". `labels` are `K=V`, for programs of its node that go by them. `volumes` are `NAME:/TARGET` or
    `NAME:/TARGET:ro`: what its owner keeps under that name on a node outlives every task. With `preserve_host` its
    services are told the addresses that browsers have, in the place of localhost and their port; with `keep_prefix`
    paths as browsers have them, where all apps are under one origin.
    A task of a scheduler is asked for with a `time_limit` in seconds, in a `partition`, for an `account` and with a
    `qos`, None for what the scheduler gives by default; so are its memory, `cpus` and `gpus`, which are a number there.
    """

    image: Image | None = None
    command: Annotated[list[NoNul], _FirstFault()] = field(default_factory=list)
    env: dict[EnvName, NoNul] = field(default_factory=dict)
    mounts: Annotated[list[Mount], _FirstFault()] = field(default_factory=list)
    volumes: Annotated[list[Volume], _FirstFault()] = field(default_factory=list)
    ssh_keys: Annotated[list[PublicKey], _FirstFault(), Check(_no_more_keys_than_fit)] = field(default_factory=list)
    memory: MemorySize | None = None
    cpus: Cpus | None = None
    pids: Pids | None = None
    shm_size: ShmSize | None = None
    ttl: Seconds | None = None
    idle_stop: Seconds | None = None
    entrypoint: Annotated[list[NoNul], _FirstFault()] | None = None
    workdir: Directory | None = None
    run_as: UserInside | None = None
    pull: Pull | None = None
    devices: Annotated[list[Device], _FirstFault()] = field(default_factory=list)
    labels: Annotated[list[Label], _FirstFault()] = field(default_factory=list)
    restart: Restart | None = None
    gpus: Gpus | None = None
    network: Network | None = None
    time_limit: Seconds | None = None
    partition: OfScheduler | None = None
    account: OfScheduler | None = None
    qos: OfScheduler | None = None
    preserve_host: bool = False
    keep_prefix: bool = False


@dataclass(kw_only=True)
class NewTask(TaskSpec):
    """A request for a task. Without a node the least loaded one that fits; without a backend docker for an image."""

    name: Name | None = None
    node: NodeName | None = None
    backend: Annotated[str, Check(_making_backend)] | None = None


@dataclass(kw_only=True)
class TaskOrder(TaskSpec):
    """What the host orders of a node. `container` is the task's id on the tunnel.

    An `adopted` task is of something that runs already: a container, by its name or id in the engine, `engine_name`; or
    an IP `address`. With `no_client` nothing is put into the container: its node dials from the container's network.
    Of what it prints `log_size` bytes are kept, where that is None as many as its node does by default. `mounts_for` is
    the user whom the node lets mount its mount roots alone, None where its mounts are not bound to these.
    It gets the node's GPUs with the numbers `gpu_ids`. `volume_ids` are what its `volumes` are called on the node.
    `run_for` is the user for whom a scheduler is asked.
    """

    task_id: int
    container: str
    backend: Backend
    name: str = ""
    engine_name: str | None = None
    address: str | None = None
    adopted: bool = False
    no_client: bool = False
    log_size: Whole | None = None
    mounts_for: str | None = None
    gpu_ids: list[str] = field(default_factory=list)
    run_for: str = ""
    volume_ids: list[VolumeId] = field(default_factory=list)


@dataclass(kw_only=True)
class TaskReport:
    """What a runner says about a task; `revision` grows with every change, `traffic` is no change.

    `engine_name` is what the engine of its backend calls it, `exit_code` what a task has ended with, 128 + N by signal
    N. `ssh_port`, `ssh_host_key` and `ssh_host_key_ecdsa` are those of the SSH server that it was given; users'
    programs write the keys into a known_hosts. `ends_at` is when its time to live is over, in seconds since the epoch,
    None where it has none or does not run.
    """

    task_id: Whole
    status: ReportedStatus
    tunnel: bool = False
    message: Annotated[str, Check(_said)] | None = None
    exit_code: Whole | None = None
    revision: Whole = 0
    engine_name: Annotated[str, _no_longer_than(LONGEST_SAID)] | None = None
    image: Annotated[str, _no_longer_than(LONGEST_SAID)] | None = None
    ssh_port: Port | None = None
    ssh_host_key: PublicKey | None = None
    ssh_host_key_ecdsa: PublicKey | None = None
    ends_at: Moment | None = None
    traffic: Annotated[dict[str, Whole], _no_longer_than(MOST_FIGURES)] = field(default_factory=dict)

    def changes(self) -> dict[str, Any]:
        """What is the task's own in it, and not its node's."""
        return part_of(self, TaskReport, without=("task_id", "traffic"))


@dataclass(frozen=True)
class TaskTraffic:
    """What went through a task since its runner started, as of its node's last heartbeat.

    Bytes are what messages carried. `sessions` and `streams` are open now; `straight` of the sessions go past the host.
    `version` is what the tunnel speaks, 0 where
    there is none. `udp_dropped` counts datagrams, `stalls` how often a stream had to wait for a window.
    """

    sessions: int = 0
    straight: int = 0
    streams: int = 0
    bytes_to_container: int = 0
    bytes_to_user: int = 0
    to_container_per_second: int = 0
    to_user_per_second: int = 0
    udp_dropped: int = 0
    stalls: int = 0
    version: int = 0


@dataclass(frozen=True)
class TaskView:
    """A task as users see it: an id and a unique name. `created_at` is ISO 8601; `container` its name on the tunnel.

    `command`, `entrypoint`, `workdir`, `run_as`, `pull`, `restart`, `gpus`, `mounts`, `volumes`, `devices`, `labels`
    and the names of the variables, `env`, are as they were asked for, and so is what a scheduler was asked for:
    `time_limit`, `partition`, `account` and `qos`. `memory`, `cpus`, `pids`, `shm_size` and `log_size` are what it was
    given, None where nothing bounds it. `network` is "none" where it has none but its own loopback.
    `exit_code` is what it has ended with, 128 + N by signal N; None while it runs, and where nobody knows.

    `owner` may do everything with it, `shared_with` may use it; `creator` made it, and is another one where a user was
    removed. `ttl` and `idle_stop`, in seconds, are as it was given them, and `ends_at`, in ISO 8601, is when the first
    is over, None while it does not run. `ssh_port`, `ssh_host_key` (Ed25519) and `ssh_host_key_ecdsa` (on P-256, for
    clients that take no other) are those of the SSH server that the task was given, None without one. With
    `pending_removal` its node ends it once it is back. `no_direct` is why forwards can't
    go past the host to its node, a clause; empty where they may try. `preserve_host` and `keep_prefix` are as they were
    asked for, or changed since.
    """

    task_id: int
    name: str
    node: str
    backend: Backend
    status: Status
    tunnel: bool
    container: str
    created_at: str
    owner: str = ""
    creator: str = ""
    shared_with: list[str] = field(default_factory=list)
    image: str | None = None
    address: str | None = None
    command: list[str] = field(default_factory=list)
    mounts: list[str] = field(default_factory=list)
    volumes: list[str] = field(default_factory=list)
    env: list[str] = field(default_factory=list)
    memory: int | None = None
    cpus: float | None = None
    pids: int | None = None
    shm_size: int | None = None
    log_size: int | None = None
    ttl: int | None = None
    idle_stop: int | None = None
    ends_at: str | None = None
    entrypoint: list[str] | None = None
    workdir: str | None = None
    run_as: str | None = None
    pull: str | None = None
    devices: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    restart: str | None = None
    gpus: str | None = None
    gpu_ids: list[str] = field(default_factory=list)
    network: str | None = None
    time_limit: int | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    message: str | None = None
    exit_code: int | None = None
    ssh_port: int | None = None
    ssh_host_key: str | None = None
    ssh_host_key_ecdsa: str | None = None
    traffic: TaskTraffic = field(default_factory=TaskTraffic)
    pending_removal: bool = False
    no_direct: str = ""
    preserve_host: bool = False
    keep_prefix: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class LogLine:
    """A line that a task printed, or a part of a very long one: only where `text` ends in a line end does the line.

    `stream` is "stdout" or "stderr"; where nobody kept these apart all is "stdout". A "note" is not the task's, but
    says that something of it is missing here. `time` is when it was printed, in seconds since the epoch, None where
    nobody knows. What was no UTF-8 has U+FFFD in its place.
    """

    text: str
    stream: LogStream = "stdout"
    time: float | None = None


@dataclass(frozen=True)
class ListeningPort:
    """A port that listens in a task, or takes datagrams; `address` is where, "0.0.0.0" and "::" being everywhere.

    `program` is the name of the program that has it, None where that can't be seen.
    """

    port: Port
    proto: Literal["tcp", "udp"]
    address: Annotated[str, Check(lambda text: str(ip_address(text)))]
    program: str | None = None


class Declared(Protocol):
    """An instance or the class of a dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


Part = TypeVar("Part", bound=Declared)


def part_of(whole: object, part: type[Declared], *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """The attributes of `whole` that are fields of the class `part`, by name."""
    return {f.name: getattr(whole, f.name) for f in fields(part) if f.name not in without}


def taken_from(values: Mapping[str, Any], part: type[Part]) -> Part:
    """A `part` made of those `values` that it has fields for."""
    return part(**{f.name: values[f.name] for f in fields(part) if f.name in values})


def asked_for(wish: Declared) -> dict[str, Any]:
    """The fields of a dataclass that are not as they are by default."""

    def default(f: Field[Any]) -> Any:
        return f.default if f.default_factory is MISSING else f.default_factory()

    return {f.name: value for f in fields(wish) if (value := getattr(wish, f.name)) != default(f)}


_last_revision = 0


def next_revision() -> int:
    """A number greater than every one before, also over restarts: nanoseconds since the epoch, pushed on if need be."""
    global _last_revision
    _last_revision = max(_last_revision + 1, time.time_ns())
    return _last_revision


def describe_exit(code: int) -> tuple[Status, str]:
    """Status and message for an exit code; above 128 it means a signal."""
    if code == 0:
        return "stopped", "it ended by itself with exit code 0"
    try:
        return "failed", f"it was ended by {signal.Signals(code - 128).name} (exit code {code})"
    except ValueError:
        return "failed", f"it ended with exit code {code}"

"""`kohakuriver vps …`: make, list, end and adopt tasks."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shlex
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple
from urllib.parse import urlsplit

import typer

from kohakuriver.backends import kind_of, known, making
from kohakuriver.cli import logs, output, ssh
from kohakuriver.cli.app import App
from kohakuriver.cli.behind_dashes import WithCommand, command_of
from kohakuriver.cli.options import (
    MaybeTasksArgument,
    Remote,
    SlurmJobOption,
    TaskArgument,
    TasksArgument,
    complete_node,
    one_of,
    pairs,
    remote,
    scheduler_time,
    seconds,
    size_of,
    variables_in,
)
from kohakuriver.errors import KohakuRiverError, UsageError
from kohakuriver.gpus import GPUS, count
from kohakuriver.quotas import in_words, time_in_words
from kohakuriver.runtime import cancel_all

if TYPE_CHECKING:
    from kohakuriver.client.host import Answers, HostClient, OpenSession, Task
    from kohakuriver.client.lasting_terminal import NamedSession

__all__ = ["app", "starting"]

app = App(
    help="Make, list, end and adopt tasks.",
    epilog="Example: kohakuriver vps create --name web --image python:3.12 -- python3 -m http.server 8888",
)

WAIT_TIMEOUT = 120.0
SESSIONS_SECONDS = 5.0
_AFTER_STATUS = 3
_LOOK_SECONDS = 2.0


NameOption = Annotated[
    str | None, typer.Option("--name", help="A unique name for the task. Default: made up.", show_default=False)
]
NodeOption = Annotated[
    str | None,
    typer.Option(
        "--node",
        help="Its node. Default: the host chooses, or finds it.",
        autocompletion=complete_node,
        show_default=False,
    ),
]
BackendOption = Annotated[
    str | None,
    typer.Option("--backend", **one_of(making()), help="Default: docker, which needs --image.", show_default=False),
]
ImageOption = Annotated[
    str | None, typer.Option("--image", help="The container image, for the docker backend.", show_default=False)
]
EntrypointOption = Annotated[
    str | None,
    typer.Option("--entrypoint", metavar="PROGRAM", help="In place of the image's own.", show_default=False),
]
WorkdirOption = Annotated[
    str | None,
    typer.Option("--workdir", metavar="DIR", help="Where CMD runs, in place of the image's.", show_default=False),
]
UserOption = Annotated[
    str | None,
    typer.Option("--user", metavar="USER[:GROUP]", help="As whom, in place of the image's.", show_default=False),
]
PullOption = Annotated[
    str | None,
    typer.Option(
        "--pull", **one_of(["missing", "always", "never"]), help="When to fetch the image.", show_default=False
    ),
]
RestartOption = Annotated[
    str | None,
    typer.Option(
        "--restart",
        metavar="POLICY",
        help="When it runs again: no, on-failure[:N], always, unless-stopped.",
        show_default=False,
    ),
]
EnvFileOption = Annotated[
    list[Path] | None,
    typer.Option("--env-file", metavar="FILE", help="Variables for CMD, as K=V lines; may be repeated."),
]
DeviceOption = Annotated[
    list[str] | None,
    typer.Option("--device", metavar="/dev/X[:/dev/Y][:rwm]", help="A device of the node; may be repeated."),
]
LabelOption = Annotated[
    list[str] | None,
    typer.Option("--label", metavar="K=V", help="A label of the container, for programs of the node; may be repeated."),
]
EnvOption = Annotated[
    list[str] | None, typer.Option("--env", "-e", metavar="K=V", help="A variable for CMD; may be repeated.")
]
MountOption = Annotated[
    list[str] | None,
    typer.Option("--mount", metavar="SRC:DST[:ro]", help="A directory of the node to see there; may be repeated."),
]
VolumeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--volume", metavar="NAME:/DST[:ro]", help="What you keep by that name, to see there; may be repeated."
    ),
]
_BOUNDS = "What it gets of its node"
MemoryOption = Annotated[
    str | None,
    typer.Option("--memory", metavar="SIZE", help="Memory, as 8g.", show_default=False, rich_help_panel=_BOUNDS),
]
CpusOption = Annotated[
    float | None,
    typer.Option("--cpus", metavar="N", help="Processors, as 1.5.", show_default=False, rich_help_panel=_BOUNDS),
]
PidsOption = Annotated[
    int | None,
    typer.Option(
        "--pids", metavar="N", help="Processes and threads at a time.", show_default=False, rich_help_panel=_BOUNDS
    ),
]
ShmOption = Annotated[
    str | None,
    typer.Option(
        "--shm-size",
        metavar="SIZE",
        help="Shared memory (/dev/shm), a part of its memory.",
        show_default=False,
        rich_help_panel=_BOUNDS,
    ),
]
_TIMES = "When it is stopped"
TtlOption = Annotated[
    str | None,
    typer.Option(
        "--ttl", metavar="TIME", help="So long after its start, as 8h.", show_default=False, rich_help_panel=_TIMES
    ),
]
IdleOption = Annotated[
    str | None,
    typer.Option(
        "--idle-stop",
        metavar="TIME",
        help="When nobody was connected to it for so long, as 30m.",
        show_default=False,
        rich_help_panel=_TIMES,
    ),
]
GpusOption = Annotated[
    str | None,
    typer.Option(
        "--gpus",
        metavar="N|all|IDS",
        help="GPUs: how many, all, or which, as 0,1 or device=0.",
        show_default=False,
        rich_help_panel=_BOUNDS,
    ),
]
_SCHEDULER = "With --backend slurm"
TimeLimitOption = Annotated[
    str | None,
    typer.Option(
        "--time",
        metavar="TIME",
        help="Time limit, as 4:00:00, 1-12:00:00 or 90m; a number alone is minutes.",
        show_default=False,
        rich_help_panel=_SCHEDULER,
    ),
]


def _of_slurm(name: str, text: str) -> Any:
    return typer.Option(name, metavar="NAME", help=text, show_default=False, rich_help_panel=_SCHEDULER)


PartitionOption = Annotated[str | None, _of_slurm("--partition", "In which partition.")]
AccountOption = Annotated[str | None, _of_slurm("--account", "For which account.")]
QosOption = Annotated[str | None, _of_slurm("--qos", "With which quality of service.")]
NetworkOption = Annotated[
    str | None,
    typer.Option(
        "--network",
        metavar="none",
        help="No network but its own loopback: it is reached all the same, and reaches nothing.",
        show_default=False,
        rich_help_panel=_BOUNDS,
    ),
]
PreserveHostOption = Annotated[
    bool,
    typer.Option("--preserve-host", help="Services are told the address that a browser has, not that of localhost."),
]
KeepPrefixOption = Annotated[
    bool,
    typer.Option("--keep-prefix", help="Services are told paths with the prefix, where the host has --apps-url."),
]
ChangedPreserveHostOption = Annotated[
    bool | None,
    typer.Option(
        "--preserve-host/--no-preserve-host",
        help="Whether that is the address that the browser has, or localhost.",
        show_default=False,
    ),
]
ChangedKeepPrefixOption = Annotated[
    bool | None,
    typer.Option(
        "--keep-prefix/--no-keep-prefix",
        help="Whether paths have the prefix, where the host has --apps-url.",
        show_default=False,
    ),
]
SshOption = Annotated[
    bool, typer.Option("--ssh", help="Give it an SSH server that lets in the keys of your ~/.ssh/*.pub.")
]
PublicKeyOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--public-key-file", metavar="FILE", help="Other keys for its SSH server; implies --ssh; may be repeated."
    ),
]
ContainerOption = Annotated[bool, typer.Option("--container", help="An adopted container itself, too.")]
NoWaitOption = Annotated[bool, typer.Option("--no-wait", help="Don't wait until the task's tunnel is connected.")]
WaitPortOption = Annotated[
    list[int] | None,
    typer.Option(
        "--wait-port",
        metavar="PORT",
        min=1,
        max=65535,
        help="Wait until something listens on this TCP port in it, too; may be repeated.",
        show_default=False,
    ),
]
TimeoutOption = Annotated[float, typer.Option("--timeout", metavar="SECONDS", min=0, help="How long to wait at most.")]


class _Create(WithCommand):
    def misplaced(self, ctx: Any, words: list[str]) -> str:
        image, name = ctx.params.get("image"), ctx.params.get("name")
        if len(words) == 1 and image is None and ctx.params.get("backend") is None:
            return f"A command stands behind --; an image is --image {words[0]}, a name is --name {words[0]}."
        if name is None:
            return f"A command stands behind --, and a name is --name {words[0]}."
        return f"A command stands behind --: … -- {shlex.join(words)}"


@app.command(
    cls=_Create, epilog="Example: kohakuriver vps create --name web --image python:3.12 -- python3 -m http.server 8888"
)
@remote
def create(
    ctx: typer.Context,
    at: Remote,
    name: NameOption = None,
    node: NodeOption = None,
    backend: BackendOption = None,
    image: ImageOption = None,
    entrypoint: EntrypointOption = None,
    pull: PullOption = None,
    env: EnvOption = None,
    env_file: EnvFileOption = None,
    workdir: WorkdirOption = None,
    user: UserOption = None,
    mount: MountOption = None,
    volume: VolumeOption = None,
    device: DeviceOption = None,
    label: LabelOption = None,
    restart: RestartOption = None,
    memory: MemoryOption = None,
    cpus: CpusOption = None,
    pids: PidsOption = None,
    shm_size: ShmOption = None,
    ttl: TtlOption = None,
    idle_stop: IdleOption = None,
    gpus: GpusOption = None,
    network: NetworkOption = None,
    time_limit: TimeLimitOption = None,
    partition: PartitionOption = None,
    account: AccountOption = None,
    qos: QosOption = None,
    preserve_host: PreserveHostOption = False,
    keep_prefix: KeepPrefixOption = False,
    with_ssh: SshOption = False,
    public_key_file: PublicKeyOption = None,
    no_wait: NoWaitOption = False,
    wait_port: WaitPortOption = None,
    timeout: TimeoutOption = WAIT_TIMEOUT,
) -> None:
    """Start a task, wait until its tunnel is connected, and print its id. Without CMD its image's own command runs."""
    from kohakuriver.cli.ssh_files import public_keys
    from kohakuriver.client.host import NewTask

    if image is None and (backend is None or kind_of(backend).image):
        raise UsageError(
            "A task needs a container image: name it with --image, or have CMD run on the node by --backend process."
        )
    if wait_port and no_wait:
        raise UsageError("--wait-port and --no-wait don't go together; leave one out.")
    new = NewTask(
        name=name,
        node=node,
        backend=backend,
        image=image,
        command=command_of(ctx) or [],
        entrypoint=None if entrypoint is None else [entrypoint] if entrypoint else [],
        env={**_in_files(env_file or []), **pairs(env or [], "--env")},
        workdir=_whole_path(workdir, "--workdir"),
        run_as=user,
        pull=pull,  # type: ignore[arg-type]
        restart=_policy(restart),
        gpus=_gpus(gpus),
        devices=[_device(text) for text in device or []],
        labels=[f"{name}={value}" for name, value in pairs(label or [], "--label").items()],
        mounts=[_mount(text) for text in mount or []],
        volumes=[_volume(text) for text in volume or []],
        memory=size_of(memory, "--memory"),
        cpus=cpus,
        pids=pids,
        shm_size=size_of(shm_size, "--shm-size"),
        ttl=None if ttl is None else int(seconds(ttl, "--ttl")),
        idle_stop=None if idle_stop is None else int(seconds(idle_stop, "--idle-stop")),
        network=network,
        time_limit=None if time_limit is None else scheduler_time(time_limit, "--time"),
        partition=partition,
        account=account,
        qos=qos,
        preserve_host=preserve_host,
        keep_prefix=keep_prefix,
        ssh_keys=public_keys(public_key_file or []) if with_ssh or public_key_file else [],
    )

    async def start(client: HostClient) -> Task:
        with output.working("Starting the task") as say:
            task = await starting(client, client.create(new), new.image, say)
        if new.ssh_keys:
            await ssh.tasks_changed(client)
        until = time.monotonic() + timeout
        task = await _settled(client, task, wait=not no_wait, timeout=timeout)
        for port in wait_port or []:
            with output.working(f"Task {task.task_id} ({task.name}) on {task.node}: waiting for its port {port}"):
                await client.wait_for_port(task.name, port, timeout=max(until - time.monotonic(), 0.0))
        return task

    _print_id(at.ask(start), at.json)


def _in_files(files: list[Path]) -> dict[str, str]:
    return {name: value for file in files for name, value in variables_in(file, "--env-file").items()}


def _whole_path(path: str | None, option: str) -> str | None:
    if path is not None and not path.startswith("/"):
        raise UsageError(f"{option} takes a whole path in the container, such as /work, not {path!r}.")
    return path


def _policy(text: str | None) -> str | None:
    if text is not None and not re.fullmatch(r"no|on-failure(:[1-9][0-9]{0,3})?|always|unless-stopped", text):
        raise UsageError(f"--restart takes no, on-failure, on-failure:N, always or unless-stopped, not {text!r}.")
    return text


def _gpus(text: str | None) -> str | None:
    if text is not None and not re.fullmatch(GPUS, text):
        raise UsageError(f"--gpus takes a number, all, or the numbers of GPUs as in 0,1 or device=0, not {text!r}.")
    return text


def _device(text: str) -> str:
    if not text.startswith("/dev/"):
        raise UsageError(f"--device takes a device of the node, such as /dev/dri/renderD128, not {text!r}.")
    return text


def _mount(text: str) -> str:
    parts = text.split(":")
    mode_fits = len(parts) == 2 or (len(parts) == 3 and parts[2] in ("ro", "rw"))
    if not mode_fits or not parts[0].startswith("/") or not parts[1].startswith("/"):
        raise UsageError(f"--mount takes SRC:DST or SRC:DST:ro with absolute paths, not {text!r}.")
    return text.removesuffix(":rw")


def _volume(text: str) -> str:
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{0,62}:/[^:]*(:r[ow])?", text):
        raise UsageError(f"--volume takes NAME:/DST or NAME:/DST:ro, NAME of a-z, 0-9, dot, dash, _, not {text!r}.")
    return text.removesuffix(":rw")


@app.command(epilog="Example: kohakuriver vps adopt my-container --name web")
@remote
def adopt(
    at: Remote,
    container: Annotated[
        str | None, typer.Argument(metavar="CONTAINER", help="A container that runs already.", show_default=False)
    ] = None,
    address: Annotated[
        str | None,
        typer.Option("--address", metavar="IP", help="Instead: a machine that the node reaches.", show_default=False),
    ] = None,
    slurm: SlurmJobOption = None,
    no_client: Annotated[
        bool,
        typer.Option(
            "--no-client", help="Put nothing into the container; its node dials from the container's network."
        ),
    ] = False,
    node: NodeOption = None,
    name: NameOption = None,
    no_wait: NoWaitOption = False,
    timeout: TimeoutOption = WAIT_TIMEOUT,
) -> None:
    """Make a task of a container that already runs, of a machine that a node reaches, or of a job of yours in Slurm."""
    if sum(each is not None for each in (container, address, slurm)) != 1:
        raise UsageError("Give either a CONTAINER, --address IP or --slurm JOBID.")

    async def start(client: HostClient) -> Task:
        task = await client.adopt(
            container=container, address=address, job=slurm, node=node, name=name, no_client=no_client
        )
        return await _settled(client, task, wait=not no_wait, timeout=timeout)

    _print_id(at.ask(start), at.json)


async def _settled(client: HostClient, task: Task, *, wait: bool, timeout: float) -> Task:
    if not wait:
        return task
    with output.working(f"Task {task.task_id} ({task.name}) on {task.node}: waiting for its tunnel") as say:
        return await starting(client, client.wait(str(task.task_id), timeout=timeout), task.image, say)


async def starting(
    client: HostClient,
    doing: Coroutine[Any, Any, Task],
    image: str | None,
    say: Callable[[str], None] | None,
    every: float = _LOOK_SECONDS,
) -> Task:
    """What `doing` gives; meanwhile it is said, where something says it, what the node tells of a task that starts.

    While it is made a task has no id that is known here: it is the newest that starts from `image`.
    """
    work = asyncio.ensure_future(doing)
    try:
        while say is not None and not (await asyncio.wait({work}, timeout=every))[0]:
            with contextlib.suppress(KohakuRiverError):
                found = [each for each in await client.tasks() if (each.status, each.image) == ("starting", image)]
                if found and found[-1].message:
                    say(f"Task {found[-1].task_id} ({found[-1].name}) on {found[-1].node}: {found[-1].message}")
        return await work
    finally:
        await cancel_all([work])


def _print_id(task: Task, json: bool) -> None:
    if json:
        output.json_line(task.to_json())
    else:
        output.line(str(task.task_id))


@app.command("list", epilog="Example: kohakuriver vps list --json")
@remote
def list_tasks(
    at: Remote,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="The names alone, for scripts.")] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="When they end by themselves, and what there is to say of them, too."),
    ] = False,
) -> None:
    """List the tasks that are yours or shared with you; for admins all."""
    if quiet and at.json:
        raise UsageError("--quiet and --json don't go together: --json has the names too.")
    away: set[str] = set()

    async def ask(client: HostClient) -> list[Task]:
        if not quiet and not at.json:
            away.update(await _unreachable(client))
        return await client.tasks()

    tasks = at.ask(ask)
    if quiet:
        for task in tasks:
            output.line(task.name)
        return
    if at.json:
        output.json_line({"tasks": [task.to_json() for task in tasks]})
        return
    output.table(
        [
            "Id",
            "Name",
            "Owner",
            "Node",
            "Backend",
            "Status",
            "Tunnel",
            "Image or address",
            "Age",
            *(_MORE if verbose else []),
        ],
        [
            [
                str(task.task_id),
                task.name,
                task.owner,
                task.node,
                task.backend,
                task.status,
                _tunnel(task, away),
                task.image or task.address or "-",
                output.age(task.created_at),
                *([_left(task) or "-", _idle(task) or "-", task.message or "-"] if verbose else []),
            ]
            for task in tasks
        ],
    )
    if not tasks:
        output.note("There are no tasks; `kohakuriver vps create --image IMAGE -- CMD` makes one.")


_MORE = ["Ends in", "Idle stop", "Message"]


def _left(task: Task) -> str:
    """In how long its time to live is over."""
    return "" if task.ends_at is None else time_in_words(datetime.fromisoformat(task.ends_at).timestamp() - time.time())


def _idle(task: Task) -> str:
    return "" if task.idle_stop is None else time_in_words(task.idle_stop)


def _tunnel(task: Task, unreachable: set[str]) -> str:
    if task.status == "running" and task.node in unreachable:
        return "unreachable"
    # The runner dials an address itself: it has no tunnel that could be connected or not.
    return "-" if known(task.backend).dialled else "connected" if task.tunnel else "no"


@app.command(epilog="Example: kohakuriver vps status web")
@remote
def status(
    at: Remote,
    task: TaskArgument,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="What the tunnel knows of it, too.", show_default=False)
    ] = False,
) -> None:
    """Show one task."""
    shown, answers, connected, unreachable = at.ask(lambda client: _looked_at(client, task))
    sessions = _sessions(at, shown)
    rows = _about(shown, unreachable) + (_inside(shown) if verbose else [])
    if connected:
        rows.append(("connected", ", ".join(map(_connection, connected))))
    if sessions:
        rows.append(("sessions", ", ".join(map(_session, sessions))))
    if answers is not None:
        rows.insert(_AFTER_STATUS, ("answers", "yes" if answers.answers else f"no: {answers.reason}"))
    told: dict[str, Any] = {
        "sessions": None if sessions is None else [asdict(session) for session in sessions],
        "connected": [asdict(each) for each in connected],
    }
    if answers is not None:
        told["answers"] = asdict(answers)
    at.show({**shown.to_json(), **told}, output.aligned(rows))


class _Look(NamedTuple):
    """A task, whether it answers where it is a machine with an address, who is connected, and which nodes are away."""

    task: Task
    answers: Answers | None
    connected: list[OpenSession]
    unreachable: set[str]


async def _looked_at(client: HostClient, task: str) -> _Look:
    shown = await client.task(task)
    connected = [each for each in await client.sessions() if each.task_id == shown.task_id]
    look = _Look(shown, None, connected, await _unreachable(client))
    if shown.address is None or shown.status != "running":
        return look
    with contextlib.suppress(KohakuRiverError):  # its node is away, say, and the status tells of that
        return look._replace(answers=await client.answers(task))
    return look


async def _unreachable(client: HostClient) -> set[str]:
    """The nodes that are there, and that the host can't dial."""
    return {node.name for node in await client.nodes() if node.status == "unreachable"}


def _connection(session: OpenSession) -> str:
    """Somebody who is connected, for people."""
    what = f"port {session.port}" if session.proto in ("tcp", "udp") else _BY.get(session.proto, session.proto)
    by = f", {session.via}" if session.via else ""
    return f"{session.user} ({what}{by}, {output.age(session.began_at)})"


_BY = {"ssh": "SSH", "logs": "what it prints"}


def _sessions(at: Remote, task: Task) -> list[NamedSession] | None:
    """The user's own terminals with names in it; None where nobody can say."""
    from kohakuriver.client.lasting_terminal import named_sessions
    from kohakuriver.runtime import run

    if task.status != "running":
        return []
    if not task.tunnel:
        return None
    try:
        return run(asyncio.wait_for(named_sessions(str(task.task_id), at.settings()), SESSIONS_SECONDS))
    except (KohakuRiverError, asyncio.TimeoutError):  # its node is away, say, and the status tells of that
        return None


def _session(session: NamedSession) -> str:
    """One of them, for people."""
    return f"{session.name} ({'in use' if session.attached else 'nobody in it'})"


@app.command("ports", epilog="Example: kohakuriver vps ports web")
@remote
def list_ports(at: Remote, task: TaskArgument) -> None:
    """List the ports that listen in a task, with their programs where these can be seen."""
    told = at.ask(lambda client: client.ports(task))
    if at.json:
        output.json_line(told.to_json())
        return
    rows = [[str(port.port), port.proto, port.address, port.program or "-"] for port in told.ports]
    output.table(["Port", "Protocol", "Address", "Program"], rows)
    if told.more:
        output.note("There are more ports than these.")
    elif not rows:
        output.note(f"Nothing listens in {task}.")


app.command(epilog="Example: kohakuriver vps logs web --follow --since 10m")(remote(logs.logs))


@app.command("agent-command", epilog="Example: kohakuriver vps agent-command vm | ssh vm sh")
@remote
def agent_command(at: Remote, task: TaskArgument) -> None:
    """Print the command that starts the tunnel client in the machine of an address task."""
    agent = at.ask(lambda client: client.agent(task))
    agent = replace(agent, runner_url=_from_elsewhere(agent.runner_url, at.settings().host))
    if at.json:
        output.json_line(asdict(agent))
        return
    output.note(
        "It needs the program tunnel-client there, which is in kohakuriver/bin/ of this installation; "
        "the token in it opens this task's tunnel, so show it to nobody."
    )
    output.line(_START_AGENT.format(**{name: shlex.quote(str(value)) for name, value in asdict(agent).items()}))


def _from_elsewhere(runner_url: str, host_url: str) -> str:
    """A runner's URL for another machine: one that the host reaches by loopback is on the host's own machine."""
    from kohakuriver.client.ports import exposes

    runner, host = urlsplit(runner_url), urlsplit(host_url)
    if not runner.hostname or not host.hostname or exposes(runner.hostname) or not exposes(host.hostname):
        return runner_url
    name = f"[{host.hostname}]" if ":" in host.hostname else host.hostname
    return runner._replace(netloc=f"{name}:{runner.port}" if runner.port else name).geturl()


_START_AGENT = """\
(umask 077; echo {token} > "$HOME/.kohakuriver-token") && exec tunnel-client --runner-url {runner_url} \
--container-id {container} --token-file "$HOME/.kohakuriver-token"\
"""


@app.command(epilog="Example: kohakuriver vps stop web")
@remote
def stop(at: Remote, tasks: TasksArgument, container: ContainerOption = False) -> None:
    """End what a task runs; 'restart' runs it again."""
    at.ask(lambda client: _each("Stopped", tasks, lambda task: client.stop(task, container=container), at.json))


@app.command(epilog="Example: kohakuriver vps restart web")
@remote
def restart(
    at: Remote,
    tasks: MaybeTasksArgument = None,
    every: Annotated[bool, typer.Option("--all", help="All of yours that don't run.")] = False,
    container: ContainerOption = False,
    no_wait: NoWaitOption = False,
    timeout: TimeoutOption = WAIT_TIMEOUT,
) -> None:
    """Run a task again; open forwards find it by themselves."""
    if every == bool(tasks):
        raise UsageError("Give either a TASK, or several, or --all.")

    async def again(client: HostClient) -> None:
        async def one(task: str) -> Task:
            return await _settled(
                client, await client.restart(task, container=container), wait=not no_wait, timeout=timeout
            )

        await _each("Restarted", tasks or await _ended(client), one, at.json)

    at.ask(again)


async def _ended(client: HostClient) -> list[str]:
    """The caller's own tasks that could run and don't, as after a restart of their node."""
    me = (await client.whoami()).user
    ended = [task for task in await client.tasks() if task.owner == me and task.status in ("stopped", "failed")]
    if not ended:
        output.note("All of your tasks run.")
    return [str(task.task_id) for task in ended if known(task.backend).controls]


@app.command(epilog="Example: kohakuriver vps extend web 4h")
@remote
def extend(
    at: Remote,
    task: TaskArgument,
    by: Annotated[str, typer.Argument(metavar="TIME", help="By how long, as 4h.", show_default=False)],
) -> None:
    """Have the time to live of a task be over later."""
    more = int(seconds(by, "TIME"))
    extended = at.ask(lambda client: client.extend(task, more))
    at.show(extended.to_json(), f"Task {extended.name} ends in {_left(extended)}.")


@app.command(epilog="Example: kohakuriver vps web lab --preserve-host")
@remote
def web(
    at: Remote,
    task: TaskArgument,
    preserve_host: ChangedPreserveHostOption = None,
    keep_prefix: ChangedKeepPrefixOption = None,
) -> None:
    """Say what the HTTP services of a task are told when browsers open them at the host."""
    if preserve_host is None and keep_prefix is None:
        raise UsageError("Say what services are to be told, with --preserve-host or --keep-prefix, or --no-… of these.")
    changed = at.ask(lambda client: client.serve_web(task, preserve_host=preserve_host, keep_prefix=keep_prefix))
    told = "the address that the browser has" if changed.preserve_host else "localhost and their own port"
    kept = ", with paths as the browser has them" if changed.keep_prefix else ""
    at.show(
        changed.to_json(), f"Services of task {changed.name} are told {told}{kept}, as browsers open them from now on."
    )


@app.command(epilog="Example: kohakuriver vps rm web")
@remote
def rm(at: Remote, tasks: TasksArgument) -> None:
    """End a task and forget it."""

    async def remove(client: HostClient) -> None:
        async def one(task: str) -> Task:
            removed = await client.remove(task)
            if removed.ssh_host_key:
                await ssh.tasks_changed(client)
            return removed

        await _each("Removed", tasks, one, at.json)

    at.ask(remove)


app.command(cls=ssh.WithSshArguments, epilog="Example: kohakuriver vps connect web -L 8080:127.0.0.1:80")(
    remote(ssh.connect)
)


UserArgument = Annotated[
    str | None, typer.Argument(metavar="USER", help="The user's name, or a group's as @GROUP.", show_default=False)
]
GroupOption = Annotated[
    str | None, typer.Option("--group", metavar="GROUP", help="Instead: all who are in a group.", show_default=False)
]


LinkOption = Annotated[
    int | None,
    typer.Option(
        "--link",
        metavar="PORT",
        min=1,
        max=65535,
        help="Instead: make a link that opens this port in the browser of whoever has it, and nothing else.",
        show_default=False,
    ),
]
LinkExpiresOption = Annotated[
    str | None,
    typer.Option("--expires", metavar="TIME", help="How long the link is good, as 1d.", show_default=False),
]


def _make_link(at: Remote, task: str, port: int, expires: str | None) -> None:
    lasts = None if expires is None else seconds(expires, "--expires")
    made = at.ask(lambda client: client.make_link(task, port, expires_in=lasts))
    if not at.json:
        until = f"until {made.expires_at}" if made.expires_at else "until it is taken back"
        output.note(f"Whoever has this link opens port {port} of {task}, {until} ({made.id}):")
    at.show(made.to_json(), made.url or "")


def _show_links(at: Remote, task: str) -> None:
    links = at.ask(lambda client: client.links(task))
    if at.json:
        output.json_line({"links": [link.to_json() for link in links]})
        return
    rows = [[each.id, str(each.port), each.user, each.created_at, each.expires_at or "never"] for each in links]
    output.table(["Id", "Port", "Made by", "Made", "Expires"], rows)
    if not rows:
        output.note(f"There are no links to {task}; `kohakuriver vps share {task} --link PORT` makes one.")


def _whom(user: str | None, group: str | None) -> str:
    if (user is None) == (group is None):
        raise UsageError("Give either a USER or --group GROUP.")
    return user if user is not None else f"@{group}"


@app.command(epilog="Example: kohakuriver vps share web ann")
@remote
def share(
    at: Remote,
    task: TaskArgument,
    user: UserArgument = None,
    group: GroupOption = None,
    link: LinkOption = None,
    expires: LinkExpiresOption = None,
    listed: Annotated[bool, typer.Option("--list", help="Show the links that there are.")] = False,
) -> None:
    """Let another user, or a group, look at a task, reach its ports and open terminals in it; or make a link."""
    if listed or link is not None:
        if user is not None or group is not None or (listed and (link is not None or expires is not None)):
            raise UsageError("Give --link PORT or --list by itself.")
        _show_links(at, task) if listed else _make_link(at, task, link or 0, expires)
        return
    if expires is not None:
        raise UsageError("--expires is for a link: give --link PORT, too.")
    whom = _whom(user, group)
    _print_done(f"{whom} may now use", at.ask(lambda client: client.share(task, whom)), at.json)


@app.command(epilog="Example: kohakuriver vps unshare web ann")
@remote
def unshare(
    at: Remote,
    task: TaskArgument,
    user: UserArgument = None,
    group: GroupOption = None,
    link: Annotated[
        str | None, typer.Option("--link", metavar="ID", help="Instead: a link, by its id.", show_default=False)
    ] = None,
) -> None:
    """Take that back; what that user, that group, or whoever has that link, has open to the task ends."""
    if link is not None:
        if user is not None or group is not None:
            raise UsageError("Give --link ID by itself.")
        ended = at.ask(lambda client: client.end_link(task, link))
        at.show(ended.to_json(), f"The link {ended.id} to port {ended.port} opens nothing any more.")
        return
    whom = _whom(user, group)
    _print_done(f"{whom} may no longer use", at.ask(lambda client: client.unshare(task, whom)), at.json)


def _about(task: Task, unreachable: set[str]) -> list[tuple[str, str]]:
    """What its user wants to know, the most important first."""
    traffic = task.traffic
    return [
        ("id", str(task.task_id)),
        ("name", task.name),
        ("status", task.status),
        ("exit code", "" if task.exit_code is None else str(task.exit_code)),
        ("message", task.message or ""),
        ("tunnel", _tunnel(task, unreachable)),
        ("node", task.node),
        ("backend", task.backend),
        ("image", task.image or ""),
        ("address", task.address or ""),
        ("entrypoint", "" if task.entrypoint is None else shlex.join(task.entrypoint) or "none"),
        ("command", shlex.join(task.command)),
        ("restarts", task.restart or ""),
        ("directory", task.workdir or ""),
        ("user", task.run_as or ""),
        ("mounts", ", ".join(task.mounts)),
        ("volumes", ", ".join(task.volumes)),
        ("devices", ", ".join(task.devices)),
        ("labels", ", ".join(task.labels)),
        ("variables", ", ".join(task.env)),
        ("gets", _given(task)),
        ("scheduled", _scheduled(task)),
        ("ends", f"in {_left(task)}: {_why_it_ends(task)}" if task.ends_at else _ttl(task)),
        ("idle stop", f"when nobody was connected for {_idle(task)}" if task.idle_stop else ""),
        ("network", task.network or ""),
        ("host told", "the address that the browser has" if task.preserve_host else ""),
        ("paths told", "as the browser has them" if task.keep_prefix else ""),
        ("owner", task.owner),
        ("shared with", ", ".join(task.shared_with)),
        ("ssh server", "yes" if task.ssh_host_key else ""),
        ("created", f"{task.created_at} ({output.age(task.created_at)} ago)"),
        ("open", f"{_count(traffic.streams, 'stream')} in {_count(traffic.sessions, 'session')}"),
        ("path", _path(task)),
        ("to the task", _flow(traffic.bytes_to_container, traffic.to_container_per_second)),
        ("from the task", _flow(traffic.bytes_to_user, traffic.to_user_per_second)),
    ]


def _path(task: Task) -> str:
    """Which way sessions go, and why not the straight one."""
    traffic = task.traffic
    if traffic.straight:
        return f"direct, {traffic.straight} of {_count(traffic.sessions, 'session')}"
    return f"through the host: {task.no_direct}" if task.no_direct else "direct, from where its node can be reached"


def _ttl(task: Task) -> str:
    return f"{time_in_words(task.ttl)} after its start" if task.ttl else ""


def _why_it_ends(task: Task) -> str:
    return "time limit in Slurm" if known(task.backend).scheduled and not task.ttl else "time to live"


def _scheduled(task: Task) -> str:
    """What its scheduler was asked for beside memory and processors."""
    asked = [f"{what} {name}" for what in ("partition", "account", "qos") if (name := getattr(task, what))]
    limit = [f"time limit {time_in_words(task.time_limit)}"] if task.time_limit else []
    return ", ".join([*asked, *limit])


def _given(task: Task) -> str:
    """What it got of its node."""
    bounds = (
        ("memory", task.memory, " of memory"),
        ("cpus", task.cpus, ""),
        ("pids", task.pids, " processes"),
        ("shm", task.shm_size, " of /dev/shm"),
        ("log", task.log_size, " of log"),
    )
    given = [f"{in_words(name, value)}{what}" for name, value, what in bounds if value is not None]
    if task.gpu_ids:
        given.append(f"{count(task.gpu_ids)} ({', '.join(task.gpu_ids)})")
    elif task.gpus and known(task.backend).scheduled:
        given.append("1 GPU" if task.gpus == "1" else f"{task.gpus} GPUs")
    return ", ".join(given)


def _inside(task: Task) -> list[tuple[str, str]]:
    """What helps whoever looks for a fault in the tunnel."""
    traffic = task.traffic
    return [
        ("container", task.container),
        ("protocol", f"version {traffic.version}" if traffic.version else ""),
        ("ssh host key", task.ssh_host_key or ""),
        ("and by ECDSA", task.ssh_host_key_ecdsa or ""),
        ("waits", f"{traffic.stalls} for a window"),
        ("dropped", _count(traffic.udp_dropped, "datagram")),
    ]


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _flow(total: int, rate: int) -> str:
    return f"{output.size(total)}, {output.size(rate)}/s"


async def _each(what: str, tasks: list[str], act: Callable[[str], Awaitable[Task]], json: bool) -> None:
    """Do the same to several tasks. Raises what the first that failed did, once all were tried."""
    failed: list[KohakuRiverError] = []
    for task in dict.fromkeys(tasks):
        try:
            _print_done(what, await act(task), json)
        except KohakuRiverError as error:  # noqa: PERF203 - the others are to be tried all the same
            failed.append(error)
    for other in failed[1:]:
        output.failure(other.code, other.message)
    if failed:
        raise failed[0]


def _print_done(what: str, task: Task, json: bool) -> None:
    if json:
        output.json_line(task.to_json())
    elif task.pending_removal:
        away = f"Node {task.node} is away: what still runs of it there goes on until the node is back and ends it."
        output.line(f"{what} {task.task_id} ({task.name}). {away}")
    else:
        output.line(f"{what} {task.task_id} ({task.name}).")

"""`kohakuriver forward`: local ports that lead to ports of a task."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from kohakuriver.cli import output
from kohakuriver.cli.behind_dashes import WithCommand, command_of
from kohakuriver.cli.options import MaybeTaskArgument, Remote, SlurmJobOption, complete_port, remote
from kohakuriver.errors import KohakuRiverError, UsageError

if TYPE_CHECKING:
    from kohakuriver.cli.forward_run import Wanted
    from kohakuriver.cli.profile import Entry
    from kohakuriver.client.beyond import Address, Back
    from kohakuriver.client.host import HostClient
    from kohakuriver.client.ports import PortForward
    from kohakuriver.config import Settings

__all__ = ["register"]

WAIT_SECONDS = 60
MOST_AT_ONCE = 32  # forwards that are being ended
SOCKS_PORT = 1080  # as IANA has it


class Proto(str, Enum):
    """What a forwarded port speaks."""

    tcp = "tcp"
    udp = "udp"


class Path(str, Enum):
    """Whether connections go past the host."""

    auto = "auto"
    direct = "direct"
    host = "host"


PortsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="REMOTE_PORT",
        autocompletion=complete_port,
        help="Ports of the task; also LOCAL:REMOTE, and with /udp. LOCAL 0 is any free port, unix:PATH a Unix socket. "
        "LOCAL:HOST:PORT leads to another address that the task reaches, LOCAL:unix:PATH to a Unix socket in it. "
        "Needed without --all.",
        show_default=False,
    ),
]
AllOption = Annotated[
    bool,
    typer.Option(
        "--all",
        "-a",
        help="Every TCP port that listens in the task, as they come and go. With --stop: all in the background.",
    ),
]
LocalPortOption = Annotated[
    int | None,
    typer.Option("--local-port", "-l", help="Default: the remote port. 0 is any free port.", show_default=False),
]
SocksOption = Annotated[
    int | None,
    typer.Option(
        "--socks",
        min=0,
        max=65535,
        metavar="[=PORT]",
        help=f"Also a SOCKS5 port for all TCP ports of the task; {SOCKS_PORT}, or any free one with 0.",
        show_default=False,
    ),
]
ReverseOption = Annotated[
    list[str] | None,
    typer.Option(
        "--reverse",
        "-R",
        metavar="REMOTE:LOCAL",
        help="A port of the task's loopback that leads to a port of this machine, or as REMOTE:HOST:PORT to one that "
        "this machine reaches. unix:PATH in the place of either is a Unix socket. May be repeated.",
        show_default=False,
    ),
]
FallbackOption = Annotated[
    bool, typer.Option("--local-port-fallback", help="Take the next free local port where one is taken.")
]
LocalHostOption = Annotated[
    str | None,
    typer.Option(
        "--local-host",
        "-H",
        help="The local address to listen on. Default: both loopback addresses.",
        show_default=False,
    ),
]
ProtoOption = Annotated[
    Proto, typer.Option("--proto", "-p", case_sensitive=False, help="What ports speak that don't say so.")
]
WaitOption = Annotated[
    float | None,
    typer.Option(
        "--wait",
        "-w",
        min=0,
        metavar="[=SECONDS]",
        help=f"Wait until the service listens in the task; {WAIT_SECONDS} seconds at most.",
        show_default=False,
    ),
]


NoResumeOption = Annotated[
    bool,
    typer.Option("--no-resume", help="Reset connections when the connection to the host is lost; they wait otherwise."),
]
ResumeForOption = Annotated[
    int | None,
    typer.Option(
        "--resume-for",
        min=1,
        max=86_400,
        metavar="SECONDS",
        help="For how long connections wait. Default: 3600, or KOHAKURIVER_RESUME_FOR.",
        show_default=False,
    ),
]


PathOption = Annotated[
    Path | None,
    typer.Option(
        "--path",
        case_sensitive=False,
        help="direct: past the host, straight to the task's node, or not at all. host: never so. auto: where that can "
        "be had. Default: auto, or KOHAKURIVER_PATH.",
        show_default=False,
    ),
]
WebOption = Annotated[
    bool, typer.Option("--web", help="Also give each TCP port an address of its own, for the browser.")
]
OnConnectOption = Annotated[
    str | None,
    typer.Option(
        "--on-connect",
        metavar="CMD",
        help="Run this by the shell each time the forward is connected, with KOHAKURIVER_PORT_<remote> set.",
        show_default=False,
    ),
]
ProfileOption = Annotated[
    str | None,
    typer.Option(
        "--profile",
        metavar="NAME",
        help="Of the forwards that kohakuriver.toml names, those with this name. Default: all.",
        show_default=False,
    ),
]
DetachOption = Annotated[bool, typer.Option("--detach", "-d", help="Go on in the background once every port listens.")]
ListOption = Annotated[bool, typer.Option("--list", help="Show the forwards in the background.")]
StopOption = Annotated[
    bool, typer.Option("--stop", help="End the forwards in the background with these ids, or to these tasks.")
]


class _Forward(WithCommand):
    """Takes `--wait` and `--socks` without a number too."""

    _USUAL: ClassVar = {
        **dict.fromkeys(("--wait", "-w"), f"--wait={WAIT_SECONDS}"),
        "--socks": f"--socks={SOCKS_PORT}",
    }

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ours = args.index("--") if "--" in args else len(args)
        if "--open" in args[:ours]:
            output.errors_as_json("--json" in args[:ours])
            raise UsageError("A port is opened in the browser by `kohakuriver open TASK PORT`.")
        filled = [self._USUAL.get(each, each) for each in args[:ours]]
        return super().parse_args(ctx, [*filled, *args[ours:]])


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(
        cls=_Forward,
        epilog="Examples:\n\nkohakuriver forward my-task 8888\n\nkohakuriver forward my-task 9999:8888 5060/udp\n\n"
        "kohakuriver forward my-task --all\n\n"
        "kohakuriver forward --slurm 4711 8888\n\n"
        "kohakuriver forward my-task 0:5432 -- sh -c 'psql -h 127.0.0.1 -p $KOHAKURIVER_PORT_5432'",
    )(remote(forward))


def forward(
    ctx: typer.Context,
    at: Remote,
    task: MaybeTaskArgument = None,
    ports: PortsArgument = None,
    slurm: SlurmJobOption = None,
    every: AllOption = False,
    profile: ProfileOption = None,
    local_port: LocalPortOption = None,
    fallback: FallbackOption = False,
    socks: SocksOption = None,
    reverse: ReverseOption = None,
    local_host: LocalHostOption = None,
    proto: ProtoOption = Proto.tcp,
    wait: WaitOption = None,
    no_resume: NoResumeOption = False,
    resume_for: ResumeForOption = None,
    path: PathOption = None,
    on_connect: OnConnectOption = None,
    web: WebOption = False,
    detach: DetachOption = False,
    list_them: ListOption = False,
    stop: StopOption = False,
) -> int:
    """Forward local ports to ports of a task, until Ctrl-C. Without TASK: all that kohakuriver.toml names.

    With CMD, run it once every port listens, with KOHAKURIVER_PORT_<remote> in its environment; its exit code is ours.
    """
    command = command_of(ctx)
    if list_them or stop:
        names = [*([task] if task is not None else []), *(ports or [])]
        return _look_after(names, list_them=list_them, stop=stop, everything=every, json=at.json)
    if slurm is not None:
        ports = [*([task] if task is not None else []), *(ports or [])]
        task = at.ask(lambda client: _task_of(client, slurm))
    _check_command(command, json=at.json, detach=detach)
    _check_wait(wait, task, ports)
    beyond, ports = _beyond(reverse, ports)
    if task is None:
        _check_without_task(every=every, socks=socks, reverse=reverse)
        entries = _of_project(profile, local_port)
    else:
        _check_all(every, ports, local_port, wait)
        entries = [_entry(task, ports, profile, socks, every=every, beyond=beyond)]
    how = _How(
        local_port, fallback, local_host, proto.value, wait, no_resume, resume_for, path, on_connect, web, at.json
    )
    chosen = at.settings()
    return _open(entries, how, chosen, command, detach=detach, beyond=beyond)


async def _task_of(client: HostClient, job: str) -> str:
    """The task that a job in Slurm is from now on, once it can be reached."""
    with output.working(f"Slurm job {job}: waiting for its tunnel"):
        task = await client.adopt(job=job)
        return (await client.wait(str(task.task_id), timeout=WAIT_SECONDS)).name


@dataclass(frozen=True)
class _How:
    """What the command line says of all forwards that it opens; None where it does not say."""

    local_port: int | None
    fallback: bool
    local_host: str | None
    proto: str
    wait: float | None
    no_resume: bool
    resume_for: int | None
    path: Path | None
    on_connect: str | None
    web: bool
    json: bool

    def applied(self, entry: Entry, settings: Settings) -> Wanted:
        """The forward that is wanted: as the command line says, else as the entry does."""
        from kohakuriver.cli.forward_run import Wanted
        from kohakuriver.client.ports import LOOPBACK

        resume_for = entry.resume_for if self.resume_for is None else self.resume_for
        return Wanted(
            entry.task,
            _ports(list(entry.ports), self.local_port, self.proto, entry.socks),
            settings if resume_for is None else replace(settings, resume_for=resume_for),
            self.local_host or entry.local_host or LOOPBACK,
            patience=entry.wait if self.wait is None else self.wait,
            resume=entry.resume and not self.no_resume,
            fallback=entry.local_port_fallback or self.fallback,
            path=entry.path if self.path is None else self.path.value,
            on_connect=self.on_connect,
            json=self.json,
            every=entry.every,
            web=self.web,
        )


@dataclass(frozen=True)
class _Beyond:
    """What leads beyond the task's ports: to its Unix sockets and to other addresses, and back to this machine."""

    addresses: list[Address]
    backs: list[Back]

    def __bool__(self) -> bool:
        return bool(self.addresses or self.backs)

    def apart(self, wanted: Wanted) -> list[Wanted]:
        """The forwards that are to be opened: a session is for the task's own ports, for others, or for ways back."""
        from kohakuriver.client.beyond import by_kind

        if self and not wanted.resume:
            raise UsageError(
                "--no-resume is for ports of the task: what leads beyond it waits for the host in any case."
            )
        if self and (wanted.web or wanted.patience is not None):
            raise UsageError(
                "--web and --wait are for ports of the task alone; open those with a forward of their own."
            )
        own = [wanted] if wanted.ports or wanted.every else []
        onward = [replace(wanted, ports=[], every=False, addresses=some) for some in by_kind(self.addresses)]
        back = [replace(wanted, ports=[], every=False, backs=self.backs)] if self.backs else []
        return [*own, *onward, *back]


def _beyond(reverse: list[str] | None, ports: list[str] | None) -> tuple[_Beyond, list[str] | None]:
    """What leads beyond the task, and the ports that don't. Raises UsageError."""
    from kohakuriver.client.beyond import parse_address, parse_back

    found = [(text, parse_address(text)) for text in ports or ()]
    addresses = [address for _, address in found if address is not None]
    return _Beyond(addresses, [parse_back(text) for text in reverse or ()]), [
        text for text, address in found if address is None
    ]


def _open(
    entries: Sequence[Entry],
    how: _How,
    settings: Settings,
    command: list[str] | None,
    *,
    detach: bool,
    beyond: _Beyond,
) -> int:
    from kohakuriver.cli.forward_start import opened
    from kohakuriver.client.ports import check_distinct

    every = any(each.every for each in entries)
    if every and command is not None:
        raise UsageError("--all and a command don't go together: the ports that it would be told come and go.")
    if every and how.web:
        raise UsageError("--all and --web don't go together: name the ports that speak HTTP.")
    wanted = [
        (one, command is None and (detach or each.detach))
        for each in entries
        for one in beyond.apart(how.applied(each, settings))
    ]
    check_distinct([port for each, _ in wanted for port in each.ports], any_port=every or bool(beyond))
    return opened([each for each, behind in wanted if not behind], [each for each, behind in wanted if behind], command)


def _entry(
    task: str, ports: list[str] | None, profile: str | None, socks: int | None, *, every: bool, beyond: _Beyond
) -> Entry:
    from kohakuriver.cli.profile import FILE, Entry

    if profile is not None:
        raise UsageError(f"--profile opens what {FILE} names: it goes without a TASK.")
    if not ports and socks is None and not every and not beyond:
        raise UsageError(
            f"Give at least one REMOTE_PORT, or --all for every port that listens: kohakuriver forward {task} 8888"
        )
    return Entry(task, tuple(ports or ()), socks=socks, every=every)


def _of_project(profile: str | None, local_port: int | None) -> list[Entry]:
    """What the project's file names. Raises UsageError where there is none, or it makes no sense."""
    from pathlib import Path

    from kohakuriver.cli.profile import FILE, chosen, found, read

    home = os.path.expanduser("~")  # noqa: PTH111 - a user without one is no failure here
    path = found(Path.cwd(), Path(home).resolve())
    if path is None:
        raise UsageError(
            f"Give a TASK and its ports, as in `kohakuriver forward my-task 8888`; no {FILE} here names any."
        )
    if local_port is not None:
        raise UsageError(f"--local-port goes with a TASK and one port; {FILE} has local ports as LOCAL:REMOTE.")
    return chosen(path, read(path), profile)


def _check_without_task(*, every: bool, socks: int | None, reverse: list[str] | None) -> None:
    """Raises UsageError for what a project's file says for each forward by itself."""
    if every:
        raise UsageError(
            "--all is for one task: kohakuriver forward my-task --all; with --stop it ends all in the background."
        )
    if socks is not None:
        raise UsageError("--socks is for one task: kohakuriver forward my-task --socks")
    if reverse:
        raise UsageError("--reverse is for one task: kohakuriver forward my-task --reverse 9000:3000")


def _check_all(every: bool, ports: list[str] | None, local_port: int | None, wait: float | None) -> None:
    """Raises UsageError for what does not go with --all."""
    if every and local_port is not None:
        raise UsageError("--all and --local-port don't go together; give LOCAL:REMOTE for one of the ports.")
    if every and wait is not None and not ports:
        raise UsageError("--wait waits for ports that are named; --all alone forwards what listens when it does.")


def _look_after(names: list[str], *, list_them: bool, stop: bool, everything: bool, json: bool) -> int:
    """`--list` and `--stop`."""
    from kohakuriver.cli.background import needs_unix

    needs_unix()
    if list_them and (stop or everything or names):
        raise UsageError("--list takes no TASK, and goes without --stop and --all: it shows all in the background.")
    if list_them:
        return _list(json)
    if bool(names) == everything:
        raise UsageError("Give --stop and which forwards to end, by their ids or TASKs; or --stop --all.")
    return _stop(names, json)


def _list(json: bool) -> int:
    from kohakuriver.cli.detached import listed

    forwards = listed()
    if json:
        output.json_line({"forwards": forwards})
        return 0
    output.table(["Id", "Task", "Ports", "Process", "Since", "Connections", "State"], [_row(each) for each in forwards])
    if not forwards:
        output.note("No forward runs in the background; `kohakuriver forward TASK PORT --detach` starts one.")
    return 0


def _row(told: dict[str, Any]) -> list[str]:
    leads = {
        f"{local.get('local_path') or local['local_port']}:{_remote(local)}/{local['proto']}" for local in told["ports"]
    }
    leads |= {_leads_back(back) for back in told["reversed"]}
    numbers = ["-" if told[name] is None else str(told[name]) for name in ("pid", "connections")]
    since = "-" if told["since"] is None else output.age(told["since"])
    return [told["id"], told["task"] or "-", " ".join(sorted(leads)), numbers[0], since, numbers[1], told["state"]]


def _remote(local: dict[str, Any]) -> str:
    """Where a local address leads to, in a word."""
    host = f"{local['remote_host']}:" if "remote_host" in local else ""
    return host + str(local.get("remote_path") or local.get("remote_port", "*"))


def _leads_back(back: dict[str, Any]) -> str:
    """Where a port of the task leads to here, in a word."""
    here = back.get("local_path") or f"{back['local_host']}:{back['local_port']}"
    return f"{here}<-{back.get('remote_path') or back['remote_port']}/tcp"


def _stop(names: list[str], json: bool) -> int:
    """End those with these ids or to these tasks, or all where none is named; each is tried."""
    from kohakuriver.cli import detached

    failed: list[KohakuRiverError] = []
    there = detached.listed()
    found: dict[str, dict[str, Any]] = {} if names else {each["id"]: each for each in there}
    for name in names:
        try:
            found |= {each["id"]: each for each in detached.find(name, there)}
        except KohakuRiverError as error:  # noqa: PERF203 - the others are to be tried all the same
            failed.append(error)
    for told in _stopped(list(found)):
        if isinstance(told, KohakuRiverError):
            failed.append(told)
        elif json:
            output.json_line(told)
        else:
            output.line(f"Stopped {told['id']} ({told['task']}).")
    for other in failed[1:]:
        output.failure(other.code, other.message)
    if failed:
        raise failed[0]
    return 0


def _stopped(names: list[str]) -> Iterator[dict[str, Any] | KohakuRiverError]:
    """What each said of itself that has ended, or why it has not. All are told first: each may take its time."""
    from concurrent.futures import ThreadPoolExecutor

    from kohakuriver.cli import detached

    def stop(name: str) -> dict[str, Any] | KohakuRiverError:
        try:
            return detached.stop(name)
        except KohakuRiverError as error:
            return error

    with ThreadPoolExecutor(MOST_AT_ONCE) as threads:
        yield from threads.map(stop, names)


def _check_command(command: list[str] | None, *, json: bool, detach: bool) -> None:
    if command is not None and not command:
        raise UsageError("A command must follow '--'.")
    if command and detach:
        raise UsageError("--detach and a command don't go together: who should wait for its end?")
    if command and json:
        raise UsageError("--json and a command don't go together: stdout is the command's.")


def _check_wait(wait: float | None, task: str | None, ports: list[str] | None) -> None:
    """Raises UsageError where the seconds of `--wait` were taken for the task."""
    if wait is not None and task is not None and ports and task.isdigit() and len(ports) > 1 and ports[0][:1].isalpha():
        raise UsageError(f"The seconds of --wait stand behind an equals sign: --wait={task} {' '.join(ports)}")


def _ports(texts: list[str], local_port: int | None, proto: str, socks: int | None) -> list[PortForward]:
    from kohakuriver.client.ports import SOCKS, PortForward, parse_port

    if local_port is not None and len(texts) != 1:
        raise UsageError("--local-port goes with one remote port; give several as LOCAL:REMOTE.")
    if local_port is not None and ":" in texts[0]:
        raise UsageError(f"{texts[0]!r} names the local port already: leave --local-port out.")
    named = [parse_port(text, proto=proto, local=local_port) for text in texts]
    return named if socks is None else [*named, PortForward(socks, 0, SOCKS)]

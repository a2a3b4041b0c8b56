"""`kohakuriver forward`: local ports that lead to ports of a task."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kohakuriver.cli import output
from kohakuriver.cli.behind_dashes import WithCommand, command_of
from kohakuriver.cli.options import MaybeTaskArgument, Remote, remote
from kohakuriver.errors import KohakuRiverError, UsageError

if TYPE_CHECKING:
    from kohakuriver.client.forward import PortForward

__all__ = ["register"]

WAIT_SECONDS = 60


class Proto(str, Enum):
    """What a forwarded port speaks."""

    tcp = "tcp"
    udp = "udp"


PortsArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="REMOTE_PORT",
        help="Ports of the task; also LOCAL:REMOTE, and with /udp. LOCAL 0 is any free port.",
        show_default=False,
    ),
]
LocalPortOption = Annotated[
    int | None,
    typer.Option("--local-port", "-l", help="Default: the remote port. 0 is any free port.", show_default=False),
]
LocalHostOption = Annotated[
    str,
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


DetachOption = Annotated[bool, typer.Option("--detach", "-d", help="Go on in the background once every port listens.")]
ListOption = Annotated[bool, typer.Option("--list", help="Show the forwards in the background.")]
StopOption = Annotated[
    bool, typer.Option("--stop", help="End the forwards in the background with these ids, or to these tasks.")
]
AllOption = Annotated[bool, typer.Option("--all", help="With --stop: all of them.")]


class _Forward(WithCommand):
    """Takes `--wait` without a number too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ours = args.index("--") if "--" in args else len(args)
        filled = [f"--wait={WAIT_SECONDS}" if each in ("--wait", "-w") else each for each in args[:ours]]
        return super().parse_args(ctx, [*filled, *args[ours:]])


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(
        cls=_Forward,
        epilog="Examples:\n\nkohakuriver forward my-task 8888\n\nkohakuriver forward my-task 9999:8888 5060/udp\n\n"
        "kohakuriver forward my-task 0:5432 -- sh -c 'psql -h 127.0.0.1 -p $KOHAKURIVER_PORT_5432'",
    )(remote(forward))


def forward(
    ctx: typer.Context,
    at: Remote,
    task: MaybeTaskArgument = None,
    ports: PortsArgument = None,
    local_port: LocalPortOption = None,
    local_host: LocalHostOption = "localhost",
    proto: ProtoOption = Proto.tcp,
    wait: WaitOption = None,
    no_resume: NoResumeOption = False,
    resume_for: ResumeForOption = None,
    detach: DetachOption = False,
    list_them: ListOption = False,
    stop: StopOption = False,
    everything: AllOption = False,
) -> int:
    """Forward local ports to ports of a task, until Ctrl-C.

    With CMD, run it once every port listens, with KOHAKURIVER_PORT_<remote> in its environment; its exit code is ours.
    """
    command = command_of(ctx)
    if list_them or stop or everything:
        names = [*([task] if task is not None else []), *(ports or [])]
        return _look_after(names, list_them=list_them, stop=stop, everything=everything, json=at.json)
    if task is None or not ports:
        missing = "the TASK, and" if task is None else "the ports, each as REMOTE_PORT or LOCAL:REMOTE_PORT,"
        raise UsageError(f"Give {missing} as in: kohakuriver forward my-task 8888")
    _check_command(command, json=at.json, detach=detach)
    _check_wait(wait, task, ports)
    wanted = _ports(ports, local_port, proto.value)
    chosen = at.settings()
    if resume_for is not None:
        chosen = replace(chosen, resume_for=resume_for)
    _warn_if_exposed(local_host)
    from kohakuriver.cli.forward_run import Wanted, behind, in_front

    made = Wanted(task, wanted, chosen, local_host, patience=wait, resume=not no_resume, json=at.json)
    return behind(made) if detach else in_front(made, command)


def _look_after(names: list[str], *, list_them: bool, stop: bool, everything: bool, json: bool) -> int:
    """`--list` and `--stop`."""
    from kohakuriver.cli.background import needs_unix

    needs_unix()
    if list_them and (stop or everything or names):
        raise UsageError("--list takes no TASK, and goes without --stop: it shows all forwards in the background.")
    if list_them:
        return _list(json)
    if bool(names) == everything or not stop:
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
    leads = {f"{local['local_port']}:{local['remote_port']}/{local['proto']}" for local in told["ports"]}
    numbers = ["-" if told[name] is None else str(told[name]) for name in ("pid", "connections")]
    since = "-" if told["since"] is None else output.age(told["since"])
    return [told["id"], told["task"] or "-", " ".join(sorted(leads)), numbers[0], since, numbers[1], told["state"]]


def _stop(names: list[str], json: bool) -> int:
    """End those with these ids or to these tasks, or all where none is named; each is tried."""
    from kohakuriver.cli import detached

    failed: list[KohakuRiverError] = []
    found: dict[str, dict[str, Any]] = {} if names else {each["id"]: each for each in detached.listed()}
    for name in names:
        try:
            found |= {each["id"]: each for each in detached.find(name)}
        except KohakuRiverError as error:  # noqa: PERF203 - the others are to be tried all the same
            failed.append(error)
    for each in found:
        try:
            told = detached.stop(each)
        except KohakuRiverError as error:
            failed.append(error)
            continue
        if json:
            output.json_line(told)
        else:
            output.line(f"Stopped {told['id']} ({told['task']}).")
    for other in failed[1:]:
        output.failure(other.code, other.message)
    if failed:
        raise failed[0]
    return 0


def _check_command(command: list[str] | None, *, json: bool, detach: bool) -> None:
    if command is not None and not command:
        raise UsageError("A command must follow '--'.")
    if command and detach:
        raise UsageError("--detach and a command don't go together: who should wait for its end?")
    if command and json:
        raise UsageError("--json and a command don't go together: stdout is the command's.")


def _check_wait(wait: float | None, task: str, ports: list[str]) -> None:
    """Raises UsageError where the seconds of `--wait` were taken for the task."""
    if wait is not None and task.isdigit() and len(ports) > 1 and ports[0][:1].isalpha():
        raise UsageError(f"The seconds of --wait stand behind an equals sign: --wait={task} {' '.join(ports)}")


def _ports(texts: list[str], local_port: int | None, proto: str) -> list[PortForward]:
    from kohakuriver.client.forward import parse_port

    if local_port is not None and len(texts) > 1:
        raise UsageError("--local-port goes with one remote port; give several as LOCAL:REMOTE.")
    if local_port is not None and ":" in texts[0]:
        raise UsageError(f"{texts[0]!r} names the local port already: leave --local-port out.")
    return [parse_port(text, proto=proto, local=local_port) for text in texts]


def _warn_if_exposed(local_host: str) -> None:
    from kohakuriver.client.forward import exposes

    if exposes(local_host):
        output.note(f"Warning: anybody who reaches this machine on {local_host} can use this forward.")

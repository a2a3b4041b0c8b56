"""`kohakuriver agent`: make a task of wherever it runs, over one connection out to the host.

What does the work is the static tunnel client, which takes this process over: signals, exit code and all.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from kohakuriver.cli.app import App
from kohakuriver.cli.behind_dashes import WithCommand, command_of
from kohakuriver.cli.options import Place, SshAlgorithms, SshAlgorithmsOption, remote, warned
from kohakuriver.errors import KohakuRiverError, UsageError
from kohakuriver.task import is_task_name

__all__ = ["register"]

START_SECONDS = 5.0
"""For so long the SSH server is waited for."""

_NEW_SECONDS = 60.0
_LOOK_AGAIN_SECONDS = 0.02
_SET_PARENT_DEATH_SIGNAL = 1
_KEYS = ("host_key", "host_key_ecdsa")


NameOption = Annotated[
    str | None,
    typer.Option(
        "--name", metavar="NAME", help="What the task is called. Default: a made up name.", show_default=False
    ),
]
PortsOption = Annotated[
    str | None,
    typer.Option(
        "--ports",
        metavar="PORTS",
        help="What is carried beside what your own processes listen on: ports with commas between, or all.",
        show_default=False,
    ),
]
SshOption = Annotated[bool, typer.Option("--ssh", help="Run an SSH server, too, that lets your keys in.")]
PublicKeyOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--public-key-file", metavar="FILE", help="Whom that lets in, too; may be repeated.", show_default=False
    ),
]
TokenFileOption = Annotated[
    Path | None,
    typer.Option(
        "--token-file",
        metavar="FILE",
        help="A token, as of 'token create --agent'. Default: KOHAKURIVER_TOKEN, or your login.",
        show_default=False,
    ),
]
ViaOption = Annotated[
    str | None,
    typer.Option("--via", metavar="LOGIN", help="Go out through this machine, by 'ssh -W'.", show_default=False),
]


def register(app: App) -> None:
    """Add the command to the program."""
    app.command(cls=WithCommand, epilog="Example: kohakuriver agent --name train -- python train.py")(remote(agent))


def agent(
    ctx: typer.Context,
    at: Place,
    name: NameOption = None,
    ports: PortsOption = None,
    with_ssh: SshOption = False,
    public_key_file: PublicKeyOption = None,
    token_file: TokenFileOption = None,
    via: ViaOption = None,
    ssh_algorithms: SshAlgorithmsOption = SshAlgorithms.all,
) -> NoReturn:
    """Make a task of where this runs, and run CMD in it: a job, a pod, a machine behind a router."""
    program = _program()
    if name is not None and not is_task_name(name):
        raise UsageError(f"{name!r} can't be a task's name; give 1 to 63 of a-z, 0-9, dot, dash and underscore.")
    settings = warned(at.resolved())
    options = {"--name": name, "--ports": ports, "--via": via, "--ca-file": settings.ca_file}
    environment = {**os.environ, "KOHAKURIVER_HOST": settings.named}
    environment.pop("KOHAKURIVER_TOKEN", None)
    if token_file is not None:
        options["--token-file"] = str(token_file)
    elif settings.token:
        options["--token-fd"] = str(_descriptor_with(settings.token))
    words = [word for option, value in options.items() if value is not None for word in (option, value)]
    if with_ssh or public_key_file:
        words += _ssh_server(name or "any", public_key_file or [], ssh_algorithms.value)
    command = command_of(ctx)
    sys.stdout.flush()
    os.execve(program, [program.name, "agent", *words, *(["--", *command] if command else [])], environment)


def _descriptor_with(token: str) -> int:
    """A descriptor to read a token from, for the program that takes this process over: what is in the environment of
    that, whoever runs beside it can read.
    """
    import fcntl  # not there on every system

    with os.fdopen(os.memfd_create("token"), "w+b") as file:
        file.write(token.encode())
        file.seek(0)
        return fcntl.fcntl(file, fcntl.F_DUPFD, 3)  # without FD_CLOEXEC, and no program's input or output


def _program() -> Path:
    """The static tunnel client. Raises KohakuRiverError where there is none."""
    from kohakuriver.binaries import TUNNEL_CLIENT

    if not sys.platform.startswith("linux"):
        raise UsageError("An agent runs on Linux.")
    program = TUNNEL_CLIENT.find()
    if program is None:
        raise KohakuRiverError(
            "This installation has no static tunnel client, which an agent is; install kohakuriver again where Rust's "
            "cargo is on the path, or set KOHAKURIVER_TUNNEL_CLIENT to one."
        )
    return program


def _ssh_server(name: str, key_files: list[Path], algorithms: str) -> list[str]:
    """Start an SSH server that ends with this process; what the tunnel client is told of it."""
    from kohakuriver import host_keys
    from kohakuriver.binaries import SSH_SERVER, ssh_server_options
    from kohakuriver.cli.ssh_files import public_keys
    from kohakuriver.config import state_dir, write_private

    server = SSH_SERVER.find()
    if server is None:
        raise KohakuRiverError(
            "This installation has no SSH server for tasks; install kohakuriver again where Rust's cargo is on the "
            "path."
        )
    folder = state_dir() / "agents" / name
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    files = [folder / key for key in _KEYS]
    lines = [host_keys.ed25519(files[0]), host_keys.ecdsa(files[1])]
    own, kept = _own_folder(folder)
    allowed, log = own / "authorized_keys", own / "log"
    write_private(allowed, "".join(f"{line}\n" for line in public_keys(key_files)))
    port = _free_port()
    command = [str(server), *ssh_server_options(port, [*map(str, files)], str(allowed), algorithms)]
    with log.open("wb") as output:
        started = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={name: value for name, value in os.environ.items() if name != "KOHAKURIVER_TOKEN"},
            start_new_session=True,
            pass_fds=(kept,),
            preexec_fn=_ends_with_parent(),
        )
    os.close(kept)
    _wait_for(started, port, log)
    return ["--ssh-port", str(port), "--ssh-host-key", lines[0], "--ssh-host-key-ecdsa", lines[1]]


def _own_folder(parent: Path) -> tuple[Path, int]:
    """A new folder, and the descriptor that keeps it: agents of one name may run at a time, and let others in.

    Those of servers that have ended are deleted.
    """
    import fcntl
    import tempfile

    for old in parent.glob("run-*"):
        with contextlib.suppress(OSError):
            if time.time() - old.stat().st_mtime > _NEW_SECONDS:  # a newer one may not be kept yet
                _delete_unless_kept(old)
    folder = Path(tempfile.mkdtemp(prefix="run-", dir=parent))
    kept = os.open(folder, os.O_RDONLY)
    with contextlib.suppress(OSError):  # not every network's file system can
        fcntl.flock(kept, fcntl.LOCK_SH)
    return folder, kept


def _delete_unless_kept(folder: Path) -> None:
    import fcntl
    import shutil

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder)
    finally:
        os.close(descriptor)


def _ends_with_parent() -> Callable[[], None]:
    """What has a new process end when this one does, whatever program that is by then."""
    import ctypes

    prctl = ctypes.CDLL(None, use_errno=True).prctl
    return lambda: prctl(_SET_PARENT_DEATH_SIGNAL, int(signal.SIGTERM), 0, 0, 0)


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _wait_for(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(_LOOK_AGAIN_SECONDS)
    said = log.read_text("utf-8", "replace").strip().splitlines()
    raise KohakuRiverError(f"The SSH server did not start{': ' + said[-1] if said else ''}.")

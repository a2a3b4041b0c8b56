"""`kohakuriver ssh-proxy`, `ssh-config` and `vps connect`: tasks for OpenSSH's programs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kohakuriver.backends import known
from kohakuriver.cli.behind_dashes import WithSshArguments, command_of
from kohakuriver.cli.options import Connection, Remote, TaskArgument, remote
from kohakuriver.cli.ssh_names import alias, task_of
from kohakuriver.errors import HostUnreachableError, KohakuRiverError, UsageError

if TYPE_CHECKING:
    from kohakuriver.client.host import HostClient, Task
    from kohakuriver.config import Settings

__all__ = ["WithSshArguments", "connect", "register", "tasks_changed"]

NOT_FOUND = 127

PassOption = Annotated[
    bool,
    typer.Option("--pass-socket", help="Hand ssh the connection itself; goes with its option ProxyUseFdpass."),
]


FdpassOption = Annotated[
    bool,
    typer.Option(
        "--fdpass",
        help="Hand ssh the connection to the host itself: faster, but it ends with the network, the host or the node.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command("ssh-proxy", epilog="Example: ssh -o ProxyCommand='kohakuriver ssh-proxy %n' root@web")(
        remote(ssh_proxy)
    )
    app.command("ssh-config", epilog="Example: kohakuriver ssh-config --install")(remote(ssh_config))


def ssh_proxy(
    at: Connection,
    task: TaskArgument,
    pass_socket: PassOption = False,
    direct: Annotated[
        bool, typer.Option("--direct", help="Go by the host's SSH proxy: the connection ends when a hop does.")
    ] = False,
) -> None:
    """Connect stdin and stdout to a task's SSH server: a ProxyCommand for ssh."""
    from kohakuriver.cli import ssh_dial

    settings = at.resolved(at.token)
    ssh_dial.proxy(
        host=settings.named,
        token=settings.token,
        ssh_proxy=settings.ssh_proxy,
        ca_file=settings.ca_file,
        task=task_of(task),
        pass_socket=pass_socket,
        direct=direct,
    )


def ssh_config(
    at: Remote,
    install: Annotated[
        bool, typer.Option("--install", help="Write them to a file that ~/.ssh/config includes from now on.")
    ] = False,
    uninstall: Annotated[bool, typer.Option("--uninstall", help="Take back what --install did.")] = False,
    fdpass: FdpassOption = False,
) -> None:
    """Print OpenSSH configuration by which ssh, scp, rsync, git and editors reach tasks by their names."""
    from kohakuriver.cli import ssh_files

    if install and uninstall:
        raise UsageError("Give either --install or --uninstall.")
    if uninstall:
        found = ssh_files.uninstall()
        at.show({"event": "uninstalled", "found": found}, "Removed." if found else "There was nothing to remove.")
        return
    names = at.ask(_names)
    if not install:
        text = ssh_files.config_text(names, direct=fdpass)
        at.show({"config": text}, text.rstrip("\n"))
        return
    path = ssh_files.install(names, direct=fdpass)
    sentence = f"Wrote {path}, which ~/.ssh/config includes; try `ssh {names[0] if names else 'TASK.kohakuriver'}`."
    at.show({"event": "installed", "file": str(path), "names": names}, sentence)


async def _names(client: HostClient) -> list[str]:
    """The tasks that ssh shall know by their bare names; any other task has its name and `.kohakuriver`.

    They are those that the user named: whoever names a task `github` must not get what others mean for that, be it by
    leaving it to an admin. What has a dot looks like a machine on the internet and is none of them, whoever named it.
    """
    me = (await client.whoami()).user
    mine = [task for task in await client.tasks() if task.owner == task.creator == me and "." not in task.name]
    return [task.name for task in mine if task.ssh_host_key or known(task.backend).own_ssh]


async def tasks_changed(client: HostClient) -> None:
    """Write the installed configuration anew, if there is one: a task with an SSH server came or went."""
    from kohakuriver.cli import ssh_files

    if ssh_files.installed():
        ssh_files.install(await _names(client))


def connect(
    ctx: typer.Context,
    at: Connection,
    task: TaskArgument,
    user: Annotated[str, typer.Option("--user", help="Whom to log in as.")] = "root",
    key: Annotated[
        Path | None, typer.Option("--key", help="The private key. Default: what ssh uses.", show_default=False)
    ] = None,
    proxy_port: Annotated[
        int | None,
        typer.Option(
            "--proxy-port",
            min=1,
            max=65535,
            help="With --fdpass: the SSH proxy's port. Default: 8002.",
            show_default=False,
        ),
    ] = None,
    fdpass: FdpassOption = False,
) -> int:
    """Log in to a task with the system's ssh.

    These options stand before the task or right behind it; from the first word on that is none of them all goes to ssh.
    """
    from kohakuriver.cli import ssh_dial, ssh_files

    if key is not None and not key.exists():
        raise UsageError(f"There is no private key at {key}; --key names its file.")
    settings = at.settings()
    ssh_proxy = settings.ssh_proxy
    if proxy_port is not None:
        ssh_proxy = ",".join(f"{each.rpartition(':')[0]}:{proxy_port}" for each in ssh_proxy.split(","))
    found = at.ask(lambda client: client.task(task))
    # ssh would say less about why it can't connect, and always exit with 255.
    shown = ssh_dial.to_show(settings.named, str(found.task_id), settings.token, settings.ca_file)
    direct = fdpass or proxy_port is not None
    try:
        ssh_dial.dial(ssh_proxy, str(found.task_id), shown).close()
    except HostUnreachableError:
        if direct:
            raise
    ssh = shutil.which("ssh")
    if ssh is None:
        raise KohakuRiverError("There is no ssh on this machine; install OpenSSH's client.")
    ssh_files.prepare()
    if found.ssh_host_key:
        keys = [key for key in (found.ssh_host_key, found.ssh_host_key_ecdsa) if key]
        ssh_files.learn_host_keys(found.task_id, found.name, keys)
    arguments = [*_options(found, direct=direct), *_identity(key), f"{user}@{found.name}", *(command_of(ctx) or [])]
    return _run(ssh, arguments, {**os.environ, **_environment(settings, ssh_proxy)})


def _environment(settings: Settings, ssh_proxy: str) -> dict[str, str]:
    """What the program that ssh starts for the connection goes by."""
    given = {"HOST": settings.named, "SSH_PROXY": ssh_proxy, "TOKEN": settings.token, "CA_FILE": settings.ca_file}
    return {f"KOHAKURIVER_{name}": value for name, value in given.items() if value}


def _identity(key: Path | None) -> list[str]:
    from kohakuriver.cli.ssh_files import spoken

    return [] if key is None else ["-o", f"IdentityFile {spoken(key)}"]


def _options(task: Task, *, direct: bool) -> list[str]:
    from kohakuriver.cli import ssh_files

    lines = [
        *ssh_files.proxy_command(str(task.task_id), known=True, direct=direct),
        *ssh_files.connection_options(known=bool(task.ssh_host_key)),
        f"HostKeyAlias {alias(task.task_id)}",
    ]
    return [part for line in lines for part in ("-o", line)]


def _run(ssh: str, arguments: list[str], environment: dict[str, str]) -> int:
    """Become ssh, where a process can; the exit code elsewhere."""
    if os.name == "posix":
        os.execve(ssh, [ssh, *arguments], environment)
    import subprocess

    return subprocess.run([ssh, *arguments], env=environment, check=False).returncode

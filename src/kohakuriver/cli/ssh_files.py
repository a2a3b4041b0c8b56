"""The files by which OpenSSH knows our tasks: a known_hosts and a configuration of ours, and one Include line."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from kohakuriver.cli.ssh_names import DOMAIN, alias
from kohakuriver.config import config_dir, write_private
from kohakuriver.errors import KohakuRiverError, UsageError
from kohakuriver.task import is_task_name
from kohakuriver.text import printable

__all__ = [
    "config_file",
    "config_text",
    "connection_options",
    "install",
    "installed",
    "known_hosts_file",
    "learn_host_keys",
    "prepare",
    "proxy_command",
    "public_keys",
    "spoken",
    "uninstall",
]

HEADING = "# Written by `kohakuriver ssh-config --install`; `kohakuriver ssh-config --uninstall` removes it."


def _directory() -> Path:
    return config_dir() / "ssh"


def prepare() -> None:
    """Make the directory in which ssh keeps the host keys that it learns; without it, it would keep none."""
    _directory().mkdir(parents=True, exist_ok=True, mode=0o700)


def spoken(path: Path) -> str:
    """`path` as an argument in OpenSSH's configuration, where `%` begins a token.

    Raises UsageError for one that its versions don't all read alike: there is no way to write it down (ssh_config(5)).
    """
    text = str(path)
    if not text.isprintable() or '"' in text or "${" in text or ("\\" in text and os.name == "posix"):
        raise UsageError(
            f"OpenSSH's configuration has no way to say the path {printable(text)!r}: choose one without quotes, "
            "backslashes, ${ and line ends; KOHAKURIVER_CONFIG_DIR moves the directory."
        )
    return f'"{text.replace("%", "%%")}"'


def known_hosts_file() -> Path:
    """The host keys of tasks."""
    return _directory() / "known_hosts"


def config_file() -> Path:
    """The OpenSSH configuration that `install` writes."""
    return _directory() / "config"


def learn_host_keys(task_id: int, name: str, keys: Sequence[str]) -> None:
    """Take down a task's host keys, under every name that ssh may know the task by."""
    if not is_task_name(name) or not all(map(str.isprintable, keys)):  # a line more would be another host's key
        raise KohakuRiverError("The host tells a name or a host key that can be none; don't trust that host.")
    names = [alias(task_id), name, f"{name}{DOMAIN}", str(task_id), f"{task_id}{DOMAIN}"]
    fresh = [f"{','.join(names)} {key}" for key in keys]
    path = known_hosts_file()
    with _locked(path):
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if not set(line.partition(" ")[0].split(",")) & set(names)]
        if [line for line in lines if line not in kept] != fresh:
            _replace(path, "".join(f"{line}\n" for line in [*kept, *fresh]))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Several connections may be opened at once, and each writes the whole file."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with path.with_name(path.name + ".lock").open("a") as lock:
        with contextlib.suppress(ImportError):
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _replace(path: Path, text: str, mode: int = 0o600) -> None:
    """Write a file in one step; one that is a link stays one."""
    write_private(path.resolve(), text, mode=mode)


def public_keys(files: Sequence[Path]) -> list[str]:
    """The keys in these files; without any, those of `~/.ssh/*.pub`. Raises UsageError when there is none."""
    found: dict[str, None] = {}
    for path in files or sorted((Path.home() / ".ssh").glob("*.pub")):
        try:
            text = path.read_text("utf-8")
        except (OSError, ValueError) as error:
            raise UsageError(f"The public key can't be read from {path}: {error}.") from error
        if "PRIVATE KEY" in text:
            raise UsageError(f"{path} is a private key, which stays with you; give the public one, {path}.pub.")
        found.update((line.strip(), None) for line in text.splitlines() if line.strip() and not line.startswith("#"))
    if not found:
        where = ", ".join(map(str, files)) or "~/.ssh/*.pub"
        raise UsageError(
            f"There is no public key in {where}; make one with `ssh-keygen -t ed25519`, or name a file with "
            "--public-key-file."
        )
    return list(found)


def proxy_command(
    task: str, *, environment: dict[str, str] | None = None, known: bool = False, direct: bool = False
) -> list[str]:
    """ssh's options for the way to a task (in ssh's configuration `%n` is the name that the user gave).

    A `direct` one goes by the host's SSH proxy: nothing stays in its way, and it ends with what lies between.
    """
    program = [sys.executable, "-m", "kohakuriver.cli.ssh_dial"]
    if environment:
        program = ["env", *(f"{name}={value}" for name, value in environment.items()), *program]
    import shlex

    flags = {"--known": known, "--direct": direct, "--pass-socket": _can_pass()}
    command = shlex.join([*program, *(flag for flag, given in flags.items() if given)])
    options = [f"ProxyCommand {command.replace('%', '%%')} {task}"]
    return [*options, "ProxyUseFdpass yes"] if _can_pass() else options


def connection_options(*, known: bool) -> list[str]:
    """ssh's options for the connection itself; with `known` a host key that is not written down yet is refused."""
    return [
        f"UserKnownHostsFile {spoken(known_hosts_file())}",
        "HashKnownHosts no",
        f"StrictHostKeyChecking {'yes' if known else 'accept-new'}",
        "ServerAliveInterval 30",
    ]


def _can_pass() -> bool:
    return os.name == "posix"


def config_text(names: Sequence[str], *, direct: bool = False) -> str:
    """OpenSSH configuration for these tasks, and for any by its name and `DOMAIN`; `direct` as in `proxy_command`."""
    # A program that was not started from this shell would not find the same cluster by itself. The token stays out.
    kept = {name: os.environ[name] for name in ("KOHAKURIVER_CONFIG_DIR", "KOHAKURIVER_HOST") if os.environ.get(name)}
    if "KOHAKURIVER_CONFIG_DIR" in kept:
        kept["KOHAKURIVER_CONFIG_DIR"] = str(config_dir())
    options = [
        "User root",
        *proxy_command("%n", environment=kept, direct=direct),
        # The host key of a task that was given its SSH server is there before ssh looks; others are learnt once.
        *connection_options(known=False),
    ]
    lines = [HEADING, f"Host {' '.join([*names, f'*{DOMAIN}'])}", *(f"    {option}" for option in options)]
    return "".join(f"{line}\n" for line in lines)


def _user_config() -> Path:
    return Path.home() / ".ssh" / "config"


def _include() -> str:
    # A pattern: what is special in one, or begins a token for newer versions of OpenSSH alone, is any character there.
    pattern = re.sub(r"[%$*?\[\]]", "?", spoken(config_file()).replace("%%", "%"))
    return f"Include {pattern}"


def installed() -> bool:
    """Whether ssh is told of our configuration."""
    try:
        return config_file().exists() and _include() in _user_config().read_text("utf-8").splitlines()
    except OSError:
        return False


def install(names: Sequence[str], *, direct: bool | None = None) -> Path:
    """Write our configuration and include it in the user's, at the top, where it is in no `Host` block.

    `direct` as in `proxy_command`; None is as it was installed before.
    """
    path, include = config_file(), _include()
    if direct is None:
        direct = path.exists() and " --direct " in path.read_text("utf-8")
    text = config_text(names, direct=direct)
    prepare()
    _replace(path, text)
    user = _user_config()
    user.parent.mkdir(exist_ok=True, mode=0o700)
    text = user.read_text("utf-8") if user.exists() else ""
    if include not in text.splitlines():
        _replace(user, f"{include}\n{text}", _mode(user))
    return path


def uninstall() -> bool:
    """Take back what `install` did; whether there was something."""
    path, user = config_file(), _user_config()
    found = path.exists()
    path.unlink(missing_ok=True)
    if user.exists():
        text = user.read_text("utf-8")
        lines = text.splitlines(keepends=True)
        kept = [line for line in lines if line.rstrip("\r\n") != _include()]
        if kept != lines:
            found = True
            if kept or user.is_symlink():
                _replace(user, "".join(kept), _mode(user))
            else:
                user.unlink()
    return found


def _mode(path: Path) -> int:
    return path.stat().st_mode & 0o777 if path.exists() else 0o600

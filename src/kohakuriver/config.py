"""Where a user's settings come from: flag, environment, `config.toml`, the cluster that `up` left, logins, default.

Sources: docs/cli.md "Settings". ssh runs one of our programs for every connection, and that one needs settings too: so
only the standard library is imported here, and of that only what is used.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote, urlsplit

from kohakuriver.errors import UsageError
from kohakuriver.resolve import ascii_named

__all__ = [
    "DEFAULT_HOST",
    "DEFAULT_HOST_PORT",
    "DEFAULT_RUNNER_PORT",
    "DEFAULT_SSH_PORT",
    "NAME_IN_BROWSERS",
    "Cluster",
    "Logins",
    "Settings",
    "accept_plain_http",
    "accepts_plain_http",
    "advertise_url",
    "browser_url",
    "clean_token",
    "config_dir",
    "host_url",
    "host_urls",
    "left_cluster",
    "load_settings",
    "path_segment",
    "read_cluster",
    "read_logins",
    "remove_cluster",
    "set_by",
    "state_dir",
    "write_cluster",
    "write_logins",
    "write_private",
]

DEFAULT_HOST_PORT = 8000
DEFAULT_RUNNER_PORT = 8001
DEFAULT_SSH_PORT = 8002
DEFAULT_HOST = f"http://127.0.0.1:{DEFAULT_HOST_PORT}"

NAME_IN_BROWSERS = re.compile(r"kr-[a-z2-7]{26}\.localhost")
"""As what a browser goes to a host on its own machine, without TLS: a name that the host makes up.

A browser sends cookies to every port of a name. At 127.0.0.1 and localhost forwards of tasks' ports are opened, and to
any port of a name that a page can guess it can send the browser.
"""

SHARED_NAMES = ("127.0.0.1", "::1", "localhost")
"""The names at which they do."""


def config_dir() -> Path:
    """The directory that holds everything a user's commands keep, absolute; `KOHAKURIVER_CONFIG_DIR` moves it.

    Raises UsageError for a user without a home directory.
    """
    moved = os.environ.get("KOHAKURIVER_CONFIG_DIR")
    try:
        if moved:
            return Path(moved).expanduser().absolute()
        import platformdirs

        return Path(platformdirs.user_config_dir("kohakuriver", appauthor=False))
    except RuntimeError as error:
        raise UsageError("This user has no home directory; set HOME or KOHAKURIVER_CONFIG_DIR.") from error


def state_dir() -> Path:
    """The directory for what commands keep for themselves, as logs; `KOHAKURIVER_CONFIG_DIR` moves it, too.

    Raises UsageError for a user without a home directory.
    """
    moved = config_dir()
    if os.environ.get("KOHAKURIVER_CONFIG_DIR"):
        return moved
    import platformdirs

    return Path(platformdirs.user_state_dir("kohakuriver", appauthor=False))


def host_url(text: str, port: int = DEFAULT_HOST_PORT) -> str:
    """`text` (a URL, a bare name, `name:port`, an IPv6 address) as the host's URL without a trailing slash.

    `port` is that of a bare name. A name in other letters than ASCII's becomes what name servers know it by.

    Raises UsageError when it can't be one.
    """
    bare = text.strip()
    bare = (bare if "://" in bare else "http://" + _with_default_port(bare.rstrip("/"), port)).rstrip("/")
    try:
        parts = urlsplit(bare)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        bare = ascii_named(bare) if valid else bare
    except ValueError:
        valid = False
    if valid and parts.path in ("/api", "/docs"):
        raise UsageError(f"The host's URL ends before {parts.path}: {bare.removesuffix(parts.path)}")
    if not valid or parts.query or parts.fragment or parts.username or any(c.isspace() for c in bare):
        raise UsageError(f"The host must be a URL like http://name:8000 or a host name, not {text!r}.")
    return bare


def advertise_url(text: str, port: int) -> str:
    """Where others are told to find a program of the cluster, as a URL; `port` is that of a bare name.

    Raises UsageError when it can't be one.
    """
    try:
        return host_url(text, port)
    except UsageError as error:
        raise UsageError(f"--advertise-url must be a URL like http://name:8001, not {text!r}.") from error


def host_urls(text: str, port: int = DEFAULT_HOST_PORT) -> tuple[str, ...]:
    """The URLs of one host, or of several that work on the same database, with commas or spaces between.

    Raises UsageError.
    """
    parts = [part for each in text.split(",") for part in each.split() or [""]]
    return tuple(dict.fromkeys(host_url(part, port) for part in parts))


def browser_url(url: str, name: str) -> str:
    """A host's URL as a browser should have it; `name` is what the host calls itself there."""
    parts = urlsplit(url)
    if parts.scheme != "http" or parts.hostname not in SHARED_NAMES:
        return url
    port = "" if parts.port is None else f":{parts.port}"
    return parts._replace(netloc=name + port).geturl()


def path_segment(name: str) -> str:
    """The name or id of a task, user or token as a part of a URL's path.

    Raises UsageError for what can't be one: it could lead to another path.
    """
    if name in ("", ".", "..") or "/" in name or any("\ud800" <= each <= "\udfff" for each in name):
        raise UsageError(f"{name!r} can't be a name or an id.")
    return quote(name, safe="")


def _with_default_port(address: str, port: int) -> str:
    if address.count(":") > 1 and not address.startswith("["):
        address = f"[{address}]"
    has_port = ":" in address.rpartition("]")[2]
    return address if has_port or not address else f"{address}:{port}"


@dataclass(frozen=True)
class Cluster:
    """What a running `kohakuriver up` tells the other commands of the same user. `pid` is that `up`'s process.

    `lock` is the file that it keeps locked for as long as it runs.
    """

    host_url: str
    token: str
    ssh_proxy: str | None = None
    pid: int = 0
    lock: str = ""


def _cluster_file() -> Path:
    return config_dir() / "cluster.json"


def read_cluster() -> Cluster | None:
    """The cluster that `up` runs, or None. A file that can't be read or understood is as good as none, and so is what
    an `up` left that was killed.
    """
    cluster = _written_cluster()
    return cluster if cluster is not None and _is_locked(cluster.lock) else None


def left_cluster() -> bool:
    """Whether there was an `up` that ended without a chance to say so."""
    cluster = _written_cluster()
    return cluster is not None and not _is_locked(cluster.lock)


def _is_locked(path: str) -> bool:
    """Whether somebody keeps `path` locked; True where that can't be known."""
    if not path or sys.platform == "win32":
        return True
    import fcntl

    try:
        with open(path, "rb") as file:  # noqa: PTH123
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return False


def _written_cluster() -> Cluster | None:
    try:
        fields = json.loads(_cluster_file().read_text("utf-8"))
        return Cluster(
            host_url=str(fields["host_url"]),
            token=str(fields["token"]),
            ssh_proxy=fields.get("ssh_proxy"),
            pid=int(fields.get("pid", 0)),
            lock=str(fields.get("lock", "")),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_cluster(cluster: Cluster) -> None:
    """Make `cluster` the one that commands use with nothing set. The file is readable by this user alone."""
    write_private(_cluster_file(), json.dumps(asdict(cluster)) + "\n")


def remove_cluster(cluster: Cluster) -> None:
    """Forget `cluster`, unless another `up` has put its own in that place meanwhile."""
    if read_cluster() == cluster:
        with contextlib.suppress(OSError):
            _cluster_file().unlink()


@dataclass(frozen=True)
class Logins:
    """What `kohakuriver auth login` keeps, by the host's URL; `current` is the host of the last login, or its hosts.

    `ca_files` are the authorities by which a host was trusted then, for hosts that needed a file.
    """

    current: str | None = None
    tokens: dict[str, str] = field(default_factory=dict)
    ca_files: dict[str, str] = field(default_factory=dict)


def _logins_file() -> Path:
    return config_dir() / "logins.json"


def read_logins() -> Logins:
    """What was logged in to. Raises UsageError for a file that can't be read or understood."""
    path = _logins_file()
    try:
        content = json.loads(path.read_text("utf-8"))
        current = content["current"]
        tokens = {str(host): str(token) for host, token in content["tokens"].items()}
        ca_files = {str(host): str(path) for host, path in content.get("ca_files", {}).items()}
        return Logins(None if current is None else str(current), tokens, ca_files)
    except (FileNotFoundError, NotADirectoryError):
        return Logins()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} can't be read; remove it and log in again.") from error


def write_logins(logins: Logins) -> None:
    """Keep what was logged in to. The file is readable by this user alone."""
    write_private(_logins_file(), json.dumps(asdict(logins)) + "\n")


def write_private(path: Path, text: str, *, mode: int = 0o600) -> None:
    """Write `text` to `path` in one step, for its owner alone unless `mode` says otherwise.

    A reader sees the old file or the whole new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).chmod(mode)
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise


def _plain_http_file() -> Path:
    return config_dir() / "plain-http"


def accepts_plain_http(url: str) -> bool:
    """Whether the user was told already that what goes to the host at `url` can be read on the way."""
    try:
        return url in _plain_http_file().read_text("utf-8").splitlines()
    except (OSError, ValueError):
        return False


def accept_plain_http(url: str) -> None:
    """Remember that the user was told. Where nothing can be written it is told again."""
    if not accepts_plain_http(url):
        with contextlib.suppress(OSError), _private_to_append(_plain_http_file()) as file:
            file.write(f"{url}\n")


def _private_to_append(path: Path) -> IO[str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a", encoding="utf-8")


@dataclass(frozen=True)
class Settings:
    """The resolved settings of a user's command. Build it with `load_settings`.

    `other_hosts` are asked when the one at `host` does not answer: they work on the same database. `ssh_proxy` are the
    addresses of their SSH proxies, in the same order, with commas between.
    """

    host: str
    token: str | None = field(default=None, repr=False)
    ssh_proxy: str = ""
    ca_file: str | None = None
    path: str | None = None  # "auto", "direct" or "host"; checked where it is used
    # What a forward's streams may hold and how long they wait; None is the default. Checked where they are used.
    window_first: str | int | None = None
    window_max: str | int | None = None
    window_budget: str | int | None = None
    linger: str | float | None = None
    udp_idle: str | float | None = None
    udp_peers: str | int | None = None
    resume_for: str | int | None = None
    other_hosts: tuple[str, ...] = ()

    @property
    def hosts(self) -> tuple[str, ...]:
        """The URLs of all hosts, in the order in which they are asked."""
        return (self.host, *self.other_hosts)

    @property
    def named(self) -> str:
        """The hosts, as the setting `host` takes them."""
        return ",".join(self.hosts)


_TEXTS = ("host", "token", "ssh_proxy", "ca_file", "path")
_NUMBERS = ("window_first", "window_max", "window_budget", "linger", "udp_idle", "udp_peers", "resume_for")
_NAMES = (*_TEXTS, *_NUMBERS)


def _read_config_file() -> dict[str, Any]:
    path = config_dir() / "config.toml"
    try:
        text = path.read_text("utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise UsageError(f"{path} can't be read: {error.strerror}.") from error
    except ValueError as error:
        raise UsageError(f"{path} can't be read: {error}.") from error
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        content: dict[str, Any] = tomllib.loads(text)
    except ValueError as error:
        raise UsageError(f"{path} can't be read: {error}.") from error
    for name, value in content.items():
        if name not in _NAMES:
            raise UsageError(f"The setting {name!r} is not known: {path} may have {', '.join(_NAMES)}.")
        if name in _TEXTS and not isinstance(value, str):
            raise UsageError(f"The setting {name!r} is invalid: in {path} it must be text.")
    return content


def set_by(name: str) -> str | None:
    """The variable, or the file's name, that gives the setting `name`; None where neither does.

    Raises UsageError for a file that can't be read.
    """
    variable = f"KOHAKURIVER_{name.upper()}"
    if os.environ.get(variable):
        return variable
    return "config.toml" if name in _read_config_file() else None


def load_settings(
    *,
    host: str | None = None,
    token: str | None = None,
    ssh_proxy: str | None = None,
    ca_file: str | None = None,
) -> Settings:
    """The settings in force; arguments are flags, and a None one was not given.

    Raises UsageError when a setting is invalid, with the name of the setting.
    """
    environment = {name: os.environ.get(f"KOHAKURIVER_{name.upper()}") for name in _NAMES}
    flags = {"host": host, "token": token, "ssh_proxy": ssh_proxy, "ca_file": ca_file}
    given = _read_config_file()
    given.update((name, value) for name, value in environment.items() if value)
    given.update((name, value) for name, value in flags.items() if value is not None)
    for name, value in given.items():
        if any("\udc80" <= character <= "\udcff" for character in str(value)):
            raise UsageError(f"The setting {name!r} is not UTF-8; settings must be.")
    return _filled_in(given)


def _filled_in(given: dict[str, Any]) -> Settings:
    """What was given, and for the rest what the cluster that `up` left or a login says, or a default."""
    cluster, logins = read_cluster(), read_logins()
    port, named = _port_of("KOHAKURIVER_PORT"), given.get("host")
    if port is not None and not named:
        named = "127.0.0.1"
    known = cluster.host_url if cluster else logins.current or DEFAULT_HOST
    hosts = host_urls(named, port or DEFAULT_HOST_PORT) if named else tuple(known.split(","))
    host, *others = hosts
    token, ssh_proxy = given.get("token"), given.get("ssh_proxy")
    if token is None:
        token = next((kept for each in hosts if (kept := _of_host(logins.tokens, each)) is not None), None)
    ssh_port = _port_of("KOHAKURIVER_SSH_PROXY_PORT")
    if ssh_port is not None:
        ssh_proxy = ssh_proxy or _ssh_proxies(hosts, ssh_port)
    # The token of the cluster on this machine is for that cluster alone: never sent to any other host.
    if cluster is not None and all(_same_host(each, cluster.host_url) for each in hosts):
        token = cluster.token if token is None else token
        ssh_proxy = ssh_proxy or cluster.ssh_proxy
    numbers = {name: given[name] for name in _NUMBERS if name in given}
    ssh_proxy = ssh_proxy or _ssh_proxies(hosts, DEFAULT_SSH_PORT)
    ca_file = given.get("ca_file") or _of_host(logins.ca_files, host)
    token = None if token is None else clean_token(token)
    return Settings(host, token, ssh_proxy, ca_file, given.get("path"), other_hosts=tuple(others), **numbers)


def _ssh_proxies(hosts: tuple[str, ...], port: int) -> str:
    return ",".join(f"{urlsplit(host).hostname}:{port}" for host in hosts)


def _port_of(variable: str) -> int | None:
    """The port that a variable of version 1's command line gives, None without one. Raises UsageError."""
    text = os.environ.get(variable, "").strip()
    # An orchestrator gives a service of that name such a variable with a URL, which is about something else.
    if not text or "://" in text:
        return None
    if not (text.isascii() and text.isdigit() and 0 < int(text[:6]) < 65536):
        raise UsageError(f"{variable} must be a port from 1 to 65535, not {text!r}.")
    return int(text)


_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def _same_host(one: str, other: str) -> bool:
    """Whether two URLs mean the same host: this machine has several names for itself."""
    return _canonical(one) == _canonical(other)


def _canonical(url: str) -> str:
    parts = urlsplit(url)
    if parts.hostname not in _LOOPBACK:
        return url
    port = parts.port or (443 if parts.scheme == "https" else 80)
    return f"{parts.scheme}://localhost:{port}{parts.path}"


def _of_host(kept: dict[str, str], url: str) -> str | None:
    """What is kept for a host, under this URL or another that means it."""
    return kept.get(url) or next((text for host, text in kept.items() if _same_host(host, url)), None)


def clean_token(text: str) -> str:
    """`text` without white space around it. Raises UsageError where it can't be a token, nor stand in a header."""
    token = text.strip()
    if not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError("The token has a character in it that no token has; copy it once more, all of it.")
    return token

"""Where a user's settings come from: flag, environment, `config.toml`, the cluster that `up` left, default.

Sources: docs/cli.md "Settings".
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import platformdirs
from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, InitSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from kohakuriver.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "DEFAULT_HOST_PORT",
    "DEFAULT_RUNNER_PORT",
    "DEFAULT_SSH_PORT",
    "Cluster",
    "Settings",
    "config_dir",
    "host_url",
    "load_settings",
    "read_cluster",
    "remove_cluster",
    "write_cluster",
    "write_private",
]

DEFAULT_HOST_PORT = 8000
DEFAULT_RUNNER_PORT = 8001
DEFAULT_SSH_PORT = 8002
DEFAULT_HOST = f"http://127.0.0.1:{DEFAULT_HOST_PORT}"


def config_dir() -> Path:
    """The directory that holds everything a user's commands keep; `KOHAKURIVER_CONFIG_DIR` moves it."""
    moved = os.environ.get("KOHAKURIVER_CONFIG_DIR")
    return Path(moved).expanduser() if moved else Path(platformdirs.user_config_dir("kohakuriver", appauthor=False))


def host_url(text: str) -> str:
    """`text` (a URL, a bare name, `name:port`, an IPv6 address) as the host's URL without a trailing slash.

    Raises UsageError when it can't be one.
    """
    bare = text.strip()
    bare = (bare if "://" in bare else "http://" + _with_default_port(bare.rstrip("/"))).rstrip("/")
    try:
        parts = urlsplit(bare)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        valid = False
    if not valid or parts.query or parts.fragment or parts.username or any(c.isspace() for c in bare):
        raise UsageError(f"The host must be a URL like http://name:8000 or a host name, not {text!r}.")
    return bare


def _with_default_port(address: str) -> str:
    if address.count(":") > 1 and not address.startswith("["):
        address = f"[{address}]"
    has_port = ":" in address.rpartition("]")[2]
    return address if has_port or not address else f"{address}:{DEFAULT_HOST_PORT}"


@dataclass(frozen=True)
class Cluster:
    """What a running `kohakuriver up` tells the other commands of the same user. `pid` is that `up`'s process."""

    host_url: str
    token: str
    ssh_proxy: str | None = None
    pid: int = 0


def _cluster_file() -> Path:
    return config_dir() / "cluster.json"


def read_cluster() -> Cluster | None:
    """The cluster that `up` left, or None. A file that can't be read or understood is as good as none."""
    try:
        fields = json.loads(_cluster_file().read_text("utf-8"))
        return Cluster(
            host_url=str(fields["host_url"]),
            token=str(fields["token"]),
            ssh_proxy=fields.get("ssh_proxy"),
            pid=int(fields.get("pid", 0)),
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


def write_private(path: Path, text: str) -> None:
    """Write `text` to `path` in one step, mode 0600; a reader sees the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise


class Settings(BaseSettings):
    """The resolved settings of a user's command. Build it with `load_settings`."""

    model_config = SettingsConfigDict(env_prefix="KOHAKURIVER_", env_ignore_empty=True, extra="forbid", frozen=True)

    host: str = ""
    token: str | None = Field(default=None, repr=False)
    ssh_proxy: str = ""
    ca_file: str | None = None
    # What a forward's streams may hold and how long they wait; None is the default. Checked where they are used.
    window_first: int | None = None
    window_max: int | None = None
    window_budget: int | None = None
    linger: float | None = None
    udp_idle: float | None = None
    udp_peers: int | None = None

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, InitSettingsSource(settings_cls, _read_config_file())

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: dict[str, Any]) -> dict[str, Any]:
        cluster = read_cluster()
        named = values.get("host")
        host = host_url(named) if isinstance(named, str) and named else cluster.host_url if cluster else DEFAULT_HOST
        filled = {**values, "host": host}
        # The token of the cluster on this machine is for that cluster alone: never sent to any other host.
        if cluster is not None and host == cluster.host_url:
            filled.setdefault("token", cluster.token)
            if cluster.ssh_proxy:
                filled.setdefault("ssh_proxy", cluster.ssh_proxy)
        filled.setdefault("ssh_proxy", f"{urlsplit(host).hostname}:{DEFAULT_SSH_PORT}")
        return filled


def _read_config_file() -> dict[str, Any]:
    path = config_dir() / "config.toml"
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} can't be read: {error}.") from error


def load_settings(
    *,
    host: str | None = None,
    token: str | None = None,
    ssh_proxy: str | None = None,
    ca_file: str | None = None,
) -> Settings:
    """The settings in force; arguments are flags, and a None one was not given.

    Raises UsageError when a setting makes no sense, with the name of the setting.
    """
    flags = {"host": host, "token": token, "ssh_proxy": ssh_proxy, "ca_file": ca_file}
    try:
        given: dict[str, Any] = {name: value for name, value in flags.items() if value is not None}
        return Settings(**given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = ".".join(str(part) for part in first["loc"]) or "settings"
        raise UsageError(f"The setting {name!r} makes no sense: {first['msg'].lower()}.") from error

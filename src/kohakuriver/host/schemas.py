"""What the HTTP API takes and gives, as pydantic models. Source: docs/protocol.md; docs/guide for people."""

from __future__ import annotations

import base64
import ipaddress
import json
import re
from datetime import datetime, timezone
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

__all__ = [
    "AdoptRequest",
    "Backend",
    "CreateRequest",
    "Heartbeat",
    "HeartbeatAnswer",
    "NewToken",
    "NewUser",
    "NodeView",
    "Registration",
    "RegistrationAnswer",
    "Role",
    "ShareRequest",
    "SshPass",
    "Status",
    "TaskReport",
    "TaskView",
    "TokenMade",
    "TokenView",
    "UserView",
    "Whoami",
    "is_engine_id",
    "is_task_name",
    "iso_time",
]

LONGEST_TOKEN_SECONDS = 100 * 366 * 86400.0

Backend = Literal["docker", "process", "address"]
Role = Literal["admin", "user"]
Status = Literal["starting", "running", "stopped", "failed", "lost"]


def _matching(pattern: str, otherwise: str) -> AfterValidator:
    """Take only strings that match as a whole; `otherwise` says what is wanted."""
    compiled = re.compile(pattern)

    def check(value: str) -> str:
        if not compiled.fullmatch(value):
            raise ValueError(f"{value!r} won't do: {otherwise}")
        return value

    return AfterValidator(check)


Name = Annotated[
    str,
    _matching(r"[a-z0-9][a-z0-9._-]{0,62}", "it must be 1 to 63 of a-z, 0-9, dot, dash and underscore"),
    _matching(r".*[^0-9].*", "a number means a task's id, so a name needs something else in it too"),
]
NodeName = Annotated[
    str, _matching(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", "it must be 1 to 63 letters, digits, dots, dashes, underscores")
]
UserName = Annotated[
    str,
    _matching(r"[a-z0-9][a-z0-9._-]{0,62}", "it must be 1 to 63 of a-z, 0-9, dot, dash and underscore"),
    _matching(r"(?!anonymous$).*", "it stands for those without a token"),
]
Label = Annotated[
    str,
    _matching(r"[A-Za-z0-9][A-Za-z0-9 ._@-]{0,62}", "it must be 1 to 63 letters, digits, dots, dashes and the like"),
]
ContainerName = Annotated[str, _matching(r"[A-Za-z0-9][A-Za-z0-9._-]*", "give the container's name or id")]
EnvName = Annotated[str, _matching(r"[^=\0]+", "a variable's name has no = in it")]
NoNul = Annotated[str, _matching(r"(?s)[^\0]*", "it has a NUL byte in it")]
Mount = Annotated[str, _matching(r"[^:\0]+:/[^:\0]*(:ro)?", "write SOURCE:/TARGET or SOURCE:/TARGET:ro")]
Url = Annotated[str, _matching(r"https?://[^\s/?#@]+", "it must be like http://name:port")]

Whole = Annotated[int, Field(ge=0, le=2**63 - 1)]
"""What a column of the database holds."""


def _public_key(text: str) -> str:
    """Take only a line as `ssh-keygen` writes it: type, base64, and perhaps a comment; no options before it."""
    line = text.strip()
    kind, _, rest = line.partition(" ")
    try:
        blob = base64.b64decode(rest.split()[0], validate=True)
    except (ValueError, IndexError):
        blob = b""
    if not kind or blob[: 4 + len(kind)] != len(kind).to_bytes(4, "big") + kind.encode() or not line.isprintable():
        raise ValueError(f"{line[:40]!r} is no SSH public key; give the line of a file like ~/.ssh/id_ed25519.pub")
    return line


PublicKey = Annotated[str, AfterValidator(_public_key)]

_task_name: TypeAdapter[str] = TypeAdapter(Name)


def is_task_name(text: str) -> bool:
    """Whether a task may be called this."""
    try:
        _task_name.validate_python(text)
    except ValidationError:
        return False
    return True


def is_engine_id(text: str) -> bool:
    """Whether this is a container's id, or a part of one, as the engine prints it."""
    return re.fullmatch(r"[0-9a-f]{12,64}", text) is not None


class _Body(BaseModel):
    """What comes in. JSON can write half a surrogate pair, which is no character and can be kept nowhere."""

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, data: object) -> object:
        try:
            json.dumps(data, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError:
            raise ValueError("it has half of a surrogate pair in it, which is no character") from None
        return data


class _Request(_Body):
    model_config = ConfigDict(extra="forbid")


class CreateRequest(_Request):
    """A new task. Without a node the least loaded one that fits; without a backend docker if an image is named.

    With `ssh` it gets an SSH server, which lets in whoever has the private key of one of `ssh_keys`.
    """

    name: Name | None = None
    node: NodeName | None = None
    backend: Literal["docker", "process"] | None = None
    image: Annotated[str, Field(min_length=1)] | None = None
    command: list[NoNul] = []
    env: dict[EnvName, NoNul] = {}
    mounts: list[Mount] = []
    ssh: bool = False
    ssh_keys: Annotated[list[PublicKey], Field(max_length=100)] = []

    @model_validator(mode="after")
    def _keys_with_ssh(self) -> CreateRequest:
        if self.ssh != bool(self.ssh_keys):
            raise ValueError("an SSH server (ssh) and the public keys that it lets in (ssh_keys) go together")
        return self


class AdoptRequest(_Request):
    """A task made of what already runs: a container (name or id) or an IP address that the node reaches."""

    container: ContainerName | None = None
    address: str | None = None
    node: NodeName | None = None
    name: Name | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> AdoptRequest:
        if (self.container is None) == (self.address is None):
            raise ValueError("name either a container or an address")
        if self.address is not None:
            try:
                self.address = str(ipaddress.ip_address(self.address))
            except ValueError:
                raise ValueError(f"{self.address!r} is no IP address") from None
        return self


class NewUser(_Request):
    """Somebody who is to have tasks and tokens."""

    name: UserName
    role: Role = "user"


class NewToken(_Request):
    """A token to be made: for the caller, or for another `user`, or for a `node`. `expires_in` is in seconds."""

    name: Label
    user: UserName | None = None
    node: NodeName | None = None
    expires_in: Annotated[float, Field(gt=0, le=LONGEST_TOKEN_SECONDS)] | None = None

    @model_validator(mode="after")
    def _not_both(self) -> NewToken:
        if self.user is not None and self.node is not None:
            raise ValueError("a token is for a user or for a node, not for both")
        return self


class ShareRequest(_Request):
    """Who else may use a task."""

    user: UserName


class SshPass(BaseModel):
    """What stands for a token, once."""

    passphrase: str = Field(alias="pass")


class Registration(_Request):
    """A runner says that it is there. `instance` stays the same over its restarts and tells it from a namesake."""

    name: NodeName
    url: Url
    backends: list[Backend]
    version: str = ""
    instance: str = ""


class RegistrationAnswer(BaseModel):
    """`ticket_key` is base64; `heartbeat_seconds` how often the host wants to hear from the node."""

    heartbeat_seconds: float
    ticket_key: str


class TaskReport(BaseModel):
    """What a runner says about a task; `revision` grows with every change."""

    model_config = ConfigDict(extra="ignore")

    task_id: Whole
    status: Status
    tunnel: bool = False
    message: str | None = None
    revision: Whole = 0
    engine_name: str | None = None
    image: str | None = None
    ssh_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    ssh_host_key: PublicKey | None = None  # users' programs write it into a known_hosts
    traffic: dict[str, Whole] = Field(default={}, exclude=True)  # kept with the node: it is no change of the task


class Heartbeat(_Body):
    """A node's tasks and what passed through it so far; `leaving` when the runner is about to end.

    `others` are ids of tasks that are there too, and that another heartbeat tells of.
    """

    model_config = ConfigDict(extra="ignore")

    tasks: list[TaskReport] = []
    others: list[Whole] = []
    traffic: dict[str, Whole] = {}
    leaving: bool = False


class HeartbeatAnswer(BaseModel):
    """`remove`: ids of tasks that were removed while the node was away, and that it should now end."""

    remove: list[int] = []


class NodeView(BaseModel):
    """A node as users see it."""

    name: str
    url: str
    status: Literal["online", "offline"]
    last_seen: str
    backends: list[str]
    tasks: int
    traffic: dict[str, int]
    version: str


class TaskView(BaseModel):
    """A task as users see it. `ssh_host_key` is what the SSH server that it was given shows, None without one."""

    task_id: int
    name: str
    node: str
    backend: Backend
    status: Status
    tunnel: bool
    image: str | None
    address: str | None
    container: str
    created_at: str
    message: str | None
    owner: str
    ssh_port: int | None
    ssh_host_key: str | None
    shared_with: list[str]
    traffic: dict[str, int]


class UserView(BaseModel):
    """A user as admins see it."""

    name: str
    role: Role
    created_at: str


class TokenView(BaseModel):
    """A token, without the secret. `user` or `node` is whose it is; node "*" is every node."""

    id: str
    name: str
    user: str | None
    node: str | None
    status: Literal["valid", "expired", "revoked"]
    created_at: str
    expires_at: str | None


class TokenMade(TokenView):
    """A token that was just made: the one time that the secret is shown."""

    token: str


class Whoami(BaseModel):
    """Who the caller is, and by which token."""

    user: str
    role: Role
    token: TokenView


def iso_time(seconds: float) -> str:
    """Seconds since the epoch as ISO 8601 in UTC."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")

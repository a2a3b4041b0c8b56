"""What the HTTP API takes and gives, as pydantic models. Source: docs/protocol.md; docs/guide for people."""

from __future__ import annotations

import ipaddress
import json
import re
from dataclasses import replace
from datetime import datetime, timezone
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, RootModel, StringConstraints, model_validator
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import ArgsKwargs

from kohakuriver.errors import UsageError
from kohakuriver.quotas import LONGEST_TIME, Offer, QuotaName, checked
from kohakuriver.task import MOST_FIGURES, Backend, ListeningPort, Name, NewTask, NodeName, TaskReport, Whole, matching
from kohakuriver.text import printable

__all__ = [
    "LONGEST_REQUEST",
    "AdoptRequest",
    "Answers",
    "CreateRequest",
    "DeviceAsked",
    "DeviceCodeShown",
    "DeviceRequest",
    "ExtendRequest",
    "GroupChange",
    "GroupView",
    "Heartbeat",
    "HeartbeatAnswer",
    "Incident",
    "Limit",
    "LimitsView",
    "LinkMade",
    "LinkView",
    "LoginLink",
    "NewGroup",
    "NewLink",
    "NewToken",
    "NewUser",
    "NodeView",
    "OidcSubject",
    "Ports",
    "Registration",
    "RegistrationAnswer",
    "Role",
    "SessionView",
    "ShareRequest",
    "SshPass",
    "TokenKind",
    "TokenMade",
    "TokenView",
    "UserLimits",
    "UserView",
    "VolumeView",
    "Whoami",
    "iso_time",
]

LONGEST_REASON = 500
MOST_REPORTS = 1000
"""Tasks of which a heartbeat may tell; ours tell of 100."""

MOST_PORTS = 1000
MOST_MEMBERS = 1000
MOST_BACKENDS = 20
MOST_GPUS = 1000
MOST_ROOTS = 1000
LONGEST_PATH = 4096
MOST_FIELDS = 64
MOST_VARIABLES = 1000
LONGEST_ORDER, PART_BYTES = 64 << 10, 8
"""Characters of a new task's command, variables and so on, and for how many each part of a list counts besides. All
tasks of a user are told at once, to everybody who may use them, whenever one of them changes."""
LONGEST_REQUEST = 512 << 10
"""Bytes of a user's request: an order whose letters are all escapes (`\\u5b57`), with some public keys."""
LONGEST_PROGRAM = 64
LONGEST_TOKEN_SECONDS = 100 * 366 * 86400.0

Role = Literal["admin", "user"]
TokenKind = Literal["user", "node", "browser", "link", "agent"]

UserName = Annotated[
    str,
    matching(r"[a-z0-9][a-z0-9._-]{0,62}", "it must be 1 to 63 of a-z, 0-9, dot, dash and underscore"),
    matching(r"(?!anonymous$).*", "it stands for those without a token"),
]
GroupName = Annotated[
    str, matching(r"[a-z0-9][a-z0-9._-]{0,61}", "it must be 1 to 62 of a-z, 0-9, dot, dash and underscore")
]
Label = Annotated[
    str,
    matching(r"[A-Za-z0-9][A-Za-z0-9 ._@-]{0,62}", "it must be 1 to 63 letters, digits, dots, dashes and the like"),
]
ContainerName = Annotated[str, matching(r"[A-Za-z0-9][A-Za-z0-9._-]*", "give the container's name or id")]
JobNumber = Annotated[
    str, matching(r"[0-9]{1,10}(_[0-9]{1,10})?", "give the number of a job, or of one of an array as in 12_3")
]
Reason = Annotated[str, Field(max_length=LONGEST_REASON), AfterValidator(printable)]
Url = Annotated[str, Field(max_length=300), matching(r"https?://[^\s/?#@]+", "it must be like http://name:port")]

_NO_CHARACTER = "it has half of a surrogate pair in it, which is no character"


def _text(data: object) -> object:
    """JSON can write half a surrogate pair, which is no character and can be kept nowhere. Raises ValueError for it."""
    try:
        json.dumps(data, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise ValueError(_NO_CHARACTER) from None
    return data


def _of_few_parts(data: object) -> object:
    """Each thing that is wrong with a body costs its own time, and nobody else gets any meanwhile. Raises ValueError
    before any is looked at where there are more parts than anybody needs."""
    if isinstance(data, dict):
        if len(data) > MOST_FIELDS:
            raise ValueError(f"it has more than {MOST_FIELDS} fields")
        for name, value in data.items():
            if isinstance(value, (list, dict)) and len(value) > MOST_MEMBERS:
                raise ValueError(f"{str(name)[:40]!r} has more than {MOST_MEMBERS} parts")
    return data


def _size_of_order(name: str, value: object) -> int:
    """What a field of a new task counts for, in characters; of a part that is no text its own place alone. Raises
    ValueError."""
    if name == "ssh_keys" or not isinstance(value, (str, list, dict)):
        return 0
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict) and len(value) > MOST_VARIABLES:
        raise ValueError(f"a task takes at most {MOST_VARIABLES} variables")
    texts = [*value, *value.values()] if isinstance(value, dict) else value
    return PART_BYTES * len(value) + sum(len(text) for text in texts if isinstance(text, str))


class _Body(BaseModel):
    """What comes in."""

    _is_text = model_validator(mode="before")(_text)


class _Request(_Body):
    model_config = ConfigDict(extra="forbid")

    _has_few_parts = model_validator(mode="before")(_of_few_parts)


@pydantic_dataclass(config=ConfigDict(extra="forbid"), kw_only=True)
class CreateRequest(NewTask):
    """A new task, as the API takes it."""

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, data: Any) -> Any:
        asked = data.kwargs if isinstance(data, ArgsKwargs) else data
        if isinstance(asked, dict):
            if len(asked) > MOST_FIELDS:
                raise ValueError(f"it has more than {MOST_FIELDS} fields")
            if sum(_size_of_order(name, value) for name, value in asked.items()) > LONGEST_ORDER:
                raise ValueError(
                    f"its command, variables and whatever else it is asked for with have more than "
                    f"{LONGEST_ORDER} characters together"
                )
        _text(asked)
        return data


class AdoptRequest(_Request):
    """A task made of what already runs: a container (name or id), an address that a node reaches, or one's own job.

    With `no_client` nothing is put into the container; its node dials from the container's network.
    """

    container: ContainerName | None = None
    address: str | None = None
    job: JobNumber | None = None
    node: NodeName | None = None
    name: Name | None = None
    no_client: bool = False

    @model_validator(mode="after")
    def _one_of_these(self) -> AdoptRequest:
        if sum(each is not None for each in (self.container, self.address, self.job)) != 1:
            raise ValueError("name either a container, an address or a job")
        if self.address is not None:
            try:
                self.address = str(ipaddress.ip_address(self.address))
            except ValueError:
                raise ValueError(f"{self.address!r} is no IP address") from None
        return self


def _sensible(limits: dict[QuotaName, float | None]) -> dict[QuotaName, float | None]:
    try:
        return {name: None if value is None else checked(name, value) for name, value in limits.items()}
    except UsageError as error:
        raise ValueError(error.message.rstrip(".")) from None


class UserLimits(RootModel[Annotated[dict[QuotaName, float | None], AfterValidator(_sensible)]]):
    """Limits of one user: numbers, bytes or CPUs, 0 for no limit, -1 for nothing at all; null is the host's default."""


class NewUser(_Request):
    """Somebody who is to have tasks and tokens, perhaps with other limits than the host's defaults."""

    name: UserName
    role: Role = "user"
    limits: UserLimits = UserLimits({})


class NewToken(_Request):
    """A token to be made: for the caller, or for another `user`, or for a `node`. `expires_in` is in seconds.

    With `agent` it is good for one task alone, which an agent makes with it. Without a name one is made up of the day.
    """

    name: Label | None = None
    user: UserName | None = None
    node: NodeName | None = None
    agent: bool = False
    expires_in: Annotated[float, Field(gt=0, le=LONGEST_TOKEN_SECONDS)] | None = None

    @model_validator(mode="after")
    def _not_both(self) -> NewToken:
        if self.agent and self.node is not None:
            raise ValueError("a token is for an agent or for a node, not for both")
        if self.user is not None and self.node is not None:
            raise ValueError("a token is for a user or for a node, not for both")
        return self


class NewLink(_Request):
    """A link to be made that opens one port of a task. `expires_in` is in seconds; without it, it is good for ever."""

    port: Annotated[int, Field(ge=1, le=65535)]
    expires_in: Annotated[float, Field(gt=0, le=LONGEST_TOKEN_SECONDS)] | None = None


class ShareRequest(_Request):
    """Who else may use a task: a user, or all who are in a group."""

    user: UserName | None = None
    group: GroupName | None = None

    @model_validator(mode="after")
    def _one_of_two(self) -> ShareRequest:
        if (self.user is None) == (self.group is None):
            raise ValueError("name either a user or a group")
        return self

    @property
    def whom(self) -> str:
        """The user's name, or the group's as @NAME."""
        return self.user or f"@{self.group}"


class NewGroup(_Request):
    """A group, and who is in it."""

    name: GroupName
    members: Annotated[list[UserName], Field(max_length=MOST_MEMBERS)] = []


class GroupChange(_Request):
    """Who is put into a group, and who is taken out."""

    add: Annotated[list[UserName], Field(max_length=MOST_MEMBERS)] = []
    remove: Annotated[list[UserName], Field(max_length=MOST_MEMBERS)] = []


class GroupView(BaseModel):
    """Users whom a task can be shared with at once."""

    name: str
    members: list[str]
    created_at: str


class VolumeView(BaseModel):
    """What a user keeps on a node; `tasks` are the names of those that have it."""

    name: str
    owner: str
    node: str
    created_at: str
    tasks: list[str]


class ExtendRequest(_Request):
    """By how many seconds the time to live of a task is to be over later."""

    seconds: Annotated[int, Field(ge=1, le=LONGEST_TIME)]


class WebRequest(_Request):
    """How browsers' requests go on to the services of a task; what is None stays as it is."""

    preserve_host: bool | None = None
    keep_prefix: bool | None = None


class Agent(BaseModel):
    """What a tunnel client in the machine of an address task is started with; `token` is its secret."""

    container: str
    runner_url: str
    token: str


class Answers(BaseModel):
    """Whether the machine of an address task answers its node; `reason` says why it seems not to."""

    answers: bool
    reason: str | None = None


def _with_printable_name(port: ListeningPort) -> ListeningPort:
    return replace(port, program=port.program and printable(port.program, keep="")[:LONGEST_PROGRAM])


class Ports(BaseModel):
    """The ports that listen in a task; `more` says that there are some that are not told."""

    ports: Annotated[list[Annotated[ListeningPort, AfterValidator(_with_printable_name)]], Field(max_length=MOST_PORTS)]
    more: bool = False


class SshPass(BaseModel):
    """What stands for a token, once."""

    passphrase: str = Field(alias="pass")


_MOST_OFFERED = {
    "memory": 1 << 50,
    "cpus": 1 << 20,
    "task_memory": 1 << 50,
    "task_cpus": 1 << 20,
    "task_pids": 1 << 22,
    "task_shm": 1 << 50,
    "task_log": 1 << 50,
}


def _offered(offer: Offer) -> Offer:
    """What a node has and gives is what tasks are counted with: with less than nothing a user could have any number."""
    for name, most in _MOST_OFFERED.items():
        if not 0 <= getattr(offer, name) <= most:
            raise ValueError(f"{name} must be a number from 0 to {most}")
    if len(offer.gpus) > MOST_GPUS or not all(re.fullmatch(r"[0-9]{1,3}", number) for number in offer.gpus):
        raise ValueError("gpus must be numbers of up to 3 digits")
    if len(offer.mount_roots) > MOST_ROOTS or any(len(root) > LONGEST_PATH for root in offer.mount_roots):
        raise ValueError(f"a node has at most {MOST_ROOTS} mount roots, of {LONGEST_PATH} characters")
    return replace(offer, no_direct=printable(offer.no_direct[:LONGEST_REASON], keep=""))


class Registration(_Request):
    """A runner says that it is there. `instance` stays the same over its restarts and tells it from a namesake.

    `unavailable`: which backends it should offer and can't now, and why. `offer`: what the node has, and what a task
    gets there that asks for nothing.
    """

    name: NodeName
    url: Url
    backends: Annotated[list[Backend], Field(max_length=MOST_BACKENDS)]
    unavailable: Annotated[dict[Backend, Reason], Field(max_length=MOST_BACKENDS)] = {}
    version: Annotated[str, Field(max_length=64), AfterValidator(printable)] = ""
    instance: Annotated[str, Field(max_length=64)] = ""
    offer: Annotated[Offer, AfterValidator(_offered)] = Offer()


class RegistrationAnswer(BaseModel):
    """`ticket_key` is base64; `heartbeat_seconds` how often the host wants to hear from the node."""

    heartbeat_seconds: float
    ticket_key: str


class Incident(BaseModel):
    """A tunnel client that a node refused though it had a task's token: why, from which address, how often."""

    task_id: Whole
    reason: Annotated[str, StringConstraints(max_length=300)]
    source: Annotated[str, StringConstraints(max_length=64)]
    count: Whole


class Heartbeat(_Body):
    """A node's tasks and what passed through it so far; `leaving` when the runner is about to end.

    `others` are ids of tasks that are there too, and that another heartbeat tells of. `incidents` are told once.
    """

    model_config = ConfigDict(extra="ignore")

    tasks: Annotated[list[TaskReport], Field(max_length=MOST_REPORTS)] = []
    others: list[Whole] = []
    traffic: Annotated[dict[str, Whole], Field(max_length=MOST_FIGURES)] = {}
    incidents: Annotated[list[Incident], Field(max_length=100)] = []
    leaving: bool = False


class HeartbeatAnswer(BaseModel):
    """`remove`: ids of tasks that were removed while the node was away, and that it should now end.

    `unreachable` says why the host can't dial the node back, where it can't.
    """

    remove: list[int] = []
    unreachable: str | None = None


class NodeView(BaseModel):
    """A node as users see it.

    "unreachable": its heartbeats come, and the host can't dial it; `reason` says why. A `cordoned` one gets no new
    tasks. `user_processes`: users who are no admins may run processes there, as the runner's own user. `gpus` are the
    numbers of its GPUs, `gpus_free` of those that no task has.
    """

    name: str
    url: str
    status: Literal["online", "unreachable", "offline"]
    reason: str | None
    cordoned: bool
    last_seen: str
    backends: list[str]
    unavailable: dict[str, str]
    tasks: int
    traffic: dict[str, int]
    version: str
    user_processes: bool
    gpus: list[str]
    gpus_free: list[str]


class SessionView(BaseModel):
    """A session that is open on this host now: a user's forward, terminal, SSH connection or look at a task's output.

    `proto` is "tcp", "udp", "terminal", "ssh" or "logs"; a forward's other ports are not told. `via` is "browser" where
    one opened it. `source` is the address that it comes from, told to admins and to the user whose it is. Bytes are
    what has passed so far, and in the last second or so.
    """

    id: str
    user: str
    task_id: int
    task: str
    node: str
    proto: str
    port: int | None
    via: str | None
    source: str | None
    began_at: str
    bytes_to_container: int
    bytes_to_user: int
    to_container_per_second: int
    to_user_per_second: int


class Limit(BaseModel):
    """How much a user may have of something, null for any amount, and how much of it that is now, null for rates.

    `own`: it was set for this user.
    """

    limit: float | None
    used: float | None
    own: bool


class UserView(BaseModel):
    """A user as admins see it; `limits` are those that were set for this user.

    `oidc` is the subject as which they log in at the OpenID provider, null for a user who doesn't.
    """

    name: str
    role: Role
    created_at: str
    limits: dict[str, float]
    oidc: str | None = None


class OidcSubject(_Request):
    """As whom the OpenID provider knows somebody: the `sub` in its ID tokens."""

    subject: Annotated[str, matching(r"[\x20-\x7e]{1,255}", "it must be 1 to 255 printable characters of ASCII")]


class TokenView(BaseModel):
    """A token, without the secret. `user` or `node` is whose it is; node "*" is every node.

    Of the kind "browser" it is a browser that is logged in, of the kind "link" a link to one port of one task,
    of the kind "agent" one that makes a task, once.
    """

    id: str
    kind: TokenKind
    name: str
    user: str | None
    node: str | None
    status: Literal["valid", "expired", "revoked"]
    created_at: str
    expires_at: str | None


class TokenMade(TokenView):
    """A token that was just made: the one time that the secret is shown."""

    token: str


class DeviceRequest(_Request):
    """A command line that wants a token; `machine` is what it is to be called, as the machine that it runs on."""

    machine: Label


class DeviceAsked(BaseModel):
    """What such a command line has (RFC 8628, section 3.2): `device_code` for itself, `user_code` to show its user.

    The user types that into the page `verification_path` of this host, within `expires_in` seconds.
    """

    device_code: str
    user_code: str
    verification_path: str
    expires_in: float


class DeviceCodeShown(_Request):
    """The command line asks for its token."""

    device_code: Annotated[str, Field(max_length=200)]


class LinkView(BaseModel):
    """A link to one `port` of a task, without what opens it. `user` is who made it."""

    id: str
    user: str
    port: int
    created_at: str
    expires_at: str | None


class LinkMade(LinkView):
    """A link that was just made: the one time that its address is shown."""

    url: str


class LoginLink(BaseModel):
    """What lets one browser in as the caller, once: it goes to `path` of this host, the code included.

    Where that is on the browser's own machine, and without TLS, it goes there by `name`, which no page can guess.
    """

    path: str
    name: str
    expires_at: str


class LimitsView(BaseModel):
    """What a user may have, and has."""

    name: str
    role: Role
    limits: dict[str, Limit]


class Whoami(BaseModel):
    """Who the caller is, by which token, and how much they may have.

    `apps`: ports of tasks have addresses at this host, for a browser that is at it by the same name. `apps_prefix`: all
    of these are under one origin, each with a prefix, so that `keep_prefix` of a task counts.
    """

    user: str
    role: Role
    token: TokenView
    limits: dict[str, Limit]
    apps: bool = False
    apps_prefix: bool = False


def iso_time(seconds: float) -> str:
    """Seconds since the epoch as ISO 8601 in UTC."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")

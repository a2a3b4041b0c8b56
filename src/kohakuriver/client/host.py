"""The host's HTTP API, as a typed asynchronous client.

Every failure is one of the exceptions in `kohakuriver.errors`: an error answer by its status and body, a host that
can't be reached as HostUnreachableError.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx

from kohakuriver import tracing
from kohakuriver.client.host_http import (
    CONNECT_TIMEOUT,
    LONGEST_LINE,
    HostHttp,
    time_for,
    too_long,
    unheard,
    whole,
)
from kohakuriver.client.hosts import nobody_answers
from kohakuriver.config import NAME_IN_BROWSERS, Settings, browser_url, path_segment
from kohakuriver.errors import (
    HostUnreachableError,
    KohakuRiverError,
    UnavailableError,
    from_answer,
    from_status,
    no_text,
)
from kohakuriver.resolve import resolving
from kohakuriver.task import (
    Declared,
    ListeningPort,
    LogLine,
    NewTask,
    TaskTraffic,
    asked_for,
    is_public_key,
    is_told_node_name,
    is_told_task_name,
    taken_from,
)
from kohakuriver.task import TaskView as Task
from kohakuriver.text import json_of

__all__ = [
    "AuditPage",
    "HostClient",
    "Limit",
    "Limits",
    "ListeningPort",
    "LogLine",
    "LoginLink",
    "NewTask",
    "Node",
    "Ports",
    "Task",
    "TaskTraffic",
    "Token",
    "Traffic",
    "User",
    "Volume",
    "Whoami",
]

SILENCE = 45.0
# The longest that the host is asked to hold one `wait` request.
LONGEST_WAIT = 30.0

PORTS_EVERY = 0.5
"""Seconds between two looks whether something listens; a tunnel client looks once a second."""

T = TypeVar("T")
Record = TypeVar("Record", bound=Declared)


@dataclass(frozen=True)
class Traffic:
    """What went through a node since its runner started, in bytes, and the sessions and streams open now.

    `straight` of the sessions go past the host. `udp_dropped` counts datagrams, `stalls` how often a stream had to wait
    for a window.
    """

    bytes_to_container: int = 0
    bytes_to_user: int = 0
    udp_dropped: int = 0
    stalls: int = 0
    sessions: int = 0
    straight: int = 0
    streams: int = 0


@dataclass(frozen=True)
class Node:
    """A machine with a runner. `last_seen` is ISO 8601, or None when it never was; `tasks` how many it has.

    `status` is "online", "offline", or "unreachable" where the host can't dial it, and `reason` then says why. A
    `cordoned` one gets no new tasks. `user_processes`: users who are no admins may run processes there, as the runner's
    own user. `unavailable` are backends that it should offer and can't now, with the reasons. `gpus` are the numbers of
    its GPUs, `gpus_free` of those that no task has.
    """

    name: str
    url: str
    status: str
    last_seen: str | None = None
    backends: Sequence[str] = ()
    unavailable: Mapping[str, str] = field(default_factory=dict)
    tasks: int = 0
    version: str = ""
    traffic: Traffic = field(default_factory=Traffic)
    reason: str | None = None
    cordoned: bool = False
    user_processes: bool = False
    gpus: Sequence[str] = ()
    gpus_free: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class User:
    """Somebody who may use the host. `role` is "admin" or "user", `created_at` ISO 8601.

    `limits` are those that were set for this user, `oidc` the subject as which they log in at an OpenID provider.
    """

    name: str
    role: str
    created_at: str = ""
    limits: Mapping[str, float] = field(default_factory=dict)
    oidc: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class DeviceAsked:
    """A login that waits for its user, who types `user_code` at `url` within `expires_in` seconds."""

    device_code: str = field(repr=False)
    user_code: str
    url: str
    expires_in: float


@dataclass(frozen=True)
class Group:
    """Users whom a task can be shared with at once. `created_at` is ISO 8601."""

    name: str
    members: Sequence[str] = ()
    created_at: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Volume:
    """What a user keeps on a node; `tasks` are the names of those that have it. `created_at` is ISO 8601."""

    name: str
    owner: str
    node: str
    created_at: str = ""
    tasks: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class LoginLink:
    """A link that logs one browser in, once, until `expires_at` (ISO 8601)."""

    url: str = field(repr=False)
    expires_at: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Link:
    """A link to one `port` of a task. `user` is who made it; the moments are ISO 8601.

    `url` is its address, in the answer to `make_link` alone: whoever has that opens the port.
    """

    id: str
    user: str
    port: int
    created_at: str = ""
    expires_at: str | None = None
    url: str | None = field(default=None, repr=False)

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "url" or value is not None}


@dataclass(frozen=True)
class OpenSession:
    """Somebody who is connected to a task by the host that is asked.

    `proto` is "tcp", "udp", "terminal", "ssh" or "logs", `port` the first one of a forward. `via` is "browser" where
    one opened it, `source` the address that it comes from, where the caller may know. `began_at` is ISO 8601.
    """

    id: str
    user: str
    task_id: int
    proto: str
    port: int | None = None
    via: str | None = None
    source: str | None = None
    began_at: str = ""


@dataclass(frozen=True)
class Token:
    """A token of a `user` or a `node` ("*": any). `name` is what its owner calls it; the moments are ISO 8601.

    `kind` is "user" or "node", or "browser" for one that is logged in. `token` is the secret itself, in the answer to
    `make_token` alone. `status` is "valid" or "expired", or "revoked" in
    the answer to `revoke_token`.
    """

    id: str
    name: str
    kind: str = "user"
    user: str | None = None
    node: str | None = None
    status: str = "valid"
    created_at: str = ""
    expires_at: str | None = None
    token: str | None = field(default=None, repr=False)

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "token" or value is not None}


@dataclass(frozen=True)
class Limit:
    """How much a user may have of something: a number, bytes or CPUs, None for any amount; see quotas.py.

    `used` is how much that is now, None for rates; `own` says that it was set for this user.
    """

    limit: float | None = None
    used: float | None = None
    own: bool = False


Limits = Mapping[str, Limit]


@dataclass(frozen=True)
class Whoami:
    """Who the host takes the caller for, by which token, and how much they may have."""

    user: str
    role: str
    token: Token
    limits: Limits = field(default_factory=dict)


def _record(cls: type[Record], answer: Any) -> Record:
    """`answer` as a `cls`; fields that a newer host adds are left out, ones that it lacks are an error."""
    if not isinstance(answer, dict):
        raise KohakuRiverError("This version of kohakuriver does not understand the host's answer.")
    missing = [
        f.name for f in fields(cls) if f.name not in answer and f.default is MISSING and f.default_factory is MISSING
    ]
    if missing:
        raise KohakuRiverError(f"The host's answer lacks {missing[0]!r}: its version and this one don't fit.")
    return taken_from(answer, cls)


def _limits(answer: Any) -> Limits:
    found = answer.get("limits") if isinstance(answer, dict) else None
    return {name: _record(Limit, limit) for name, limit in (found or {}).items()}


def _task(answer: Any) -> Task:
    """A task as the host tells it.

    Ids, names and keys get into the configuration of `ssh`, where a line more would be a command of the host's, and
    into shells that complete words. Raises KohakuRiverError for what no host of ours calls a task.
    """
    if isinstance(answer, dict) and "traffic" in answer:
        answer = {**answer, "traffic": _record(TaskTraffic, answer["traffic"] or {})}
    task = _record(Task, answer)
    keys = [str(key) for key in (task.ssh_host_key, task.ssh_host_key_ecdsa) if key is not None]
    if type(task.task_id) is not int or not is_told_task_name(str(task.name)) or not all(map(is_public_key, keys)):
        raise _not_ours("task")
    return task


def _node(answer: Any) -> Node:
    if isinstance(answer, dict) and "traffic" in answer:
        answer = {**answer, "traffic": _record(Traffic, answer["traffic"] or {})}
    node = _record(Node, answer)
    if not is_told_node_name(str(node.name)):
        raise _not_ours("node")
    return node


def _not_ours(what: str) -> KohakuRiverError:
    return KohakuRiverError(f"The host tells of a {what} whose name, id or key can be none; don't trust that host.")


@dataclass(frozen=True)
class Answers:
    """Whether the machine of an address task answers its node; `reason` says why it seems not to."""

    answers: bool
    reason: str | None = None


@dataclass(frozen=True)
class Ports:
    """The ports that listen in a task; `more` says that there are some that are not told."""

    ports: Sequence[ListeningPort]
    more: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"ports": [asdict(port) for port in self.ports], "more": self.more}


@dataclass(frozen=True)
class Agent:
    """What a tunnel client in a machine is started with; `token` is its secret."""

    container: str
    runner_url: str
    token: str = field(repr=False)


@dataclass(frozen=True)
class AuditPage:
    """Lines of the host's audit log. `after` asks for those that follow; `more` says that there may be some already."""

    events: list[dict[str, Any]]
    after: str
    more: bool


class HostClient:
    """`async with HostClient(settings) as host: await host.tasks()`

    Large because the host's API is: each method is one request of it.
    """

    def __init__(self, settings: Settings, *, transport: httpx.AsyncBaseTransport | None = None) -> None:
        from kohakuriver import __version__  # the package names what is beside this

        headers = {"User-Agent": f"kohakuriver/{__version__}", **tracing.headers()}
        if settings.token:
            headers["Authorization"] = f"Bearer {settings.token}"
        self._hosts = deque(HostHttp(url, settings.ca_file, headers, transport) for url in settings.hosts)

    @property
    def _url(self) -> str:
        """Of the host that was asked last, and is asked next."""
        return self._hosts[0].url

    async def __aenter__(self) -> HostClient:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for host in self._hosts:
            await host.http.aclose()

    async def health(self) -> dict[str, Any]:
        """`{"status": "ok", "version": …}`; asks for no credential."""
        answer = await self._call("GET", "/health")
        if not isinstance(answer, dict) or "status" not in answer:
            raise HostUnreachableError(f"What answers at {self._url} is no KohakuRiver host; check the host's URL.")
        return answer

    async def raw(self, path: str, headers: Mapping[str, str]) -> tuple[Mapping[str, str], bytes]:
        """The headers, by names in lower case, and the body of what answers to a GET with these headers besides."""
        host = self._hosts[0]
        with host.in_words(), resolving():
            answer = await host.whole("GET", path, headers=dict(headers))
        if not answer.is_success:
            raise host.failure(answer)
        return answer.headers, answer.content

    async def whoami(self) -> Whoami:
        """Who the token of the settings makes the caller. Raises UnauthenticatedError."""
        answer = await self._call("GET", "/api/auth")
        if isinstance(answer, dict) and "token" in answer:
            answer = {**answer, "token": _record(Token, answer["token"]), "limits": _limits(answer)}
        return _record(Whoami, answer)

    async def login_link(self, there: str = "") -> LoginLink:
        """A link that logs one browser in as the caller, once, within a minute; from there it goes to `there`.

        `there` is a path of the host that leads to a port of a task, /open/TASK/PORT.
        """
        made = await self._call("POST", "/api/auth/link")
        path, name = (made.get("path"), made.get("name")) if isinstance(made, dict) else (None, None)
        if not (isinstance(path, str) and path.startswith("/login?")) or not (
            isinstance(name, str) and NAME_IN_BROWSERS.fullmatch(name)
        ):
            raise KohakuRiverError("This version of kohakuriver does not understand the host's answer.")
        path = there + path.removeprefix("/login") if there else path
        return LoginLink(browser_url(self._url, name) + path, str(made.get("expires_at", "")))

    async def ask_for_login(self, machine: str) -> DeviceAsked:
        """Begin a login that somebody confirms in a browser; asks for no credential."""
        answer = await self._call("POST", "/api/auth/device", body={"machine": machine})
        shown = [answer.get(name) for name in ("verification_path", "user_code")] if isinstance(answer, dict) else []
        # Both are shown on a terminal, and one is opened.
        if not re.fullmatch(r"/[a-z]+ [A-Z]{4}-[A-Z]{4}", " ".join(map(str, shown))):
            raise KohakuRiverError("This version of kohakuriver does not understand the host's answer.")
        return _record(DeviceAsked, {**answer, "url": f"{self._url}{shown[0]}"})

    async def take_login(self, asked: DeviceAsked) -> Token:
        """The token of a login that was confirmed, with its secret.

        Raises UsageError "authorization_pending" after some seconds, and "slow_down"; UnauthenticatedError where the
        time is up, NotAllowedError where it was refused.
        """
        body = {"device_code": asked.device_code}
        return _record(Token, await self._call("POST", "/api/auth/device/token", body=body))

    async def link_user(self, name: str, subject: str) -> User:
        """Have whom the host's OpenID provider knows as `subject` log in as a user."""
        path = f"/api/users/{path_segment(name)}/oidc"
        return _record(User, await self._call("PUT", path, body={"subject": subject}))

    async def unlink_user(self, name: str) -> User:
        """Take that back."""
        return _record(User, await self._call("DELETE", f"/api/users/{path_segment(name)}/oidc"))

    async def users(self) -> list[User]:
        return [_record(User, item) for item in _list(await self._call("GET", "/api/users"))]

    async def add_user(self, name: str, *, role: str, limits: Mapping[str, float | None] | None = None) -> User:
        body = {"name": name, "role": role, "limits": dict(limits or {})}
        return _record(User, await self._call("POST", "/api/users", body=body))

    async def limits(self, user: str) -> Limits:
        """How much a user may have, and has."""
        return _limits(await self._call("GET", f"/api/users/{path_segment(user)}/limits"))

    async def set_limits(self, user: str, limits: Mapping[str, float | None]) -> Limits:
        """Let a user have more or less of something; None puts a limit back to the host's default."""
        return _limits(await self._call("PATCH", f"/api/users/{path_segment(user)}/limits", body=dict(limits)))

    async def remove_user(self, name: str) -> User:
        """Remove a user; their tokens and sessions end, and their tasks become the caller's."""
        return _record(User, await self._call("DELETE", f"/api/users/{path_segment(name)}"))

    async def groups(self) -> list[Group]:
        """The groups that the caller is in; for admins all."""
        return [_record(Group, item) for item in _list(await self._call("GET", "/api/groups"))]

    async def add_group(self, name: str, members: Sequence[str]) -> Group:
        return _record(Group, await self._call("POST", "/api/groups", body={"name": name, "members": list(members)}))

    async def change_group(self, name: str, *, add: Sequence[str], remove: Sequence[str]) -> Group:
        """Put users into a group and take others out; what these have open by it ends."""
        body = {"add": list(add), "remove": list(remove)}
        return _record(Group, await self._call("PATCH", f"/api/groups/{path_segment(name)}", body=body))

    async def remove_group(self, name: str) -> Group:
        """Forget a group; what was shared with it is not any more."""
        return _record(Group, await self._call("DELETE", f"/api/groups/{path_segment(name)}"))

    async def volumes(self) -> list[Volume]:
        """What the caller keeps on nodes; for admins what everybody does."""
        return [_record(Volume, item) for item in _list(await self._call("GET", "/api/volumes"))]

    async def remove_volume(self, name: str, *, owner: str | None = None) -> Volume:
        """Remove a volume that no task has, with all that is in it."""
        params = {} if owner is None else {"owner": owner}
        return _record(Volume, await self._call("DELETE", f"/api/volumes/{path_segment(name)}", params=params))

    async def tokens(self, *, user: str | None = None, every: bool = False) -> list[Token]:
        """The caller's tokens, those of another user, or every one."""
        params = {**({"user": user} if user is not None else {}), **({"all": True} if every else {})}
        return [_record(Token, item) for item in _list(await self._call("GET", "/api/tokens", params=params))]

    async def make_token(
        self,
        name: str | None = None,
        *,
        user: str | None = None,
        node: str | None = None,
        agent: bool = False,
        expires_in: float | None = None,
    ) -> Token:
        """Make a token, good for `expires_in` seconds. The answer has its secret, and a name where `name` is None.

        With `agent` it makes one task, and does nothing else.
        """
        wanted = {"name": name, "user": user, "node": node, "agent": agent or None, "expires_in": expires_in}
        body = {key: value for key, value in wanted.items() if value is not None}
        return _record(Token, await self._call("POST", "/api/tokens", body=body))

    async def revoke_token(self, token: str) -> Token:
        """Revoke the token with that id or name; the sessions that it opened end."""
        return _record(Token, await self._call("DELETE", f"/api/tokens/{path_segment(token)}"))

    async def share(self, task: str, user: str) -> Task:
        """Let a user use a task, or a group, @NAME."""
        whom = {"group": user[1:]} if user.startswith("@") else {"user": user}
        return _task(await self._call("POST", _path(task, "shares"), body=whom))

    async def unshare(self, task: str, user: str) -> Task:
        """Take that back; the sessions of that user, or of that group's, to the task end."""
        return _task(await self._call("DELETE", f"{_path(task, 'shares')}/{path_segment(user)}"))

    async def make_link(self, task: str, port: int, *, expires_in: float | None = None) -> Link:
        """Make a link that opens one port of a task, for whoever has it. The answer has its address."""
        body = {"port": port} | ({} if expires_in is None else {"expires_in": expires_in})
        return _record(Link, await self._call("POST", _path(task, "links"), body=body))

    async def links(self, task: str) -> list[Link]:
        """The links of a task that are good, without their addresses."""
        return [_record(Link, each) for each in await self._call("GET", _path(task, "links"))]

    async def sessions(self) -> list[OpenSession]:
        """The sessions that are open on the host that answers, as far as the caller may know of them; newest first."""
        return [_record(OpenSession, each) for each in await self._call("GET", "/api/sessions")]

    async def end_link(self, task: str, link: str) -> Link:
        """Take the link with that id back; what is open by it ends."""
        return _record(Link, await self._call("DELETE", f"{_path(task, 'links')}/{path_segment(link)}"))

    async def audit(
        self, *, since: str | None = None, user: str | None = None, task: str | None = None, after: str | None = None
    ) -> AuditPage:
        """Some of what was done on the host since a moment in ISO 8601, the oldest first; for admins."""
        wanted = {"since": since, "user": user, "task": task, "after": after}
        params = {name: value for name, value in wanted.items() if value is not None}
        return _record(AuditPage, await self._call("GET", "/api/audit", params=params))

    async def nodes(self) -> list[Node]:
        return [_node(item) for item in _list(await self._call("GET", "/api/nodes"))]

    async def cordon(self, node: str) -> Node:
        """Give a node no new tasks."""
        return _node(await self._call("POST", f"/api/nodes/{path_segment(node)}/cordon"))

    async def uncordon(self, node: str) -> Node:
        """Take that back."""
        return _node(await self._call("POST", f"/api/nodes/{path_segment(node)}/uncordon"))

    async def remove_node(self, node: str, *, force: bool = False) -> Node:
        """Forget a node; with `force` its tasks too. The answer is the node as it was."""
        return _node(await self._call("DELETE", f"/api/nodes/{path_segment(node)}", params={"force": force}))

    async def tasks(self) -> list[Task]:
        return [_task(item) for item in _list(await self._call("GET", "/api/tasks"))]

    async def task(self, task: str) -> Task:
        """The task with this numeric id or unique name. Raises NotFoundError when there is none."""
        return _task(await self._call("GET", _path(task)))

    async def create(self, new: NewTask) -> Task:
        """Start a task; its status may still be `starting` in the answer."""
        return _task(await self._call("POST", "/api/tasks", body=asked_for(new)))

    async def adopt(
        self,
        *,
        container: str | None = None,
        address: str | None = None,
        job: str | None = None,
        node: str | None = None,
        name: str | None = None,
        no_client: bool = False,
    ) -> Task:
        """Make a task of a container that runs, of an address that the node's runner reaches, or of a job of one's own.

        With `no_client` nothing is put into the container; its node dials from the container's network.
        """
        wanted: dict[str, object] = {"container": container, "address": address, "job": job, "node": node, "name": name}
        wanted["no_client"] = no_client or None
        body = {key: value for key, value in wanted.items() if value is not None}
        return _task(await self._call("POST", "/api/tasks/adopt", body=body))

    async def answers(self, task: str) -> Answers:
        """Whether the machine of an address task answers; its node looks now."""
        return _record(Answers, await self._call("GET", _path(task, "answers")))

    async def ports(self, task: str) -> Ports:
        """The ports that listen in a task now."""
        told = _record(Ports, await self._call("GET", _path(task, "ports")))
        return Ports([_record(ListeningPort, port) for port in _list(told.ports)], told.more)

    async def agent(self, task: str) -> Agent:
        """What a tunnel client in the machine of an address task is started with."""
        return _record(Agent, await self._call("GET", _path(task, "agent")))

    async def logs(
        self, task: str, *, follow: bool = False, tail: int | None = None, since: str | None = None
    ) -> AsyncIterator[LogLine]:
        """What a task printed, the oldest first; its last `tail` lines, since a moment in ISO 8601.

        With `follow` also what it prints from now on, until it ends.
        """
        wanted = {"follow": "true" if follow else None, "tail": tail, "since": since}
        params = {name: value for name, value in wanted.items() if value is not None}
        timeout = httpx.Timeout(SILENCE, connect=CONNECT_TIMEOUT)

        async def begin(host: HostHttp) -> httpx.Response:
            with host.in_words(), resolving():
                request = host.http.build_request("GET", _path(task, "logs"), params=params, timeout=timeout)
                request.extensions["trace"] = host.trace
            with host.in_words():
                return await host.http.send(request, stream=True)

        answer = await self._of_first(begin, again=True)
        try:
            if not answer.is_success:
                raise self._hosts[0].failure(await whole(answer))
            with self._hosts[0].in_words():
                async for line in _lines(answer):
                    yield _log_line(line)
        finally:
            await answer.aclose()

    async def stop(self, task: str, *, container: bool = False) -> Task:
        """Stop a task; an adopted container only with `container`."""
        return _task(await self._call("POST", _path(task, "stop"), params=_asked(container)))

    async def restart(self, task: str, *, container: bool = False) -> Task:
        """Start a task again; an adopted container only with `container`."""
        return _task(await self._call("POST", _path(task, "restart"), params=_asked(container)))

    async def extend(self, task: str, seconds: int) -> Task:
        """Have the time to live of a task be over so many seconds later."""
        return _task(await self._call("POST", _path(task, "extend"), body={"seconds": seconds}))

    async def serve_web(self, task: str, *, preserve_host: bool | None = None, keep_prefix: bool | None = None) -> Task:
        """Have its services be told the addresses, or the paths, that browsers have, or not; None changes nothing."""
        asked = {"preserve_host": preserve_host, "keep_prefix": keep_prefix}
        body = {name: value for name, value in asked.items() if value is not None}
        return _task(await self._call("POST", _path(task, "web"), body=body))

    async def remove(self, task: str) -> Task:
        """End the task and forget it; the answer is the task as it was."""
        return _task(await self._call("DELETE", _path(task)))

    async def wait(self, task: str, *, timeout: float) -> Task:
        """The task, once its tunnel is connected.

        Raises UnavailableError when it fails, or when that takes longer than `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        while True:
            left = min(max(deadline - time.monotonic(), 0.0), LONGEST_WAIT)
            try:
                return _task(await self._call("GET", _path(task, "wait"), params={"timeout": left}, hold=left))
            except (HostUnreachableError, UnavailableError) as error:
                if error.status != 504:
                    raise
                if time.monotonic() >= deadline:
                    raise UnavailableError(error.message, code=error.code, status=504) from error

    async def wait_for_port(self, task: str, port: int, *, timeout: float) -> None:
        """Until something in the task listens on this TCP port.

        Raises UnavailableError "no_service" after `timeout` seconds, and what `ports` raises: when the task has ended.
        """
        deadline = time.monotonic() + timeout
        while not await self._listens(task, port, deadline):
            if time.monotonic() >= deadline:
                said = f"`kohakuriver vps logs {task}` shows what it printed"
                raise UnavailableError(f"Nothing listens on port {port} of {task}; {said}.", code="no_service")
            await asyncio.sleep(PORTS_EVERY)

    async def _listens(self, task: str, port: int, deadline: float) -> bool:
        try:
            told = await self.ports(task)
        except UnavailableError as error:
            if error.code != "tunnel_not_connected":
                raise
            await self.wait(task, timeout=max(deadline - time.monotonic(), 0.0))  # tells it if the task has ended
            return False
        return any((each.port, each.proto) == (port, "tcp") for each in told.ports)

    async def _call(
        self,
        method: str,
        path: str,
        *,
        body: dict[str, Any] | None = None,
        params: dict[str, Any] | None = None,
        hold: float = 0.0,
    ) -> Any:
        """The JSON of one answer. `hold` is how long, in seconds, the host was asked to take."""
        _check_text([body, params])
        timeout = time_for(hold)

        async def ask(host: HostHttp) -> httpx.Response:
            with host.in_words(), resolving():
                (urlsplit(host.url).hostname or "").encode("idna")  # the HTTP library words it in another way
                answer = await host.whole(method, path, json=body, params=params, timeout=timeout)
            if not answer.is_success:
                raise host.failure(answer)
            return answer

        answer = await self._of_first(ask, again=method == "GET")
        try:
            return json_of(answer.content)
        except ValueError as error:
            raise from_answer(self._url, answer.status_code, answer.content) from error

    async def _of_first(self, ask: Callable[[HostHttp], Awaitable[T]], *, again: bool) -> T:
        """The answer of the first host that gives one; that is asked first from then on.

        What may be asked only once is not asked `again` where a host may have heard it.
        """
        failures = []
        for host in list(self._hosts):
            try:
                return await ask(host)
            except HostUnreachableError as error:  # noqa: PERF203  # hosts are few
                failures.append(error)
                if not (again or unheard(error)):
                    break
                self._hosts.rotate(-1)
        raise nobody_answers(failures)


async def _lines(answer: httpx.Response) -> AsyncIterator[str]:
    """Those that are not empty. Raises KohakuRiverError for one without an end."""
    rest = b""
    async for piece in answer.aiter_bytes():
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.strip():
                yield line.decode(errors="replace")
        if len(rest) > LONGEST_LINE:
            raise too_long()
    if rest.strip():
        yield rest.decode(errors="replace")


def _log_line(line: str) -> LogLine:
    """One line of an answer. Raises the error that it is, if it is one."""
    try:
        told = json_of(line)
    except ValueError:
        told = None
    if not isinstance(told, dict):
        raise KohakuRiverError("This version of kohakuriver does not understand the host's answer.")
    if "error" in told:
        raise from_status(int(told.get("status", 500)), str(told.get("message", "")), str(told["error"]))
    return _record(LogLine, told)


def _check_text(value: Any) -> None:
    """Raises UsageError where a command line's bytes are no text: JSON and URLs could only carry something else."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        begun, rest = error.object[: error.start].rpartition('"')[2], error.object[error.start :].partition('"')[0]
        raise no_text(begun + rest) from error


def _asked(container: bool) -> dict[str, str | int | float] | None:
    return {"container": "true"} if container else None


def _path(task: str, action: str | None = None) -> str:
    path = f"/api/tasks/{path_segment(task)}"
    return f"{path}/{action}" if action else path


def _list(answer: Any) -> list[Any]:
    if not isinstance(answer, list):
        raise KohakuRiverError("This version of kohakuriver does not understand the host's answer.")
    return answer

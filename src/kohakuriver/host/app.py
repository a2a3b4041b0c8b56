"""The host's HTTP API."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.responses import HTMLResponse
from fastapi.security import HTTPBearer

from kohakuriver import __version__
from kohakuriver.asking import asker
from kohakuriver.errors import KohakuRiverError, NotAllowedError, UsageError
from kohakuriver.host.agents.api import agents_api
from kohakuriver.host.api_page import api_page
from kohakuriver.host.apps.entry import entry
from kohakuriver.host.browser import pages
from kohakuriver.host.cookies import need_own_page, shown_cookie
from kohakuriver.host.dashboard import assets
from kohakuriver.host.device_login import device_pages
from kohakuriver.host.forms import LONGEST_FORM
from kohakuriver.host.oidc import oidc_pages, provider_of
from kohakuriver.host.parts import Services
from kohakuriver.host.schemas import (
    LONGEST_REQUEST,
    AdoptRequest,
    Agent,
    Answers,
    CreateRequest,
    DeviceAsked,
    DeviceCodeShown,
    DeviceRequest,
    ExtendRequest,
    GroupChange,
    GroupView,
    Heartbeat,
    HeartbeatAnswer,
    LimitsView,
    LinkMade,
    LinkView,
    LoginLink,
    NewGroup,
    NewLink,
    NewToken,
    NewUser,
    NodeView,
    OidcSubject,
    Ports,
    Registration,
    RegistrationAnswer,
    SessionView,
    ShareRequest,
    SshPass,
    TokenMade,
    TokenView,
    UserLimits,
    UserView,
    VolumeView,
    WebRequest,
    Whoami,
)
from kohakuriver.host.services.audit import REFUSALS
from kohakuriver.host.services.audit_reader import AuditPage, read_page
from kohakuriver.host.services.credentials import Caller
from kohakuriver.proxies import Proxies
from kohakuriver.store import Node, Task, Token, ahead_of_users
from kohakuriver.task import TaskView
from kohakuriver.web.app import Checked, bearer, new_app, services_here, services_of
from kohakuriver.web.origin import Guard
from kohakuriver.web.request_limits import body_is_of_a_node, body_is_of_a_user
from kohakuriver.web.streamed import Streamed

__all__ = ["create_app", "goes_ahead"]

MAX_WAIT_SECONDS = 600


def create_app(
    services: Services, guard: Guard | None = None, proxies: Proxies | None = None, *, with_agents: bool = False
) -> FastAPI:
    """The host's application: its HTTP API and the page that documents it; `with_agents` other hosts', too."""

    def note(error: KohakuRiverError) -> None:
        if error.status in REFUSALS:
            services.audit.refused(error)

    more = (agents_api,) if with_agents else ()
    app = new_app(
        "host",
        __version__,
        guard=guard,
        documented=True,
        services=services,
        routers=(_open, pages, assets, entry, oidc_pages, device_pages, _api, _nodes, *more),
        on_error=note,
        proxies=proxies,
    )
    app.title = "KohakuRiver host"
    return app


Host = Annotated[Services, Depends(services_here)]


class _OfUsers(Checked):
    most_values = 4096

    @staticmethod
    async def check(request: Request) -> Callable[[], object]:
        services: Services = services_of(request)
        secret = bearer(request)
        cookie = shown_cookie(request) if secret is None else None
        await services.requests.turn(secret or cookie)
        if cookie is None:
            request.state.authenticated = await services.credentials.caller(secret)
        else:
            need_own_page(request)
            request.state.authenticated = await services.logins.visitor(cookie)
        caller: Caller = request.state.authenticated[0]
        _need_length(request, LONGEST_REQUEST)
        body_is_of_a_user(request.scope, services.requests.whose(caller))
        needs_room = services.requests.needs_room(request.method, request.url.path)
        return services.requests.begin(caller, needs_room=needs_room)


def goes_ahead(path: str) -> bool:
    """Whether a request for this path is begun ahead of those of users: how a node says that it is there."""
    return path.startswith("/api/nodes/") and path.endswith("/heartbeat")


class _OfNodes(Checked):
    @staticmethod
    async def check(request: Request) -> Callable[[], object]:
        end = ahead_of_users()
        request.state.node = await services_of(request).credentials.node(bearer(request))
        body_is_of_a_node(request.scope)
        return end


class _OfAnybody(Checked):
    @staticmethod
    async def check(request: Request) -> None:
        _need_length(request, LONGEST_FORM)


def _need_length(request: Request, most: int) -> None:
    """Raises UsageError "too_large" (413) for a request with a longer body, "no_length" (411) where it is not said."""
    if "transfer-encoding" in request.headers:
        raise UsageError(
            "Here a request says how many bytes it has: give it a Content-Length, and no chunks.",
            code="no_length",
            status=411,
        )
    # The parser has let in nothing but a number.
    if int(request.headers.get("content-length", "0")) > most:
        raise UsageError(f"Here a request may have {most} bytes at most.", code="too_large", status=413)


async def _authenticated(request: Request) -> tuple[Caller, Token]:
    found: tuple[Caller, Token] = request.state.authenticated
    return found


Authenticated = Annotated[tuple[Caller, Token], Depends(_authenticated)]


async def _user(authenticated: Authenticated) -> Caller:
    return authenticated[0]


User = Annotated[Caller, Depends(_user)]


async def _admin(user: User) -> Caller:
    user.need_admin("This")
    return user


Admin = Annotated[Caller, Depends(_admin)]


async def _node(request: Request) -> Token:
    token: Token = request.state.node
    return token


NodeToken = Annotated[Token, Depends(_node)]


async def _usable(host: Host, user: User, task: str) -> tuple[Task, Node]:
    return await host.access.usable(user, task)


async def _own(host: Host, user: User, task: str) -> tuple[Task, Node]:
    return await host.access.own(user, task)


# The path's task and its node, once it is clear that the caller may use the task, or change it.
Usable = Annotated[tuple[Task, Node], Depends(_usable)]
Own = Annotated[tuple[Task, Node], Depends(_own)]

_open = APIRouter(route_class=_OfAnybody)
# For the page that documents the API: a place for a token. What a token may do is checked by each route.
_shown = HTTPBearer(auto_error=False, scheme_name="token", description="Your API token; for a runner, its node token.")
_api = APIRouter(prefix="/api", dependencies=[Depends(_shown)], route_class=_OfUsers)
_nodes = APIRouter(prefix="/api", dependencies=[Depends(_shown)], route_class=_OfNodes)


@_open.get("/health")
async def health() -> dict[str, str]:
    """Whether the host answers, and which version it is."""
    return {"status": "ok", "version": __version__}


@_open.get("/health/live")
async def live() -> dict[str, str]:
    """Whether the host answers, whatever else is down: one that does not is to be started again."""
    return {"status": "ok", "version": __version__}


@_open.get("/health/ready")
async def ready(host: Host) -> dict[str, str]:
    """Whether users should be sent to this host: 503 while its database is down, and once it is about to end."""
    await host.readiness.check()
    return {"status": "ok", "version": __version__}


@_open.get("/docs", include_in_schema=False)
async def docs(request: Request) -> HTMLResponse:
    """The API, for people."""
    return api_page(request.app.openapi())


@_api.get("/auth")
async def whoami(host: Host, request: Request, authenticated: Authenticated) -> Whoami:
    """Who the caller is, and how much they may have."""
    apps = {
        "apps": host.apps.reached_from(request.headers.get("host", "")),
        "apps_prefix": host.apps.addresses.have_prefixes,
    }
    return (await host.people.whoami(*authenticated)).model_copy(update=apps)


@_api.post("/auth/link", status_code=201)
async def make_login_link(host: Host, authenticated: Authenticated) -> LoginLink:
    """What logs one browser in as the caller, once, within a minute: where on this host it goes."""
    return await host.logins.link(authenticated[1])


@_open.post("/api/auth/device", status_code=201)
async def ask_for_login(host: Host, request: DeviceRequest) -> DeviceAsked:
    """A command line asks to be logged in: its user types a code into a page of this host, and confirms."""
    await host.requests.turn(asker().origin)
    return await host.devices.ask(request.machine)


@_open.post("/api/auth/device/token", status_code=201)
async def take_login(host: Host, request: DeviceCodeShown) -> TokenMade:
    """The token, once its user has confirmed; until then "authorization_pending" after some seconds (RFC 8628)."""
    await host.requests.turn(asker().origin)
    return host.people.made(*await host.devices.take(request.device_code))


@_api.get("/users")
async def list_users(host: Host, _admin: Admin) -> list[UserView]:
    """All users."""
    return await host.people.users()


@_api.post("/users", status_code=201)
async def add_user(host: Host, _admin: Admin, request: NewUser) -> UserView:
    """Make a user, who has no token yet."""
    return await host.people.add_user(request)


@_api.delete("/users/{name}")
async def remove_user(host: Host, admin: Admin, name: str) -> UserView:
    """Remove a user: their tokens and sessions end, their tasks pass to the caller."""
    return await host.people.remove_user(name, admin)


@_api.put("/users/{name}/oidc")
async def link_user(host: Host, _admin: Admin, name: str, subject: OidcSubject) -> UserView:
    """Have whom the OpenID provider knows as this subject log in as a user, and nobody else from there."""
    await provider_of(host).link(name, subject.subject)
    return await host.people.user(name)


@_api.delete("/users/{name}/oidc")
async def unlink_user(host: Host, _admin: Admin, name: str) -> UserView:
    """Take that back; the browsers that came in so are logged out."""
    await provider_of(host).unlink(name)
    return await host.people.user(name)


@_api.get("/users/{name}/limits")
async def get_limits(host: Host, _admin: Admin, name: str) -> LimitsView:
    """How much a user may have, and has."""
    return await host.people.limits(name)


@_api.patch("/users/{name}/limits")
async def set_limits(host: Host, _admin: Admin, name: str, limits: UserLimits) -> LimitsView:
    """Let a user have more or less of something; who has more already keeps it."""
    return await host.people.set_limits(name, limits)


@_api.get("/groups")
async def list_groups(host: Host, user: User) -> list[GroupView]:
    """The groups that the caller is in; for admins all."""
    return await host.groups.views(user)


@_api.post("/groups", status_code=201)
async def add_group(host: Host, _admin: Admin, request: NewGroup) -> GroupView:
    """Make a group of users, whom tasks can be shared with."""
    return await host.groups.add(request)


@_api.patch("/groups/{group}")
async def change_group(host: Host, _admin: Admin, group: str, change: GroupChange) -> GroupView:
    """Put users into a group and take others out; what these have open by it ends."""
    view, tasks = await host.groups.change(group, change)
    await host.tasks.renew_tokens(tasks)
    return view


@_api.delete("/groups/{group}")
async def remove_group(host: Host, _admin: Admin, group: str) -> GroupView:
    """Forget a group; what was shared with it is not any more, and what is open by that ends."""
    view, tasks = await host.groups.remove(group)
    await host.tasks.renew_tokens(tasks)
    return view


@_api.get("/volumes")
async def list_volumes(host: Host, user: User) -> list[VolumeView]:
    """What the caller keeps on nodes, whatever becomes of tasks; for admins what everybody does."""
    return await host.volumes.views(user)


@_api.delete("/volumes/{name}")
async def remove_volume(host: Host, user: User, name: str, owner: str | None = None) -> VolumeView:
    """Remove a volume that no task has, with all that is in it; for admins also that of another owner."""
    return await host.volumes.remove(user, name, owner)


@_api.get("/tokens")
async def list_tokens(
    host: Host,
    user: User,
    of: Annotated[str | None, Query(alias="user")] = None,
    every: Annotated[bool, Query(alias="all")] = False,
) -> list[TokenView]:
    """The caller's tokens; for admins also those of another user, or all."""
    return await host.people.tokens(user, of, every=every)


@_api.post("/tokens", status_code=201)
async def make_token(host: Host, authenticated: Authenticated, request: NewToken) -> TokenMade:
    """Make a token. Its secret is in this answer and nowhere else."""
    return await host.people.make_token(*authenticated, request)


@_api.delete("/tokens/{token}")
async def revoke_token(host: Host, user: User, token: str) -> TokenView:
    """Revoke a token, by id or name; sessions that it opened end."""
    return await host.people.revoke_token(user, token)


@_api.get("/audit")
async def read_audit(
    host: Host,
    _admin: Admin,
    since: datetime | None = None,
    user: str | None = None,
    task: str | None = None,
    after: str | None = None,
) -> AuditPage:
    """What was done since a moment, by a user or with a task, the oldest first; `after` of one answer asks for more."""
    await host.audit.written()
    return await read_page(host.audit.path, since=since, user=user, task=task, after=after)


@_api.get("/nodes")
async def list_nodes(host: Host, _user: User) -> list[NodeView]:
    """All nodes."""
    return await host.nodes.views()


@_nodes.post("/nodes/register")
async def register_node(host: Host, node: NodeToken, registration: Registration) -> RegistrationAnswer:
    """A runner says that it is there."""
    host.credentials.check_node(node, registration.name)
    answer = await host.nodes.register(registration)
    host.audit.of_node("node_registered", registration.name, url=registration.url)
    return answer


@_nodes.post("/nodes/{name}/heartbeat")
async def heartbeat(host: Host, node: NodeToken, name: str, beat: Heartbeat) -> HeartbeatAnswer:
    """A runner says how its tasks are."""
    host.credentials.check_node(node, name)
    return await host.nodes.heartbeat(name, beat)


@_api.post("/nodes/{name}/cordon")
async def cordon_node(host: Host, _admin: Admin, name: str) -> NodeView:
    """Give a node no new tasks; those that it has go on."""
    view = await host.nodes.cordon(name, True)
    host.audit.write("node_cordoned", node=name)
    return view


@_api.post("/nodes/{name}/uncordon")
async def uncordon_node(host: Host, _admin: Admin, name: str) -> NodeView:
    """Take that back."""
    view = await host.nodes.cordon(name, False)
    host.audit.write("node_uncordoned", node=name)
    return view


@_api.delete("/nodes/{name}")
async def remove_node(host: Host, _admin: Admin, name: str, force: bool = False) -> NodeView:
    """Forget a node that is offline; one with tasks only with `force`, and them with it."""
    view = await host.nodes.remove(name, force=force)
    host.audit.write("node_removed", node=name, tasks=view.tasks)
    return view


@_api.get("/sessions")
async def list_sessions(host: Host, user: User) -> list[SessionView]:
    """Sessions that are open on this host now: the caller's, those to the caller's tasks, and for admins all."""
    return host.sessions.of(user)


@_api.get("/events", status_code=200, response_class=Streamed)
async def follow_events(host: Host, user: User, ports: str | None = None) -> Streamed:
    """Tasks, nodes, sessions and rates that the caller may see, and then what changes, as lines of JSON.

    With `ports` of a task, by id or name, those that listen in it, too. Of one thing about a task, as its command, the
    first 1,000 characters are told.
    """
    task = None if ports is None else (await host.access.usable(user, ports))[0]
    return Streamed(host.feed.open(user, None if task is None else str(task.task_id)))


@_api.get("/tasks")
async def list_tasks(host: Host, user: User) -> list[TaskView]:
    """All tasks that the caller may use."""
    return await host.tasks.views(user)


@_api.post("/tasks", status_code=201)
async def create_task(host: Host, user: User, request: CreateRequest) -> TaskView:
    """Start a task."""
    return await host.tasks.create(request, user)


@_api.post("/tasks/adopt", status_code=201)
async def adopt_task(host: Host, user: User, request: AdoptRequest) -> TaskView:
    """Make a task of what is there already: of a job its user, of a container or an address only an admin.

    These have no owner yet.
    """
    if request.job is None:
        user.need_admin("Making a task of a container or an address")
    return await host.tasks.adopt(request, user.name)


@_api.get("/tasks/{task}")
async def get_task(host: Host, found: Usable) -> TaskView:
    """One task, by id or name."""
    return await host.tasks.get(*found)


@_api.get("/status/{task}")
async def get_status(host: Host, found: Usable) -> dict[str, Any]:
    """What version 1's command line asks before it forwards."""
    view = await host.tasks.get(*found)
    return {"task_id": view.task_id, "task_type": "vps", "status": view.status}


@_api.get("/tasks/{task}/wait")
async def wait_for_task(
    host: Host, found: Usable, timeout: Annotated[float, Query(ge=0, le=MAX_WAIT_SECONDS)] = 30.0
) -> TaskView:
    """The task, once a forward to it would succeed."""
    return await host.tasks.wait(found[0].task_id, timeout)


@_api.get("/tasks/{task}/logs", status_code=200, response_class=Streamed)
async def read_logs(
    host: Host,
    user: User,
    found: Usable,
    follow: bool = False,
    tail: Annotated[int | None, Query(ge=0)] = None,
    since: datetime | None = None,
) -> Streamed:
    """What the task printed, as lines of JSON: the last `tail` lines, since a moment; with `follow` until it ends."""
    return Streamed(await host.logs.open(user, *found, follow=follow, tail=tail, since=since))


@_api.post("/tasks/{task}/ssh-pass", status_code=201)
async def make_ssh_pass(host: Host, authenticated: Authenticated, found: Usable) -> SshPass:
    """What stands for the caller's token on port 8002, for one connection to this task within a minute."""
    if authenticated[1].kind != "user":
        raise NotAllowedError("A browser's login opens no SSH connection; a program shows a token.")
    return SshPass.model_validate({"pass": await host.forwards.ssh_pass(authenticated[1], found[0].task_id)})


@_api.get("/tasks/{task}/answers")
async def get_answers(host: Host, found: Usable) -> Answers:
    """Whether the machine of an address task answers: its node looks when this is asked."""
    return await host.tasks.answers(*found)


@_api.get("/tasks/{task}/ports")
async def get_ports(host: Host, found: Usable) -> Ports:
    """The ports that listen in a task, with their programs where these can be seen: its tunnel client looks now."""
    return await host.tasks.ports(*found)


@_api.get("/tasks/{task}/agent")
async def task_agent(host: Host, found: Own) -> Agent:
    """What a tunnel client in the machine of an address task is started with."""
    return await host.tasks.agent(*found)


@_api.post("/tasks/{task}/stop")
async def stop_task(host: Host, found: Own, container: bool = False) -> TaskView:
    """Stop a task; an adopted container only with `container`."""
    return await host.tasks.stop(*found, container=container)


@_api.post("/tasks/{task}/restart")
async def restart_task(host: Host, found: Own, container: bool = False) -> TaskView:
    """Start a task again; an adopted container only with `container`."""
    return await host.tasks.restart(*found, container=container)


@_api.post("/tasks/{task}/extend")
async def extend_task(host: Host, user: User, found: Own, request: ExtendRequest) -> TaskView:
    """Have the time to live of a task be over later."""
    return await host.tasks.extend(*found, request.seconds, user)


@_api.post("/tasks/{task}/web")
async def serve_web(host: Host, found: Own, request: WebRequest) -> TaskView:
    """Say which addresses and paths services of a task are told, as browsers open them from now on."""
    how = request.model_dump(exclude_none=True)
    if not how:
        raise UsageError("Say with preserve_host or keep_prefix what services are to be told.")
    return await host.tasks.serve_web(*found, how)


@_api.delete("/tasks/{task}")
async def remove_task(host: Host, found: Own) -> TaskView:
    """Remove a task; the answer is the task as it was."""
    return await host.tasks.remove(*found)


@_api.post("/tasks/{task}/shares", status_code=201)
async def share_task(host: Host, found: Own, request: ShareRequest) -> TaskView:
    """Let another user, or all who are in a group, look at a task and open sessions to it."""
    await host.people.share(found[0], request.whom)
    return await host.tasks.get(*found)


@_api.delete("/tasks/{task}/shares/{user}")
async def unshare_task(host: Host, found: Own, user: str) -> TaskView:
    """Take that back; sessions of that user, or of those in the group that is named as @NAME, end."""
    await host.people.unshare(found[0], user)
    await host.tasks.renew_token(*found)
    return await host.tasks.get(*found)


@_api.post("/tasks/{task}/links", status_code=201)
async def make_link(host: Host, authenticated: Authenticated, found: Own, request: NewLink, http: Request) -> LinkMade:
    """Make a link: whoever has it opens one port of the task in a browser, and nothing else."""
    return await host.links.make(authenticated[1], found[0], request, http.headers.get("host", ""))


@_api.get("/tasks/{task}/links")
async def list_links(host: Host, found: Own) -> list[LinkView]:
    """The links of a task that are good."""
    return await host.links.of_task(found[0])


@_api.delete("/tasks/{task}/links/{link}")
async def end_link(host: Host, found: Own, link: str) -> LinkView:
    """Take a link back; what is open by it ends."""
    return await host.links.end(found[0], link)

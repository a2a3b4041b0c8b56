"""The runner's HTTP API, which the host uses. Every request but the health check needs a ticket."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from pydantic import BaseModel

from kohakuriver import __version__
from kohakuriver.asking import asker
from kohakuriver.errors import NotAllowedError
from kohakuriver.relay.open_ports import OpenPorts
from kohakuriver.relay.tunnel_server import TunnelServer
from kohakuriver.runner.backends.printed import LogRequest
from kohakuriver.runner.services.log_source import LogSource
from kohakuriver.runner.services.registration import Registration
from kohakuriver.runner.services.state import TaskRecord
from kohakuriver.runner.services.tasks import TaskManager
from kohakuriver.session.ticket import Ticket
from kohakuriver.task import TaskOrder, VolumeId
from kohakuriver.web.app import Checked, bearer, new_app, services_here, services_of
from kohakuriver.web.origin import Guard
from kohakuriver.web.request_limits import body_is_of_a_user
from kohakuriver.web.streamed import Streamed

__all__ = ["Services", "create_app"]


@dataclass(frozen=True)
class Services:
    """What the routes work with; `on_new_token` is called with a container id when its token is another."""

    tasks: TaskManager
    registration: Registration
    url: str
    tunnels: TunnelServer
    ports: OpenPorts[TaskRecord]
    on_new_token: Callable[[str], None] = lambda container: None


def create_app(services: Services, guard: Guard | None = None) -> FastAPI:
    """The runner's application."""
    return new_app("runner", __version__, guard=guard, services=services, routers=(_open, _api))


class Revoked(BaseModel):
    """Whose right has gone, and why, a clause."""

    user: str
    reason: str


class Extension(BaseModel):
    """By how many seconds, and how many may be left then at most, 0 being any number."""

    seconds: int
    most: int = 0


Runner = Annotated[Services, Depends(services_here)]


class _OfHost(Checked):
    """A route that takes a ticket of the host; where the path names a container it must be for that one."""

    @staticmethod
    async def check(request: Request) -> None:
        ticket = services_of(request).registration.check_ticket(bearer(request), "control")
        if "container" in request.path_params:
            _check_container(ticket, request.path_params["container"])
        request.state.ticket = ticket
        if ticket.user is not None:
            asker().known["user"] = ticket.user
            body_is_of_a_user(request.scope, ticket.user)


async def _ticket(request: Request) -> Ticket:
    ticket: Ticket = request.state.ticket
    return ticket


def _check_container(ticket: Ticket, container: str) -> None:
    if ticket.container != container:
        raise NotAllowedError(f"The ticket is not for {container}.")


HostTicket = Annotated[Ticket, Depends(_ticket)]

_open = APIRouter()
_api = APIRouter(prefix="/api", route_class=_OfHost)


@_open.get("/health")
async def health() -> dict[str, str]:
    """Whether the runner answers, and which version it is."""
    return {"status": "ok", "version": __version__}


@_api.get("/node")
async def reached() -> dict[str, str]:
    """What the host asks to see that it reaches this runner, and no other program, with tickets that are good."""
    return {"version": __version__}


@_api.get("/tasks")
async def list_tasks(runner: Runner) -> list[dict[str, Any]]:
    """All tasks of this node."""
    return runner.tasks.book.reports()


@_api.post("/tasks", status_code=201)
async def create_task(runner: Runner, ticket: HostTicket, order: TaskOrder) -> dict[str, Any]:
    """Start a task."""
    _check_container(ticket, order.container)
    return (await runner.tasks.create(TaskRecord(**vars(order)))).report()


@_api.post("/tasks/adopt", status_code=201)
async def adopt_task(runner: Runner, ticket: HostTicket, order: TaskOrder) -> dict[str, Any]:
    """Make a task of what runs already."""
    _check_container(ticket, order.container)
    return (await runner.tasks.adopt(TaskRecord(**vars(order)))).report()


@_api.get("/tasks/{container}")
async def get_task(runner: Runner, container: str) -> dict[str, Any]:
    """One task."""
    return runner.tasks.book.get(container).report()


@_api.get("/tasks/{container}/agent")
async def get_agent(runner: Runner, container: str) -> dict[str, str]:
    """What a tunnel client in the machine of an address task is started with: `container`, `runner_url`, `token`."""
    return runner.tasks.agent(container, runner.url)


@_api.get("/tasks/{container}/answers")
async def get_answers(runner: Runner, container: str) -> dict[str, Any]:
    """Whether the machine of an address task answers."""
    return await runner.tasks.answers(container)


@_api.get("/tasks/{container}/ports")
async def get_ports(runner: Runner, container: str) -> dict[str, Any]:
    """Which ports listen in a task."""
    return await runner.ports.of(container)


@_api.get("/tasks/{container}/logs", response_class=Streamed)
async def read_logs(
    runner: Runner,
    container: str,
    follow: bool = False,
    tail: Annotated[int | None, Query(ge=0)] = None,
    since: float | None = None,
) -> Streamed:
    """What a task printed, as lines of JSON; with `follow` until it ends."""
    return Streamed(LogSource(await runner.tasks.logs(container, LogRequest(follow, tail, since))))


@_api.post("/tasks/{container}/stop")
async def stop_task(runner: Runner, container: str) -> dict[str, Any]:
    """Stop a task."""
    return (await runner.tasks.stop(container)).report()


@_api.post("/tasks/{container}/restart")
async def restart_task(runner: Runner, container: str) -> dict[str, Any]:
    """Start a task again."""
    return (await runner.tasks.restart(container)).report()


@_api.post("/tasks/{container}/extend")
async def extend_task(runner: Runner, container: str, extension: Extension) -> dict[str, Any]:
    """Have the time to live of a task be over later."""
    return runner.tasks.extend(container, extension.seconds, extension.most).report()


@_api.post("/tasks/{container}/revoke")
async def revoke(runner: Runner, container: str, revoked: Revoked) -> dict[str, Any]:
    """End what is held in a task for a user's next session: the right to it has gone."""
    runner.tunnels.revoke(container, revoked.user, revoked.reason)
    return {}


@_api.post("/tasks/{container}/token")
async def renew_token(runner: Runner, container: str) -> dict[str, Any]:
    """Make the token of a task's tunnel client worthless, and give the client another."""
    task = await runner.tasks.renew_token(container)
    runner.on_new_token(container)
    return task.report()


@_api.delete("/volumes/{volume}")
async def remove_volume(runner: Runner, ticket: HostTicket, volume: VolumeId) -> dict[str, Any]:
    """Remove what a user kept on this node."""
    _check_container(ticket, volume)
    await runner.tasks.remove_volume(volume)
    return {}


@_api.delete("/tasks/{container}")
async def remove_task(runner: Runner, container: str) -> dict[str, Any]:
    """Remove a task."""
    return (await runner.tasks.remove(container)).report()

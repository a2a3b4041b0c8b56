"""The host's HTTP API."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Depends, FastAPI, Query, Request

from kohakuriver import __version__
from kohakuriver.host.credentials import Credentials
from kohakuriver.host.nodes import Nodes
from kohakuriver.host.schemas import (
    AdoptRequest,
    CreateRequest,
    Heartbeat,
    HeartbeatAnswer,
    NodeView,
    Registration,
    RegistrationAnswer,
    TaskView,
)
from kohakuriver.host.tasks import Tasks
from kohakuriver.web import bearer, new_app

__all__ = ["Services", "create_app"]

MAX_WAIT_SECONDS = 600


@dataclass(frozen=True)
class Services:
    """What the routes work with."""

    credentials: Credentials
    nodes: Nodes
    tasks: Tasks


def create_app(services: Services) -> FastAPI:
    """The host's application: its HTTP API and the page that documents it."""
    app = new_app("host", __version__)
    app.state.services = services
    app.include_router(_open)
    app.include_router(_api)
    return app


def _services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


Host = Annotated[Services, Depends(_services)]


async def _user(request: Request, host: Host) -> str:
    return await host.credentials.user(bearer(request))


async def _node(request: Request, host: Host) -> None:
    await host.credentials.node(bearer(request))


User = Annotated[str, Depends(_user)]

_open = APIRouter()
_api = APIRouter(prefix="/api")


@_open.get("/health")
async def health() -> dict[str, str]:
    """Whether the host answers, and which version it is."""
    return {"status": "ok", "version": __version__}


@_api.get("/nodes")
async def list_nodes(host: Host, _user: User) -> list[NodeView]:
    """All nodes."""
    return await host.nodes.views()


@_api.post("/nodes/register", dependencies=[Depends(_node)])
async def register_node(host: Host, registration: Registration) -> RegistrationAnswer:
    """A runner says that it is there."""
    return await host.nodes.register(registration)


@_api.post("/nodes/{name}/heartbeat", dependencies=[Depends(_node)])
async def heartbeat(host: Host, name: str, beat: Heartbeat) -> HeartbeatAnswer:
    """A runner says how its tasks are."""
    return await host.nodes.heartbeat(name, beat)


@_api.get("/tasks")
async def list_tasks(host: Host, _user: User) -> list[TaskView]:
    """All tasks."""
    return await host.tasks.views()


@_api.post("/tasks", status_code=201)
async def create_task(host: Host, user: User, request: CreateRequest) -> TaskView:
    """Start a task."""
    return await host.tasks.create(request, user)


@_api.post("/tasks/adopt", status_code=201)
async def adopt_task(host: Host, user: User, request: AdoptRequest) -> TaskView:
    """Make a task of a container or an address that is there already."""
    return await host.tasks.adopt(request, user)


@_api.get("/tasks/{task}")
async def get_task(host: Host, _user: User, task: str) -> TaskView:
    """One task, by id or name."""
    return await host.tasks.get(task)


@_api.get("/tasks/{task}/wait")
async def wait_for_task(
    host: Host, _user: User, task: str, timeout: Annotated[float, Query(ge=0, le=MAX_WAIT_SECONDS)] = 30.0
) -> TaskView:
    """The task, once a forward to it would succeed."""
    return await host.tasks.wait(task, timeout)


@_api.post("/tasks/{task}/stop")
async def stop_task(host: Host, _user: User, task: str) -> TaskView:
    """Stop a task."""
    return await host.tasks.stop(task)


@_api.post("/tasks/{task}/restart")
async def restart_task(host: Host, _user: User, task: str) -> TaskView:
    """Start a task again."""
    return await host.tasks.restart(task)


@_api.delete("/tasks/{task}")
async def remove_task(host: Host, _user: User, task: str) -> TaskView:
    """Remove a task; the answer is the task as it was."""
    return await host.tasks.remove(task)

"""What hosts ask of this one about agents' tasks, as they ask runners about theirs. Every request needs a ticket."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Request

from kohakuriver import __version__
from kohakuriver.errors import NotAllowedError, UnavailableError, UsageError
from kohakuriver.host.agents.node import PREFIX, AgentNode
from kohakuriver.web.app import Checked, bearer, services_here, services_of

__all__ = ["agents_api"]


class _OfHosts(Checked):
    """A route that takes a ticket of a host on this database; where the path names a container it must be for that."""

    @staticmethod
    async def check(request: Request) -> None:
        node: AgentNode = services_of(request).agents
        ticket = node.check_ticket(bearer(request), "control")
        container = request.path_params.get("container")
        if container is not None and ticket.container != container:
            raise NotAllowedError(f"The ticket is not for {container}.")


async def _node(services: Annotated[Any, Depends(services_here)]) -> AgentNode:
    node: AgentNode = services.agents
    return node


Node = Annotated[AgentNode, Depends(_node)]

agents_api = APIRouter(prefix=f"{PREFIX}/api", route_class=_OfHosts, include_in_schema=False)


@agents_api.get("/node")
async def reached() -> dict[str, str]:
    """What a host asks to see that it reaches this one."""
    return {"version": __version__}


@agents_api.get("/tasks/{container}/ports")
async def get_ports(node: Node, container: str) -> dict[str, Any]:
    """Which ports listen where the agent runs."""
    return await node.ports.of(container)


@agents_api.get("/tasks/{container}/logs")
async def read_logs(container: str) -> None:
    """There are none."""
    raise UnavailableError(
        "What an agent's command prints is where the agent was started, and not kept here.", code="no_logs"
    )


@agents_api.get("/tasks/{container}/agent")
async def get_agent(container: str) -> None:
    """What a tunnel client would be started with: none can be."""
    raise UsageError("Such a task has its agent, which was started as `kohakuriver agent`.")


@agents_api.post("/tasks/{container}/stop")
async def stop_task(node: Node, container: str) -> dict[str, Any]:
    """End the agent and its command."""
    return await node.stop(container)


@agents_api.post("/tasks/{container}/extend")
async def extend_task(container: str) -> None:
    """There is nothing to extend."""
    raise UsageError("An agent's task has no time to live: it ends with its agent.")


@agents_api.post("/tasks/{container}/revoke")
async def revoke(
    node: Node, container: str, user: Annotated[str, Body()], reason: Annotated[str, Body()]
) -> dict[str, Any]:
    """End what is held in a task for a user's next session: the right to it has gone."""
    node.tunnels.revoke(container, user, reason)
    return {}


@agents_api.post("/tasks/{container}/token")
async def renew_token(container: str) -> dict[str, Any]:
    """Nothing to do: where an agent runs, nobody else can show what it shows."""
    return {}


@agents_api.delete("/tasks/{container}")
async def remove_task(node: Node, container: str) -> dict[str, Any]:
    """End the agent, and forget the task."""
    return await node.remove(container)

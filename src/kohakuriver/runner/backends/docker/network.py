"""The network that tasks' containers are on: each reaches the node and the world beyond it, none reaches another."""

from __future__ import annotations

import contextlib
from ipaddress import ip_network
from typing import Any

import aiodocker
import structlog
from aiodocker.exceptions import DockerError

from kohakuriver.errors import UnavailableError
from kohakuriver.runner.backends.docker.fence import Fence

__all__ = [
    "ENGINE_DNS",
    "NETWORK",
    "addresses_of",
    "fence_in",
    "gateway",
    "gateway_of",
    "has_node_network",
    "task_network",
]

log = structlog.get_logger("kohakuriver.runner")

NETWORK = "kohakuriver"

ENGINE_DNS = frozenset({"127.0.0.11"})
"""Where the engine itself listens in a container's network, for the names of other containers."""

_SHARED = "bridge"
_BETWEEN_CONTAINERS = "com.docker.network.bridge.enable_icc"


async def task_network(docker: aiodocker.Docker, fence: Fence) -> str:
    """The name of the network for a new container, made and fenced in if need be.

    Where the engine can't keep containers apart (it takes the kernel's `br_netfilter`), it is the one that all
    containers share, and a warning says so. May raise DockerError.
    """
    try:
        show = await _made(docker)
    except DockerError as error:
        log.warning("CONTAINERS CAN REACH EACH OTHER: the engine made no network", reason=str(error.message))
        return _SHARED
    if (show.get("Options") or {}).get(_BETWEEN_CONTAINERS) != "false":
        log.warning(f"CONTAINERS CAN REACH EACH OTHER: remove the network {NETWORK}, and a better one will be made")
    await fence.put_up(show, _gateway(show))
    return NETWORK


async def fence_in(docker: aiodocker.Docker, fence: Fence) -> None:
    """Fence in the containers that are there already: rules don't outlive the machine, nor always its firewall."""
    with contextlib.suppress(DockerError, UnavailableError):
        show = dict(await (await docker.networks.get(NETWORK)).show())
        await fence.put_up(show, _gateway(show))


async def _made(docker: aiodocker.Docker) -> dict[str, Any]:
    with contextlib.suppress(DockerError):
        return dict(await (await docker.networks.get(NETWORK)).show())
    wanted = {"Name": NETWORK, "Driver": "bridge", "CheckDuplicate": True, "Options": {_BETWEEN_CONTAINERS: "false"}}
    try:
        await docker.networks.create(wanted)
    except DockerError as error:
        if error.status != 409:  # another runner of this engine was faster
            raise
    return dict(await (await docker.networks.get(NETWORK)).show())


async def gateway_of(docker: aiodocker.Docker, show: dict[str, Any]) -> str:
    """The node's address as a container sees it."""
    mode = show["HostConfig"]["NetworkMode"]
    if mode == "host":
        return "127.0.0.1"
    if mode.startswith("container:"):
        return await gateway_of(docker, await docker.containers.container(mode.partition(":")[2]).show())
    for network in show["NetworkSettings"]["Networks"].values():
        with contextlib.suppress(UnavailableError):
            return await gateway(docker, network["NetworkID"])
    raise UnavailableError(
        "The container is on no bridge network, so it can't reach the runner; only a runner that is root on the "
        "engine's own machine reaches into it.",
        code="no_gateway",
    )


async def addresses_of(docker: aiodocker.Docker, show: dict[str, Any]) -> list[str]:
    """From which addresses a container's processes dial the node; none where it has the node's own network."""
    mode = show["HostConfig"]["NetworkMode"]
    if mode == "host":
        return []
    if mode.startswith("container:"):
        return await addresses_of(docker, await docker.containers.container(mode.partition(":")[2]).show())
    networks = show["NetworkSettings"]["Networks"].values()
    return [network[name] for network in networks for name in ("IPAddress", "GlobalIPv6Address") if network.get(name)]


async def has_node_network(docker: aiodocker.Docker, show: dict[str, Any]) -> bool:
    """Whether a container has the node's own network, by itself or by another container whose network it shares."""
    mode = show["HostConfig"]["NetworkMode"]
    if mode.startswith("container:"):
        return await has_node_network(docker, await docker.containers.container(mode.partition(":")[2]).show())
    return bool(mode == "host")


async def gateway(docker: aiodocker.Docker, network: str) -> str:
    """The node's address on a network. Raises UnavailableError "no_gateway"."""
    return _gateway(await (await docker.networks.get(network)).show())


def _gateway(show: dict[str, Any]) -> str:
    for config in (show.get("IPAM") or {}).get("Config") or []:
        if show["Driver"] == "bridge" and ":" not in config["Subnet"]:
            # An engine that has not used the network yet does not always name its gateway.
            return str(config.get("Gateway") or next(ip_network(config["Subnet"]).hosts()))
    raise UnavailableError(f"The network {show['Name']} has no gateway on this node.", code="no_gateway")

"""The network that tasks' containers are on: each reaches the node and the world beyond it, none reaches another."""

from __future__ import annotations

import contextlib
from typing import Any

import aiodocker
import structlog
from aiodocker.exceptions import DockerError

__all__ = ["NETWORK", "task_network"]

log = structlog.get_logger("kohakuriver.runner")

NETWORK = "kohakuriver"

_SHARED = "bridge"
_BETWEEN_CONTAINERS = "com.docker.network.bridge.enable_icc"


async def task_network(docker: aiodocker.Docker) -> str:
    """The name of the network for a new container, made if need be.

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
    return NETWORK


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

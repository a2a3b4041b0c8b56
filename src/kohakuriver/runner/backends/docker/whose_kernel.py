"""Whether an engine's containers can connect to Unix sockets of this node, which they are given as mounts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiodocker
import aiohttp

__all__ = ["is_rootless", "why_no_sockets"]

_OF_THEIR_OWN = ("runsc", "kata")
"""In the names of runtimes whose containers have a kernel of their own."""


def is_rootless(about: Mapping[str, Any]) -> bool:
    """Whether it is, as the engine says `about` itself."""
    return _has(about, "rootless")


def why_no_sockets(docker: aiodocker.Docker, about: Mapping[str, Any]) -> str | None:
    """Why they can't, without a full stop; None where they can.

    Args:
        about: what the engine says of itself.
    """
    if type(docker.connector) is not aiohttp.UnixConnector:
        return "its engine is reached over the network"
    if about.get("KernelVersion") != os.uname().release:
        return "its engine is on another machine"
    runtime = str(about.get("DefaultRuntime"))
    if any(name in runtime for name in _OF_THEIR_OWN):
        return f"its engine's runtime, {runtime}, gives containers a kernel of their own"
    if _has(about, "selinux"):
        return "SELinux keeps its engine's containers from sockets of the node"
    if is_rootless(about) and Path(docker.connector.path).stat().st_uid != os.geteuid():
        return "its engine is rootless, and another user's than this runner"
    return None


def _has(about: Mapping[str, Any], option: str) -> bool:
    return any(option in each for each in about.get("SecurityOptions") or ())

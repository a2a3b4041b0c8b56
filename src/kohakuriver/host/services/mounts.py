"""Which of a node's directories a user may have in a task, and on which node: see `kohakuriver.mount_roots`."""

from __future__ import annotations

from collections.abc import Sequence

from kohakuriver.host.services.bounds import offer_of
from kohakuriver.host.services.credentials import Caller
from kohakuriver.mount_roots import MountRoot, MountRoots, refused
from kohakuriver.store import Node

__all__ = ["mountable"]


def mountable(owner: Caller, nodes: Sequence[Node], mounts: Sequence[str]) -> list[Node]:
    """The nodes on which this user may have all of these mounts. Raises NotAllowedError where there is none."""
    roots: list[MountRoot] = []
    found = []
    for node in nodes:
        of_node = MountRoots(offer_of(node).mount_roots)
        roots += of_node.of(owner.name)
        if of_node.allow(mounts, owner.name):
            found.append(node)
    if not found and not roots:
        owner.need_admin("Mounting what a node has")
    if not found:
        raise refused([mount for mount in mounts if not _allowed(mount, owner, nodes)] or mounts, roots)
    return found


def _allowed(mount: str, owner: Caller, nodes: Sequence[Node]) -> bool:
    return any(MountRoots(offer_of(node).mount_roots).allow([mount], owner.name) for node in nodes)

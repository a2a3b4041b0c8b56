"""Named volumes as the HTTP API shows and removes them. Tasks make them (`services/tasks.py`)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import structlog

from kohakuriver.errors import KohakuRiverError
from kohakuriver.host.schemas import VolumeView, iso_time
from kohakuriver.host.services.audit import NOWHERE, Audit
from kohakuriver.host.services.credentials import Caller
from kohakuriver.host.services.nodes import Nodes
from kohakuriver.host.services.runner_client import RunnerClient
from kohakuriver.store import Node, Volume, VolumeRow, Volumes, elsewhere

__all__ = ["UserVolumes", "node_of"]

log = structlog.get_logger("kohakuriver.host")

_RUNNER_SECONDS = 45.0


def node_of(places: dict[str, str], asked: str | None) -> str | None:
    """The node that a task with these volumes goes to, where `asked` names one or they are somewhere; else None.

    Raises UsageError "volume_elsewhere" where they can't be together.
    """
    for name, node in places.items():
        if asked is not None and node != asked:
            raise elsewhere(name, node)
        asked = node
    return asked


class UserVolumes:
    """What users keep on nodes. Every method may raise KohakuRiverError with the reason."""

    def __init__(self, volumes: Volumes, nodes: Nodes, runners: RunnerClient, audit: Audit = NOWHERE) -> None:
        self._volumes = volumes
        self._nodes = nodes
        self._runners = runners
        self._audit = audit

    async def views(self, caller: Caller) -> list[VolumeView]:
        """The caller's own; for admins everybody's."""
        return list(map(_view, await self._volumes.all(None if caller.is_admin else caller.name)))

    async def remove(self, caller: Caller, name: str, owner: str | None) -> VolumeView:
        """Remove a volume with all that is in it: the caller's, or for admins that of another `owner`.

        Where its node was forgotten, so is the volume. Raises NotFoundError, UsageError "volume_in_use",
        UnavailableError "volume_going", or what its node says; one that is away is none to be asked.
        """
        if owner not in (None, caller.name):
            caller.need_admin("Removing what others keep")
        volume, node = await self._volumes.begin_removal(owner or caller.name, name)
        await self._remove(volume, node)
        log.info("volume removed", name=name, owner=volume.owner, node=volume.node)
        self._audit.write("volume_removed", volume=name, owner=volume.owner, node=volume.node)
        return _view(VolumeRow(volume, []))

    async def undo(self, task_id: int) -> None:
        """Remove what was made for a task that could not be started. What can't be removed stays, which is logged."""
        with _logged(task_id):
            for each in await self._volumes.begin_undoing(task_id):
                with _logged(task_id):
                    await self._remove(*each)

    async def _remove(self, volume: Volume, node: Node | None) -> None:
        gone = False
        try:
            if node is not None:
                await self._remove_on(node, volume)
            gone = True
        finally:
            await self._volumes.end_removal(volume.volume_id, volume.going, gone=gone)

    async def _remove_on(self, node: Node, volume: Volume) -> None:
        self._nodes.check_online(node)
        path = f"/api/volumes/{volume.volume_id}"
        await self._runners.call(node, "DELETE", path, container=volume.volume_id, timeout=_RUNNER_SECONDS)


@contextlib.contextmanager
def _logged(task_id: int) -> Iterator[None]:
    """Why a volume of that task stays, where it does, is logged."""
    try:
        yield
    except KohakuRiverError as error:
        log.warning("a volume of a task that was not started stays", task=task_id, reason=error.message)


def _view(row: VolumeRow) -> VolumeView:
    volume, tasks = row.volume, row.tasks
    made = iso_time(volume.created_at)
    return VolumeView(name=volume.name, owner=volume.owner, node=volume.node, created_at=made, tasks=tasks)

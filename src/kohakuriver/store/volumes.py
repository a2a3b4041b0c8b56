"""Named volumes: what users keep on nodes, whatever becomes of their tasks.

A volume is its owner's alone: a name means another volume for each user, and what a node's engine calls it is random.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, func, select, update
from sqlalchemy.orm import Session

from kohakuriver.errors import NotFoundError, UnavailableError, UsageError
from kohakuriver.store.database import Store
from kohakuriver.store.models import Node, Task, Volume

__all__ = [
    "MOST_VOLUMES",
    "REMOVAL_SECONDS",
    "VolumeRow",
    "Volumes",
    "elsewhere",
    "give_volumes",
    "pass_volumes_on",
    "volume_names",
]

MOST_VOLUMES = 100
"""Of one user."""
REMOVAL_SECONDS = 120.0
"""For so long nothing else is done with a volume while it is removed; nodes have less time to do it."""


@dataclass(frozen=True)
class VolumeRow:
    """A volume, and the names of the tasks that have it."""

    volume: Volume
    tasks: list[str]


class Volumes:
    """The volumes of all users. Every method may raise KohakuRiverError when the database fails."""

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock

    async def all(self, owner: str | None) -> list[VolumeRow]:
        """Those of a user, or with None everybody's, by their owners and names."""

        def work(session: Session) -> list[VolumeRow]:
            rows = select(Volume).order_by(Volume.owner, Volume.name)
            used = _users(session)
            found = session.scalars(rows if owner is None else rows.where(Volume.owner == owner))
            return [VolumeRow(volume, used.get(volume.volume_id, [])) for volume in found]

        return await self._store.read(work)

    async def places(self, owner: str, volumes: Iterable[str]) -> dict[str, str]:
        """On which node each of a user's volumes is that tasks want as `NAME:/TARGET[:ro]`; none for new ones."""
        wanted = select(Volume).where(Volume.owner == owner, Volume.name.in_(volume_names(volumes)))
        return await self._store.read(lambda session: {each.name: each.node for each in session.scalars(wanted)})

    async def begin_removal(self, owner: str, name: str) -> tuple[Volume, Node | None]:
        """Have no task get a volume any more; it, and its node where that is known.

        Raises NotFoundError, UsageError "volume_in_use" where a task has it, or UnavailableError "volume_going" where
        another removal has begun. The volume's `going` is for `end_removal`.
        """

        def work(session: Session) -> tuple[Volume, Node | None]:
            volume: Volume | None = session.scalars(_named(owner, name).with_for_update()).one_or_none()
            if volume is None:
                raise NotFoundError(f"There is no volume {name!r}; `kohakuriver volume list` shows those there are.")
            if tasks := _users(session).get(volume.volume_id):
                raise UsageError(
                    f"Task {tasks[0]} has the volume {name!r}; remove the task first.", code="volume_in_use", status=409
                )
            _need_staying(volume, self._clock())
            return self._goes(session, volume)

        return await self._store.write(work)

    async def begin_undoing(self, task_id: int) -> list[tuple[Volume, Node | None]]:
        """`begin_removal` of what was made for a task that has not started, and that no other one has got since."""

        def work(session: Session) -> list[tuple[Volume, Node | None]]:
            made = session.scalars(select(Volume).where(Volume.made_for == task_id).with_for_update()).all()
            used = _users(session) if made else {}
            return [self._goes(session, volume) for volume in made if volume.volume_id not in used]

        return await self._store.write(work)

    def _goes(self, session: Session, volume: Volume) -> tuple[Volume, Node | None]:
        volume.going, volume.going_until = secrets.token_hex(16), self._clock() + REMOVAL_SECONDS
        return volume, session.get(Node, volume.node)

    async def end_removal(self, volume_id: str, mark: str | None, *, gone: bool) -> None:
        """It is gone, or is good again; nothing where something else has begun since that removal's time was over."""

        def work(session: Session) -> None:
            volume = session.get(Volume, volume_id, with_for_update=True)
            if volume is None or volume.going != mark:
                return
            volume.going, volume.going_until = None, 0.0
            if gone:
                session.delete(volume)

        await self._store.write(work)


def _named(owner: str, name: str) -> Select[Any]:
    return select(Volume).where(Volume.owner == owner, Volume.name == name)


def _users(session: Session) -> dict[str, list[str]]:
    """The names of the tasks that have each volume. Of one that was removed and is still there its node says so."""
    found: dict[str, list[str]] = {}
    tasks = select(Task.task_id, Task.name, Task.spec).where(Task.removed.is_(False)).order_by(Task.created_at)
    for task_id, name, spec in session.execute(tasks):
        for volume_id in spec.get("volume_ids") or ():
            found.setdefault(volume_id, []).append(name or str(task_id))
    return found


def volume_names(volumes: Iterable[str]) -> list[str]:
    """The names in `NAME:/TARGET[:ro]`."""
    return [volume.partition(":")[0] for volume in volumes]


def give_volumes(session: Session, task: Task, now: float) -> None:
    """Have a new task get its volumes; those that its owner has not yet are made on its node.

    Raises UsageError "volume_elsewhere", "volume_going" or "over_limit". `now` is in seconds since the epoch.
    """
    ids = [_given(session, task, name, now).volume_id for name in volume_names(task.spec.get("volumes") or ())]
    if ids:
        task.spec = {**task.spec, "volume_ids": ids}


def _given(session: Session, task: Task, name: str, now: float) -> Volume:
    volume: Volume | None = session.scalars(_named(task.owner, name).with_for_update()).one_or_none()
    if volume is None:
        count = session.scalar(select(func.count()).where(Volume.owner == task.owner)) or 0
        if count >= MOST_VOLUMES:
            raise UsageError(
                f"{task.owner} has {count} volumes, and nobody has more; `kohakuriver volume rm` removes one.",
                code="over_limit",
            )
        volume_id = f"kohakuriver-volume-{secrets.token_hex(16)}"
        volume = Volume(
            volume_id=volume_id, owner=task.owner, name=name, node=task.node, created_at=now, made_for=task.task_id
        )
        session.add(volume)
        session.flush()
    else:
        volume.made_for = None
    if volume.node != task.node:
        raise elsewhere(volume.name, volume.node)
    _need_staying(volume, now)
    volume.going = None  # a removal whose time is over is of no effect any more
    return volume


def _need_staying(volume: Volume, now: float) -> None:
    if volume.going is not None and now < volume.going_until:
        raise UnavailableError(
            f"The volume {volume.name!r} is being removed; try again when that is over, in two minutes at the latest.",
            code="volume_going",
        )


def elsewhere(name: str, node: str) -> UsageError:
    """The error for a volume that is on another node than its task."""
    return UsageError(f"The volume {name!r} is on node {node}; have the task run there.", code="volume_elsewhere")


def pass_volumes_on(session: Session, owner: str, heir: str) -> None:
    """Give a user's volumes to another one; what that one has by the same name gets its first owner's before it."""
    has = set(session.scalars(select(Volume.name).where(Volume.owner == heir)))
    for volume in session.scalars(select(Volume).where(Volume.owner == owner)):
        name = volume.name if volume.name not in has else f"{owner.lower()}-{volume.name}"[:63]
        if name in has:
            name = f"{name[:54]}-{volume.volume_id[-8:]}"
        has.add(name)
        volume.name = name
    session.flush()
    session.execute(update(Volume).where(Volume.owner == owner).values(owner=heir))

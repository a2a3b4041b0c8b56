"""Groups of users, and who may use a task by being in one that it is shared with.

A share with a group is a row among the other shares, of the "user" @NAME: no user can be called that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from sqlalchemy import delete, literal, select
from sqlalchemy.orm import Session

from kohakuriver.errors import NotFoundError, UsageError
from kohakuriver.store.database import Store
from kohakuriver.store.models import Group, Member, Share, User
from kohakuriver.store.news import note

__all__ = ["GroupRow", "Groups", "check_sharee", "forget_memberships", "groups_of", "is_shared_with", "share_name"]


@dataclass(frozen=True)
class GroupRow:
    """A group and the names of its members; `created_at` is in seconds since the epoch."""

    name: str
    members: list[str]
    created_at: float


def share_name(group: str) -> str:
    """What stands for a group where users are named."""
    return f"@{group}"


class Groups:
    """The groups that there are. Every method may raise KohakuRiverError when the database fails."""

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock

    async def all(self) -> list[GroupRow]:
        """All groups, by name."""
        return await self._store.read(
            lambda session: [_row(session, group) for group in session.scalars(select(Group).order_by(Group.name))]
        )

    async def of(self, user: str) -> set[str]:
        """The names of the groups that a user is in."""
        return await self._store.read(lambda session: groups_of(session, user))

    async def add(self, name: str, members: Iterable[str]) -> GroupRow:
        """Make a group. Raises UsageError "name_taken", or NotFoundError for a member who is no user."""

        def work(session: Session) -> GroupRow:
            if session.get(Group, name) is not None:
                raise UsageError(
                    f"There is a group {name!r} already; `kohakuriver group member {name}` changes who is in it.",
                    code="name_taken",
                )
            group = Group(name=name, created_at=self._clock())
            session.add(group)
            _put_in(session, name, members)
            session.flush()
            return _row(session, group)

        return await self._store.write(work)

    async def change(self, name: str, *, add: Iterable[str] = (), remove: Iterable[str] = ()) -> GroupRow:
        """Put users into a group and take others out.

        Raises NotFoundError for what is not there, and then does nothing.
        """

        def work(session: Session) -> GroupRow:
            group = _group(session, name)
            for user in remove:
                member = session.get(Member, (name, user))
                if member is None:
                    raise NotFoundError(f"{user!r} is not in the group {name}; `kohakuriver group list` shows who is.")
                session.delete(member)
                note(session, rights=True)
            _put_in(session, name, add)
            session.flush()
            return _row(session, group)

        return await self._store.write(work)

    async def remove(self, name: str) -> GroupRow:
        """Forget a group, as it was; what is shared with it is so no more. Raises NotFoundError."""

        def work(session: Session) -> GroupRow:
            group = _group(session, name, to_remove=True)
            row = _row(session, group)
            session.execute(delete(Member).where(Member.group == name))
            session.execute(delete(Share).where(Share.user == share_name(name)))
            session.delete(group)
            note(session, rights=True)
            return row

        return await self._store.write(work)

    async def tasks_of(self, name: str) -> list[int]:
        """The ids of the tasks that are shared with a group."""
        query = select(Share.task_id).where(Share.user == share_name(name))
        return await self._store.read(lambda session: list(session.scalars(query)))


def groups_of(session: Session, user: str) -> set[str]:
    """The names of the groups that a user is in."""
    return set(session.scalars(select(Member.group).where(Member.user == user)))


def is_shared_with(session: Session, task_id: int, user: str) -> bool:
    """Whether a task is shared with a user, or with a group that the user is in."""
    if session.get(Share, (task_id, user)) is not None:
        return True
    by_group = select(Share.user).join(Member, Share.user == literal("@").concat(Member.group))
    return session.scalars(by_group.where(Share.task_id == task_id, Member.user == user).limit(1)).first() is not None


def check_sharee(session: Session, name: str) -> None:
    """Raises NotFoundError for @NAME where there is no such group."""
    if name.startswith("@"):
        _group(session, name[1:])


def forget_memberships(session: Session, user: str) -> None:
    """A user is removed: one who gets that name one day is in no group by it."""
    session.execute(delete(Member).where(Member.user == user))


def _group(session: Session, name: str, *, to_remove: bool = False) -> Group:
    """The group, which nobody removes before this transaction has ended. Raises NotFoundError."""
    group = session.get(Group, name, with_for_update=True if to_remove else {"read": True}, populate_existing=True)
    if group is None:
        raise NotFoundError(f"There is no group {name!r}; an admin makes one with `kohakuriver group add {name}`.")
    return group


def _put_in(session: Session, group: str, users: Iterable[str]) -> None:
    for user in dict.fromkeys(users):
        if session.get(User, user, with_for_update={"read": True}, populate_existing=True) is None:
            raise NotFoundError(f"There is no user {user!r}; `kohakuriver user list` shows the users that there are.")
        session.merge(Member(group=group, user=user))


def _row(session: Session, group: Group) -> GroupRow:
    query = select(Member.user).where(Member.group == group.name).order_by(Member.user)
    return GroupRow(group.name, list(session.scalars(query)), group.created_at)

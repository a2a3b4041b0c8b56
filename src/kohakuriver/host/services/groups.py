"""Groups of users as the HTTP API shows and changes them. Who leaves one loses at once what only it gave."""

from __future__ import annotations

import structlog

from kohakuriver.host.schemas import GroupChange, GroupView, NewGroup, iso_time
from kohakuriver.host.services.credentials import Caller
from kohakuriver.host.services.grants import Grants
from kohakuriver.store.groups import GroupRow, Groups

__all__ = ["GroupsOfUsers"]

log = structlog.get_logger("kohakuriver.host")


class GroupsOfUsers:
    """Who is in which group. But for `views`, methods are for admins."""

    def __init__(self, groups: Groups, grants: Grants) -> None:
        self._groups = groups
        self._grants = grants
        self._audit = grants.audit

    async def views(self, caller: Caller) -> list[GroupView]:
        """The groups that the caller is in; for admins all."""
        groups = await self._groups.all()
        return [_view(group) for group in groups if caller.is_admin or caller.name in group.members]

    async def add(self, request: NewGroup) -> GroupView:
        """Make a group. Raises UsageError "name_taken", or NotFoundError for a member who is no user."""
        group = await self._groups.add(request.name, request.members)
        log.info("group added", group=group.name)
        self._audit.write("group_added", of_group=group.name, members=group.members)
        return _view(group)

    async def change(self, name: str, change: GroupChange) -> tuple[GroupView, list[int]]:
        """Put users in and take others out; the group, and the tasks that some may use no more.

        Raises NotFoundError.
        """
        group = await self._groups.change(name, add=change.add, remove=change.remove)
        log.info("group changed", group=name, members=len(group.members))
        about = {"added": change.add or None, "removed": change.remove or None}
        self._audit.write("group_changed", of_group=name, members=group.members, **about)
        await self._grants.check()
        return _view(group), await self._groups.tasks_of(name) if change.remove else []

    async def remove(self, name: str) -> tuple[GroupView, list[int]]:
        """Forget a group, as it was, and the tasks that its members may use no more by it. Raises NotFoundError."""
        tasks = await self._groups.tasks_of(name)
        group = await self._groups.remove(name)
        log.info("group removed", group=name)
        self._audit.write("group_removed", of_group=name, members=group.members)
        await self._grants.check()
        return _view(group), tasks


def _view(group: GroupRow) -> GroupView:
    return GroupView(name=group.name, members=group.members, created_at=iso_time(group.created_at))

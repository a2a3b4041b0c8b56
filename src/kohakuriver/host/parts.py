"""What the host's routes work with."""

from __future__ import annotations

from dataclasses import dataclass

from kohakuriver.host.agents.node import AgentNode
from kohakuriver.host.apps.apps import Apps
from kohakuriver.host.services.access import Access
from kohakuriver.host.services.audit import AuditLog
from kohakuriver.host.services.authorize import Forwards
from kohakuriver.host.services.credentials import Credentials
from kohakuriver.host.services.device_logins import DeviceLogins
from kohakuriver.host.services.feed import Feed
from kohakuriver.host.services.groups import GroupsOfUsers
from kohakuriver.host.services.hosts import Readiness
from kohakuriver.host.services.links import AppLinks
from kohakuriver.host.services.logins import Logins
from kohakuriver.host.services.logs import Logs
from kohakuriver.host.services.nodes import Nodes
from kohakuriver.host.services.oidc import OidcLogins
from kohakuriver.host.services.open_sessions import OpenSessions
from kohakuriver.host.services.people import People
from kohakuriver.host.services.requests import Requests
from kohakuriver.host.services.tasks import Tasks
from kohakuriver.host.services.volumes import UserVolumes

__all__ = ["Services"]


@dataclass(frozen=True)
class Services:
    """All of it. `oidc` is None for a host without an OpenID provider, `agents` for one that takes none in."""

    credentials: Credentials
    access: Access
    people: People
    groups: GroupsOfUsers
    nodes: Nodes
    tasks: Tasks
    forwards: Forwards
    requests: Requests
    audit: AuditLog
    logs: Logs
    logins: Logins
    devices: DeviceLogins
    oidc: OidcLogins | None
    apps: Apps
    links: AppLinks
    sessions: OpenSessions
    feed: Feed
    readiness: Readiness
    volumes: UserVolumes
    agents: AgentNode | None = None

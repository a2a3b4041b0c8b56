"""What a host remembers: nodes, tasks, users and tokens, in SQLite or PostgreSQL."""

from __future__ import annotations

from kohakuriver.store.accounts import ANY_NODE, Accounts, Use
from kohakuriver.store.agents import Agents
from kohakuriver.store.browsers import Browsers, Opened
from kohakuriver.store.common import apps_key, forget_what_has_run_out, kept, tasks_by_status
from kohakuriver.store.database import Store, ahead_of_users, is_shared, sqlite_url
from kohakuriver.store.device_codes import DeviceCodes
from kohakuriver.store.groups import Groups
from kohakuriver.store.identities import Identities
from kohakuriver.store.models import OF_USERS, TOKEN_ID_LENGTH, Node, Share, Task, Token, User, Volume
from kohakuriver.store.news import News
from kohakuriver.store.passes import Passes
from kohakuriver.store.session_counts import SessionCounts
from kohakuriver.store.together import Together
from kohakuriver.store.volumes import VolumeRow, Volumes, elsewhere, volume_names

__all__ = [
    "ANY_NODE",
    "OF_USERS",
    "TOKEN_ID_LENGTH",
    "Accounts",
    "Agents",
    "Browsers",
    "DeviceCodes",
    "Groups",
    "Identities",
    "News",
    "Node",
    "Opened",
    "Passes",
    "SessionCounts",
    "Share",
    "Store",
    "Task",
    "Together",
    "Token",
    "Use",
    "User",
    "Volume",
    "VolumeRow",
    "Volumes",
    "ahead_of_users",
    "apps_key",
    "elsewhere",
    "forget_what_has_run_out",
    "is_shared",
    "kept",
    "sqlite_url",
    "tasks_by_status",
    "volume_names",
]

"""The tables: nodes, tasks, who may do what.

Times are seconds since the epoch in a float column: SQLite has no type for them, and this way every database says the
same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Set
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Float,
    ForeignKey,
    Integer,
    LargeBinary,
    String,
    Text,
    UniqueConstraint,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from kohakuriver.quotas import Usage
from kohakuriver.task import TaskOrder, part_of

__all__ = [
    "ACTIVE",
    "OF_USERS",
    "SEEN_SECONDS",
    "TOKEN_ID_LENGTH",
    "AppCode",
    "Base",
    "DeviceCode",
    "Group",
    "Identity",
    "LoginCode",
    "Member",
    "Meta",
    "Node",
    "SessionCount",
    "Share",
    "SshPass",
    "Task",
    "TaskKey",
    "Token",
    "User",
    "Volume",
    "usage_of",
]


class Base(DeclarativeBase):
    """What all tables share."""


class Meta(Base):
    """What there is one of for all hosts: whose tables these are good for, the key of the jump host."""

    __tablename__ = "meta"

    key: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[str] = mapped_column(Text)


class Node(Base):
    """A machine with a runner.

    `instance` tells two runners apart that were given the same name; `ticket_key` signs what the host shows this node.
    A `cordoned` node gets no new tasks.
    `unavailable` are backends that it should offer and can't now, with the reasons.
    `traffic` has the node's totals, and under "tasks" those of its tasks by id, as of the last heartbeat. `offer` are
    the fields of an Offer: what the node has, and what a task gets there that asks for nothing.
    """

    __tablename__ = "nodes"

    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    url: Mapped[str] = mapped_column(Text)
    instance: Mapped[str] = mapped_column(String(64), default="")
    version: Mapped[str] = mapped_column(String(64), default="")
    backends: Mapped[list[str]] = mapped_column(JSON, default=list)
    unavailable: Mapped[dict[str, str]] = mapped_column(JSON, default=dict)
    ticket_key: Mapped[bytes] = mapped_column(LargeBinary)
    last_seen: Mapped[float] = mapped_column(Float)
    left: Mapped[bool] = mapped_column(Boolean, default=False)
    cordoned: Mapped[bool] = mapped_column(Boolean, default=False)
    traffic: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    offer: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)

    def hear(self, values: Mapping[str, Any], others: Set[int]) -> None:
        """Take over columns that the node tells; what is known of the traffic of the tasks `others` stays."""
        known = {task: counts for task, counts in self.traffic.get("tasks", {}).items() if int(task) in others}
        for name, value in values.items():
            setattr(self, name, value)
        self.traffic = {**self.traffic, "tasks": known | self.traffic["tasks"]}


class Task(Base):
    """What a user named. `container` is its id on the tunnel, `engine_name` what the engine of its backend calls it.

    `revision` grows with every change that the runner reports, so that a late report never undoes a newer one. A task
    with `removed` set is gone for users; the row stays until the node has heard of it.

    `owner` is who has it now, `creator` the user who named it and ordered what runs there.

    `ssh_keys` are the public keys that were put into the SSH server that a task was given; `ssh_port` is where that
    listens in the task, `ssh_host_key` and `ssh_host_key_ecdsa` what it shows, all None for a task without one. Where
    the user who put the keys there is gone, the host goes by them no more, and `ssh_keys` is empty.

    `spec` has what else was ordered of the node: every field of TaskOrder that has no column here.

    A task that is being started again counts as one that runs until `claimed_until`, whatever its node says meanwhile.
    """

    __tablename__ = "tasks"

    task_id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    name: Mapped[str | None] = mapped_column(String(63), unique=True)
    node: Mapped[str] = mapped_column(ForeignKey("nodes.name"), index=True)
    backend: Mapped[str] = mapped_column(String(16))
    container: Mapped[str] = mapped_column(String(128), unique=True)
    engine_name: Mapped[str | None] = mapped_column(Text)
    image: Mapped[str | None] = mapped_column(Text)
    address: Mapped[str | None] = mapped_column(Text)
    owner: Mapped[str] = mapped_column(String(63))
    creator: Mapped[str] = mapped_column(String(63), default="")
    status: Mapped[str] = mapped_column(String(16))
    message: Mapped[str | None] = mapped_column(Text)
    exit_code: Mapped[int | None] = mapped_column(BigInteger)
    ends_at: Mapped[float | None] = mapped_column(Float)
    tunnel: Mapped[bool] = mapped_column(Boolean, default=False)
    ssh_keys: Mapped[list[str]] = mapped_column(JSON, default=list)
    ssh_port: Mapped[int | None] = mapped_column(Integer)
    ssh_host_key: Mapped[str | None] = mapped_column(Text)
    ssh_host_key_ecdsa: Mapped[str | None] = mapped_column(Text)
    spec: Mapped[dict[str, Any]] = mapped_column(JSON, default=dict)
    claimed_until: Mapped[float] = mapped_column(Float, default=0.0)
    adopted: Mapped[bool] = mapped_column(Boolean, default=False)
    revision: Mapped[int] = mapped_column(BigInteger, default=0)
    removed: Mapped[bool] = mapped_column(Boolean, default=False)
    created_at: Mapped[float] = mapped_column(Float)
    changed_at: Mapped[float] = mapped_column(Float)

    @classmethod
    def ordered(cls, order: TaskOrder, *, node: str, owner: str, now: float) -> Task:
        """A new task; `now` is in seconds since the epoch."""
        columns = {name: value for name, value in vars(order).items() if name in cls.__table__.columns}
        spec = part_of(order, TaskOrder, without=tuple(columns))
        moments = {"created_at": now, "changed_at": now}
        return cls(**columns, spec=spec, node=node, owner=owner, creator=owner, status="starting", **moments)

    def order(self) -> TaskOrder:
        """What its node is ordered to run."""
        named = [name for name in TaskOrder.__dataclass_fields__ if name in self.__table__.columns]
        columns = {name: getattr(self, name) for name in named if name not in self.spec}
        order = TaskOrder(**self.spec, **columns)
        if not self.adopted:
            order.engine_name = None  # the node chose it
        return order

    def usage(self, now: float) -> Usage:
        """What its owner has of it, `now` in seconds since the epoch: memory and the like only while it runs."""
        return usage_of(self.status, self.claimed_until or 0.0, self.spec, now)  # a new row has no claim yet

    def lets_in(self, key: str) -> bool:
        """Whether a public key, as its type and base64, is one of `ssh_keys`."""
        return key in self._bare_keys()

    def looked_up(self) -> list[TaskKey]:
        """`ssh_keys` as they are looked up."""
        return [TaskKey(digest=TaskKey.digest_of(key), task_id=self.task_id) for key in self._bare_keys()]

    def _bare_keys(self) -> set[str]:
        """`ssh_keys` without their options and comments: types and base64."""
        return {" ".join(line.split()[:2]) for line in self.ssh_keys}

    def change(self, values: dict[str, Any], now: float) -> bool:
        """Take over the values that differ; whether there was one. `now` is in seconds since the epoch."""
        different = {name: value for name, value in values.items() if getattr(self, name) != value}
        for name, value in different.items():
            setattr(self, name, value)
        if different:
            self.changed_at = now
        return bool(different)


class TaskKey(Base):
    """That a public key is one of a task's `ssh_keys`: by its digest, so that strangers' keys are looked up at once."""

    __tablename__ = "task_keys"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    task_id: Mapped[int] = mapped_column(
        ForeignKey("tasks.task_id", ondelete="CASCADE"), primary_key=True, autoincrement=False, index=True
    )

    @staticmethod
    def digest_of(key: str) -> str:
        """What stands for a public key, as its type and base64."""
        return hashlib.sha256(key.encode()).hexdigest()


class User(Base):
    """Somebody who has tasks and tokens. `role` is "admin" or "user".

    `limits` are those that were set for this user, by their names in quotas.py.
    """

    __tablename__ = "users"

    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    role: Mapped[str] = mapped_column(String(16))
    created_at: Mapped[float] = mapped_column(Float)
    limits: Mapped[dict[str, float]] = mapped_column(JSON, default=dict)


class Identity(Base):
    """That a user logs in at an OpenID provider: `subject` is as whom its `issuer` knows them, and no name of theirs.

    `digest` is of these two. `made`: the first login made the user, so the provider decides on their role, too.
    """

    __tablename__ = "identities"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    issuer: Mapped[str] = mapped_column(Text)
    subject: Mapped[str] = mapped_column(String(255))
    user: Mapped[str] = mapped_column(String(63), index=True)
    made: Mapped[bool] = mapped_column(Boolean, default=False)

    @staticmethod
    def digest_of(issuer: str, subject: str) -> str:
        """What stands for an identity: nobody's token has that digest."""
        return hashlib.sha256(f"{issuer}\n{subject}".encode()).hexdigest()


class Group(Base):
    """Users whom a task can be shared with at once."""

    __tablename__ = "groups"

    name: Mapped[str] = mapped_column(String(62), primary_key=True)
    created_at: Mapped[float] = mapped_column(Float)


class Member(Base):
    """That a user is in a group."""

    __tablename__ = "members"

    group: Mapped[str] = mapped_column(String(62), primary_key=True)
    user: Mapped[str] = mapped_column(String(63), primary_key=True, index=True)


class Share(Base):
    """That a user who does not own a task may use it, or all who are in a group: that is the user @NAME."""

    __tablename__ = "shares"

    task_id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    user: Mapped[str] = mapped_column(String(63), primary_key=True)


class Token(Base):
    """A credential, kept as its SHA-256 alone.

    `kind` is "user", "node", "browser", "link" or "agent"; `name` the user whose it is, or the node that it is for
    ("*": any). `label` is what its owner calls it. A token that was revoked keeps its row, so that nothing makes it
    valid again.

    Of a browser that is logged in, `parent` is the digest of the token or of the identity that let it in, with which
    it ends. Its `expires_at` moves on while it is used, up to `ends_at`. A token that was made with a browser's login,
    or with such a token, has the browser's `ends_at`, and where its owner made it and came in by an identity, that as
    `parent`. A link opens one `port` of the task `task_id`, by the right of its user. A token of
    an agent makes one task, `task_id` once it has, and is good for as long as that task is there. Where the user of a
    browser has logged in anew in it, `heir` is the digest of what it is now.
    """

    __tablename__ = "tokens"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    kind: Mapped[str] = mapped_column(String(16))
    name: Mapped[str] = mapped_column(String(63))
    label: Mapped[str] = mapped_column(String(63), default="")
    created_at: Mapped[float] = mapped_column(Float)
    expires_at: Mapped[float | None] = mapped_column(Float)
    revoked_at: Mapped[float | None] = mapped_column(Float)
    parent: Mapped[str | None] = mapped_column(String(64))
    ends_at: Mapped[float | None] = mapped_column(Float)
    task_id: Mapped[int | None] = mapped_column(BigInteger)
    port: Mapped[int | None] = mapped_column(Integer)
    heir: Mapped[str | None] = mapped_column(String(64))

    def is_good(self, now: float) -> bool:
        """Whether it opens something, `now` in seconds since the epoch."""
        return self.revoked_at is None and (self.expires_at is None or self.expires_at > now)

    @property
    def latest_end(self) -> float | None:
        """When it ends at the latest, in seconds since the epoch; None for one that is good for ever."""
        return self.ends_at if self.kind == "browser" else self.expires_at

    @property
    def id(self) -> str:
        """What people call it: enough of the digest to be unique, and of no use as a credential."""
        return self.digest[:TOKEN_ID_LENGTH]


class LoginCode(Base):
    """What lets a browser in, once; kept as its SHA-256. `token` is the digest of the token that it stands for.

    `used_by` is the digest of the browser that came in with it, "" while there is none.
    """

    __tablename__ = "login_codes"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    token: Mapped[str] = mapped_column(String(64), index=True)
    expires_at: Mapped[float] = mapped_column(Float)
    used_by: Mapped[str] = mapped_column(String(64), default="")


class DeviceCode(Base):
    """A command line that waits for a token; what it has is kept as its SHA-256 alone, and so is what its user types.

    `origin` is whom the limit for strangers is about; `source` the address and `machine` what it says of itself, for
    the user to see. `browser` is the digest of the browser that let it have the token, "" while nobody has, and `no`
    where somebody refused.
    """

    __tablename__ = "device_codes"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    typed: Mapped[str] = mapped_column(String(64), unique=True)
    origin: Mapped[str] = mapped_column(String(64), index=True)
    source: Mapped[str] = mapped_column(Text)
    machine: Mapped[str] = mapped_column(String(63))
    created_at: Mapped[float] = mapped_column(Float)
    expires_at: Mapped[float] = mapped_column(Float)
    browser: Mapped[str] = mapped_column(String(64), default="")


class AppCode(Base):
    """What lets a browser in at the address of an app, once; kept as its SHA-256.

    `browser` is the digest of the login that it stands for, `host` the address that it is for, `state` the hash of what
    that address has given the browser.
    """

    __tablename__ = "app_codes"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    browser: Mapped[str] = mapped_column(String(64), index=True)
    task_id: Mapped[int] = mapped_column(BigInteger)
    port: Mapped[int] = mapped_column(Integer)
    host: Mapped[str] = mapped_column(Text)
    state: Mapped[str] = mapped_column(String(64))
    expires_at: Mapped[float] = mapped_column(Float)


class SshPass(Base):
    """What stands for a user's token on port 8002, once, for one task; kept as its SHA-256, as `token` is."""

    __tablename__ = "ssh_passes"

    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    token: Mapped[str] = mapped_column(String(64))
    user: Mapped[str] = mapped_column(String(63), index=True)
    task_id: Mapped[int] = mapped_column(BigInteger)
    expires_at: Mapped[float] = mapped_column(Float)


class SessionCount(Base):
    """How many sessions of a user a host has open, where several hosts work on the database.

    It counts while the host lives, which a lock of its says (`postgresql.py`).
    """

    __tablename__ = "session_counts"

    host: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    user: Mapped[str] = mapped_column(String(63), primary_key=True, index=True)
    sessions: Mapped[int] = mapped_column(Integer)


class Volume(Base):
    """What a user keeps under a `name` on one node; `volume_id` is what the node's engine calls it.

    The row is there before the node has anything. Until `going_until` no task gets it, in seconds since the epoch: the
    removal that has the mark `going` is under way, or its host has died. Of no mark none is. `made_for` is the task
    that it was made for, until another one has it, too.
    """

    __tablename__ = "volumes"
    __table_args__ = (UniqueConstraint("owner", "name"),)

    volume_id: Mapped[str] = mapped_column(String(64), primary_key=True)
    owner: Mapped[str] = mapped_column(String(63))
    name: Mapped[str] = mapped_column(String(63))
    node: Mapped[str] = mapped_column(String(63))
    going: Mapped[str | None] = mapped_column(String(32))
    going_until: Mapped[float] = mapped_column(Float, default=0.0)
    created_at: Mapped[float] = mapped_column(Float)
    made_for: Mapped[int | None] = mapped_column(BigInteger)


def usage_of(status: str, claimed_until: float, spec: Mapping[str, Any], now: float) -> Usage:
    """`Task.usage` of a task with these columns."""
    if status not in ACTIVE and claimed_until <= now:
        return Usage(tasks=1)
    sums = {name: spec.get(name) or 0 for name in ("memory", "cpus", "pids")}
    return Usage(tasks=1, running=1, gpus=len(spec.get("gpu_ids") or ()), **sums)


ACTIVE = ("starting", "running")
"""What a task's status is while it has what it was ordered to have."""

SEEN_SECONDS = 120.0
"""How long after its end the use of a used login code shows that somebody has seen it; later it is just no code."""

OF_USERS = ("user", "browser", "link", "agent")
"""Kinds of tokens that are a user's."""

TOKEN_ID_LENGTH = 12

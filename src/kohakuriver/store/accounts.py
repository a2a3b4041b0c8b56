"""Users, their tokens, and the tasks that they share.

A token is 256 random bits, so one round of SHA-256 keeps it: there is nothing to guess that a slow hash would protect.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Literal, NamedTuple

from sqlalchemy import delete, func, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from kohakuriver.backends import known
from kohakuriver.errors import NotFoundError, UnauthenticatedError, UnavailableError, UsageError
from kohakuriver.gpus import NotThereError, choose, refusal
from kohakuriver.quotas import Quotas, Usage
from kohakuriver.store.database import Store, forget_task, gpus_in_use
from kohakuriver.store.groups import check_sharee, forget_memberships, groups_of, is_shared_with, share_name
from kohakuriver.store.models import (
    OF_USERS,
    TOKEN_ID_LENGTH,
    Identity,
    Node,
    Share,
    Task,
    TaskKey,
    Token,
    User,
    usage_of,
)
from kohakuriver.store.news import note
from kohakuriver.store.together import Together
from kohakuriver.store.volumes import give_volumes, pass_volumes_on

__all__ = ["ANY_NODE", "Accounts", "Use", "digest", "forget_bad_tokens", "revoke"]

ANY_NODE = "*"
"""The name in a node token that is good for every node."""


MOST_NAMED = 500
"""How many tasks a query names; databases bound that."""


COUNTED = ("user", "agent")
"""Kinds of tokens that a user's limit is about."""

MOST_BAD_TOKENS = 100
"""Of so many of a user's tokens that are revoked or have expired the host can say so; it does not know older ones."""


class Use(NamedTuple):
    """What a session's right hangs on: a token's digest and a task's id, or a public key that was put into the task.

    With neither, which is a session without a token, only the end of the task can end it. One that leads `onward` from
    the task hangs on its user's being that, too. What a session has `left` in the task goes over to the browser's heir.
    """

    digest: str | None
    task_id: int
    key: str | None = None
    onward: Literal["", "admin", "owner"] = ""
    left: bool = False


def digest(secret: str) -> str:
    """How a token is kept."""
    return hashlib.sha256(secret.encode()).hexdigest()


class Accounts:
    """Who may do what, and have how much. Every method may raise KohakuRiverError when the database fails.

    `defaults` are the limits of users for whom no others were set.

    Large because each method is one transaction that has to see rights and limits together.
    """

    def __init__(self, store: Store, *, defaults: Quotas | None = None, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock
        self.defaults = defaults or Quotas()
        self._tokens = Together(self._token)

    # Users

    async def users(self) -> list[User]:
        """All users, by name."""
        return await self._store.read(lambda session: list(session.scalars(select(User).order_by(User.name))))

    async def user(self, name: str) -> User:
        """The user of that name, who is not just being removed. Raises NotFoundError."""
        return await self._store.write(lambda session: _user(session, name))

    async def add_user(self, name: str, role: str, limits: Mapping[str, float] | None = None) -> User:
        """Make a user, with `limits` of their own. Raises UsageError "name_taken"."""

        def work(session: Session) -> User:
            if session.get(User, name) is not None:
                raise UsageError(f"There is a user {name!r} already; choose another name.", code="name_taken")
            user = User(name=name, role=role, created_at=self._clock(), limits=dict(limits or {}))
            session.add(user)
            return user

        return await self._store.write(work)

    async def ensure_user(self, name: str, role: str) -> None:
        """Make a user who is not there yet."""

        def work(session: Session) -> None:
            if session.get(User, name) is None:
                session.add(User(name=name, role=role, created_at=self._clock()))

        with contextlib.suppress(IntegrityError):  # another host on this database makes it at the same time
            await self._store.write(work)

    async def roles(self, names: Iterable[str]) -> dict[str, str]:
        """The roles of those users who are there."""
        query = select(User.name, User.role).where(User.name.in_(set(names)))
        return await self._store.read(lambda session: {row[0]: row[1] for row in session.execute(query)})

    async def remove_user(self, name: str, heir: str) -> User:
        """Forget a user and revoke their tokens; their tasks and volumes pass to the user `heir`.

        The host forgets the SSH keys that they put into their tasks. The tasks' own servers know nothing of that.
        Raises NotFoundError for either.
        """

        def work(session: Session) -> User:
            user = _user(session, name, to_change=True)
            _user(session, heir)
            session.execute(
                update(Token)
                .where(Token.kind.in_(OF_USERS), Token.name == name, Token.revoked_at.is_(None))
                .values(revoked_at=self._clock())
            )
            theirs = select(Task.task_id).where(Task.owner == name)
            session.execute(delete(TaskKey).where(TaskKey.task_id.in_(theirs)))
            session.execute(update(Task).where(Task.owner == name).values(owner=heir, ssh_keys=[]))
            session.execute(delete(Share).where(Share.user == name))
            forget_memberships(session, name)
            pass_volumes_on(session, name, heir)
            session.execute(delete(Identity).where(Identity.user == name))
            session.delete(user)
            note(session, rights=True)
            return user

        return await self._store.write(work)

    # How much they may have

    def quotas_of(self, user: User) -> Quotas:
        """The limits of a user."""
        return self.defaults.with_own(user.role, user.limits)

    async def quotas(self, name: str) -> Quotas:
        """The limits of the user of that name; of somebody who is none, the defaults."""
        user = await self._store.read(lambda session: session.get(User, name))
        return self.defaults if user is None else self.quotas_of(user)

    async def usage(self, name: str) -> tuple[User, Usage]:
        """A user, and what they have now. Raises NotFoundError."""

        now = self._clock()

        def work(session: Session) -> tuple[User, Usage]:
            user = session.get(User, name)
            if user is None:
                raise _no_user(name)
            return user, _in_use(session, name, now) + Usage(tokens=_good_tokens(session, name, now))

        return await self._store.read(work)

    async def set_limits(self, name: str, changes: Mapping[str, float | None]) -> User:
        """Give a user limits of their own; None takes one back. Raises NotFoundError.

        Who has more already keeps it.
        """

        def work(session: Session) -> User:
            user = _user(session, name, to_change=True)
            user.limits = {key: value for key, value in {**user.limits, **changes}.items() if value is not None}
            return user

        return await self._store.write(work)

    async def add_task(self, task: Task) -> None:
        """Keep a new task, if its owner may have it.

        Raises NotFoundError where there is no such user any more, "name_taken" as the store does, and "over_limit".
        """

        def admit(session: Session) -> None:
            _give_gpus(session, task, self._clock())
            give_volumes(session, task, self._clock())
            self.check_room(session, task, task.usage(self._clock()))

        await self._store.add_task(task, admit)

    async def claim(self, task_id: int, seconds: float) -> None:
        """Have a task count as one that runs for so long, if its owner may have that; 0 ends it.

        Of one that runs nothing is asked: it has what it has. Raises "over_limit".
        """

        def work(session: Session) -> None:
            task = session.get(Task, task_id)
            if task is None:
                return
            if seconds and task.spec.get("gpu_ids"):
                # The lock makes a second host on this database wait until this task has them.
                session.get(Node, task.node, with_for_update=True)
            before = task.usage(self._clock())
            task.claimed_until = self._clock() + seconds if seconds else 0.0
            if seconds and not before.running:
                _check_gpus(session, task, self._clock())
                more = replace(task.usage(self._clock()), tasks=0)
                self.check_room(session, task, more)

        await self._store.write(work)

    def check_room(self, session: Session, task: Task, more: Usage) -> None:
        """Raises "over_limit" where the owner of a task can't have `more` besides their other tasks.

        For one more than their limit `tasks` the agent's task that ended first is forgotten.
        """
        # The lock makes a second host on this database wait until this task counts.
        user = _user(session, task.owner, to_change=True)
        quotas = self.quotas_of(user)
        if quotas != Quotas(sessions=quotas.sessions, connects=quotas.connects):
            used = _in_use(session, user.name, self._clock(), besides=task.task_id)
            one_too_many = more.tasks and quotas.tasks > 0 and used.tasks + more.tasks == quotas.tasks + 1
            if one_too_many and _forget_ended(session, user.name, besides=task.task_id):
                used = replace(used, tasks=used.tasks - 1)
            used.check(more, user.name, quotas)

    # Tokens

    async def add_token(
        self,
        secret: str,
        *,
        kind: str,
        name: str,
        label: str,
        expires_at: float | None = None,
        ends_at: float | None = None,
        parent: str | None = None,
        unique: bool = True,
        maker: Token | None = None,
    ) -> Token:
        """Make `secret` valid; what it was made before, revoked for example, it stays. No token that is made with it
        outlives `ends_at`. It ends with the identity whose digest `parent` is. `maker` is the credential by whose right
        it is made, None for the host's own.

        Raises UsageError "name_taken" when the label must be `unique` and a valid token of this `kind` and `name` has
        it, and NotFoundError for a user who is not there: whoever gets that name one day must not get the token too.
        Raises "over_limit" where the user has as many as they may, and UnauthenticatedError where `maker` has ended
        since it was shown.
        """

        def work(session: Session) -> Token:
            if known := session.get(Token, digest(secret)):
                return known
            if maker is not None:
                check_good(session, maker.digest, self._clock())
            if kind in COUNTED:
                self.make_room_for_token(session, name)
            same = select(Token).where(Token.kind == kind, Token.name == name, Token.label == label)
            if unique and session.scalars(same.where(Token.revoked_at.is_(None))).first() is not None:
                raise UsageError(
                    f"There is a token {label!r} already; revoke it or choose another name.", code="name_taken"
                )
            token = Token(
                digest=digest(secret),
                kind=kind,
                name=name,
                label=label,
                created_at=self._clock(),
                expires_at=expires_at,
                ends_at=ends_at,
                parent=parent,
            )
            session.add(token)
            return token

        return await self._store.write(work)

    def make_room_for_token(self, session: Session, name: str) -> None:
        """Raises NotFoundError for a user who is not there, "over_limit" where they have as many as they may."""
        user = _user(session, name, to_change=True)
        if user.role != "admin":  # an admin's may be in a file, which would make it good again
            forget_bad_tokens(session, "user", name, self._clock())
        have = Usage(tokens=_good_tokens(session, name, self._clock()))
        have.check(Usage(tokens=1), name, self.quotas_of(user))

    async def token(self, secret: str) -> tuple[Token | None, User | None]:
        """What is known of a token, and whose it is, also where it is not valid any more.

        Thousands of requests with one token that come at once are one or two questions to the database.
        """
        return await self._tokens(digest(secret))

    async def token_of(self, key: str) -> tuple[Token | None, User | None]:
        """The same of the token with that digest."""
        return await self._tokens(key)

    async def _token(self, key: str) -> tuple[Token | None, User | None]:
        def work(session: Session) -> tuple[Token | None, User | None]:
            token = session.get(Token, key)
            user = session.get(User, token.name) if token is not None and token.kind in OF_USERS else None
            return token, user

        return await self._store.read(work)

    async def tokens(self, owner: str | None = None) -> list[Token]:
        """The tokens that were not revoked, and browsers that are logged in, oldest first: one user's, or all."""
        listed = (Token.kind != "browser") | (Token.expires_at > self._clock())
        query = select(Token).where(Token.revoked_at.is_(None), listed).order_by(Token.created_at, Token.digest)
        if owner is not None:
            query = query.where(Token.kind.in_(OF_USERS), Token.name == owner)
        return await self._store.read(lambda session: list(session.scalars(query)))

    async def revoke_token(self, reference: str, owner: str | None = None) -> Token:
        """Revoke the token with that id, or that label among those of the user `owner`, and log out its browsers.

        `owner` None reaches every token by its id, and by their labels those of nodes: two users may call theirs the
        same. Raises NotFoundError, or UsageError for a label that several tokens have.
        """

        def work(session: Session) -> Token:
            query = select(Token).where(Token.revoked_at.is_(None))
            if owner is not None:
                query = query.where(Token.kind.in_(OF_USERS), Token.name == owner)
            is_id = func.substr(Token.digest, 1, TOKEN_ID_LENGTH) == reference
            found = list(session.scalars(query.where(is_id)))
            labelled = query.where(Token.label == reference)
            found = found or list(
                session.scalars(labelled if owner is not None else labelled.where(Token.kind == "node"))
            )
            if not found:
                raise NotFoundError(f"There is no token {reference!r}; `kohakuriver token list` shows what there is.")
            if len(found) > 1:
                raise UsageError(f"Several tokens are named {reference!r}; name one by its id.")
            revoke(session, found[0], self._clock())
            return found[0]

        return await self._store.write(work)

    # Sharing

    async def share(self, task_id: int, user: str) -> None:
        """Let a user use a task that is not theirs, or the members of a group, @NAME.

        Raises NotFoundError where there is no such user or group, or UsageError.
        """

        def work(session: Session) -> None:
            check_sharee(session, user)
            if not user.startswith("@"):
                _user(session, user)
            task = session.get(Task, task_id)
            if task is not None and task.owner == user:
                raise UsageError(f"The task is {user}'s own already; share it with somebody else.")
            session.merge(Share(task_id=task_id, user=user))

        await self._store.write(work)

    async def unshare(self, task_id: int, user: str) -> None:
        """Take that back. Raises NotFoundError when there is nothing to take back."""

        def work(session: Session) -> None:
            row = session.get(Share, (task_id, user))
            if row is None:
                raise NotFoundError(f"The task is not shared with {user!r}; `kohakuriver vps status` shows with whom.")
            session.delete(row)
            note(session, rights=True)

        await self._store.write(work)

    async def shares(self, task_ids: Iterable[int]) -> dict[int, list[str]]:
        """Who else may use these tasks, by name; a task that is not shared is not in it."""
        wanted = set(task_ids)
        query = select(Share).order_by(Share.user)
        if len(wanted) <= MOST_NAMED:
            query = query.where(Share.task_id.in_(wanted))

        def work(session: Session) -> dict[int, list[str]]:
            found: dict[int, list[str]] = {}
            for row in session.scalars(query):
                if row.task_id in wanted:
                    found.setdefault(row.task_id, []).append(row.user)
            return found

        return await self._store.read(work)

    async def may_use(self, task_id: int, user: str) -> bool:
        """Whether a task is shared with a user, or with a group that the user is in."""
        return await self._store.read(lambda session: is_shared_with(session, task_id, user))

    async def uses(self, user: str, task_id: int) -> bool:
        """Whether there is this user, and may use a task: as its owner, as an admin, or since it is shared."""

        def look(session: Session) -> bool:
            found, task = session.get(User, user), session.get(Task, task_id)
            if found is None or task is None:
                return False
            return found.role == "admin" or task.owner == user or is_shared_with(session, task_id, user)

        return await self._store.read(look)

    async def names_of(self, user: str) -> set[str]:
        """What a user is called where tasks are shared: the name, and the groups that the user is in, as @NAME."""
        return await self._store.read(lambda session: {user, *map(share_name, groups_of(session, user))})

    async def withdrawn(self, uses: Iterable[Use]) -> dict[Use, str]:
        """Which of these rights are gone, and why, as a sentence for their user."""
        now = self._clock()
        return await self._store.read(
            lambda session: {use: why for use in set(uses) if (why := _withdrawn(session, use, now)) is not None}
        )


def _user(session: Session, name: str, *, to_change: bool = False) -> User:
    """The user, who stays until this transaction ends; `to_change` for one transaction at a time. Raises NotFoundError.

    Without the lock a database with several writers would let something be made for a user who is just being removed.
    """
    user = session.get(User, name, with_for_update=True if to_change else {"read": True}, populate_existing=True)
    if user is None:
        raise _no_user(name)
    return user


def _no_user(name: str) -> NotFoundError:
    return NotFoundError(f"There is no user {name!r}; `kohakuriver user list` shows admins the users that there are.")


def _in_use(session: Session, name: str, now: float, *, besides: int | None = None) -> Usage:
    """What the tasks of a user take, without the one whose id is `besides`."""
    columns = select(Task.status, Task.claimed_until, Task.spec, Task.task_id)
    tasks = session.execute(columns.where(Task.owner == name, Task.removed.is_(False)))
    return sum((usage_of(row[0], row[1], row[2], now) for row in tasks if row[3] != besides), start=Usage())


def _forget_ended(session: Session, name: str, *, besides: int) -> bool:
    """Forget the user's agent's task that has ended first; whether there was one.

    Where the agent has not said so itself, it may be about to come back, and has to be told.
    """
    ended = (Task.status.in_(("stopped", "failed")), Task.exit_code.is_not(None), Task.removed.is_(False))
    theirs = select(Task).where(Task.owner == name, Task.backend == "agent", Task.task_id != besides, *ended)
    task = session.scalars(theirs.order_by(Task.changed_at).limit(1)).first()
    if task is None:
        return False
    forget_task(session, task.task_id)
    session.flush()
    note(session, tasks=[task.task_id])
    return True


def _give_gpus(session: Session, task: Task, now: float) -> None:
    """Choose the GPUs of a new task. Raises UnavailableError."""
    asked = task.spec.get("gpus")
    if asked and not known(task.backend).scheduled:
        # The lock makes a second host on this database wait until this task has them.
        node = session.get(Node, task.node, with_for_update=True)
        there = node.offer.get("gpus") or () if node is not None else ()
        try:
            given = choose(asked, there, gpus_in_use(session, now).get(task.node, ()), task.node)
        except NotThereError as error:
            raise refusal([error]) from None
        task.spec = {**task.spec, "gpu_ids": given}


def _check_gpus(session: Session, task: Task, now: float) -> None:
    """Raises UnavailableError "gpus_taken" where another task has the GPUs by now that this one had."""
    mine = task.spec.get("gpu_ids") or ()
    taken = gpus_in_use(session, now, besides=task.task_id).get(task.node, set()) if mine else set()
    if busy := [gpu for gpu in mine if gpu in taken]:
        raise UnavailableError(
            f"GPU {busy[0]} of node {task.node}, which task {task.name} had, is another task's now; restart it when "
            "that one has ended, or make a new task.",
            code="gpus_taken",
        )


def revoke(session: Session, token: Token, now: float) -> None:
    """Make a token worthless, and with it every browser that it let in."""
    token.revoked_at = now
    theirs = update(Token).where(Token.parent == token.digest, Token.revoked_at.is_(None))
    session.execute(theirs.values(revoked_at=now))
    note(session, rights=True)


def forget_bad_tokens(session: Session, kind: str, name: str, now: float) -> None:
    """Delete a user's tokens that have been bad for longest: without that, they could fill the disk with them."""
    bad = Token.revoked_at.is_not(None) | (Token.expires_at <= now)
    query = select(Token).where(Token.kind == kind, Token.name == name, bad)
    for token in session.scalars(query.order_by(Token.created_at.desc(), Token.digest).offset(MOST_BAD_TOKENS)):
        session.delete(token)


def _good_tokens(session: Session, name: str, now: float) -> int:
    good = (Token.revoked_at.is_(None), Token.expires_at.is_(None) | (Token.expires_at > now))
    query = select(func.count()).select_from(Token).where(Token.kind.in_(COUNTED), Token.name == name, *good)
    return session.scalar(query) or 0


def _end_of(token: Token) -> str:
    """Why a token is no good any more."""
    if token.kind == "browser":
        return "the browser of this session is not logged in any more"
    if token.kind == "link":
        return "the link of this session was taken back, or its time is up"
    how = "has expired" if token.revoked_at is None else "was revoked"
    return f"the token of this session {how}"


def _withdrawn(session: Session, use: Use, now: float) -> str | None:
    if use.key is not None:
        task = session.get(Task, use.task_id)
        return None if task is None or task.lets_in(use.key) else "the task does not let the key of this session in"
    if use.digest is None:
        return None
    token = session.get(Token, use.digest)
    if use.left and token is not None and token.heir is not None:
        token = session.get(Token, token.heir) or token
    user = session.get(User, token.name) if token is not None else None
    if token is None or user is None:
        return "the user of this session was removed"
    if not token.is_good(now):
        return _end_of(token)
    task = session.get(Task, use.task_id)
    if use.onward == "admin" and user.role != "admin":
        return f"{user.name} is no admin any more"
    if use.onward == "owner" and task is not None and task.owner != user.name and user.role != "admin":
        return f"the task is not {user.name}'s any more"
    if task is None or user.role == "admin" or task.owner == user.name:
        return None
    if not is_shared_with(session, use.task_id, user.name):
        return f"the task is not shared with {user.name} any more"
    return None


def check_good(session: Session, key: str, now: float, *, kind: str | None = None) -> Token:
    """The credential with the digest `key`, of that `kind` where one is named, by which something is to be made.

    Raises UnauthenticatedError where it, or what it hangs on, has ended. The locks make whoever ends it wait until
    this transaction is over, and then find what was made in it.
    """
    held = {"read": True}
    token = session.get(Token, key, with_for_update=held, populate_existing=True)
    if token is None or kind not in (None, token.kind) or not token.is_good(now):
        raise _ended()
    if session.get(User, token.name, with_for_update=held) is None:
        raise _ended()
    if token.parent is not None:
        parent = session.get(Token, token.parent, with_for_update=held, populate_existing=True)
        if parent is None and session.get(Identity, token.parent, with_for_update=held) is None:
            raise _ended()
        if parent is not None and not parent.is_good(now):
            raise _ended()
    return token


def _ended() -> UnauthenticatedError:
    return UnauthenticatedError("The credential behind this is no good any more; use another one.")

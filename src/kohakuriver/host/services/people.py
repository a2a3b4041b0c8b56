"""Users, tokens and shares, as the HTTP API shows and changes them.

What takes a right away ends the sessions that hang on it at once.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import cast

import structlog

from kohakuriver.errors import NotFoundError, UsageError
from kohakuriver.host.schemas import (
    Limit,
    LimitsView,
    NewToken,
    NewUser,
    TokenKind,
    TokenMade,
    TokenView,
    UserLimits,
    UserView,
    Whoami,
    iso_time,
)
from kohakuriver.host.services.credentials import ADMIN, Caller, new_token
from kohakuriver.host.services.grants import Grants
from kohakuriver.quotas import QUOTAS
from kohakuriver.store import OF_USERS, Accounts, Identities, Task, Token, User

__all__ = ["People"]

log = structlog.get_logger("kohakuriver.host")

AGENT_TOKEN_SECONDS = 86_400.0
"""For so long an agent's token can make its task where nothing else was said."""


class People:
    """Who may use this host. Methods that take a caller check what that caller may do; the others are for admins."""

    def __init__(
        self, accounts: Accounts, identities: Identities, grants: Grants, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._accounts = accounts
        self._identities = identities
        self._grants = grants
        self._audit = grants.audit
        self._clock = clock

    async def whoami(self, caller: Caller, token: Token) -> Whoami:
        """Who the caller is, and how much they may have."""
        limits = (await self.limits(caller.name)).limits
        who = {"user": caller.name, "role": caller.role, "token": self._view(token), "limits": limits}
        return Whoami.model_validate(who)

    async def limits(self, name: str) -> LimitsView:
        """How much a user may have, and has. Raises NotFoundError."""
        user, usage = await self._accounts.usage(name)
        most = self._accounts.quotas_of(user)
        used = {**asdict(usage), "sessions": await self._grants.open_of(name)}
        limits = {
            quota: Limit(limit=_shown(getattr(most, quota)), used=used.get(quota), own=quota in user.limits)
            for quota in QUOTAS
        }
        return LimitsView.model_validate({"name": user.name, "role": user.role, "limits": limits})

    async def set_limits(self, name: str, limits: UserLimits) -> LimitsView:
        """Give a user limits of their own. What they have already they keep. Raises NotFoundError."""
        user = await self._accounts.set_limits(name, dict(limits.root.items()))
        log.info("user limited", user=name, limits=user.limits)
        self._audit.write("user_limited", of_user=name, limits=user.limits)
        return await self.limits(name)

    async def users(self) -> list[UserView]:
        """All users."""
        subjects = await self._identities.subjects()
        return [_user_view(user, subjects.get(user.name)) for user in await self._accounts.users()]

    async def user(self, name: str) -> UserView:
        """One of them. Raises NotFoundError."""
        return _user_view(await self._accounts.user(name), (await self._identities.subjects()).get(name))

    async def add_user(self, request: NewUser) -> UserView:
        """Make a user."""
        limits: dict[str, float] = {quota: value for quota, value in request.limits.root.items() if value is not None}
        user = await self._accounts.add_user(request.name, request.role, limits)
        log.info("user added", user=user.name, role=user.role)
        self._audit.write("user_added", of_user=user.name, role=user.role, limits=limits or None)
        return _user_view(user)

    async def remove_user(self, name: str, heir: Caller) -> UserView:
        """Remove a user. Raises NotFoundError, or UsageError for a user that has to stay."""
        if name in (ADMIN, heir.name):
            raise UsageError(
                f"The user {name!r} can't be removed: "
                + ("it is the host's own." if name == ADMIN else "that is you; another admin can do it.")
            )
        user = await self._accounts.remove_user(name, heir.name)
        self._audit.write("user_removed", of_user=name, heir=heir.name)
        await self._grants.check()
        log.info("user removed", user=name, heir=heir.name)
        return _user_view(user)

    async def tokens(self, caller: Caller, of: str | None, *, every: bool) -> list[TokenView]:
        """The caller's own tokens; those of the user `of`, or `every` one, for admins."""
        if every or of not in (None, caller.name):
            caller.need_admin("Seeing the tokens of others")
        if of is not None:
            await self._accounts.user(of)
        owner = None if every else of or caller.name
        return [self._view(token) for token in await self._accounts.tokens(owner)]

    async def make_token(self, caller: Caller, shown: Token, request: NewToken) -> TokenMade:
        """A new token: of the caller, or for admins of another user or a node. `shown` is the caller's own.

        A token that expires makes none that outlives it for the same user. A browser makes none at all that outlives
        its last day, and neither do the tokens that it made: whoever stole a cookie would stay for ever. What
        somebody makes for themselves who came in by an OpenID provider ends when they may not come in any more. One for
        an agent has an end in any case.
        """
        kind, name = ("node", request.node) if request.node is not None else ("user", request.user or caller.name)
        if request.agent:
            kind = "agent"
        if kind == "node" or name != caller.name:
            caller.need_admin("Making tokens for others")
        lasts = AGENT_TOKEN_SECONDS if request.agent and request.expires_in is None else request.expires_in
        expires_at = None if lasts is None else self._clock() + lasts
        latest = shown.latest_end if kind != "node" and name == caller.name else shown.ends_at
        if latest is not None:
            expires_at = min(expires_at or latest, latest)
        own = kind != "node" and name == caller.name
        secret = new_token(kind)
        label = request.name or f"cli-{iso_time(self._clock())[:10]}-{secrets.token_hex(2)}"
        token = await self._accounts.add_token(
            secret,
            kind=kind,
            name=name,
            label=label,
            expires_at=expires_at,
            ends_at=shown.ends_at,
            parent=await self._identities.behind(shown) if own else None,
            maker=shown,
        )
        log.info("token made", id=token.id, kind=kind, owner=name, by=caller.name)
        expires = None if expires_at is None else iso_time(expires_at)
        self._audit.write("token_made", **_of(token), expires_at=expires)
        return self.made(token, secret)

    def made(self, token: Token, secret: str) -> TokenMade:
        """A token that was just made, with its secret."""
        return TokenMade.model_validate({**self._view(token).model_dump(), "token": secret})

    async def revoke_token(self, caller: Caller, reference: str) -> TokenView:
        """Revoke one of the caller's own tokens, by id or label; for admins also any by its id, a node's by either."""
        try:
            token = await self._accounts.revoke_token(reference, caller.name)
        except NotFoundError:
            if not caller.is_admin:
                raise
            token = await self._accounts.revoke_token(reference)
        self._audit.write("token_revoked", **_of(token))
        await self._grants.check()
        log.info("token revoked", id=token.id, kind=cast(TokenKind, token.kind), owner=token.name, by=caller.name)
        return self._view(token)

    async def share(self, task: Task, user: str) -> None:
        """Let a user use a task, or a group, @NAME."""
        await self._accounts.share(task.task_id, user)
        log.info("task shared", task=task.task_id, user=user)
        self._audit.write("task_shared", task=task.task_id, **_whom(user))

    async def unshare(self, task: Task, user: str) -> None:
        """Take that back."""
        await self._accounts.unshare(task.task_id, user)
        log.info("task no longer shared", task=task.task_id, user=user)
        self._audit.write("task_unshared", task=task.task_id, **_whom(user))
        await self._grants.check()

    def _view(self, token: Token) -> TokenView:
        expired = token.expires_at is not None and token.expires_at <= self._clock()
        return TokenView(
            id=token.id,
            kind=cast(TokenKind, token.kind),
            name=token.label,
            user=token.name if token.kind in OF_USERS else None,
            node=token.name if token.kind == "node" else None,
            status="revoked" if token.revoked_at is not None else "expired" if expired else "valid",
            created_at=iso_time(token.created_at),
            expires_at=None if token.expires_at is None else iso_time(token.expires_at),
        )


def _of(token: Token) -> dict[str, str]:
    """Which token an event is about, and whose it is."""
    whose = "of_user" if token.kind in OF_USERS else "of_node"
    return {"of_token": token.id, "label": token.label, whose: token.name}


def _whom(sharee: str) -> dict[str, str]:
    """Whom an event of a share is about."""
    return {"of_group": sharee[1:]} if sharee.startswith("@") else {"of_user": sharee}


def _user_view(user: User, subject: str | None = None) -> UserView:
    shown = {"name": user.name, "role": user.role, "created_at": iso_time(user.created_at), "limits": user.limits}
    return UserView.model_validate({**shown, "oidc": subject})


def _shown(limit: float) -> float | None:
    """A limit as users see it: None is any number."""
    return max(limit, 0) if limit else None

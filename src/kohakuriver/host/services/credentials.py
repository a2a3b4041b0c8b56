"""Who is asking: API tokens of users, browsers that are logged in, tokens of nodes; the first ones of a new cluster."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from kohakuriver.asking import asker
from kohakuriver.config import write_private
from kohakuriver.errors import NotAllowedError, UnauthenticatedError
from kohakuriver.host.services.audit import NOWHERE, Audit
from kohakuriver.host.services.failures import Failures
from kohakuriver.quotas import Quotas
from kohakuriver.store import ANY_NODE, OF_USERS, TOKEN_ID_LENGTH, Accounts, Token, User

__all__ = ["ADMIN", "ANONYMOUS", "Caller", "Cookie", "Credentials", "new_token"]

ADMIN = "admin"
ANONYMOUS = "anonymous"

_NODE_TOKEN_HELP = "use the one in the host's state directory, or have one made with `kohakuriver token create --node`"


_NO_USER = "The user of this token was removed; ask the host's administrator."
_UNKNOWN = {
    "user": "The host does not know this token; ask its administrator for a valid one.",
    "browser": "This browser is not logged in here; log in at /login.",
    "link": "There is no such link; ask whoever gave it to you for another one.",
    "agent": "The host does not know this token; make one with `kohakuriver token create --agent`.",
}


def new_token(kind: str) -> str:
    """A fresh secret of 256 random bits; programs that look for leaked secrets know it by its prefix."""
    prefix = {"user": "kr_", "node": "krn_", "browser": "krb_", "link": "krl_", "agent": "kra_"}[kind]
    return prefix + secrets.token_urlsafe(32)


class Cookie(str):
    """The secret of a browser that is logged in, as it came in its cookie: shown as a token it is worth nothing."""


@dataclass(frozen=True)
class Caller:
    """Who asks, and with which token: its digest, or None for a session that needs none.

    `role` is "admin", "user", or for such a session `ANONYMOUS`. `quotas` are how much they may have.
    """

    name: str
    role: str
    digest: str | None = None
    quotas: Quotas = field(default_factory=Quotas)

    @property
    def token_id(self) -> str | None:
        """What people call the token."""
        return None if self.digest is None else self.digest[:TOKEN_ID_LENGTH]

    @property
    def is_admin(self) -> bool:
        """Whether everything is theirs."""
        return self.role == "admin"

    def need_admin(self, what: str) -> None:
        """Raises NotAllowedError for everybody else; `what` is not for them, as the beginning of a sentence."""
        if not self.is_admin:
            raise NotAllowedError(f"{what} is for admins; ask this host's administrator.", code="not_admin")


class Credentials:
    """Checks tokens against the store. `allow_anonymous` lets forward sessions without a token in."""

    def __init__(
        self,
        accounts: Accounts,
        *,
        allow_anonymous: bool = False,
        audit: Audit = NOWHERE,
        failures: Failures | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._accounts = accounts
        self._audit = audit
        self._failures = failures or Failures()
        self._allow_anonymous = allow_anonymous
        self._clock = clock

    async def caller(self, secret: str | None) -> tuple[Caller, Token]:
        """Whose API token this is, and the token. Raises UnauthenticatedError."""
        if secret is None:
            raise UnauthenticatedError(
                "This needs a token; use `kohakuriver auth login`, set KOHAKURIVER_TOKEN, or use the cluster that `up` "
                "started."
            )
        return await self._known(secret, "user")

    async def agent(self, secret: str | None) -> tuple[Caller, Token]:
        """Whose task an agent makes, and its token: one of its user's, or one for that alone.

        Whether that is still good is asked when the task is made. Raises UnauthenticatedError.
        """
        async with self.looking():
            token, user = (None, None) if secret is None else await self._accounts.token(secret)
        try:
            if token is None or token.kind not in ("user", "agent"):
                raise UnauthenticatedError(_UNKNOWN["agent"])
            if user is None:
                raise UnauthenticatedError(_NO_USER)
        except UnauthenticatedError as error:
            await self.refuse(error, token)
            raise
        asker().known.update(user=user.name, token=token.id)
        return self.of_token(token, user), token

    async def visitor(self, secret: str) -> tuple[Caller, Token]:
        """Like `caller`, of a browser that is logged in: whose it is. Raises UnauthenticatedError."""
        found = await self._known(secret, "browser")
        asker().known["via"] = "browser"
        return found

    async def logged_in(self, browser: str) -> tuple[Caller, Token]:
        """Like `visitor`, by the digest of the browser's secret, which is no credential: who asks has shown another.

        So it is with who has a link, and its digest. Raises UnauthenticatedError.
        """
        token, user = await self._accounts.token_of(browser)
        return self._checked(token, user, "link" if token is not None and token.kind == "link" else "browser")

    async def link(self, secret: str) -> Token:
        """The link that a secret is of. Raises UnauthenticatedError."""
        return (await self._known(secret, "link"))[1]

    async def _known(self, secret: str, kind: str) -> tuple[Caller, Token]:
        async with self.looking():
            token, user = await self._accounts.token(secret)
        try:
            return self._checked(token, user, kind)
        except UnauthenticatedError as error:
            await self.refuse(error, token)
            raise

    def _checked(self, token: Token | None, user: User | None, kind: str) -> tuple[Caller, Token]:
        if token is None or token.kind != kind:
            raise UnauthenticatedError(_UNKNOWN[kind])
        self._check_valid(token)
        if user is None:
            raise UnauthenticatedError(_NO_USER)
        asker().known.update(user=user.name, token=token.id)
        return self.of_token(token, user), token

    def of_token(self, token: Token, user: User) -> Caller:
        """Who asks with a token of this user."""
        return Caller(user.name, user.role, token.digest, self._accounts.quotas_of(user))

    async def session_caller(self, secret: str | None) -> Caller:
        """Like `caller`, for a session: without a token, `ANONYMOUS` where the host allows that.

        With a `Cookie` it is who is logged in with that browser.
        """
        if isinstance(secret, Cookie):
            return (await self.visitor(secret))[0]
        if secret is None and self._allow_anonymous:
            return Caller(ANONYMOUS, ANONYMOUS, quotas=self._accounts.defaults)
        return (await self.caller(secret))[0]

    async def owner(self, name: str) -> Caller:
        """A task's owner, for whom somebody comes with a key that the task lets in: no admin, whoever it is."""
        return Caller(name, "user", quotas=await self._accounts.quotas(name))

    async def node(self, secret: str | None) -> Token:
        """A node's token, once it is clear that it is one. Raises UnauthenticatedError."""
        token = None
        if secret is not None:
            async with self.looking():
                token = (await self._accounts.token(secret))[0]
        try:
            if token is None or token.kind != "node":
                raise UnauthenticatedError(f"The host does not know this node token; {_NODE_TOKEN_HELP}.")
            self._check_valid(token)
        except UnauthenticatedError as error:
            if secret is not None:
                await self.refuse(error, token)
            raise
        asker().known.update(token=token.id)
        return token

    def looking(self) -> contextlib.AbstractAsyncContextManager[None]:
        """While a credential of who asks is looked at: see `Failures.looking`."""
        return self._failures.looking(asker().origin)

    async def refuse(self, error: UnauthenticatedError, token: Token | None = None) -> None:
        """Write down that a credential was no good, and whose it was where that is known; back when it may be said.

        A browser that was logged in once has guessed nothing. Raises UnavailableError "too_many_failures" (429).
        """
        whose = {} if token is None else {"token": token.id, "user" if token.kind in OF_USERS else "node": token.name}
        self._audit.refused(error, **whose)
        if token is None or token.kind != "browser":
            await self._failures.failed(asker().origin, error)

    @staticmethod
    def check_node(token: Token, name: str) -> None:
        """Raises NotAllowedError where the node's token is not for the node `name`."""
        if token.name not in (ANY_NODE, name):
            raise NotAllowedError(
                f"This token is for node {token.name} alone, not for {name}; give its runner --name {token.name}, or "
                f"{_NODE_TOKEN_HELP}."
            )

    def _check_valid(self, token: Token) -> None:
        if token.kind == "browser" and not token.is_good(self._clock()):
            raise UnauthenticatedError("This browser was logged out; log in again at /login.", code="logged_out")
        if token.kind == "link" and not token.is_good(self._clock()):
            raise UnauthenticatedError("This link was taken back, or its time is up.", code="link_used")
        if token.revoked_at is not None:
            raise UnauthenticatedError("This token was revoked; ask for another one.", code="token_revoked")
        if token.expires_at is not None and token.expires_at <= self._clock():
            raise UnauthenticatedError("This token has expired; ask for another one.", code="token_expired")

    async def load_or_make(self, state_dir: Path) -> list[Path]:
        """Make the tokens in `state_dir` valid; the files that had to be made, each readable by its owner alone.

        The files stand above the database: with a new database the tokens that people have noted stay good. But a
        token that was revoked stays so, and its file gets a new one.
        """
        await self._accounts.ensure_user(ADMIN, "admin")
        made = []
        for file_name, kind, name in (("admin-token", "user", ADMIN), ("node-token", "node", ANY_NODE)):
            path = state_dir / file_name
            secret = path.read_text("utf-8").strip() if path.exists() else ""
            known = (await self._accounts.token(secret))[0]
            if not secret or (known is not None and known.revoked_at is not None):
                secret = new_token(kind)
                write_private(path, secret + "\n")
                made.append(path)
            await self._accounts.add_token(secret, kind=kind, name=name, label=file_name, unique=False)
        return made

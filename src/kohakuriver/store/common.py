"""What all hosts on a database have in common, and what none of them needs any more."""

from __future__ import annotations

import secrets

from sqlalchemy import delete, func, select, update
from sqlalchemy.orm import Session

from kohakuriver.store.database import Store
from kohakuriver.store.models import SEEN_SECONDS, AppCode, DeviceCode, LoginCode, Meta, SshPass, Task
from kohakuriver.store.schema import GOOD_FOR

__all__ = ["apps_key", "forget_what_has_run_out", "kept", "tasks_by_status"]


async def kept(store: Store, key: str, offered: str) -> str:
    """A text that all hosts have, by its name: what the first of them offered.

    Raises KohakuRiverError when the database fails.
    """

    def work(session: Session) -> str:
        # Of two hosts that start at a time the second waits for the first, and then finds what that offered.
        session.execute(update(Meta).where(Meta.key == GOOD_FOR).values(key=GOOD_FOR))
        row = session.get(Meta, key)
        if row is None:
            row = Meta(key=key, value=offered)
            session.add(row)
        return row.value

    return await store.write(work)


async def apps_key(store: Store) -> bytes:
    """What all hosts of this database sign with what they give browsers at the addresses of apps."""
    return bytes.fromhex(await kept(store, "apps_key", secrets.token_hex(32)))


async def tasks_by_status(store: Store) -> dict[str, int]:
    """How many tasks have each status; one that none has is not in it. Raises KohakuRiverError."""
    query = select(Task.status, func.count()).where(Task.removed.is_(False)).group_by(Task.status)
    return await store.read(lambda session: {row[0]: row[1] for row in session.execute(query)})


async def forget_what_has_run_out(store: Store, now: float) -> None:
    """Delete what was good for a while only; `now` is in seconds since the epoch.

    Raises KohakuRiverError when the database fails.
    """

    def work(session: Session) -> None:
        session.execute(delete(SshPass).where(SshPass.expires_at <= now))
        session.execute(delete(LoginCode).where(LoginCode.expires_at <= now - SEEN_SECONDS))
        session.execute(delete(DeviceCode).where(DeviceCode.expires_at <= now))
        session.execute(delete(AppCode).where(AppCode.expires_at <= now))

    await store.write(work)

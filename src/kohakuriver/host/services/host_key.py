"""The jump host's own key: whichever host on the database a user's `ssh` comes to, it is the one that it knows."""

from __future__ import annotations

import asyncio
from pathlib import Path

from kohakuriver.config import write_private
from kohakuriver.ssh_proxy.jump import check_or_make_key
from kohakuriver.store import Store, kept

__all__ = ["shared_host_key"]


async def shared_host_key(store: Store, path: Path) -> Path:
    """The file `path`, with the key in it that is in the database; where there is none yet the file's becomes that.

    Raises OSError or ValueError for a file that can't be read.
    """
    await asyncio.to_thread(check_or_make_key, path)
    own = path.read_text("utf-8")
    shared = await kept(store, "ssh_host_key", own)
    if shared != own:
        write_private(path, shared)
    return path

"""The jump host's own keys: whichever host on the database a user's `ssh` comes to, it is the one that it knows."""

from __future__ import annotations

import asyncio
from pathlib import Path

from kohakuriver import host_keys as keys
from kohakuriver.config import write_private
from kohakuriver.store import Store, kept

__all__ = ["shared_host_keys"]


async def shared_host_keys(store: Store, directory: Path) -> Path:
    """The directory, with the keys in it that are in the database; where there are none yet the files' become those.

    Raises OSError or ValueError for a file that can't be read.
    """
    for make, file, name in (
        (keys.ed25519, "ssh_host_ed25519_key", "ssh_host_key"),
        (keys.ecdsa, "ssh_host_ecdsa_key", "ssh_host_key_ecdsa"),
    ):
        path = directory / file
        await asyncio.to_thread(make, path)
        own = path.read_text("utf-8")
        shared = await kept(store, name, own)
        if shared != own:
            write_private(path, shared)
    return directory

"""All TCP ports of a task, forwarded as they come and go: what `kohakuriver forward --all` adds to a forward."""

from __future__ import annotations

import asyncio
import contextlib

from kohakuriver.client.forward import NOT_RUNNING, Forwarder
from kohakuriver.client.host import HostClient
from kohakuriver.config import Settings
from kohakuriver.errors import KohakuRiverError, LocalAddressError

__all__ = ["LOOK_EVERY", "EveryPort"]

LOOK_EVERY = 2.0
"""Seconds between two looks at what listens."""


class EveryPort:
    """Keeps a forward, which takes `any_port`, at what listens in its task; the ports that it has itself stay its own.

    `begin` before the forward is opened, then `follow` until it is closed.
    """

    def __init__(self, forwarder: Forwarder, settings: Settings) -> None:
        self._forwarder = forwarder
        self._settings = settings
        self._given = {port.remote for port in forwarder.ports if port.proto == "tcp"}
        self._found: set[int] = set()
        self._open: dict[int, int] = {}
        self._last: dict[int, int] = {}

    async def begin(self) -> bool:
        """Look for the first time: whether anything listens. Raises why it can't be known, as `HostClient.ports`."""
        async with HostClient(self._settings) as host:
            self._found, _ = await self._look(host)
        return bool(self._found)

    async def follow(self) -> None:
        """Forward what listens, and look again and again, until cancelled.

        While it can't be known what listens, nothing changes: the forward itself tells of what is wrong.
        """
        whole = True
        async with HostClient(self._settings) as host:
            while True:
                await self._fit(whole)
                await asyncio.sleep(LOOK_EVERY)
                try:
                    self._found, whole = await self._look(host)
                except KohakuRiverError as error:
                    whole = error.code == NOT_RUNNING
                    self._found = set() if whole else self._found

    async def _look(self, host: HostClient) -> tuple[set[int], bool]:
        """The TCP ports that listen, and whether these are all."""
        told = await host.ports(self._forwarder.task)
        return {port.port for port in told.ports if port.proto == "tcp"} - self._given, not told.more

    async def _fit(self, whole: bool) -> None:
        for remote in sorted(self._open.keys() - self._found) if whole else ():
            self._forwarder.drop(remote, self._open.pop(remote))
        for remote in sorted(self._found - self._open.keys()):
            with contextlib.suppress(LocalAddressError, OSError):  # no file or port is left: it is tried again
                # A service that comes back is found where it was.
                local = await self._forwarder.add(remote, self._last.get(remote, remote))
                self._open[remote] = self._last[remote] = local

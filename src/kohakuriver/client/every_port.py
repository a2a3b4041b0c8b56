"""All TCP ports of a task, forwarded as they come and go: what `kohakuriver forward --all` is."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from kohakuriver.client.forward import NOT_RUNNING, STOPPED, Forwarder, Gone, Listening
from kohakuriver.client.host import HostClient
from kohakuriver.client.ports import PortForward
from kohakuriver.config import Settings
from kohakuriver.errors import KohakuRiverError, LocalAddressError
from kohakuriver.runtime import cancel_all
from kohakuriver.tunnel.local_listeners import ListeningSocket
from kohakuriver.tunnel.user_endpoint import stop_listening

__all__ = ["LOOK_EVERY", "EveryPort"]

LOOK_EVERY = 2.0
"""Seconds between two looks at what listens."""

MOST_AT_ONCE = 1000
"""How many ports are followed: as many as one look tells of. A task may tell others each time."""


class EveryPort(Forwarder):
    """A forward of what listens in its task; the ports that are given, if any, stay as they are.

    `say` is called with a sentence for a person where nothing listens yet.
    """

    def __init__(
        self,
        task: str,
        ports: Sequence[PortForward],
        *,
        settings: Settings,
        say: Callable[[str], None] = lambda text: None,
        **how: Any,
    ) -> None:
        super().__init__(task, ports, settings=settings, any_port=True, **how)
        self._asked = settings
        self._say = say
        self._given = {port.remote for port in ports if port.proto == "tcp"}
        self._found: set[int] = set()
        self._followed: dict[int, list[ListeningSocket]] = {}
        self._last: dict[int, int] = {}
        self._follower: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Look for the first time, then as Forwarder does. Raises why it can't be known, as `HostClient.ports`."""
        async with HostClient(self._asked) as host:
            self._found, _ = await self._look(host)
        await super().start()
        self._follower = asyncio.get_running_loop().create_task(self._follow())
        if not self._found:
            self._say(f"Nothing listens in {self.task} yet; its ports are forwarded as they come.")

    async def close(self, reason: str = STOPPED, *, deliver: bool = False) -> None:
        """As Forwarder does, and look no more."""
        if self._follower is not None:
            await cancel_all([self._follower])
        await super().close(reason, deliver=deliver)

    async def _listen_everywhere(self) -> None:
        await super()._listen_everywhere()
        await self._take_up()  # before all are told that it is connected

    async def _follow(self) -> None:
        """Look again and again, and forward what listens then.

        While it can't be known what listens, nothing changes: the forward itself tells of what is wrong.
        """
        async with HostClient(self._asked) as host:
            while True:
                await asyncio.sleep(LOOK_EVERY)
                try:
                    self._found, whole = await self._look(host)
                except KohakuRiverError as error:
                    whole = error.code == NOT_RUNNING
                    self._found = set() if whole else self._found
                if whole or len(self._followed) >= MOST_AT_ONCE:
                    self._let_go()
                for local in await self._take_up():
                    self._on_event(Listening.of(local))

    async def _look(self, host: HostClient) -> tuple[set[int], bool]:
        """The TCP ports that listen, and whether these are all."""
        told = await host.ports(self.task)
        return {port.port for port in told.ports if port.proto == "tcp"} - self._given, not told.more

    async def _take_up(self) -> list[ListeningSocket]:
        """Listen for what was found and has no local port yet; the local addresses that came by that."""
        came = []
        room = max(0, MOST_AT_ONCE - len(self._followed))
        for remote in sorted(self._found - self._followed.keys())[:room]:
            with contextlib.suppress(LocalAddressError, OSError):  # no file or port is left: it is tried again
                # A service that comes back is found where it was.
                wanted = PortForward(self._last.get(remote, remote), remote)
                added = self._followed[remote] = await self._local.listen_or_any(wanted)
                self._last[remote] = added[0].port
                self.listening += added
                came += added
        return came

    def _let_go(self) -> None:
        """Take no new connections for what was not found any more; those that are open end by themselves."""
        for remote in sorted(self._followed.keys() - self._found):
            for local in self._followed.pop(remote):
                self.listening.remove(local)
                stop_listening(self._endpoint, local)
                self._on_event(Gone.of(local))

"""A forward whose links a test cuts: the four hops in one process, over real sockets, with a relay in each link."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from kohakuriver.client.forward import Event, Forwarder, PathTaken, PortForward, Resumed
from kohakuriver.client.straight import PathChoice
from kohakuriver.config import Settings
from kohakuriver.limits import Limits
from tests.support.hops import CONTAINER, Chain, chain, until
from tests.support.peers.cuttable import Relay, relay

__all__ = ["DIRECT", "LINKS", "STRAIGHT", "Stage", "stage"]

LINKS = ("user", "host", "container")
STRAIGHT = "straight"
DIRECT = "direct"


@dataclass
class Stage:
    """Four hops, with a relay in front of the host, the runner, and the runner as container and users see it."""

    hops: Chain
    relays: dict[str, Relay]
    events: list[Event]
    forwarder: Forwarder
    client: Any

    @property
    def port(self) -> int:
        return self.forwarder.listening[0].port

    async def back(self, times: int) -> None:
        """Wait until the forward has come back so often."""
        await until(lambda: sum(isinstance(event, Resumed) for event in self.events) >= times)

    @property
    def paths(self) -> list[PathTaken]:
        """What was said of paths."""
        return [event for event in self.events if isinstance(event, PathTaken)]

    async def goes(self, path: str, times: int = 1) -> PathTaken:
        """Wait until this path was taken so often; what was said of it then."""
        await until(lambda: sum(each.path == path for each in self.paths) >= times)
        return [each for each in self.paths if each.path == path][-1]


@contextlib.asynccontextmanager
async def stage(
    kind: str,
    port: int,
    *,
    proto: str = "tcp",
    resume_for: int = 3600,
    straight: bool = False,
    limits: Limits | None = None,
    path: PathChoice = "auto",
) -> AsyncIterator[Stage]:
    """A forward to a port of a container, whose tunnel client is of this kind; a runner dials a `direct` one itself.

    With `straight` the runner can be reached by users, too.
    """
    async with chain(limits) as hops, contextlib.AsyncExitStack() as stack:
        relays = {
            "user": await stack.enter_async_context(relay(lambda: hops.host_port)),
            "host": await stack.enter_async_context(relay(lambda: hops.runner_port)),
            "container": await stack.enter_async_context(relay(lambda: hops.container_port)),
        }
        relays[STRAIGHT] = await stack.enter_async_context(relay(lambda: hops.runner_port))
        if straight:
            hops.straights.url, hops.straights.refusal = f"http://127.0.0.1:{relays[STRAIGHT].port}", ""
        hops.host_seen_by_user = lambda: relays["user"].port
        hops.runner_seen_by_host = lambda: relays["host"].port
        hops.runner_seen_by_container = lambda: relays["container"].port
        if kind == DIRECT:
            hops.addresses[CONTAINER] = "127.0.0.1"
        client = None if kind == DIRECT else await hops.tunnel(kind)
        events: list[Event] = []
        forwarder = Forwarder(
            "1",
            [PortForward(0, port, proto)],
            settings=Settings(f"http://127.0.0.1:{relays['user'].port}", resume_for=resume_for),
            local_host="127.0.0.1",
            resume=True,
            path=path,
            on_event=events.append,
        )
        await forwarder.start()
        try:
            yield Stage(hops, relays, events, forwarder, client)
        finally:
            await forwarder.close()

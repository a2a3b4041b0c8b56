"""Sessions whose streams this runner dials itself: no tunnel client takes part in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from kohakuriver.relay.admission import Admission
from kohakuriver.relay.straight import Paths
from kohakuriver.tunnel.container_endpoint import ContainerEndpoint, Network
from kohakuriver.tunnel.endpoint import AnyStream, Share
from kohakuriver.tunnel.keeper import Keeper
from kohakuriver.tunnel.link import Link
from kohakuriver.tunnel.protocol import SESSION_ID, STRAIGHT, ErrorText
from kohakuriver.tunnel.settings import EndpointConfig

__all__ = ["DirectSession", "DirectTarget", "Keepers"]

DIALLED = 8
"""A stream that the runner dials itself counts as so many: it has a socket here, and bytes that wait at it."""


@dataclass(frozen=True)
class DirectTarget:
    """What the runner dials for a task: an `address` from its own network, or ports of another `network`."""

    address: str | None = None
    network: Network | None = None


class Keepers:
    """The streams that this runner dialled itself and that outlive their sessions, by container."""

    def __init__(self) -> None:
        self._keepers: dict[str, Keeper] = {}

    def of(self, container: str) -> Keeper:
        """Those of one container."""
        return self._keepers.setdefault(container, Keeper())

    def end(self, container: str, reason: str) -> None:
        """They are dialled no longer."""
        keeper = self._keepers.pop(container, None)
        if keeper is not None:
            keeper.close(ErrorText("ECONNRESET", reason))

    def close(self) -> None:
        """The runner ends, and it is their other end."""
        for container in list(self._keepers):
            self.end(container, "the runner has ended, which had made this connection")

    def revoke(self, container: str, mark: bytes, reason: str) -> None:
        """A user's right to the container has gone."""
        if container in self._keepers:
            self._keepers[container].revoke(mark, ErrorText("EACCES", reason))


class DirectSession(ContainerEndpoint):
    """One user's link to what the runner itself reaches: the runner is the container-side endpoint.

    `paths` are the links of its session, where it may have another.
    """

    def __init__(
        self,
        container: str,
        target: DirectTarget,
        *,
        port: int,
        admission: Admission,
        config: EndpointConfig | None,
        keeper: Keeper,
        mark: bytes,
        share: Share,
        on_closed: Callable[[DirectSession], None],
    ) -> None:
        super().__init__(
            () if target.address is None else (target.address,),
            config=config,
            where="in the task" if target.address is None else f"at {target.address}",
            refuses=admission.refusal,
            default_port=port,
            network=target.network,
            keeper=keeper,
            mark=mark,
            share=share,
        )
        self.container = container
        self.beyond = False
        self.admission = admission
        self.paths: Paths | None = None
        self._target = target
        self.mark = mark
        self._shared = share
        self._on_closed = on_closed

    def again(self, keeper: Keeper) -> DirectSession:
        """Another link of the same session."""
        return DirectSession(
            self.container,
            self._target,
            port=self.default_port,
            admission=self.admission.again(),
            config=self.config,
            keeper=keeper,
            mark=self.mark,
            share=self._shared,
            on_closed=self._on_closed,
        )

    @property
    def is_straight(self) -> bool:
        """Whether it comes from its user, past the host."""
        return self.paths is not None and self.paths.through is not self

    @property
    def user_link(self) -> Link | None:
        """Its link, None where that has gone."""
        return self.link

    def let_go(self) -> int:
        """Its streams leave it by themselves as they are resumed elsewhere."""
        return 0

    def passed(self) -> tuple[int, int]:
        """Bytes of streams that went through it."""
        return self.totals.bytes_received, self.totals.bytes_sent

    def kept_message(self, kind: int, client_id: int, proto: int, port: int, payload: bytes) -> None:
        if kind != STRAIGHT or client_id != SESSION_ID:
            super().kept_message(kind, client_id, proto, port, payload)
        elif self.link is not None and self.paths is not None and not self.is_straight:
            self.link.send_message(STRAIGHT, SESSION_ID, self.paths.offer().pack(), urgent=True)

    def entered(self, link: Link) -> None:
        super().entered(link)
        self._count()
        if self.paths is not None and isinstance(self.paths.through, DirectSession):
            self.paths.through._count()  # what went over has left that one

    def stream_over(self, stream: AnyStream) -> None:
        super().stream_over(stream)
        self._count()

    def _count(self) -> None:
        self.admission.count(DIALLED * self.stream_count)

    def link_closed(self, link: Link, code: int, reason: str) -> None:
        super().link_closed(link, code, reason)
        self._count()
        if self.paths is not None and self.is_straight:
            self.paths.straight_closed(self)
        elif self.paths is not None:
            self.paths.through_closed(code, reason)
        self._on_closed(self)

    def end(self, code: int, reason: str) -> None:
        """Close the user's link, if there still is one."""
        if self.link is not None:
            self.link.close(code, reason)

    def counts(self) -> Counter[str]:
        """What went through it."""
        return Counter(
            bytes_to_container=self.totals.bytes_received,
            bytes_to_user=self.totals.bytes_sent,
            udp_dropped=self.totals.udp_dropped,
            stalls=self.totals.stalls,
        )

    def gauges(self) -> Counter[str]:
        """What it has open now."""
        which = "straight" if self.is_straight else "sessions"
        return Counter({which: 1, "streams": self.stream_count})

"""Sessions whose streams this runner dials itself: no tunnel client takes part in them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from kohakuriver.runner.services.admission import Admission
from kohakuriver.tunnel.container_endpoint import ContainerEndpoint, Network
from kohakuriver.tunnel.link import Link
from kohakuriver.tunnel.settings import EndpointConfig

__all__ = ["DirectSession", "DirectTarget"]


@dataclass(frozen=True)
class DirectTarget:
    """What the runner dials for a task: an `address` from its own network, or ports of another `network`."""

    address: str | None = None
    network: Network | None = None


class DirectSession(ContainerEndpoint):
    """One user's link to what the runner itself reaches: the runner is the container-side endpoint."""

    def __init__(
        self,
        container: str,
        target: DirectTarget,
        *,
        port: int,
        admission: Admission,
        config: EndpointConfig | None,
        on_closed: Callable[[DirectSession], None],
    ) -> None:
        super().__init__(
            () if target.address is None else (target.address,),
            config=config,
            where="in the container" if target.address is None else f"at {target.address}",
            refuses=admission.refusal,
            default_port=port,
            network=target.network,
        )
        self.container = container
        self._on_closed = on_closed

    def link_closed(self, link: Link, code: int, reason: str) -> None:
        super().link_closed(link, code, reason)
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
        return Counter(sessions=1, streams=self.stream_count)

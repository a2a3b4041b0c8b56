"""What a stream asks of the endpoint that it belongs to: all that a stream knows of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

from kohakuriver.tunnel.protocol import ErrorText
from kohakuriver.tunnel.settings import EndpointConfig
from kohakuriver.tunnel.stream import Rules
from kohakuriver.tunnel.streams import Totals

if TYPE_CHECKING:
    from kohakuriver.tunnel.udp import HeldDatagrams

S = TypeVar("S", contravariant=True)


class TcpOwner(Protocol[S]):
    """The owner of TCP streams: what it does at the turns of a stream's life."""

    rules: Rules
    totals: Totals

    def socket_ready(self, stream: S) -> None:
        """A stream's local socket is connected."""

    def socket_gone(self, stream: S) -> None:
        """A local socket went before its stream had a link."""

    def socket_error(self, stream: S, exc: BaseException) -> ErrorText:
        """What the other end is told of a local socket that broke."""

    def window_passed(self, stream: S) -> None:
        """More came than was granted."""

    def stream_over(self, stream: S) -> None:
        """The stream is over on the wire; the socket may still be delivering."""

    def stream_detached(self, stream: S) -> None:
        """A kept stream has left its link, and waits for another."""

    def stream_answered(self, stream: S) -> None:
        """A PONG has come for it: its other end can be reached."""


class UdpOwner(Protocol[S]):
    """The owner of UDP streams."""

    config: EndpointConfig
    totals: Totals

    def stream_over(self, stream: S) -> None:
        """The stream is over."""

    def stream_detached(self, stream: S) -> None:
        """A kept stream has left its link, and waits for another."""


class UdpOpener(UdpOwner[S], Protocol[S]):
    """One that opens them."""

    @property
    def held(self) -> HeldDatagrams | None:
        """Where datagrams of local programs wait, while they do."""

    def open_udp(self, stream: S) -> bool:
        """Open a stream for a new source address; False while there is no link."""

"""What a stream asks of the endpoint that it belongs to: all that a stream knows of it."""

from __future__ import annotations

from typing import Protocol, TypeVar

from kohakuriver.tunnel.link import Link
from kohakuriver.tunnel.protocol import PROTO_TCP, ErrorText
from kohakuriver.tunnel.settings import EndpointConfig

S = TypeVar("S", contravariant=True)


class StreamOwner(Protocol[S]):
    """The owner of streams of any kind: a link, counters, and the table of ids."""

    config: EndpointConfig
    link: Link | None
    bytes_sent: int
    bytes_received: int

    def send_message(self, kind: int, client_id: int, payload: bytes = b"", proto: int = PROTO_TCP) -> None:
        """Send one message of a stream, in order with its data."""

    def stream_over(self, stream: S) -> None:
        """The id is free; the socket may still be delivering."""


class TcpOwner(StreamOwner[S], Protocol[S]):
    """The owner of TCP streams: what it reads at a time, and what it does at the turns of a stream's life."""

    read_size: int
    stalls: int
    awaits_replies: bool

    def send_limit(self, client_id: int, limit: int) -> None:
        """Send WINDOW."""

    def mark_busy(self, stream: S) -> None:
        """Note which stream sends."""

    def check_hold(self, stream: S) -> None:
        """v1: see to a stream that holds more, or less, than before."""

    def socket_ready(self, stream: S) -> None:
        """A stream's local socket is connected."""

    def socket_error(self, stream: S, exc: Exception) -> ErrorText:
        """What the other end is told of a local socket that broke."""

    def forget_waiting(self, stream: S) -> None:
        """A local socket went before its stream was opened."""

    def window_passed(self, stream: S) -> None:
        """More came than was granted."""


class UdpOwner(StreamOwner[S], Protocol[S]):
    """The owner of UDP streams."""

    udp_dropped: int


class UdpOpener(UdpOwner[S], Protocol[S]):
    """One that opens them."""

    def open_udp(self, stream: S) -> bool:
        """Open a stream for a new source address; False while there is no link."""

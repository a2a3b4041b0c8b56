"""What becomes of a request before any service hears of it: its address, who sent it, and from where. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from urllib.parse import quote

from kohakuriver.gateway.entrance import Entrance
from kohakuriver.gateway.heads import Malformed, RequestHead
from kohakuriver.gateway.names import LOOPBACK_NAMES, Place, authority
from kohakuriver.gateway.origins import refusal
from kohakuriver.gateway.pages import page, redirect

__all__ = ["Door", "Gate"]

OWN = b"/.kohakuriver/"
LOGIN = OWN + b"login"
_CODE = b"code="


@dataclass(frozen=True)
class Door:
    """One address, and the entrance to it."""

    place: Place
    entrance: Entrance

    def link(self) -> str:
        """A link that lets one browser in, once, within a minute."""
        return f"{self.place.origin}{LOGIN.decode()}?code={quote(self.entrance.code())}"


class Gate:
    """All addresses of one gateway. The exact Host decides which is meant, and nothing else does.

    Args:
        another: what to do, as a sentence, to get another link to an address.

    `revoked` is called with an address from which somebody was put out who had come in.
    """

    def __init__(self, another: Callable[[Place], str]) -> None:
        self._another = another
        self.revoked: Callable[[Place], None] = lambda place: None
        self._doors: dict[bytes, Door] = {}
        self._by_hand: frozenset[bytes] = frozenset()

    def add(self, places: Sequence[Place]) -> list[Door]:
        """Have these addresses served."""
        doors = [Door(place, Entrance(place.served_on, revoked=partial(self._revoked, place))) for place in places]
        for door in doors:
            self._doors[door.place.host.encode()] = door
        self._by_hand = frozenset(
            authority(name, door.place.served_on).encode() for name in LOOPBACK_NAMES for door in self._doors.values()
        )
        return doors

    def _revoked(self, place: Place) -> None:
        self.revoked(place)

    def judge(self, head: RequestHead, *, close: bool) -> Place | bytes:
        """The port that a request may go to; else what is answered, by a connection that ends then if `close`.

        Raises Malformed.
        """
        host = head.fields.one(b"host")
        if host is None:
            raise Malformed("There is no Host field.")
        door = self._doors.get(host.lower())
        head_only = head.method == b"HEAD"
        if door is None:
            return self._misdirected(host.lower(), close=close, head_only=head_only)
        if head.target.startswith(OWN):
            return self._own(head, door, close=close)
        if not door.entrance.admits(head.fields.named.get(b"cookie", [])):
            sentence = f"This browser has not been let in. {self._another(door.place)}"
            return page(403, sentence, close=close, head_only=head_only)
        why = refusal(head, door.place.origin.encode())
        return door.place if why is None else page(403, why, close=close, head_only=head_only)

    def _misdirected(self, host: bytes, *, close: bool, head_only: bool) -> bytes:
        """A page whose name leads here by a trick (DNS rebinding) is not told what else there is."""
        if host not in self._by_hand:
            return page(421, "Nothing is served under this name.", close=close, head_only=head_only)
        urls = sorted(door.place.url for door in self._doors.values())
        sentence = "Each port has an address of its own here:"
        return page(421, sentence, urls, close=close, head_only=head_only)

    def _own(self, head: RequestHead, door: Door, *, close: bool) -> bytes:
        path, _, query = head.target.partition(b"?")
        head_only = head.method == b"HEAD"
        if path != LOGIN or head.method != b"GET":
            return page(404, "There is no such page.", close=close, head_only=head_only)
        if door.entrance.admits(head.fields.named.get(b"cookie", [])):
            return redirect("/", b"", close=close)
        cookie = door.entrance.enter(query.removeprefix(_CODE))
        if cookie is None:
            sentence = f"This link has been used, or is older than a minute. {self._another(door.place)}"
            return page(403, sentence, close=close)
        return redirect("/", b"Set-Cookie: " + cookie + b"\r\n", close=close)

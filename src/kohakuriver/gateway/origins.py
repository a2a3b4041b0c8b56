"""What a browser says of where a request comes from, and which of them may be (Fetch Metadata, RFC 6454). No I/O.

Other pages can make a browser send requests with our cookie. What they may do is what a link may: be followed.
"""

from __future__ import annotations

from kohakuriver.gateway.heads import RequestHead, wants_websocket

__all__ = ["is_followed_link", "refusal"]

_SAFE = frozenset({b"GET", b"HEAD", b"OPTIONS"})
_OWN_SITES = frozenset({b"same-origin", b"none"})


def refusal(head: RequestHead, origin: bytes) -> str | None:
    """Why a request to `origin` is not taken, as a sentence; None where it is. Raises Malformed."""
    fields = head.fields
    own = fields.one(b"origin")
    if b"upgrade" in fields.named and wants_websocket(head):
        return None if own == origin else "A WebSocket may be opened only by a page of this same address."
    site = fields.one(b"sec-fetch-site")
    if site is None:  # an old browser, or none: such a browser tells the origin of all that may change something
        allowed = own == origin if own is not None else head.method in _SAFE
        return None if allowed else "Another page, or nobody knows who, sent this request; it is not passed on."
    if site in _OWN_SITES or is_followed_link(head):
        return None
    return "A page of another address sent this request; only a link may lead here."


def is_followed_link(head: RequestHead) -> bool:
    """Whether a person goes to the address, in a window and not in a frame of somebody's page."""
    fields = head.fields
    return (
        head.method in (b"GET", b"HEAD")
        and fields.one(b"sec-fetch-mode") == b"navigate"
        and fields.one(b"sec-fetch-dest") == b"document"
    )

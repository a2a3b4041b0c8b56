"""What becomes of a browser's request to an app: who it is, whether it may, and by which session it goes on.

How a browser gets in (docs/security.md): the app's address sets a cookie with a random state and sends the browser to
the host, which knows it, checks its right to the task, and sends it back with a code, in a form. The code is good once,
for half a minute, at this one address and with that state. What the browser then has is a cookie of this address alone.
Where an address is a path under the origin of all apps, all of that is under this path, and so are the cookies.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import secrets
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeAlias
from urllib.parse import parse_qsl, quote, urlencode

import structlog

from kohakuriver.asking import Asker, asking
from kohakuriver.errors import KohakuRiverError, UnauthenticatedError
from kohakuriver.gateway.destination import Destination
from kohakuriver.gateway.entrance import pairs_of
from kohakuriver.gateway.heads import Malformed, RequestHead, wants_websocket
from kohakuriver.gateway.origins import is_followed_link, refusal
from kohakuriver.gateway.pages import page, redirect
from kohakuriver.gateway.visit import Visit
from kohakuriver.host.apps.addresses import PREFIX_VARIABLE, Address, Addresses, climbs
from kohakuriver.host.apps.pages import form_page, link_page
from kohakuriver.host.apps.sessions import AppSession, Key, Sessions
from kohakuriver.host.apps.signed import Admission, Signed
from kohakuriver.proxies import Proxies
from kohakuriver.store.apps import Ticket
from kohakuriver.tunnel.link import soon
from kohakuriver.tunnel.user_endpoint import UserEndpoint
from kohakuriver.web.waiting_room import WaitingRoom

__all__ = ["AppGate", "state_of"]

log = structlog.get_logger("kohakuriver.host")

OWN = b"/.kohakuriver/"
BEGIN, ENTER, LINK = OWN + b"begin", OWN + b"enter", OWN + b"link"
STATE_SECONDS = 300
KEPT_SECONDS = 7 * 86400
"""How long a browser keeps an app's cookie. When its hour is over it still says that the browser has been here."""

LONGEST_PATH = 2000
LOOK_EVERY = 1.0
_COOKIE, _STATE = "kohakuriver-app", "kohakuriver-state"

Answer: TypeAlias = "Destination | bytes"


def state_of(secret: str) -> str:
    """What the host is told of the state that an address has given a browser: of no use to who has not the cookie."""
    return hashlib.sha256(secret.encode()).hexdigest()


class AppGate:
    """All apps of this host, and the browsers' connections to them.

    Args:
        sessions: the sessions by which requests go on; it is made with `put_out`.
        redeem: (a code, the address, the state of that) → what the code stands for, once. Raises UnauthenticatedError.
        opened_by: (the secret of a link, the address) → what the link opens there. Raises UnauthenticatedError.
        used: (the digest of a browser's login) → it is used now.
        proxies: whose word of where a browser is counts.
    """

    def __init__(
        self,
        addresses: Addresses,
        signed: Signed,
        redeem: Callable[[str, Address, str], Awaitable[Ticket]],
        opened_by: Callable[[str, Address], Awaitable[Ticket]],
        used: Callable[[str], Coroutine[Any, Any, None]],
        proxies: Proxies,
    ) -> None:
        self.sessions: Sessions
        self.visits: set[Visit] = set()
        self._addresses = addresses
        self._signed = signed
        self._redeem = redeem
        self._opened_by = opened_by
        self._used = used
        self._proxies = proxies
        self._rooms: dict[Visit, WaitingRoom] = {}
        self._noting: set[asyncio.Task[None]] = set()
        self._timer = asyncio.get_running_loop().call_later(LOOK_EVERY, self._look)

    # -- connections -------------------------------------------------------------------------------------------

    def visit(self, room: WaitingRoom) -> Visit:
        """The protocol of a connection, which waits in `room` while it has no request under way."""
        visit = Visit(self)
        self._rooms[visit] = room
        return visit

    def waits(self, visit: Visit, *, waits: bool) -> None:
        """A browser has no request under way, or has one."""
        room = self._rooms.get(visit)
        if room is None:
            return
        if waits and visit in self.visits:
            room.enter(visit, visit.abort)
        else:
            room.leave(visit)
        if visit not in self.visits:
            del self._rooms[visit]

    def now(self) -> float:
        """The loop's time, in seconds."""
        return asyncio.get_running_loop().time()

    def put_out(self, endpoint: UserEndpoint) -> None:
        """End the connections that use an endpoint."""
        for visit in list(self.visits):
            if visit.destination is not None and visit.destination.endpoint is endpoint:
                soon(visit.abort)  # one of them may be asking at this moment

    def _look(self) -> None:
        now = self.now()
        used = set()
        for visit in list(self.visits):
            visit.overdue(now)
            if visit.destination is not None:
                used.add(visit.destination.endpoint)
        self.sessions.close_unused(used)
        self._timer = asyncio.get_running_loop().call_later(LOOK_EVERY, self._look)

    async def close(self) -> None:
        """End all connections and sessions."""
        self._timer.cancel()
        await self.sessions.close()
        for visit in list(self.visits):
            visit.reset()

    # -- requests ----------------------------------------------------------------------------------------------

    def takes_form(self, head: RequestHead) -> bool:
        """Whether a request's body is for the host."""
        host = head.fields.one(b"host") or b""
        address = self._addresses.read(host.decode("latin-1"), head.target)
        return address is not None and address.place.path(head.target).startswith(OWN)

    def judge(self, visit: Visit, head: RequestHead, form: bytes, *, close: bool) -> Answer | Awaitable[Answer]:
        """Where a request may go, or what is answered; or what tells. Raises Malformed."""
        host = head.fields.one(b"host")
        if host is None:
            raise Malformed("There is no Host field.")
        if self._proxies:
            told = [each.decode("latin-1") for each in head.fields.named.get(b"x-forwarded-for", ())]
            visit.peer = self._proxies.client(visit.neighbour, told)
        address = self._addresses.read(host.decode("latin-1"), head.target)
        if address is None:
            return self._nowhere(host.decode("latin-1"), close=close, head_only=head.method == b"HEAD")
        asked = _Asked(visit, head, address, close)
        if address.prefix and climbs(head.target):
            return asked.page(400, "A path here has no part that is '.' or '..'.")
        if address.prefix and not asked.path.startswith(b"/"):  # else what is relative in a page would be beside it
            return asked.redirect(f"{address.home}{asked.path.decode('latin-1')}")
        if asked.path.startswith(OWN):
            return self._own(asked, form)
        admission = self._admission(asked) if address.tag else None
        if admission is None or not (self._signed.is_good(admission) or admission.by_link):
            return self._stranger(asked, was_here=admission is not None)
        why = refusal(head, address.place.origin.encode())
        if why is not None:
            return asked.page(403, why)
        # Of a link whose hour is over it is asked whether it is good, as if its browser came with it again.
        session = self.sessions.get(_key(admission)) if self._signed.is_good(admission) else None
        if session is not None:
            return self._destination(asked, admission, session)
        return _told(asked, self._open(asked, admission))

    def _nowhere(self, host: str, *, close: bool, head_only: bool) -> bytes:
        if self._addresses.have_prefixes and self._addresses.owns(host):
            sentence = (
                "No port of a task is at this path. An app that asks for paths outside of its own has to be told its "
                f"prefix, which is in the variable {PREFIX_VARIABLE}, or by X-Forwarded-Prefix."
            )
            return page(404, sentence, close=close, head_only=head_only)
        return page(421, "Nothing is served under this name.", close=close, head_only=head_only)

    def _admission(self, asked: _Asked) -> Admission | None:
        """What the browser's cookie says; None where it has none for this very address, or several that differ."""
        shown = asked.cookie(_COOKIE)
        admission = None if shown is None else self._signed.admission(shown)
        return admission if admission is not None and admission.address == asked.address.key else None

    async def _open(self, asked: _Asked, admission: Admission) -> Answer:
        try:
            return self._destination(asked, admission, await self.sessions.opened(_key(admission), asked.asker()))
        except UnauthenticatedError as error:
            if admission.by_link:  # the host itself is none of its business
                return asked.page(401, error.message, _set_cookie(asked.address, _COOKIE, "", 0))
            return self._stranger(asked, was_here=True)
        except KohakuRiverError as error:
            return asked.page(error.status if error.status >= 400 else 500, error.message)

    def _destination(self, asked: _Asked, admission: Admission, session: AppSession) -> Destination:
        more = b""
        if self._signed.is_old(admission):
            more = self._cookie(asked.address, _ticket(admission), by_link=admission.by_link)
            noting = asyncio.get_running_loop().create_task(self._used(admission.browser))
            self._noting.add(noting)
            noting.add_done_callback(self._noted)
        place = asked.address.places[session.preserve_host, session.keep_prefix]
        return Destination(place, session.endpoint, lambda: session.trouble, more, session.pace, session.places)

    def _noted(self, task: asyncio.Task[None]) -> None:
        self._noting.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("that a browser is used can't be written down", reason=str(error))

    def _cookie(self, address: Address, ticket: Ticket, *, by_link: bool) -> bytes:
        value = self._signed.admit(address.key, *ticket, by_link=by_link)
        return _set_cookie(address, _COOKIE, value, KEPT_SECONDS)

    # -- the way in --------------------------------------------------------------------------------------------

    def _stranger(self, asked: _Asked, *, was_here: bool) -> bytes:
        """A browser that is not let in: one that a person goes somewhere with is sent to the host.

        On one's own machine only one that has been here is: what the host is called there is not for apps to know.
        """
        if not asked.goes_there:
            return asked.page(401, "This browser has not been let in here, or not lately; open the address anew.")
        if not asked.address.tag:
            there = f"/open/{quote(asked.address.label)}/{asked.address.port}"
            return asked.redirect(self._addresses.main(asked.address) + there)
        if self._addresses.on_own_machine and not was_here:
            task, port = asked.address.label, asked.address.port
            return asked.page(
                403, f"This browser has not been let in. `kohakuriver open {task} {port} --at-host` does that."
            )
        return self._to_host(asked, asked.head.target.decode("latin-1"))

    def _to_host(self, asked: _Asked, path: str) -> bytes:
        """Send a browser to the host, to come back with a code; then it goes to `path`."""
        secret = secrets.token_urlsafe(32)
        path = path if len(path) <= LONGEST_PATH else asked.address.home
        kept = f"{secret}.{base64.urlsafe_b64encode(path.encode('latin-1')).decode().rstrip('=')}"
        query = urlencode({"app": asked.address.key, "state": state_of(secret)})
        cookie = _set_cookie(asked.address, _STATE, kept, STATE_SECONDS)
        return asked.redirect(f"{self._addresses.main(asked.address)}/enter-app?{query}", cookie)

    def _own(self, asked: _Asked, form: bytes) -> bytes | Awaitable[Answer]:
        path, _, query = asked.path.partition(b"?")
        if path == BEGIN and asked.head.method == b"GET":
            shown = dict(parse_qsl(query.decode("latin-1"))).get("ticket", "")
            if self._signed.begins(shown, asked.address.key):
                return self._to_host(asked, asked.address.home)
            return asked.page(403, "This link is older than half a minute: open the port again on the host's page.")
        if path == ENTER and asked.head.method == b"POST" and asked.address.tag:
            return self._enter(asked, form)
        if path == LINK and asked.head.method in (b"GET", b"POST") and asked.address.tag:
            return self._link(asked, form)
        return asked.page(404, "There is no such page.")

    def _link(self, asked: _Asked, form: bytes) -> bytes | Awaitable[Answer]:
        """A browser comes by a link; what is secret in it is sent by a page of this very address."""
        if asked.head.method == b"GET":
            return asked.html(*link_page(asked.own(LINK), asked.address.place.origin))
        why = refusal(asked.head, asked.address.place.origin.encode())
        return asked.page(403, why) if why is not None else _told(asked, self._came_by_link(asked, form))

    async def _came_by_link(self, asked: _Asked, form: bytes) -> Answer:
        secret = dict(parse_qsl(form.decode("latin-1"), max_num_fields=8)).get("code", "")
        try:
            with asking(asked.asker()):
                ticket = await self._opened_by(secret.rpartition("#")[2].strip(), asked.address)
        except KohakuRiverError as error:
            return asked.page(error.status, error.message)
        return asked.redirect(asked.address.home, self._cookie(asked.address, ticket, by_link=True))

    def _enter(self, asked: _Asked, form: bytes) -> bytes | Awaitable[Answer]:
        """A browser comes with a code.

        The form is sent once more, by a page of this very address: only then does a browser send the state's cookie.
        """
        code = dict(parse_qsl(form.decode("latin-1"), max_num_fields=8)).get("code", "")
        kept = asked.cookie(_STATE)
        if kept is not None:
            return _told(asked, self._redeemed(asked, code, kept))
        site = asked.head.fields.one(b"sec-fetch-site")
        if site == b"same-origin" or not code.isascii() or not 0 < len(code) < 100:
            return asked.page(403, "This browser has kept nothing of how it was sent here: open the address anew.")
        origin = asked.address.place.origin
        text, fields = form_page(asked.own(ENTER), origin, code, referrer="same-origin")
        return asked.html(text, fields)

    async def _redeemed(self, asked: _Asked, code: str, kept: str) -> Answer:
        secret, _, path = kept.partition(".")
        clear = _set_cookie(asked.address, _STATE, "", 0)
        try:
            with asking(asked.asker()):
                ticket = await self._redeem(code, asked.address, state_of(secret))
        except KohakuRiverError as error:
            return asked.page(error.status, error.message, clear)
        cookie = self._cookie(asked.address, ticket, by_link=False)
        return asked.redirect(_own_path(path, asked.address), cookie + clear)


class _Asked:
    """One request, at an address that there is."""

    def __init__(self, visit: Visit, head: RequestHead, address: Address, close: bool) -> None:
        self.head = head
        self.address = address
        self.path = address.place.path(head.target)
        self._visit = visit
        self._close = close

    def own(self, page: bytes) -> str:
        """The path of a page of ours at this address."""
        return f"{self.address.prefix}{page.decode()}"

    @property
    def goes_there(self) -> bool:
        """Whether a person goes to the address with it."""
        fields = self.head.fields
        if self.head.method not in (b"GET", b"HEAD") or wants_websocket(self.head):
            return False
        if fields.one(b"sec-fetch-site") is not None:
            return is_followed_link(self.head)
        return any(b"text/html" in accept for accept in fields.named.get(b"accept", ()))

    def cookie(self, name: str) -> str | None:
        """One of ours. Where several came that differ none counts: one is somebody's who wants to be taken for us."""
        own = _named(self.address, name).encode()
        values = {value for key, value in pairs_of(self.head.fields.named.get(b"cookie", [])) if key == own and value}
        return values.pop().decode("latin-1") if len(values) == 1 else None

    def asker(self) -> Asker:
        """Who asks, for limits and the audit log."""
        address, port = self._visit.peer
        method = self.head.method.decode("latin-1")
        return Asker(f"{address}:{port}", f"{method} {self.address.place.base}", {"via": "browser"})

    def page(self, status: int, sentence: str, fields: bytes = b"") -> bytes:
        head_only = self.head.method == b"HEAD"
        return page(status, sentence, close=self._close, head_only=head_only, fields=fields)

    def redirect(self, where: str, fields: bytes = b"") -> bytes:
        return redirect(where, fields, close=self._close)

    def html(self, text: str, fields: dict[str, str]) -> bytes:
        body = text.encode()
        lines = ["HTTP/1.1 200 OK", "Content-Type: text/html; charset=utf-8", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in fields.items()]
        lines += ["Connection: close"] if self._close else []
        return "\r\n".join([*lines, "", ""]).encode() + body


async def _told(asked: _Asked, answer: Awaitable[Answer]) -> Answer:
    """An answer, or that this host has a fault: nobody else would hear of it."""
    try:
        return await answer
    except Exception:
        log.exception("a browser's request to an app failed", address=asked.address.key)
        return asked.page(500, "The host failed at this request; its log says why.")


def _ticket(admission: Admission) -> Ticket:
    return Ticket(admission.browser, admission.task_id, admission.port)


def _key(admission: Admission) -> Key:
    return Key(admission.browser, admission.task_id, admission.port)


def _named(address: Address, name: str) -> str:
    """What a cookie of ours is called: under TLS no other name in the domain can set it, else the port is part of it.

    Browsers send cookies to all ports of a name. With a path of its own it can't be called so, but it is sent to no
    other app.
    """
    if address.scheme == "https":
        return f"__Secure-{name}" if address.prefix else f"__Host-{name}"
    return f"{name}-{address.served_on}"


def _set_cookie(address: Address, name: str, value: str, seconds: int) -> bytes:
    secure = "; Secure" if address.scheme == "https" else ""
    about = f"Max-Age={seconds}; Path={address.home}; HttpOnly; SameSite=Lax{secure}"
    field = f"{_named(address, name)}={value}; {about}"
    return f"Set-Cookie: {field}\r\n".encode()


def _own_path(kept: str, address: Address) -> str:
    """The path that a state's cookie says; the first one for what is none of this very address."""
    try:
        path = base64.urlsafe_b64decode(kept + "=" * (-len(kept) % 4)).decode("ascii")
    except (binascii.Error, ValueError):
        return address.home
    plain = path.startswith(address.home) and not path.startswith("//") and "\\" not in path
    plain = plain and not (address.prefix and climbs(path.encode()))
    return path if plain and all(" " < letter < "\x7f" for letter in path) else address.home

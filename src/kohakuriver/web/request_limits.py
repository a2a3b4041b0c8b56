"""How long a peer may take for an HTTP request, and how large it may be; a WebSocket's opening handshake is one.

uvicorn itself waits for ever for the rest of a request, and keeps all of it (docs/guide/limits.md). No more of a body
is read than came with its head until somebody asks for it, which is after the credential was looked at (`web/app.py`).
"""

from __future__ import annotations

import asyncio
import http
import json
from collections.abc import Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from kohakuriver.errors import UnavailableError
from kohakuriver.fair_turns import FairTurns
from kohakuriver.limits import Limits
from kohakuriver.web.waiting_room import WaitingRoom

__all__ = [
    "SHARES",
    "Body",
    "BodyBudget",
    "GuardedHttp",
    "body_is_of_a_node",
    "body_is_of_a_user",
    "guarded",
    "letting_go",
]

LINGER_SECONDS = 1.0

MAX_FIELDS = 100
"""Headers of a request: each costs more than its bytes, here and wherever they are looked through."""

STARTED_AT_ONCE = 8
"""Requests that are begun in one turn of the event loop: some 3 ms of work.

Hundreds of connections may each bring one at the same time, and the streams that pass through here would wait for all.
"""

BEGUN_AHEAD = 2
"""Requests for paths that go ahead that are begun in a turn besides."""

MAX_AHEAD = 8
"""Requests that may come on a connection before the ones ahead of them are answered (RFC 9112, section 9.3.2)."""

LARGE_ANSWER = 64 << 10
"""Bytes of an answer that is counted: a list of many tasks is longer."""

CHUNKS_FREE, BYTES_A_CHUNK = 1024, 64
"""Chunks that the body of a request may have, and how many bytes of it give it another: of one byte each 1 MiB is a
million, each of which costs as much as a large one, and those that came with a head are there before anybody was asked
for a credential."""

SMALL_BODY = 64 << 10
"""Bytes of a body that is let in a little longer than others, as those of heartbeats are."""


class _Refused(Exception):
    """Ends the parser's work on a request; the answer is known."""


SHARES = 4
"""A user's bodies together may have this part of what all have, and one of the largest in any case."""


class BodyBudget:
    """What the bodies of all requests under way in this process may hold together.

    `most` is in bytes, and so is `share`, which is one user's part of it.
    """

    def __init__(self, most: int, share: int) -> None:
        self._most = most
        self._share = share
        self._held = 0
        self._held_of: dict[str, int] = {}

    @classmethod
    def within(cls, limits: Limits) -> BodyBudget:
        """The one of a program."""
        return cls(limits.max_bodies, max(limits.max_bodies // SHARES, limits.max_body))

    def hold(self, count: int, user: str | None) -> None:
        """So many bytes more, or less, of this user's, if one is known."""
        self._held += count
        if user is not None:
            held = self._held_of.get(user, 0) + count
            if held:
                self._held_of[user] = held
            else:
                self._held_of.pop(user, None)

    def fits(self, body: Body) -> bool:
        """Whether a body may have what it has.

        Small ones may also where large ones have taken all, and a quarter more; of nodes all may, and another quarter:
        no node is silent because users ask for much.
        """
        quarters = 6 if body.of_node else 5 if body.size <= SMALL_BODY else 4
        return self._held <= self._most * quarters // 4

    def has_room_for_answer(self, size: int, user: str) -> bool:
        """Whether this user may have an answer of so many bytes under way besides. Any alone may, however long."""
        held = self._held_of.get(user, 0)
        return not held or (held + size <= self._share and self._held + size <= self._most)

    def fits_its_user(self, body: Body) -> bool:
        """Whether all bodies of its user together may have what they have."""
        return body.user is None or self._held_of.get(body.user, 0) <= self._share


class Body:
    """What one request's body holds, from its first byte to the end of the work on the request.

    `answers` is what the answers to users' requests may hold, which are not read yet.
    """

    def __init__(self, budget: BodyBudget, answers: BodyBudget) -> None:
        self.answers = answers
        self.size = 0
        self.worked_on = False
        self.user: str | None = None
        self.of_node = False
        self.budget = budget

    def take(self, count: int) -> None:
        """Hold so many bytes more."""
        self.size += count
        self.budget.hold(count, self.user)

    def let_go(self) -> None:
        """Hold nothing any more."""
        self.budget.hold(-self.size, self.user)
        self.size = 0

    def belongs_to(self, user: str) -> None:
        """What it holds and will hold is of this user's share."""
        self.budget.hold(-self.size, self.user)
        self.user = user
        self.budget.hold(self.size, user)


def body_is_of_a_user(scope: Scope, user: str) -> None:
    """Have the body of a request be of the share of the user who asks, before any more of it is read.

    Raises UnavailableError "too_many_requests" (429) where that is used up.
    """
    body: Body | None = scope.get("state", {}).get(_BODY)
    if body is not None:
        body.belongs_to(user)
        if not body.budget.fits_its_user(body):
            raise UnavailableError(_TOO_MUCH_OF_A_USER, code="too_many_requests", status=429)


def body_is_of_a_node(scope: Scope) -> None:
    """Have the body of a request be let in where those of users have taken all that there is for them."""
    body: Body | None = scope.get("state", {}).get(_BODY)
    if body is not None:
        body.of_node = True


_TOO_MUCH_OF_A_USER = "Your requests that are under way have as many bytes as one user's may; try again in a moment."
_UNREAD = "Answers to you that are not read yet have as many bytes as one user's may; read them, and ask again."
_TOO_MUCH_OF_ALL = "This program holds as many bytes of requests as it may; try again in a moment."


def letting_go(app: ASGIApp) -> ASGIApp:
    """`app`, which holds a request's body as long as it works on the request, be the peer gone already."""

    async def work(scope: Scope, receive: Receive, send: Send) -> None:
        body: Body | None = scope.get("state", {}).get(_BODY)
        if body is None:
            await app(scope, receive, send)
            return
        body.worked_on, answer = True, _Answer(body, send)
        try:
            await app(scope, receive, answer)
        finally:
            body.let_go()
            answer.let_go()

    return work


class _Answer:
    """Passes an answer on. The work on a large one goes on until it is read, and it is of its user's share until then.

    uvicorn takes all of a body at once, and calls the work done: who asks again and again and reads nothing would have
    the program hold any number of them.
    """

    def __init__(self, body: Body, send: Send) -> None:
        self._body = body
        self._send = send
        self._held = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            length = next(
                (int(value) for name, value in message.get("headers", ()) if name.lower() == b"content-length"), 0
            )
            if self._body.user is not None and length > LARGE_ANSWER:
                if not self._body.answers.has_room_for_answer(length, self._body.user):
                    await self._refuse()
                    return
                self._hold(length)
        elif self._held:
            await self._send({**message, "more_body": True})
            message = {**message, "body": b""}  # before this one uvicorn waits until most of what came before is read
        await self._send(message)

    def let_go(self) -> None:
        """It is read, or its reader is gone."""
        self._hold(-self._held)

    def _hold(self, size: int) -> None:
        self._held += size
        self._body.answers.hold(size, self._body.user)

    async def _refuse(self) -> None:
        content = json.dumps({"error": "too_many_requests", "message": _UNREAD}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
        await self._send({"type": "http.response.start", "status": 429, "headers": [*headers, (b"retry-after", b"1")]})
        await self._send({"type": "http.response.body", "body": content})
        self._send = _drop


async def _drop(_message: Message) -> None:
    """What follows on an answer that was refused."""


_BODY = "kohakuriver.body"
_CREDENTIALS = (b"authorization", b"cookie")


class GuardedHttp(HttpToolsProtocol):
    """uvicorn's HTTP protocol with limits."""

    limits = Limits()
    room: WaitingRoom
    budget: BodyBudget
    answers: BodyBudget
    turns: FairTurns
    turns_ahead: FairTurns
    ahead: Callable[[str], bool]

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._clock: asyncio.TimerHandle | None = None
        self._refusal: tuple[int, str, str] | None = None
        self._in_head = True
        self._fed = self._head = self._body = 0
        self._chunked = False
        self._pieces = 0  # of a chunked body
        self._completed = False
        self._bodies: list[Body] = []
        self._unanswered: list[Any] = []

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        self.room.leave(self)
        for body in self._bodies:
            if not body.worked_on:
                body.let_go()
        self._forsake()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Begin the end, as the server does; an idle connection is over at once."""
        super().shutdown()
        if self.transport.is_closing():
            self._abort_soon()

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None:
            return
        self._completed = False
        super().data_received(data)
        if self._completed or self._refusal is not None:
            return
        # The request is incomplete, so the clock runs; empty lines between two requests do not stop it.
        self._start_clock()
        if self._in_head:  # the parser tells of a header only when all of it is there
            self._fed += len(data)
            if self._fed > self.limits.max_header:
                self._refuse_head()
                self._answer()

    # -- the parser's callbacks --------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._in_head = True
        self._fed = self._head = self._body = self._pieces = 0
        self._start_clock()
        super().on_message_begin()
        self._bodies = [body for body in self._bodies if body.size]
        self._bodies.append(Body(self.budget, self.answers))
        self.scope["state"][_BODY] = self._bodies[-1]

    def on_url(self, url: bytes) -> None:
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_head(len(name) + len(value))
        if len(self.headers) >= MAX_FIELDS:
            self._refusal = 431, "too_large", f"A request may have at most {MAX_FIELDS} headers."
            raise _Refused
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head = False
        before: Any = self.cycle
        super().on_headers_complete()
        if self.cycle is not before:
            self._unanswered = [cycle for cycle in self._unanswered if not cycle.response_complete]
            self._unanswered.append(self.cycle)
        if len(self.pipeline) > MAX_AHEAD:
            self._refusal = 400, "bad_request", f"At most {MAX_AHEAD} requests may come before the first is answered."
            raise _Refused
        if any(name in (b"content-length", b"transfer-encoding") for name, _ in self.headers):
            self.flow.pause_reading()  # until whoever works on the request asks for its body
            # Some of it may be here already. Whoever turns out to be no node is refused, and then holds nothing.
            self._bodies[-1].of_node = self.ahead(self.scope["path"])
        self._chunked = any(name == b"transfer-encoding" for name, _ in self.headers)

    def on_body(self, body: bytes) -> None:
        self._body += len(body)
        if self._body > self.limits.max_body:
            self._refusal = 413, "too_large", f"The body of a request may have at most {self.limits.max_body} bytes."
            raise _Refused
        if self._chunked:
            self._pieces += 1
            if self._pieces > CHUNKS_FREE + self._body // BYTES_A_CHUNK:
                self._refusal = 400, "bad_request", "The chunks of this request's body are too small; send larger ones."
                raise _Refused
        if not self.cycle.response_complete:
            self._hold(len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._completed = True
        self._stop_clock()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._clock is None and not self.transport.is_closing():
            self.room.enter(self, self._dismiss)  # until its next request, or the end of uvicorn's patience

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls when the parser stops, be it for one of ours."""
        self._refusal = self._refusal or (400, "bad_request", "This is not an HTTP request.")
        self._answer()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        def start() -> bool:
            if cycle.disconnected:
                return False
            super(GuardedHttp, self)._start_asgi_task(cycle, app)
            return True

        # What goes ahead waits for its like alone: a node is not silent because a user has thousands of questions.
        # Strangers can make tokens up for that, and not where they come from. Whose the others are is what they show,
        # good or not.
        if self.ahead(cycle.scope["path"]):
            client = cycle.scope["client"]
            self.turns_ahead.begin(start, client[0] if client else "")
        else:
            shown = (value for name, value in cycle.scope["headers"] if name in _CREDENTIALS)
            self.turns.begin(start, next(shown, b""))

    # -- the limits --------------------------------------------------------------------------------------------

    def _count_head(self, size: int) -> None:
        self._head += size
        if self._head > self.limits.max_header:
            self._refuse_head()
            raise _Refused

    def _hold(self, count: int) -> None:
        body = self._bodies[-1]
        body.take(count)
        if not self.budget.fits_its_user(body):
            self._refusal = 429, "too_many_requests", _TOO_MUCH_OF_A_USER
        elif not self.budget.fits(body):
            self._refusal = 503, "busy", _TOO_MUCH_OF_ALL
        if self._refusal is not None:
            raise _Refused

    def _refuse_head(self) -> None:
        self._refusal = 431, "too_large", f"The head of a request may have at most {self.limits.max_header} bytes."

    def _start_clock(self) -> None:
        if self._clock is None:
            self._clock = self.loop.call_later(self.limits.handshake_timeout, self.too_slow)
            self.room.enter(self, self._dismiss)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None
            self.room.leave(self)

    def _dismiss(self) -> None:
        """Others wait, too, and this one has done so for longest."""
        self._stop_clock()
        self.transport.abort()

    def too_slow(self) -> None:
        """The request is not there in time."""
        self._stop_clock()
        if self.flow.read_paused:  # it is us who don't read
            self._start_clock()
            return
        seconds = self.limits.handshake_timeout
        self._refusal = 408, "timed_out", f"A request must be here whole within {seconds:g} s."
        self._answer()

    def _answer(self) -> None:
        """Answer with an error unless another answer has begun, and end the connection."""
        assert self._refusal is not None
        self._stop_clock()
        status, code, message = self._refusal
        under_way = any(cycle.response_started and not cycle.response_complete for cycle in self._unanswered)
        cycle: Any = self.cycle  # None before the first request
        answered = cycle is not None and cycle.response_complete and not self._in_head
        if not under_way and not answered:
            content = json.dumps({"error": code, "message": message}).encode()
            head = (
                f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(content)}\r\nX-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n"
            )
            self.transport.write(head.encode() + content)
        self._forsake()
        self._close_gently()

    def _forsake(self) -> None:
        """Nobody gets the answers to what came on this connection: nothing more of it is begun, or sent."""
        self.pipeline.clear()
        for cycle in self._unanswered:
            cycle.disconnected = True  # uvicorn tells the last one alone
        self._unanswered.clear()

    def _close_gently(self) -> None:
        """Close, and for a moment read and forget what the peer still sends: on top of that a close is a reset, and
        the peer might never see the answer."""
        if self.transport.is_closing() or not self.transport.can_write_eof():
            self.transport.close()
        else:
            self.transport.write_eof()
            self.flow.resume_reading()
            self.room.enter(self, self.transport.abort)
        self._abort_soon()

    def _abort_soon(self) -> None:
        # With TLS a close waits for the peer's. Who is slow with a request may be slow with that, and a client that
        # keeps a connection for later does not read it.
        self.loop.call_later(LINGER_SECONDS, self.transport.abort)


def guarded(
    limits: Limits, room: WaitingRoom, budget: BodyBudget, ahead: Callable[[str], bool]
) -> type[asyncio.Protocol]:
    """The class for `uvicorn.Config(http=…)` that keeps to `limits`; who has no request under way waits in `room`.

    The bodies of all its requests share `budget`, and large answers to them as much again; the application is the one
    that `letting_go` gives. `ahead` says of a path whether requests for it are begun ahead of all others.
    """
    budgets = {"budget": budget, "answers": BodyBudget.within(limits)}
    turns = {"turns": FairTurns(STARTED_AT_ONCE), "turns_ahead": FairTurns(BEGUN_AHEAD), "ahead": staticmethod(ahead)}
    return type("LimitedHttp", (GuardedHttp,), {"limits": limits, "room": room, **budgets, **turns})

"""A forward: local ports that lead to ports of one task, kept open for as long as the task is there.

`Forwarder` is what the command line runs, and what Python code gets through `client.api`. A forward binds its local
addresses first, then opens its one session. From then on it never ends because a stream, a tunnel or the
session's link breaks: it opens a new session, with backoff and jitter. Sources: docs/cli.md, docs/protocol.md §4.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from kohakuriver.client.events import Event
from kohakuriver.client.hosts import Hosts
from kohakuriver.client.local_side import LocalSide
from kohakuriver.client.ports import (
    LOOPBACK,
    LOOPBACKS,
    SOCKS,
    PortForward,
    PortSpec,
    check_distinct,
    exposes,
    parse_port,
)
from kohakuriver.client.socks import SocksServer
from kohakuriver.client.straight import PathChoice, PathTaken, StraightPath
from kohakuriver.config import Settings, path_segment
from kohakuriver.errors import (
    KohakuRiverError,
    NotAllowedError,
    NotFoundError,
    UnavailableError,
    UsageError,
)
from kohakuriver.runtime import DescriptorWatch, cancel_all, file_limit, out_of_descriptors
from kohakuriver.text import one_line
from kohakuriver.tunnel.backoff import Backoff
from kohakuriver.tunnel.dial import open_session
from kohakuriver.tunnel.endpoint import EndpointStats
from kohakuriver.tunnel.link import Link
from kohakuriver.tunnel.local_listeners import ListeningSocket
from kohakuriver.tunnel.opener import KeptStreams
from kohakuriver.tunnel.ports import GOES_ON, ports_query
from kohakuriver.tunnel.protocol import CloseCode, ErrorText
from kohakuriver.tunnel.settings import endpoint_config, resume_for
from kohakuriver.tunnel.user_endpoint import UserEndpoint, delivered
from kohakuriver.unix_sockets import address_of

__all__ = [
    "LOOPBACK",
    "LOOPBACKS",
    "STOPPED",
    "Closed",
    "Connected",
    "Event",
    "Forwarder",
    "Gone",
    "Listening",
    "Moved",
    "NotListening",
    "Notice",
    "OutOfDescriptors",
    "PathChoice",
    "PathTaken",
    "PortForward",
    "PortSpec",
    "Reconnecting",
    "Resumed",
    "Stats",
    "StreamError",
    "exposes",
    "parse_port",
]

RETRY_BASE = 0.2
RETRY_CAP = 5.0
# A host that is started again is back within seconds, and connections wait for it: so long it is tried more often.
EAGER_SECONDS = 60.0
EAGER_CAP = 1.0
# The longest pause between two tries to leave a host that is going, in seconds.
MOVE_CAP = 1.0
# Seconds over which a rate is measured at least, however often it is asked for.
RATED_OVER = 0.5

# How often it is looked whether this process can still open a file, in seconds.
DESCRIPTORS_EVERY = 1.0
# With so few files left for other streams it is looked at each new one: a rush may be over within a second.
DESCRIPTORS_LEFT = 128
# How often a service that doesn't listen yet is tried, and how often it is looked whether it does, in seconds.
KNOCK_EVERY = 0.2
KNOCK_POLL = 0.02

# What a host says of a task that has ended: its connections have, too.
NOT_RUNNING = "task_not_running"

ANY_PORT = 1
"""What stands in the path of a session that is for whatever ports will be wanted."""

STOPPED = "stopped"
"""Why a forward is over that was told to end."""


@dataclass(frozen=True)
class Connected(Event):
    """The session is open. `version` is the tunnel protocol's, 1 or 2."""

    event: ClassVar[str] = "connected"
    task: str
    version: int


@dataclass(frozen=True)
class Listening(Event):
    """A local port leads to the task's port. `instead_of` is the one that was wanted, where that can't be had.

    Of a Unix socket there is `local_path`, and neither host nor port. With a `remote_host` it leads to that one's port,
    with a `remote_path` to the Unix socket there in the task.
    """

    event: ClassVar[str] = "listening"
    local_host: str
    local_port: int
    remote_port: int
    proto: str
    instead_of: int | None = None
    local_path: str | None = None
    remote_host: str | None = None
    remote_path: str | None = None

    @classmethod
    def of(cls, at: ListeningSocket) -> Listening:
        """The event for a local address."""
        return cls(at.host, at.port, at.remote_port, at.proto, at.instead_of, at.path, at.remote_host, at.remote_path)

    def to_json(self) -> dict[str, Any]:
        without = {"local_path"} if self.local_path is None else {"local_host", "local_port"}
        without |= {"instead_of"} if self.instead_of is None else set()
        without |= {"remote_port"} if self.proto == SOCKS or self.remote_path is not None else set()
        without |= {name for name in ("remote_host", "remote_path") if getattr(self, name) is None}
        return {name: value for name, value in super().to_json().items() if name not in without}


@dataclass(frozen=True)
class Gone(Event):
    """A local port leads there no longer: nothing listens on the task's port any more. What is open goes on."""

    event: ClassVar[str] = "gone"
    local_host: str
    local_port: int
    remote_port: int
    proto: str

    @classmethod
    def of(cls, at: ListeningSocket) -> Gone:
        """The event for a local address."""
        return cls(at.host, at.port, at.remote_port, at.proto)


@dataclass(frozen=True)
class NotListening(Event):
    """One of the loopback addresses can't be had; the forward works on the other. `reason` is a sentence."""

    event: ClassVar[str] = "not_listening"
    local_host: str
    local_port: int
    reason: str


@dataclass(frozen=True)
class OutOfDescriptors(Event):
    """This process may open no more files: `waiting` local connections wait until others have ended.

    With uvloop none does: it resets them.
    """

    event: ClassVar[str] = "out_of_descriptors"
    waiting: int


@dataclass(frozen=True)
class Reconnecting(Event):
    """The session is lost, and will be opened again in `delay` seconds. `waiting` connections wait for that.

    `lost` is "host", or "task" where the host is there and told the reason: what lies behind it went.
    """

    event: ClassVar[str] = "reconnecting"
    reason: str
    delay: float
    waiting: int = 0
    lost: Literal["host", "task"] = "host"

    @property
    def what(self) -> str:
        """What was lost, as the beginning of a sentence."""
        return "Connection to the host lost" if self.lost == "host" else f"{self.reason[:1].upper()}{self.reason[1:]}"


@dataclass(frozen=True)
class Resumed(Event):
    """The session is open again, after `seconds`, and `waiting` connections that waited go on."""

    event: ClassVar[str] = "resumed"
    task: str
    version: int
    waiting: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Moved(Event):
    """Another session has taken the place of one that still stood, for a reason: `connections` go on over it."""

    event: ClassVar[str] = "moved"
    task: str
    version: int
    reason: str
    connections: int


@dataclass(frozen=True)
class StreamError(Event):
    """One stream could not be opened, or failed; all others go on."""

    event: ClassVar[str] = "stream_error"
    remote_port: int
    message: str


@dataclass(frozen=True)
class Stats(Event):
    """Totals since the forward began; `streams` is the number open now. Bytes are as seen from here.

    `udp_dropped` counts datagrams, `stalls` how often a stream had to wait for the task's window, and
    `unknown_messages` what a newer peer sent. The rates are bytes a second since a while ago, a second or so. `direct`
    is 1 while connections go past the host; of several forwards together it is how many do.
    """

    event: ClassVar[str] = "stats"
    streams: int
    opened: int
    bytes_sent: int
    bytes_received: int
    udp_dropped: int
    stalls: int
    unknown_messages: int
    sent_per_second: int = 0
    received_per_second: int = 0
    direct: int = 0


@dataclass(frozen=True)
class Notice(Event):
    """The task's node has something to say to whoever is connected: that the task is about to be stopped, say."""

    event: ClassVar[str] = "notice"
    message: str


@dataclass(frozen=True)
class Closed(Event):
    """The forward is over."""

    event: ClassVar[str] = "closed"
    reason: str


class Forwarder:
    """One forward: its local listeners, its session, and what brings the session back.

    `task` is a numeric id or a unique name. `start`, then `wait` for its end, then `close`. With `patience`, `start`
    waits so many seconds for somebody to listen on the TCP ports in the task. With `resume`, connections outlive a
    session that is lost. With `fallback`, the next free local port is taken where one is not free. With `any_port` the
    session may reach all ports of the task, and none need be given (`every_port`). `path` is the setting of this name:
    whether connections go past the host, to the task's node itself. Raises UsageError for another one, and for "direct"
    without `resume`.

    Large because everything that can happen to its listeners and to the links that it may be on is decided here.
    """

    def __init__(
        self,
        task: str,
        ports: Sequence[PortForward],
        *,
        settings: Settings,
        local_host: str = LOOPBACK,
        patience: float | None = None,
        resume: bool = True,
        fallback: bool = False,
        any_port: bool = False,
        path: PathChoice | None = None,
        on_event: Callable[[Event], None] = lambda event: None,
    ) -> None:
        check_distinct(ports, any_port=any_port)
        self.task = task
        self.ports = list(ports)
        self._any_port = any_port or any(port.proto == SOCKS for port in ports)
        self._patience = patience
        self._knocking = False
        self.listening: list[ListeningSocket] = []
        self._beside: list[ListeningSocket] = []  # what listens for something else than a port of the task
        self._settings = settings
        self._on_event = on_event
        self._hosts = Hosts(settings)
        self._link: Link | None = None
        self._losses: asyncio.Queue[_Loss] = asyncio.Queue()
        self._closing = False
        self._opened_at = 0.0
        self._task_id = ""  # once known, where the host tells
        self._not_running: str | None = None  # what the host says of a task that has ended
        self._rated = time.monotonic(), 0, 0
        self._rates = 0, 0
        self._keeper: asyncio.Task[None] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self.endpoint_config = endpoint_config(lambda name: getattr(settings, name))
        self._endpoint = UserEndpoint(
            config=self.endpoint_config,
            on_stream_error=self._stream_failed,
            on_detach=self._detached,
            on_going_away=self._going_away,
            on_notice=lambda sentence: self._on_event(Notice(sentence)),
            on_line_lost=self._line_lost,
            kept=KeptStreams(resume_for(settings.resume_for)) if resume else None,
            on_accept=self._accepted,
        )
        socks = SocksServer(self._endpoint, task, lambda port, why: on_event(StreamError(port, why))).serve
        self._local = LocalSide(self._endpoint, local_host, self._half_listening, fallback=fallback, socks=socks)
        self._crowded = file_limit() - DESCRIPTORS_LEFT
        self._was_full = False
        self._descriptors = DescriptorWatch(
            lambda: [local.sock for local in (*self.listening, *self._beside)],
            lambda waiting: self._on_event(OutOfDescriptors(waiting)),
        )
        if self._endpoint.kept is not None:
            self._endpoint.kept.on_doubt = self._doubted
        self._choice = path_choice(path or settings.path, keeps=resume)
        self._straight: StraightPath | None = None
        if self._choice != "host":
            self._straight = StraightPath(
                self._endpoint, task, settings, ready=self._may_go_straight, tell=lambda event: self._on_event(event)
            )

    async def start(self) -> None:
        """Bind the local addresses, then open the session.

        Raises LocalAddressError before anything is sent to the host, and what `open_session` raises.
        """
        try:
            await self._listen_everywhere()
            link = await self._open()
        except BaseException:
            self._closing = True
            await self._endpoint.close()
            raise
        self._attach(link)
        try:
            if self._choice == "direct" and self._straight is not None:
                await self._straight.first()
            if self._patience is not None:
                await self._until_answered(self._patience)
        except BaseException:
            await self._end()
            raise
        self._on_event(Connected(self.task, link.version))
        for local in self.listening:
            self._on_event(Listening.of(local))
        loop = asyncio.get_running_loop()
        self._keeper = loop.create_task(self._keep_open())
        self._watcher = loop.create_task(self._watch_descriptors())

    @property
    def connected(self) -> bool:
        """Whether the session stands just now."""
        return self._endpoint.streams is not None

    async def wait(self) -> None:
        """Wait until the forward can't go on.

        Raises NotFoundError once the task is gone for good, NotAllowedError once the right to use it is, and
        UnavailableError "idle" when the host ends the forward because nothing went through it.
        """
        if self._keeper is not None:
            await asyncio.shield(self._keeper)

    async def close(self, reason: str = STOPPED, *, deliver: bool = False) -> None:
        """Stop listening, end every stream and the session.

        `deliver`: first wait until what local programs have sent has arrived in the task, while it makes progress.
        """
        if deliver:
            await delivered(self._endpoint)
        if self._closing:
            return
        await self._end()
        self._on_event(self.stats())
        self._on_event(Closed(reason))

    async def _end(self) -> None:
        self._closing = True
        await cancel_all([task for task in (self._keeper, self._watcher) if task is not None])
        if self._straight is not None:
            await self._straight.close()
        await self._endpoint.close()

    @property
    def straight(self) -> bool:
        """Whether the connections go past the host just now."""
        return self._straight is not None and self._straight.link is not None

    def _for_nobody(self) -> int:
        """How many streams are no connection of anybody's yet."""
        return 0

    def _may_go_straight(self) -> bool:
        """Whether the connections may leave the host's link."""
        return True

    def stats(self) -> Stats:
        """Totals and rates of now."""
        totals: EndpointStats = self._endpoint.stats()
        seconds = time.monotonic() - self._rated[0]
        if seconds >= RATED_OVER:
            sent, received = totals.bytes_sent - self._rated[1], totals.bytes_received - self._rated[2]
            self._rates = round(sent / seconds), round(received / seconds)
            self._rated = time.monotonic(), totals.bytes_sent, totals.bytes_received
        shown = asdict(totals)
        shown["udp_dropped"] += shown.pop("udp_refused")
        sent, received = self._rates
        return Stats(**shown, sent_per_second=sent, received_per_second=received, direct=int(self.straight))

    async def _until_answered(self, seconds: float) -> None:
        """Wait until somebody listens on each TCP port in the task. Raises UnavailableError after `seconds`."""
        self._knocking = True
        deadline = time.monotonic() + seconds
        for local in self.listening[: len(self.ports)]:
            while local.proto == "tcp" and not await self._answers(local):
                if time.monotonic() > deadline:
                    message = f"Nothing listens on port {local.remote_port} of {self.task} after {seconds:g} s."
                    raise UnavailableError(message, code="no_service")
                await asyncio.sleep(KNOCK_EVERY)
        self._knocking = False

    async def _answers(self, local: ListeningSocket) -> bool:
        """Whether a connection to this port reaches somebody in the task."""
        try:
            reader, writer = await _connected(local)
        except OSError:
            return False
        ended = asyncio.ensure_future(reader.read(1))
        try:
            while not ended.done():
                if self._endpoint.has_reached(writer.get_extra_info("sockname"), local.remote_port):
                    return True
                await asyncio.wait({ended}, timeout=KNOCK_POLL)
            return (
                ended.exception() is None
            )  # a reset says that nobody is there, an end in good order that somebody was
        finally:
            await cancel_all([ended])
            writer.close()

    async def _listen_everywhere(self) -> None:
        """Bind all local addresses, those that must be had first."""
        self.listening = await self._local.listen(self.ports)

    def _half_listening(self, host: str, port: int) -> None:
        self._on_event(NotListening(host, port, "another program listens there"))

    async def _watch_descriptors(self) -> None:
        """Tell when local connections can't be accepted: the event loops don't, and nothing else would."""
        while True:
            await asyncio.sleep(DESCRIPTORS_EVERY)
            self._descriptors.look(exhausted=True if self._was_full else None)
            self._was_full = False

    def _accepted(self, streams: int) -> None:
        if streams >= self._crowded:
            self._was_full = self._was_full or out_of_descriptors()

    async def _open(self) -> Link:
        again = f"&{GOES_ON}" if self._link is not None else ""
        try:
            return await self._hosts.reach(self._path() + again, open_session)
        except NotFoundError as error:
            if not self._task_id:
                raise
            gone = f"There is no task {self.task!r} any more; `kohakuriver vps list` shows the tasks that there are."
            raise NotFoundError(gone, code=error.code) from error

    @property
    def _named(self) -> str:
        """The task in a path. Its name may be another's by now, who had only to share that with this user."""
        return path_segment(self._task_id or self.task)

    def _path(self) -> str:
        named = [port for port in self.ports if port.proto != SOCKS]
        first = named[0] if named else PortForward(0, ANY_PORT)
        query = f"proto={first.proto}"
        if not self._any_port:  # else it is said later on which ports are wanted
            query += f"&{ports_query(port.remote for port in named)}"
        return f"/ws/forward/{self._named}/{first.remote}?{query}"

    def _attach(self, link: Link) -> None:
        self._task_id = self._task_id or link.task
        self._opened_at = time.monotonic()
        self._not_running = None
        self._link = link
        self._endpoint.attach(link)
        if self._straight is not None:
            self._straight.begin(link)

    def _detached(self, reason: str) -> None:
        if self._closing:
            return
        if self._straight is not None and self._straight.link is not None:
            self._straight.gone(reason)
        else:
            self._losses.put_nowait(_Loss(reason, self._link))

    def _line_lost(self, reason: str) -> None:
        """The session's own link is gone, while the connections go straight: they may for a while."""
        if not self._closing:
            self._losses.put_nowait(_Loss(reason, self._link))

    def _going_away(self, reason: str) -> None:
        """The link will be gone soon: kept connections move to another before that."""
        if self._endpoint.kept is not None:
            self._losses.put_nowait(_Loss(reason, self._link, there=True))

    def _doubted(self) -> None:
        """The link may be dead: another one is tried beside it, and whichever serves first carries on."""
        if self.straight and self._straight is not None:
            self._straight.give_up("no answer came")
            return
        self._losses.put_nowait(_Loss("no answer came", self._link, there=True, doubted=True))

    def _stream_failed(self, remote_port: int, text: ErrorText) -> None:
        if not self._knocking:
            self._on_event(StreamError(remote_port, one_line(str(text))))

    async def _keep_open(self) -> None:
        backoff = Backoff(RETRY_BASE, RETRY_CAP)
        moving: list[asyncio.Task[None]] = []
        try:
            while True:
                loss = await self._losses.get()
                if loss.there and all(task.done() for task in moving):
                    moving = [asyncio.get_running_loop().create_task(self._move(loss))]
                if loss.there:
                    continue
                await cancel_all(moving)
                if loss.link is not self._link:
                    continue
                if self._link is not None and self._link.closing.code == CloseCode.IDLE:
                    raise UnavailableError(f"The host has ended this forward: {loss.reason}.", code="idle")
                backoff.ended(time.monotonic() - self._opened_at)
                await self._reopen(loss.reason, backoff, _lost(self._link))
        finally:
            await cancel_all(moving)

    async def _move(self, loss: _Loss) -> None:
        """Go on over another session while the one before still stands. The next host may not be there yet."""
        pauses = Backoff(RETRY_BASE, MOVE_CAP)
        self._hosts.turn()
        while self._link is loss.link and not await self._moved(loss):
            pauses.ended(None)
            await asyncio.sleep(pauses.pause())

    async def _moved(self, loss: _Loss) -> bool:
        """Try to, once. Whether that is done with."""
        try:
            link = await self._open()
        except KohakuRiverError as error:
            # A link in doubt is doubted again; of a right that is gone its end tells more.
            return loss.doubted or isinstance(error, (NotFoundError, NotAllowedError))
        self._go_on_over(link, loss)
        return True

    def _go_on_over(self, link: Link, loss: _Loss) -> None:
        kept = self._endpoint.kept
        if loss.doubted and self._endpoint.link is loss.link and kept is not None and not kept.doubt.doubted:
            link.close(CloseCode.NORMAL, "the connection before it has answered")
            return
        connections = 0 if kept is None else len(kept.streams) - self._for_nobody()
        self._attach(link)
        self._on_event(Moved(self.task, link.version, loss.reason, connections))

    async def _reopen(self, reason: str, backoff: Backoff, lost: Literal["host", "task"]) -> None:
        """Open sessions until one stands: at once, then after pauses."""
        lost_at = time.monotonic()
        again = backoff.failures > 1
        if lost == "host":
            self._hosts.turn()
        while True:
            eager = time.monotonic() - lost_at < EAGER_SECONDS
            delay = backoff.pause(EAGER_CAP if eager else RETRY_CAP) if again else 0.0
            waiting = max(self._endpoint.waiting - self._for_nobody(), 0)
            self._on_event(Reconnecting(reason, round(delay, 3), waiting, lost))
            await asyncio.sleep(delay)
            try:
                link = await self._open()
            except KohakuRiverError as error:
                self._refused(error)
                reason, again = error.message, True
                backoff.ended(None)
                continue
            waiting = max(self._endpoint.waiting - self._for_nobody(), 0)
            self._attach(link)
            self._on_event(Resumed(self.task, link.version, waiting, round(time.monotonic() - lost_at, 3)))
            return

    def _refused(self, error: KohakuRiverError) -> None:
        """No session: what that means for the connections that wait. Raises the error that ends the forward."""
        ends = isinstance(error, (NotFoundError, NotAllowedError))
        self._not_running = error.message if ends or error.code == NOT_RUNNING else None
        if self._not_running:
            self._endpoint.end_waiting(ErrorText("ECONNRESET", error.message))
        if ends:
            raise error


def path_choice(path: str | None, *, keeps: bool) -> PathChoice:
    """The setting `path`, for a forward that `keeps` its connections or does not. Raises UsageError."""
    if path not in (None, "", "auto", "direct", "host"):
        raise UsageError(f"The setting 'path' must be auto, direct or host, not {path!r}.")
    if path == "direct" and not keeps:
        raise UsageError("The direct path needs connections that go on over another link: leave --no-resume out.")
    return cast(PathChoice, path or "auto") if keeps else "host"


_OF_HOST = ("the host ", "the server ")


def _lost(link: Link | None) -> Literal["host", "task"]:
    """What went: where the host itself closed the link, and not because it ends, that lies behind it."""
    if link is None or link.closing.code == CloseCode.ABNORMAL or link.closing.reason.startswith(_OF_HOST):
        return "host"
    return "task"


async def _connected(local: ListeningSocket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if local.path is None:
        return await asyncio.open_connection(local.host, local.port)
    with address_of(Path(local.path)) as address:
        return await asyncio.open_unix_connection(address)


@dataclass(frozen=True)
class _Loss:
    """A link is gone, or is still `there` and going."""

    reason: str
    link: Link | None
    there: bool = False
    doubted: bool = False

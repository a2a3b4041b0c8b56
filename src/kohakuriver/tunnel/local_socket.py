"""A TCP stream at its local socket: the asyncio protocol around a `StreamCore` (docs/protocol.md §3).

What the core answers is done here: messages go to the link that the stream is attached to, the rest to the socket.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from kohakuriver._frame import HEADROOM, frame_in_place
from kohakuriver.tunnel.buffers import receive_buffer
from kohakuriver.tunnel.kept import Identity, KeptCore
from kohakuriver.tunnel.link import Link, soon
from kohakuriver.tunnel.local_writer import LocalWriter
from kohakuriver.tunnel.owner import TcpOwner
from kohakuriver.tunnel.protocol import CONNECT, DATA, PROTO_TCP, RESUME, WINDOW, ErrorText
from kohakuriver.tunnel.states import Do, State
from kohakuriver.tunnel.stream import Action, Reading, Send, StreamCore
from kohakuriver.tunnel.streams import Attachment
from kohakuriver.tunnel.windows import EARLY_DATA

__all__ = ["AcceptedStream", "TcpStream"]

_DIALLED = frozenset({CONNECT, RESUME})  # they say to which port

# Members that each connection asks for, as in `stream.py`.
_WAITING, _OVER = State.WAITING, State.OVER
_SETTLING, _PAUSED = Reading.SETTLING, Reading.PAUSED
_RESUME_LOCAL, _PAUSE_LOCAL = Do.RESUME_LOCAL, Do.PAUSE_LOCAL
_SHUT_LOCAL, _CLOSE_LOCAL = Do.SHUT_LOCAL, Do.CLOSE_LOCAL
BLOCKED_READ = 4 * 1024  # a stream that learns only by reading that the link is blocked adds this to what waits


class TcpStream(LocalWriter):
    """One TCP stream: its core, its local socket, and what it is attached to while it has a link.

    Large because a transport calls half of its methods, and its link the other half.

    Args:
        owner: the endpoint whose stream it is.
        port: the port in the container.
        core: its state, for one that was accepted or has a window of its own kind.
    """

    __slots__ = ("_holds", "_left", "_timer", "at", "core", "owner", "port")

    proto = PROTO_TCP
    """What it is opened as."""

    start = b""
    """What is started at its other end, where that is a terminal."""

    def __init__(self, owner: TcpOwner[TcpStream], port: int, core: StreamCore | None = None) -> None:
        super().__init__()
        self.owner = owner
        self.port = port
        self.core = core or StreamCore(owner.rules)
        self.at: Attachment | None = None
        self._left = False
        self._holds: Link | None = None  # v1: the link whose reading it holds up
        self._timer: asyncio.TimerHandle | None = None

    def source(self) -> tuple[str, int]:
        """The other end of the local connection."""
        peer = None if self._transport is None else self._transport.get_extra_info("peername")
        return peer or ("", 0)

    def refused(self, text: ErrorText) -> None:
        """Told why it could not be opened, or broke, before its local socket hears of it."""

    # -- local socket → link -----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.use(transport)  # type: ignore[arg-type]  # a call to `cast` takes as long as any other
        if self.core.state is _OVER:  # the stream ended while it was dialled
            self.reset()
            return
        self.owner.socket_ready(self)
        if self.owes:
            self.pump()
        at = self.at
        if not self.core.begins(at is None or at.link.out.blocked):
            soon(self._settled)

    def _settled(self) -> None:
        """uvloop undoes a pause in connection_made, so the first one is made here."""
        self.core.settled()
        self.update_reading()

    def get_buffer(self, sizehint: int) -> memoryview:
        core, at = self.core, self.at
        if at is None:
            size = EARLY_DATA - core.waits
            return receive_buffer().view[HEADROOM : HEADROOM + (size if size > 0 else 1)]
        window = core.sending
        size = window.limit - window.sent
        most = BLOCKED_READ if at.link.out.blocked else at.turns.read_size
        if size > most:
            size = most
        elif size < 1:
            size = 1
        unacked = core.unacked
        if unacked is not None and (space := unacked.space(size)) is not None:
            return space
        return at.link.loop_buffer.view[HEADROOM : HEADROOM + size]

    def buffer_updated(self, nbytes: int) -> None:
        core, at = self.core, self.at
        if at is None:
            self.feed(receive_buffer().view[HEADROOM : HEADROOM + nbytes])
            return
        link, unacked = at.link, core.unacked
        buffer, stop = link.loop_buffer, HEADROOM + nbytes
        if not core.passes(nbytes):
            self.feed(buffer.view[HEADROOM:stop] if unacked is None else unacked.came(buffer.view, nbytes))
            return
        key = link.next_key()
        if unacked is None:
            start = frame_in_place(buffer.data, HEADROOM, stop, DATA, PROTO_TCP, at.id, 0, key)
            frame = buffer.view[start:stop]
        else:
            frame = unacked.frame(buffer.view, nbytes, at.id, key)
        self.owner.totals.bytes_sent += nbytes
        turns = at.turns
        if turns.alone != at.id:
            turns.sends(at.id)
        link.send(frame)
        window = core.sending
        if link.out.blocked or window.sent >= window.limit:
            self.update_reading()

    def feed(self, data: bytes | memoryview) -> None:
        """Take bytes of the local side that can't go the fast way, or came by another than the transport's reading."""
        self.act(self.core.local_data(data))
        self.update_reading()

    def eof_received(self) -> bool:
        self.act(self.core.local_eof())
        return True

    def link_writable(self) -> None:
        self.update_reading()

    def update_reading(self) -> None:
        """Send what waits, and read the local socket only while what is read can be sent."""
        core, transport = self.core, self._transport
        if core.unsent:
            self._send_waiting()
        if core.state.local_done or transport is None or transport.is_closing():
            return
        at = self.at
        blocked = at is None or at.link.out.blocked
        change = core.flow(blocked)
        if change is _RESUME_LOCAL:
            transport.resume_reading()
        elif change is _PAUSE_LOCAL:
            if at is not None and not blocked:
                self.owner.totals.stalls += 1
            transport.pause_reading()
        if blocked and at is not None and core.reading is _PAUSED:
            at.link.out.wait_drained(self)

    def _send_waiting(self) -> None:
        """A kept stream may have much to send again: no more at a time than its link takes."""
        core = self.core
        self.act(core.flush())
        while (at := self.at) is not None and core.may_send:
            if at.link.out.blocked:
                at.link.out.wait_drained(self)
                return
            self.act(core.flush())

    # -- link → local socket -----------------------------------------------------------------------------------

    def receive(self, views: Sequence[memoryview]) -> None:
        """Take the stream's next bytes; views are only valid during the call."""
        core = self.core
        if core.state.remote_done:
            return
        size = len(views[0]) if len(views) == 1 else sum(map(len, views))
        owed = core.arrive(size, time.monotonic())
        if owed is not None:
            if not isinstance(owed, Send):
                self.owner.window_passed(self)
                return
            self.send(*owed)
        if not core.owing and self.at is not None:
            core.owing = True
            self.at.owe(self)
        self.write(views, size)
        if core.held:
            self._hold_link()

    def taken(self, size: int) -> None:
        limit = self.core.consumed(size)
        self.owner.totals.bytes_received += size
        if limit is not None and self.at is not None:
            self.at.send_soon(WINDOW, self.core.announcement(limit))
        if self._holds is not None:
            self._hold_link()

    def pong(self) -> None:
        """The answer to this stream's PING."""
        self.owner.stream_answered(self)
        limit = self.core.pong(time.monotonic())
        if limit is not None and self.at is not None:
            self.at.send_soon(WINDOW, self.core.announcement(limit))

    def connection_lost(self, exc: Exception | None) -> None:
        if self.core.state is _WAITING:
            self.owner.socket_gone(self)
        if exc is None:
            self.act(self.core.local_lost())
        else:
            self.failed(exc)
        self.drop()

    def failed(self, exc: BaseException) -> None:
        self.act(self.core.local_lost(self.owner.socket_error(self, exc).pack()))

    def drop(self) -> None:
        super().drop()
        self.core.drop()
        if self._holds is not None:
            self._hold_link()

    # -- what the core wants done ------------------------------------------------------------------------------

    @property
    def kept(self) -> KeptCore | None:
        """Its core, where it outlives its links."""
        return self.core if isinstance(self.core, KeptCore) else None

    @property
    def identity(self) -> Identity | None:
        """What it is known by, where it outlives its links."""
        return None if self.kept is None else self.kept.identity

    def link_lost(self) -> None:
        """The link is gone, or none came in time."""
        self.act(self.core.link_lost())

    def unlink(self) -> None:
        """A kept stream leaves its link."""
        at, self.at = self.at, None
        if self.kept is not None:
            self.kept.detach()
        if at is not None:
            at.leave()
        self.update_reading()

    def detach(self) -> bool:
        if self.kept is None:
            return False
        self.unlink()
        self.owner.stream_detached(self)
        return True

    def resuming(self, epoch: int) -> bytes:
        """The payload of the RESUME that attaches a kept stream to another link."""
        return b"" if self.kept is None else self.kept.resuming(epoch)

    def attach(self, at: Attachment, actions: Sequence[Action]) -> None:
        """A kept stream goes on there, and begins with these actions."""
        self.at = at
        self.act(actions)
        if self.core.reading is not _SETTLING:  # else it is looked at once its socket is read
            self.update_reading()

    def acknowledgement(self) -> bytes:
        return b"" if self.kept is None else self.kept.acknowledgement()

    def end(self, text: ErrorText) -> None:
        """A kept stream ends, whether it has a link or not."""
        if self.kept is not None:
            self.act(self.kept.end(text))

    def act(self, actions: Sequence[Action]) -> None:
        """Do what the core answered, in this order; where it is over on the wire then, its id is free."""
        for action in actions:
            if isinstance(action, Send):
                self.send(*action)
            else:
                self._act_locally(action)
        if self.core.state.gone and not self._left:
            self._leave()

    def send(self, kind: int, payload: bytes = b"", late: bool = False) -> None:
        """Send one message of the stream, while it has a link; `late` as `Send` says."""
        at = self.at
        if at is None:
            return
        if kind == DATA:
            self.owner.totals.bytes_sent += len(payload)
            at.turns.sends(at.id)
        if late:
            at.send_late(kind, payload)
        elif kind in _DIALLED:
            at.open(kind, payload, self.proto, self.port)
        else:
            at.send(kind, payload)

    def _act_locally(self, action: Do) -> None:
        if action is _SHUT_LOCAL:
            self.shut()
        elif action is _CLOSE_LOCAL:
            self.close()
        elif action is Do.RESET_LOCAL:
            if not self.reset():
                self.drop()
        elif action is Do.LINGER:
            self._wait(self.core.linger_begins(time.monotonic()))

    def _leave(self) -> None:
        at, self.at = self.at, None
        self._left = at is not None or self.kept is not None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if at is not None:
            at.leave()
        if self._left:
            self.owner.stream_over(self)

    def _wait(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._waited)

    def _waited(self) -> None:
        left = self.core.linger_left(time.monotonic())
        if left > 0:
            self._wait(left)
        else:
            self.act(self.core.linger_over())

    def _hold_link(self) -> None:
        """v1: stop reading the link while this stream holds too much (§3 rule 6)."""
        act = self.core.link_reading()
        if act is Do.HOLD_LINK and self._holds is None and self.at is not None:
            self._holds = self.at.link
            self._holds.intake.pause(self)
        elif act is Do.FREE_LINK and self._holds is not None:
            self._holds.intake.resume(self)
            self._holds = None


class AcceptedStream(TcpStream):
    """The stream of a TCP connection that a listener of `bind` accepted."""

    __slots__ = ()

    def use(self, transport: asyncio.Transport) -> None:
        super().use(transport)
        self._read_early()

    def tune(self, transport: asyncio.Transport) -> None:
        """It began as its listener is, and asking costs as much as all else that is done with a new connection."""

    def _read_early(self) -> None:
        """Take what came with the connection: programs that speak first have mostly spoken by now (§3 rule 2)."""
        space = receive_buffer().view[HEADROOM : HEADROOM + EARLY_DATA]
        try:
            size = self._direct.read_into(space)
        except OSError as exc:  # it was reset; the kernel says so once
            self.failed(exc)
            return
        if size:
            self.core.local_data(space[:size])

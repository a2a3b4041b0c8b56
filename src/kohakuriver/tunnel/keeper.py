"""The kept streams of a container's end: which there are, which wait for a link, and which have ended lately.

It outlives links, and so does every stream that it knows (docs/protocol.md §3, "Streams that outlive links").
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Generic, NamedTuple, TypeVar

from kohakuriver.tunnel.kept import Identity
from kohakuriver.tunnel.local_socket import TcpStream
from kohakuriver.tunnel.protocol import MARK, OPENER, ErrorText
from kohakuriver.tunnel.udp import UdpStream
from kohakuriver.tunnel.windows import SESSION_BUDGET

__all__ = ["UNKNOWN", "Keeper", "KeptStream", "Tombstone"]

MOST_HELD = 4096  # streams that wait for a link
MOST_ENDED = 4096

UNKNOWN = ErrorText("ESTALE", "the container's end does not have that connection")
_HELD_FOR_TOO_LONG = ErrorText("ETIMEDOUT", "nobody came back to the connection for as long as it is held")
_TOO_MANY = ErrorText("ENOBUFS", "too many connections wait for their users to come back")
_FORGOTTEN = ErrorText("ECONNRESET", "the user's end does not have that connection any more")

KeptStream = TcpStream | UdpStream
T = TypeVar("T")


class Tombstone(NamedTuple):
    """How a stream has ended: well, and then with what RESUMED says, or with an ERROR."""

    attachment: bytes
    error: bytes


class _Hold(NamedTuple):
    until: float
    size: int


class _Memory(Generic[T]):
    """The newest MOST_ENDED entries; where there are more, the user with most of them loses the oldest."""

    def __init__(self) -> None:
        self._of: dict[bytes, OrderedDict[bytes, T]] = {}  # by mark, which names begin with
        self._count = 0

    def get(self, name: bytes) -> T | None:
        entries = self._of.get(name[:MARK])
        return None if entries is None else entries.get(name)

    def put(self, name: bytes, entry: T) -> None:
        entries = self._of.setdefault(name[:MARK], OrderedDict())
        self._count += name not in entries
        entries[name] = entry
        entries.move_to_end(name)
        if self._count > MOST_ENDED:
            max(self._of.values(), key=len).popitem(last=False)
            self._count -= 1


class _Waiting:
    """The streams of one user that wait for a link, in the order in which they lost theirs."""

    def __init__(self) -> None:
        self.holds: OrderedDict[KeptStream, _Hold] = OrderedDict()
        self.bytes = 0

    def add(self, stream: KeptStream, hold: _Hold) -> None:
        self.holds[stream] = hold
        self.bytes += hold.size

    def remove(self, stream: KeptStream) -> _Hold | None:
        hold = self.holds.pop(stream, None)
        self.bytes -= 0 if hold is None else hold.size
        return hold


class Keeper:
    """Kept streams, by their names (mark and key).

    Args:
        most_held, most_bytes: streams that may wait for a link, and bytes that they may hold together; where there are
            more, one ends of the user who has most of it, the one that waits for longest.
    """

    def __init__(self, *, most_held: int = MOST_HELD, most_bytes: int = SESSION_BUDGET) -> None:
        self._most_held = most_held
        self._most_bytes = most_bytes
        self._openers: dict[bytes, dict[bytes, KeptStream]] = {}  # by what all names of one opener begin with
        self._ended: _Memory[Tombstone] = _Memory()
        self._unknown: _Memory[bool] = _Memory()  # a flood of these makes nobody forget how a stream ended
        self._rolls: _Memory[int] = _Memory()  # the last epoch that an opener has called the roll of
        self._waiting: dict[bytes, _Waiting] = {}  # by mark
        self._held = 0
        self._bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return sum(map(len, self._openers.values()))

    @property
    def held(self) -> int:
        """How many streams wait for a link."""
        return self._held

    def find(self, name: bytes) -> KeptStream | None:
        """The stream of this name, if it lives."""
        return self._openers.get(_opener(name), {}).get(name)

    def tombstone(self, name: bytes) -> Tombstone | None:
        """How the stream of this name has ended, if it has."""
        return self._ended.get(name)

    def knows(self, name: bytes) -> bool:
        """Whether a stream of this name lives, or lived lately."""
        return self.find(name) is not None or self._ended.get(name) is not None or self._unknown.get(name) is not None

    # -- one stream --------------------------------------------------------------------------------------------

    def enter(self, identity: Identity, stream: KeptStream) -> None:
        """A stream was opened."""
        self._openers.setdefault(_opener(identity.name), {})[identity.name] = stream

    def attached(self, stream: KeptStream) -> None:
        """It has a link again."""
        mark = _mark(stream)
        waiting = self._waiting.get(mark)
        hold = None if waiting is None else waiting.remove(stream)
        if waiting is None or hold is None:
            return
        self._held -= 1
        self._bytes -= hold.size
        if not waiting.holds:
            del self._waiting[mark]

    def detached(self, stream: KeptStream, seconds: int) -> None:
        """Its link is gone: it waits for another, for so long at most."""
        identity = stream.identity
        assert identity is not None
        self.attached(stream)
        size = stream.kept.size if isinstance(stream, TcpStream) and stream.kept is not None else 0
        until = asyncio.get_running_loop().time() + min(identity.hold, seconds)
        self._waiting.setdefault(_mark(stream), _Waiting()).add(stream, _Hold(until, size))
        self._held += 1
        self._bytes += size
        while self._held > self._most_held:
            self._evict(max(self._waiting.values(), key=lambda each: len(each.holds)))
        while self._bytes > self._most_bytes:
            self._evict(max(self._waiting.values(), key=lambda each: each.bytes))
        self._wait(until)

    @staticmethod
    def _evict(waiting: _Waiting) -> None:
        next(iter(waiting.holds)).end(_TOO_MANY)

    def over(self, stream: KeptStream) -> None:
        """It has ended."""
        identity = stream.identity
        if identity is None or self.find(identity.name) is not stream:
            return
        self.attached(stream)
        opener = _opener(identity.name)
        del self._openers[opener][identity.name]
        if not self._openers[opener]:
            del self._openers[opener]
        kept = stream.kept if isinstance(stream, TcpStream) else None
        if kept is None:
            self._ended.put(identity.name, Tombstone(b"", UNKNOWN.pack()))
        else:
            self._ended.put(identity.name, Tombstone(kept.attachment(over=True), kept.error))

    def never_was(self, name: bytes) -> None:
        """Somebody asked for a stream that nobody knows: a CONNECT that comes later is for nothing."""
        self._unknown.put(name, True)

    # -- many streams ------------------------------------------------------------------------------------------

    def call_roll(self, opener: bytes, epoch: int) -> None:
        """An opener, named by its mark and what its keys begin with, has no streams but those that have this epoch."""
        if epoch <= (self._rolls.get(opener) or 0):
            return  # it comes late, over a link that is dead
        self._rolls.put(opener, epoch)
        for stream in list(self._openers.get(opener, {}).values()):
            if stream.identity is not None and stream.identity.epoch < epoch:
                stream.end(_FORGOTTEN)

    def revoke(self, mark: bytes, text: ErrorText) -> None:
        """All streams of this mark end."""
        for opener, streams in list(self._openers.items()):
            if opener[: len(opener) - OPENER] == mark:
                for stream in list(streams.values()):
                    stream.end(text)

    def close(self, text: ErrorText) -> None:
        """All streams end."""
        for streams in list(self._openers.values()):
            for stream in list(streams.values()):
                stream.end(text)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # -- time --------------------------------------------------------------------------------------------------

    def _wait(self, until: float) -> None:
        """Look then, if not before."""
        if self._timer is not None:
            if self._timer.when() <= until:
                return
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(until, self._sweep)

    def _sweep(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        holds = [each for waiting in self._waiting.values() for each in waiting.holds.items()]
        for stream, hold in holds:
            if hold.until <= now:
                stream.end(_HELD_FOR_TOO_LONG)
        if left := [hold.until for _, hold in holds if hold.until > now]:
            self._wait(min(left))


def _mark(stream: KeptStream) -> bytes:
    """Whose it is."""
    return b"" if stream.identity is None else stream.identity.mark


def _opener(name: bytes) -> bytes:
    """The part of a name that all streams of one opener have: the mark, and what their keys begin with."""
    return name[:-4]

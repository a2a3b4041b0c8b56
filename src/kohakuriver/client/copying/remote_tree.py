"""The task's end of a copy: requests over one stream, answered one after the other (docs/protocol.md §6, "Files")."""

from __future__ import annotations

import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final, NoReturn

from kohakuriver._files import contents_in, pack_heads, pack_wanted
from kohakuriver.client.copying.sides import Batch, Contents, Done, FileError, StreamGone, Told, Written
from kohakuriver.errors import UnavailableError
from kohakuriver.text import one_line
from kohakuriver.tunnel.files import (
    EACH,
    HEAD,
    PIECE,
    SUM,
    Answer,
    Ask,
    Attributes,
    Entry,
    crc32,
    entries_in,
    pack_path,
    segments_in,
)

__all__ = ["RemoteTree"]

_BUFFER: Final = 4 << 20
_LONGEST: Final = PIECE + 4096  # no answer is longer
_TOGETHER: Final = 128 << 10  # small requests are sent together
# What may be on its way at once. Requests for data are few enough never to be waited for while data waits for us.
_MOST: Final = 256
_MOST_ASKED: Final = 128 << 10
_MOST_EXPECTED: Final = 8 << 20  # bytes of files, either way
_MOST_ENTRIES = 4_000_000  # half a kilobyte of memory each
_MOST_LISTED: Final = 1 << 30  # bytes of a list

_READ: Final = struct.Struct(">QI")
_NUMBER: Final = struct.Struct(">Q")
_RANGE: Final = struct.Struct(">QQ")
_PUT: Final = struct.Struct(">BI")
_REASON: Final = struct.Struct(">H")

Heard = Callable[[int, memoryview], None]


class RemoteTree:
    """What is in a task, by one stream, for one thread. `sock` is its local end, which blocks, and this object's.

    Large because it is all that a Side can be asked for, and hears what is answered.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.only: bytes | None = None
        self._out = bytearray()
        self._buffer = bytearray(_BUFFER)
        self._view = memoryview(self._buffer)
        self._start = self._stop = 0
        self._waiting: deque[tuple[int, int, Heard]] = deque()  # bytes of the request, bytes expected
        self._asked = self._expected = 0

    def open(self) -> None:
        """Wait for the first word. Raises FileError where the place that was named can't be had, and StreamGone."""
        tag, payload = self._frame()
        if tag == Answer.ERROR:
            raise _failure(payload)
        if tag != Answer.HELLO:
            raise UnavailableError(
                "The task's tunnel client copies in another way than this program: restart the task, or take a program "
                "of the version that it was started with.",
                code="no_copy",
            )
        if not payload:
            self._nonsense()
        self.only = None if payload[0] else bytes(payload[1:])

    def close(self) -> None:
        self._sock.close()

    def hang_up(self) -> None:
        """End the stream, from any thread: whoever waits for an answer gets StreamGone."""
        try:
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    # -- requests ----------------------------------------------------------------------------------------------

    def _ask(self, kind: int, request: bytes, heard: Heard, data: memoryview | None = None, expected: int = 0) -> None:
        size = len(request) + (0 if data is None else len(data))
        expected = max(expected, size - len(request))  # what was sent is done when that is answered, and not before
        while self._waiting and (
            len(self._waiting) >= _MOST
            or self._expected + expected > _MOST_EXPECTED
            or (self._expected and self._asked + len(request) > _MOST_ASKED)
        ):
            self._hear()
        self._out += HEAD.pack(kind, size)
        self._out += request
        if data is not None and len(data) > _TOGETHER:
            self._flush(data)
        elif data is not None:
            self._out += data
        if len(self._out) >= _TOGETHER:
            self._flush()
        self._waiting.append((len(request), expected, heard))
        self._asked += len(request)
        self._expected += expected

    def _flush(self, data: memoryview | None = None) -> None:
        try:
            if self._out:
                self._sock.sendall(self._out)
                self._out.clear()
            if data is not None:
                self._sock.sendall(data)
        except OSError as error:
            raise StreamGone("The stream has ended.") from error

    def settle(self, *, all_of_it: bool = False) -> None:
        if all_of_it:
            while self._waiting:
                self._hear()

    def _hear(self) -> None:
        """The next answer."""
        self._flush()
        asked, expected, heard = self._waiting.popleft()
        self._asked -= asked
        self._expected -= expected
        heard(*self._frame())

    def _frame(self) -> tuple[int, memoryview]:
        """The next answer's tag, and its payload, which is there until the next call."""
        tag, length = HEAD.unpack(self._take(HEAD.size))
        if length > _LONGEST:
            self._nonsense()
        return tag, self._take(length)

    def _take(self, length: int) -> memoryview:
        if self._start + length > _BUFFER:
            left = self._stop - self._start
            self._buffer[:left] = self._buffer[self._start : self._stop]
            self._start, self._stop = 0, left
        while self._stop - self._start < length:
            try:
                received = self._sock.recv_into(self._view[self._stop :])
            except OSError as error:
                raise StreamGone("The stream has ended.") from error
            if not received:
                raise StreamGone("The stream has ended.")
            self._stop += received
        taken = self._view[self._start : self._start + length]
        self._start += length
        if self._start == self._stop:
            self._start = self._stop = 0
        return taken

    def _nonsense(self) -> NoReturn:
        raise UnavailableError("What the task's end of the copy says makes no sense.", code="bad_answer")

    def _done(self, then: Done) -> Heard:
        def heard(tag: int, payload: memoryview) -> None:
            if tag == Answer.ERROR:
                then(_failure(payload))
            elif tag == Answer.DONE and len(payload) == 1:
                then(payload[0])
            else:
                self._nonsense()

        return heard

    # -- reading -----------------------------------------------------------------------------------------------

    def entries(self, path: bytes) -> Iterator[list[Entry]]:
        found = listed = 0
        self.settle(all_of_it=True)
        self._ask(Ask.LIST, pack_path(path), lambda tag, payload: None)
        self._waiting.pop()
        self._asked = 0
        self._flush()
        while True:
            tag, payload = self._frame()
            if tag == Answer.DONE:
                return
            if tag == Answer.ERROR:
                raise _failure(payload)
            listed += len(payload)
            if tag != Answer.ENTRIES:
                self._nonsense()
            try:
                some = entries_in(payload)
            except ValueError:
                self._nonsense()
            found += len(some)
            if listed > _MOST_LISTED or found > _MOST_ENTRIES:
                sentence = f"The task tells of more than {_MOST_ENTRIES} files, which is too many for one copy; copy"
                raise UnavailableError(f"{sentence} the folders in it one by one.", code="too_many_files")
            yield some

    def segments(self, path: bytes) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        at = 0
        while len(found) < _MOST_ENTRIES:
            told: list[list[tuple[int, int]] | FileError] = []

            def heard(tag: int, payload: memoryview, told: list[list[tuple[int, int]] | FileError] = told) -> None:
                if tag == Answer.ERROR:
                    told.append(_failure(payload))
                elif tag != Answer.MAP or len(payload) % 16:
                    self._nonsense()
                else:
                    told.append(segments_in(payload))

            self._ask(Ask.MAP, pack_path(path) + _NUMBER.pack(at), heard)
            self.settle(all_of_it=True)
            some = told[0]
            if isinstance(some, FileError):
                raise some
            for offset, length in some:
                if offset < at or not length or offset + length >= 1 << 63:
                    self._nonsense()
                at = offset + length
            found += some
            if len(some) < 4096:
                break
        return found

    def _data(self, tag: int, payload: memoryview) -> memoryview | FileError:
        if tag == Answer.ERROR:
            return _failure(payload)
        if tag != Answer.DATA or len(payload) < SUM.size:
            self._nonsense()
        data = payload[SUM.size :]
        if crc32(data) != SUM.unpack_from(payload)[0]:
            return FileError("EIO", "Its checksum is wrong: it was spoiled on its way")
        return data

    def read(self, path: bytes, offset: int, length: int, then: Told[memoryview]) -> None:
        def heard(tag: int, payload: memoryview) -> None:
            data = self._data(tag, payload)
            if not isinstance(data, FileError) and len(data) > length:
                self._nonsense()
            then(data)

        self._ask(Ask.READ, pack_path(path) + _READ.pack(offset, length), heard, expected=length + 9)

    def get(self, batch: Batch, then: Told[Contents]) -> None:
        def heard(tag: int, payload: memoryview) -> None:
            data = self._data(tag, payload)
            if isinstance(data, FileError):
                then(data)
                return
            try:
                failed = contents_in(batch, data)
            except ValueError:
                self._nonsense()
            then(Contents(data, {number: _failure(why) for number, why in failed}))

        expected = sum(entry.size for entry, _ in batch) + EACH * len(batch)
        self._ask(Ask.GET, pack_wanted(batch), heard, expected=expected)

    def sums(self, path: bytes, offset: int, length: int, then: Told[list[int]]) -> None:
        def heard(tag: int, payload: memoryview) -> None:
            if tag == Answer.ERROR:
                then(_failure(payload))
            elif tag != Answer.SUMS or len(payload) % SUM.size:
                self._nonsense()
            else:
                then([each[0] for each in SUM.iter_unpack(payload)])

        self._ask(Ask.SUMS, pack_path(path) + _RANGE.pack(offset, length), heard)

    # -- writing -----------------------------------------------------------------------------------------------

    def put(self, batch: Batch, contents: Contents, then: Told[Written], *, owner: bool, beside: bool) -> None:
        def heard(tag: int, payload: memoryview) -> None:
            if tag == Answer.ERROR:
                then(_failure(payload))
            elif tag == Answer.RESULTS:
                then(self._written(payload, len(batch)))
            else:
                self._nonsense()

        heads = pack_heads(batch, owner)
        heads = _PUT.pack(beside, len(heads)) + heads
        checksum = SUM.pack(crc32(contents.data, crc32(heads)))
        self._ask(Ask.PUT, checksum + heads, heard, contents.data)

    def _written(self, payload: memoryview, count: int) -> Written:
        if payload == bytes(count):  # all went well, as nearly always
            return Written({})
        failed: dict[int, FileError] = {}
        not_owner = at = 0
        for number in range(count):
            result = payload[at] if at < len(payload) else -1
            at += 1
            not_owner += result == Answer.NOT_OWNER
            if result == Answer.FAILED and at + _REASON.size <= len(payload):
                start = at + _REASON.size
                at = start + _REASON.unpack_from(payload, at)[0]
                failed[number] = _failure(payload[start:at])
            elif not Answer.ALL <= result <= Answer.NOTHING:
                self._nonsense()
        if at != len(payload):
            self._nonsense()
        return Written(failed, not_owner)

    def part(self, path: bytes, size: int, then: Done) -> None:
        self._ask(Ask.PART, pack_path(path) + _NUMBER.pack(size), self._done(then))

    def write(self, path: bytes, offset: int, data: memoryview, then: Done) -> None:
        request = pack_path(path) + _NUMBER.pack(offset) + SUM.pack(crc32(data))
        self._ask(Ask.WRITE, request, self._done(then), data)

    def finish(self, part: bytes, path: bytes, attributes: Attributes, then: Done) -> None:
        self._ask(Ask.FINISH, pack_path(part) + pack_path(path) + attributes.pack(), self._done(then))

    def folder(self, path: bytes, then: Done) -> None:
        self._ask(Ask.FOLDER, pack_path(path), self._done(then))

    def symlink(self, path: bytes, target: bytes, attributes: Attributes, then: Done) -> None:
        self._ask(Ask.SYMLINK, pack_path(path) + pack_path(target) + attributes.pack(), self._done(then))

    def link(self, path: bytes, existing: bytes, then: Done) -> None:
        self._ask(Ask.LINK, pack_path(path) + pack_path(existing), self._done(then))

    def attributes(self, path: bytes, attributes: Attributes, then: Done) -> None:
        self._ask(Ask.ATTRIBUTES, pack_path(path) + attributes.pack(), self._done(then))

    def remove(self, path: bytes, folder: bool, then: Done) -> None:
        self._ask(Ask.REMOVE, pack_path(path) + bytes([folder]), self._done(then))


def _failure(payload: memoryview | bytes) -> FileError:
    """What an ERROR says, whose words are a stranger's."""
    code, _, why = bytes(payload).decode("utf-8", "replace").partition(": ")
    return FileError(one_line(code), one_line(why) or "The task does not say why")

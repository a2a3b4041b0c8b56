"""What a container's end answers where streams outlive links: docs/protocol.md §3. README.md has the format."""

from __future__ import annotations

import struct
from typing import Any

Vector = dict[str, Any]

CONNECT, CONNECTED, DATA, CLOSE, ERROR, EOF = 1, 2, 3, 4, 5, 9
RESUME, RESUMED, ACK, DETACH, REVOKE = 10, 11, 12, 13, 16
TCP, UDP = 0, 1
PORT, LIMIT, GRANTED = 80, 1 << 20, 262_144
OPENER, MARK, OTHERS_MARK = b"twelve bytes", b"the mark of ann.", b"the mark of bob."
KEY, ANOTHER = OPENER + b"\0\0\0\1", OPENER + b"\0\0\0\2"
NEVER = (1 << 64) - 1  # the total of who has not ended


def numbers(*each: int) -> bytes:
    return struct.pack(f">{len(each)}Q", *each)


class Trace:
    """One trace: each call is an event, and `answers` of it what the end owes for it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._events: list[Vector] = []
        self._got = b""
        self._reset = False

    def vector(self) -> Vector:
        return {"name": self.name, "events": self._events}

    def _event(self, do: str, answers: list[Vector], **about: Any) -> Trace:
        state = {"service": self._got.hex(), "reset": self._reset}
        self._events.append({"do": do, **about, "answers": answers, **state})
        return self

    # -- the link ------------------------------------------------------------------------------------------------

    def link(self) -> Trace:
        return self._event("link", [])

    def lost(self, *, resets: bool = False) -> Trace:
        self._reset = self._reset or resets
        return self._event("lost", [])

    def say(
        self,
        kind: int,
        stream: int,
        payload: bytes = b"",
        *answers: Vector,
        port: int = 0,
        proto: int = TCP,
        resets: bool = False,
    ) -> Trace:
        self._reset = self._reset or resets
        about = {"type": kind, "proto": proto, "id": stream, "port": port, "payload": payload.hex()}
        return self._event("say", list(answers), **about)

    def connect(self, stream: int, key: bytes = KEY, *answers: Vector) -> Trace:
        return self.say(CONNECT, stream, numbers(LIMIT) + key + struct.pack(">IB", 3600, 0) + MARK, *answers, port=PORT)

    def data(self, stream: int, text: bytes, *, late: bool = False) -> Trace:
        self._got += b"" if late else text
        return self.say(DATA, stream, text)

    def eof(self, stream: int, total: int, received: int, *answers: Vector) -> Trace:
        return self.say(EOF, stream, numbers(total, received), *answers)

    def ack(self, stream: int, received: int, *answers: Vector, resets: bool = False) -> Trace:
        return self.say(ACK, stream, numbers(received), *answers, resets=resets)

    def resume(
        self,
        stream: int,
        epoch: int,
        received: int,
        *answers: Vector,
        total: int = NEVER,
        key: bytes = KEY,
        mark: bytes = MARK,
        port: int = PORT,
        proto: int = TCP,
    ) -> Trace:
        payload = key + struct.pack(">I", epoch) + numbers(received, LIMIT, total) + mark
        return self.say(RESUME, stream, payload, *answers, port=port, proto=proto)

    def roll(self, epoch: int, *answers: Vector, mark: bytes = MARK, resets: bool = False) -> Trace:
        return self.say(RESUME, 0, OPENER + struct.pack(">I", epoch) + mark, *answers, resets=resets)

    # -- the service ---------------------------------------------------------------------------------------------

    def dialled(self, *answers: Vector) -> Trace:
        return self._event("dialled", list(answers))

    def refuses(self, *answers: Vector) -> Trace:
        return self._event("refuses", list(answers))

    def service_says(self, text: bytes, *answers: Vector) -> Trace:
        return self._event("service_says", list(answers), bytes=text.hex())

    def service_ends(self, *answers: Vector) -> Trace:
        return self._event("service_ends", list(answers))

    def opened(self, name_of_link: int = 1) -> Trace:
        """A stream under this id whose service is connected."""
        return self.link().connect(name_of_link).dialled(answer(CONNECTED, name_of_link, numbers(GRANTED, 0)))


def answer(kind: int, stream: int, payload: bytes = b"") -> Vector:
    return {"type": kind, "id": stream, "payload": payload.hex()}


def error(stream: int, code: str) -> Vector:
    return {"type": ERROR, "id": stream, "error": code}


def resumed(stream: int, received: int, total: int = NEVER, *, ended: bool = False) -> Vector:
    """The answer of a stream that lives: its service takes all at once. `ended`: an end-of-file has come."""
    return answer(RESUMED, stream, numbers(received, GRANTED + received - ended, total))


def traces() -> list[Vector]:
    return [trace.vector() for trace in (*bytes_go_on(), *ends(), *whose(), *too_late())]


def bytes_go_on() -> list[Trace]:
    return [
        Trace("bytes that were lost with their link come again, the others do not")
        .opened()
        .data(1, b"hello")
        .service_says(b"answer", answer(DATA, 1, b"answer"))
        .lost()
        .link()
        .resume(5, 1, 2, resumed(5, 5), answer(DATA, 5, b"swer"))
        .data(5, b" again")
        .ack(5, 6)
        .lost()
        .link()
        .resume(7, 2, 6, resumed(7, 11)),
        Trace("a service is not read while its stream is detached, and what came before is written to it")
        .opened()
        .data(1, b"written")
        .say(DETACH, 1, struct.pack(">I", 3600))
        .service_says(b"kept")
        .resume(5, 1, 0, resumed(5, 7), answer(DATA, 5, b"kept")),
        Trace("a higher epoch takes the stream over, and what comes under its old id is dropped")
        .opened()
        .resume(5, 1, 0, resumed(5, 0))
        .data(1, b"late", late=True)
        .data(5, b"in time"),
        Trace("an epoch that is not higher changes nothing")
        .opened()
        .resume(5, 3, 0, resumed(5, 0))
        .resume(6, 3, 0, error(6, "ESTALE"))
        .resume(7, 2, 0, error(7, "ESTALE"))
        .service_says(b"here", answer(DATA, 5, b"here")),
        Trace("an opener may resume before its service is connected")
        .link()
        .connect(1)
        .lost()
        .link()
        .resume(5, 1, 0, resumed(5, 0))
        .dialled(answer(CONNECTED, 5, numbers(GRANTED, 0))),
        Trace("a CONNECT that comes twice opens nothing again").opened().connect(2).data(1, b"still the first"),
    ]


def ends() -> list[Trace]:
    return [
        Trace("a stream ends once both ends-of-file are acknowledged")
        .opened()
        .data(1, b"question")
        .eof(1, 8, 0)
        .service_says(b"reply", answer(DATA, 1, b"reply"))
        .service_ends(answer(EOF, 1, numbers(5, 9)))
        .ack(1, 5)
        .ack(1, 6, answer(CLOSE, 1))
        .resume(5, 1, 6, answer(RESUMED, 5, numbers(9, 9, 5)), answer(CLOSE, 5), total=8),
        Trace("an end-of-file that was lost with its link comes again")
        .opened()
        .service_says(b"reply", answer(DATA, 1, b"reply"))
        .service_ends(answer(EOF, 1, numbers(5, 0)))
        .lost()
        .link()
        .resume(5, 1, 5, resumed(5, 0, 5), answer(EOF, 5, numbers(5, 0)))
        .ack(5, 6)
        .lost()
        .link()
        .resume(6, 2, 6, resumed(6, 0, 5))
        .eof(6, 0, 6, answer(CLOSE, 6)),
        Trace("an end-of-file that came is counted as a byte, and is not waited for again")
        .opened()
        .data(1, b"all")
        .eof(1, 3, 0)
        .lost()
        .link()
        .resume(5, 1, 0, resumed(5, 4, ended=True), total=3)
        .service_ends(answer(EOF, 5, numbers(0, 4)))
        .ack(5, 1, answer(CLOSE, 5)),
        Trace("a dial that failed while there was no link answers the RESUME")
        .link()
        .connect(1)
        .lost()
        .refuses()
        .link()
        .resume(5, 1, 0, error(5, "ECONNREFUSED")),
        Trace("whoever acknowledges what was never sent loses that stream")
        .opened()
        .ack(1, 1, error(1, "EPROTO"), resets=True),
        Trace("whoever has received less than they had said loses that stream")
        .opened()
        .service_says(b"reply", answer(DATA, 1, b"reply"))
        .ack(1, 5)
        .say(
            RESUME,
            5,
            KEY + struct.pack(">I", 1) + numbers(4, LIMIT, NEVER) + MARK,
            error(5, "EPROTO"),
            port=PORT,
            resets=True,
        ),
        Trace("a stream that is not kept ends with its link")
        .link()
        .say(CONNECT, 1, numbers(LIMIT), port=PORT)
        .dialled(answer(CONNECTED, 1, numbers(GRANTED)))
        .lost(resets=True),
    ]


def whose() -> list[Trace]:
    return [
        Trace("a stream is resumed for its own mark, port and protocol alone")
        .opened()
        .resume(5, 1, 0, error(5, "ESTALE"), mark=OTHERS_MARK)
        .resume(6, 1, 0, error(6, "ESTALE"), port=PORT + 1)
        .resume(7, 1, 0, error(7, "ESTALE"), proto=UDP)
        .data(1, b"nobody noticed")
        .resume(8, 1, 0, resumed(8, 14)),
        Trace("a right that has gone ends what is attached")
        .opened()
        .say(REVOKE, 0, OTHERS_MARK + b"not shared any more")
        .say(REVOKE, 0, MARK + b"not shared any more", error(1, "EACCES"), resets=True),
        Trace("a right that has gone ends what is detached")
        .opened()
        .say(DETACH, 1, struct.pack(">I", 3600))
        .say(REVOKE, 0, MARK + b"not shared any more", resets=True)
        .resume(5, 1, 0, error(5, "EACCES")),
    ]


def too_late() -> list[Trace]:
    return [
        Trace("nobody resumes what was never opened, and its CONNECT comes too late then")
        .opened()
        .resume(5, 1, 0, error(5, "ESTALE"), key=ANOTHER)
        .connect(6, ANOTHER)
        .resume(7, 2, 0, error(7, "ESTALE"), key=ANOTHER),
        Trace("what an opener did not resume ends when it says that it has resumed all")
        .opened()
        .lost()
        .link()
        .roll(1, resets=True)
        .resume(5, 2, 0, error(5, "ECONNRESET")),
        Trace("a roll ends no stream of its own epoch, none of another mark, and comes late for nothing")
        .opened()
        .resume(5, 2, 0, resumed(5, 0))
        .roll(2)
        .roll(9, mark=OTHERS_MARK)
        .roll(1)
        .service_says(b"here", answer(DATA, 5, b"here")),
    ]

"""Heads of HTTP/1.1 messages, read strictly, and where the bodies behind them end (RFC 9112). No I/O.

llhttp (`httptools`) reads them. What two readers could take differently is refused: it is how requests are smuggled.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import httptools

__all__ = [
    "CHUNKED",
    "MAX_FIELDS",
    "MAX_HEAD",
    "UNTIL_CLOSE",
    "Fields",
    "Malformed",
    "RequestHead",
    "ResponseHead",
    "head_end",
    "read_request",
    "read_response",
    "request_body",
    "response_body",
    "wants_websocket",
    "words",
]

MAX_HEAD = 64 << 10
"""Bytes that a head may have."""
MAX_FIELDS = 200

CHUNKED, UNTIL_CLOSE = -1, -2
"""In the place of a body's length in bytes."""

_END = b"\r\n\r\n"
_LONE_LF = re.compile(rb"(?<!\r)\n")
_LENGTH = re.compile(rb"[0-9]{1,18}")
_ORIGIN_FORM = re.compile(rb"/[\x21\x22\x24-\x7e\x80-\xff]*")
_NO_BODY = frozenset({204, 304})


class Malformed(Exception):
    """A message that is not taken. `status` is what its sender is told, `sentence` why."""

    def __init__(self, sentence: str, status: int = 400) -> None:
        super().__init__(sentence)
        self.sentence = sentence
        self.status = status


@dataclass
class Fields:
    """The fields of a head: in their order as they were written, and by their names in lower case."""

    listed: list[tuple[bytes, bytes, bytes]] = field(default_factory=list)
    """Name in lower case, name, value."""
    named: dict[bytes, list[bytes]] = field(default_factory=dict)

    def one(self, name: bytes) -> bytes | None:
        """The value of a field that may be there once. Raises Malformed where it is there more than once."""
        values = self.named.get(name)
        if values is None:
            return None
        if len(values) > 1:
            raise Malformed(f"There is more than one {name.decode()} field.")
        return values[0]


@dataclass
class RequestHead:
    """`minor` is the 1 of HTTP/1.1."""

    method: bytes
    target: bytes
    minor: int
    fields: Fields


@dataclass
class ResponseHead:
    """`minor` is the 1 of HTTP/1.1."""

    status: int
    reason: bytes
    minor: int
    fields: Fields


class _Reader:
    """What llhttp calls. It is given whole heads only."""

    __slots__ = ("_listed", "_named", "complete", "fields", "reason", "target")

    def __init__(self) -> None:
        self.target = b""
        self.reason = b""
        self.fields = Fields()
        self.complete = False
        self._listed, self._named = self.fields.listed, self.fields.named

    def on_url(self, url: bytes) -> None:
        self.target += url

    def on_status(self, reason: bytes) -> None:
        self.reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        lower = name.lower()
        value = value.strip(b" \t")
        self._listed.append((lower, name, value))
        if lower in self._named:
            self._named[lower].append(value)
        else:
            self._named[lower] = [value]

    def on_headers_complete(self) -> None:
        self.complete = True


def head_end(data: bytearray, start: int = 0) -> int:
    """Where the head at the beginning of `data` ends, -1 where not all of it is there.

    `start`: so many bytes of it were looked at before. Raises Malformed for what will never be a head.
    """
    end = data.find(_END, max(0, start - 3), MAX_HEAD)
    if end >= 0:
        return end + len(_END)
    if len(data) >= MAX_HEAD:
        raise Malformed(f"The head is longer than {MAX_HEAD >> 10} KiB.", 431)
    if _LONE_LF.search(data, max(0, start - 1)):
        raise Malformed("A line of the head does not end with CR and LF.")
    return -1


def _is_ambiguous(head: bytes) -> bool:
    """Whether a line is folded, or ends with something else than CR and LF; or there is a NUL.

    llhttp refuses these too, in the versions that we know: no other one may ever be more lenient with us.
    """
    lines = head.count(b"\r\n")
    ends = lines == head.count(b"\n") == head.count(b"\r")
    return not ends or b"\r\n " in head or b"\r\n\t" in head or b"\x00" in head


def _read(parser: httptools.HttpRequestParser | httptools.HttpResponseParser, reader: _Reader, head: bytes) -> None:
    if _is_ambiguous(head):
        raise Malformed("The head has a line that is folded, or ends with something else than CR and LF.")
    try:
        parser.feed_data(head)
    except httptools.HttpParserUpgrade:
        pass  # a head is all that it was given
    except httptools.HttpParserError as exc:
        raise Malformed(f"The head can't be read: {str(exc) or type(exc).__name__}.") from exc
    if not reader.complete or parser.get_http_version() not in ("1.0", "1.1"):
        raise Malformed("That is no message of HTTP/1.1.", 400 if not reader.complete else 505)
    if len(reader.fields.listed) > MAX_FIELDS:
        raise Malformed(f"The head has more than {MAX_FIELDS} fields.", 431)


def read_request(head: bytes) -> RequestHead:
    """A request's whole head. Raises Malformed."""
    reader = _Reader()
    parser = httptools.HttpRequestParser(reader)
    _read(parser, reader, head)
    method = parser.get_method()
    if method == b"CONNECT":
        raise Malformed("CONNECT is not served here.", 405)
    if not _ORIGIN_FORM.fullmatch(reader.target) and not (method == b"OPTIONS" and reader.target == b"*"):
        raise Malformed("The target of a request is a path here, which begins with a slash.")
    return RequestHead(method, reader.target, int(parser.get_http_version()[2:]), reader.fields)


def read_response(head: bytes) -> ResponseHead:
    """A response's whole head. Raises Malformed."""
    reader = _Reader()
    parser = httptools.HttpResponseParser(reader)
    _read(parser, reader, head)
    return ResponseHead(parser.get_status_code(), reader.reason, int(parser.get_http_version()[2:]), reader.fields)


def _framing(head: RequestHead | ResponseHead) -> int | None:
    """What the fields say of the body: its length or CHUNKED; None where they say nothing. Raises Malformed."""
    coding, length = head.fields.one(b"transfer-encoding"), head.fields.one(b"content-length")
    if coding is not None:
        if length is not None:
            raise Malformed("There are both Content-Length and Transfer-Encoding.")
        if coding.lower() != b"chunked":
            raise Malformed("The only transfer coding that is taken is chunked.", 501)
        if head.minor == 0:
            raise Malformed("HTTP/1.0 has no transfer codings.")
        return CHUNKED
    if length is None:
        return None
    if not _LENGTH.fullmatch(length):
        raise Malformed("Content-Length is no number.")
    return int(length)


def request_body(head: RequestHead) -> int:
    """The length of a request's body, or CHUNKED. Raises Malformed."""
    return _framing(head) or 0


def response_body(head: ResponseHead, method: bytes) -> int:
    """The length of the body of the answer to a request with `method`, CHUNKED, or UNTIL_CLOSE. Raises Malformed."""
    framing = _framing(head)
    if method == b"HEAD" or head.status < 200 or head.status in _NO_BODY:
        return 0
    return UNTIL_CLOSE if framing is None else framing


def words(values: list[bytes] | None) -> list[bytes]:
    """The words of a field that is a list with commas, in lower case."""
    return [word for value in values or () for each in value.split(b",") if (word := each.strip(b" \t").lower())]


def wants_websocket(head: RequestHead) -> bool:
    """Whether the request asks to go on as a WebSocket: to nothing else is ever gone on."""
    fields = head.fields.named
    return (
        head.minor == 1
        and head.method == b"GET"
        and words(fields.get(b"upgrade")) == [b"websocket"]
        and b"upgrade" in words(fields.get(b"connection"))
    )

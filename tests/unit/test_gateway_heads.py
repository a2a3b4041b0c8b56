"""Heads and chunked bodies: what two readers could take differently is refused."""

from __future__ import annotations

import random

import pytest

from kohakuriver.gateway.chunks import Chunks
from kohakuriver.gateway.heads import (
    CHUNKED,
    MAX_FIELDS,
    MAX_HEAD,
    UNTIL_CLOSE,
    Malformed,
    head_end,
    read_request,
    read_response,
    request_body,
    response_body,
    wants_websocket,
)

HOSTILE = {
    "both lengths": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
    "both lengths, the other way round": b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n",
    "two lengths": b"POST / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
    "the same length twice": b"POST / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\n",
    "a list of lengths": b"POST / HTTP/1.1\r\nContent-Length: 5, 5\r\n\r\n",
    "a length with a sign": b"POST / HTTP/1.1\r\nContent-Length: +5\r\n\r\n",
    "a negative length": b"POST / HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
    "a length in hexadecimal": b"POST / HTTP/1.1\r\nContent-Length: 0x5\r\n\r\n",
    "a length without digits": b"POST / HTTP/1.1\r\nContent-Length:\r\n\r\n",
    "a length that overflows": b"POST / HTTP/1.1\r\nContent-Length: 18446744073709551617\r\n\r\n",
    "a folded length": b"POST / HTTP/1.1\r\nContent-Length:\r\n 5\r\n\r\n",
    "an unknown coding": b"POST / HTTP/1.1\r\nTransfer-Encoding: xchunked\r\n\r\n",
    "chunked and identity": b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked, identity\r\n\r\n",
    "a coding below chunked": b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
    "chunked twice": b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
    "a coding of HTTP/1.0": b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n",
    "a tab in the coding's name": b"POST / HTTP/1.1\r\nTransfer-Encoding\t: chunked\r\n\r\n",
    "a space before the colon": b"POST / HTTP/1.1\r\nContent-Length : 5\r\n\r\n",
    "a space before the name": b"GET / HTTP/1.1\r\n Host: a\r\n\r\n",
    "a vertical tab before a value": b"POST / HTTP/1.1\r\nTransfer-Encoding:\x0bchunked\r\n\r\n",
    "a folded field": b"GET / HTTP/1.1\r\nHost: a\r\nX: 1\r\n 2\r\n\r\n",
    "a fold of a tab": b"GET / HTTP/1.1\r\nHost: a\r\nX: 1\r\n\t2\r\n\r\n",
    "bare LF between fields": b"GET / HTTP/1.1\r\nHost: a\nX: 1\r\n\r\n",
    "bare LF in a value": b"GET / HTTP/1.1\r\nX: a\nTransfer-Encoding: chunked\r\n\r\n",
    "bare CR in a value": b"GET / HTTP/1.1\r\nX: a\rTransfer-Encoding: chunked\r\n\r\n",
    "NUL in a value": b"GET / HTTP/1.1\r\nX: a\x00b\r\n\r\n",
    "a field without a name": b"GET / HTTP/1.1\r\n: a\r\n\r\n",
    "a field without a colon": b"GET / HTTP/1.1\r\nHost\r\n\r\n",
    "no version": b"GET /\r\nHost: a\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\n",
    "HTTP/1.2": b"GET / HTTP/1.2\r\nHost: a\r\n\r\n",
    "a tunnel": b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n",
    "another server's address": b"GET http://b/ HTTP/1.1\r\nHost: a\r\n\r\n",
    "no path": b"GET ?x HTTP/1.1\r\nHost: a\r\n\r\n",
    "a star for something else than OPTIONS": b"GET * HTTP/1.1\r\nHost: a\r\n\r\n",
    "a fragment": b"GET /#x HTTP/1.1\r\nHost: a\r\n\r\n",
    "a space in the path": b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
    "a method that is none": b"G\xffT / HTTP/1.1\r\nHost: a\r\n\r\n",
    "an answer": b"HTTP/1.1 200 OK\r\n\r\n",
    "a TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "nothing": b"\r\n\r\n",
    "too many fields": b"GET / HTTP/1.1\r\n" + b"A: 1\r\n" * (MAX_FIELDS + 1) + b"\r\n",
}


@pytest.mark.parametrize("head", HOSTILE.values(), ids=HOSTILE)
def test_a_request_that_could_be_read_in_two_ways_is_refused(head: bytes) -> None:
    with pytest.raises(Malformed) as refused:
        request_body(read_request(head))
    assert 400 <= refused.value.status <= 505
    assert refused.value.sentence.endswith(".")


HOSTILE_ANSWERS = {
    "both lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
    "an unknown coding": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n",
    "a coding of HTTP/1.0": b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n",
    "a folded field": b"HTTP/1.1 200 OK\r\nX: 1\r\n 2\r\n\r\n",
    "bare LF": b"HTTP/1.1 200 OK\r\nX: 1\nSet-Cookie: a=b\r\n\r\n",
    "no version": b"200 OK\r\n\r\n",
    "SSH": b"SSH-2.0-OpenSSH_9.9\r\n\r\n",
}


@pytest.mark.parametrize("head", HOSTILE_ANSWERS.values(), ids=HOSTILE_ANSWERS)
def test_an_answer_that_could_be_read_in_two_ways_is_refused(head: bytes) -> None:
    with pytest.raises(Malformed):
        response_body(read_response(head), b"GET")


def test_a_head_is_read_as_it_was_written() -> None:
    head = read_request(b"PROPFIND /a?b=%20 HTTP/1.1\r\nHost: A\r\nX-Two: 1\r\nx-two:  2 \t\r\nEmpty:\r\n\r\n")
    assert (head.method, head.target, head.minor) == (b"PROPFIND", b"/a?b=%20", 1)
    assert head.fields.named == {b"host": [b"A"], b"x-two": [b"1", b"2"], b"empty": [b""]}
    assert [name for _, name, _ in head.fields.listed] == [b"Host", b"X-Two", b"x-two", b"Empty"]
    with pytest.raises(Malformed):
        head.fields.one(b"x-two")
    assert read_request(b"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n").target == b"*"


@pytest.mark.parametrize(
    ("fields", "length"),
    [
        (b"", 0),
        (b"Content-Length: 0\r\n", 0),
        (b"Content-Length: 17\r\n", 17),
        (b"Transfer-Encoding: Chunked\r\n", CHUNKED),
    ],
)
def test_where_a_requests_body_ends(fields: bytes, length: int) -> None:
    assert request_body(read_request(b"POST / HTTP/1.1\r\n" + fields + b"\r\n")) == length


@pytest.mark.parametrize(
    ("status", "fields", "method", "length"),
    [
        (200, b"", b"GET", UNTIL_CLOSE),
        (200, b"Content-Length: 9\r\n", b"GET", 9),
        (200, b"Transfer-Encoding: chunked\r\n", b"GET", CHUNKED),
        (200, b"Content-Length: 9\r\n", b"HEAD", 0),
        (200, b"Transfer-Encoding: chunked\r\n", b"HEAD", 0),
        (204, b"", b"GET", 0),
        (304, b"Content-Length: 9\r\n", b"GET", 0),
        (100, b"", b"POST", 0),
    ],
)
def test_where_an_answers_body_ends(status: int, fields: bytes, method: bytes, length: int) -> None:
    head = read_response(b"HTTP/1.1 %d Some Reason\r\n%s\r\n" % (status, fields))
    assert (head.status, head.reason) == (status, b"Some Reason")
    assert response_body(head, method) == length


def test_the_end_of_a_head_is_found_however_it_comes() -> None:
    whole = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
    data, known = bytearray(), 0
    for number in range(len(whole)):
        assert head_end(data, known) == -1
        known = len(data)
        data += whole[number : number + 1]
    assert head_end(data, known) == len(whole)
    assert head_end(bytearray(whole + b"more\r\n\r\n")) == len(whole)


@pytest.mark.parametrize(("data", "status"), [(b"a" * MAX_HEAD, 431), (b"GET / HTTP/1.1\nHost: a\n\n", 400)])
def test_what_will_never_be_a_head_is_not_waited_for(data: bytes, status: int) -> None:
    with pytest.raises(Malformed) as refused:
        head_end(bytearray(data))
    assert refused.value.status == status


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        (b"Connection: keep-alive, Upgrade\r\nUpgrade: WebSocket\r\n", True),
        (b"Connection: Upgrade\r\nUpgrade: h2c\r\n", False),
        (b"Connection: Upgrade\r\nUpgrade: websocket, h2c\r\n", False),
        (b"Connection: keep-alive\r\nUpgrade: websocket\r\n", False),
    ],
)
def test_nothing_but_a_websocket_is_switched_to(fields: bytes, wanted: bool) -> None:
    assert wants_websocket(read_request(b"GET / HTTP/1.1\r\n" + fields + b"\r\n")) is wanted


def passed(body: bytes, size: int, *, bare: bool = False) -> tuple[bytes, bytes, bool]:
    """What of `body` goes on, what is left behind it, and whether it is over, when it comes `size` bytes at a time."""
    chunks, out, at = Chunks(bare=bare), b"", 0
    while at < len(body) and not chunks.over:
        consumed, pieces = chunks.walk(memoryview(body)[at : at + size])
        out += b"".join(pieces)
        at += consumed
    return out, body[at:], chunks.over


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 1000])
def test_chunks_go_on_as_they_are_and_a_trailer_stays_here(size: int) -> None:
    chunks = b"5\r\nhello\r\nA;x=y\r\n0123456789\r\n0\r\n"
    assert passed(chunks + b"\r\nGET ", size) == (chunks + b"\r\n", b"GET ", True)
    assert passed(chunks + b"Content-Length: 5\r\nX: y\r\n\r\nGET ", size) == (chunks + b"\r\n", b"GET ", True)
    assert passed(chunks, size) == (chunks, b"", False)
    told = b"hello0123456789"
    assert passed(chunks + b"X: y\r\n\r\nGET ", size, bare=True) == (told, b"GET ", True)
    assert passed(chunks, size, bare=True) == (told, b"", False)


HOSTILE_CHUNKS = {
    "bare LF behind the size": b"5\nhello\r\n0\r\n\r\n",
    "bare LF in an extension": b"5;\nhello\r\n0\r\n\r\n",
    "bare CR in an extension": b"5;a\rb\r\nhello\r\n0\r\n\r\n",
    "a space behind the size": b"5 \r\nhello\r\n0\r\n\r\n",
    "a sign": b"+5\r\nhello\r\n0\r\n\r\n",
    "0x": b"0x5\r\nhello\r\n0\r\n\r\n",
    "an underscore": b"1_0\r\nhello\r\n0\r\n\r\n",
    "no size": b"\r\nhello\r\n0\r\n\r\n",
    "a size that overflows": b"10000000000000005\r\nhello\r\n0\r\n\r\n",
    "a chunk longer than its size": b"4\r\nhello\r\n0\r\n\r\n",
    "bare LF behind a chunk": b"5\r\nhello\n0\r\n\r\n",
    "an endless extension": b"5;" + b"a" * 5000 + b"\r\nhello\r\n0\r\n\r\n",
    "a trailer that is none": b"0\r\nGET / HTTP/1.1\r\n\r\n",
    "an endless trailer": b"0\r\n" + b"A: b\r\n" * 5000 + b"\r\n",
}


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize("body", HOSTILE_CHUNKS.values(), ids=HOSTILE_CHUNKS)
def test_chunks_that_could_be_read_in_two_ways_are_refused(body: bytes, size: int) -> None:
    with pytest.raises(Malformed):
        passed(body, size)


def test_no_line_between_chunks_goes_on_before_all_of_it_was_read() -> None:
    chunks = Chunks()
    assert chunks.walk(memoryview(b"5\r\nhello\r\n5;a\r"))[1] == [b"5\r\nhello\r\n"]
    with pytest.raises(Malformed):
        chunks.walk(memoryview(b"b\r\n"))


def test_tiny_chunks_are_not_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A read may hold 170,000 of them, and all other streams wait for as long as they take."""
    lines: list[bytes] = []
    read_line = Chunks._read_line

    def counted(chunks: Chunks, line: bytes) -> None:
        lines.append(line)
        read_line(chunks, line)

    monkeypatch.setattr(Chunks, "_read_line", counted)
    body = b"1\r\nx\r\n1;a=b\r\ny\r\n0001\r\nz\r\n" * 10_000 + b"0\r\n\r\n"
    assert passed(body, len(body)) == (body, b"", True)
    assert len(lines) == 2


PARTS = [b"0", b"1", b"2", b"aF", b";", b"\t", b"\x7f", b"\x80", b"\r\n", b"\r", b"\n", b"x", b"2\r\nab\r\n"]
PARTS += [
    b"1\r\nx\r\n",
    b"0\r\n\r\n",
    b"1;e=1\r\ny\r\n",
    b"3\r\nabcd\r\n",
    b"000000000000001\r\nx\r\n",
    b"0000000000000001\r\nx\r\n",
]
PARTS += [b"5;" + b"z" * size + b"\r\n12345\r\n" for size in (1019, 1020, 1021)]


@pytest.mark.parametrize("seed", range(20))
def test_chunks_that_come_whole_are_read_as_those_that_come_byte_by_byte(seed: int) -> None:
    def read(size: int) -> tuple[bytes, bytes, bool] | None:
        try:
            return passed(body, size)
        except Malformed:
            return None

    chance = random.Random(seed)
    for _ in range(100):
        body = b"".join(chance.choices(PARTS, k=chance.randint(1, 12)))
        assert read(len(body)) == read(1), body

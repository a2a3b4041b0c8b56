"""What the gateway takes, another reader of HTTP (h11) takes for the same: nothing can be smuggled past it."""

from __future__ import annotations

from urllib.parse import urljoin

import h11
from hypothesis import given, settings
from hypothesis import strategies as st

from kohakuriver.gateway import rewrite
from kohakuriver.gateway.chunks import Chunks
from kohakuriver.gateway.heads import CHUNKED, Malformed, read_request, read_response, request_body, wants_websocket
from kohakuriver.gateway.names import Place

LAB = Place("lab", 8888, 7777)
NAMES = [
    b"Host",
    b"Content-Length",
    b"content-length",
    b"Transfer-Encoding",
    b"transfer_encoding",
    b"Connection",
    b"Upgrade",
    b"X-Forwarded-Host",
    b"Cookie",
    b"Expect",
    b"X",
]
VALUES = [
    b"5",
    b"0",
    b"05",
    b"+5",
    b"5, 5",
    b"chunked",
    b"Chunked",
    b"gzip, chunked",
    b"chunked ",
    b"identity",
    b"close",
    b"Content-Length",
    b"Transfer-Encoding, Host",
    b"upgrade",
    b"websocket",
    b"h2c",
    b"a=b; kohakuriver-web-7777=c",
    b"100-continue",
    b"",
]
NOISE = st.sampled_from(
    [b"", b"", b"", b"", b" ", b"\t", b"\r", b"\n", b"\x0b", b"\x00", b"\r\n ", b"\xff", b":", b"x"]
)
FIELD = st.tuples(
    NOISE,
    st.sampled_from(NAMES),
    NOISE,
    st.sampled_from([b": ", b":", b":\t", b" :"]),
    st.sampled_from(VALUES),
    NOISE,
    st.sampled_from([b"\r\n", b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r", b"\r\r\n"]),
).map(b"".join)
LINE = st.sampled_from(
    [
        b"GET / HTTP/1.1\r\n",
        b"POST /a?b HTTP/1.1\r\n",
        b"POST / HTTP/1.0\r\n",
        b"OPTIONS * HTTP/1.1\r\n",
        b"GET  / HTTP/1.1\r\n",
        b"GET / HTTP/1.1\n",
        b"\r\nGET / HTTP/1.1\r\n",
        b"GET http://a/ HTTP/1.1\r\n",
    ]
)
HEADS = st.tuples(LINE, st.lists(FIELD, max_size=5)).map(lambda parts: parts[0] + b"".join(parts[1]) + b"\r\n")


@settings(max_examples=1500, deadline=None)
@given(HEADS)
def test_a_request_that_goes_on_is_read_by_another_parser_as_the_same_one(data: bytes) -> None:
    try:
        head = read_request(data)
        body = request_body(head)
    except Malformed:
        return
    upgrade = wants_websocket(head)
    reader = h11.Connection(h11.SERVER)
    reader.receive_data(rewrite.request(head, LAB, "127.0.0.1", body=body, upgrade=upgrade))
    request = reader.next_event()
    assert isinstance(request, h11.Request)
    assert (request.method, request.target) == (head.method, head.target)
    fields = dict(request.headers)
    assert fields[b"host"] == b"localhost:8888"
    assert fields[b"x-forwarded-host"] == b"lab-8888.localhost:7777"
    assert b"kohakuriver" not in fields.get(b"cookie", b"")
    assert fields.get(b"transfer-encoding") == (b"chunked" if body == CHUNKED else None)
    assert int(fields.get(b"content-length", 0)) == max(body, 0)
    assert (fields.get(b"upgrade") is not None) == upgrade
    assert reader.trailing_data[0] == b""


CHUNK = st.tuples(
    st.sampled_from(
        [b"0", b"5", b"05", b"A", b"5;x=y", b"5 ", b"0x5", b"+5", b"", b"-1", b"5;\n", b"fffffffffffffffff"]
    ),
    st.sampled_from([b"\r\n", b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r"]),
    st.sampled_from([b"hello", b"hello", b"0123456789", b"", b"0\r\n\r\n"]),
    st.sampled_from([b"\r\n", b"\r\n", b"\r\n", b"\r\n", b"\n", b""]),
).map(b"".join)
BODIES = st.tuples(
    st.lists(CHUNK, max_size=5).map(b"".join), st.sampled_from([b"0\r\n\r\n", b"0\r\nX: y\r\n\r\n", b""])
)


@settings(max_examples=1500, deadline=None)
@given(BODIES, st.integers(1, 40))
def test_chunks_that_go_on_are_read_by_another_parser_to_the_same_end(body: tuple[bytes, bytes], size: int) -> None:
    data = b"".join(body) + b"GET /next"
    chunks, passed, at = Chunks(), b"", 0
    try:
        while at < len(data) and not chunks.over:
            consumed, pieces = chunks.walk(memoryview(data)[at : at + size])
            at += consumed
            passed += b"".join(pieces)
    except Malformed:
        return
    reader = h11.Connection(h11.SERVER)
    reader.receive_data(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + passed)
    assert isinstance(reader.next_event(), h11.Request)
    while isinstance(event := reader.next_event(), h11.Data):
        pass
    assert isinstance(event, h11.EndOfMessage) == chunks.over
    assert reader.trailing_data[0] == b"" or not chunks.over


APPS, PREFIX = "https://apps.example.org", b"/lab-abcdefghijkl/8888"
UNDER = Place("lab", 8888, 443, name="apps.example.org", scheme="https", prefix=PREFIX.decode())
PARTS = [
    PREFIX,
    b"/other-abcdefghijkl/80",
    b"/",
    b"//",
    b"\\",
    b"..",
    b"%2e",
    b"\t",
    b"x",
    b"?",
    b"#",
    b"evil.example",
    b"",
]
PATHS = st.lists(st.sampled_from(PARTS), max_size=5).map(b"".join)
ATTRIBUTE = st.tuples(
    st.sampled_from([b"Path", b"path", b" PATH ", b"\tPath", b"Domain", b" domain", b"Secure", b""]),
    st.sampled_from([b"=", b" = ", b"", b"=="]),
    st.one_of(PATHS, st.sampled_from([b'"/"', b"example.org", b".org"])),
).map(b"".join)
NAME = st.sampled_from(
    [b"a", b"__Host-a", b" __hOsT-a", b"kohakuriver-app", b"__Secure-kohakuriver-app", b"=__Host-a", b""]
)
COOKIE = st.tuples(NAME, st.lists(ATTRIBUTE, max_size=4)).map(lambda parts: b";".join([parts[0] + b"=b", *parts[1]]))


@settings(max_examples=1000, deadline=None)
@given(COOKIE)
def test_no_cookie_of_a_service_gets_out_of_its_prefix(cookie: bytes) -> None:
    """As browsers read one: RFC 6265bis, section 5.6."""
    try:
        head = read_response(b"HTTP/1.1 200 OK\r\nSet-Cookie: " + cookie + b"\r\n\r\n")
    except Malformed:
        return
    for line in rewrite.response(head, UNDER, body=0, close=False).split(b"\r\n"):
        if not line.startswith(b"Set-Cookie: "):
            continue
        pair, *attributes = line.removeprefix(b"Set-Cookie: ").split(b";")
        assert not pair.strip(b" \t").lower().startswith(b"__host-")
        assert not pair.strip(b" \t=").lower().startswith((b"kohakuriver-", b"__secure-kohakuriver-"))
        about = [
            (each.partition(b"=")[0].strip(b" \t").lower(), each.partition(b"=")[2].strip(b" \t"))
            for each in attributes
        ]
        assert b"domain" not in dict(about)
        paths = [value for name, value in about if name == b"path" and value.startswith(b"/")]
        assert all(path == PREFIX or path.startswith(PREFIX + b"/") for path in paths)
        assert len([name for name, _ in about if name == b"path"]) == len(paths) <= 1


@settings(max_examples=1000, deadline=None)
@given(PATHS)
def test_a_path_to_which_a_service_leads_is_under_its_prefix(path: bytes) -> None:
    """Unless it climbs out of it, or leads to another site: it may link there, too."""
    location = b"/" + path
    try:
        head = read_response(b"HTTP/1.1 302 Found\r\nLocation: " + location + b"\r\n\r\n")
    except Malformed:
        return
    lines = rewrite.response(head, UNDER, body=0, close=False).split(b"\r\n")
    (told,) = [line.removeprefix(b"Location: ") for line in lines if line.startswith(b"Location: ")]
    stripped = location.strip(b" \t")
    if stripped[1:2] in (b"/", b"\\"):
        assert told == stripped
    else:
        assert UNDER.has(told)
        plain = told.partition(b"?")[0].partition(b"#")[0].replace(b"%2e", b".")
        if b".." not in plain and b"/." not in plain:
            assert urljoin(f"{APPS}/x", told.decode()).startswith(f"{APPS}{PREFIX.decode()}")

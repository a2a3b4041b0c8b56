"""What a service sees of a request, and a browser of an answer."""

from __future__ import annotations

import pytest

from kohakuriver.gateway import rewrite
from kohakuriver.gateway.heads import CHUNKED, read_request, read_response, request_body, wants_websocket
from kohakuriver.gateway.names import Place

LAB = Place("lab", 8888, 7777)
OWN = b"http://lab-8888.localhost:7777"


def inside(fields: bytes, *, place: Place = LAB, line: bytes = b"GET /a?b HTTP/1.1") -> list[bytes]:
    """The lines that the service gets."""
    head = read_request(line + b"\r\nHost: lab-8888.localhost:7777\r\n" + fields + b"\r\n")
    sent = rewrite.request(head, place, "127.0.0.1", body=request_body(head), upgrade=wants_websocket(head))
    assert sent.endswith(b"\r\n\r\n")
    return sent[:-4].split(b"\r\n")


def outside(fields: bytes, *, close: bool = False, status: int = 200, more: bytes = b"") -> list[bytes]:
    """The lines that the browser gets."""
    head = read_response(b"HTTP/1.0 %d OK\r\n" % status + fields + b"\r\n")
    return rewrite.response(head, LAB, body=5, close=close, more=more)[:-4].split(b"\r\n")


def test_the_service_believes_that_it_is_on_localhost() -> None:
    lines = inside(b"Origin: " + OWN + b"\r\nReferer: " + OWN + b"/lab?x\r\nAuthorization: token secret\r\n")
    assert lines == [
        b"GET /a?b HTTP/1.1",
        b"Host: localhost:8888",
        b"Origin: http://localhost:8888",
        b"Referer: http://localhost:8888/lab?x",
        b"Authorization: token secret",
        b"X-Forwarded-For: 127.0.0.1",
        b"X-Forwarded-Host: lab-8888.localhost:7777",
        b"X-Forwarded-Proto: http",
    ]


def test_preserve_host_leaves_the_address_as_it_is() -> None:
    lines = inside(b"Origin: " + OWN + b"\r\n", place=Place("lab", 8888, 7777, preserve_host=True))
    assert b"Host: lab-8888.localhost:7777" in lines
    assert b"Origin: " + OWN in lines


@pytest.mark.parametrize("origin", [b"null", b"http://evil.example", OWN + b".evil.example", OWN + b"1"])
def test_another_pages_origin_stays_what_it_is(origin: bytes) -> None:
    assert b"Origin: " + origin in inside(b"Origin: " + origin + b"\r\n")


@pytest.mark.parametrize(
    "name",
    [
        b"X-Forwarded-For",
        b"x-forwarded-host",
        b"X_Forwarded_Host",
        b"X-Forwarded-Proto",
        b"X-Forwarded-Prefix",
        b"X_Real-IP",
        b"Forwarded",
    ],
)
def test_nobody_but_us_tells_where_a_request_came_from(name: bytes) -> None:
    assert not any(b"evil" in line for line in inside(name + b": evil\r\n"))


def test_what_is_between_two_neighbours_is_not_passed_on() -> None:
    lines = inside(
        b"Connection: keep-alive, X-Private, Upgrade, Cookie, Host\r\nX-Private: 1\r\nKeep-Alive: 5\r\nTE: trailers\r\n"
        b"Proxy-Authorization: Basic x\r\nProxy-Connection: keep-alive\r\nUpgrade: h2c\r\nHTTP2-Settings: x\r\n"
        b"Cookie: a=b\r\n"
    )
    names = {line.split(b":")[0] for line in lines[1:]}
    assert names == {
        b"Host",
        b"HTTP2-Settings",
        b"Cookie",
        b"X-Forwarded-For",
        b"X-Forwarded-Host",
        b"X-Forwarded-Proto",
    }


def test_the_framing_is_written_anew() -> None:
    lines = inside(b"transfer-encoding: CHUNKED\r\n", line=b"POST / HTTP/1.1")
    assert [line for line in lines if line.lower().startswith(b"transfer")] == [b"Transfer-Encoding: chunked"]
    assert b"Content-Length: 5" in inside(b"Content-Length: 5\r\n", line=b"POST / HTTP/1.1")
    assert b"Connection: close" in inside(b"Connection: keep-alive\r\n", line=b"GET / HTTP/1.0")


def test_a_websocket_is_asked_for_as_it_was() -> None:
    lines = inside(b"Upgrade: websocket\r\nConnection: keep-alive, Upgrade\r\nSec-WebSocket-Key: k\r\n")
    assert lines.count(b"Connection: Upgrade") == lines.count(b"Upgrade: websocket") == 1
    assert b"Sec-WebSocket-Key: k" in lines


def test_our_cookies_stay_here() -> None:
    assert b"Cookie: a=b" in inside(b"Cookie: kohakuriver-web-7777=x; a=b\r\n")
    assert not any(line.startswith(b"Cookie") for line in inside(b"Cookie: kohakuriver-web-7777=x\r\n"))


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        (b"http://localhost:8888/lab?x#y", OWN + b"/lab?x#y"),
        (b"HTTP://LocalHost:8888", OWN),
        (b"https://127.0.0.1:8888/", OWN + b"/"),
        (b"//[::1]:8888/x", OWN + b"/x"),
        (b"/lab", b"/lab"),
        (b"lab?next=http://localhost:8888/", b"lab?next=http://localhost:8888/"),
        (b"http://localhost:88888/", b"http://localhost:88888/"),
        (b"http://localhost:8888.evil.example/", b"http://localhost:8888.evil.example/"),
        (b"http://localhost:8888@evil.example/", b"http://localhost:8888@evil.example/"),
        (b"http://localhost:9999/", b"http://localhost:9999/"),
        (b"https://example.org/", b"https://example.org/"),
    ],
)
def test_a_redirection_to_the_service_itself_leads_to_its_address(location: bytes, shown: bytes) -> None:
    assert b"Location: " + shown in outside(b"Location: " + location + b"\r\n")


@pytest.mark.parametrize(
    ("cookie", "kept"),
    [
        (b"a=b; Path=/; HttpOnly", b"a=b; Path=/; HttpOnly"),
        (b"a=b; Domain=localhost; Path=/", b"a=b; Path=/"),
        (b"a=b; dOmAiN = .lab-8888.localhost;Secure", b"a=b;Secure"),
        (b"a=b;domain", b"a=b"),
        (b"domain=x; Path=/", b"domain=x; Path=/"),
        (b"kohakuriver-web-7777=stolen", None),
        (b" Kohakuriver-Web-7777=stolen; Path=/", None),
        (b"=kohakuriver-web-7777=stolen", None),
    ],
)
def test_a_services_cookie_is_its_own_addresss_alone(cookie: bytes, kept: bytes | None) -> None:
    lines = [line for line in outside(b"Set-Cookie: " + cookie + b"\r\n") if line.startswith(b"Set-Cookie")]
    assert lines == ([] if kept is None else [b"Set-Cookie: " + kept])


@pytest.mark.parametrize(
    ("cleared", "kept"),
    [
        (b'"cookies"', None),
        (b'"cache", "cookies" , "storage"', b'"cache", "storage"'),
        (b'"*"', b'"cache", "storage", "executionContexts"'),
        (b'"storage"', b'"storage"'),
        (b'"coo kies", " * ", "cookies ", "later"', None),
    ],
)
def test_a_service_clears_no_cookies_which_would_be_those_of_all_its_siblings(
    cleared: bytes, kept: bytes | None
) -> None:
    lines = outside(b"Clear-Site-Data: " + cleared + b"\r\n")[1:]
    assert lines == ([] if kept is None else [b"Clear-Site-Data: " + kept])


@pytest.mark.parametrize(
    "name",
    [
        b"X-Accel-Redirect",
        b"x-sendfile",
        b"X-Sendfile-Temporary",
        b"X-LiteSpeed-Location",
        b"X-LIGHTTPD-send-file",
        b"X-Reproxy-URL",
    ],
)
def test_a_service_gives_no_orders_to_a_proxy_before_us(name: bytes) -> None:
    assert outside(name + b": /protected/of/others\r\nX-Accel-Buffering: no\r\n")[1:] == [b"X-Accel-Buffering: no"]


def test_no_cache_keeps_an_answer_that_has_a_cookie_of_ours() -> None:
    ours = b"Set-Cookie: kohakuriver-app-80=x\r\n"
    public = b"Cache-Control: public, max-age=600\r\nExpires: Sun, 29 Nov 2099 00:00:00 GMT\r\nSurrogate-Control: x\r\n"
    assert outside(public, more=ours)[1:] == [ours.strip(), b"Cache-Control: no-store"]
    assert outside(public)[1:] == public.strip().split(b"\r\n")


def test_an_answer_is_hops_own_and_says_when_it_is_the_last() -> None:
    lines = outside(b"Connection: keep-alive, X-Private\r\nX-Private: 1\r\nKeep-Alive: 5\r\nContent-Length: 5\r\n")
    assert lines == [b"HTTP/1.1 200 OK", b"Content-Length: 5"]
    assert outside(b"Content-Length: 5\r\n", close=True)[-1] == b"Connection: close"
    chunked = read_response(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    assert b"Transfer-Encoding: chunked\r\n" in rewrite.response(chunked, LAB, body=CHUNKED, close=False)

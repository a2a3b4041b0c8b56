"""What a service sees of a request, and a browser of an answer."""

from __future__ import annotations

from dataclasses import replace

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


def outside(
    fields: bytes, *, close: bool = False, status: int = 200, more: bytes = b"", place: Place = LAB
) -> list[bytes]:
    """The lines that the browser gets."""
    head = read_response(b"HTTP/1.0 %d OK\r\n" % status + fields + b"\r\n")
    return rewrite.response(head, place, body=5, close=close, more=more)[:-4].split(b"\r\n")


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


ELSEWHERE = b"http://localhost:8888.evil.example/"


@pytest.mark.parametrize(
    ("field", "shown"),
    [
        (b"Refresh: 5; url=http://localhost:8888/x", b"Refresh: 5; url=" + OWN + b"/x"),
        (b"Refresh: 0;URL='http://localhost:8888'", b"Refresh: 0;URL='" + OWN + b"'"),
        (b'Refresh: .5 , Url = "//127.0.0.1:8888/x" y', b'Refresh: .5 , Url = "' + OWN + b'/x" y'),
        (b"Refresh: 5 http://localhost:8888/x", b"Refresh: 5 " + OWN + b"/x"),
        (b"Refresh: 5", b"Refresh: 5"),
        (b"Refresh: 5; url=/x?y='z'", b"Refresh: 5; url=/x?y='z'"),
        (b"Refresh: 5; url=" + ELSEWHERE, b"Refresh: 5; url=" + ELSEWHERE),
        (b"Content-Location: http://localhost:8888/x", b"Content-Location: " + OWN + b"/x"),
        (
            b'Link: <http://localhost:8888/?p=2>; rel="next", <http://[::1]:8888/>; rel=up; title=",<x>"',
            b"Link: <" + OWN + b'/?p=2>; rel="next", <' + OWN + b'/>; rel=up; title=",<x>"',
        ),
        (b"Link: <" + ELSEWHERE + b">; rel=next", b"Link: <" + ELSEWHERE + b">; rel=next"),
    ],
)
def test_other_fields_that_name_an_address_of_the_service_name_that_outside(field: bytes, shown: bytes) -> None:
    assert outside(field + b"\r\n")[1:] == [shown]


@pytest.mark.parametrize(
    ("target", "told"),
    [
        (OWN + b"/b%20c?d", b"http://localhost:8888/b%20c?d"),
        (b"/b", b"/b"),
        (OWN + b"1/b", OWN + b"1/b"),
        (OWN + b".evil.example/b", OWN + b".evil.example/b"),
        (b"//evil.example/b", b"//evil.example/b"),
        (b"https://elsewhere.example/b", b"https://elsewhere.example/b"),
    ],
)
def test_what_webdav_copies_and_moves_to_is_an_address_of_the_service(target: bytes, told: bytes) -> None:
    assert b"Destination: " + told in inside(b"Destination: " + target + b"\r\n", line=b"MOVE /a HTTP/1.1")
    lines = inside(b"If: <" + target + b'> (<urn:uuid:1> [W/"e"])\r\n', line=b"PUT /a HTTP/1.1")
    assert b"If: <" + told + b'> (<urn:uuid:1> [W/"e"])' in lines
    asked = b"Destination: " + target
    assert asked in inside(asked + b"\r\n", place=replace(LAB, preserve_host=True), line=b"COPY /a HTTP/1.1")


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


# -- under the one origin of all apps --------------------------------------------------------------------------------

PREFIX = b"/lab-abcdefghijkl/8888"
APPS = b"https://apps.example.org"
STRIPPED = Place("lab", 8888, 443, name="apps.example.org", scheme="https", prefix=PREFIX.decode())
KEPT = replace(STRIPPED, keep_prefix=True)


def under(fields: bytes, place: Place = STRIPPED) -> list[bytes]:
    """The lines that the service gets of a request to a path under the prefix."""
    return inside(fields, place=place, line=b"GET " + PREFIX + b"/a?b HTTP/1.1")


def test_a_service_is_told_paths_without_the_prefix_and_what_that_is() -> None:
    lines = under(b"Referer: " + APPS + PREFIX + b"/x\r\nOrigin: " + APPS + b"\r\nX-Forwarded-Prefix: /evil\r\n")
    assert lines[0] == b"GET /a?b HTTP/1.1"
    assert b"Host: localhost:8888" in lines
    assert b"Referer: http://localhost:8888/x" in lines
    assert b"Origin: http://localhost:8888" in lines
    assert [line for line in lines if b"-Prefix" in line] == [b"X-Forwarded-Prefix: " + PREFIX]


def test_a_service_that_knows_its_prefix_is_told_paths_as_they_are() -> None:
    lines = under(b"Referer: " + APPS + PREFIX + b"/x\r\n", KEPT)
    assert lines[0] == b"GET " + PREFIX + b"/a?b HTTP/1.1"
    assert b"Referer: http://localhost:8888" + PREFIX + b"/x" in lines
    assert not [line for line in lines if b"-Prefix" in line]


@pytest.mark.parametrize("place", [STRIPPED, KEPT, replace(STRIPPED, preserve_host=True)])
def test_a_service_is_not_told_the_address_of_another_app(place: Place) -> None:
    for path in (b"/other-abcdefghijkl/8888/", PREFIX + b"8/", PREFIX.upper() + b"/"):
        assert not [line for line in under(b"Referer: " + APPS + path + b"\r\n", place) if b"Referer" in line]
    for other in (APPS + b"/", b"https://elsewhere.example/" + PREFIX):
        assert [line for line in under(b"Referer: " + other + b"\r\n", place) if b"Referer" in line]


@pytest.mark.parametrize(
    ("location", "told", "kept"),
    [
        (b"/login?next=/", APPS[:0] + PREFIX + b"/login?next=/", b"/login?next=/"),
        (PREFIX + b"/login", PREFIX + b"/login", PREFIX + b"/login"),
        (PREFIX + b"9/login", PREFIX + PREFIX + b"9/login", PREFIX + b"9/login"),
        (b"/other-abcdefghijkl/80/", PREFIX + b"/other-abcdefghijkl/80/", b"/other-abcdefghijkl/80/"),
        (b"http://localhost:8888/x", APPS + PREFIX + b"/x", APPS + b"/x"),
        (b"//127.0.0.1:8888/x", APPS + PREFIX + b"/x", APPS + b"/x"),
        (b"http://localhost:8888" + PREFIX + b"/x", APPS + PREFIX + b"/x", APPS + PREFIX + b"/x"),
        (APPS + b"/x", APPS + PREFIX + b"/x", APPS + b"/x"),
        (APPS + PREFIX + b"/x", APPS + PREFIX + b"/x", APPS + PREFIX + b"/x"),
        (b"x/y", b"x/y", b"x/y"),
        (b"?x=/y", b"?x=/y", b"?x=/y"),
        (b"//elsewhere.example/", b"//elsewhere.example/", b"//elsewhere.example/"),
        (b"/\\elsewhere.example/", b"/\\elsewhere.example/", b"/\\elsewhere.example/"),
        (APPS + b".evil.example/", APPS + b".evil.example/", APPS + b".evil.example/"),
        (b"/\t/elsewhere.example", PREFIX + b"/\t/elsewhere.example", b"/\t/elsewhere.example"),
    ],
)
def test_a_redirection_to_a_path_of_the_service_leads_there_under_the_prefix(
    location: bytes, told: bytes, kept: bytes
) -> None:
    for place, outer in ((STRIPPED, told), (KEPT, kept)):
        assert b"Location: " + outer in outside(b"Location: " + location + b"\r\n", status=302, place=place)


@pytest.mark.parametrize(
    ("field", "told"),
    [
        (b"Refresh: 5; url=/x", b"Refresh: 5; url=%s/x"),
        (b"Refresh: 5; url=%s/x", b"Refresh: 5; url=%s/x"),
        (b"Refresh: 0;url='/x'; more", b"Refresh: 0;url='%s/x'; more"),
        (b"Refresh: 0; /x", b"Refresh: 0; %s/x"),
        (b"Refresh: 0", b"Refresh: 0"),
        (b"Refresh: 0; url=//evil.example/x", b"Refresh: 0; url=//evil.example/x"),
        (b"Content-Location: /x.en", b"Content-Location: %s/x.en"),
        (b"Link: </a.css>;rel=preload,<b.css>;rel=x,</c>", b"Link: <%s/a.css>;rel=preload,<b.css>;rel=x,<%s/c>"),
    ],
)
def test_paths_in_other_fields_lead_there_under_the_prefix_too(field: bytes, told: bytes) -> None:
    field, told = field.replace(b"%s", PREFIX), told.replace(b"%s", PREFIX)
    assert outside(field + b"\r\n", place=STRIPPED)[1:] == [told]
    assert outside(field + b"\r\n", place=KEPT)[1:] == [field]


@pytest.mark.parametrize(
    ("target", "told", "kept"),
    [
        (APPS + PREFIX + b"/b", b"http://localhost:8888/b", b"http://localhost:8888" + PREFIX + b"/b"),
        (APPS + b"/b", b"http://localhost:8888/b", b"http://localhost:8888/b"),  # as the service itself told it
        (APPS + PREFIX, b"http://localhost:8888/", b"http://localhost:8888" + PREFIX),
        (PREFIX + b"/b", b"/b", PREFIX + b"/b"),
        (PREFIX + b"8/b", PREFIX + b"8/b", PREFIX + b"8/b"),
        (b"/b", b"/b", b"/b"),
    ],
)
def test_what_webdav_copies_and_moves_to_is_told_without_the_prefix(target: bytes, told: bytes, kept: bytes) -> None:
    for place, inner in ((STRIPPED, told), (KEPT, kept)):
        assert b"Destination: " + inner in under(b"Destination: " + target + b"\r\n", place)
        assert b"If: <" + inner + b"> (<urn:uuid:1>)" in under(b"If: <" + target + b"> (<urn:uuid:1>)\r\n", place)
    preserved = told.replace(b"http://localhost:8888", APPS)
    assert b"Destination: " + preserved in under(
        b"Destination: " + target + b"\r\n", replace(STRIPPED, preserve_host=True)
    )


@pytest.mark.parametrize(
    ("cookie", "told", "kept"),
    [
        (b"a=b", b"a=b", b"a=b"),
        (b"a=b; Path=/", b"a=b; Path=%s/", b"a=b; Path=%s/"),
        (b"a=b; path = /api ;Secure", b"a=b;Secure; Path=%s/api", b"a=b;Secure; Path=%s/"),
        (b"a=b; Path=%s/api", b"a=b; Path=%s/api", b"a=b; Path=%s/api"),
        (b"a=b; Path=%s", b"a=b; Path=%s", b"a=b; Path=%s"),
        (b"a=b; Path=%s9", b"a=b; Path=%s%s9", b"a=b; Path=%s/"),
        (b"a=b; Path=%s; Path=/", b"a=b; Path=%s/", b"a=b; Path=%s/"),
        (b"a=b; Path=/; Path=x", b"a=b", b"a=b"),
        (b"a=b; Path=/; Path", b"a=b", b"a=b"),
        (b'a=b; Path="/"', b"a=b", b"a=b"),
        (b"a=b; Path=/other-abcdefghijkl/80/", b"a=b; Path=%s/other-abcdefghijkl/80/", b"a=b; Path=%s/"),
        (b"a=b; Domain=example.org; Path=/", b"a=b; Path=%s/", b"a=b; Path=%s/"),
        (
            b"__Host-a=b; Path=/; Secure",
            b"__Secure-Host-a=b; Secure; Path=%s/",
            b"__Secure-Host-a=b; Secure; Path=%s/",
        ),
        (b" __hOST-a=b; Path=/", b"__Secure-hOST-a=b; Path=%s/", b"__Secure-hOST-a=b; Path=%s/"),
        (b"a=b; Path=%s?", b"a=b; Path=%s%s?", b"a=b; Path=%s/"),
        (b"__Secure-kohakuriver-app=b; Path=/", None, None),
        (b"__Host-kohakuriver-host-8000=b; Path=/", None, None),
        (b"__Host-Http-kohakuriver-host=b; Path=/", None, None),
        (b" =kohakuriver-app-1; Path=/", None, None),
    ],
)
def test_cookies_of_a_service_stay_under_its_prefix(cookie: bytes, told: bytes | None, kept: bytes | None) -> None:
    for place, outer in ((STRIPPED, told), (KEPT, kept)):
        lines = outside(b"Set-Cookie: " + cookie.replace(b"%s", PREFIX) + b"\r\n", place=place)
        found = [line for line in lines if line.startswith(b"Set-Cookie")]
        assert found == ([] if outer is None else [b"Set-Cookie: " + outer.replace(b"%s", PREFIX)])


def test_a_cookie_whose_name_asks_for_all_of_an_origin_comes_back_to_the_service_as_it_was_named() -> None:
    cookies = b"a=b; __Secure-Host-c=d; __Secure-hOST-e=f;  __Secure-kohakuriver-app=g; __Secure-h=i"
    cookies += b"; __Host-Http-kohakuriver-host=j"
    assert b"Cookie: a=b; __Host-c=d; __hOST-e=f; __Secure-h=i" in under(b"Cookie: " + cookies + b"\r\n")
    lines = inside(b"Cookie: __Secure-Host-c=d\r\n")  # an address of its own needs none of that
    assert b"Cookie: __Secure-Host-c=d" in lines


def test_what_would_go_for_all_of_the_origin_is_not_said_by_one_of_its_apps() -> None:
    fields = (
        b'Clear-Site-Data: "cache", "storage"\r\n'
        b"Strict-Transport-Security: max-age=0\r\n"
        b'Alt-Svc: h3=":9999"\r\n'
        b'NEL: {"report_to": "evil"}\r\n'
        b"Report-To: {}\r\n"
        b'Use-As-Dictionary: match="/*"\r\n'
        b'Secure-Session-Registration: (ES256);path="x"\r\n'
        b"Service-Worker-Allowed: /\r\n"
    )
    for place in (STRIPPED, KEPT):
        lines = outside(fields, place=place)
        assert lines[1:] == [b"Service-Worker-Allowed: " + PREFIX + b"/"]
    assert len(outside(fields)) == 9  # of an address of its own that is its own business


@pytest.mark.parametrize(
    ("challenge", "told"),
    [
        (b'Basic realm="staff"', b'Basic realm="staff %s"'),
        (b"basic REALM = staff", b'Basic realm="staff %s"'),
        (b'Basic realm="staff", charset="utf-8"', b'Basic realm="staff %s", charset="UTF-8"'),
        (b"Basic", b'Basic realm=" %s"'),
        (b'Negotiate, Basic realm="staff"', b'Basic realm="staff %s"'),
        (b'Basic x="realm=y", realm="staff"', b'Basic realm="y %s"'),
        (b'Basic realm="a\\"b", realm="staff"', b'Basic realm="a %s"'),
        (b'Bearer realm="staff"', b'Bearer realm="staff"'),
        (b'Digest realm="staff", nonce="basic"', b'Digest realm="staff", nonce="basic"'),
    ],
)
def test_no_app_is_sent_the_password_that_was_typed_for_another(challenge: bytes, told: bytes) -> None:
    lines = outside(b"WWW-Authenticate: " + challenge + b"\r\n", status=401, place=STRIPPED)
    assert b"WWW-Authenticate: " + told.replace(b"%s", PREFIX) in lines
    assert b"WWW-Authenticate: " + challenge in outside(b"WWW-Authenticate: " + challenge + b"\r\n", status=401)

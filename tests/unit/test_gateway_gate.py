"""Who may go to which address: names, links, cookies, and where a request comes from."""

from __future__ import annotations

import re

import pytest

from kohakuriver.gateway.entrance import CODE_SECONDS, SEEN_SECONDS, Entrance, without_ours
from kohakuriver.gateway.gate import Door, Gate
from kohakuriver.gateway.heads import Malformed, read_request
from kohakuriver.gateway.names import Place, is_label

LAB = Place("lab", 8888, 7777)
OTHER = Place("lab", 6006, 7777)
NAVIGATES = b"Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: navigate\r\nSec-Fetch-Dest: document\r\n"
PASSED = "passed to 8888"
UPGRADES = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def gate() -> Gate:
    return Gate(lambda place: f"Run it for {place.port}.")


@pytest.fixture
def doors(gate: Gate) -> list[Door]:
    return gate.add([LAB, OTHER])


def asked(gate: Gate, fields: bytes, *, host: bytes = b"lab-8888.localhost:7777", line: bytes = b"GET /") -> str:
    """What answers a request, or PASSED to the port of the task."""
    answer = gate.judge(read_request(line + b" HTTP/1.1\r\nHost: " + host + b"\r\n" + fields + b"\r\n"), close=False)
    return f"passed to {answer.port}" if isinstance(answer, Place) else answer.decode()


def let_in(gate: Gate, door: Door) -> bytes:
    """The Cookie field of a browser that has followed a link."""
    path = door.link().removeprefix(door.place.origin).encode()
    answer = asked(gate, b"", host=door.place.host.encode(), line=b"GET " + path)
    assert answer.startswith("HTTP/1.1 303 ")
    assert "\r\nLocation: /\r\n" in answer
    found = re.search("\r\nSet-Cookie: ([^;]*); Path=/; HttpOnly; SameSite=Lax\r\n", answer)
    assert found
    return b"Cookie: a=b; " + found[1].encode() + b"\r\n"


@pytest.mark.parametrize(
    ("task", "stands"),
    [
        ("lab", True),
        ("12", True),
        ("lab-8888", True),
        ("a" * 57, True),
        ("a" * 58, False),
        ("lab.one", False),
        ("lab_one", False),
        ("lab-", False),
        ("-lab", False),
        ("xn--lab", False),
        ("Lab", False),
        ("", False),
    ],
)
def test_a_name_stands_in_an_address_where_it_is_a_label(task: str, stands: bool) -> None:
    assert is_label(task) is stands


def test_an_address_is_written_as_browsers_write_it() -> None:
    assert LAB.url == "http://lab-8888.localhost:7777/"
    assert LAB.inner_host == "localhost:8888"
    assert Place("lab", 80, 80).origin == "http://lab-80.localhost"
    assert Place("lab", 80, 80).inner_host == "localhost"
    assert Place("lab", 80, 7777, preserve_host=True).inner_host == "lab-80.localhost:7777"


def test_whoever_followed_the_link_is_let_in(gate: Gate, doors: list[Door]) -> None:
    cookie = let_in(gate, doors[0])
    assert asked(gate, cookie) == PASSED
    assert asked(gate, cookie, host=b"LAB-8888.LocalHost:7777") == PASSED
    assert "403" in asked(gate, b"")
    assert "403" in asked(gate, b"Cookie: kohakuriver-web-7777=wrong; kohakuriver-web-7777=\r\n")


def test_the_cookie_of_one_address_opens_no_other(gate: Gate, doors: list[Door]) -> None:
    cookie = let_in(gate, doors[0])
    assert "403" in asked(gate, cookie, host=OTHER.host.encode())


@pytest.mark.parametrize(
    "host",
    [
        b"lab-8888.localhost",
        b"lab-8888.localhost:80",
        b"lab-8888.localhost:7778",
        b"lab-8888.localhost.:7777",
        b"lab-9999.localhost:7777",
        b"x.lab-8888.localhost:7777",
        b"lab-8888.localhost:7777@evil.example",
        b"user@lab-8888.localhost:7777",
        b"lab-8888.localhost:7777, evil.example",
        b"evil.example:7777",
        b"lab-8888.localhost.evil.example:7777",
        b"",
    ],
)
def test_a_name_that_is_not_served_leads_nowhere_and_tells_nothing(gate: Gate, doors: list[Door], host: bytes) -> None:
    answer = asked(gate, let_in(gate, doors[0]), host=host)
    assert answer.startswith("HTTP/1.1 421 ")
    assert "lab" not in answer


@pytest.mark.parametrize("host", [b"127.0.0.1:7777", b"[::1]:7777", b"localhost:7777"])
def test_whoever_asks_by_hand_is_told_the_addresses(gate: Gate, doors: list[Door], host: bytes) -> None:
    answer = asked(gate, let_in(gate, doors[0]), host=host)
    assert answer.startswith("HTTP/1.1 421 ")
    assert 'href="http://lab-8888.localhost:7777/"' in answer


@pytest.mark.parametrize("name", [b"X-Forwarded-Host", b"Forwarded", b"X-Host", b"X-Original-Host"])
def test_the_host_field_decides_and_no_other(gate: Gate, doors: list[Door], name: bytes) -> None:
    fields = let_in(gate, doors[0]) + name + b": lab-8888.localhost:7777\r\n"
    assert "421" in asked(gate, fields, host=b"evil.example")
    assert asked(gate, fields.replace(b"lab-8888", b"lab-6006")) == PASSED


@pytest.mark.parametrize("fields", [b"", b"Host: lab-8888.localhost:7777\r\nHost: lab-8888.localhost:7777\r\n"])
def test_without_one_host_nothing_is_served(gate: Gate, doors: list[Door], fields: bytes) -> None:
    with pytest.raises(Malformed):
        gate.judge(read_request(b"GET / HTTP/1.1\r\n" + fields + b"\r\n"), close=False)


def test_a_code_is_good_once_and_whoever_came_in_with_it_is_out_when_it_is_used_again() -> None:
    entrance = Entrance(7777)
    code, other = entrance.code().encode(), entrance.code().encode()
    first, second = entrance.enter(code), entrance.enter(other)
    assert first
    assert second
    assert entrance.admits([first.split(b";")[0]])
    assert entrance.enter(code) is None
    assert not entrance.admits([first.split(b";")[0]])
    assert entrance.admits([second.split(b";")[0]])


@pytest.mark.parametrize(("late", "out"), [(0.0, True), (0.1, False)])
def test_an_old_code_puts_nobody_out(late: float, out: bool) -> None:
    clock, told = Clock(), list[str]()
    entrance = Entrance(7777, clock, lambda: told.append("out"))
    code = entrance.code().encode()
    cookie = entrance.enter(code)
    assert cookie
    clock.now = CODE_SECONDS + SEEN_SECONDS + late
    for _ in range(2):
        assert entrance.enter(code) is None
    assert entrance.admits([cookie.split(b";")[0]]) is not out
    assert told == ["out"] * out


def test_a_code_is_good_for_a_minute() -> None:
    clock = Clock()
    entrance = Entrance(7777, clock)
    early, late = entrance.code().encode(), entrance.code().encode()
    clock.now = CODE_SECONDS
    assert entrance.enter(early)
    clock.now += 0.1
    assert entrance.enter(late) is None
    assert entrance.enter(b"") is None


def test_a_browser_that_is_in_may_follow_its_link_again(gate: Gate, doors: list[Door]) -> None:
    path = doors[0].link().removeprefix(LAB.origin).encode()
    answer = asked(gate, b"", line=b"GET " + path)
    cookie = b"Cookie: " + answer.partition("Set-Cookie: ")[2].partition(";")[0].encode() + b"\r\n"
    assert "303" in asked(gate, cookie, line=b"GET " + path)
    assert asked(gate, cookie) == PASSED
    assert "403" in asked(gate, b"", line=b"GET " + path)
    assert "403" in asked(gate, cookie)


@pytest.mark.parametrize("line", [b"HEAD %s", b"POST %s"])
def test_nothing_but_a_visit_uses_a_code_up(gate: Gate, doors: list[Door], line: bytes) -> None:
    path = doors[0].link().removeprefix(LAB.origin).encode()
    assert "404" in asked(gate, b"", line=line % path)
    assert "303" in asked(gate, b"", line=b"GET " + path)


@pytest.mark.parametrize("target", [b"/.kohakuriver/", b"/.kohakuriver/x", b"/.kohakuriver/login/x?code=y"])
def test_our_own_paths_never_reach_a_service(gate: Gate, doors: list[Door], target: bytes) -> None:
    assert "404" in asked(gate, let_in(gate, doors[0]), line=b"GET " + target)


def test_a_login_leads_to_no_other_place(gate: Gate, doors: list[Door]) -> None:
    path = doors[0].link().removeprefix(LAB.origin).encode() + b"&next=//evil.example/"
    assert "evil" not in asked(gate, b"", line=b"GET " + path)


@pytest.mark.parametrize(
    ("line", "fields", "may"),
    [
        (b"GET /", b"Sec-Fetch-Site: none\r\nSec-Fetch-Mode: navigate\r\nSec-Fetch-Dest: document\r\n", True),
        (b"GET /", b"Sec-Fetch-Site: same-origin\r\n", True),
        (b"POST /", b"Sec-Fetch-Site: same-origin\r\nOrigin: http://lab-8888.localhost:7777\r\n", True),
        (b"GET /", NAVIGATES, True),
        (b"HEAD /", NAVIGATES, True),
        (b"POST /", NAVIGATES + b"Origin: http://evil.example\r\n", False),
        (b"DELETE /", NAVIGATES, False),
        (b"GET /", NAVIGATES.replace(b"document", b"iframe"), False),
        (b"GET /", NAVIGATES.replace(b"document", b"object"), False),
        (b"GET /", NAVIGATES.replace(b"navigate", b"no-cors"), False),
        (b"GET /", b"Sec-Fetch-Site: same-site\r\nSec-Fetch-Mode: cors\r\nSec-Fetch-Dest: empty\r\n", False),
        (b"GET /", b"Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: no-cors\r\nSec-Fetch-Dest: image\r\n", False),
        (b"POST /", b"Sec-Fetch-Site: cross-site\r\nOrigin: http://lab-8888.localhost:7777\r\n", False),
        (b"OPTIONS /", b"Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: cors\r\n", False),
        (b"GET /", b"", True),
        (b"POST /", b"", False),
        (b"POST /", b"Origin: http://lab-8888.localhost:7777\r\n", True),
        (b"POST /", b"Origin: http://lab-6006.localhost:7777\r\n", False),
        (b"POST /", b"Origin: null\r\n", False),
        (b"GET /", b"Origin: http://evil.example\r\n", False),
        (b"GET /", b"Origin: http://lab-8888.localhost:7777.evil.example\r\n", False),
    ],
)
def test_other_pages_may_do_what_a_link_may(
    gate: Gate, doors: list[Door], line: bytes, fields: bytes, may: bool
) -> None:
    answer = asked(gate, let_in(gate, doors[0]) + fields, line=line)
    assert (answer == PASSED) if may else ("403" in answer)


@pytest.mark.parametrize(
    ("fields", "may"),
    [
        (b"Origin: http://lab-8888.localhost:7777\r\n", True),
        (b"Origin: http://lab-8888.localhost:7777\r\nSec-Fetch-Site: same-origin\r\n", True),
        (b"", False),
        (b"Sec-Fetch-Site: same-origin\r\n", False),
        (b"Origin: null\r\n", False),
        (b"Origin: http://lab-6006.localhost:7777\r\n", False),
        (b"Origin: https://lab-8888.localhost:7777\r\n", False),
        (b"Origin: http://localhost:8888\r\n", False),
        (NAVIGATES, False),
    ],
)
def test_a_websocket_is_opened_only_by_a_page_of_the_same_address(
    gate: Gate, doors: list[Door], fields: bytes, may: bool
) -> None:
    answer = asked(gate, let_in(gate, doors[0]) + UPGRADES + fields)
    assert (answer == PASSED) if may else ("403" in answer)


@pytest.mark.parametrize(
    ("cookies", "left"),
    [
        (b"a=b", b"a=b"),
        (b"a=b; kohakuriver-web-7777=x; c=d", b"a=b; c=d"),
        (b"kohakuriver-web-1=x;kohakuriver-web-2=y", b""),
        (b"KohakuRiver-Web-7777=x; a=b", b"a=b"),
        (b"=kohakuriver-web-7777=x; a=b", b"a=b"),
        (b"a=kohakuriver-web-7777", b"a=kohakuriver-web-7777"),
    ],
)
def test_no_service_sees_a_cookie_of_an_entrance(cookies: bytes, left: bytes) -> None:
    assert without_ours(cookies) == left

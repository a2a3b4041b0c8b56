"""Where a login leads: to pages of this host that send browsers to log in, and nowhere else."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

import pytest

from kohakuriver.host.places import login_at, place_in

STATE = "0" * 64


@pytest.mark.parametrize(
    "place",
    [
        "/device",
        "/plain",
        "/open/lab/8888",
        "/open/l%C3%A4b/1",
        f"/enter-app?app=lab-8888-x.apps.example.org%3A8443&state={STATE}",
    ],
)
def test_a_login_leads_to_the_page_that_sent_the_browser_there(place: str) -> None:
    assert place_in(place) == place
    there = urlsplit(login_at(place, "a code"))
    assert (there.scheme, there.netloc, there.path) == ("", "", "/login")
    assert parse_qs(there.query) == {"code": ["a code"], "next": [place]}


@pytest.mark.parametrize(
    "place",
    [
        "",
        "device",
        "//evil.example",
        "//evil.example/open/lab/1",
        "/\\evil.example",
        "https://evil.example/device",
        "javascript:alert(1)//device",
        " /device",
        "/device\n",
        "/device?x=//evil.example",
        "/logout",
        "/api/tokens",
        "/open/lab/0",
        "/open/lab/1/../..",
        "/open/lab/1\r\nSet-Cookie: a=b",
        "/open/l\u00e4b/1",
        "/open/lab/\u0661",
        "/enter-app?app=x",
        "/enter-app?app=x&state=short",
        f"/enter-app?app=x&state={STATE}&app=y",
        f"/enter-app?app=//evil.example&state={STATE}",
    ],
)
def test_whatever_is_no_such_page_leads_to_the_first_one(place: str) -> None:
    assert place_in(place) == "/"
    assert login_at(place) == "/login"

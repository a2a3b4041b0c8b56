"""Which cookies of a browser count: under TLS none that a page of another name could have set."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from fastapi import Request

from kohakuriver.host.apps.then import remembered
from kohakuriver.host.cookies import shown_cookie, shown_place


def request(cookie: str, *, scheme: str = "http", by_tls: bool = False) -> Request:
    headers = [(b"host", b"river.example.org"), (b"cookie", cookie.encode())]
    app = SimpleNamespace(state=SimpleNamespace(by_tls=by_tls))
    scope = {"type": "http", "method": "GET", "scheme": scheme, "path": "/", "query_string": b"", "app": app}
    return Request({**scope, "headers": headers})


@pytest.mark.parametrize("how", [{"scheme": "https"}, {"by_tls": True}], ids=["over TLS", "TLS at a proxy before it"])
def test_where_browsers_come_over_tls_a_cookie_without_its_mark_is_none(how: dict[str, object]) -> None:
    assert shown_cookie(request("kohakuriver-host=of-a-sibling", **how)) is None  # type: ignore[arg-type]
    both = "kohakuriver-host=of-a-sibling; __Host-kohakuriver-host=own"
    assert shown_cookie(request(both, **how)) == "own"  # type: ignore[arg-type]
    assert shown_place(request("kohakuriver-then=/open/evil/1", **how)) is None  # type: ignore[arg-type]
    assert shown_place(request("__Host-kohakuriver-then=/open/lab/1", **how)) == "/open/lab/1"  # type: ignore[arg-type]


def test_on_plain_http_the_plain_name_counts_and_two_that_differ_are_none() -> None:
    assert shown_cookie(request("kohakuriver-host=own")) == "own"
    assert shown_cookie(request("kohakuriver-host=own; kohakuriver-host=another")) is None
    assert shown_place(request("kohakuriver-then=/open/a/1; kohakuriver-then=/open/b/1")) is None


@pytest.mark.parametrize(
    ("place", "taken"),
    [
        ("/enter-app?app=lab-8888-x.apps.example.org%3A8443&state=" + "0" * 64, True),
        ("/open/lab/8888", True),
        ("//evil.example/open/lab/1", False),
        ("/enter-app?app=x&state=short", False),
    ],
)
def test_where_a_browser_was_going_is_remembered_with_the_port_of_its_app(place: str, taken: bool) -> None:
    assert remembered(request(f"kohakuriver-then={place}")) == (place if taken else None)

"""Which cookies of a browser count: under TLS none that a page of another name could have set."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import Request
from websockets.datastructures import Headers

from kohakuriver.host.cookies import credential_of, shown_cookie


def request(cookie: str, *, scheme: str = "http", by_tls: bool = False, shares_name: bool = False) -> Request:
    headers = [(b"host", b"river.example.org"), (b"cookie", cookie.encode())]
    app = SimpleNamespace(state=SimpleNamespace(by_tls=by_tls, shares_name=shares_name))
    scope = {"type": "http", "method": "GET", "scheme": scheme, "path": "/", "query_string": b"", "app": app}
    return Request({**scope, "headers": headers})


@pytest.mark.parametrize("how", [{"scheme": "https"}, {"by_tls": True}], ids=["over TLS", "TLS at a proxy before it"])
def test_where_browsers_come_over_tls_a_cookie_without_its_mark_is_none(how: dict[str, object]) -> None:
    assert shown_cookie(request("kohakuriver-host=of-a-sibling", **how)) is None  # type: ignore[arg-type]
    both = "kohakuriver-host=of-a-sibling; __Host-kohakuriver-host=own"
    assert shown_cookie(request(both, **how)) == "own"  # type: ignore[arg-type]


def test_on_plain_http_the_plain_name_counts_and_two_that_differ_are_none() -> None:
    assert shown_cookie(request("kohakuriver-host=own")) == "own"
    assert shown_cookie(request("kohakuriver-host=own; kohakuriver-host=another")) is None


def test_where_apps_are_at_another_port_of_the_name_a_cookie_that_their_pages_could_have_set_is_none() -> None:
    by_page, own = "__Host-kohakuriver-host=of-a-page", "__Host-Http-kohakuriver-host=own"
    for how in ({"scheme": "https"}, {"by_tls": True}):
        assert shown_cookie(request(by_page, shares_name=True, **how)) is None
        assert shown_cookie(request(f"{by_page}; {own}", shares_name=True, **how)) == "own"
        assert shown_cookie(request(own, **how)) is None
    headers = Headers({"Host": "river.example.org", "Origin": "https://river.example.org", "Cookie": own})
    asked: Any = SimpleNamespace(path="/ws", token=None, headers=headers, over_tls=True)
    assert credential_of(asked, shares_name=True) == "own"
    assert credential_of(asked) is None

"""Which cookies of a browser count: under TLS none that a page of another name could have set."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from fastapi import Request

from kohakuriver.host.cookies import shown_cookie


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


def test_on_plain_http_the_plain_name_counts_and_two_that_differ_are_none() -> None:
    assert shown_cookie(request("kohakuriver-host=own")) == "own"
    assert shown_cookie(request("kohakuriver-host=own; kohakuriver-host=another")) is None

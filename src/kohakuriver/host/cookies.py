"""The cookie of a browser that is logged in: how it is called, set and read (RFC 6265bis).

Under TLS its name begins with `__Host-`: no page of another name in the same domain can set it, nor one without TLS.
Browsers send cookies to every port of a name, so the port is a part of it, for hosts side by side. Where pages of apps
are at another port of the host's own name, it begins with `__Host-Http-`: in browsers that know that no page can set
it, and the others take it for `__Host-`.
"""

from __future__ import annotations

from types import SimpleNamespace

from fastapi import Request
from fastapi.responses import Response

from kohakuriver.errors import NotAllowedError
from kohakuriver.host.services.credentials import Cookie
from kohakuriver.tunnel.accept import UpgradeRequest
from kohakuriver.web.origin import is_own_page

__all__ = [
    "clear_cookie",
    "clear_try",
    "credential_of",
    "is_tls",
    "need_own_page",
    "set_cookie",
    "set_try",
    "shown_cookie",
    "shown_try",
]

_NAME = "kohakuriver-host"
_TRY = "kohakuriver-login"
_UNDER_TLS, _BY_SERVERS_ALONE = "__Host-", "__Host-Http-"


def is_tls(request: Request) -> bool:
    """Whether the browser came over TLS, be it to a proxy before us: then the page that sent this says so."""
    return _surely_tls(request) or request.headers.get("origin", "").lower().startswith("https://")


def _surely_tls(request: Request) -> bool:
    """Whether browsers come to this host over TLS alone, so that a cookie without its mark is somebody else's."""
    app = request.scope.get("app")
    return request.url.scheme == "https" or bool(app is not None and getattr(app.state, "by_tls", False))


def set_cookie(request: Request, response: Response, secret: str, seconds: float, *, tls: bool = False) -> None:
    """Have the browser keep the cookie for so long. The host itself forgets it sooner, perhaps.

    `tls`: it is known that the browser came over TLS, though this request does not say so.
    """
    _set(response, _name(request, tls=tls or is_tls(request)), secret, int(seconds))


def set_try(request: Request, response: Response, kept: str, seconds: float) -> None:
    """Have a browser that came over TLS keep what it needs to come back from an OpenID provider."""
    _set(response, _name(request, tls=True, what=_TRY), kept, int(seconds))


def clear_try(request: Request, response: Response) -> None:
    """Have the browser forget that: a login is finished once."""
    _set(response, _name(request, tls=True, what=_TRY), "", 0)


def shown_try(request: Request) -> str | None:
    """What the browser has kept of it. Only the host itself can have set it."""
    return _value(request, _name(request, tls=True, what=_TRY))


def clear_cookie(request: Request, response: Response) -> None:
    """Have the browser forget each of ours that came with a request, under the name with which it came.

    Behind a proxy with TLS not every request says that it was sent over that; the cookie's name does.
    """
    came = {key for key, _, _ in _cookies(request)}
    for name in _names(request):
        if name in came:
            _set(response, name, "", 0)


def shown_cookie(request: Request) -> str | None:
    """The cookie that came with a request. Where there are several and they differ, none is taken: one is somebody's
    who wants this browser to act for them."""
    came = {key for key, _, value in _cookies(request) if value}
    return next((_value(request, name) for name in _names(request) if name in came), None)


def need_own_page(request: Request) -> None:
    """Raises NotAllowedError unless a page of this host, or the user without a page, sent a request with a cookie."""
    headers = request.headers
    if not is_own_page(
        request.method,
        headers.get("host", ""),
        headers.getlist("origin"),
        headers.getlist("sec-fetch-site"),
        tls=_surely_tls(request),
    ):
        raise NotAllowedError(
            "Only a page of this very host may do this with a browser's login; a program shows a token.",
            code="origin_not_allowed",
        )


def credential_of(request: UpgradeRequest, *, by_tls: bool = False, shares_name: bool = False) -> str | None:
    """What the opening of a WebSocket shows: a token, or a browser's cookie. None where it shows neither.

    Pages of others can open WebSockets, too, and a browser always names the page (RFC 6455 section 10.2). Raises
    NotAllowedError where a cookie comes from another page than this host's, or from none.
    """
    if request.token is not None:
        return request.token
    asked = Request(
        {
            "type": "http",
            "method": "GET",
            "scheme": "https" if request.over_tls else "http",
            "path": request.path,
            "query_string": b"",
            "app": SimpleNamespace(state=SimpleNamespace(by_tls=by_tls, shares_name=shares_name)),
            "headers": [
                (name.lower().encode(), value.encode("latin-1")) for name, value in request.headers.raw_items()
            ],
        }
    )
    cookie = shown_cookie(asked)
    if cookie is None:
        return None
    need_own_page(asked)
    if not asked.headers.getlist("origin"):
        raise NotAllowedError(
            "Only a page of this very host may open this with a browser's login; a program shows a token.",
            code="origin_not_allowed",
        )
    return Cookie(cookie)


def _cookies(request: Request) -> list[tuple[str, str, str]]:
    """All that came, as (name, "=", value)."""
    return [pair.strip().partition("=") for field in request.headers.getlist("cookie") for pair in field.split(";")]


def _value(request: Request, name: str) -> str | None:
    values = {value for key, _, value in _cookies(request) if key == name and value}
    return values.pop() if len(values) == 1 else None


def _names(request: Request) -> list[str]:
    """As what ours may come; the first that did counts."""
    return [_name(request, tls=True)] + ([] if _surely_tls(request) else [_name(request, tls=False)])


def _name(request: Request, *, tls: bool, what: str = _NAME) -> str:
    port = request.headers.get("host", "").rpartition("]")[2].partition(":")[2]
    app = request.scope.get("app")
    shares_name = app is not None and getattr(app.state, "shares_name", False)
    mark = "" if not tls else _BY_SERVERS_ALONE if shares_name else _UNDER_TLS
    return f"{mark}{what}{f'-{port}' if port.isascii() and port.isdigit() else ''}"


def _set(response: Response, name: str, secret: str, seconds: int) -> None:
    secure = name.startswith(_UNDER_TLS)
    response.set_cookie(name, secret, max_age=seconds, path="/", httponly=True, samesite="lax", secure=secure)

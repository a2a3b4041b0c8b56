"""The host's pages for people: logging in and out, and what there is. They work without JavaScript."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from html import escape
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from fastapi.routing import APIRoute

from kohakuriver import __version__
from kohakuriver.asking import asker
from kohakuriver.config import SHARED_NAMES
from kohakuriver.errors import KohakuRiverError, NotAllowedError, UnauthenticatedError, UnavailableError
from kohakuriver.host.cookies import clear_cookie, is_tls, need_own_page, set_cookie, shown_cookie
from kohakuriver.host.dashboard import dashboard
from kohakuriver.host.forms import fields_of
from kohakuriver.host.html import form, onward, page
from kohakuriver.host.index import table_of
from kohakuriver.host.parts import Services
from kohakuriver.host.places import FIRST, login_at, place_in
from kohakuriver.host.schemas import iso_time
from kohakuriver.host.services.audit import REFUSALS
from kohakuriver.host.services.credentials import Caller
from kohakuriver.host.services.failures import TOO_MANY_FAILURES
from kohakuriver.store import Token
from kohakuriver.web.app import services_of

__all__ = ["Page", "lead_to", "log_in_first", "pages", "visitor_of"]

OTHER_NAME = "other_name"
"""The code of the error for a browser that came by a name at which it is not let in: no page there helps it."""


class Page(APIRoute):
    """A route whose errors are pages, too."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        answer = super().get_route_handler()

        async def shown(request: Request) -> Response:
            try:
                _need_own_name(request)
                return await answer(request)
            except KohakuRiverError as error:
                return self.sorry(request, error)

        return shown

    @staticmethod
    def sorry(request: Request, error: KohakuRiverError, place: str = "") -> HTMLResponse:
        """The page that an error is, which is written down where errors of the API are, too.

        From there one can log in once more, for the same `place`.
        """
        if error.status in REFUSALS:
            services_of(request).audit.refused(error)
        again = login_at(place or request.query_params.get("next", ""))
        link = "" if error.code == OTHER_NAME else f'<p><a href="{escape(again)}">Log in</a></p>\n'
        return page("Sorry", f"<p>{escape(error.message)}</p>\n{link}", error.status)


pages = APIRouter(route_class=Page)


def log_in_first(place: str, code: str = "") -> Response:
    """The way to a place for a browser that is not logged in, or has come by a link with a code."""
    return RedirectResponse(login_at(place, code), 303)


def lead_to(place: str) -> Response:
    """The way from a login to its place, for a browser that has come by a form.

    An app is at another site. To browsers a form is sent to wherever the answer redirects, and ours go to this host.
    """
    if place.startswith("/open/"):
        return onward("Logged in", place, "Go on")
    return RedirectResponse(place, 303)


def _need_own_name(request: Request) -> None:
    """Raises NotAllowedError for a browser on this machine that came by a name at which others listen or can be had.

    Which name is the right one is not said: who asks may be a page, or its visitor.
    """
    name = request.url.hostname or ""
    local = name in SHARED_NAMES or (name.endswith(".localhost") and request.method != "GET")
    if local and name != _services(request).logins.name and not is_tls(request) and _is_browser(request):
        raise NotAllowedError(
            "Run `kohakuriver open`, which opens this host by a name of its own: what listens on other ports of this "
            "name would get the cookie, too.",
            code=OTHER_NAME,
        )


def _is_browser(request: Request) -> bool:
    return request.method != "GET" or request.url.path != "/" or "text/html" in request.headers.get("accept", "")


@pages.get("/", include_in_schema=False)
async def root(request: Request) -> Response:
    """What this is; for a browser that is logged in, the dashboard."""
    if not _is_browser(request):
        about = {"name": "KohakuRiver host", "version": __version__, "api": "/docs", "health": "/health"}
        return JSONResponse(about, headers={"Vary": "Accept"})
    found = await visitor_of(request)
    if found is None:
        return _to_login(request)
    return dashboard(request) or await _plain(request, *found)


@pages.get("/plain", include_in_schema=False)
async def plain(request: Request) -> Response:
    """Who is logged in, and the tasks that they may use, for browsers without scripts."""
    found = await visitor_of(request)
    return _to_login(request, "/plain") if found is None else await _plain(request, *found)


async def _plain(request: Request, caller: Caller, browser: Token) -> Response:
    until = f", until {iso_time(browser.ends_at)} at the latest" if browser.ends_at else ""
    body = f"<p>Logged in as <strong>{escape(caller.name)}</strong> ({escape(caller.role)}){until}.</p>\n"
    body += await table_of(_services(request), caller, request.headers.get("host", ""))
    links = '<p><a href="/device">Log in a command line</a>, <a href="/docs">HTTP API</a></p>\n'
    return page("Tasks", body + links + form("/logout", "", "Log out"))


@pages.get("/login", include_in_schema=False)
async def login_page(request: Request) -> Response:
    """The page that asks for a token; with the code of a link, the way in."""
    code = request.query_params.get("code")
    place = place_in(request.query_params.get("next", ""))
    if code is None:
        if await visitor_of(request) is not None:
            return RedirectResponse(place, 303)
        blank = _login_form(request, place)
        clear_cookie(request, blank)
        return blank
    services, cookie = _services(request), shown_cookie(request)
    await services.requests.turn(asker().origin)
    opened = await services.logins.opened_by(code)
    if services.logins.came_in_by(opened, cookie):
        return RedirectResponse(place, 303)
    found = await visitor_of(request)
    if not opened.used_by and not (_typed_in(request) and (found is None or found[0].name == opened.user)):
        return _ask(code, opened.user, found, place)
    return await _enter(request, code, place)


@pages.post("/login", include_in_schema=False)
async def log_in(request: Request) -> Response:
    """Log in with a token, or with the code of a link."""
    need_own_page(request)
    services = _services(request)
    await services.requests.turn(asker().origin)
    fields = await fields_of(request)
    token, place = fields.get("token", "").strip(), place_in(fields.get("next", ""))
    if "code" in fields:
        return await _enter(request, fields["code"], place)
    try:
        if not token:
            raise UnauthenticatedError("Type a token; `kohakuriver token create` makes one.")
        return _came_in(request, *await services.logins.log_in(token, shown_cookie(request)), place)
    except KohakuRiverError as error:
        return _login_form(request, place, error)


@pages.post("/logout", include_in_schema=False)
async def log_out(request: Request) -> Response:
    """Log this browser out."""
    need_own_page(request)
    cookie = shown_cookie(request)
    browser = None
    if cookie is not None:
        async with _services(request).credentials.looking():
            browser = await _services(request).logins.log_out(cookie)
    return await _out_there_too(request, browser) or _to_login(request)


async def _out_there_too(request: Request, browser: Token | None) -> Response | None:
    """For a browser that came in by an OpenID provider the way out of that: there, it is logged in still."""
    oidc = _services(request).oidc
    if oidc is None or browser is None:
        return None
    scheme = "https" if is_tls(request) else "http"
    url = await oidc.logout_url(browser, f"{scheme}://{request.headers.get('host', '')}/login")
    if url is None:
        return None
    there = f'<a href="{escape(url)}">log out there, too</a>'
    body = f"<p>You are logged out here. At {escape(oidc.name)} you may be logged in still: {there}.</p>\n"
    response = page("Logged out", body + '<p><a href="/login">Log in again</a></p>\n')
    clear_cookie(request, response)
    return response


async def _enter(request: Request, code: str, place: str) -> Response:
    return _came_in(request, *await _services(request).logins.enter(code, shown_cookie(request)), place)


def _came_in(request: Request, cookie: str, browser: Token, place: str) -> Response:
    response = lead_to(place) if request.method == "POST" else RedirectResponse(place, 303)
    set_cookie(request, response, cookie, (browser.ends_at or browser.created_at) - browser.created_at)
    return response


def _to_login(request: Request, place: str = FIRST) -> Response:
    response = log_in_first(place)
    clear_cookie(request, response)
    return response


async def visitor_of(request: Request) -> tuple[Caller, Token] | None:
    """Who is logged in with the browser that asks; None for nobody."""
    cookie = shown_cookie(request)
    if cookie is None:
        return None
    services = _services(request)
    await services.requests.turn(cookie)
    try:
        found: tuple[Caller, Token] = await services.logins.visitor(cookie)
    except UnauthenticatedError:
        return None
    except UnavailableError as error:
        # Nor is anybody where others behind this address have shown too many that are no good: the form is for all.
        if error.code != TOO_MANY_FAILURES:
            raise
        return None
    services.requests.count(found[0], needs_room=services.requests.needs_room(request.method, request.url.path))
    return found


def _typed_in(request: Request) -> bool:
    """Whether the user, or a program of theirs, has opened a link, and no page did: nobody else may log them in.

    A browser that loads what the user might open next opens nothing yet.
    """
    headers = request.headers
    here = request.url.scheme == "https" or request.url.hostname == _services(request).logins.name
    said = headers.getlist("sec-fetch-site"), headers.get("sec-fetch-mode")
    return here and said == (["none"], "navigate") and not {"sec-purpose", "purpose"} & set(headers.keys())


def _login_form(request: Request, place: str, error: KohakuRiverError | None = None) -> HTMLResponse:
    why = "" if error is None else f'<p role="alert">{escape(error.message)}</p>\n'
    oidc = _services(request).oidc
    after = _field_of(place)
    if oidc is not None:
        why += form("/login/oidc", after, f"Log in with {oidc.name}") + "<p>Or with a token of this host:</p>\n"
    field = after + (
        '<label for="token">Token</label>\n<input id="token" name="token" type="password" '
        'autocomplete="current-password" spellcheck="false" required autofocus>\n'
    )
    hint = "<p>Or have <code>kohakuriver open</code> log this browser in.</p>\n"
    return page("Log in", why + form("/login", field, "Log in") + hint, 200 if error is None else error.status)


def _field_of(place: str) -> str:
    return "" if place == FIRST else f'<input type="hidden" name="next" value="{escape(place)}">\n'


def _ask(code: str, user: str, found: tuple[Caller, Token] | None, place: str) -> HTMLResponse:
    """The page that asks whether to come in by a link: another page may have sent the browser there."""
    now = "" if found is None else f" You are logged in as <strong>{escape(found[0].name)}</strong> now."
    body = f"<p>This link logs this browser in as <strong>{escape(user)}</strong>.{now}</p>\n"
    field = f'<input type="hidden" name="code" value="{escape(code)}">\n'
    return page("Log in?", body + form("/login", field + _field_of(place), f"Log in as {user}"))


def _services(request: Request) -> Services:
    services: Services = services_of(request)
    return services

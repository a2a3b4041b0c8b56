"""The way in by an OpenID provider, as pages and as the API has it: there, back, and out again."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import Response

from kohakuriver.asking import asker
from kohakuriver.errors import KohakuRiverError, NotAllowedError, NotFoundError, UsageError
from kohakuriver.host.browser import Page, lead_to
from kohakuriver.host.cookies import clear_try, is_tls, need_own_page, set_cookie, set_try, shown_cookie, shown_try
from kohakuriver.host.forms import fields_of
from kohakuriver.host.html import onward
from kohakuriver.host.parts import Services
from kohakuriver.host.places import place_in
from kohakuriver.host.services.oidc import TRY_SECONDS, OidcLogins
from kohakuriver.web.app import services_of

__all__ = ["oidc_pages", "provider_of"]

START = "/login/oidc"
BACK = "/login/oidc/back"

oidc_pages = APIRouter(route_class=Page)


def provider_of(services: Services) -> OidcLogins:
    """The host's way in by OpenID Connect. Raises NotFoundError where it has none."""
    if services.oidc is None:
        raise NotFoundError("This host has no OpenID provider; start it with --oidc-issuer.", code="no_oidc")
    return services.oidc


@oidc_pages.post(START, include_in_schema=False)
async def begin(request: Request) -> Response:
    """Send the browser to the provider."""
    need_own_page(request)
    services: Services = services_of(request)
    oidc = provider_of(services)
    if not is_tls(request):
        raise UsageError(
            "An OpenID provider sends browsers back over TLS alone: go to this host by https://, or log in with a "
            "token."
        )
    await services.requests.turn(asker().origin)
    place = place_in((await fields_of(request)).get("next", ""))
    url, kept = await oidc.begin(_back(request), place)
    response = onward(f"Log in at {oidc.name}", url, f"Go on to {oidc.name}")
    set_try(request, response, kept, TRY_SECONDS)
    return response


@oidc_pages.get(BACK, include_in_schema=False)
async def finish(request: Request) -> Response:
    """The browser comes back from the provider."""
    services: Services = services_of(request)
    oidc = provider_of(services)
    await services.requests.turn(asker().origin)
    _need_visit(request)
    answer = _answer(request)
    login, begun_for = oidc.begun(shown_try(request), answer.get("state"))  # what another page sends here ends none
    place = place_in(begun_for)
    response: Response
    try:
        cookie, browser = await oidc.finish(login, _back(request), answer, shown_cookie(request))
    except KohakuRiverError as error:
        response = Page.sorry(request, error, place)
    else:
        response = lead_to(place)
        # It began over TLS, as only that lets a browser keep what it has shown now.
        set_cookie(request, response, cookie, (browser.ends_at or 0.0) - browser.created_at, tls=True)
    clear_try(request, response)
    return response


def _back(request: Request) -> str:
    """Where the provider sends the browser: this host, by the name that the browser has for it."""
    return f"https://{request.headers.get('host', '').lower()}{BACK}"


def _need_visit(request: Request) -> None:
    """Raises NotAllowedError for what no user sees: what is loaded ahead of a click, or in a frame."""
    headers = request.headers
    ahead = {"sec-purpose", "purpose"} & set(headers.keys())
    if ahead or headers.get("sec-fetch-dest", "document") != "document":
        raise NotAllowedError("A provider's answer is for a page that you see; log in once more.")


def _answer(request: Request) -> dict[str, str]:
    """What the provider says in the query; of what is said twice, nothing counts (RFC 6749, section 3.1)."""
    names = [name for name, _ in request.query_params.multi_items()]
    return {name: value for name, value in request.query_params.items() if names.count(name) == 1}

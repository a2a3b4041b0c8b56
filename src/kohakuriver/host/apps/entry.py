"""The host's side of the way into an app: who asks, and may they?"""

from __future__ import annotations

import re
from urllib.parse import quote, urlencode

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from kohakuriver.errors import NotAllowedError, NotFoundError, UsageError
from kohakuriver.host.apps.gate import ENTER
from kohakuriver.host.apps.pages import form_page
from kohakuriver.host.browser import Page, log_in_first, visitor_of
from kohakuriver.host.parts import Services
from kohakuriver.tunnel.ports import port_in
from kohakuriver.web.app import services_of

__all__ = ["entry"]

_STATE = re.compile(r"[0-9a-f]{64}")

entry = APIRouter(route_class=Page)


@entry.get("/open/{task}/{port}", include_in_schema=False)
async def open_port(request: Request, task: str, port: str, code: str = "") -> Response:
    """Go to the address of a task's port; with the code of a link, by way of the login."""
    found = await visitor_of(request)
    if found is None or code:  # the code is used up, whoever is logged in
        return log_in_first(f"/open/{quote(task, '')}/{port}", code)
    services: Services = services_of(request)
    usable, _ = await services.access.usable(found[0], task)
    address = services.apps.address(usable, port_in(port), request.headers.get("host", ""))
    if address is None:
        raise NotFoundError(
            f"From here no browser gets to the address of an app: use `kohakuriver open {task} {port}`, or have the "
            "host started with --apps-domain or --apps-url."
        )
    return RedirectResponse(services.apps.begin(address), 303, headers={"Referrer-Policy": "no-referrer"})


@entry.get("/enter-app", include_in_schema=False)
async def enter_app(request: Request, app: str = "", state: str = "") -> Response:
    """Send a browser back to the address of an app that sent it here, with a code that lets it in."""
    _need_a_person(request)
    found = await visitor_of(request)
    if found is None:
        return log_in_first(f"/enter-app?{urlencode({'app': app, 'state': state})}")
    services: Services = services_of(request)
    caller, browser = found
    address = services.apps.addresses.named(app)
    if address is None or not address.tag or not _STATE.fullmatch(state):
        raise UsageError("There is no app at this address: open the port again on the host's page.")
    task, _ = await services.access.usable(caller, address.label)
    if address != services.apps.address(task, address.port, request.headers.get("host", "")):
        raise NotFoundError("There is no app at this address any more: open the port again on the host's page.")
    code = await services.apps.code(browser, task, address, state)
    place = address.place
    text, fields = form_page(f"{place.base}{ENTER.decode()}", place.origin, code, referrer="no-referrer")
    return HTMLResponse(text, headers=fields)


def _need_a_person(request: Request) -> None:
    """Raises NotAllowedError for what a page loads: only a window in which somebody goes there gets a code."""
    headers = request.headers
    how = headers.get("sec-fetch-mode", "navigate"), headers.get("sec-fetch-dest", "document")
    if how != ("navigate", "document"):
        raise NotAllowedError("Only a link may lead here.", code="origin_not_allowed")

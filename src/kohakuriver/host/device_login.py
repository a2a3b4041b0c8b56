"""The page on which somebody lets a command line log in as them: it says who asks, and what they would get."""

from __future__ import annotations

import time
from html import escape

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response

from kohakuriver.errors import KohakuRiverError
from kohakuriver.host.browser import Page, log_in_first, visitor_of
from kohakuriver.host.cookies import need_own_page
from kohakuriver.host.forms import fields_of
from kohakuriver.host.html import form, page
from kohakuriver.host.parts import Services
from kohakuriver.host.schemas import iso_time
from kohakuriver.host.services.credentials import Caller
from kohakuriver.host.services.device_logins import PAGE
from kohakuriver.store import Token
from kohakuriver.store.device_codes import Waiting
from kohakuriver.web.app import services_of

__all__ = ["device_pages"]

device_pages = APIRouter(route_class=Page)


@device_pages.get(PAGE, include_in_schema=False)
async def device_page(request: Request) -> Response:
    """The page that asks for the code that a command line shows."""
    found = await visitor_of(request)
    return log_in_first(PAGE) if found is None else _code_form(found[0])


@device_pages.post(PAGE, include_in_schema=False)
async def device_login(request: Request) -> Response:
    """Show whose code that is; then, with an answer, let that command line log in or refuse it."""
    need_own_page(request)
    visitor = await visitor_of(request)
    if visitor is None:
        return log_in_first(PAGE)
    services: Services = services_of(request)
    fields = await fields_of(request)
    caller, browser = visitor
    try:
        typed, waiting = await services.devices.typed(fields.get("code", ""))
        if fields.get("answer") not in ("yes", "no"):
            return _question(typed, waiting, caller, browser)
        allow = fields["answer"] == "yes"
        await services.devices.answer(typed, fields.get("asked", ""), browser, allow=allow)
    except KohakuRiverError as error:
        return _code_form(caller, error)
    done = f"{escape(waiting.machine)} is logged in as {escape(caller.name)}." if allow else "It was refused."
    ends = " <code>kohakuriver token list</code> shows its token, <code>token revoke</code> ends it." if allow else ""
    return page("Done", f"<p>{done}{ends} You can close this page.</p>\n")


def _code_form(caller: Caller, error: KohakuRiverError | None = None) -> HTMLResponse:
    why = "" if error is None else f'<p role="alert">{escape(error.message)}</p>\n'
    why += (
        f"<p>Type the code that <code>kohakuriver auth login</code> shows on your own terminal, to log it in as "
        f"<strong>{escape(caller.name)}</strong>. Never type one that somebody has sent you.</p>\n"
    )
    field = (
        '<label for="code">Code</label>\n<input id="code" name="code" autocomplete="off" autocapitalize="characters" '
        'spellcheck="false" maxlength="20" required autofocus>\n'
    )
    return page("Log in a command line", why + form(PAGE, field, "Go on"), 200 if error is None else error.status)


def _question(typed: str, waiting: Waiting, caller: Caller, browser: Token) -> HTMLResponse:
    ago = max(int(time.time() - waiting.created_at), 0)
    until = "" if browser.ends_at is None else f", until {iso_time(browser.ends_at)}"
    body = (
        f"<p>A command line asks to act as <strong>{escape(caller.name)}</strong> ({escape(caller.role)}) on this host"
        f"{until}: whoever runs it could do all that you can.</p>\n"
        "<table>\n"
        f"<tr><th>It asks from<td>{escape(waiting.source)}\n"
        f"<tr><th>It calls itself<td>{escape(waiting.machine)}\n"
        f"<tr><th>It asked<td>{ago} s ago\n"
        "</table>\n"
        "<p>Say yes only if you have just run <code>kohakuriver auth login</code> there yourself. If somebody has sent "
        "you the code, it is theirs: they would be in as you.</p>\n"
    )
    kept = (
        f'<input type="hidden" name="code" value="{escape(typed)}">\n'
        f'<input type="hidden" name="asked" value="{escape(waiting.id)}">\n'
    )
    yes = '<input type="hidden" name="answer" value="yes">\n'
    no = '<input type="hidden" name="answer" value="no">\n'
    yes_form = form(PAGE, kept + yes, f"Yes, log it in as {caller.name}")
    return page("Log in this command line?", body + yes_form + form(PAGE, kept + no, "No"))

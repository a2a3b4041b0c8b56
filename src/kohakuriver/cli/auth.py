"""`kohakuriver auth …`: which token the commands show to a host."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Collection
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kohakuriver.cli import output
from kohakuriver.cli.app import App
from kohakuriver.cli.options import JsonOption, Place, Remote, remote
from kohakuriver.errors import UnauthenticatedError, UsageError

if TYPE_CHECKING:
    from kohakuriver.client.host import HostClient, Limit
    from kohakuriver.config import Settings

__all__ = ["app"]

app = App(
    help="Log in to a host, and see who you are there.",
    epilog="Example: kohakuriver auth login --host http://cluster:8000",
)


@app.command(epilog="Example: kohakuriver auth login --host http://cluster:8000")
@remote
def login(
    at: Remote,
    web: Annotated[bool, typer.Option("--web", help="Log in with a browser, here or elsewhere: no token.")] = False,
    with_token: Annotated[bool, typer.Option("--with-token", help="Take a token, typed or from stdin.")] = False,
    plain_http: Annotated[
        bool, typer.Option("--plain-http", help="It is known that others can read what goes to a host by plain HTTP.")
    ] = False,
) -> None:
    """Keep a token for a host, once the host has taken it; commands then use that host and token by themselves.

    The token is asked for, or read from stdin where that is no terminal. Who types none is logged in with a browser.
    """
    from kohakuriver.config import Logins, accept_plain_http, clean_token, read_logins, write_logins

    if web and (with_token or at.token):
        raise UsageError("--web gets a token from the host; give none with it.")
    settings = at.resolved()
    url = settings.named
    if plain_http:
        for host in settings.hosts:
            accept_plain_http(host)
    at.ask_as(None, lambda client: client.health())
    secret = clean_token(at.token or (None if web else _read_token(url, or_browser=not with_token)) or _by_browser(at))
    who = at.ask_as(secret, lambda client: client.whoami())
    logins = read_logins()
    ca_files = _without(settings.hosts, logins.ca_files)
    if settings.ca_file is not None:
        file = str(Path(settings.ca_file).expanduser().absolute())
        ca_files |= {host: file for host in settings.hosts if host.startswith("https:")}
    write_logins(Logins(url, {**logins.tokens, **dict.fromkeys(settings.hosts, secret)}, ca_files))
    if at.json:
        output.json_line({"host": url, "user": who.user, "role": who.role})
    else:
        output.line(f"Logged in to {url} as {who.user} ({who.role}).")
    _warn_if_overruled(url, secret)


def _without(hosts: Collection[str], kept: dict[str, str]) -> dict[str, str]:
    return {host: text for host, text in kept.items() if host not in hosts}


def _warn_if_overruled(url: str, secret: str) -> None:
    """Say which setting keeps commands from using a login by themselves."""
    from kohakuriver.config import load_settings, read_cluster, set_by

    settings = load_settings()
    if settings.named != url:
        by = set_by("host") or ("the cluster that `up` started" if read_cluster() else "another login")
        output.note(f"Note: without --host {url} commands use {settings.named}, because of {by}.")
    elif settings.token != secret:
        output.note(f"Note: commands use another token for {url}, because of {set_by('token')}.")


def _by_browser(at: Remote) -> str:
    from kohakuriver.cli.device_login import token_by_browser

    made = at.ask_as(None, token_by_browser)
    return made.token or ""


def _read_token(url: str, *, or_browser: bool) -> str | None:
    """The token that is typed or piped; None for a user at a terminal who types none, and may go by a browser."""
    if output.is_terminal(sys.stdin):
        from getpass import getpass

        secret = getpass(f"Token for {url}{', or Enter to log in with a browser' if or_browser else ''}: ")
        if or_browser and not secret.strip():
            return None
    else:
        secret = sys.stdin.readline()
    if not secret.strip():
        raise UsageError("Give a token: type it, pipe it into stdin, or have one made with `kohakuriver token create`.")
    return secret.strip()


@app.command(epilog="Example: kohakuriver auth logout --revoke")
@remote
def logout(
    at: Place,
    revoke: Annotated[bool, typer.Option("--revoke", help="Have the host forget the token too.")] = False,
    json: JsonOption = False,
) -> None:
    """Forget the token that was kept for a host."""
    from kohakuriver.config import Logins, read_logins, set_by, write_logins

    settings, logins = at.resolved(), read_logins()
    url, hosts = settings.named, settings.hosts
    secret = logins.tokens.get(settings.host)
    if secret is not None and revoke:

        async def revoke_own(client: HostClient) -> None:
            await client.revoke_token((await client.whoami()).token.id)

        with contextlib.suppress(UnauthenticatedError):  # it is worth nothing already
            at.ask_as(secret, revoke_own)
    current = None if logins.current == url else logins.current
    write_logins(Logins(current, _without(hosts, logins.tokens), _without(hosts, logins.ca_files)))
    if by := set_by("token"):
        output.note(f"Note: commands still show a token, because of {by}.")
    if json:
        output.json_line({"host": url, "logged_out": secret is not None})
    else:
        output.line(f"Logged out of {url}." if secret is not None else f"You were not logged in to {url}.")


@app.command(epilog="Example: kohakuriver auth status --json")
@remote
def status(at: Remote) -> None:
    """Show who you are to the host, where the token comes from, and how much you may have there."""
    settings = at.resolved(at.token)
    who = at.ask(lambda client: client.whoami())
    source = _source(settings, at.token)
    if at.json:
        shown = {"host": settings.named, "user": who.user, "role": who.role, "token": who.token.to_json()}
        limits = {name: asdict(limit) for name, limit in who.limits.items()}
        output.json_line({**shown, "source": source, "limits": limits})
        return
    output.fields(
        [
            ("host", settings.named),
            ("user", who.user),
            ("role", who.role),
            ("token", f"{who.token.name} ({who.token.id})"),
            ("expires", who.token.expires_at or "never"),
            ("from", source),
            *((name, _of_limit(name, limit)) for name, limit in who.limits.items()),
        ]
    )


def _of_limit(name: str, limit: Limit) -> str:
    has, most = output.allowed(name, limit.used, limit.limit)
    return f"{has} of {most}" if has else f"{most} at most"


def _source(settings: Settings, flag: str | None) -> str:
    """Where the token in force comes from."""
    from kohakuriver.config import read_cluster, read_logins

    cluster = read_cluster()
    if flag is not None:
        return "--token"
    if os.environ.get("KOHAKURIVER_TOKEN"):
        return "KOHAKURIVER_TOKEN"
    if read_logins().tokens.get(settings.host) == settings.token:
        return "auth login"
    return "up" if cluster is not None and cluster.token == settings.token else "config.toml"

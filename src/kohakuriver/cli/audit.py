"""`kohakuriver audit`: what was done on the host, by whom. For admins."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kohakuriver.cli import output
from kohakuriver.cli.options import Remote, moment_of, remote

if TYPE_CHECKING:
    from kohakuriver.client.host import HostClient

__all__ = ["register"]

FOLLOW_SECONDS = 1.0

_FIRST = ("time", "event", "user", "from")


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(epilog="Example: kohakuriver audit --since 12h --user ann")(remote(audit))


def audit(
    at: Remote,
    since: Annotated[
        str, typer.Option("--since", metavar="TIME", help="How long ago, as 12h or 30d, or a moment in ISO 8601.")
    ] = "1d",
    user: Annotated[
        str | None, typer.Option("--user", metavar="USER", help="What this user did, or had done to them.")
    ] = None,
    task: Annotated[str | None, typer.Option("--task", metavar="TASK", help="What was done with this task.")] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is done from now on.")] = False,
) -> None:
    """What was done on the host: who, from where, with which task. For admins."""
    moment = moment_of(since, "--since")

    async def show(client: HostClient) -> None:
        after: str | None = None
        nothing = True
        while True:
            page = await client.audit(since=moment, user=user, task=task, after=after)
            after = page.after
            nothing = nothing and not page.events
            for event in page.events:
                output.json_line(event) if at.json else output.line(_sentence(event))
            if not page.more:
                if not follow:
                    if nothing and not at.json:
                        output.note("Nothing of that was done; --since 30d looks further back.")
                    return
                await asyncio.sleep(FOLLOW_SECONDS)

    at.ask(show)


def _sentence(event: dict[str, Any]) -> str:
    """One event as a line for people: when, what, who, from where, and the rest by name."""
    first = [str(event.get(name, "-")) for name in _FIRST]
    first[0] = first[0][: len("2026-01-01T00:00:00")]
    rest = [f"{name}={_text(value)}" for name, value in event.items() if name not in _FIRST and value not in (None, "")]
    return "  ".join([*first, *rest])


def _text(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return repr(text) if " " in text else text

"""`kohakuriver user …`: who may use the host. For admins."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kohakuriver.cli import output
from kohakuriver.cli.app import App
from kohakuriver.cli.options import Remote, remote, seconds
from kohakuriver.cli.processes import warn_of_processes
from kohakuriver.quotas import QUOTAS, QuotaName, parsed

if TYPE_CHECKING:
    from kohakuriver.client.host import HostClient, Limits, Token, User

__all__ = ["app"]

app = App(
    help="Who may use the host. For admins.",
    epilog="Example: kohakuriver user add ann",
)


class Role(str, Enum):
    """What a user may do."""

    admin = "admin"
    user = "user"


UserArgument = Annotated[str, typer.Argument(metavar="USER", help="The user's name.", show_default=False)]


def _limit(name: QuotaName) -> Any:
    metavar = {"": "N", "bytes": "SIZE", "CPUs": "N", "seconds": "TIME"}[QUOTAS[name].unit]
    most = "so much" if metavar == "TIME" else "so many"
    return typer.Option(
        f"--{name.replace('_', '-')}",
        metavar=metavar,
        help=f"At most {most} {QUOTAS[name].what}.",
        rich_help_panel="Limits",
    )


@dataclass(frozen=True)
class WithLimits(Remote):
    """A host to ask, and limits of a user, as they were given."""

    tasks: Annotated[str | None, _limit("tasks")] = None
    running: Annotated[str | None, _limit("running")] = None
    tokens: Annotated[str | None, _limit("tokens")] = None
    sessions: Annotated[str | None, _limit("sessions")] = None
    connects: Annotated[str | None, _limit("connects")] = None
    memory: Annotated[str | None, _limit("memory")] = None
    cpus: Annotated[str | None, _limit("cpus")] = None
    pids: Annotated[str | None, _limit("pids")] = None
    gpus: Annotated[str | None, _limit("gpus")] = None
    log: Annotated[str | None, _limit("log")] = None
    ttl: Annotated[str | None, _limit("ttl")] = None
    idle_stop: Annotated[str | None, _limit("idle_stop")] = None

    def limits(self) -> dict[str, float | None]:
        """Those that were given, None for the host's default. Raises UsageError."""
        return {name: parsed(name, text) for name in QUOTAS if (text := getattr(self, name)) is not None}


@app.command(epilog="Example: kohakuriver user add ann --expires 90d")
@remote
def add(
    at: WithLimits,
    name: UserArgument,
    role: Annotated[
        Role, typer.Option("--role", help="An admin may do everything, also with others' tasks.")
    ] = Role.user,
    expires: Annotated[
        str | None,
        typer.Option("--expires", metavar="TIME", help="How long the first token is good, as 30d. Default: for ever."),
    ] = None,
) -> None:
    """Add a user and print their first token, this once; `kohakuriver auth login` takes it."""
    expires_in, limits = None if expires is None else seconds(expires, "--expires"), at.limits()

    async def make(client: HostClient) -> tuple[User, Token]:
        user = await client.add_user(name, role=role.value, limits=limits)
        return user, await client.make_token("first", user=name, expires_in=expires_in)

    user, made = at.ask(make)
    if user.role == Role.user.value:
        warn_of_processes(at)
    if at.json:
        output.json_line({**user.to_json(), "token": made.token, "expires_at": made.expires_at})
    else:
        output.note(f"Added {user.name} ({user.role}). Their first token is shown only now:")
        output.line(made.token or "")


@app.command("list", epilog="Example: kohakuriver user list")
@remote
def list_users(at: Remote) -> None:
    """List all users."""
    users = at.ask(lambda client: client.users())
    if at.json:
        output.json_line({"users": [user.to_json() for user in users]})
        return
    columns = ["Name", "Role", "Added"]
    rows = [[user.name, user.role, f"{output.age(user.created_at)} ago"] for user in users]
    if any(user.oidc for user in users):
        columns.append("OpenID subject")
        rows = [[*row, user.oidc or ""] for row, user in zip(rows, users, strict=True)]
    output.table(columns, rows)


@app.command(epilog="Example: kohakuriver user link ann --oidc 248289761001")
@remote
def link(
    at: Remote,
    name: UserArgument,
    oidc: Annotated[
        str,
        typer.Option("--oidc", metavar="SUB", help="The subject: the 'sub' by which the provider knows them."),
    ],
) -> None:
    """Have whom the host's OpenID provider knows as SUB log in as this user, and nobody else from there."""
    linked = at.ask(lambda client: client.link_user(name, oidc))
    at.show(linked.to_json(), f"{linked.oidc} logs in as {linked.name}.")


@app.command(epilog="Example: kohakuriver user unlink ann")
@remote
def unlink(
    at: Remote,
    name: UserArgument,
) -> None:
    """Take that back; browsers that came in so are logged out, and the command lines that these logged in."""
    unlinked = at.ask(lambda client: client.unlink_user(name))
    at.show(unlinked.to_json(), f"Nobody at the provider logs in as {unlinked.name} any more.")


@app.command(epilog="Example: kohakuriver user limit ann --tasks 20 --memory 128g --cpus default")
@remote
def limit(
    at: WithLimits,
    name: UserArgument,
) -> None:
    """Let a user have more or less, and show how much that is: a number or size, 'none', or 'default'.

    Nothing of theirs ends: who has more than a limit allows keeps it, and gets no more.
    """
    changes = at.limits()

    async def change(client: HostClient) -> Limits:
        return await client.set_limits(name, changes) if changes else await client.limits(name)

    limits = at.ask(change)
    if at.json:
        output.json_line({"name": name, "limits": {quota: asdict(each) for quota, each in limits.items()}})
        return
    output.table(
        ["Limit", "Has", "May have", "Set"],
        [
            [quota, *output.allowed(quota, each.used, each.limit), "own" if each.own else "default"]
            for quota, each in limits.items()
        ],
    )


@app.command(epilog="Example: kohakuriver user remove ann")
@remote
def remove(
    at: Remote,
    name: UserArgument,
) -> None:
    """Remove a user: their tokens end, and what is open with them. Their tasks become yours."""
    removed = at.ask(lambda client: client.remove_user(name))
    if at.json:
        output.json_line(removed.to_json())
    else:
        output.line(f"Removed {removed.name}; the tasks that were theirs are yours now.")

"""`kohakuriver user …`: who may use the host. For admins."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from kohakuriver.cli import output
from kohakuriver.cli.app import App
from kohakuriver.cli.options import Remote, remote, seconds

if TYPE_CHECKING:
    from kohakuriver.client.host import HostClient, Token, User

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


@app.command(epilog="Example: kohakuriver user add ann --expires 90d")
@remote
def add(
    at: Remote,
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
    expires_in = None if expires is None else seconds(expires, "--expires")

    async def make(client: HostClient) -> tuple[User, Token]:
        user = await client.add_user(name, role=role.value)
        return user, await client.make_token("first", user=name, expires_in=expires_in)

    user, made = at.ask(make)
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
    output.table(
        ["Name", "Role", "Added"], [[user.name, user.role, f"{output.age(user.created_at)} ago"] for user in users]
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

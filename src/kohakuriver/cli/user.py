"""`kohakuriver user …`: who may use the host. For admins."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated

import typer

from kohakuriver.cli import output
from kohakuriver.cli.options import CaFileOption, HostOption, JsonOption, TokenOption, ask, seconds

if TYPE_CHECKING:
    from kohakuriver.client.host import HostClient, Token, User

__all__ = ["app"]

app = typer.Typer(
    help="Who may use the host. For admins.", epilog="Example: kohakuriver user add ann", no_args_is_help=True
)


class Role(str, Enum):
    """What a user may do."""

    admin = "admin"
    user = "user"


UserArgument = Annotated[str, typer.Argument(metavar="USER", help="The user's name.", show_default=False)]


@app.command(epilog="Example: kohakuriver user add ann --expires 90d")
def add(
    name: UserArgument,
    role: Annotated[
        Role, typer.Option("--role", help="An admin may do everything, also with others' tasks.")
    ] = Role.user,
    expires: Annotated[
        str | None,
        typer.Option("--expires", metavar="TIME", help="How long the first token is good, as 30d. Default: for ever."),
    ] = None,
    json: JsonOption = False,
    host: HostOption = None,
    token: TokenOption = None,
    ca_file: CaFileOption = None,
) -> None:
    """Add a user and print their first token, this once; `kohakuriver auth login` takes it."""
    expires_in = None if expires is None else seconds(expires, "--expires")

    async def make(client: HostClient) -> tuple[User, Token]:
        user = await client.add_user(name, role=role.value)
        return user, await client.make_token("first", user=name, expires_in=expires_in)

    user, made = ask(host, token, make)
    if json:
        output.json_line({**user.to_json(), "token": made.token, "expires_at": made.expires_at})
    else:
        output.note(f"Added {user.name} ({user.role}). Their first token is shown only now:")
        output.line(made.token or "")


@app.command("list", epilog="Example: kohakuriver user list")
def list_users(
    json: JsonOption = False, host: HostOption = None, token: TokenOption = None, ca_file: CaFileOption = None
) -> None:
    """List all users."""
    users = ask(host, token, lambda client: client.users())
    if json:
        output.json_line({"users": [user.to_json() for user in users]})
        return
    output.table(
        ["Name", "Role", "Added"], [[user.name, user.role, f"{output.age(user.created_at)} ago"] for user in users]
    )


@app.command(epilog="Example: kohakuriver user remove ann")
def remove(
    name: UserArgument,
    json: JsonOption = False,
    host: HostOption = None,
    token: TokenOption = None,
    ca_file: CaFileOption = None,
) -> None:
    """Remove a user: their tokens end, and what is open with them. Their tasks become yours."""
    removed = ask(host, token, lambda client: client.remove_user(name))
    if json:
        output.json_line(removed.to_json())
    else:
        output.line(f"Removed {removed.name}; the tasks that were theirs are yours now.")
